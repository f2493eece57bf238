"""What has to be read, and where each wanted byte of it goes: decided before anything is read.

A **want** is one tensor, or a slice of it along one dimension, to be made on a device. A **span** is a run of consecutive pieces
of one file, short enough for one slot. A **move** says which bytes of a span belong to which want.

Invariants, tested as laws:
- every byte of every want is in exactly one move, at its place; no other byte is in any;
- spans are whole pieces inside their file, at most one slot long, disjoint; each piece in one is touched by a want;
- they are in the order of files and bytes or, where wants have ranks, each as early as the first want it serves;
- a want is completed by exactly one span, its last; wants without bytes are in no span (`Plan.empty`).

Everything here is pure; it knows shapes and byte offsets, and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from modelp2p.loader.parts import is_number
from modelp2p.loader.pieces import runs_of
from modelp2p.protocol.errors import UsageError

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.order import Place
    from modelp2p.loader.parts import Part
    from modelp2p.loader.pieces import PieceTable
    from modelp2p.protocol.ranges import Ranges

Cut = tuple[int, int, int]
"""`(dimension, start, stop)`: the rows `start` up to `stop` along a dimension, which may count from the end."""

Cuts = Mapping[str, Cut] | Callable[[str, tuple[int, ...]], Cut | None]
"""Which tensors are cut, as tensor parallelism does: by name, or asked with name and shape. What it is silent about is whole."""


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` stretches of `length` bytes, `stride` bytes from begin to begin, the first at byte `begin` of the file."""

    begin: int
    length: int
    count: int = 1
    stride: int = 0

    @property
    def end(self) -> int:
        """Behind the last byte."""
        return self.begin + (self.count - 1) * self.stride + self.length


@dataclass(frozen=True, slots=True)
class Want:
    """A stored tensor, or its slice `start` up to `stop` along `dim`; contiguous, row-major once it is made."""

    part: Part
    dim: int | None = None
    start: int = 0
    stop: int = 0
    dtype: torch.dtype | None = None
    """What it is cast to at the end; None: as stored."""

    def __post_init__(self) -> None:
        if self.dim is None:
            return
        if not 0 <= self.dim < len(self.part.shape):
            raise UsageError(f"tensor '{self.part.name}' of {len(self.part.shape)} dimensions has no dimension {self.dim}")
        rows = self.part.shape[self.dim]
        if not 0 <= self.start <= self.stop <= rows:
            raise UsageError(
                f"dimension {self.dim} of tensor '{self.part.name}' has {rows} rows, not {self.start} to {self.stop}"
            )

    @classmethod
    def of(cls, part: Part, cut: Cut | None = None, dtype: torch.dtype | None = None) -> Want:
        """The want for a part, a cut of it, and a cast that touches floating point only, and no 4-bit numbers.

        Raises:
            UsageError: there is no such dimension, no such rows, or nothing can be cast to `dtype`.
        """
        if dtype is not None and not is_number(dtype):
            raise UsageError(f"tensors cannot be cast to {dtype}", hint="dtype= takes floating-point types, as torch.bfloat16.")
        to = dtype if dtype is not None and is_number(part.dtype) and part.dtype != dtype else None
        if cut is None:
            return cls(part, dtype=to)
        dim, start, stop = cut
        return cls(part, dim + len(part.shape) if -len(part.shape) <= dim < 0 else dim, start, stop, to)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is made."""
        if self.dim is None:
            return self.part.shape
        return (*self.part.shape[: self.dim], self.stop - self.start, *self.part.shape[self.dim + 1 :])

    @property
    def size(self) -> int:
        """Bytes of what is made, before the cast."""
        whole = prod(self.part.shape)
        return self.part.size // whole * prod(self.shape) if whole else 0

    @property
    def rows(self) -> Rows:
        """Where its bytes lie in the file; only for wants that have some."""
        if self.dim is None or self.size == self.part.size:
            return Rows(self.part.begin, self.part.size)
        outer = prod(self.part.shape[: self.dim])
        stride = self.part.size // outer
        row = stride // self.part.shape[self.dim]
        begin, length = self.part.begin + self.start * row, (self.stop - self.start) * row
        return Rows(begin, length) if outer == 1 else Rows(begin, length, outer, stride)


@dataclass(frozen=True, slots=True)
class Move:
    """`count` runs of `length` bytes, from offset `source` of a span to offset `target` of a want.

    Where there are several, their begins are `source_stride` and `target_stride` bytes apart.
    """

    want: int
    source: int
    target: int
    length: int
    count: int = 1
    source_stride: int = 0
    target_stride: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `begin` up to `end` of file number `file`: whole pieces, and what they hold."""

    file: int
    pieces: range
    begin: int
    end: int
    moves: tuple[Move, ...]
    completes: tuple[int, ...]
    """The wants whose last bytes are in this span."""

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Plan:
    """All spans, in the order in which they are to be read; moves and spans name a want by its place in `wants`."""

    wants: tuple[Want, ...]
    spans: tuple[Span, ...]
    empty: tuple[int, ...] = ()
    """The wants without bytes: they touch no piece."""

    @property
    def largest(self) -> int:
        """Bytes of the longest span; 0 where there is none."""
        return max((span.size for span in self.spans), default=0)


def plan(
    files: Sequence[PieceTable], wants: Sequence[Sequence[Want]], slot_bytes: int, rank: Callable[[Want], Place] | None = None
) -> Plan:
    """How to make these wants.

    Args:
        files: in the order in which they are to be read.
        wants: what is wanted of each of them; tensors may be wanted twice.
        slot_bytes: limit of a span, but no span is shorter than a piece.
        rank: what comes first, smallest first; by default the order of the files and of the bytes in them.
    """
    flat = tuple(want for of_file in wants for want in of_file)
    spans: list[Span] = []
    first = 0
    for number, (table, of_file) in enumerate(zip(files, wants, strict=True)):
        numbered = [(first + n, want.rows) for n, want in enumerate(of_file) if want.size]
        spans += _spans(number, table, sorted(numbered, key=_place), slot_bytes)
        first += len(of_file)
    if rank is not None:
        spans = _ranked(spans, [rank(want) for want in flat])
    return Plan(flat, tuple(spans), tuple(n for n, want in enumerate(flat) if not want.size))


def pieces_under(table: PieceTable, wants: Sequence[Want]) -> Ranges:
    """The pieces of a file that any of these wants touches."""
    return table.covering(stretch for want in wants if want.size for stretch in _stretches(want.rows, table.piece_length))


def cut_of(cuts: Cuts | None, name: str, shape: tuple[int, ...]) -> Cut | None:
    """What a plan says about one tensor."""
    if cuts is None:
        return None
    return cuts.get(name) if isinstance(cuts, Mapping) else cuts(name, shape)


def _spans(number: int, table: PieceTable, wants: Sequence[tuple[int, Rows]], slot_bytes: int) -> Iterator[Span]:
    needed = table.covering(stretch for _, rows in wants for stretch in _stretches(rows, table.piece_length))
    active: list[tuple[int, Rows]] = []
    at = 0
    for pieces in runs_of(needed, max(1, slot_bytes // table.piece_length)):
        begin, end = table.span(pieces)
        while at < len(wants) and wants[at][1].begin < end:
            active.append(wants[at])
            at += 1
        moves = tuple(move for want, rows in active for move in _moves(want, rows, begin, end))
        yield Span(number, pieces, begin, end, moves, tuple(want for want, rows in active if rows.end <= end))
        active = [(want, rows) for want, rows in active if rows.end > end]


def _ranked(spans: Sequence[Span], ranks: Sequence[Place]) -> list[Span]:
    ordered = sorted(spans, key=lambda span: (min(ranks[move.want] for move in span.moves), span.file, span.begin))
    last: dict[int, int] = {move.want: at for at, span in enumerate(ordered) for move in span.moves}
    return [
        replace(span, completes=tuple(dict.fromkeys(move.want for move in span.moves if last[move.want] == at)))
        for at, span in enumerate(ordered)
    ]


def _stretches(rows: Rows, piece_length: int) -> Iterator[tuple[int, int]]:
    """Byte stretches that touch the same pieces as the rows do, without one for each row where those are dense."""
    # A gap holds a whole untouched piece only if it is that long.
    if rows.stride - rows.length < piece_length:
        yield rows.begin, rows.end
        return
    for row in range(rows.count):
        begin = rows.begin + row * rows.stride
        yield begin, begin + rows.length


def _moves(want: int, rows: Rows, begin: int, end: int) -> Iterator[Move]:
    """What of the rows is in bytes `begin` up to `end`: at most one row cut at each side, and the whole ones between."""

    def one(row: int) -> Move:
        at = rows.begin + row * rows.stride
        first, last = max(at, begin), min(at + rows.length, end)
        return Move(want, first - begin, row * rows.length + first - at, last - first)

    def is_cut(row: int) -> bool:
        at = rows.begin + row * rows.stride
        return at < begin or at + rows.length > end

    low, high = 0, 1
    if rows.count > 1:
        # The first row that ends behind `begin`, and the first that starts at or behind `end`.
        low = max(0, (begin - rows.begin - rows.length) // rows.stride + 1)
        high = max(0, min(rows.count, -(-(end - rows.begin) // rows.stride)))
    elif rows.begin >= end or rows.end <= begin:
        return
    if low < high and is_cut(low):
        yield one(low)
        low += 1
    tail = None
    if low < high and is_cut(high - 1):
        high -= 1
        tail = one(high)
    if high - low == 1:
        yield one(low)
    elif low < high:
        source = rows.begin + low * rows.stride - begin
        yield Move(want, source, low * rows.length, rows.length, high - low, rows.stride, rows.length)
    if tail is not None:
        yield tail


def _place(numbered: tuple[int, Rows]) -> int:
    return numbered[1].begin
