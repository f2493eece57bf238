"""Sets of integers kept as sorted half-open ranges: pieces proven, bytes hashed, pieces wanted.

Invariants: begins are not negative, every range is non-empty, ranges are sorted and never touch, so equal sets are equal
values. It deliberately is not a bitmap: most sets here are a few long runs, also over 100,000 pieces.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Self

from modelp2p.protocol.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from modelp2p.protocol.codec import Value


@dataclass(frozen=True, slots=True)
class Ranges:
    """An immutable set of non-negative integers; iterating gives its `(begin, end)` ranges in order."""

    spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if any(not 0 <= begin < end for begin, end in self.spans):
            raise ValueError("a range is empty or negative")
        if any(left[1] >= right[0] for left, right in pairwise(self.spans)):
            raise ValueError("ranges are unsorted or touch")

    @classmethod
    def of(cls, spans: Iterable[tuple[int, int]]) -> Self:
        """The set covered by `spans`, in any order, overlapping or empty."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(span for span in spans if span[0] < span[1]):
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        return cls(tuple(merged))

    @classmethod
    def of_ints(cls, values: Iterable[int]) -> Self:
        """The set holding exactly `values`, in any order."""
        return cls.of((value, value + 1) for value in values)

    @classmethod
    def span(cls, begin: int, end: int) -> Self:
        """The integers from `begin` up to, not including, `end`; empty if there are none."""
        return cls.of([(begin, end)])

    @classmethod
    def from_list(cls, value: object) -> Self:
        """The set that `to_list` wrote; only its one canonical form is accepted.

        Raises:
            FormatError: anything else.
        """
        if not isinstance(value, (list, tuple)):
            raise FormatError("ranges are not a list")
        spans: list[tuple[int, int]] = []
        for pair in value:
            match pair:
                case [int(begin), int(end)] if type(begin) is type(end) is int:
                    spans.append((begin, end))
                case _:
                    raise FormatError("a range is not a pair of integers")
        try:
            return cls(tuple(spans))
        except ValueError as exc:
            raise FormatError(str(exc)) from exc

    def to_list(self) -> list[Value]:
        """`[[begin, end], ...]`, ready for the codec."""
        return [[begin, end] for begin, end in self.spans]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.spans)

    def __bool__(self) -> bool:
        return bool(self.spans)

    def __contains__(self, value: int) -> bool:
        return self.contains(value)

    @property
    def total(self) -> int:
        """How many integers the set holds."""
        return sum(end - begin for begin, end in self.spans)

    def ints(self) -> Iterator[int]:
        """Every integer of the set in order."""
        for begin, end in self.spans:
            yield from range(begin, end)

    def contains(self, value: int) -> bool:
        """Whether `value` is in the set. Cost: one bisection."""
        return self.covers(value, value + 1)

    def covers(self, begin: int, end: int) -> bool:
        """Whether all of `begin` up to `end` is in the set; true for an empty range."""
        if begin >= end:
            return True
        at = bisect_right(self.spans, begin, key=_begin_of) - 1
        return at >= 0 and end <= self.spans[at][1]

    def union(self, other: Ranges) -> Ranges:
        """What is in either set."""
        return Ranges.of(self.spans + other.spans)

    def intersect(self, other: Ranges) -> Ranges:
        """What is in both sets. Cost: linear in the ranges of both."""
        found: list[tuple[int, int]] = []
        mine, theirs = 0, 0
        while mine < len(self.spans) and theirs < len(other.spans):
            begin = max(self.spans[mine][0], other.spans[theirs][0])
            end = min(self.spans[mine][1], other.spans[theirs][1])
            if begin < end:
                found.append((begin, end))
            if self.spans[mine][1] < other.spans[theirs][1]:
                mine += 1
            else:
                theirs += 1
        return Ranges(tuple(found))

    def minus(self, other: Ranges) -> Ranges:
        """What is in this set and not in `other`."""
        if not self.spans:
            return self
        return self.intersect(other.missing(self.spans[-1][1]))

    def missing(self, total: int) -> Ranges:
        """What of `0` up to `total` is not in the set."""
        edges = [0, *(edge for span in self.spans for edge in span), total]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        return Ranges(tuple((begin, min(end, total)) for begin, end in gaps if begin < min(end, total)))


def _begin_of(span: tuple[int, int]) -> int:
    return span[0]
