"""What is launched for a run of pieces: laws, against the tree of protocol.merkle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.loader.gpu.shape import LEAF_BLOCKS, Shape, arch_of, blocks_for
from modelp2p.protocol.merkle import LEAF_BYTES, leaf_hashes, piece_hash, pieces_in
from tests.loader.gpu.test_kernels import tree

LENGTHS = st.sampled_from([LEAF_BYTES << height for height in range(11)])


@given(length=LENGTHS, size=st.integers(1, 200 << 20))
def test_every_leaf_lies_in_one_piece_and_every_piece_is_full_but_the_last(length: int, size: int) -> None:
    shape = Shape.of(size, length, False)
    assert shape.full_leaves * LEAF_BYTES + shape.tail_bytes == size
    assert shape.pieces == pieces_in(size, length)
    assert (shape.pieces - 1) * shape.piece_leaves < shape.leaves <= shape.pieces * shape.piece_leaves
    assert 1 << shape.levels == shape.piece_leaves


@given(height=st.integers(0, 3), size=st.integers(1, 8 * LEAF_BYTES))
def test_levels_are_those_of_the_tree(height: int, size: int) -> None:
    length = LEAF_BYTES << height
    data = bytes(min(size, length))
    leaves = leaf_hashes(data)
    digests = [leaves[at : at + 32] for at in range(0, len(leaves), 32)]
    for is_whole_file in (False, True):
        shape = Shape.of(len(data), length, is_whole_file)
        assert tree(digests, shape.levels) == piece_hash(data, length, is_whole_file)


@given(items=st.integers(1, 10_000), threads=st.integers(1, 1024))
def test_blocks_are_as_many_as_needed(items: int, threads: int) -> None:
    assert (blocks_for(items, threads) - 1) * threads < items <= blocks_for(items, threads) * threads


def test_names_and_numbers() -> None:
    assert LEAF_BLOCKS == 256
    assert [arch_of(capability) for capability in ((8, 0), (9, 0), (12, 1))] == ["sm_80", "sm_90", "sm_121"]


@pytest.mark.parametrize(("size", "whole"), [(0, False), (-5, False), (LEAF_BYTES + 1, True)])
def test_no_such_run_of_pieces(size: int, whole: bool) -> None:
    with pytest.raises(ValueError, match="no run of pieces"):
        Shape.of(size, LEAF_BYTES, whole)
