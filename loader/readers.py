"""How bytes get from a file into a host slot: three readers, and the evidence by which one is chosen.

- `preadv`: copies out of the page cache. Truncation is an error, never SIGBUS. The default.
- `mmap`: copies out of a mapping, which costs no system call. Truncation kills the process (SIGBUS), so only the store's own
  files are read so without being asked for.
- `direct`: past the page cache (O_DIRECT), for files that are not in it and would push everything else out of it.

All copy: what is hashed afterwards is private. `choose` is pure; `evidence_of` looks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from modelp2p.loader.mapped import mapped_bytes
from modelp2p.protocol.errors import IntegrityError, StoreError

if TYPE_CHECKING:
    from modelp2p.loader.source import SourceFile

READERS = ("auto", "preadv", "mmap", "direct")
BLOCK_BYTES = 4096
"""Offset, length and address of a direct read are multiples of the device's logical block, at most this on what is sold."""
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "hugetlbfs"})
COLD_SHARE = 0.05
"""Below this share of resident pages a file counts as not cached."""
SAMPLE_PLACES = 64
SAMPLE_PAGES = 16


class Reader(Protocol):
    """Reads one file. Thread-safe."""

    @property
    def name(self) -> str:
        """As `LoadStats.reader` shows it."""

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target`, which lies in a host slot at a multiple of `BLOCK_BYTES` as `offset` does, from byte `offset` on.

        Raises:
            IntegrityError: the file ends before that.
            StoreError: the disk refused.
        """

    def close(self) -> None:
        """Give back what is not the source's own. Nobody may be reading. Idempotent."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about a file before it is read."""

    size: int
    is_own: bool
    """The store's own inode, which nobody truncates."""
    file_system: str = ""
    cached: float | None = None
    """Share of its pages in memory, from a sample; None: not known."""
    available_bytes: int | None = None
    """Memory that could be had without swapping; None: not known."""


def choose(evidence: Evidence, *, mapping: str = "auto") -> str:
    """The name of the reader for a file.

    XX: a mapping of a warm file on a disk may be faster than preadv (27 against 18 GB/s with one thread, research/loader.md 2);
    experiment E2 on a machine with 16 cores settles it.
    """
    if evidence.is_own and mapping != "pread" and evidence.file_system in MEMORY_FILE_SYSTEMS:
        return "mmap"
    is_cold = evidence.cached is not None and evidence.cached < COLD_SHARE
    is_large = evidence.available_bytes is not None and evidence.size > evidence.available_bytes // 2
    if is_cold and is_large and evidence.file_system not in MEMORY_FILE_SYSTEMS:
        return "direct"
    return "preadv"


def evidence_of(source: SourceFile, *, is_own: bool) -> Evidence:
    """What this machine says about a file. Cost: two small files of /proc and, for files that could fill memory, 64 calls."""
    available = available_bytes()
    could_fill = available is not None and source.entry.size > available // 2
    return Evidence(
        source.entry.size, is_own, file_system_of(source.stat.st_dev), cached_share(source) if could_fill else None, available
    )


def reader_of(source: SourceFile, name: str) -> tuple[Reader, str]:
    """The reader of that name, or preadv and why not that one."""
    match name:
        case "mmap":
            try:
                return MmapReader(source), ""
            except StoreError as exc:
                return PreadvReader(source), exc.message
        case "direct":
            try:
                return DirectReader(source), ""
            except OSError as exc:
                return PreadvReader(source), f"'{source.entry.path}' cannot be read past the page cache: {exc.strerror}"
        case _:
            return PreadvReader(source), ""


class PreadvReader:
    """Copies out of the page cache."""

    name = "preadv"

    def __init__(self, source: SourceFile) -> None:
        self._source = source

    def read_into(self, target: memoryview, offset: int) -> None:
        self._source.read_into(target, offset)

    def close(self) -> None:
        return


class MmapReader:
    """Copies out of a shared read-only mapping.

    Raises:
        IntegrityError: the file has shrunk.
        StoreError: the file system cannot map files.
    """

    name = "mmap"

    def __init__(self, source: SourceFile) -> None:
        self._source = source
        self._view: memoryview | None = source.mapping()
        self._begin = _address_of(self._view)

    def read_into(self, target: memoryview, offset: int) -> None:
        # Most truncations become an error here; one between this and the copy is SIGBUS.
        self._source.check_size()
        # Through ctypes, which lets the other threads run meanwhile; copying between memoryviews would not.
        ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(target)), self._begin + offset, len(target))

    def close(self) -> None:
        self._view = None


class DirectReader:
    """Reads past the page cache, except for the last part of a block, which cannot be.

    Raises:
        OSError: the file system cannot, found by a first read.
    """

    name = "direct"

    def __init__(self, source: SourceFile) -> None:
        self._source = source
        self._fd = source.open_direct()
        try:
            os.preadv(self._fd, [mmap.mmap(-1, BLOCK_BYTES)], 0)
        except BaseException:
            self.close()
            raise

    def read_into(self, target: memoryview, offset: int) -> None:
        whole = len(target) // BLOCK_BYTES * BLOCK_BYTES
        done = 0
        while done < whole:
            try:
                count = os.preadv(self._fd, [target[done:whole]], offset + done)
            except OSError as exc:
                path = self._source.entry.path
                hint = "Load with reader='preadv'."
                raise StoreError(f"'{path}' cannot be read past the page cache: {exc.strerror}", hint=hint, path=path) from exc
            if count % BLOCK_BYTES or not count:
                break
            done += count
        # The rest of a block, or what a short read left: the ordinary way says whether the file ends there.
        self._source.read_into(target[done:], offset + done)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def cached_share(source: SourceFile) -> float | None:
    """The share of a file's pages that are in memory, by a sample; None where the kernel does not say.

    Linux tells only owners and those who may write; to others all pages look resident, and a cold file is read by preadv.
    """
    library = ctypes.CDLL(None)
    try:
        view = source.mapping()
    except (StoreError, IntegrityError):
        return None
    # Undeclared, an address is cut to 32 bits and the call always fails.
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    begin, pages = _address_of(view), -(-len(view) // mmap.PAGESIZE)
    resident = asked = 0
    for place in range(SAMPLE_PLACES):
        first = pages * place // SAMPLE_PLACES
        count = min(SAMPLE_PAGES, pages - first)
        answer = ctypes.create_string_buffer(count)
        if library.mincore(begin + first * mmap.PAGESIZE, count * mmap.PAGESIZE, answer):
            return None
        resident += sum(byte & 1 for byte in answer.raw)
        asked += count
    return resident / asked


def file_system_of(device: int) -> str:
    """The type of the file system with this `st_dev`; empty where it cannot be told (btrfs, no /proc)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in _lines("/proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        if fields.split(" ")[2:3] == [wanted]:
            return rest.split(" ")[0]
    return ""


def available_bytes() -> int | None:
    """What the kernel calls MemAvailable."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _address_of(view: memoryview) -> int:
    return mapped_bytes(view, 0, len(view)).data_ptr()
