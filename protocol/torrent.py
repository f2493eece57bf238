"""Torrents as projections: the BitTorrent v2 metadata of a release, derived from its manifest.

Invariants:
- the info dict is a pure function of name, files and piece length; its keys are exactly `file tree`, `meta version`,
  `name` and `piece length`, so everyone who publishes the same content lands in the same swarm;
- files follow bencode order of the nested tree: path components compared as bytes one by one. That is not the order of
  full paths: `a/b` comes before `a.txt`, though "/" sorts after ".";
- every non-empty file starts on a new piece, an empty file has no `pieces root` and no piece;
- `piece layers` lists only files larger than one piece (BEP 52).

It only writes bencode. Nothing of ours ever parses a foreign info dict: a node derives it and compares the info-hash.

Spec: https://www.bittorrent.org/beps/bep_0052.html
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple, Protocol, TypeAlias

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.merkle import HASH_BYTES, LEAF_BYTES, leaf_hashes, piece_height, pieces_in, root_of

Bencodable: TypeAlias = "int | bytes | str | Sequence[Bencodable] | Mapping[str, Bencodable] | Mapping[bytes, Bencodable]"

MIN_PIECE_BYTES = 1 << 20
MAX_PIECE_BYTES = 16 << 20
MAX_PIECES_AT_SMALLEST = 65_536
"""Pieces over the total size up to which a smaller piece is preferred (docs/DESIGN.md)."""

MANIFEST_PIECE_BYTES = LEAF_BYTES


class SizedFile(Protocol):
    """What the torrent order needs of a file; `manifest.FileEntry` has it."""

    @property
    def path(self) -> str:
        """Slash-separated path inside the release."""

    @property
    def size(self) -> int:
        """Length in bytes."""


class ManifestTorrent(NamedTuple):
    """The manifest swarm of one statement, ready to be seeded."""

    info: bytes
    info_hash: bytes
    piece_layers: dict[bytes, bytes]


def bencode(value: Bencodable) -> bytes:
    """The bencoding of `value`; text is UTF-8, keys are sorted as bytes.

    Raises:
        FormatError: a type bencode has no form for (bool and float among them), or one key twice.
    """
    parts: list[bytes] = []
    _bencode(value, parts)
    return b"".join(parts)


def piece_length_for(total_bytes: int) -> int:
    """The one piece length of a payload torrent of `total_bytes`; part of its identity, never a preference."""
    length = MIN_PIECE_BYTES
    while length < MAX_PIECE_BYTES and total_bytes > MAX_PIECES_AT_SMALLEST * length:
        length *= 2
    return length


def info_dict(name: str, files: Iterable[tuple[str, int, bytes]], piece_length: int) -> bytes:
    """The exact bytes of the info dict over `files`, each `(path, size, root)` in any order.

    Raises:
        FormatError: a path twice, empty or below another file; a root that does not fit its size; no bytes at all
            (libtorrent refuses a torrent of length 0); no piece length.
    """
    piece_height(piece_length)
    tree: dict[str, Bencodable] = {}
    total = 0
    for path, size, root in files:
        if size < 0 or len(root) != (HASH_BYTES if size else 0):
            raise FormatError(f"file {path} of {size} bytes has a root of {len(root)} bytes", path=path)
        _plant(tree, path, {"": {"length": size, "pieces root": root} if size else {"length": 0}})
        total += size
    if not total:
        raise FormatError("a torrent needs at least one byte of content", hint="a release of empty files has no swarm")
    return bencode({"file tree": tree, "meta version": 2, "name": name, "piece length": piece_length})


def info_hash(info: bytes) -> bytes:
    """The 32-byte v2 info-hash: "a SHA2-256 hash of the info dictionary" (BEP 52)."""
    return sha256(info).digest()


def torrent_bytes(info: bytes, layers: Mapping[bytes, bytes]) -> bytes:
    """A complete torrent file; `layers` maps each root to its layer.

    A layer of one hash belongs to a file of at most one piece: BEP 52 keeps it out of `piece layers`, so it is left out.
    """
    large = {root: layer for root, layer in layers.items() if len(layer) > HASH_BYTES}
    # `info` goes in as it is: its hash is the identity, so it must not pass through another encoder.
    return b"d4:info" + info + b"12:piece layers" + bencode(large) + b"e"


def manifest_torrent(envelope: bytes, layers: bytes, publisher: bytes) -> ManifestTorrent:
    """The torrent that carries one statement: the files `layers`, `manifest` and `publisher`."""
    contents = {"layers": layers, "manifest": envelope, "publisher": publisher}
    leaves = {path: leaf_hashes(data) for path, data in contents.items()}
    files = [(path, len(data), root_of(leaves[path])) for path, data in contents.items()]
    info = info_dict(sha256(envelope).hexdigest(), files, MANIFEST_PIECE_BYTES)
    # A piece is one leaf here, so the leaf hashes are the layer.
    large = {root: leaves[path] for path, size, root in files if size > MANIFEST_PIECE_BYTES}
    return ManifestTorrent(info, info_hash(info), large)


def torrent_order(path: str) -> tuple[bytes, ...]:
    """The sort key that puts paths in the order of the info dict."""
    return tuple(component.encode() for component in path.split("/"))


class PieceSpan(NamedTuple):
    """Where one piece lies: `length` bytes at `offset` of the file at `path`."""

    path: str
    offset: int
    length: int


class PieceMap:
    """Global piece indexes, as libtorrent counts them, to files and back. Immutable; `paths` are in torrent order.

    Raises:
        FormatError: a path twice, or no piece length.
    """

    __slots__ = ("_filled", "_first", "_sizes", "_starts", "paths", "piece_length", "total")

    def __init__(self, files: Iterable[SizedFile], piece_length: int) -> None:
        piece_height(piece_length)
        ordered = sorted(files, key=lambda file: torrent_order(file.path))
        self.piece_length = piece_length
        self.paths = tuple(file.path for file in ordered)
        self._sizes = {file.path: file.size for file in ordered}
        if len(self._sizes) != len(ordered):
            raise FormatError("a path is listed twice")
        self._first: dict[str, int] = {}
        self.total = 0
        for path, size in self._sizes.items():
            self._first[path] = self.total
            self.total += pieces_in(size, piece_length)
        # An empty file shares its first piece with the file after it and owns none: bisection must not meet it.
        self._filled = [path for path, size in self._sizes.items() if size]
        self._starts = [self._first[path] for path in self._filled]

    def __repr__(self) -> str:
        return f"<PieceMap {self.total} pieces of {self.piece_length} bytes, {len(self.paths)} files>"

    def size(self, path: str) -> int:
        """Bytes of the file at `path`; `KeyError` for a path that is not in the release."""
        return self._sizes[path]

    def first(self, path: str) -> int:
        """The first piece of `path`; for an empty file, the first piece after it."""
        return self._first[path]

    def count(self, path: str) -> int:
        """How many pieces `path` has; 0 for an empty file."""
        return pieces_in(self._sizes[path], self.piece_length)

    def pieces_of(self, path: str) -> range:
        """The pieces of `path`, in file order."""
        return range(self._first[path], self._first[path] + self.count(path))

    def locate(self, piece: int) -> PieceSpan:
        """The file and bytes of `piece`; the last piece of a file may be short.

        Raises:
            IndexError: no such piece.
        """
        if not 0 <= piece < self.total:
            raise IndexError(f"piece {piece} of {self.total}")
        at = bisect_right(self._starts, piece) - 1
        path = self._filled[at]
        offset = (piece - self._starts[at]) * self.piece_length
        return PieceSpan(path, offset, min(self.piece_length, self._sizes[path] - offset))


def _plant(tree: dict[str, Bencodable], path: str, leaf: dict[str, Bencodable]) -> None:
    *folders, name = path.split("/")
    node = tree
    for folder in folders:
        below = node.setdefault(folder, {})
        # The key "" marks a file, so an empty component could forge one.
        if not isinstance(below, dict) or "" in below or not folder:
            raise FormatError(f"path {path} lies below a file", path=path)
        node = below
    if name in node or not name:
        raise FormatError(f"path {path} is listed twice, or is also a folder", path=path)
    node[name] = leaf


def _bencode(value: Bencodable, parts: list[bytes]) -> None:
    match value:
        case bool():
            raise FormatError("bencode has no booleans")
        case int():
            parts.append(b"i%de" % value)
        case str():
            _bencode(value.encode(), parts)
        case bytes():
            parts += [b"%d:" % len(value), value]
        case Mapping():
            items = sorted((key.encode() if isinstance(key, str) else key, item) for key, item in value.items())
            parts.append(b"d")
            for key, item in items:
                _bencode(key, parts)
                _bencode(item, parts)
            parts.append(b"e")
        case list() | tuple():
            parts.append(b"l")
            for item in value:
                _bencode(item, parts)
            parts.append(b"e")
        case _:
            raise FormatError(f"bencode has no form for {type(value).__name__}")
