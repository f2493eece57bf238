"""Homes in the state that crashes, other users and other versions leave them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelp2p.protocol import layout
from tests.badinput.cases import SMALL_STORE, check_told, children_of, refused, refused_once, wait_gone
from tests.nodes import Node


@pytest.mark.swarm
def test_a_killed_daemon_leaves_nothing_that_stops_the_next(tmp_path: Path) -> None:
    with Node(tmp_path / "node", sections=SMALL_STORE).start() as node:
        assert node.process is not None
        engine = [pid for pid, command in children_of(node.process.pid).items() if "modelp2p.daemon.engine" in command]
        assert engine
        node.kill()
        socket = node.home / layout.RUN / "control.sock"
        assert socket.is_socket()
        assert (node.home / layout.LOCK).read_bytes()
        wait_gone(node.home, 5)
        refused(node, "status", code=8, kind="DAEMON_UNREACHABLE")
        node.start()
        assert node.ok("ls")["releases"] == []


@pytest.mark.swarm
def test_a_second_daemon_is_refused_and_told_who_has_the_home(tmp_path: Path) -> None:
    with Node(tmp_path / "node", sections=SMALL_STORE).start() as node:
        assert node.process is not None
        line = check_told(node.run("daemon"), 8)
        assert f"pid {node.process.pid}" in line
        assert node.ok("ls")["releases"] == []


@pytest.mark.swarm
@pytest.mark.parametrize("name", ["data", "run"])
def test_a_private_folder_open_to_others_is_refused(name: str, tmp_path: Path) -> None:
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    place = node.home / name
    place.mkdir(parents=True)
    place.chmod(0o770)
    done = node.run("daemon")
    line = check_told(done, 1)
    assert str(place) in line
    assert "chmod 700" in done.err
    refused_once(node, "ls", code=1, kind="OTHER")
    assert place.stat().st_mode & 0o777 == 0o770, "it is the owner's to decide"


@pytest.mark.swarm
def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    assert node.run("keys", "init", "lab", "--no-passphrase").code == 0
    (node.home / "keys" / "lab" / "release.key").chmod(0o644)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    answer = refused(node, "publish", str(source), "--as", "lab/model", code=10, kind="DENIED")
    assert "chmod 600" in answer.hint


@pytest.mark.swarm
@pytest.mark.parametrize("version", ["2", "999999999999", "one", "", "-1"])
def test_a_home_of_another_version_is_refused_and_not_touched(version: str, tmp_path: Path) -> None:
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    node.home.mkdir()
    (node.home / "version").write_text(version)
    check_told(node.run("daemon"), 1)
    assert (node.home / "version").read_text() == version
    assert {path.name for path in node.home.iterdir()} <= {"version", "run"}


@pytest.mark.swarm
def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    node.home.write_text("not a folder")
    assert node.run("daemon").code == 1
    assert node.home.read_text() == "not a folder"


@pytest.mark.swarm
def test_a_socket_path_taken_by_a_file_or_link_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    run = node.home / layout.RUN
    run.mkdir(parents=True, mode=0o700)
    (run / "control.sock").symlink_to(victim)
    assert node.run("daemon").code == 8
    assert victim.read_text() == "precious"
    assert os.readlink(run / "control.sock") == str(victim)
