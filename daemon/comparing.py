"""Reading a whole file back and telling its good pieces from its bad ones: what adopt, repair and verify have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelp2p.protocol.merkle import HASH_BYTES

if TYPE_CHECKING:
    from modelp2p.daemon.hashing import HashPool
    from modelp2p.protocol.ranges import Ranges
    from modelp2p.protocol.statement import Release

_PIECES_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """Some consecutive pieces of a file, by number within the file; `end` is where the batch ends, in bytes."""

    good: tuple[int, ...]
    bad: tuple[int, ...]
    end: int


async def compare_pieces(
    pool: HashPool, release: Release, path: str, fd: int, only: Ranges | None = None
) -> AsyncIterator[Batch]:
    """Hash the pieces of the file open in `fd` and compare them with the signed layer, a batch at a time.

    Args:
        pool: hashes them.
        release: what is signed.
        path: the file of the release.
        fd: the bytes.
        only: these pieces, by number within the file; None is all.

    Raises:
        CorruptError: the file is shorter than the manifest says.
    """
    entry, pieces = release.manifest.file(path), release.pieces
    expected, count, length = release.layers.of(entry), pieces.count(path), pieces.piece_length
    spans = [(0, count)] if only is None else list(only)
    steps = [(at, min(stop, at + _PIECES_AT_ONCE)) for start, stop in spans for at in range(start, stop, _PIECES_AT_ONCE)]
    for begin, end in steps:
        hashes = await pool.hash_pieces(fd, file_size=entry.size, piece_length=length, first=begin, count=end - begin)
        good: list[int] = []
        bad: list[int] = []
        for piece in range(begin, end):
            found = hashes[(piece - begin) * HASH_BYTES : (piece - begin + 1) * HASH_BYTES]
            (good if found == expected[piece * HASH_BYTES : (piece + 1) * HASH_BYTES] else bad).append(piece)
        yield Batch(tuple(good), tuple(bad), min(entry.size, end * length))
