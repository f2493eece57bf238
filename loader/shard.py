"""One safetensors file of a release: opened, its header proven before it is parsed, and the way its bytes will take.

`way_of` is the whole policy in one pure function; a table of tests walks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelp2p.protocol.errors import FormatError, StoreError
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.safetensors import Header, header_bytes, parse_header

if TYPE_CHECKING:
    from modelp2p.loader.pieces import PieceTable
    from modelp2p.loader.readers import Reader
    from modelp2p.loader.source import SourceFile
    from modelp2p.protocol.record import FileRecord

HEADER_GUESS_BYTES = 64 << 10
"""First read of a header that needs no hashing; nearly all headers fit."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a record that counts says about a file."""

    is_own: bool = False
    """The inode was made by the store, which never writes to it again."""
    is_borrowed: bool = False
    """The inode belongs to the user, who may write to it."""
    is_proven: bool = False
    """Unmodified since the daemon proved every byte."""


@dataclass(frozen=True, slots=True)
class Way:
    """How the bytes of one file reach the caller."""

    is_view: bool
    is_hashed: bool
    is_own: bool = False
    """The store's own inode."""


def standing_of(recorded: FileRecord | None, source: SourceFile) -> Standing:
    """What the record knows about this very inode; nothing where it is another or was modified.

    Where only ctime differs (the daemon made one more link) the file is still the store's own, but has to be proven again.
    """
    if recorded is None or recorded.root != source.entry.root:
        return Standing()
    if not recorded.matches(source.stat, ignore_ctime=True):
        return Standing(is_borrowed=recorded.borrowed)
    return Standing(not recorded.borrowed, recorded.borrowed, recorded.matches(source.stat))


def way_of(standing: Standing, *, verify: str, mapping: str, is_host: bool, path: str = "") -> Way:
    """Decide (see `OpenRelease` for the meaning of `verify` and `mapping`).

    Raises:
        StoreError: only the record may vouch, and it does not.
    """
    may_view = is_host and mapping != "pread" and not standing.is_borrowed
    is_view = may_view and (standing.is_own or mapping == "mmap")
    match verify:
        case "off":
            is_hashed = False
        case "cpu" | "gpu":
            is_hashed = True
        case "record":
            if not standing.is_proven:
                hint = "Load with verify='auto', or let the daemon prove it again: modelp2p verify."
                raise StoreError(f"no record that counts vouches for '{path}' as it is now", hint=hint, path=path)
            is_hashed = False
        case _:
            is_hashed = not standing.is_proven or standing.is_borrowed or not is_host
    return Way(is_view, is_hashed, standing.is_own)


@dataclass(slots=True)
class Shard:
    """An open safetensors file with its parsed header."""

    source: SourceFile
    table: PieceTable
    way: Way
    header: Header
    header_read_bytes: int
    """How much of the start of the file was read, and hashed if the way says so, to get the header."""
    checked: Ranges = field(default_factory=Ranges)
    """Pieces of the mapping that were proven since it was made."""
    mapped: memoryview | None = None
    reader: Reader | None = None
    """What copies of it are read with, once one was."""

    def close(self) -> None:
        """Give descriptors and mappings back; views that were handed out keep theirs. Idempotent."""
        self.mapped = None
        self.close_reader()
        self.source.close()

    def reopen(self) -> None:
        """Go on with what lies at the path now, as after a repair, which replaces the inode. Nobody may be reading.

        Nothing of the old inode is shown or counts any more.
        """
        self.close_reader()
        self.mapped, self.checked = None, Ranges()
        self.source.reopen()

    def close_reader(self) -> None:
        """The next copy chooses its reader anew. Nobody may be reading."""
        reader, self.reader = self.reader, None
        if reader is not None:
            reader.close()


def open_shard(source: SourceFile, table: PieceTable, decide: Callable[[SourceFile], Way], max_header_bytes: int) -> Shard:
    """The shard in an open file, which it takes over only on success.

    Raises:
        IntegrityError: the header's bytes are not what was signed, or changed meanwhile.
        FormatError: they are, and are no valid header; names the file.
    """
    way = decide(source)
    with _naming(table.path):
        data = _header_data(source, table, way.is_hashed, max_header_bytes)
        if not way.is_hashed:
            source.check_unchanged()
        header = parse_header(memoryview(data), table.size, max_header_bytes)
    return Shard(source, table, way, header, len(data))


def proven_header(shard: Shard, max_header_bytes: int) -> bytes:
    """The bytes before the first tensor, read and proven again whatever the way says.

    Raises:
        IntegrityError: they are not what was signed.
    """
    data = _header_data(shard.source, shard.table, True, max_header_bytes)
    return bytes(data[: shard.header.data_offset])


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Say in which file a header is bad: `protocol.safetensors` is given bytes and knows no names."""
    try:
        yield
    except FormatError as exc:
        raise FormatError(f"'{path}': {exc.message}", hint=exc.hint, **{**exc.facts, "path": path}) from exc


def _header_data(source: SourceFile, table: PieceTable, is_hashed: bool, max_header_bytes: int) -> bytearray:
    """A private copy of the file's start that holds the header; whole pieces, all proven, if it is hashed."""
    step = table.piece_length if is_hashed else HEADER_GUESS_BYTES
    data = bytearray()
    wanted = min(step, table.size)
    while len(data) < wanted:
        begin = len(data)
        data.extend(bytes(wanted - begin))
        view = memoryview(data)
        source.read_into(view[begin:], begin)
        if is_hashed:
            table.check_run(table.over(begin, wanted), view[begin:])
        needed = header_bytes(view, table.size, max_header_bytes)
        view.release()
        wanted = max(wanted, min(-(-needed // step) * step, table.size))
    return data
