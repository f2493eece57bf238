"""Daemons and engines that end, in order or not: what was proven stays, is not hashed again and not fetched again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING

import pytest

from tests.endtoend.site import MIB, Site, bytes_read, fetched, model, size_of
from tests.nodes import Node, tree_bytes, wait_until

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair

pytestmark = pytest.mark.swarm


def begin_fetch(node: Node, link: str, seed: str, name: str) -> Popen[bytes]:
    """A fetch at 2 MiB/s in a process of its own, once some of it is proven."""
    client = node.spawn("fetch", link, "--peer", seed, "--max-down", "2Mi", "--timeout", "20", "--json")

    def proven() -> int:
        return max((row["proven"] for row in node.ok("ls")["releases"] if row["name"] == name), default=0)

    wait_until(lambda: proven() >= MIB, 20, "something is proven")
    return client


def end(client: Popen[bytes]) -> tuple[int, str]:
    out, err = client.communicate(timeout=60)
    return client.returncode, (out + err).decode()


def test_nothing_is_read_again_at_a_restart(site: Site) -> None:
    files = model("restart", 48 * MIB)
    seed, node = site.node("seed"), site.node("node")
    published = seed.publish(site.write(files), "lab/restart")
    result = fetched(node, published, seed)
    empty = site.node("empty")
    assert empty.process is not None
    for old in (seed, node):
        old.stop()
        old.start()
        assert old.process is not None
        # The kernel's count first: asking for the status takes some reading itself.
        read, alone = bytes_read(old.process.pid), bytes_read(empty.process.pid)
        assert read - alone < size_of(files) // 8, (read, alone)
        assert old.ok("status")["node"]["bytes_hashed"] == 0
        assert old.release("lab/restart")["state"] == "seeding"
    assert fetched(node, published, seed)["from_peers"] == 0
    # Both serve, each alone, and still without hashing.
    seed.stop()
    again = fetched(empty, published, node)
    assert tree_bytes(Path(again["path"])) == tree_bytes(Path(result["path"])) == files
    assert node.ok("status")["node"]["bytes_hashed"] == 0


def test_sigterm_ends_a_daemon_that_fetches_and_the_rest_is_fetched_later(pair: Pair) -> None:
    files = model("sigterm", 6 * MIB)
    seed, node = pair.seed, pair.node
    published = seed.publish(pair.site.write(files), "lab/sigterm")
    client = begin_fetch(node, published["link"], seed.address, "lab/sigterm")
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(10) == 0
    code, said = end(client)
    assert code in (7, 8), said
    node.start()
    row = node.release("lab/sigterm")
    assert row["state"] == "paused"
    assert MIB <= row["proven"] < size_of(files)
    result = fetched(node, published, seed)
    # Never a proven piece again; a piece that had reached the disk and not yet the journal need not come again either.
    assert 0 < result["from_peers"] <= size_of(files) - row["proven"]
    assert tree_bytes(Path(result["path"])) == files


def test_kill_9_loses_nothing_that_was_proven(pair: Pair) -> None:
    files = model("kill", 6 * MIB)
    seed, node = pair.seed, pair.node
    published = seed.publish(pair.site.write(files), "lab/kill")
    client = begin_fetch(node, published["link"], seed.address, "lab/kill")
    assert node.process is not None
    node.kill()
    code, said = end(client)
    assert code == 8, said
    node.start()
    row = node.release("lab/kill")
    assert MIB <= row["proven"] < size_of(files)
    result = fetched(node, published, seed)
    # Never a proven piece again; a piece that had reached the disk and not yet the journal need not come again either.
    assert 0 < result["from_peers"] <= size_of(files) - row["proven"]
    assert tree_bytes(Path(result["path"])) == files


def test_a_killed_engine_comes_back_and_the_fetch_goes_on(pair: Pair) -> None:
    files = model("engine", 6 * MIB)
    seed, node = pair.seed, pair.node
    published = seed.publish(pair.site.write(files), "lab/engine")
    client = begin_fetch(node, published["link"], seed.address, "lab/engine")
    os.kill(node.ok("status")["node"]["engine_pid"], signal.SIGKILL)
    code, said = end(client)
    assert code == 0, said
    status = node.ok("status")["node"]
    assert status["engine_restarts"] == 1
    assert tree_bytes(Path(node.ok("show", "lab/engine")["path"])) == files
    # The seed's engine too: it serves again by itself, on the port that peers know.
    port = seed.port
    os.kill(seed.ok("status")["node"]["engine_pid"], signal.SIGKILL)
    wait_until(lambda: is_back(seed), 20, "a new engine")
    assert seed.port == port
    third = pair.site.node("third")
    assert tree_bytes(Path(fetched(third, published, seed)["path"])) == files


def is_back(node: Node) -> bool:
    """Whether a second engine of this daemon runs."""
    status = node.ok("status")["node"]
    return bool(status["engine_restarts"] == 1 and status["engine_pid"])


def test_ctrl_c_pauses_a_fetch(pair: Pair) -> None:
    files = model("ctrl-c", 6 * MIB)
    seed, node = pair.seed, pair.node
    published = seed.publish(pair.site.write(files), "lab/ctrl-c")
    client = begin_fetch(node, published["link"], seed.address, "lab/ctrl-c")
    client.send_signal(signal.SIGINT)
    code, said = end(client)
    assert code == 7, said
    wait_until(lambda: node.release("lab/ctrl-c")["state"] == "paused", 10, "paused")
    proven = node.release("lab/ctrl-c")["proven"]
    result = fetched(node, published, seed)
    assert 0 < result["from_peers"] <= size_of(files) - proven
    assert tree_bytes(Path(result["path"])) == files
