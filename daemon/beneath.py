"""Files below a folder that is held open, reached without following any symlink.

A path that is checked and then opened by name can be swapped in between; here the kernel resolves a relative path below
a descriptor and refuses every symlink on the way (`openat2` with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS). Where the
kernel or a seccomp filter has no `openat2`, the path is walked folder by folder with O_NOFOLLOW, which promises the same.

Invariants:
- no function here ever opens, creates or removes anything outside the folder it was given;
- a path is relative, without empty, `.` or `..` components: anything else is refused before the kernel sees it;
- opening never blocks on a FIFO and never takes a terminal.

man 2 openat2: https://man7.org/linux/man-pages/man2/openat2.2.html
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from modelp2p.daemon.diskerror import on_disk
from modelp2p.protocol.errors import StoreError

# openat2 got its number after the tables of all architectures were joined: it is the same everywhere.
_SYS_OPENAT2 = 437
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
# ENOSYS: before Linux 5.6. EPERM: seccomp filters of older container runtimes refuse what they do not know.
_NO_OPENAT2 = frozenset({errno.ENOSYS, errno.EPERM})
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def open_beneath(dirfd: int, path: str, flags: int, mode: int = 0) -> int:
    """A new descriptor, owned by the caller, of `path` below `dirfd`. O_CLOEXEC and O_NOFOLLOW are added.

    Raises:
        NotFoundError: no such file.
        StoreError: a symlink on the way, a path that leaves the folder, or the kernel refused.
    """
    parts = split_path(path)
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    if not flags & os.O_PATH:  # beside which openat2 knows no other flags
        flags |= os.O_NOCTTY | os.O_NONBLOCK  # without effect on regular files; a FIFO in their place must not stop us
    with on_disk(f"cannot open '{path}'"):
        try:
            return _openat2(dirfd, path, flags, mode)
        except OSError as exc:
            if exc.errno not in _NO_OPENAT2:
                raise
        return _walk(dirfd, parts, flags, mode)


def split_path(path: str) -> list[str]:
    """The components of a relative path.

    Raises:
        StoreError: empty, absolute, NUL, or with an empty, `.` or `..` component.
    """
    parts = path.split("/")
    if "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"'{path}' is not a path below a folder of the store", path=path)
    return parts


@contextmanager
def parent_beneath(dirfd: int, path: str, *, make: int | None = None) -> Iterator[tuple[int, str]]:
    """The folder that holds `path`, open for the time of the block, and the last component.

    With `make`, missing folders are created with that mode and synced.
    """
    *folders, name = split_path(path)
    if make is not None and folders:
        make_dirs_beneath(dirfd, "/".join(folders), mode=make)
    fd = open_beneath(dirfd, "/".join(folders), os.O_RDONLY | os.O_DIRECTORY) if folders else os.dup(dirfd)
    try:
        yield fd, name
    finally:
        os.close(fd)


def make_dirs_beneath(dirfd: int, path: str, *, mode: int = 0o700) -> None:
    """Makes `path` and its missing parents, each durable in its own parent; existing folders keep their mode.

    Raises:
        StoreError: a component exists and is no folder (a symlink to one is none).
    """
    at = os.dup(dirfd)
    try:
        with on_disk(f"cannot make the folder '{path}'"):
            for part in split_path(path):
                created = _mkdir(at, part, mode)
                below = os.open(part, _DIRECTORY, dir_fd=at)
                if created:
                    os.fchmod(below, mode)  # whatever the umask is
                    os.fsync(at)
                os.close(at)
                at = below
    finally:
        os.close(at)


def remove_tree_beneath(dirfd: int, path: str) -> bool:
    """Removes the file, symlink or folder `path` with all it holds, durably; False if there was nothing.

    Symlinks are removed, never followed.
    """
    *folders, _ = split_path(path)
    if folders and not _is_there(dirfd, "/".join(folders)):
        return False
    with parent_beneath(dirfd, path) as (parent, name), on_disk(f"cannot remove '{path}'"):
        try:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(mode):
            shutil.rmtree(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)
        os.fsync(parent)
        return True


def _is_there(dirfd: int, path: str) -> bool:
    """Whether every folder of `path` exists; a symlink on the way is not "missing" and is refused by the caller's open."""
    at = os.dup(dirfd)
    try:
        for part in split_path(path):
            below = os.open(part, _DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
    except OSError as exc:
        return exc.errno != errno.ENOENT
    finally:
        os.close(at)
    return True


def _mkdir(dirfd: int, name: str, mode: int) -> bool:
    try:
        os.mkdir(name, mode, dir_fd=dirfd)
    except FileExistsError:
        return False
    return True


def _openat2(dirfd: int, path: str, flags: int, mode: int) -> int:
    # struct open_how { u64 flags, mode, resolve }; a mode without O_CREAT is EINVAL.
    how = struct.pack("QQQ", flags, mode if flags & os.O_CREAT else 0, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS)
    while True:
        fd = int(
            _libc.syscall(ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(dirfd), os.fsencode(path), how, ctypes.c_size_t(len(how)))
        )
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        # EAGAIN: "the kernel could not ensure that a '..' component didn't escape", after a rename elsewhere.
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code))


def _walk(dirfd: int, parts: list[str], flags: int, mode: int) -> int:
    at = os.dup(dirfd)
    try:
        for part in parts[:-1]:
            below = os.open(part, _DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
        return os.open(parts[-1], flags, mode, dir_fd=at)
    finally:
        os.close(at)
