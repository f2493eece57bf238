"""One daemon per home: a lock that dies with its holder, and says who that is.

The kernel's `flock` decides, never the pid in the file: a lock left by a killed daemon is free at once, and a reused pid
means nothing. The body of the file is for people and for clients that look for the socket.

Invariants:
- the file is never replaced or removed while homes use it: a lock on an unlinked inode excludes nobody;
- a daemon that stops in order empties the body;
- on network file systems, where `flock` may bind one host only, a body of another host is believed: it is refused.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Self

from modelp2p.daemon.diskerror import on_disk
from modelp2p.protocol.errors import DaemonError

_MAX_BODY_BYTES = 4096
_VERSION = 1
# linux/magic.h, and statfs(2) for those outside the tree: NFS, SMB2, CIFS, Ceph, FUSE (sshfs, JuiceFS), Lustre, GPFS,
# BeeGFS, 9p, AFS. A local FUSE file system in this list only costs a question after a crash on another host.
_NETWORK_FILESYSTEMS = frozenset(
    {0x6969, 0xFE534D42, 0xFF534D42, 0x00C36400, 0x65735546, 0x0BD00BD0, 0x47504653, 0x19830326, 0x01021997, 0x5346414F}
)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class LockInfo:
    """Who holds a home: `boot_id` tells two runs of one host apart, `socket` is where clients connect."""

    host: str
    pid: int
    boot_id: str
    socket: str


class HomeLock:
    """A held lock; `release` it, or leave the block."""

    def __init__(self, fd: int, info: LockInfo) -> None:
        self.info = info
        self._fd = fd

    @classmethod
    def acquire(cls, path: str | os.PathLike[str], info: LockInfo, *, is_network: Callable[[int], bool] | None = None) -> Self:
        """Takes the lock file at `path` (made 0644; its folder must exist) for the daemon `info`.

        `is_network` says of a descriptor whether its file system is shared between hosts; default: by its type.

        Raises:
            DaemonError: another daemon uses this home; `host` and `pid` are facts.
            StoreError: the file cannot be made.
        """
        with on_disk(f"cannot open the lock '{os.fspath(path)}'"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        try:
            with on_disk(f"cannot lock '{os.fspath(path)}'"):
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as exc:
                    raise _taken(_read_body(fd), "") from exc
                left = _read_body(fd)
                if _is_foreign(left, info) and (is_network or is_network_filesystem)(fd):
                    raise _taken(left, f"If that daemon is surely gone, remove {os.fspath(path)}.")
                _write_body(fd, json.dumps({"v": _VERSION, **asdict(info)}).encode())
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, info)

    def __repr__(self) -> str:
        return f"<HomeLock {'held' if self._fd >= 0 else 'released'}: pid {self.info.pid} on {self.info.host}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Empties the body and lets the lock go; releasing again does nothing."""
        if self._fd < 0:
            return
        try:
            with on_disk("cannot empty the lock"):
                os.ftruncate(self._fd, 0)
        finally:
            os.close(self._fd)
            self._fd = -1


def read_lock(path: str | os.PathLike[str]) -> LockInfo | None:
    """Who took the lock last, or None; that daemon may be gone: only connecting to its socket tells."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise DaemonError(f"cannot read the lock '{os.fspath(path)}': {exc.strerror}") from exc
    try:
        return _read_body(fd)
    finally:
        os.close(fd)


def this_daemon(socket: str, *, pid: int, host: str) -> LockInfo:
    """The lock body of the calling process; `boot_id` is the kernel's, empty where it is not readable."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot_id = file.read(64).strip()
    except OSError:
        boot_id = ""
    return LockInfo(host=host, pid=pid, boot_id=boot_id, socket=socket)


def is_network_filesystem(fd: int) -> bool:
    """Whether `flock` on this file may be blind to other hosts, judged by the type of its file system."""
    # struct statfs begins with f_type, a long on every 64-bit Linux; 256 bytes hold the rest with room.
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(ctypes.c_int(fd), buffer) != 0:
        return True
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF in _NETWORK_FILESYSTEMS


def _is_foreign(left: LockInfo | None, info: LockInfo) -> bool:
    # A container that restarts has a new host name; the same boot means the same kernel, whose flock is the truth.
    return left is not None and left.host != info.host and not (left.boot_id and left.boot_id == info.boot_id)


def _taken(holder: LockInfo | None, hint: str) -> DaemonError:
    if holder is None:
        return DaemonError("another daemon is just starting with this home", hint="Try again in a moment.")
    return DaemonError(
        f"another daemon uses this home: pid {holder.pid} on host {holder.host}",
        hint=hint or "Use that daemon, stop it, or choose another home with MODELP2P_HOME.",
        host=holder.host,
        pid=holder.pid,
    )


def _read_body(fd: int) -> LockInfo | None:
    """The body, or None where it is empty, half written or not ours."""
    try:
        body = json.loads(os.pread(fd, _MAX_BODY_BYTES, 0))
    except (OSError, ValueError, RecursionError):
        return None
    match body:
        case {"host": str(host), "pid": int(pid), "boot_id": str(boot_id), "socket": str(socket)}:
            return LockInfo(host, pid, boot_id, socket)
        case _:
            return None


def _write_body(fd: int, body: bytes) -> None:
    # In place: a rename would leave this lock on an inode that has no name.
    os.ftruncate(fd, 0)
    os.pwrite(fd, body, 0)
    os.fsync(fd)
