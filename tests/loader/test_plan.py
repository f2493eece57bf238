"""The laws of the planner, over made-up files: nothing here reads a byte."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.loader.parts import Part
from modelp2p.loader.pieces import PieceTable
from modelp2p.loader.plan import Move, Plan, Want, cut_of, pieces_under, plan
from modelp2p.protocol.errors import UsageError

if TYPE_CHECKING:
    from modelp2p.loader.order import Place

PIECE = 64
"""No piece length of a torrent: the planner only divides by it, and laws over every byte want few bytes."""


def table_of(size: int, path: str = "m.safetensors") -> PieceTable:
    return PieceTable(path, size, PIECE, b"")


def source_offsets(want: Want) -> list[int]:
    """Where each byte of a want lies in its file, by torch's own slicing."""
    item = want.part.dtype.itemsize
    numbers = torch.arange(prod(want.part.shape)).reshape(want.part.shape)
    if want.dim is not None:
        numbers = numbers.narrow(want.dim, want.start, want.stop - want.start)
    return [want.part.begin + number * item + byte for number in numbers.flatten().tolist() for byte in range(item)]


def bytes_of(move: Move) -> list[tuple[int, int]]:
    """(source, target) of every byte a move moves."""
    return [
        (move.source + run * move.source_stride + n, move.target + run * move.target_stride + n)
        for run in range(move.count)
        for n in range(move.length)
    ]


def performed(made: Plan) -> list[dict[int, tuple[int, int]]]:
    """By want: target byte -> (file, byte of the file). Fails where a byte is moved twice."""
    got: list[dict[int, tuple[int, int]]] = [{} for _ in made.wants]
    for span in made.spans:
        for move in span.moves:
            for source, target in bytes_of(move):
                assert 0 <= source < span.size
                assert target not in got[move.want]
                got[move.want][target] = (span.file, span.begin + source)
    return got


@st.composite
def files(draw: st.DrawFn) -> tuple[list[PieceTable], list[list[Want]]]:
    """Up to three files of a few tensors each, some of them sliced, some twice wanted, in any order."""
    tables, wants = [], []
    for number in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, 100))
        of_file: list[Want] = []
        for name in range(draw(st.integers(0, 4))):
            dtype = draw(st.sampled_from([torch.uint8, torch.float16, torch.float32]))
            shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 30]), max_size=3)))
            size = prod(shape) * dtype.itemsize
            if size > 6 * PIECE:
                continue
            part = Part(f"{number}.{name}", dtype, shape, at, at + size)
            at += size + draw(st.sampled_from([0, 0, 5, PIECE, 3 * PIECE]))
            for _ in range(draw(st.integers(0, 2))):
                dim = draw(st.sampled_from([None, *range(len(shape))]))
                low, high = sorted(draw(st.tuples(*[st.integers(0, shape[dim] if dim is not None else 0)] * 2)))
                of_file.append(Want(part, dim, low, high))
        tables.append(table_of(at + draw(st.integers(0, 2 * PIECE)) + 1, f"{number}.safetensors"))
        wants.append(draw(st.permutations(of_file)))
    return tables, wants


@given(files(), st.integers(1, 5 * PIECE))
def test_every_wanted_byte_is_moved_once_to_its_place(given_files: tuple[list[PieceTable], list[list[Want]]], slot: int) -> None:
    tables, wants = given_files
    made = plan(tables, wants, slot)
    owners = [number for number, of_file in enumerate(wants) for _ in of_file]
    for want, owner, got in zip(made.wants, owners, performed(made), strict=True):
        assert got == {target: (owner, source) for target, source in enumerate(source_offsets(want))}
        assert len(got) == want.size


@given(files(), st.integers(1, 5 * PIECE))
def test_spans_are_needed_pieces_within_the_file_and_a_slot(
    given_files: tuple[list[PieceTable], list[list[Want]]], slot: int
) -> None:
    tables, wants = given_files
    made = plan(tables, wants, slot)
    places = [(span.file, span.begin, span.end) for span in made.spans]
    assert places == sorted(places)
    seen: set[tuple[int, int]] = set()
    for span in made.spans:
        table = tables[span.file]
        assert (span.begin, span.end) == table.span(span.pieces)
        assert 0 < span.size <= max(slot, PIECE)
        assert span.end <= table.size
        assert not seen & {(span.file, piece) for piece in span.pieces}
        seen |= {(span.file, piece) for piece in span.pieces}
    touched = {(n, at // PIECE) for n, of_file in enumerate(wants) for want in of_file for at in source_offsets(want)}
    assert seen == touched
    assert made.largest == max((span.size for span in made.spans), default=0)
    for number, (table, of_file) in enumerate(zip(tables, wants, strict=True)):
        assert set(pieces_under(table, of_file).ints()) == {piece for file, piece in touched if file == number}


@given(files(), st.integers(1, 5 * PIECE))
def test_a_want_is_complete_with_its_last_span_and_not_before(
    given_files: tuple[list[PieceTable], list[list[Want]]], slot: int
) -> None:
    made = plan(*given_files, slot)
    completed = [(want, number) for number, span in enumerate(made.spans) for want in span.completes]
    assert sorted([*(want for want, _ in completed), *made.empty]) == list(range(len(made.wants)))
    for want, number in completed:
        with_bytes = [n for n, span in enumerate(made.spans) if any(move.want == want for move in span.moves)]
        assert with_bytes[-1] == number
    assert all(made.wants[want].size == 0 for want in made.empty)


@given(files(), st.integers(1, 5 * PIECE), st.permutations(range(4)))
def test_ranks_move_spans_to_the_first_want_they_serve_and_change_nothing_else(
    given_files: tuple[list[PieceTable], list[list[Want]]], slot: int, ranks: list[int]
) -> None:
    def rank(want: Want) -> Place:
        return ranks[int(want.part.name[-1])], ()

    plain, made = plan(*given_files, slot), plan(*given_files, slot, rank)
    order = [min(rank(made.wants[move.want]) for move in span.moves) for span in made.spans]
    assert order == sorted(order)
    assert sorted((span.file, span.begin, span.moves) for span in made.spans) == [
        (span.file, span.begin, span.moves) for span in plain.spans
    ]
    for number, span in enumerate(made.spans):
        for want in {move.want for move in span.moves}:
            is_last = not any(move.want == want for later in made.spans[number + 1 :] for move in later.moves)
            assert (want in span.completes) == is_last
        assert len(set(span.completes)) == len(span.completes)


def matrix(rows: int, columns: int, begin: int = 0) -> Part:
    return Part("m", torch.float32, (rows, columns), begin, begin + rows * columns * 4)


SHAPES: dict[str, tuple[Want, tuple[int, ...], Sequence[Move]]] = {
    "whole": (Want(matrix(4, 8)), (4, 8), [Move(0, 0, 0, 128)]),
    "rows": (Want(matrix(4, 8), 0, 1, 3), (2, 8), [Move(0, 32, 0, 64)]),
    "columns": (Want(matrix(4, 8), 1, 2, 5), (4, 3), [Move(0, 8, 0, 12, 4, 32, 12)]),
    "all columns are one run": (Want(matrix(4, 8), 1, 0, 8), (4, 8), [Move(0, 0, 0, 128)]),
    "columns of one row": (Want(matrix(1, 8), 1, 2, 5), (1, 3), [Move(0, 8, 0, 12)]),
    "none": (Want(matrix(4, 8), 1, 3, 3), (4, 0), []),
}


@pytest.mark.parametrize(("want", "shape", "moves"), SHAPES.values(), ids=SHAPES.keys())
def test_moves_of_simple_cuts(want: Want, shape: tuple[int, ...], moves: Sequence[Move]) -> None:
    made = plan([table_of(2 * PIECE)], [[want]], 2 * PIECE)
    assert want.shape == shape
    assert [move for span in made.spans for move in span.moves] == moves


def test_a_slice_of_far_rows_skips_the_pieces_between() -> None:
    part = Part("m", torch.uint8, (3, 4 * PIECE), 0, 12 * PIECE)
    made = plan([table_of(12 * PIECE)], [[Want(part, 1, 0, 10)]], 64 * PIECE)
    assert [list(span.pieces) for span in made.spans] == [[0], [4], [8]]


def test_rows_cut_by_a_span_are_at_most_two_more_moves() -> None:
    part = Part("m", torch.uint8, (1000, 10), 4, 10_004)
    made = plan([table_of(10_004)], [[Want(part, 1, 1, 9)]], PIECE)
    assert max(len(span.moves) for span in made.spans) <= 3


BAD_CUTS = {
    "no such dimension": (2, 0, 1),
    "no such negative dimension": (-3, 0, 1),
    "rows behind the end": (0, 3, 5),
    "rows before the start": (0, -1, 2),
    "backwards": (1, 5, 2),
}


@pytest.mark.parametrize("cut", BAD_CUTS.values(), ids=BAD_CUTS.keys())
def test_cuts_that_do_not_exist_are_refused(cut: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="'m'"):
        Want.of(matrix(4, 8), cut)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float4_e2m1fn_x2])
def test_nothing_is_cast_to_what_holds_no_numbers_of_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match="cannot be cast"):
        Want.of(matrix(4, 8), None, dtype)


def test_a_want_from_a_plan() -> None:
    assert Want.of(matrix(4, 8), (-1, 2, 5)) == Want(matrix(4, 8), 1, 2, 5)
    assert Want.of(matrix(4, 8), None, torch.float16).dtype is torch.float16
    assert Want.of(matrix(4, 8), None, torch.float32).dtype is None, "it already is"
    assert Want.of(Part("i", torch.int64, (1,), 0, 8), None, torch.float16).dtype is None, "no floating point"
    assert cut_of(None, "a", (1,)) is None
    assert cut_of({"a": (0, 0, 1)}, "a", (1,)) == (0, 0, 1)
    assert cut_of({"a": (0, 0, 1)}, "b", (1,)) is None
    assert cut_of(lambda name, shape: (0, 0, shape[0]) if name == "a" else None, "a", (7,)) == (0, 0, 7)
