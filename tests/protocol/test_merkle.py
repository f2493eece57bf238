"""The Merkle maths against a slow, literal reading of BEP 52; libtorrent's own numbers are in `test_torrent`."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.merkle import LEAF_BYTES, leaf_hashes, piece_hash, piece_layer, pieces_in, root_of, root_of_layer
from tests.sizes import INTERESTING_SIZES, LEAF, PIECE, seeded_bytes

SIZES = [pytest.param(size, id=f"{size}: {why}") for size, why in INTERESTING_SIZES.items()]


def naive_root(hashes: list[bytes], width: int) -> bytes:
    """The tree over `hashes` padded with zero hashes to `width`, a power of two."""
    row = hashes + [bytes(32)] * (width - len(hashes))
    while len(row) > 1:
        row = [sha256(row[at] + row[at + 1]).digest() for at in range(0, len(row), 2)]
    return row[0]


def naive_leaves(data: bytes) -> list[bytes]:
    return [sha256(data[at : at + LEAF]).digest() for at in range(0, len(data), LEAF)]


def next_power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


@pytest.mark.parametrize("size", SIZES)
def test_root_is_the_tree_over_leaves_padded_to_a_power_of_two(size: int) -> None:
    data = seeded_bytes("merkle", size)
    leaves = naive_leaves(data)
    assert leaf_hashes(memoryview(data)) == b"".join(leaves)
    assert root_of(leaf_hashes(data)) == (naive_root(leaves, next_power_of_two(len(leaves))) if leaves else b"")


@pytest.mark.parametrize("size", SIZES)
def test_layer_is_one_padded_tree_per_piece_and_leads_to_the_root(size: int) -> None:
    data = seeded_bytes("merkle", size)
    layer = piece_layer(leaf_hashes(data), PIECE)
    assert len(layer) == 32 * pieces_in(size, PIECE)
    assert root_of_layer(layer, PIECE) == root_of(leaf_hashes(data))
    if size > PIECE:
        pieces = [data[at : at + PIECE] for at in range(0, size, PIECE)]
        assert layer == b"".join(naive_root(naive_leaves(piece), PIECE // LEAF) for piece in pieces)


@pytest.mark.parametrize("size", [size for size in SIZES if size.values[0]])
def test_every_piece_hashes_to_its_entry_in_the_layer(size: int) -> None:
    data = memoryview(seeded_bytes("merkle", size))
    layer = piece_layer(leaf_hashes(data), PIECE)
    hashes = [piece_hash(data[at : at + PIECE], PIECE, size <= PIECE) for at in range(0, size, PIECE)]
    assert b"".join(hashes) == layer


def test_a_short_last_piece_is_padded_to_a_piece_but_a_short_file_is_not() -> None:
    data = seeded_bytes("short", LEAF + 1)
    as_file = piece_hash(data, PIECE, is_whole_file=True)
    as_last_piece = piece_hash(data, PIECE, is_whole_file=False)
    assert as_file == sha256(leaf_hashes(data)).digest()
    assert as_last_piece == sha256(as_file + sha256(bytes(64)).digest()).digest()


@pytest.mark.parametrize("at", [0, LEAF - 1, LEAF, PIECE, 2 * PIECE])
def test_one_flipped_bit_changes_leaf_layer_and_root(at: int) -> None:
    data = bytearray(seeded_bytes("flip", 2 * PIECE + 1))
    leaves = leaf_hashes(data)
    data[at] ^= 1
    changed = leaf_hashes(data)
    assert [leaf for leaf in range(9) if leaves[32 * leaf :][:32] != changed[32 * leaf :][:32]] == [at // LEAF]
    assert piece_layer(leaves, PIECE) != piece_layer(changed, PIECE)
    assert root_of(leaves) != root_of(changed)


def test_a_leaf_is_hashed_at_its_true_length() -> None:
    assert leaf_hashes(b"") == b""
    assert leaf_hashes(b"x") == sha256(b"x").digest()
    assert leaf_hashes(b"x" + bytes(LEAF_BYTES - 1)) != leaf_hashes(b"x")


def test_leaves_of_any_buffer_are_leaves_of_its_bytes() -> None:
    words = memoryview(bytearray(seeded_bytes("words", 2 * LEAF))).cast("I")
    assert leaf_hashes(words) == leaf_hashes(words.tobytes())


@given(count=st.integers(0, 70), height=st.integers(0, 4))
def test_layer_and_leaves_agree_on_the_root(count: int, height: int) -> None:
    leaves = seeded_bytes("leaves", 32 * count)
    layer = piece_layer(leaves, LEAF << height)
    assert root_of_layer(layer, LEAF << height) == root_of(leaves)
    assert len(layer) == 32 * pieces_in(count * LEAF, LEAF << height)


@pytest.mark.parametrize("piece_length", [-LEAF, 0, 1, LEAF - 1, LEAF + 1, 3 * LEAF, 1 << 80])
def test_no_piece_length_is_refused(piece_length: int) -> None:
    for refused in (piece_layer, root_of_layer):
        with pytest.raises(FormatError):
            refused(bytes(64), piece_length)


def test_hashes_cut_in_the_middle_are_refused() -> None:
    for cut in (b"x", bytes(31), bytes(33)):
        with pytest.raises(FormatError):
            root_of(cut)
        with pytest.raises(FormatError):
            root_of_layer(cut, PIECE)


@pytest.mark.parametrize("size", [0, PIECE + 1, 2 * PIECE])
def test_no_piece_is_empty_or_longer_than_a_piece(size: int) -> None:
    with pytest.raises(ValueError, match="a piece holds"):
        piece_hash(bytes(size), PIECE, is_whole_file=False)
