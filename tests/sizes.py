"""File sizes at which something changes, and bytes to fill them; shared by every test that cuts files."""

from __future__ import annotations

from hashlib import sha256

LEAF = 16 * 1024
PIECE = 4 * LEAF
"""A small piece length, so that every case of a piece costs kilobytes."""

INTERESTING_SIZES = {
    0: "empty: no leaves, no piece, no root",
    1: "one byte: a leaf far from full",
    LEAF - 1: "one byte short of a leaf",
    LEAF: "exactly one leaf: the root is the leaf hash",
    LEAF + 1: "two leaves, the second of one byte",
    3 * LEAF: "leaf count is no power of two, still below a piece",
    PIECE - 1: "one byte short of a piece: the only piece hash is the root",
    PIECE: "exactly one piece: still the root, no layer in the torrent",
    PIECE + 1: "first size with a layer; the second piece is nearly all padding",
    2 * PIECE: "two full pieces, nothing padded",
    2 * PIECE + 1: "three pieces: the layer itself needs padding",
    5 * PIECE + LEAF + 7: "odd in every way: piece row, leaf row and last leaf",
}


def seeded_bytes(seed: str, size: int) -> bytes:
    """`size` bytes of SHA-256 over seed and counter: the same on every machine, in every version of everything."""
    blocks = -(-size // 32)
    stream = b"".join(sha256(f"{seed}:{counter}".encode()).digest() for counter in range(blocks))
    return stream[:size]
