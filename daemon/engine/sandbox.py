"""What the engine process may touch on this machine, enforced by the kernel (Landlock) before its session exists.

Invariants:
- after `enter`, this process and its children can write only below `writable` and read only there, below `readable` and
  in the few system files that name resolution and TLS need; keys, journal and trust are neither;
- a restriction is never lifted: Landlock has no way back;
- where the kernel has no Landlock, `enter` says so (0) and changes nothing but `no_new_privs`.

Network rules of Landlock are not used: a BitTorrent engine has to connect anywhere. Python modules are not readable
afterwards either, so everything is imported before.

Spec: https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable

# Linux gives new system calls one number on every architecture (include/uapi/asm-generic/unistd.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1 << 0
_RULE_PATH_BENEATH = 1
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_TRUNCATE = 1 << 14
# The bits each ABI added; all that the running kernel knows are handled, so all that is not granted is refused.
_ACCESS_OF_ABI = {1: (1 << 13) - 1, 2: 1 << 13, 3: _TRUNCATE, 5: 1 << 15}
_READ = _READ_FILE | _READ_DIR
# No symlinks, sockets or devices, and no moves between folders: an engine needs none.
_WRITE = _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _TRUNCATE
_FILE_ONLY = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE

SYSTEM_READABLE = (
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/ca-certificates",
    "/usr/share/zoneinfo",
    "/lib",
    "/lib64",
    "/etc/ssl",
    "/etc/pki",
    "/etc/ca-certificates",
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/urandom",
    "/proc/self",
    "/proc/sys/net",
)
"""Name resolution (nss), certificates and time zones; what is missing on a machine is left out."""


class _RulesetAttribute(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64),)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"  # what packing means here; Python 3.13 and later ask for it
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def enter(writable: Iterable[str], readable: Iterable[str]) -> int:
    """Locks this process in and says which Landlock ABI does it; 0 where the kernel has none.

    Folders that do not exist are left out: they stay out of reach.

    Raises:
        OSError: the kernel has Landlock and refused; the process must not go on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    abi = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION))
    if abi < 1:
        return 0
    handled = sum(bits for since, bits in _ACCESS_OF_ABI.items() if since <= abi)
    attribute = _RulesetAttribute(handled)
    ruleset = _checked(
        libc.syscall(_CREATE_RULESET, ctypes.byref(attribute), ctypes.c_size_t(ctypes.sizeof(attribute)), ctypes.c_uint32(0)),
        "landlock_create_ruleset",
    )
    try:
        for path in writable:
            _allow(libc, ruleset, path, _WRITE & handled)
        for path in (*readable, *SYSTEM_READABLE):
            _allow(libc, ruleset, path, _READ & handled)
        _checked(libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "landlock_restrict_self")
    finally:
        os.close(ruleset)
    return int(abi)


def die_with(parent_pid: int) -> None:
    """Asks the kernel to end this process (SIGTERM) with the thread that started it.

    Only a second line: the closed control socket is the first. Raises `SystemExit` where the parent is gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0), "PR_SET_PDEATHSIG")
    if os.getppid() != parent_pid:
        sys.exit("the daemon ended before its engine began")


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, access: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(f"/proc/self/fd/{folder}"):
            access &= _FILE_ONLY
        rule = _PathBeneath(access, folder)
        what = f"landlock_add_rule for {path}"
        _checked(libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), ctypes.c_uint32(0)), what)
    finally:
        os.close(folder)


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
