"""`--local-dir`: files of the store as files of the user's own, below a folder of theirs.

Invariants:
- the store's files are opened read-only and share no inode with the result: writing to it can never harm the store;
- nothing is written outside the folder, whatever symlinks it holds, and no file of other content is replaced;
- a file appears under its name only when it is whole.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from modelp2p.protocol.errors import StoreError

_COMPARE_BYTES = 1 << 20


def place(tree: str, folder: str, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> int:
    """Put the files of the visible `tree` below `folder`; returns how many were new.

    Raises:
        StoreError: something else is there under one of their names; nothing was changed then.
        NoSpaceError: they do not fit; what was already placed stays.
    """
    from modelp2p.daemon.linking import OWN_INODE_WAYS, place_copy
    from modelp2p.protocol.selection import wanted_paths

    os.makedirs(folder, exist_ok=True)
    source = os.open(os.path.realpath(tree), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        target = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            wanted = wanted_paths(dict.fromkeys(_files_below(source), 0), include, exclude)
            missing = [path for path in wanted if not _is_there(source, target, path)]
            for path in missing:
                fd = _open(source, path)
                try:
                    place_copy(fd, target, path, OWN_INODE_WAYS, folder_mode=0o777 & ~umask())
                finally:
                    os.close(fd)
                _give_usual_mode(target, path)
            return len(missing)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _files_below(root: int) -> Iterator[str]:
    for folder, _, names, _ in os.fwalk(".", dir_fd=root, follow_symlinks=False):
        for name in sorted(names):
            yield os.path.normpath(os.path.join(folder, name))


def _is_there(source: int, target: int, path: str) -> bool:
    """Whether `path` exists below `target` with the same content.

    Raises:
        StoreError: something else has that name.
    """
    from modelp2p.daemon.beneath import open_beneath
    from modelp2p.protocol.errors import NotFoundError

    try:
        theirs = open_beneath(target, path, os.O_RDONLY)
    except NotFoundError:
        return False
    ours = _open(source, path)
    try:
        if stat.S_ISREG(os.fstat(theirs).st_mode) and _same_content(ours, theirs):
            return True
    finally:
        os.close(ours)
        os.close(theirs)
    raise StoreError(
        f"'{path}' exists in the local folder with other content",
        hint="Move it away, or choose another --local-dir. Nothing was changed.",
        path=path,
    )


def _same_content(first: int, second: int) -> bool:
    size = os.fstat(first).st_size
    if os.fstat(second).st_size != size:
        return False
    return all(
        os.pread(first, _COMPARE_BYTES, at) == os.pread(second, _COMPARE_BYTES, at) for at in range(0, size, _COMPARE_BYTES)
    )


def _open(source: int, path: str) -> int:
    from modelp2p.daemon.beneath import open_beneath

    return open_beneath(source, path, os.O_RDONLY)


def _give_usual_mode(target: int, path: str) -> None:
    from modelp2p.daemon.beneath import open_beneath

    fd = open_beneath(target, path, os.O_RDONLY)
    try:
        os.fchmod(fd, 0o666 & ~umask())
    except OSError as exc:
        # File systems without modes (exFAT, some network ones) have nothing to give.
        if exc.errno not in (errno.EPERM, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def umask() -> int:
    """The bits that new files of this process do not get."""
    # The only way to read it is to set it; this process has one thread that creates files.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
