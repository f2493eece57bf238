"""The kernels one by one, on leaves of a few blocks, against hashlib and a tree made by hand."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
import torch

from modelp2p.loader.gpu.shape import FOLD_THREADS, LEAF_BLOCKS
from modelp2p.protocol.merkle import LEAF_BYTES
from tests.loader.gpu.host import bytes_of, row
from tests.sizes import seeded_bytes

if TYPE_CHECKING:
    from modelp2p.loader.gpu.way import Kernels

POISON = 0xA5
ZEROS = [bytes(32)]
for _ in range(12):
    ZEROS.append(sha256(ZEROS[-1] * 2).digest())


def poisoned(size: int) -> torch.Tensor:
    return torch.full((size,), POISON, dtype=torch.uint8)


def digests(seed: str, count: int) -> list[bytes]:
    data = seeded_bytes(seed, 32 * count)
    return [data[at : at + 32] for at in range(0, len(data), 32)]


def tree(leaves: list[bytes], levels: int) -> bytes:
    """The slow way: every missing leaf is there, as zeros."""
    nodes = leaves + [ZEROS[0]] * ((1 << levels) - len(leaves))
    while len(nodes) > 1:
        nodes = [sha256(left + right).digest() for left, right in zip(nodes[::2], nodes[1::2], strict=True)]
    return nodes[0]


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, LEAF_BLOCKS])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
def test_full_leaves(kernels: Kernels, blocks: int, count: int) -> None:
    size = 64 * blocks
    data = seeded_bytes("leaves", size * count)
    nodes = poisoned(32 * (count + 1))
    kernels.functions["sha256_leaves"](-(-count // 4), 4, (row(data), blocks, count, nodes))
    want = b"".join(sha256(data[at : at + size]).digest() for at in range(0, len(data), size))
    assert bytes_of(nodes) == want + bytes([POISON] * 32), "and nothing behind the last leaf"


# Where the padding of SHA-256 changes: 55 is the longest rest with room for the length, 56 the first without.
EDGES = [rest + whole for whole in (0, 64, 128) for rest in (1, 3, 4, 5, 15, 16, 54, 55, 56, 57, 60, 63, 64)]
TAILS = sorted({*range(1, 132), *EDGES, 4095, 4096, *(LEAF_BYTES - rest for rest in (1, 2, 7, 8, 9, 10, 63, 64, 65))})


@pytest.mark.parametrize("leaf", [0, 3])
def test_short_leaves_of_every_length(kernels: Kernels, leaf: int) -> None:
    blocks = 2
    for length in TAILS:
        data = seeded_bytes("tail", 64 * blocks * leaf + length)
        nodes = poisoned(32 * (leaf + 2))
        # What a former user of the slot left behind the file must not count.
        for stale in (b"", b"\xff" * 64):
            kernels.functions["sha256_tail"](1, 1, (row(data + stale), blocks, leaf, length, nodes))
            want = sha256(data[64 * blocks * leaf :]).digest()
            assert bytes_of(nodes) == bytes([POISON] * 32 * leaf) + want + bytes([POISON] * 32), length


# Counts around powers of two, whole and short last pieces, one leaf alone.
@pytest.mark.parametrize("leaves", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 31, 32])
@pytest.mark.parametrize("levels", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_pieces_are_folded_and_padded_with_zero_leaves(kernels: Kernels, leaves: int, levels: int, threads: int) -> None:
    size = 1 << levels
    given = digests("fold", leaves)
    pieces = -(-leaves // size)
    nodes = row(b"".join(given) + bytes([POISON] * 32))
    kernels.functions["fold"](pieces, threads, (nodes, leaves, size, levels, row(b"".join(ZEROS))))
    data = bytes_of(nodes)
    for piece in range(pieces):
        begin = piece * size
        assert data[32 * begin : 32 * begin + 32] == tree(given[begin : begin + size], levels), piece
    assert data[32 * leaves :] == bytes([POISON] * 32)


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 6, 7, 8])
def test_a_file_of_one_piece_is_padded_to_its_own_tree(kernels: Kernels, leaves: int) -> None:
    given = digests("file", leaves)
    levels = (leaves - 1).bit_length()
    nodes = row(b"".join(given))
    kernels.functions["fold"](1, 4, (nodes, leaves, leaves, levels, row(b"".join(ZEROS))))
    assert bytes_of(nodes)[:32] == tree(given, levels)


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [4 * FOLD_THREADS, 4 * FOLD_THREADS - 1, 2 * FOLD_THREADS + 1])
def test_a_row_longer_than_the_threads_is_folded_in_place_in_steps(kernels: Kernels, leaves: int) -> None:
    given = digests("long", leaves)
    levels = (4 * FOLD_THREADS - 1).bit_length()
    for _ in range(3):  # real threads: a race shows sooner or later
        nodes = row(b"".join(given))
        kernels.functions["fold"](1, FOLD_THREADS, (nodes, leaves, 4 * FOLD_THREADS, levels, row(b"".join(ZEROS))))
        assert bytes_of(nodes)[:32] == tree(given, levels)


@pytest.mark.parametrize("stride", [1, 4])
def test_compare_marks_what_differs_and_touches_nothing_else(kernels: Kernels, stride: int) -> None:
    pieces = 34
    want = digests("compare", pieces)
    got = [bytearray(digest) for digest in want]
    for byte in range(32):
        got[byte + 1][byte] ^= 1 << byte % 8
    between = bytes([POISON] * 32 * (stride - 1))
    nodes = row(b"".join(bytes(digest) + between for digest in got))
    bad = torch.full((pieces + 1,), 7, dtype=torch.int32)
    kernels.functions["compare"](-(-pieces // 8), 8, (nodes, stride, row(b"".join(want)), pieces, bad))
    assert bad.tolist() == [7] + [1] * 32 + [7, 7]
