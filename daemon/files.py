"""Files of the store through their life: staged, finished, and the small ones written whole.

Invariants:
- a staging file is a regular file of ours with one name: the engine writes through symlinks and hard links, so anything
  else under its name would let a stranger have a file of the daemon's user overwritten;
- an inode that modelp2p did not create is never written, truncated or chmodded (`borrowed`);
- a name written here is either absent, the old content, or the whole new content, also after a power cut.

It deliberately does not choose paths and does not hash.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from modelp2p.daemon.beneath import open_beneath, parent_beneath
from modelp2p.daemon.diskerror import on_disk
from modelp2p.daemon.space import KEEP_FREE_BYTES, reserve
from modelp2p.protocol.errors import ModelP2PError, StoreError
from modelp2p.protocol.journal import FileStamp

__all__ = [
    "FileStamp",
    "atomic_symlink",
    "check_staging",
    "create_staging",
    "finish_file",
    "fsync_dir",
    "is_name",
    "temporary_name",
    "unlink_if_there",
    "write_all",
    "write_atomic",
    "written_ranges",
]

_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def create_staging(dirfd: int, path: str, size: int, *, keep_free_bytes: int = KEEP_FREE_BYTES) -> int:
    """A new file `path` below `dirfd`, mode 0600, its `size` bytes reserved; the descriptor is the caller's.

    Missing folders are made 0700. After an error no file is left.

    Raises:
        NoSpaceError: it does not fit.
        StoreError: something is there already, or the disk refused.
    """
    with parent_beneath(dirfd, path, make=0o700) as (parent, name):
        with on_disk(f"cannot create '{path}'"):
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent)
        try:
            reserve(fd, size, keep_free_bytes=keep_free_bytes)
            fsync_dir(parent)
        except ModelP2PError:
            os.close(fd)
            os.unlink(name, dir_fd=parent)
            raise
    return fd


def check_staging(dirfd: int, path: str, *, links: int = 1, uid: int | None = None) -> os.stat_result:
    """The state of `path` once it is sure that writing there touches only a file of ours.

    `links` is how many names the file is known to have (2 once it is visible); `uid` defaults to the process's own.

    Raises:
        NotFoundError: no such file.
        StoreError: a symlink, a hard link, another owner, or not a regular file.
    """
    fd = open_beneath(dirfd, path, os.O_PATH)
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    owner = os.geteuid() if uid is None else uid
    if stat.S_ISLNK(found.st_mode):
        raise _planted(path, "is a symlink")
    if not stat.S_ISREG(found.st_mode):
        raise _planted(path, "is not a regular file")
    if found.st_uid != owner:
        raise _planted(path, f"belongs to uid {found.st_uid}, not {owner}")
    if found.st_nlink != links:
        raise _planted(path, f"has {found.st_nlink} names instead of {links}: a hard link to it exists elsewhere")
    return found


def finish_file(fd: int, *, borrowed: bool = False) -> FileStamp:
    """Makes a proven file durable and read-only (0444), and returns its stamp. A `borrowed` inode keeps its mode.

    Raises:
        StoreError: syncing failed; the file's content is unknown from here on and has to be fetched again.
    """
    with on_disk("cannot sync a finished file"):
        os.fsync(fd)
        if not borrowed:
            os.fchmod(fd, 0o444)
            os.fsync(fd)
        return FileStamp.of(os.fstat(fd))


def fsync_dir(where: int | str | os.PathLike[str]) -> None:
    """Makes the names in a folder durable; a descriptor stays open and must not be O_PATH."""
    with on_disk("cannot sync a folder"):
        fd = os.dup(where) if isinstance(where, int) else os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_atomic(where: int | str | os.PathLike[str], name: str, data: bytes, mode: int = 0o600) -> None:
    """Puts `data` under `name` in the folder `where`, whole and durable, replacing what was there.

    Raises:
        NoSpaceError, StoreError: the old content is untouched.
    """
    if "/" in name or name in ("", ".", ".."):
        raise StoreError(f"'{name}' is not a file name", path=name)
    with on_disk(f"cannot write '{name}'"):
        parent = os.dup(where) if isinstance(where, int) else os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            temporary = temporary_name(name)
            fd = os.open(temporary, _CREATE, 0o600, dir_fd=parent)
            try:
                write_all(fd, data)
                os.fchmod(fd, mode)
                os.fsync(fd)
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except OSError:
                os.unlink(temporary, dir_fd=parent)
                raise
            finally:
                os.close(fd)
            os.fsync(parent)
        finally:
            os.close(parent)


def atomic_symlink(target: str | os.PathLike[str], linkpath: str | os.PathLike[str]) -> None:
    """Makes `linkpath` a symlink to `target`, durable, replacing an older symlink in one step; parents are made 0755.

    Raises:
        StoreError: `linkpath` is something other than a symlink, which is not ours to replace.
    """
    link, wanted = Path(linkpath), os.fspath(target)
    with on_disk(f"cannot make the link '{link}'"):
        _make_dirs(link.parent)
        try:
            if os.readlink(link) == wanted:
                return
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise StoreError(f"'{link}' is in the way: it is not a symlink", path=str(link)) from exc
        temporary = link.with_name(temporary_name(link.name))
        temporary.symlink_to(wanted)
        try:
            temporary.rename(link)
        except OSError:
            temporary.unlink()
            raise
        fsync_dir(link.parent)


def written_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that were ever written; all of it where the file system keeps no such books."""
    at = 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno != errno.ENXIO:  # which says: nothing but a hole from here
                yield at, size
            return
        at = min(size, os.lseek(fd, begin, os.SEEK_HOLE))
        if begin < at:
            yield begin, at


def temporary_name(name: str) -> str:
    """A name beside `name` for content that is not whole yet: hidden, ending in `.tmp`, at most 255 bytes."""
    stem = name.encode()[:200].decode(errors="ignore")
    return f".{stem}.{secrets.token_hex(4)}.tmp"


def write_all(fd: int, data: bytes) -> None:
    """Writes all of `data` at the descriptor's position; `OSError` passes through."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _make_dirs(folder: Path) -> None:
    """Makes a folder with its missing parents, each durable in its own parent."""
    if folder.is_dir():
        return
    _make_dirs(folder.parent)
    folder.mkdir(0o755, exist_ok=True)
    fsync_dir(folder.parent)


def _planted(path: str, why: str) -> StoreError:
    return StoreError(f"'{path}' {why}; modelp2p will not write there", hint="Remove it; somebody put it there.", path=path)


def is_name(parent: int, name: str) -> bool:
    """Whether a folder holds that name; a link counts, wherever it leads."""
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def unlink_if_there(parent: int, name: str) -> None:
    """Take a name out of a folder. Idempotent."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
