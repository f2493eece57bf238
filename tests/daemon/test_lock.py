"""One daemon per home."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modelp2p.daemon.lock import HomeLock, LockInfo, is_network_filesystem, read_lock, this_daemon
from modelp2p.protocol.errors import DaemonError, StoreError

HERE = LockInfo(host="here", pid=11, boot_id="boot-1", socket="/run/here.sock")
THERE = LockInfo(host="there", pid=22, boot_id="boot-2", socket="/run/there.sock")


def test_a_second_daemon_is_told_who_is_first(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with HomeLock.acquire(path, HERE):
        assert read_lock(path) == HERE
        with pytest.raises(DaemonError, match="pid 11 on host here") as caught:
            HomeLock.acquire(path, THERE)
        assert caught.value.facts == {"host": "here", "pid": 11}
        assert caught.value.kind.exit_code == 8
        assert read_lock(path) == HERE
    assert read_lock(path) is None
    HomeLock.acquire(path, THERE).release()


def test_the_lock_of_a_killed_daemon_is_free_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys,signal\n"
        "from modelp2p.daemon.lock import HomeLock, this_daemon\n"
        "import os\n"
        "lock = HomeLock.acquire(sys.argv[1], this_daemon('/s', pid=os.getpid(), host='here'))\n"
        "print('held', flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(DaemonError, match=f"pid {child.pid} on host here"):
            HomeLock.acquire(path, HERE)
        child.send_signal(signal.SIGKILL)
    left = read_lock(path)
    assert left is not None
    assert left.pid == child.pid
    with HomeLock.acquire(path, HERE):
        assert read_lock(path) == HERE


def leave_body(path: Path, info: LockInfo) -> None:
    """What a daemon leaves that was killed: its body, and no lock."""
    with HomeLock.acquire(path, info):
        body = path.read_bytes()
    path.write_bytes(body)


@pytest.mark.parametrize(
    ("left", "is_network", "is_refused"),
    [
        pytest.param(THERE, True, True, id="another host, network file system"),
        pytest.param(THERE, False, False, id="another host, local disk: flock is the truth"),
        pytest.param(LockInfo("old-name", 5, "boot-1", "/s"), True, False, id="renamed host, same boot"),
        pytest.param(LockInfo("here", 5, "boot-0", "/s"), True, False, id="same host, after a reboot"),
    ],
)
def test_a_left_over_body_of_another_host(tmp_path: Path, left: LockInfo, is_network: bool, is_refused: bool) -> None:
    path = tmp_path / "lock"
    leave_body(path, left)
    if is_refused:
        with pytest.raises(DaemonError, match="pid 22 on host there") as caught:
            HomeLock.acquire(path, HERE, is_network=lambda _: is_network)
        assert str(path) in caught.value.hint
        path.unlink()
    with HomeLock.acquire(path, HERE, is_network=lambda _: is_network):
        assert read_lock(path) == HERE


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"host": 1}', b"\xff" * 100, b"[" * 4000])
def test_a_broken_body_names_nobody(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "lock"
    path.write_bytes(body)
    assert read_lock(path) is None
    HomeLock.acquire(path, HERE).release()


def test_a_symlink_in_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "lock"
    victim.write_bytes(b"precious")
    path.symlink_to(victim)
    with pytest.raises(StoreError):
        HomeLock.acquire(path, HERE)
    with pytest.raises(DaemonError):
        read_lock(path)
    assert victim.read_bytes() == b"precious"


def test_without_a_lock_file_nobody_holds_it(tmp_path: Path) -> None:
    assert read_lock(tmp_path / "lock") is None


def test_this_machine_is_described(tmp_path: Path) -> None:
    info = this_daemon("/s", pid=1, host="h")
    assert (info.host, info.pid, info.socket) == ("h", 1, "/s")
    assert len(info.boot_id) in (0, 36)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert is_network_filesystem(fd) in (True, False)
    finally:
        os.close(fd)
