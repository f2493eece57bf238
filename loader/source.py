"""One file of a release, opened once: its bytes as a copy or as a mapping, and whether it is still the same file.

Invariants:
- the size at opening is the manifest's, so no read or view reaches past what was signed;
- a mapping is shared and read-only (`PROT_READ`): a write through a view kills the process (SIGSEGV) and never reaches the file;
- nobody calls `mmap.close`. A view holds the `memoryview` of the mapping, which holds the mapping; the last view unmaps it.
  (A closed mapping under a living `torch.frombuffer` tensor reads other memory, silently; the export makes closing an error.)
- the descriptor is closed with the source, or when nobody holds the source any more; what is asked of a closed one is an error.

A mapping dies of SIGBUS when the file is truncated under it; reads of a copy turn the same into an `IntegrityError`.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
import weakref
from typing import TYPE_CHECKING

from modelp2p.protocol.errors import DeniedError, IntegrityError, NotFoundError, StoreError

if TYPE_CHECKING:
    from modelp2p.protocol.manifest import FileEntry


_LIMIT_HINT = "Raise the limit of open files: ulimit -n."


class SourceFile:
    """An open release file; `stat` is what it was at opening."""

    def __init__(self, path: str, entry: FileEntry, hint: str = "") -> None:
        self.path = path
        self.entry = entry
        self._hint = hint
        self._fd = -1
        self._own(_open(path, entry.path, hint))
        try:
            self.stat = os.fstat(self._fd)
            if not stat.S_ISREG(self.stat.st_mode):
                raise IntegrityError(f"'{entry.path}' is not a regular file", hint=hint, path=entry.path)
            if self.stat.st_size != entry.size:
                raise self._wrong_size(self.stat.st_size)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The descriptor; it stays the source's own."""
        return self._fd

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the file's bytes from `offset` on. Thread-safe; the GIL is free while it reads.

        Raises:
            IntegrityError: the file ends before that.
            StoreError: the disk refused, or the source was closed.
        """
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._descriptor(), [target[done:]], offset + done)
            except OSError as exc:
                raise StoreError(f"'{self.entry.path}' cannot be read: {exc.strerror}", path=self.entry.path) from exc
            if count == 0:
                raise self._wrong_size(offset + done)
            done += count

    def mapping(self) -> memoryview:
        """A new read-only view of the whole file. Whoever holds it, or a slice of it, keeps the mapping alive.

        Raises:
            IntegrityError: the file has shrunk.
            StoreError: the file system cannot map files, or the source was closed.
        """
        self.check_size()
        try:
            return memoryview(_map(self._fd, self.entry.size))
        except OSError as exc:
            hint = _LIMIT_HINT if exc.errno == errno.EMFILE else "Load with mapping='pread'."
            raise StoreError(f"'{self.entry.path}' cannot be mapped: {exc.strerror}", hint=hint, path=self.entry.path) from exc

    def check_unchanged(self) -> None:
        """Return if descriptor and path still show the inode, size and modification time of the opening.

        Raises:
            IntegrityError: the file was written to, truncated or replaced meanwhile.
            StoreError: the source was closed.
        """
        try:
            seen = (os.fstat(self._descriptor()), os.stat(self.path))
        except OSError as exc:
            raise self._changed("vanished") from exc
        for now in seen:
            if (now.st_dev, now.st_ino) != (self.stat.st_dev, self.stat.st_ino):
                raise self._changed("was replaced")
            # Not ctime: the daemon makes hard links of finished files at any time.
            if (now.st_size, now.st_mtime_ns) != (self.stat.st_size, self.stat.st_mtime_ns):
                raise self._changed("was written to")

    def check_size(self) -> None:
        """Return if the file still has all its bytes; a mapping of one that has not dies of SIGBUS.

        Raises:
            IntegrityError: it was truncated.
            StoreError: the source was closed.
        """
        size = os.fstat(self._descriptor()).st_size
        if size < self.entry.size:
            raise self._wrong_size(size)

    def open_direct(self) -> int:
        """A new descriptor of the same inode that reads past the page cache. The caller closes it.

        Raises:
            OSError: the file system, or the lack of /proc, does not allow it.
        """
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)

    def reopen(self) -> None:
        """Go on with what lies at the path now, as after a repair, which replaces the inode. Nobody may be reading.

        Raises:
            NotFoundError, IntegrityError: it is no file of that size any more.
            StoreError: the source was closed.
        """
        self._descriptor()
        fresh = SourceFile(self.path, self.entry, self._hint)
        fresh._closing.detach()
        self._closing()
        self._own(fresh._fd)
        self.stat = fresh.stat

    def close(self) -> None:
        """Give the descriptor back; mappings live on. Idempotent."""
        if self._fd >= 0:
            self._fd = -1
            self._closing()

    def _own(self, fd: int) -> None:
        """Take over a descriptor."""
        self._fd = fd
        self._closing: weakref.finalize[[int], SourceFile] = weakref.finalize(self, os.close, fd)
        # The end of the process closes it as well, and not while a thread still reads.
        self._closing.atexit = False

    def _descriptor(self) -> int:
        if self._fd < 0:
            raise StoreError(f"'{self.entry.path}' was closed", hint="Open the release again.", path=self.entry.path)
        return self._fd

    def _changed(self, what: str) -> IntegrityError:
        return IntegrityError(f"'{self.entry.path}' {what} while it was loaded", hint=self._hint, path=self.entry.path)

    def _wrong_size(self, got: int) -> IntegrityError:
        expected = self.entry.size
        return IntegrityError(
            f"'{self.entry.path}' has {got} bytes, but {expected} were signed",
            hint=self._hint,
            path=self.entry.path,
            expected=expected,
            got=got,
        )


def _open(path: str, name: str, hint: str) -> int:
    try:
        # Non-blocking, so that a FIFO with a file's name cannot hold us; regular files ignore it.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise NotFoundError(f"'{name}' is not here", hint=hint, path=name) from exc
    except PermissionError as exc:
        raise DeniedError(f"'{name}' may not be read by this user", path=name) from exc
    except OSError as exc:
        hint = _LIMIT_HINT if exc.errno == errno.EMFILE else ""
        raise StoreError(f"'{name}' cannot be opened: {exc.strerror}", hint=hint, path=name) from exc


def _map(fd: int, size: int) -> mmap.mmap:
    if sys.version_info >= (3, 13):
        # Without a duplicate of the descriptor: a thousand shards would otherwise cost a thousand descriptors.
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ, trackfd=False)
    return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
