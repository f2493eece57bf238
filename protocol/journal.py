"""The journal of one release on one node: which pieces are proven, which files are whole, what was asked for.

The journal is the only resume state. It is append-only; its value is what its records say when read in order.

Format, all integers big-endian: a header of `MP2PJRNL`, u32 version and the 32-byte info-hash of the payload; then
records of u32 length, u32 CRC-32 of the payload, payload (canonical msgpack map with the record type under `t`).

Invariants:
- reading stops at the first record that is short, fails its CRC or is malformed: a torn or rotten tail never adds a claim;
- an empty payload is never a record, so a tail of zero bytes (what a power cut leaves on ext4 and xfs) is not one;
- `lost`, `unfile` and another `selection` take `complete` back, whatever was written before.

It deliberately does no I/O and knows neither piece lengths nor which piece belongs to which file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias, assert_never
from zlib import crc32

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError, StoreError
from modelp2p.protocol.ranges import Ranges

if TYPE_CHECKING:
    import os

MAGIC = b"MP2PJRNL"
VERSION = 1
HEADER_BYTES = len(MAGIC) + 4 + 32
_PREFIX_BYTES = 8
# The longest record is a selection: 10,000 paths of 1,024 bytes (the caps of a manifest) with their msgpack prefixes.
MAX_RECORD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells whether a file was touched since it was proven: inode identity, size and times in nanoseconds."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileStamp:
        """The stamp of a file as `os.fstat` sees it now."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def matches(self, stat: os.stat_result, *, ignore_ctime: bool = False) -> bool:
        """Whether `stat` shows the file unchanged; making a hard link alters the ctime alone."""
        now = FileStamp.of(stat)
        return self == (replace(now, ctime_ns=self.ctime_ns) if ignore_ctime else now)

    def matches_stamp(self, other: FileStamp) -> bool:
        """Whether two stamps are of one unmodified file; names and modes may differ, which alters the ctime alone."""
        return self == replace(other, ctime_ns=self.ctime_ns)


@dataclass(frozen=True, slots=True)
class Proven:
    """These pieces were read back from the file, matched the signed layer, and their data was synced."""

    pieces: Ranges


@dataclass(frozen=True, slots=True)
class Lost:
    """These pieces were proven once and are not on the disk any more."""

    pieces: Ranges


@dataclass(frozen=True, slots=True)
class FileDone:
    """A whole file: every piece proven, flat SHA-256 checked, synced. `borrowed`: the inode is not ours to change."""

    path: str
    stamp: FileStamp
    borrowed: bool = False


@dataclass(frozen=True, slots=True)
class FileGone:
    """What `FileDone` said about `path` does not hold any more."""

    path: str


@dataclass(frozen=True, slots=True)
class Completed:
    """Everything selected is present."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What the user asked for: the patterns as given, and the paths they selected."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()


Record: TypeAlias = Proven | Lost | FileDone | FileGone | Completed | Selection


@dataclass(frozen=True, slots=True)
class JournalState:
    """What the records say. `good_bytes` is the length of the sound prefix; the file is to be cut there.

    `is_damaged` means sound records follow the bad one: bytes rotted in the middle, the end was not merely torn. What was
    lost in between may have been a `Lost`, so the owner proves everything again.
    """

    proven: Ranges = field(default_factory=Ranges)
    files: Mapping[str, FileDone] = field(default_factory=lambda: MappingProxyType({}))
    complete: bool = False
    selection: Selection | None = None
    good_bytes: int = 0
    is_damaged: bool = False

    def after(self, records: Iterable[Record]) -> JournalState:
        """The state once `records` are appended. Cost: one sort of all ranges, however many records there are."""
        proven, fresh = self.proven, list[tuple[int, int]]()
        files, complete, selection = dict(self.files), self.complete, self.selection
        for record in records:
            match record:
                case Proven(pieces):
                    fresh.extend(pieces)
                case Lost(pieces):
                    proven, fresh, complete = Ranges.of([*proven, *fresh]).minus(pieces), [], False
                case FileDone(path):
                    files[path] = record
                case FileGone(path):
                    files.pop(path, None)
                    complete = False
                case Completed():
                    complete = True
                case Selection():
                    complete = complete and record == selection
                    selection = record
                case _:
                    assert_never(record)
        proven = Ranges.of([*proven, *fresh]) if fresh else proven
        return replace(self, proven=proven, files=MappingProxyType(files), complete=complete, selection=selection)

    def records(self) -> list[Record]:
        """The fewest records that give this state again; `JournalState().after(state.records())` equals it."""
        found: list[Record] = [Proven(self.proven)] if self.proven else []
        found += self.files.values()
        if self.selection is not None:
            found.append(self.selection)
        if self.complete:
            found.append(Completed())
        return found


def encode_header(info_hash: bytes) -> bytes:
    """The first `HEADER_BYTES` bytes of the journal of `info_hash`."""
    if len(info_hash) != 32:
        raise ValueError(f"an info-hash has 32 bytes, not {len(info_hash)}")
    return MAGIC + VERSION.to_bytes(4, "big") + info_hash


def encode_record(record: Record) -> bytes:
    """`record` as it is appended."""
    payload = codec.pack(_map_of(record))
    if len(payload) > MAX_RECORD_BYTES:
        raise StoreError(f"a journal record of {len(payload)} bytes is longer than the limit of {MAX_RECORD_BYTES}")
    return len(payload).to_bytes(4, "big") + crc32(payload).to_bytes(4, "big") + payload


def replay(data: bytes, info_hash: bytes) -> JournalState:
    """The state that the journal `data` of release `info_hash` records.

    A header cut short by a crash counts as an empty journal with `good_bytes` 0: the header is to be written again.

    Raises:
        StoreError: not a journal, the journal of another release, or written by a newer version.
    """
    expected = encode_header(info_hash)
    if len(data) < HEADER_BYTES and expected.startswith(data):
        return JournalState()
    _check_header(data, expected)
    records: list[Record] = []
    at = HEADER_BYTES
    while (step := _record_at(data, at)) is not None:
        record, at = step
        records.append(record)
    state = JournalState().after(records)
    return replace(state, good_bytes=at, is_damaged=_is_record_after(data, at + 1))


def _check_header(data: bytes, expected: bytes) -> None:
    if not data.startswith(MAGIC):
        raise StoreError("this file is not a modelp2p journal", hint="Move it away; what is on the disk is then proven again.")
    version = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "big")
    if version > VERSION:
        raise StoreError(
            f"the journal has format version {version}; this modelp2p reads up to {VERSION}",
            hint="Install the newer modelp2p again, or use another home.",
            version=version,
        )
    if data[:HEADER_BYTES] != expected:
        raise StoreError("the journal belongs to another release", info_hash=data[HEADER_BYTES - 32 : HEADER_BYTES].hex())


def _record_at(data: bytes, at: int) -> tuple[Record, int] | None:
    """The record at `at` and where the next begins; None where the sound part of the journal ends."""
    length = int.from_bytes(data[at : at + 4], "big")
    begin, end = at + _PREFIX_BYTES, at + _PREFIX_BYTES + length
    if not 0 < length <= MAX_RECORD_BYTES or end > len(data):
        return None
    payload = data[begin:end]
    if crc32(payload) != int.from_bytes(data[at + 4 : begin], "big"):
        return None
    try:
        return _record_of(codec.unpack_map(payload, max_bytes=MAX_RECORD_BYTES)), end
    except FormatError:
        return None


def _is_record_after(data: bytes, begin: int) -> bool:
    """Whether a sound record starts anywhere from `begin`.

    Every payload is a small map, so one byte rules out most offsets before any CRC is computed.
    """
    return any(data[at + _PREFIX_BYTES] & 0xF0 == 0x80 and _record_at(data, at) for at in range(begin, len(data) - _PREFIX_BYTES))


def _map_of(record: Record) -> codec.Map:
    match record:
        case Proven(pieces):
            return {"t": "proven", "r": _pairs(pieces)}
        case Lost(pieces):
            return {"t": "lost", "r": _pairs(pieces)}
        case FileDone(path, stamp, borrowed):
            numbers: codec.Map = {name: getattr(stamp, name) for name in _STAMP_FIELDS}
            return {"t": "file", "path": path, "borrowed": borrowed, **numbers}
        case FileGone(path):
            return {"t": "unfile", "path": path}
        case Completed():
            return {"t": "complete"}
        case Selection():
            return {"t": "selection", **{name: list(getattr(record, name)) for name in _SELECTION_FIELDS}}
        case _:
            assert_never(record)


def _record_of(source: codec.Map) -> Record:
    kind = codec.take(source, "t", str, "journal record")
    if kind not in _FIELDS:
        raise FormatError(f"unknown journal record '{kind}'")
    codec.only_fields(source, _FIELDS[kind] | {"t"}, kind)
    match kind:
        case "proven":
            return Proven(Ranges.from_list(codec.take(source, "r", list, kind)))
        case "lost":
            return Lost(Ranges.from_list(codec.take(source, "r", list, kind)))
        case "file":
            stamp = FileStamp(*(codec.take(source, name, int, kind) for name in _STAMP_FIELDS))
            return FileDone(codec.take(source, "path", str, kind), stamp, codec.take(source, "borrowed", bool, kind))
        case "unfile":
            return FileGone(codec.take(source, "path", str, kind))
        case "complete":
            return Completed()
        case _:
            return Selection(*(tuple(codec.take_list(source, name, str, maximum=10_000)) for name in _SELECTION_FIELDS))


def _pairs(pieces: Ranges) -> list[codec.Value]:
    return [[begin, end] for begin, end in pieces]


_STAMP_FIELDS = ("dev", "ino", "size", "mtime_ns", "ctime_ns")
_SELECTION_FIELDS = ("include", "exclude", "wanted")
_FIELDS = {
    "proven": frozenset({"r"}),
    "lost": frozenset({"r"}),
    "file": frozenset({"path", "borrowed", *_STAMP_FIELDS}),
    "unfile": frozenset({"path"}),
    "complete": frozenset[str](),
    "selection": frozenset(_SELECTION_FIELDS),
}
