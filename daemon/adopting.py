"""Adopting bytes that are already on this machine: an interrupted download, a cache folder, a damaged copy of our own.

Whatever is there is copied (or reflinked) into new inodes of ours, cut or extended to the right length, and proven piece by
piece against the signed layers; what does not match is simply missing and is fetched. The source is never changed.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.beneath import open_beneath, parent_beneath
from modelp2p.daemon.comparing import compare_pieces
from modelp2p.daemon.diskerror import on_disk
from modelp2p.daemon.files import check_staging, create_staging, fsync_dir, temporary_name, write_all
from modelp2p.daemon.linking import OWN_INODE_WAYS, place_copy
from modelp2p.protocol.errors import NotFoundError, StoreError, UsageError
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.text import printable

if TYPE_CHECKING:
    from modelp2p.daemon.folder import ReleaseFolder
    from modelp2p.daemon.hashing import HashPool
    from modelp2p.daemon.requests import Emit
    from modelp2p.protocol.manifest import FileEntry

log = logging.getLogger(__name__)

MAX_CANDIDATES = 100_000
MAX_DEPTH = 64
"""Folders below the source: four times what a release has, for what other programs put around it."""
_UNFINISHED = (".incomplete", ".part", ".aria2", ".tmp", ".!qB")
"""How other programs' names of interrupted downloads end."""
_STEP_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Source:
    """A file or folder given by the client, by descriptor; `name` is the file's own name."""

    fd: int
    name: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file below the source."""

    path: str
    size: int

    @property
    def name(self) -> str:
        """The last component of its path."""
        return self.path.rsplit("/", 1)[-1]


class Candidates:
    """The files of a folder by what tells whose bytes they may be: each file of a release is looked up, not searched for."""

    def __init__(self, found: Iterable[Candidate]) -> None:
        self._by_path = {candidate.path: candidate for candidate in found}
        self._by_name: dict[str, list[Candidate]] = {}
        self._by_size: dict[int, Candidate] = {}
        for candidate in self._by_path.values():
            self._by_name.setdefault(candidate.name, []).append(candidate)
            self._by_size.setdefault(candidate.size, candidate)
        self._unfinished = [candidate for candidate in self._by_path.values() if candidate.name.endswith(_UNFINISHED)]

    def likeliest(self, entry: FileEntry) -> Candidate | None:
        """The same path, then a known name (also of an interrupted download), then the same size."""
        if entry.path in self._by_path:
            return self._by_path[entry.path]
        known = _names_of(entry)
        named = [candidate for name in known for candidate in self._by_name.get(name, ())]
        named = named or [candidate for candidate in self._unfinished if candidate.name.startswith(known)]
        if named:
            return min(named, key=lambda candidate: abs(candidate.size - entry.size))
        return self._by_size.get(entry.size)


async def adopt_files(pool: HashPool, folder: ReleaseFolder, wanted: tuple[str, ...], source: Source, emit: Emit) -> int:
    """Prove what `source` holds of the wanted files. Returns the bytes found good.

    Raises:
        UsageError: the source is neither a file nor a folder.
        NoSpaceError, StoreError: it cannot be taken in.
    Cancellation: pieces journaled so far stay proven.
    """
    found = Candidates(await trio.to_thread.run_sync(_list, source.fd)) if stat.S_ISDIR(os.fstat(source.fd).st_mode) else None
    good = done = 0
    missing = [path for path in wanted if path not in folder.state.files]
    total = sum(folder.release.manifest.file(path).size for path in missing)
    for path in missing:
        entry = folder.release.manifest.file(path)
        fd = None
        if entry.size and found is not None:
            fd = await trio.to_thread.run_sync(_open_likeliest, source, found, entry)
        elif entry.size and _may_be(entry, source.name, len(missing)):
            fd = os.dup(source.fd)
        if fd is not None:
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    await trio.to_thread.run_sync(take_in, folder, path, fd)
                    good += await prove_staged(pool, folder, path, emit, done, total)
            finally:
                os.close(fd)
        done += entry.size
        emit({"phase": "checking", "done": done, "total": total})
    return good


async def prove_left_over(pool: HashPool, folder: ReleaseFolder, wanted: tuple[str, ...], emit: Emit) -> int:
    """Prove what lies in the engine's folder without a journal record: after a crash, or where the journal was damaged.

    Holes are skipped, so that this reads what was written and not what is only reserved. Returns the bytes found good.
    """
    left = {path: folder.left_over(path) for path in wanted if path not in folder.state.files}
    total = sum(pieces.total for pieces in left.values()) * folder.release.pieces.piece_length
    good = done = 0
    for path, pieces in left.items():
        if pieces:
            good += await prove_staged(pool, folder, path, emit, done, total, pieces)
            done += pieces.total * folder.release.pieces.piece_length
    return good


async def prove_staged(
    pool: HashPool, folder: ReleaseFolder, path: str, emit: Emit, done: int, total: int, only: Ranges | None = None
) -> int:
    """Prove and journal whatever good pieces lie in the engine's folder under `path`. Returns their bytes.

    Args:
        pool: hashes them.
        folder: of the release.
        path: the staged file.
        emit: told the progress, `done` bytes of `total` being behind already.
        done: see `emit`.
        total: see `emit`.
        only: these pieces, by number within the file; None is all.
    """
    pieces = folder.release.pieces
    first, good = pieces.first(path), 0
    fd = folder.open_staged(path)
    try:
        async for batch in compare_pieces(pool, folder.release, path, fd, only):
            if batch.good:
                matching = Ranges.of_ints(first + piece for piece in batch.good)
                await trio.to_thread.run_sync(folder.sync_proven, matching)
                good += sum(pieces.locate(piece).length for piece in matching.ints())
            emit({"phase": "checking", "done": done + batch.end, "total": total})
    finally:
        os.close(fd)
    return good


def take_in(folder: ReleaseFolder, path: str, fd: int) -> None:
    """Put a copy of `fd` where the engine will write the rest; a staged file keeps its proven pieces and gets the others.

    Raises:
        NoSpaceError, StoreError: the copy cannot be made.
    """
    data = folder.data_dirfd()
    try:
        if folder.proven_bytes((path,)):
            _fill(folder, path, data, fd)
            return
        if os.fstat(fd).st_size > folder.release.pieces.size(path):
            _place_beginning(fd, data, path, folder.release.pieces.size(path))
            return
        place_copy(fd, data, path, OWN_INODE_WAYS, replace=True)
        copy = open_beneath(data, path, os.O_RDWR)
        try:
            with on_disk(f"cannot size '{path}'"):
                os.ftruncate(copy, folder.release.pieces.size(path))
        finally:
            os.close(copy)
    finally:
        os.close(data)


def _place_beginning(fd: int, data: int, path: str, size: int) -> None:
    """Copy that many bytes of `fd`: what lies behind them is not wanted, and of a sparse file may be terabytes."""
    with parent_beneath(data, path, make=0o700) as (parent, name):
        temporary = temporary_name(name)
        # The room was checked before anything was taken in.
        copy = create_staging(parent, temporary, size, keep_free_bytes=0)
        try:
            with on_disk(f"cannot place '{path}'"):
                try:
                    at = 0
                    while at < size and (step := os.pread(fd, min(_STEP_BYTES, size - at), at)):
                        write_all(copy, step)
                        at += len(step)
                    os.fsync(copy)
                    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
                except BaseException:
                    os.unlink(temporary, dir_fd=parent)
                    raise
        finally:
            os.close(copy)
        fsync_dir(parent)


def _fill(folder: ReleaseFolder, path: str, data: int, fd: int) -> None:
    """Copy from `fd` what the journal does not call proven. Nothing of it is believed before it was read back."""
    pieces = folder.release.pieces
    try:
        found = check_staging(data, path)
    except NotFoundError:
        return
    if found.st_size != pieces.size(path):
        # Neither this one nor its journal is good for anything: staging makes it anew.
        return
    owned = pieces.pieces_of(path)
    missing = Ranges.span(owned.start, owned.stop).minus(folder.state.proven)
    staged = open_beneath(data, path, os.O_RDWR)
    try:
        with on_disk(f"cannot write '{path}'"):
            for piece in missing.ints():
                span = pieces.locate(piece)
                os.lseek(staged, span.offset, os.SEEK_SET)
                write_all(staged, os.pread(fd, span.length, span.offset))
    finally:
        os.close(staged)


def _list(fd: int) -> list[Candidate]:
    candidates = []
    for folder, below, names, dirfd in os.fwalk(".", dir_fd=fd, follow_symlinks=False):
        if folder.count("/") == MAX_DEPTH:
            below.clear()
        prefix = folder[2:] + "/" if folder != "." else ""
        for name in names:
            try:
                found = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
            except OSError as exc:
                # Gone meanwhile, or on a bad spot of the disk: what cannot be looked at cannot be taken in.
                log.warning("%s is not taken in: %s", printable(prefix + name), exc.strerror)
                continue
            if stat.S_ISREG(found.st_mode):
                candidates.append(Candidate(prefix + name, found.st_size))
        if len(candidates) > MAX_CANDIDATES:
            raise UsageError(f"the folder holds more than {MAX_CANDIDATES} files", hint="Give the folder of this model only.")
    return candidates


def _open_likeliest(source: Source, found: Candidates, entry: FileEntry) -> int | None:
    candidate = found.likeliest(entry)
    if candidate is None:
        return None
    try:
        return open_beneath(source.fd, candidate.path, os.O_RDONLY)
    except (NotFoundError, StoreError) as exc:
        # Another user's, or replaced since it was listed: as good as not there, and its bytes may be elsewhere.
        log.warning("%s is not taken in: %s", entry.path, printable(exc.message))
        return None


def _names_of(entry: FileEntry) -> tuple[str, ...]:
    """Names under which tools keep this file: its own, and its blob's in a Hugging Face cache."""
    git = (entry.git_sha1.hex(),) if entry.git_sha1 else ()
    return (entry.path.rsplit("/", 1)[-1], entry.sha256.hex(), *git)


def _may_be(entry: FileEntry, name: str, missing: int) -> bool:
    return missing == 1 or any(name.startswith(known) for known in _names_of(entry))
