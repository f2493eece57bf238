"""Room on the disk: reserved before a fetch starts, so that a full disk is met with zero bytes asked from anyone.

`posix_fallocate` is not used: where the file system cannot reserve, glibc writes a byte into every block instead, which
takes as long as the download. The raw system call says EOPNOTSUPP, and then free space is compared and nothing is held.
"""

from __future__ import annotations

import ctypes
import errno
import os

from modelp2p.daemon.diskerror import NO_SPACE, disk_error, on_disk
from modelp2p.protocol.errors import NoSpaceError

KEEP_FREE_BYTES = 256 * 1024 * 1024
"""Left alone where space cannot be reserved: other writers need room while nothing is held for us."""

_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate64.restype = ctypes.c_int


def free_bytes(path: str | os.PathLike[str] | int) -> int:
    """What a user without privileges may still write to the file system of `path` (or of an open descriptor)."""
    with on_disk("cannot ask for the free space"):
        found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def reserve(fd: int, size: int, *, keep_free_bytes: int = KEEP_FREE_BYTES) -> bool:
    """Makes the file `size` bytes long with all its blocks allocated; bytes that are there stay.

    Returns whether the space is really held; False where the file system cannot, and only free space was compared.
    After an error the file has its old length.

    Raises:
        NoSpaceError: not enough room; `needed` and `free` are facts in bytes.
        StoreError: the file system refused for another reason, such as its largest file size.
    """
    before = os.fstat(fd)
    missing = max(0, size - before.st_blocks * 512)
    if size == 0:
        return True
    code = _fallocate(fd, size)
    if code == 0:
        return True
    if code in NO_SPACE:
        # A reservation that failed half-way holds blocks and, on some file systems, has grown the file.
        with on_disk("cannot release a failed reservation"):
            os.ftruncate(fd, before.st_size)
        raise _no_space(missing, free_bytes(fd))
    if code not in _UNSUPPORTED:
        raise disk_error(OSError(code, os.strerror(code)), f"cannot reserve {size} bytes")
    free = free_bytes(fd)
    if free - keep_free_bytes < missing:
        raise _no_space(missing + keep_free_bytes, free)
    with on_disk(f"cannot make a file of {size} bytes"):
        os.ftruncate(fd, max(size, before.st_size))
    return False


def _no_space(needed: int, free: int) -> NoSpaceError:
    return NoSpaceError(
        f"not enough space: {needed} bytes are needed, {free} are free",
        hint=f"Free at least {max(0, needed - free)} bytes, or set MODELP2P_HOME to a larger disk.",
        needed=needed,
        free=free,
    )


def _fallocate(fd: int, size: int) -> int:
    """The errno of `fallocate(2)`, 0 for success."""
    while _libc.fallocate64(fd, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            return code
    return 0
