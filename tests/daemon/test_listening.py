from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio

from modelp2p.daemon.listening import bind, peer_of
from modelp2p.protocol.errors import DaemonError, NotFoundError, StoreError

OWN, PUBLIC = 0o600, 0o666


def folder(tmp_path: Path, mode: int) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    made.chmod(mode)
    return made


@pytest.mark.parametrize(("mode", "folder_mode"), [(OWN, 0o700), (PUBLIC, 0o755)], ids=["own", "public"])
async def test_a_socket_has_its_mode_whatever_the_umask(tmp_path: Path, mode: int, folder_mode: int) -> None:
    path = folder(tmp_path, folder_mode) / "x.sock"
    before = os.umask(0o077)
    try:
        with bind(path, mode):
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("mode", "folder_mode"),
    [(OWN, 0o750), (OWN, 0o755), (PUBLIC, 0o775), (PUBLIC, 0o757), (PUBLIC, 0o1777)],
    ids=lambda value: f"{value:o}",
)
async def test_a_folder_in_which_others_could_replace_it_is_refused(tmp_path: Path, mode: int, folder_mode: int) -> None:
    with pytest.raises(StoreError):
        bind(folder(tmp_path, folder_mode) / "x.sock", mode)


async def test_the_kernel_keeps_descriptors_from_a_public_socket(tmp_path: Path) -> None:
    path = folder(tmp_path, 0o755) / "x.sock"
    with bind(path, PUBLIC), socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(path))
        with pytest.raises(PermissionError):
            socket.send_fds(stranger, [b"x"], [stranger.fileno()])


async def test_a_public_socket_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        bind(tmp_path / "nowhere" / "x.sock", PUBLIC)


async def test_a_stale_socket_is_replaced_and_a_served_one_is_not(tmp_path: Path) -> None:
    path = folder(tmp_path, 0o755) / "x.sock"
    with bind(path, PUBLIC), pytest.raises(DaemonError, match="another daemon"):
        bind(path, PUBLIC)
    with bind(path, PUBLIC):
        pass


async def test_a_peer_is_known_by_user_and_all_its_groups() -> None:
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        peer = peer_of(ours)
    assert peer.uid == os.geteuid()
    assert peer.groups == {os.getegid(), *os.getgroups()}
