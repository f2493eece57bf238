"""What a run of pieces means to the kernels, in numbers. Pure: no torch, no library.

Invariants:
- every leaf is hashed by exactly one thread, every piece is folded by exactly one thread block;
- heights and piece counts are those of `protocol.merkle`: a file of at most one piece is padded only to its own tree.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelp2p.protocol.merkle import LEAF_BYTES, piece_height, pieces_in

LEAF_BLOCKS = LEAF_BYTES // 64
"""Blocks of SHA-256 in a leaf."""

LEAF_THREADS = 128
"""Threads a block, one leaf each: the bound of `sha256_leaves` and `compare` in sha256.cu. One warp for each of the four
schedulers of a processor. XX: a 64 MiB slot makes 32 blocks for the 132 processors of an H200; measure blocks of 32 threads."""

FOLD_THREADS = 256
"""Threads a block, one piece a block: the bound of `fold` in sha256.cu. The first row of a 16 MiB piece is 512 pairs, two
steps."""

TAIL_THREADS = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """Leaves, pieces and tree levels of one batch."""

    full_leaves: int
    tail_bytes: int
    """Length of the short last leaf; 0 for none."""
    piece_leaves: int
    """Leaves of a whole piece; of all there are, for a whole file."""
    pieces: int
    levels: int
    """Tree levels from a leaf to a piece hash."""

    @classmethod
    def of(cls, size: int, piece_length: int, is_whole_file: bool) -> Shape:
        """The shape of `size` bytes from the start of a piece on.

        Raises:
            ValueError: no bytes, or more than a piece in a file of one piece.
            FormatError: `piece_length` is no piece length.
        """
        height = piece_height(piece_length)
        if size <= 0 or (is_whole_file and size > piece_length):
            raise ValueError(f"{size} bytes are no run of pieces of {piece_length} bytes, whole file: {is_whole_file}")
        full, tail = divmod(size, LEAF_BYTES)
        if is_whole_file:
            leaves = full + (tail > 0)
            return cls(full, tail, leaves, 1, (leaves - 1).bit_length())
        return cls(full, tail, 1 << height, pieces_in(size, piece_length), height)

    @property
    def leaves(self) -> int:
        """How many leaf digests there are."""
        return self.full_leaves + (self.tail_bytes > 0)


def blocks_for(items: int, threads: int) -> int:
    """Thread blocks of `threads` that give every item a thread."""
    return -(-items // threads)


def arch_of(capability: tuple[int, int]) -> str:
    """The compiler's name of a compute capability: `sm_90` for (9, 0)."""
    return f"sm_{capability[0]}{capability[1]}"
