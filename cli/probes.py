"""What `doctor` looks at on this machine: each function answers one question about the disk, the kernel or a port.

Invariants:
- nothing is changed and no trace is left: what has to be written to be known goes into files without a name;
- a function may hang with the disk it looks at; who calls it has a deadline (`doctor.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import http.client
import mmap
import os
import pwd
import resource
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

from modelp2p.cli.diagnosis import Filesystem
from modelp2p.protocol.layout import DATA, JOURNAL, LOCK, MANIFESTS, RUN, STORE, TRUST

CONNECT_S = 1.0
"""A port of this machine answers within a millisecond, or never."""
SAMPLE_BYTES = 256 * 1024 * 1024
SAMPLE_S = 1.0
_STEP_BYTES = 8 * 1024 * 1024
# linux/fs.h: FICLONE is _IOW(0x94, 9, int), the same on x86-64 and arm64.
_FICLONE = 0x40049409
# asm-generic/socket.h; Python has no name for it. Linux 6.16.
_SO_PASSRIGHTS = 83
# asm-generic/unistd.h: one number on every architecture.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_VERSION = 444, 1 << 0
_NO_ROUTE_HERE = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETUNREACH})
_MOUNT_ESCAPES = {r"\040": " ", r"\011": "\t", r"\012": "\n", r"\134": "\\"}


class Sample(NamedTuple):
    """How fast a file was read; `is_direct` past the page cache."""

    read_bytes: int
    seconds: float
    is_direct: bool


def existing(path: str) -> str:
    """The folder itself where it is there, else the nearest one above it; links resolved."""
    found = os.path.realpath(path)
    while not os.path.isdir(found):
        found = os.path.dirname(found)
    return found


def unwritable(home: str) -> list[str]:
    """The folders of a home that this user cannot write; where there is no home yet, the one it would be made in."""
    if not os.path.isdir(home):
        above = existing(home)
        return [] if _may_write(above) else [above]
    folders = [home, *(os.path.join(home, name) for name in (DATA, STORE, MANIFESTS, JOURNAL, TRUST, RUN))]
    return [folder for folder in folders if os.path.isdir(folder) and not _may_write(folder)]


def other_owner(home: str) -> str:
    """The name of the user whose home it is; empty where it is this user's, or is not there."""
    try:
        uid = os.stat(home).st_uid
    except FileNotFoundError:
        return ""
    if uid == os.geteuid():
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def filesystem_of(folder: str) -> Filesystem:
    """What the file system of an existing folder is, and what works there."""
    from modelp2p.daemon.lock import is_network_filesystem

    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return Filesystem(_kind_of(folder), is_network_filesystem(fd), _reflinks(folder), _locks(folder))
    finally:
        os.close(fd)


def is_beside(folder: str, other: str) -> bool:
    """Whether hard links can lead from one existing folder to the other."""
    return os.stat(folder).st_dev == os.stat(other).st_dev


def last_change(home: str) -> int:
    """When something was last made or removed in a home, as Unix time; 0 where there is none."""
    times = [0]
    for name in ("", DATA, STORE, MANIFESTS, JOURNAL, RUN):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            times.append(int(os.stat(os.path.join(home, name)).st_mtime))
    return max(times)


def lock_holder(home: str) -> int:
    """Pid of the process of this machine that holds the lock of a home; 0 where none does."""
    try:
        lock = os.stat(os.path.join(home, LOCK))
        with open("/proc/locks", encoding="ascii") as file:
            # 1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF; one that waits has "->" behind the number.
            rows = [line.split() for line in file]
    except OSError:
        return 0
    # Files of other file systems have the same number, and the kernel does not always call the device what `stat` calls it.
    likely = (int(row[4]) for row in rows if row[1] == "FLOCK" and row[5].rpartition(":")[2] == str(lock.st_ino))
    return next((pid for pid in likely if _has_open(pid, lock)), 0)


def tcp_refusal(address: str) -> str:
    """Why a connection to a listen address of this machine fails; empty where it is accepted."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    # What listens everywhere also listens on loopback.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except TimeoutError:
        return f"no answer in {CONNECT_S:g} s"
    except OSError as exc:
        # An address that this machine does not have any more.
        return "not an address of this machine now" if exc.errno in _NO_ROUTE_HERE else exc.strerror or str(exc)
    return ""


def http_refusal(port: int) -> str:
    """Why no HTTP server answers on a port of loopback; empty where one does."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CONNECT_S)
    try:
        connection.request("HEAD", "/")
        connection.getresponse()
    except TimeoutError:
        return f"no answer in {CONNECT_S:g} s"
    except http.client.HTTPException as exc:
        return f"not HTTP ({type(exc).__name__})"
    except OSError as exc:
        return exc.strerror or str(exc)
    finally:
        connection.close()
    return ""


def udp_ports() -> frozenset[int] | None:
    """The UDP ports that are bound on this machine; None where the kernel does not tell."""
    found: set[int] = set()
    for table in ("/proc/net/udp", "/proc/net/udp6"):
        try:
            with open(table, encoding="ascii") as file:
                # sl local_address rem_address ...: the port is hexadecimal, behind the colon.
                found.update(int(line.split()[1].rpartition(":")[2], 16) for line in list(file)[1:])
        except FileNotFoundError:
            continue  # without IPv6
        except OSError:
            return None
    return frozenset(found)


def descriptor_limit(pid: int) -> int:
    """How many descriptors a process may have; for pid 0 how many a daemon could give itself that this one starts."""
    if not pid:
        return _hard_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    # A daemon of another user does not let itself be asked; the file of its limits does.
    with open(f"/proc/{pid}/limits", encoding="ascii") as file:
        row = next(line for line in file if line.startswith("Max open files"))
    soft = row.removeprefix("Max open files").split()[0]
    return _hard_limit(resource.RLIM_INFINITY if soft == "unlimited" else int(soft))


def landlock_abi() -> int:
    """The Landlock version of this kernel; 0 where it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION))
    return max(0, int(abi))


def can_open_public_socket() -> bool:
    """Whether this kernel can keep descriptors out of a socket (Linux 6.16)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        except OSError:
            return False
    return True


def read_sample(path: str) -> Sample:
    """Read the beginning of a file, for `SAMPLE_S` at most, past the page cache where the file system can."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        is_direct = True
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        fd, is_direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    # Anonymous memory begins at a page, as O_DIRECT wants it.
    with os.fdopen(fd, "rb", buffering=0), mmap.mmap(-1, _STEP_BYTES) as buffer:
        done, start = 0, time.perf_counter()
        while done < SAMPLE_BYTES and time.perf_counter() - start < SAMPLE_S:
            count = os.preadv(fd, [buffer], done)
            done += count
            if count < _STEP_BYTES:
                break
        return Sample(done, time.perf_counter() - start, is_direct)


def _has_open(pid: int, file: os.stat_result) -> bool:
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(FileNotFoundError, PermissionError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(os.path.join(folder, name)), file):
                    return True
    return False


def _may_write(folder: str) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _hard_limit(limit: int) -> int:
    # "Unlimited" descriptors end where the kernel's own limit for one process does.
    if limit != resource.RLIM_INFINITY:
        return limit
    with open("/proc/sys/fs/nr_open", encoding="ascii") as file:
        return int(file.read())


def _kind_of(folder: str) -> str:
    """The type of a file system, as the kernel calls it: of the longest mount point above the folder, the last one there."""
    found = ("", "an unknown file system")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            head, _, tail = line.partition(" - ")
            point = head.split()[4]
            for escape, character in _MOUNT_ESCAPES.items():
                point = point.replace(escape, character)
            if os.path.commonpath([point, folder]) == point and len(point) >= len(found[0]):
                found = (point, tail.split()[0])
    return found[1]


def _reflinks(folder: str) -> bool | None:
    with _nameless(folder) as source, _nameless(folder) as copy:
        if source is None or copy is None:
            return None
        try:
            os.write(source, bytes(mmap.PAGESIZE))
            fcntl.ioctl(copy, _FICLONE, source)
        except OSError as exc:
            return None if exc.errno in (errno.ENOSPC, errno.EDQUOT) else False
        return True


def _locks(folder: str) -> bool | None:
    with _nameless(folder) as fd:
        if fd is None:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


@contextlib.contextmanager
def _nameless(folder: str) -> Iterator[int | None]:
    """A new file that is gone with its descriptor; None where this user or the file system cannot make one."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)
