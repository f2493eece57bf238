"""One torrent on one node of the in-memory swarm: its state, its files, and what libtorrent would make of its layout.

The few lines of bencode reading see only torrents that tests have made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.torrent import PieceMap, info_hash

if TYPE_CHECKING:
    from modelp2p.protocol.engine_wire import MagnetSpec, TorrentSpec


@dataclass(slots=True)
class MemoryTorrent:
    """One torrent on one node: either `spec` or `magnet`."""

    peers: set[tuple[str, int]]
    spec: TorrentSpec | None = None
    magnet: MagnetSpec | None = None
    metadata_sent: bool = False
    pieces: PieceMap = field(default_factory=lambda: PieceMap((), 16_384))
    have: set[int] = field(default_factory=set)
    wanted: set[str] = field(default_factory=set)
    priorities: dict[int, int] = field(default_factory=dict)
    banned: set[tuple[str, int]] = field(default_factory=set)
    held: bool = False
    broken: bool = False
    finished: bool = False
    down: int = 0
    up: int = 0
    wasted: int = 0
    changed: bool = True

    def missing(self) -> Iterator[int]:
        """Wanted pieces, most urgent first."""
        pieces = [piece for path in self.wanted for piece in self.pieces.pieces_of(path) if piece not in self.have]
        return iter(sorted((piece for piece in pieces if self.rank(piece)), key=lambda piece: (-self.rank(piece), piece)))

    def make_empty_files(self) -> None:
        """Wanted files without bytes: no piece will ever bring them."""
        for file in self.spec.files if self.spec else ():
            if file.path in self.wanted and not file.size:
                write_piece(file.disk_path, 0, b"")

    def rank(self, piece: int) -> int:
        """How urgent a piece is; 0 is never."""
        return self.priorities.get(piece, 4)


def share_of(torrent: MemoryTorrent) -> int:
    """How much of the torrent is there, in thousandths."""
    return 1000 * len(torrent.have) // max(1, torrent.pieces.total)


def disk_path_of(torrent: MemoryTorrent, path: str) -> str:
    """Where the bytes of `path` lie."""
    assert torrent.spec is not None
    return next(file.disk_path for file in torrent.spec.files if file.path == path)


def read_piece(disk_path: str, offset: int, length: int) -> bytes:
    """What is there, possibly less than `length`."""
    with open(disk_path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def write_piece(disk_path: str, offset: int, data: bytes) -> None:
    """Writes into the file, making it and its folders where there is none."""
    Path(disk_path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(disk_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)


def compare_layout(spec: TorrentSpec) -> None:
    """Refuses, with `FormatError`, a spec that does not describe its torrent."""
    info = info_of(spec.torrent)
    if info_hash(info) != spec.info_hash:
        raise FormatError("the torrent has another info-hash than its spec")
    described = cast("dict[bytes, object]", _bdecode(info, 0)[0])
    if described[b"piece length"] != spec.piece_length:
        raise FormatError("the torrent has another piece length than its spec")
    listed = dict(_walk(cast("dict[bytes, object]", described[b"file tree"]), ""))
    if listed != {file.path: file.size for file in spec.files}:
        raise FormatError("the torrent lists other files than its spec")


def info_of(torrent: bytes) -> bytes:
    """The exact bytes of the info dict."""
    start = len(b"d4:info")
    return torrent[start : _bdecode(torrent, start)[1]]


def _walk(tree: dict[bytes, object], prefix: str) -> Iterator[tuple[str, int]]:
    for name, node in cast("dict[bytes, dict[bytes, object]]", tree).items():
        if b"" in node:
            yield prefix + name.decode(), cast("dict[bytes, int]", node[b""])[b"length"]
        else:
            yield from _walk(node, f"{prefix}{name.decode()}/")


def _bdecode(data: bytes, at: int) -> tuple[object, int]:
    """The value at `at` and where it ends; only integers, strings and dicts, as a torrent of ours has."""
    if data[at : at + 1] == b"i":
        end = data.index(b"e", at)
        return int(data[at + 1 : end]), end + 1
    if data[at : at + 1] == b"d":
        found: dict[bytes, object] = {}
        at += 1
        while data[at : at + 1] != b"e":
            key, at = _bdecode(data, at)
            found[cast("bytes", key)], at = _bdecode(data, at)
        return found, at + 1
    colon = data.index(b":", at)
    end = colon + 1 + int(data[at:colon])
    return data[colon + 1 : end], end
