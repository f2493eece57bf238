"""Loading while fetching, the decisions: which pieces a reader's order makes urgent, and what the engine has to be told.

A *wish* is a half-open range of global piece numbers; wishes come in the order in which their bytes will be read. Pure.

Invariants:
- only pieces that the fetch asks for and that are not proven get a priority: one that is not selected is never asked for;
- the most urgent pieces are few: what comes behind them fills the network anyway, and a short first band keeps the order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from modelp2p.protocol.errors import FormatError

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value
    from modelp2p.protocol.ranges import Ranges

Span: TypeAlias = tuple[int, int]

NORMAL = 4
"""The priority of a piece nobody waits for; the engine's own default."""
BANDS = ((7, 4 << 20), (6, 16 << 20), (5, 128 << 20))
"""Priority, and bytes that get it, most urgent first. Within a band the engine takes what is rarest: the first one is short,
so that a slow network keeps the order; together they outlast the time between two looks at 1 GB/s."""
MAX_WISHES = 4096
"""Ranges in one list of wishes: tensors in file order are one range a file; more are cut off by the reader."""
MAX_RANGES = 20_000
"""Ranges in one event: at most 11 bytes each, so that it fits a control frame; more take more events."""


def urgency(wishes: Iterable[Span], missing: Ranges, piece_length: int) -> dict[int, int]:
    """The priority of each urgent piece of one reader.

    Args:
        wishes: what it will read, in order.
        missing: pieces that are asked for and not proven.
        piece_length: bytes of a piece.
    """
    room = [(priority, max(1, size // piece_length)) for priority, size in BANDS]
    found: dict[int, int] = {}
    for begin, end in wishes:
        for piece in _within(missing, begin, end):
            if piece in found:
                continue
            priority, left = room[0]
            found[piece] = priority
            room[0] = (priority, left - 1)
            if left == 1:
                del room[0]
            if not room:
                return found
    return found


def together(readers: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """The priorities of several readers of one release: each piece as urgent as its most urgent reader has it."""
    found: dict[int, int] = {}
    for wanted in readers:
        for piece, priority in wanted.items():
            found[piece] = max(priority, found.get(piece, 0))
    return found


def changes(told: Mapping[int, int], now: Mapping[int, int], missing: Ranges) -> dict[int, int]:
    """What an engine that was told one set of priorities has to hear so that another is in force; proven pieces rest."""
    raised = {piece: priority for piece, priority in now.items() if told.get(piece, NORMAL) != priority}
    lowered = {piece: NORMAL for piece in told if piece not in now and piece in missing}
    return raised | lowered


def news(told: Ranges, now: Ranges) -> Iterator[Map]:
    """The events that tell a reader who knows `told` that `now` is proven: `proven` and `lost` ranges, each event in bounds."""
    for key, spans in (("lost", told.minus(now).spans), ("proven", now.minus(told).spans)):
        for at in range(0, len(spans), MAX_RANGES):
            ranges: list[Value] = [[begin, end] for begin, end in spans[at : at + MAX_RANGES]]
            yield {"phase": "streaming", key: ranges}


def decode_wishes(value: object, total: int) -> tuple[Span, ...]:
    """A list of wishes as it came from outside, about a release of `total` pieces.

    Raises:
        FormatError: no list of pairs, too many, or a piece that does not exist.
    """
    if not isinstance(value, list) or len(value) > MAX_WISHES:
        raise FormatError(f"wishes must be a list of at most {MAX_WISHES} ranges of pieces")
    found: list[Span] = []
    for pair in value:
        match pair:
            case [int(begin), int(end)] if type(begin) is type(end) is int and 0 <= begin < end <= total:
                found.append((begin, end))
            case _:
                raise FormatError(f"a wish is not a range of pieces between 0 and {total}")
    return tuple(found)


def joined(spans: Iterable[Span], most: int = MAX_WISHES) -> tuple[Span, ...]:
    """The same order with neighbours made one, empty spans left out, cut off at `most` ranges."""
    found: list[Span] = []
    for begin, end in spans:
        if begin >= end:
            continue
        if found and found[-1][0] <= begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif len(found) == most:
            break
        else:
            found.append((begin, end))
    return tuple(found)


def still_open(wishes: Sequence[Span], proven: Ranges) -> tuple[Span, ...]:
    """The wishes without the leading ones that are fulfilled."""
    at = next((at for at, (begin, end) in enumerate(wishes) if not proven.covers(begin, end)), len(wishes))
    return tuple(wishes[at:])


def _within(pieces: Ranges, begin: int, end: int) -> Iterator[int]:
    """The pieces from `begin` up to `end`, in order. Cost: one bisection, then what is taken."""
    at = max(0, bisect_right(pieces.spans, begin, key=_begin_of) - 1)
    # Not a slice: it would copy the rest of the ranges for each wish.
    for index in range(at, len(pieces.spans)):
        first, last = pieces.spans[index]
        if first >= end:
            return
        yield from range(max(first, begin), min(last, end))


def _begin_of(span: Span) -> int:
    return span[0]
