"""SHA-256 Merkle trees over file bytes, as BEP 52 cuts them.

A file is cut into 16 KiB leaves; a piece is a power-of-two number of leaves; the layer of a file is the hashes of its
pieces; the root is what the publisher signs. Hashes travel concatenated, 32 bytes each, as BEP 52 stores them: one
`bytes` instead of a list keeps a 2 TB release at 64 bytes a leaf pair and needs no conversion at the edges.

Invariants:
- the last leaf is hashed at its true length, never padded with zero bytes of data;
- missing leaves hash as 32 zero bytes, missing subtrees as the tree over such leaves;
- an empty file has no leaves, an empty layer and the empty root `b""`;
- a file of at most one piece has a layer of exactly one hash, and that hash is its root: its tree is padded only to its
  own next power of two, not to a whole piece.

It deliberately does not read files and does not compare: the caller says what a mismatch means.

Spec: https://www.bittorrent.org/beps/bep_0052.html
"""

from __future__ import annotations

from hashlib import sha256
from itertools import pairwise
from struct import Struct

from modelp2p.protocol.errors import FormatError

LEAF_BYTES = 16 * 1024
"""Fixed by BEP 52: "The SHA2-256 digest of 16KiB blocks"."""

HASH_BYTES = 32

# A fifth faster than slices, and a tree is a twentieth of what hashing a file costs.
_PAIRS = Struct(f"{2 * HASH_BYTES}s")

# Tree over zero leaves by height. 48 levels over 16 KiB leaves is 2**62 bytes, more than a file size can say.
_ZERO_SUBTREES = [bytes(HASH_BYTES)]
for _ in range(48):
    _ZERO_SUBTREES.append(sha256(_ZERO_SUBTREES[-1] * 2).digest())


def leaf_hashes(data: bytes | bytearray | memoryview) -> bytes:
    """The leaf hashes of `data`, which must start at a leaf boundary of its file.

    Cost: one SHA-256 pass without copying; hashlib drops the GIL for every full leaf.
    """
    view = memoryview(data).cast("B")
    edges = [*range(0, len(view), LEAF_BYTES), len(view)]
    return b"".join([sha256(view[begin:end]).digest() for begin, end in pairwise(edges)])


def root_of(leaves: bytes) -> bytes:
    """The root of one file from all its leaf hashes; `b""` for an empty file."""
    return _climb(_checked(leaves), 0)


def piece_layer(leaves: bytes, piece_length: int) -> bytes:
    """The layer of one file from all its leaf hashes; one hash, the root, for a file of at most one piece.

    Raises:
        FormatError: `piece_length` is not a power of two of at least one leaf.
    """
    height = piece_height(piece_length)
    if len(_checked(leaves)) <= HASH_BYTES << height:
        return root_of(leaves)
    return _lift(leaves, 0, height)


def root_of_layer(layer: bytes, piece_length: int) -> bytes:
    """The root that a layer claims; missing pieces count as pieces of zero leaves.

    Raises:
        FormatError: `layer` is not whole hashes, or `piece_length` is no piece length.
    """
    return _climb(_checked(layer), piece_height(piece_length))


def piece_hash(data: bytes | bytearray | memoryview, piece_length: int, is_whole_file: bool) -> bytes:
    """The hash of one piece, to be compared with its entry in the layer.

    `is_whole_file` is true for the only piece of a file of at most `piece_length` bytes; otherwise a short `data` is
    the last piece of a larger file and is padded with zero leaves up to `piece_length`.

    Raises:
        ValueError: `data` is empty or longer than a piece; no such piece exists.
    """
    height = piece_height(piece_length)
    leaves = leaf_hashes(data)
    if not 0 < len(leaves) <= HASH_BYTES << height or memoryview(data).nbytes > piece_length:
        raise ValueError(f"a piece holds 1 to {piece_length} bytes, got {memoryview(data).nbytes}")
    return root_of(leaves) if is_whole_file else _lift(leaves, 0, height)


def pieces_in(size: int, piece_length: int) -> int:
    """How many pieces a file of `size` bytes has; none for an empty file."""
    return -(-size // piece_length)


def piece_height(piece_length: int) -> int:
    """Tree levels between a leaf and a piece.

    Raises:
        FormatError: `piece_length` is not a power of two of at least one leaf, as BEP 52 demands.
    """
    if piece_length < LEAF_BYTES or piece_length & (piece_length - 1):
        raise FormatError(f"piece length {piece_length} is not a power of two of at least {LEAF_BYTES}")
    height = (piece_length // LEAF_BYTES).bit_length() - 1
    if height >= len(_ZERO_SUBTREES):
        raise FormatError("piece length is larger than any file")
    return height


def _climb(hashes: bytes, level: int) -> bytes:
    while len(hashes) > HASH_BYTES:
        hashes = _lift(hashes, level, 1)
        level += 1
    return hashes


def _lift(hashes: bytes, level: int, levels: int) -> bytes:
    """`hashes` of tree level `level`, `levels` higher.

    Padding an odd row by one zero subtree per level equals padding the leaves to a power of two, and costs one hash.
    """
    for height in range(level, level + levels):
        if len(hashes) % (2 * HASH_BYTES):
            hashes += _ZERO_SUBTREES[height]
        hashes = b"".join([sha256(pair).digest() for (pair,) in _PAIRS.iter_unpack(hashes)])
    return hashes


def _checked(hashes: bytes) -> bytes:
    if len(hashes) % HASH_BYTES:
        raise FormatError(f"{len(hashes)} bytes are not a whole number of {HASH_BYTES}-byte hashes")
    return hashes
