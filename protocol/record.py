"""The record beside a visible tree: what the daemon proved about each file, for loaders in other processes.

A loader may skip hashing a file whose stat still equals its record: the same inode, size and times that the daemon saw when
it had read every byte back and matched the signed root. A record is a convenience, never a trust anchor: the loader checks
the signature itself, and counts a record only if its owner is trustworthy (docs/DESIGN.md).
Byte form: `MP2PRECD`, then canonical msgpack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.manifest import MAX_LIST
from modelp2p.protocol.names import Revision, check_revision
from modelp2p.protocol.paths import MAX_FILES, check_path

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

MAGIC = b"MP2PRECD"
VERSION = 1
MAX_RECORD_BYTES = 16 << 20
_MAX = 2**63 - 1


class Stat(Protocol):
    """The part of `os.stat_result` a record remembers."""

    @property
    def st_dev(self) -> int: ...
    @property
    def st_ino(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One whole file, proven against `root`, as `stat` showed it then. `borrowed`: the inode was not made by us."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int
    root: bytes
    borrowed: bool

    @classmethod
    def of(cls, stat: Stat, root: bytes, *, borrowed: bool) -> FileRecord:
        """The record of a file with this stat."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, root, borrowed)

    def matches(self, stat: Stat, *, ignore_ctime: bool = False) -> bool:
        """Whether a file with this stat is the recorded one, unmodified. A new hard link changes only ctime."""
        same = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) == (self.dev, self.ino, self.size, self.mtime_ns)
        return same and (ignore_ctime or stat.st_ctime_ns == self.ctime_ns)


@dataclass(frozen=True, slots=True)
class ReleaseRecord:
    """Everything proven about one release's visible tree."""

    info_hash: bytes
    revision: Revision
    statements: tuple[bytes, ...]
    """SHA-256 of each envelope that states this release."""
    complete: bool
    files: Mapping[str, FileRecord]
    """By path; only files whose every byte is proven, flat-checked and synced."""


def encode_record(record: ReleaseRecord) -> bytes:
    """Canonical bytes of a record file."""
    files: Map = {
        path: {
            "dev": item.dev,
            "ino": item.ino,
            "size": item.size,
            "mtime_ns": item.mtime_ns,
            "ctime_ns": item.ctime_ns,
            "root": item.root,
            "borrowed": item.borrowed,
        }
        for path, item in record.files.items()
    }
    statements: list[Value] = list(record.statements)
    return MAGIC + codec.pack(
        {
            "v": VERSION,
            "info_hash": record.info_hash,
            "revision": record.revision,
            "statements": statements,
            "complete": record.complete,
            "files": files,
        }
    )


def decode_record(data: bytes) -> ReleaseRecord:
    """The record in a record file.

    Raises:
        FormatError: malformed, truncated or of a newer version.
    """
    if not data.startswith(MAGIC):
        raise FormatError("not a modelp2p record")
    source = codec.unpack_map(memoryview(data)[len(MAGIC) :], max_bytes=MAX_RECORD_BYTES)
    if codec.take_uint(source, "v", maximum=2**32, where="record") != VERSION:
        raise FormatError("this record has a version that is not known here", hint="Update modelp2p.")
    files = codec.take(source, "files", dict, "record")
    if len(files) > MAX_FILES:
        raise FormatError(f"record: more than {MAX_FILES} files")
    return ReleaseRecord(
        codec.take_bytes(source, "info_hash", 32, "record"),
        check_revision(codec.take(source, "revision", str, "record")),
        tuple(codec.take_list(source, "statements", bytes, maximum=MAX_LIST, where="record")),
        codec.take(source, "complete", bool, "record"),
        {check_path(path): _decode_file(item) for path, item in files.items()},
    )


def _decode_file(item: Value) -> FileRecord:
    if not isinstance(item, dict):
        raise FormatError("record: expected a map for each file")
    numbers = {key: codec.take_uint(item, key, maximum=_MAX, where="record") for key in ("dev", "ino", "size")}
    return FileRecord(
        numbers["dev"],
        numbers["ino"],
        numbers["size"],
        codec.take(item, "mtime_ns", int, "record"),
        codec.take(item, "ctime_ns", int, "record"),
        codec.take(item, "root", bytes, "record"),
        codec.take(item, "borrowed", bool, "record"),
    )
