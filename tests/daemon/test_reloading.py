"""SIGHUP: what a running node takes over of a changed configuration, and what a broken one does to it."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from modelp2p.daemon.config import KEYS, MAX_CONFIG_BYTES, Config, parse_config
from modelp2p.daemon.hashing import HashPool
from modelp2p.daemon.library import Library
from modelp2p.daemon.memory_swarm import MemoryNetwork, MemorySwarm
from modelp2p.daemon.node import Node
from modelp2p.daemon.notify import Notifier
from modelp2p.daemon.reloading import change, reload, reload_on_signal
from modelp2p.daemon.store import Store
from tests.memory_node import SEED, world_of
from tests.releases import statement_of

FILES = {"a.txt": b"text"}
PATIENCE_S = 10

TAKEN = {
    "network.max_up": "1M",
    "network.max_down": "2M",
    "network.connections": 20,
    "network.peers": ["10.0.0.1:5"],
    "network.peers_file": "/etc/peers",
    "store.reserve": "3G",
    "policy.allow_code": True,
    "fetch.timeout_s": 7,
    "gateway.unknown": "fetch",
    "gateway.origin": "https://hub.example.org",
    "log.level": "warning",
}
LEFT = {
    "network.profile": "lan",
    "network.listen": ["127.0.0.1:0"],
    "network.dht": False,
    "network.trackers": False,
    "hashing.workers": 3,
    "control.public": True,
    "control.allow_users": ["alice"],
    "gateway.enabled": False,
    "gateway.port": 1234,
}


@pytest.mark.parametrize(("key", "value"), TAKEN.items(), ids=TAKEN)
def test_a_value_that_is_looked_up_at_each_use_is_taken_over(key: str, value: object) -> None:
    wanted = Config().replace({key: value})
    assert change(Config(), wanted) == (wanted, (key,), ())


@pytest.mark.parametrize(("key", "value"), LEFT.items(), ids=LEFT)
def test_a_value_that_was_used_up_at_start_is_left_and_named(key: str, value: object) -> None:
    assert change(Config(), Config().replace({key: value})) == (Config(), (), (key,))


def test_the_two_kinds_do_not_keep_each_other_from_being_judged() -> None:
    wanted = Config().replace(TAKEN | LEFT)
    decided = change(Config(), wanted)
    assert decided.config == Config().replace(TAKEN)
    assert (set(decided.taken), set(decided.left)) == (set(TAKEN), set(LEFT))
    assert list(decided.taken) == [key for key in KEYS if key in TAKEN]


@pytest.mark.slow
async def test_limits_peers_and_policies_hold_for_the_running_node(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "peers").write_text("10.0.0.2:6 # new\n")
    wanted = Config().replace(TAKEN | {"network.peers_file": str(tmp_path / "peers"), "network.profile": "lan"})
    async with world_of(tmp_path, statement_of(FILES), FILES) as world:
        node = world.node
        await reload(node, lambda: wanted)
        assert node.config == wanted.replace({"network.profile": "wan"})
        assert world.swarm.limits[None] == (1_000_000, 2_000_000)
        assert world.swarm.connections == 20
        assert [str(peer) for peer in node.peers] == ["10.0.0.1:5", "10.0.0.2:6"]
        # Of the content and of its statement alike; the one it had before it keeps.
        for info_hash in (world.release.info_hash, world.release.manifest_hash):
            known = world.swarm._torrents[info_hash].peers
            assert {("10.0.0.1", 5), ("10.0.0.2", 6), (SEED.host, SEED.port)} == known
        assert logging.getLogger().level == logging.WARNING
    left = [record for record in caplog.records if "before the daemon starts again" in record.message]
    assert [record.message.rpartition(": ")[2] for record in left] == ["network.profile"]


async def test_what_the_files_did_not_change_is_not_set_anew(tmp_path: Path) -> None:
    limited = Config().replace({"network.max_up": "1M"})
    with node_of(tmp_path) as (node, swarm):
        await reload(node, lambda: limited)
        # Given over the control socket meanwhile.
        await swarm.set_limits(None, 5, 6)
        await reload(node, lambda: limited.replace({"fetch.timeout_s": 9}))
        assert swarm.limits == {None: (5, 6)}
        assert node.config.fetch.timeout_s == 9


@contextmanager
def node_of(folder: Path) -> Iterator[tuple[Node, MemorySwarm]]:
    """A node that does nothing; neither its swarm nor its hash workers are started."""
    store, swarm = Store.open(folder / "home"), MemoryNetwork().join()
    try:
        yield Node(store, Library(store), swarm, HashPool(workers=1), Config(), [SEED]), swarm
    finally:
        store.close()


def _unreadable() -> Config:
    raise PermissionError(13, "Permission denied", "/etc/modelp2p/config.toml")


def _directory() -> Config:
    raise IsADirectoryError(21, "Is a directory", 7)


def _peers_fifo(path: Path) -> Callable[[], Config]:
    os.mkfifo(path)
    return _peers_file(path, None)


def _peers_file(path: Path, content: bytes | None) -> Callable[[], Config]:
    if content is not None:
        path.write_bytes(content)
    return lambda: Config().replace({"network.peers_file": str(path), "network.max_up": "1M"})


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (
            lambda path: lambda: parse_config("[network]\nmax_upp = 1\nmax_down = 5"),
            "network.max_upp. Did you mean network.max_up?",
        ),
        (lambda path: lambda: parse_config("[network]\nmax_down = 5\nconnections = 1"), "network.connections must be"),
        (lambda path: lambda: parse_config("[network"), "is not TOML"),
        (lambda path: _unreadable, "/etc/modelp2p/config.toml: Permission denied"),
        (lambda path: _directory, "one of its files: Is a directory"),
        (lambda path: _peers_file(path, None), "cannot read the peers file"),
        (lambda path: _peers_file(path, b"10.0.0.1"), "peers file, line 1"),
        (lambda path: _peers_file(path, b"\xff\xfe"), "not UTF-8 text"),
        (lambda path: _peers_file(path, b"#" * (MAX_CONFIG_BYTES + 1)), f"larger than {MAX_CONFIG_BYTES} bytes"),
        (_peers_fifo, "not a file"),
    ],
    ids=[
        *("unknown key", "wrong value", "no TOML", "unreadable", "a folder", "no peers file", "a peer without port"),
        *("peers in UTF-16", "too many peers", "a FIFO of peers"),
    ],
)
async def test_a_broken_configuration_changes_nothing_and_is_one_line(
    broken: Callable[[Path], Callable[[], Config]], named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with node_of(tmp_path) as (node, swarm):
        with trio.fail_after(PATIENCE_S):
            await reload(node, broken(tmp_path / "peers"))
        assert (node.config, node.peers, swarm.limits) == (Config(), (SEED,), {})
    said = [record for record in caplog.records if record.name == "modelp2p.daemon.reloading"]
    assert [record.levelname for record in said] == ["ERROR"]
    assert named in said[0].message


@pytest.mark.slow
async def test_each_signal_is_a_reload_that_the_service_manager_hears_of(tmp_path: Path) -> None:
    configs = iter([Config().replace({"fetch.timeout_s": 1}), Config().replace({"fetch.timeout_s": 2})])
    with node_of(tmp_path) as (node, _), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        told = trio.socket.from_stdlib_socket(manager)
        async with trio.open_nursery() as nursery:
            ready, notifier = trio.Event(), Notifier(str(tmp_path / "notify"))
            await nursery.start(reload_on_signal, node, lambda: next(configs), notifier, ready, lambda: None)
            os.kill(os.getpid(), signal.SIGHUP)
            # Before READY there is nothing to reload, and READY must not be said by a reload.
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert node.config == Config()
            ready.set()
            for timeout_s in (1, 2):
                with trio.fail_after(PATIENCE_S):
                    first, second = await told.recv(1000), await told.recv(1000)
                assert first.startswith(b"RELOADING=1\nMONOTONIC_USEC=")
                assert int(first.rpartition(b"=")[2]) > 0
                assert second == b"READY=1"
                assert node.config.fetch.timeout_s == timeout_s
                if timeout_s == 1:
                    os.kill(os.getpid(), signal.SIGHUP)
            nursery.cancel_scope.cancel()
