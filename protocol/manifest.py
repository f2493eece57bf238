"""The manifest: a publisher's statement about one release, as a value and as canonical bytes (docs/DESIGN.md).

Invariants of a `Manifest` that exists:
- every path is legal and no two collide; files are sorted by the UTF-8 bytes of their paths;
- the revision is `origin.commit`, or is recomputed from the content and equal;
- the piece length is the one the total size demands, so one content has one swarm;
- lists, notes and texts keep their caps, each note key comes once and in order;
- `encode(decode_manifest(data)) == data`.

It does not judge who signed it (`publisher`) nor derive the torrent (`torrent`); `statement` joins the three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.kinds import FileKind
from modelp2p.protocol.names import ModelName, Revision, check_revision
from modelp2p.protocol.paths import MAX_FILES, check_paths
from modelp2p.protocol.text import printable
from modelp2p.protocol.torrent import piece_length_for

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

VERSION = 1
MAX_MANIFEST_BYTES = 4 << 20
MAX_UINT = 2**53 - 1
"""Largest number carried: what JSON readers hold exactly."""
GIT_MAX_BYTES = 10 << 20
"""Files below this size may carry a git blob id, as the Hugging Face Hub gives non-LFS files."""
MAX_LIST = 64
MAX_TEXT_BYTES = 4096
RELATIONS = frozenset({"finetune", "adapter", "quantized", "merged", "distilled", "converted"})
KNOWN_CRITICAL: frozenset[str] = frozenset()
"""Critical extensions this version understands. An unknown one means reject."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a release."""

    path: str
    size: int
    """Bytes."""
    root: bytes
    """BEP 52 Merkle root, 32 bytes; empty for an empty file."""
    sha256: bytes
    """Flat SHA-256 of the whole file, 32 bytes: the Hub's LFS id and the blob name in its cache."""
    etag: str
    """Which digest the Hugging Face Hub calls this file by: `sha256` or `git`."""
    git_sha1: bytes | None
    """Git blob id, 20 bytes; present exactly when `etag` is `git`."""
    kind: FileKind

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_UINT:
            raise FormatError(f"file '{self.path}': size {self.size} is out of range")
        if len(self.root) != (32 if self.size else 0):
            raise FormatError(f"file '{self.path}': the Merkle root has {len(self.root)} bytes")
        if len(self.sha256) != 32:
            raise FormatError(f"file '{self.path}': the SHA-256 has {len(self.sha256)} bytes")
        if self.etag not in ("sha256", "git"):
            raise FormatError(f"file '{self.path}': etag '{self.etag}' is unknown")
        if (self.git_sha1 is not None) != (self.etag == "git"):
            raise FormatError(f"file '{self.path}': git_sha1 goes with etag 'git' and only with it")
        if self.git_sha1 is not None and (len(self.git_sha1) != 20 or self.size >= GIT_MAX_BYTES):
            raise FormatError(f"file '{self.path}': git_sha1 is malformed or the file is too large for one")


@dataclass(frozen=True, slots=True)
class Lineage:
    """What this release was made from, pinned by content. A statement by this publisher, not by the parent's."""

    relation: str
    name: str
    revision: Revision
    info_hash: bytes

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise FormatError(f"lineage relation '{self.relation}' is unknown")
        ModelName.parse(self.name)
        check_revision(self.revision)
        if len(self.info_hash) != 32:
            raise FormatError("lineage info_hash must have 32 bytes")


@dataclass(frozen=True, slots=True)
class Origin:
    """The repository and commit the files were taken from, as the publisher claims."""

    repo: str
    commit: Revision

    def __post_init__(self) -> None:
        ModelName.parse(self.repo)
        check_revision(self.commit)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A publisher's statement about one release. Units: sizes in bytes, times in UTC seconds."""

    name: ModelName
    revision: Revision
    created: int
    sequence: int
    info_hash: bytes
    piece_length: int
    files: tuple[FileEntry, ...]
    license: str = ""
    license_file: str | None = None
    lineage: tuple[Lineage, ...] = ()
    origin: Origin | None = None
    web_seeds: tuple[str, ...] = ()
    trackers: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    critical: tuple[str, ...] = ()
    _by_path: dict[str, FileEntry] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.files:
            raise FormatError("a release without files is not a release")
        paths = [entry.path for entry in self.files]
        check_paths(paths)
        if paths != sorted(paths, key=lambda path: path.encode("utf-8")):
            raise FormatError("files are not sorted by path")
        if self.piece_length != piece_length_for(self.total_bytes):
            raise FormatError(f"piece length {self.piece_length} is not the one its size demands")
        if len(self.info_hash) != 32:
            raise FormatError("info_hash must have 32 bytes")
        if not (0 <= self.created <= MAX_UINT and 1 <= self.sequence <= MAX_UINT):
            raise FormatError("created or sequence is out of range")
        check_stated(self.license, self.lineage, self.web_seeds, self.trackers, self.notes, self.critical)
        expected = self.origin.commit if self.origin else content_revision(self.files)
        if self.revision != expected:
            raise FormatError(f"revision {self.revision} is not the content's ({expected})")
        object.__setattr__(self, "_by_path", {entry.path: entry for entry in self.files})
        if self.license_file is not None and self.license_file not in self._by_path:
            raise FormatError("license_file is not one of the files")
        for name in self.critical:
            if name not in KNOWN_CRITICAL:
                raise FormatError(f"the manifest needs '{name}', which this version does not know", hint="Update modelp2p.")

    @property
    def total_bytes(self) -> int:
        """Sum of all file sizes."""
        return sum(entry.size for entry in self.files)

    def file(self, path: str) -> FileEntry:
        """The entry of `path`. Raises KeyError where the release has no such file."""
        return self._by_path[path]

    def __contains__(self, path: str) -> bool:
        return path in self._by_path


def check_stated(
    license_: str,
    lineage: Sequence[Lineage],
    web_seeds: Sequence[str],
    trackers: Sequence[str],
    notes: Sequence[tuple[str, str]],
    critical: Sequence[str] = (),
) -> None:
    """Check what a publisher says, as opposed to what the files are: known before hours of hashing, so checked before them.

    Raises:
        FormatError: more than `MAX_LIST` entries, a text that is too long or hides something, or notes out of order.
    """
    lists = {"lineage": lineage, "web_seeds": web_seeds, "trackers": trackers, "notes": notes, "critical": critical}
    for name, items in lists.items():
        if len(items) > MAX_LIST:
            raise FormatError(f"manifest: field '{name}' has {len(items)} items, more than the limit of {MAX_LIST}")
    for text in (license_, *web_seeds, *trackers, *critical, *(text for note in notes for text in note)):
        _check_text(text)
    keys = [key for key, _ in notes]
    if keys != sorted(set(keys)):
        raise FormatError("manifest: the notes are not sorted by key, or have a key twice")


def content_revision(files: Iterable[FileEntry]) -> Revision:
    """First 40 hex of SHA-256 over the canonical msgpack of the sorted `[path, size, root]` list (docs/DESIGN.md)."""
    rows: list[Value] = [
        [entry.path, entry.size, entry.root] for entry in sorted(files, key=lambda entry: entry.path.encode("utf-8"))
    ]
    return Revision(hashlib.sha256(codec.pack(rows)).hexdigest()[:40])


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes a publisher signs.

    Raises:
        FormatError: larger than `MAX_MANIFEST_BYTES`.
    """
    value: Map = {
        "v": VERSION,
        "name": str(manifest.name),
        "revision": manifest.revision,
        "created": manifest.created,
        "sequence": manifest.sequence,
        "info_hash": manifest.info_hash,
        "piece_length": manifest.piece_length,
        "files": [_file_map(entry) for entry in manifest.files],
        "license": manifest.license,
        "lineage": [
            {"relation": item.relation, "name": item.name, "revision": item.revision, "info_hash": item.info_hash}
            for item in manifest.lineage
        ],
        "web_seeds": list(manifest.web_seeds),
        "trackers": list(manifest.trackers),
        "critical": list(manifest.critical),
    }
    if manifest.license_file is not None:
        value["license_file"] = manifest.license_file
    if manifest.origin is not None:
        value["origin"] = {"repo": manifest.origin.repo, "commit": manifest.origin.commit}
    if manifest.notes:
        value["notes"] = dict(manifest.notes)
    data = codec.pack(value)
    if len(data) > MAX_MANIFEST_BYTES:
        raise FormatError(f"manifest of {len(data)} bytes exceeds the limit of {MAX_MANIFEST_BYTES}")
    return data


_FIELDS = frozenset(
    [
        "v",
        "name",
        "revision",
        "created",
        "sequence",
        "info_hash",
        "piece_length",
        "files",
        "license",
        "license_file",
        "lineage",
        "origin",
        "web_seeds",
        "trackers",
        "notes",
        "critical",
    ]
)
_FILE_FIELDS = frozenset(["path", "size", "root", "sha256", "etag", "git_sha1", "kind"])


def decode_manifest(data: bytes) -> Manifest:
    """The manifest these exact bytes state.

    Raises:
        FormatError: any rule of this format is broken; the message names it.
    """
    source = codec.unpack_map(data, max_bytes=MAX_MANIFEST_BYTES)
    version = codec.take_uint(source, "v", maximum=MAX_UINT, where="manifest")
    if version != VERSION:
        raise FormatError(f"manifest version {version} is not known here", hint="Update modelp2p.")
    codec.only_fields(source, _FIELDS, "manifest")
    files = codec.take_list(source, "files", dict, maximum=MAX_FILES, where="manifest")
    lineage = codec.take_list(source, "lineage", dict, maximum=MAX_LIST, where="manifest")
    origin = codec.take_optional(source, "origin", dict, "manifest")
    notes = cast("Map", codec.take_optional(source, "notes", dict, "manifest") or {})
    if "notes" in source and not notes:
        raise FormatError("manifest: empty notes must be left out")
    return Manifest(
        name=ModelName.parse(codec.take(source, "name", str, "manifest")),
        revision=check_revision(codec.take(source, "revision", str, "manifest")),
        created=codec.take_uint(source, "created", maximum=MAX_UINT),
        sequence=codec.take_uint(source, "sequence", maximum=MAX_UINT),
        info_hash=codec.take_bytes(source, "info_hash", 32),
        piece_length=codec.take_uint(source, "piece_length", maximum=MAX_UINT),
        files=tuple(_decode_file(cast("Map", item)) for item in files),
        license=codec.take(source, "license", str, "manifest"),
        license_file=codec.take_optional(source, "license_file", str, "manifest"),
        lineage=tuple(_decode_lineage(cast("Map", item)) for item in lineage),
        origin=None if origin is None else _decode_origin(cast("Map", origin)),
        web_seeds=_texts(source, "web_seeds"),
        trackers=_texts(source, "trackers"),
        notes=tuple((key, codec.take(notes, key, str, "notes")) for key in sorted(notes)),
        critical=_texts(source, "critical"),
    )


def _file_map(entry: FileEntry) -> Map:
    value: Map = {
        "path": entry.path,
        "size": entry.size,
        "root": entry.root,
        "sha256": entry.sha256,
        "etag": entry.etag,
        "kind": entry.kind.value,
    }
    if entry.git_sha1 is not None:
        value["git_sha1"] = entry.git_sha1
    return value


def _decode_file(source: Map) -> FileEntry:
    codec.only_fields(source, _FILE_FIELDS, "file")
    kind = codec.take(source, "kind", str, "file")
    try:
        known = FileKind(kind)
    except ValueError as exc:
        raise FormatError(f"file kind '{kind[:40]}' is unknown") from exc
    return FileEntry(
        path=codec.take(source, "path", str, "file"),
        size=codec.take_uint(source, "size", maximum=MAX_UINT, where="file"),
        root=codec.take(source, "root", bytes, "file"),
        sha256=codec.take(source, "sha256", bytes, "file"),
        etag=codec.take(source, "etag", str, "file"),
        git_sha1=codec.take_optional(source, "git_sha1", bytes, "file"),
        kind=known,
    )


def _decode_lineage(source: Map) -> Lineage:
    codec.only_fields(source, frozenset({"relation", "name", "revision", "info_hash"}), "lineage")
    return Lineage(
        relation=codec.take(source, "relation", str, "lineage"),
        name=codec.take(source, "name", str, "lineage"),
        revision=check_revision(codec.take(source, "revision", str, "lineage")),
        info_hash=codec.take_bytes(source, "info_hash", 32, "lineage"),
    )


def _decode_origin(source: Map) -> Origin:
    codec.only_fields(source, frozenset({"repo", "commit"}), "origin")
    return Origin(codec.take(source, "repo", str, "origin"), check_revision(codec.take(source, "commit", str, "origin")))


def _texts(source: Map, key: str) -> tuple[str, ...]:
    return tuple(codec.take_list(source, key, str, maximum=MAX_LIST, where="manifest"))


def _check_text(text: str) -> None:
    # In this order: a lone surrogate is refused as hidden and cannot be encoded.
    if printable(text) != text:
        raise FormatError("manifest: a text holds control, bidi or invisible characters")
    if len(text.encode("utf-8")) > MAX_TEXT_BYTES:
        raise FormatError(f"manifest: a text is longer than {MAX_TEXT_BYTES} bytes")
