"""What the disk said, as an error of ours: the one place where `OSError` from the store is translated.

It deliberately knows no paths and retries nothing: after a failed fsync the kernel may have dropped the data, so no
second attempt can make it true again (https://wiki.postgresql.org/wiki/Fsync_Errors).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from modelp2p.protocol.errors import ModelP2PError, NoSpaceError, NotFoundError, StoreError

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_HINTS = {
    errno.ELOOP: "A symlink lies where modelp2p keeps its own files. Remove it.",
    errno.EROFS: "The file system is mounted read-only.",
    errno.EACCES: "Check the owner and mode of the modelp2p home.",
    errno.EIO: "The disk reports an error; look at the kernel log.",
}


def disk_error(exc: OSError, what: str) -> ModelP2PError:
    """The error for `exc`, met while `what` ("cannot open 'a/b'"): `NoSpaceError`, `NotFoundError` or `StoreError`."""
    code = exc.errno or 0
    message = f"{what}: {exc.strerror or exc}"
    if code in NO_SPACE:
        return NoSpaceError(message, hint="Free some space, or set MODELP2P_HOME to a larger disk.", errno=code)
    if code == errno.ENOENT:
        return NotFoundError(message, errno=code)
    return StoreError(message, hint=_HINTS.get(code, ""), errno=code)


@contextmanager
def on_disk(what: str) -> Iterator[None]:
    """Translates every `OSError` of its block by `disk_error`."""
    try:
        yield
    except OSError as exc:
        raise disk_error(exc, what) from exc


def engine_disk_error(path: str, message: str, *, no_space: bool) -> ModelP2PError:
    """What an engine's word that it could not use a file means for the fetch under way."""
    if no_space:
        return NoSpaceError(
            f"the disk is full: '{path}' could not be written",
            hint="What is proven is kept. Free some space and run the same command again.",
            path=path,
        )
    return StoreError(f"the engine could not use '{path}': {message}", hint="What is proven is kept.", path=path)
