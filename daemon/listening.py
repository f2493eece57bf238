"""A listening Unix socket in a folder where nobody else can put one, and who is at the other end of a connection.

Invariants:
- a socket for its owner has mode 0600 before it is bound, in a 0700 folder: there is no moment in which others may connect;
- a socket for everybody is opened to them after it is bound, in a folder that only its owner (or root) can write;
- a socket for everybody takes no descriptors: closing one that a stranger prepared (a lingering connection, a file of a dead
  server) can block this process for as long as the stranger likes, and not reading it closes it too. Only the kernel can keep
  them out, so one that cannot has no public socket.

Spec: unix(7), socket(7)
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import trio

from modelp2p.daemon.diskerror import on_disk
from modelp2p.daemon.gate import ROOT_UID, Peer
from modelp2p.protocol.errors import DaemonError, StoreError

_BACKLOG = 64
# asm-generic/socket.h; Python has no name for it. Linux 6.16; accepted sockets inherit it, from the moment of `connect`.
_SO_PASSRIGHTS = 83
_OWNER_ONLY = 0o600
# asm-generic/socket.h; Python has no name for it. Linux 4.13.
_SO_PEERGROUPS = 59
_GROUPS_BYTES = 1024
"""What Python's `getsockopt` takes at most: 256 groups."""


def bind(path: Path, mode: int) -> trio.socket.SocketType:
    """A socket listening at `path`; a stale file of a killed daemon is replaced.

    Raises:
        StoreError: others could replace a socket in this folder.
        DaemonError: it cannot be bound there, or another daemon answers there.
    """
    is_public = mode != _OWNER_ONLY
    if is_public:
        _check_public_folder(path.parent)
    else:
        _check_private_folder(path.parent)
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before bind: the file then appears with this mode, whatever the umask; chmod afterwards leaves a gap.
        os.fchmod(listener.fileno(), _OWNER_ONLY)
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # Through /proc the address fits its 107 bytes, however deep the home lies.
            address = f"/proc/self/fd/{folder}/{path.name}"
            if path.is_socket():
                # In the owner's folder the home's lock says that nobody serves it; a service's folder has no lock.
                if is_public and _answers(address):
                    raise DaemonError(f"another daemon serves {path}", hint="Each service needs a runtime folder of its own.")
                path.unlink()
            listener._sock.bind(address)  # type: ignore[attr-defined]  # trio's bind resolves names
            if is_public:
                # The umask is taken off the mode at bind. To open further than that, afterwards is the safe moment.
                os.chmod(path.name, mode, dir_fd=folder)
        finally:
            os.close(folder)
        if is_public:
            _keep_descriptors_out(listener)
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        raise DaemonError(f"cannot listen on {path}: {exc.strerror}") from exc
    except DaemonError:
        listener.close()
        raise
    return listener


def _keep_descriptors_out(listener: trio.socket.SocketType) -> None:
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as exc:
        raise DaemonError(
            "this kernel cannot keep other users from sending descriptors, by which any of them could stop the daemon",
            hint="Run Linux 6.16 or later, or set public = false below [control].",
        ) from exc


def peer_of(connection: trio.socket.SocketType) -> Peer:
    """Who connected, by SO_PEERCRED and SO_PEERGROUPS: the credentials at the time of `connect`."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, gid = struct.unpack("iII", raw)
    try:
        found = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError:
        # More groups than fit, or a kernel that does not tell: the primary one alone never grants more than there is.
        found = b""
    return Peer(uid, frozenset((gid, *struct.unpack(f"{len(found) // 4}I", found))))


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(address)
        except BlockingIOError:
            return True  # its backlog is full
        except OSError:
            return False
        return True


def _check_private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        raise StoreError(
            f"{folder} must be a folder of yours with mode 0700: others could replace the control socket",
            hint=f"chmod 700 {folder}",
        )


def _check_public_folder(folder: Path) -> None:
    with on_disk(f"cannot check {folder}"):
        stat = folder.lstat()
    if folder.is_symlink() or stat.st_uid not in (os.getuid(), ROOT_UID) or stat.st_mode & 0o022:
        raise StoreError(
            f"{folder} must be a folder that only you can write: others could replace the public socket",
            hint=f"chmod 755 {folder}",
        )
