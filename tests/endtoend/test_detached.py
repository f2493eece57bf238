"""Detached fetches: the daemon that accepted one goes on with it, and so does the next, without a client."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modelp2p.protocol import layout
from modelp2p.protocol.job import decode_job
from tests.endtoend.site import MIB, Site, model, size_of
from tests.nodes import Node, tree_bytes, wait_until

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair

pytestmark = pytest.mark.swarm


def job_files(node: Node) -> list[Path]:
    return sorted((node.home / layout.JOBS).iterdir())


def detach(node: Node, published: dict[str, Any], seed: Node, *more: str) -> dict[str, Any]:
    return node.ok("fetch", published["link"], "--peer", seed.address, "--timeout", "20", "--detach", *more)


def begin(node: Node, published: dict[str, Any], seed: Node) -> int:
    """A detached fetch at 2 MiB/s, once some of it is proven; returns how many bytes."""
    seen = [0]

    def proven() -> int:
        seen.append(node.release(published["name"])["proven"])
        return seen[-1]

    assert detach(node, published, seed, "--max-down", "2Mi")["state"] == "queued"
    wait_until(lambda: proven() >= MIB, 20, "something is proven")
    return seen[-1]


def wait_done(node: Node, name: str) -> None:
    wait_until(lambda: node.release(name)["state"] == "seeding" and not job_files(node), 30, "the fetch is done")


def from_peers(log: str, name: str) -> int:
    """Bytes that the one fetch of this release in a log got from peers."""
    (found,) = re.findall(rf"{name}@\w+: \d+ bytes proven, (\d+) from peers", log)
    return int(found)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_detached_fetch_goes_on_after_a_restart(pair: Pair, how: str) -> None:
    name = f"lab/{how}"
    files = model(name, 6 * MIB)
    seed, node = pair.seed, pair.node
    published = seed.publish(pair.site.write(files), name)
    proven = begin(node, published, seed)
    (kept,) = job_files(node)
    assert kept.stat().st_mode & 0o777 == 0o600
    assert decode_job(kept.read_bytes()).info_hash.hex() == published["info_hash"]
    if how == "killed":
        node.kill()
    else:
        assert node.stop() == 0
    assert job_files(node) == [kept]
    before = len(node.log)
    # A release that is not being fetched would be `paused`: nobody but the daemon itself takes it up.
    node.start()
    row = node.release(name)
    assert row["state"] in ("queued", "fetching"), row
    assert proven <= row["proven"] < size_of(files)
    wait_done(node, name)
    # What had been shown as proven was in the journal, and is not fetched again.
    assert 0 < from_peers(node.log[before:], name) <= size_of(files) - proven
    assert tree_bytes(Path(node.ok("show", name)["path"])) == files


def test_rm_ends_a_detached_fetch_and_forgets_it(pair: Pair) -> None:
    seed, node = pair.seed, pair.node
    published = seed.publish(pair.site.write(model("gone", 12 * MIB)), "lab/gone")
    begin(node, published, seed)
    assert job_files(node)
    node.ok("rm", "lab/gone", "-y", timeout_s=5)
    assert not job_files(node)
    node.stop()
    node.start()
    assert not [row for row in node.ok("ls")["releases"] if row["name"] == "lab/gone"]


def test_the_same_request_twice_is_one_job(pair: Pair) -> None:
    seed, node = pair.seed, pair.node
    published = seed.publish(pair.site.write(model("twice", 6 * MIB)), "lab/twice")
    for _ in range(2):
        assert detach(node, published, seed, "--max-down", "2Mi")["state"] == "queued"
    assert len(job_files(node)) == 1
    detach(node, published, seed, "--include", "*.json")
    assert len(job_files(node)) == 2
    node.ok("rm", "lab/twice", "-y")
    assert not job_files(node)


def test_what_cannot_be_done_is_refused_before_it_is_accepted(pair: Pair) -> None:
    seed, node = pair.seed, pair.node
    published = seed.publish(pair.site.write(model("refused", MIB)), "lab/refused")
    done = node.run("fetch", published["link"], "--peer", seed.address, "--detach", "--include", "no such file")
    assert done.code == 2, done.err
    assert not job_files(node)


def test_no_space_pauses_a_detached_fetch_over_restarts(site: Site) -> None:
    files = model("space", 2 * MIB)
    seed, node = site.node("seed"), site.node("node", start=False)
    node.sections = {"store": {"reserve": "1000T"}}
    node.write_config()
    node.start()
    published = seed.publish(site.write(files), "lab/space")
    detach(node, published, seed)
    for _ in range(2):
        wait_until(lambda: node.release("lab/space")["state"] == "paused", 10, "no space")
        assert "no space" in node.run("status").out
        # `gc` finds nothing that it may take away.
        assert node.ok("gc")["removed"] == []
        node.kill()
        node.start()
    node.stop()
    node.sections = {"store": {"reserve": 0}}
    node.write_config()
    node.start()
    wait_done(node, "lab/space")
    assert tree_bytes(Path(node.ok("show", "lab/space")["path"])) == files
    # Done is done: there is nothing to take up.
    node.stop()
    node.start()
    assert node.release("lab/space")["state"] == "seeding"


def test_the_next_daemon_goes_on_where_an_on_demand_daemon_was_killed(site: Site) -> None:
    files = model("demand", 6 * MIB)
    seed, node = site.node("seed"), site.node("node", start=False)
    published = seed.publish(site.write(files), "lab/demand")
    # No daemon runs: this one stays for the job, without a client. It holds the client's stderr, so nobody reads that to its end.
    client = node.spawn("fetch", published["link"], "--peer", seed.address, "--detach", "--max-down", "2Mi")
    assert client.wait(30) == 0
    assert node.ok("status")["releases"][0]["state"] in ("queued", "fetching")
    os.kill(node.ok("status")["node"]["pid"], signal.SIGKILL)
    wait_until(lambda: node.run("status").code == 8, 10, "the daemon is gone")
    client.communicate(timeout=10)
    assert job_files(node)
    # One that comes for a single command has other things to do.
    assert node.ok("ls")["releases"][0]["state"] == "paused"
    assert job_files(node)
    node.start()
    wait_done(node, "lab/demand")
    assert tree_bytes(Path(node.ok("show", "lab/demand")["path"])) == files
