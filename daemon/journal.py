"""The journal file of one release: opened, appended to, kept short. The format is `protocol/journal.py`.

Invariants:
- `append` returns only after `fdatasync`: what it was told survives a power cut (the caller syncs the data first);
- a torn tail is cut off before the first append, because a record behind a torn one would never be read;
- after an error of write or sync the file is cut back or the journal refuses all further work; nothing is retried.

All functions block; the daemon calls them in a thread. One process at a time: the home lock sees to that.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Self

from modelp2p.daemon.diskerror import disk_error, on_disk
from modelp2p.daemon.files import fsync_dir, write_all, write_atomic
from modelp2p.protocol.errors import StoreError
from modelp2p.protocol.journal import HEADER_BYTES, JournalState, Record, encode_header, encode_record, replay

# A release of 65,536 pieces written one record each takes about 1.5 MiB; below that rewriting buys nothing.
COMPACT_BYTES = 1024 * 1024
# 100 times what 65,536 pieces and 10,000 files take: larger is not ours.
MAX_JOURNAL_BYTES = 512 * 1024 * 1024


class Journal:
    """An open journal; `state` always says what is on the disk."""

    def __init__(self, path: Path, fd: int, info_hash: bytes, state: JournalState, compact_bytes: int) -> None:
        self.state = state
        self._path = path
        self._fd = fd
        self._info_hash = info_hash
        self._compact_bytes = compact_bytes
        self._compact_at = max(compact_bytes, 2 * state.good_bytes)
        self._broken: str | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], info_hash: bytes, *, compact_bytes: int = COMPACT_BYTES) -> Self:
        """The journal at `path`, created 0600 where there is none; its torn tail, if any, is cut off and gone for good.

        Raises:
            StoreError: the journal of another release, a newer version, a symlink, another user's file, or disk trouble.
        """
        where = Path(path)
        with on_disk(f"cannot open the journal '{where}'"):
            fd = os.open(where, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
            try:
                _check_inode(fd, where)
                state = _recover(fd, where, info_hash)
            except BaseException:
                os.close(fd)
                raise
        return cls(where, fd, info_hash, state, compact_bytes)

    def __repr__(self) -> str:
        state = self._broken or f"{self.state.proven.total} pieces, {len(self.state.files)} files, {self.size_bytes} bytes"
        return f"<Journal {self._path.name}: {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def size_bytes(self) -> int:
        """The length of the file."""
        return self.state.good_bytes

    def append(self, *records: Record) -> None:
        """Adds `records` in order, durably, with one sync for all.

        Raises:
            NoSpaceError: no room; the journal is as before and may be used again.
            StoreError: the disk failed; the journal is closed to further records and has to be opened again.
        """
        if not records:
            return
        data = b"".join(encode_record(record) for record in records)
        with self._lock:
            self._check_usable()
            self._write(data)
            state = self.state.after(records)
            self.state = _with_size(state, self.state.good_bytes + len(data))
            if self.size_bytes >= self._compact_at:
                self._compact()

    def compact(self) -> None:
        """Rewrites the journal with the fewest records that say the same; a crash leaves the old one or the new one."""
        with self._lock:
            self._check_usable()
            self._compact()

    def close(self) -> None:
        """Closes the file; closing again does nothing."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1
            self._broken = "closed"

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise StoreError(f"the journal '{self._path.name}' cannot be used: {self._broken}")

    def _write(self, data: bytes) -> None:
        try:
            write_all(self._fd, data)
        except OSError as exc:
            self._cut_back(exc)
            raise disk_error(exc, "cannot write the journal") from exc
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            # The kernel may have marked the lost pages clean: whatever is read back now proves nothing.
            self._broken = f"syncing failed: {exc.strerror}"
            raise disk_error(exc, "cannot sync the journal") from exc

    def _cut_back(self, cause: OSError) -> None:
        """Removes half a record, so that the next one is not written behind it."""
        try:
            os.ftruncate(self._fd, self.state.good_bytes)
        except OSError:
            self._broken = f"writing failed: {cause.strerror}"

    def _compact(self) -> None:
        data = encode_header(self._info_hash) + b"".join(encode_record(record) for record in self.state.records())
        write_atomic(self._path.parent, self._path.name, data)
        with on_disk(f"cannot open the journal '{self._path}' again"):
            fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.close(self._fd)
        self._fd = fd
        self.state = _with_size(self.state, len(data))
        # Twice its new size, so that a journal that is large because it has to be is not rewritten at every append.
        self._compact_at = max(self._compact_bytes, 2 * len(data))


def _recover(fd: int, path: Path, info_hash: bytes) -> JournalState:
    data = _read_all(fd)
    state = replay(data, info_hash)
    if state.good_bytes < len(data):
        os.ftruncate(fd, state.good_bytes)
    if state.good_bytes == 0:
        write_all(fd, encode_header(info_hash))
        state = _with_size(state, HEADER_BYTES)
    if state.good_bytes != len(data):
        os.fsync(fd)
        fsync_dir(path.parent)
    return state


def _read_all(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    if size > MAX_JOURNAL_BYTES:
        raise StoreError(f"a journal of {size} bytes is larger than the limit of {MAX_JOURNAL_BYTES}", size=size)
    found = bytearray()
    while chunk := os.pread(fd, 1 << 20, len(found)):
        found += chunk
    return bytes(found)


def _check_inode(fd: int, path: Path) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.geteuid():
        raise StoreError(f"'{path}' is not a private file of this user; modelp2p will not write there", path=str(path))


def _with_size(state: JournalState, good_bytes: int) -> JournalState:
    return JournalState(state.proven, state.files, state.complete, state.selection, good_bytes, state.is_damaged)
