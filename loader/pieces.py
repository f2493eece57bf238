"""The signed hashes of one file, and the one comparison everything in this room rests on.

A piece is the smallest unit that can be proven: the layer holds one hash a piece, and only together do its leaves reach it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelp2p.protocol.errors import IntegrityError
from modelp2p.protocol.merkle import HASH_BYTES, piece_hash, pieces_in
from modelp2p.protocol.ranges import Ranges

if TYPE_CHECKING:
    from modelp2p.protocol.manifest import FileEntry
    from modelp2p.protocol.statement import Release


@dataclass(frozen=True, slots=True)
class PieceTable:
    """The pieces of one file, counted within the file."""

    path: str
    size: int
    piece_length: int
    layer: bytes
    """Concatenated piece hashes, already proven against the signed root (`protocol.layers`)."""
    hint: str = ""
    """What a user should do about a bad piece."""

    @classmethod
    def in_release(cls, release: Release, entry: FileEntry) -> PieceTable:
        """The table of a file of a verified release."""
        return cls.of(entry, release.manifest.piece_length, release.layers.of(entry), repair_hint(release))

    @classmethod
    def of(cls, entry: FileEntry, piece_length: int, layer: bytes, hint: str = "") -> PieceTable:
        """The table of a release file."""
        return cls(entry.path, entry.size, piece_length, layer, hint)

    @property
    def count(self) -> int:
        """How many pieces the file has."""
        return pieces_in(self.size, self.piece_length)

    def over(self, begin: int, end: int) -> range:
        """The pieces that bytes `begin` up to `end` touch; none for no bytes."""
        if begin >= end:
            return range(0)
        return range(begin // self.piece_length, -(-end // self.piece_length))

    def covering(self, stretches: Iterable[tuple[int, int]]) -> Ranges:
        """The pieces that any of these `(begin, end)` byte stretches touches."""
        touched = (self.over(begin, end) for begin, end in stretches)
        return Ranges.of((pieces.start, pieces.stop) for pieces in touched)

    def span(self, pieces: range) -> tuple[int, int]:
        """Byte range `(begin, end)` of consecutive pieces."""
        return pieces.start * self.piece_length, min(pieces.stop * self.piece_length, self.size)

    def bytes_in(self, pieces: Ranges) -> int:
        """Bytes these pieces hold together."""
        return sum(end - begin for begin, end in (self.span(range(*run)) for run in pieces))

    def check(self, piece: int, data: memoryview) -> None:
        """Return if `data`, exactly the bytes of `piece`, is what the publisher signed.

        Raises:
            IntegrityError: it is not. Facts: path, piece, begin, end (bytes of the file), expected, got.
        """
        self._compare(piece, piece_hash(data, self.piece_length, self.size <= self.piece_length))

    def check_run(self, pieces: range, data: memoryview) -> None:
        """Return if `data`, exactly the bytes of consecutive pieces, is what the publisher signed; raises as `check`."""
        first, _ = self.span(pieces)
        for piece in pieces:
            begin, end = self.span(range(piece, piece + 1))
            self.check(piece, data[begin - first : end - first])

    def compare_run(self, pieces: range, hashes: bytes) -> None:
        """Return if `hashes`, 32 bytes for each of consecutive pieces, are the signed ones; raises as `check`."""
        for number, piece in enumerate(pieces):
            self._compare(piece, hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES])

    def _compare(self, piece: int, got: bytes) -> None:
        expected = self.layer[piece * HASH_BYTES : (piece + 1) * HASH_BYTES]
        if got != expected:
            begin, end = self.span(range(piece, piece + 1))
            raise IntegrityError(
                f"'{self.path}': piece {piece} (bytes {begin} to {end}) differs from what the publisher signed",
                hint=self.hint,
                path=self.path,
                piece=piece,
                begin=begin,
                end=end,
                expected=expected.hex(),
                got=got.hex(),
            )


def repair_hint(release: Release) -> str:
    """What a user does about a file of a verified release that is not what was signed."""
    return f"Repair it: modelp2p verify {release.ref} --repair"


def runs_of(pieces: Ranges, at_most: int) -> Iterator[range]:
    """The pieces in order, as runs of at most `at_most` consecutive ones."""
    for begin, end in pieces:
        for start in range(begin, end, at_most):
            yield range(start, min(start + at_most, end))
