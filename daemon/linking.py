"""Content that gets a second name or a second inode: publishing without copying, adopting, and the visible tree.

Three ways, in the order the caller allows: a reflink (an own inode that shares blocks, free), a hard link (the very same
inode: `borrowed`, to be re-checked before every use) and a copy.

Invariants:
- the source is never written, and a source that changes while it is copied is an error, not a mixture;
- a destination name appears only when its content is whole: data is written under a temporary name;
- no symlink is followed at either end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, assert_never

from modelp2p.daemon.beneath import open_beneath, parent_beneath
from modelp2p.daemon.diskerror import on_disk
from modelp2p.daemon.files import FileStamp, fsync_dir, is_name, temporary_name, unlink_if_there, write_all
from modelp2p.protocol.errors import CorruptError, StoreError

Way: TypeAlias = Literal["reflink", "link", "copy"]

PUBLISH_WAYS: tuple[Way, ...] = ("reflink", "link", "copy")
OWN_INODE_WAYS: tuple[Way, ...] = ("reflink", "copy")
"""For adopt, repair and `--local-dir`: the result must not share an inode with anything."""

# linux/fs.h: FICLONE is _IOW(0x94, 9, int), the same on x86-64 and arm64.
_FICLONE = 0x40049409
# A step of a copy: small enough for progress twice a second on a slow disk, large enough to cost nothing.
_STEP_BYTES = 32 * 1024 * 1024
_BUFFER_BYTES = 1024 * 1024
# Another file system, no such operation there, a link limit, protected_hardlinks, or a source without a name.
_NOT_THIS_WAY = frozenset(
    {
        errno.EXDEV,
        errno.EOPNOTSUPP,
        errno.ENOTTY,
        errno.EINVAL,
        errno.EPERM,
        errno.EMLINK,
        errno.ENOENT,
        errno.ENOSYS,
        errno.EBADF,
    }
)


def place_copy(
    src_fd: int,
    dst_dirfd: int,
    path: str,
    ways: Sequence[Way] = PUBLISH_WAYS,
    *,
    replace: bool = False,
    folder_mode: int = 0o700,
    progress: Callable[[int], None] | None = None,
) -> Way:
    """Gives the content of `src_fd` the name `path` below `dst_dirfd` by the first of `ways` that works, and says which.

    An own inode has mode 0600. The result is synced, with its folder. `progress` is given bytes as they are copied.

    Raises:
        NoSpaceError: the copy does not fit; nothing is left behind.
        CorruptError: the source changed while it was read.
        StoreError: `path` exists and `replace` is not set, or none of `ways` is possible here.
    """
    before = os.fstat(src_fd)
    if not stat.S_ISREG(before.st_mode):
        raise StoreError(f"the source of '{path}' is not a regular file", path=path)
    with parent_beneath(dst_dirfd, path, make=folder_mode) as (parent, name):
        temporary = temporary_name(name)
        for way in ways:
            try:
                with on_disk(f"cannot place '{path}'"):
                    if not _place(way, src_fd, parent, temporary, before.st_size, progress):
                        continue
                    if not FileStamp.of(before).matches(os.fstat(src_fd), ignore_ctime=True):
                        raise CorruptError(f"the source of '{path}' changed while it was read", path=path)
                    _give_name(parent, temporary, name, replace=replace)
            finally:
                unlink_if_there(parent, temporary)
            fsync_dir(parent)
            return way
    raise StoreError(f"'{path}' cannot be placed here by {' or '.join(ways)}", path=path)


def link_visible(src_dirfd: int, src_path: str, dst_dirfd: int, dst_path: str, *, replace: bool = False) -> FileStamp:
    """Makes `dst_path` a hard link to `src_path`, durable; missing folders are made 0755. Doing it again changes nothing.

    Returns the stamp after linking: a link alters the ctime of the inode.

    Raises:
        StoreError: the source is not a regular file, or another file has the name and `replace` is not set.
    """
    probe = open_beneath(src_dirfd, src_path, os.O_PATH)
    try:
        source = os.fstat(probe)
        if not stat.S_ISREG(source.st_mode):
            raise StoreError(f"'{src_path}' is not a regular file", path=src_path)
        with (
            parent_beneath(src_dirfd, src_path) as (src_parent, src_name),
            parent_beneath(dst_dirfd, dst_path, make=0o755) as (parent, name),
            on_disk(f"cannot link '{dst_path}'"),
        ):
            if not _is_inode(parent, name, source):
                temporary = temporary_name(name)
                try:
                    os.link(src_name, temporary, src_dir_fd=src_parent, dst_dir_fd=parent, follow_symlinks=False)
                    if not _is_inode(parent, temporary, source):
                        raise StoreError(f"'{src_path}' was replaced while it was linked", path=src_path)
                    _give_name(parent, temporary, name, replace=replace)
                finally:
                    unlink_if_there(parent, temporary)
            os.fsync(parent)
            return FileStamp.of(os.fstat(probe))
    finally:
        os.close(probe)


def _place(way: Way, src_fd: int, parent: int, name: str, size: int, progress: Callable[[int], None] | None) -> bool:
    """Whether `way` is possible here; then `name` holds the content, synced."""
    match way:
        case "link":
            return _link(src_fd, parent, name)
        case "reflink" | "copy":
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
            try:
                if way == "copy":
                    _copy(src_fd, fd, size, progress)
                elif not _reflink(src_fd, fd):
                    return False
                os.fsync(fd)
                return True
            finally:
                os.close(fd)
        case _:
            assert_never(way)


def _reflink(src_fd: int, fd: int) -> bool:
    try:
        fcntl.ioctl(fd, _FICLONE, src_fd)
    except OSError as exc:
        if exc.errno in _NOT_THIS_WAY:
            return False
        raise
    return True


def _link(src_fd: int, parent: int, name: str) -> bool:
    try:
        # With a folder descriptor Python calls linkat(AT_SYMLINK_FOLLOW), which resolves /proc/self/fd to the inode itself.
        os.link(f"/proc/self/fd/{src_fd}", name, dst_dir_fd=parent)
    except OSError as exc:
        if exc.errno in _NOT_THIS_WAY:
            return False
        raise
    if not _is_inode(parent, name, os.fstat(src_fd)):
        raise StoreError("the source was replaced while it was linked")
    os.fsync(src_fd)  # what is published must be durable, whoever wrote it
    return True


def _copy(src_fd: int, fd: int, size: int, progress: Callable[[int], None] | None) -> None:
    at, in_kernel = 0, True
    while at < size:
        want = min(_STEP_BYTES, size - at)
        try:
            done = os.copy_file_range(src_fd, fd, want, at, at) if in_kernel else _copy_step(src_fd, fd, want, at)
        except OSError as exc:
            if in_kernel and exc.errno in _NOT_THIS_WAY:
                in_kernel = False
                continue
            raise
        if done == 0:
            raise CorruptError(f"the source is shorter than expected: {at} of {size} bytes", expected=size, got=at)
        at += done
        if progress is not None:
            progress(done)


def _copy_step(src_fd: int, fd: int, want: int, at: int) -> int:
    data = os.pread(src_fd, min(want, _BUFFER_BYTES), at)
    os.lseek(fd, at, os.SEEK_SET)
    write_all(fd, data)
    return len(data)


def _give_name(parent: int, temporary: str, name: str, *, replace: bool) -> None:
    if not replace:
        # link(2) never replaces, unlike rename: a file that appeared in between is kept.
        try:
            os.link(temporary, name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
            return
        except FileExistsError as exc:
            raise StoreError(f"'{name}' exists already", path=name) from exc
        except OSError as exc:
            # exFAT and some FUSE file systems have no hard links; there a look before the rename is all there is.
            if exc.errno not in _NOT_THIS_WAY:
                raise
        if is_name(parent, name):
            raise StoreError(f"'{name}' exists already", path=name)
    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)


def _is_inode(parent: int, name: str, expected: os.stat_result) -> bool:
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (expected.st_dev, expected.st_ino)
