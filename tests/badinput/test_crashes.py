"""Processes that die at the worst moment: what was proven is kept, never claimed without being there, never fetched twice."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from modelp2p.protocol import layout
from modelp2p.protocol.journal import HEADER_BYTES, MAGIC
from tests.badinput.cases import (
    MIB,
    SMALL_STORE,
    Case,
    Sampler,
    Witness,
    children_of,
    left_in,
    model,
    refused,
    refused_once,
    run,
    wait_gone,
)
from tests.badinput.test_interrupts import ONE_WORKER, hashing_stopped, write_source
from tests.nodes import Node, wait_until

KILLS = 8
RATE = 6 * MIB
"""Slow enough that a transfer of a few MiB can be hit in the middle."""


def pid_of(node: Node, what: str) -> int:
    """A child of the daemon by what its command line says."""
    assert node.process is not None
    found = [pid for pid, command in children_of(node.process.pid).items() if what in command]
    assert found, children_of(node.process.pid)
    return found[0]


@pytest.mark.swarm
def test_a_daemon_killed_again_and_again_fetches_no_proven_piece_twice(tmp_path: Path) -> None:
    case = Case.of(model(80, 7, 4))
    random = Random(80)
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    bundle = case.trusted_by(node, tmp_path)
    kept: list[tuple[int, set[int]]] = []
    with Witness(case, tmp_path / "seed", max_up=RATE) as seed, Sampler(node.home, case.files):
        for _ in range(KILLS):
            client = node.spawn("fetch", bundle, "--peer", seed.address, "--timeout", "20", "--json")
            # A random number of blocks further on, whatever the machine is doing.
            sent = len(seed.uploads()) + random.randrange(1, 60)
            while len(seed.uploads()) < sent and client.poll() is None:
                time.sleep(0.005)
            for pid, command in children_of(client.pid).items():
                assert "--on-demand" in command
                os.kill(pid, signal.SIGKILL)
            _, said = client.communicate(timeout=20)
            assert client.returncode in (0, 8), said
            kept.append((len(seed.uploads()), set(case.check_journal(node).ints())))
            wait_gone(node.home)
        assert node.ok("fetch", bundle, "--peer", seed.address, "--timeout", "20")["state"] == "complete"
        sent_blocks = seed.uploads()
    case.check_whole(node)
    case.check_journal(node)
    for before, after in itertools.pairwise(kept):
        assert before[1] <= after[1], "a proven piece was forgotten"
    for count, proven in kept:
        again = {piece for piece, _ in sent_blocks[count:]} & proven
        assert not again, f"proven and asked for again: {sorted(again)}"


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[Case, Node, Witness, subprocess.Popen[bytes]]]:
    """A fetch in the middle: some pieces are proven, some are still to come."""
    case = Case.of(model(85, 6, 2))
    with (
        Witness(case, tmp_path / "seed", max_up=RATE) as seed,
        Node(tmp_path / "node", sections=ONE_WORKER).start() as node,
        Sampler(node.home, case.files),
    ):
        bundle = case.trusted_by(node, tmp_path)
        client = node.spawn("fetch", bundle, "--peer", seed.address, "--timeout", "30", "--json")
        wait_until(lambda: case.journal(node).proven, 20, "a piece is proven")
        assert client.poll() is None
        yield case, node, seed, client
        if client.poll() is None:
            client.kill()
        client.communicate()


Fetching = tuple[Case, Node, Witness, "subprocess.Popen[bytes]"]


def check_ends_well(fetching: Fetching) -> None:
    case, node, _, client = fetching
    out, err = client.communicate(timeout=40)
    assert client.returncode == 0, f"{out!r}\n{err!r}\n{node.log}"
    case.check_whole(node)
    case.check_journal(node)


@pytest.mark.swarm
def test_an_engine_killed_under_way_is_replaced(slow: Fetching) -> None:
    case, node, seed, _ = slow
    proven = set(case.journal(node).proven.ints())
    sent = len(seed.uploads())
    os.kill(pid_of(node, "modelp2p.daemon.engine"), signal.SIGKILL)
    check_ends_well(slow)
    assert node.ok("status")["node"]["pid"]
    assert not {piece for piece, _ in seed.uploads()[sent:]} & proven


@pytest.mark.swarm
def test_a_hash_worker_killed_under_way_is_replaced(slow: Fetching) -> None:
    _, node, _, _ = slow
    os.kill(pid_of(node, "hasher"), signal.SIGKILL)
    check_ends_well(slow)


@pytest.mark.swarm
def test_an_engine_that_stands_still_holds_up_only_its_transfer(slow: Fetching) -> None:
    _, node, _, _ = slow
    engine = pid_of(node, "modelp2p.daemon.engine")
    os.kill(engine, signal.SIGSTOP)
    try:
        for _ in range(3):
            assert run(node, "status", "--json", timeout_s=2).code == 0
    finally:
        os.kill(engine, signal.SIGCONT)
    check_ends_well(slow)


def torn(data: bytes) -> bytes:
    return data[:-3]


def zero_tail(data: bytes) -> bytes:
    return data + bytes(4096)


def flipped(data: bytes) -> bytes:
    at = HEADER_BYTES + 12
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def header_only(data: bytes) -> bytes:
    return data[:HEADER_BYTES]


def half_a_header(data: bytes) -> bytes:
    return data[: HEADER_BYTES // 2]


def empty(data: bytes) -> bytes:
    return b""


DAMAGE = (torn, zero_tail, flipped, header_only, half_a_header, empty)


@pytest.mark.swarm
@pytest.mark.parametrize("when", ["in the middle", "when complete"])
def test_a_damaged_journal_is_proven_again(when: str, tmp_path: Path) -> None:
    case = Case.of(model(87, 2, 1))
    with Witness(case, tmp_path / "seed") as seed, Node(tmp_path / "node", sections=SMALL_STORE).start() as node:
        bundle = case.trusted_by(node, tmp_path)
        fetch = ("fetch", bundle, "--peer", seed.address, "--timeout", "20", "--json")
        journal = node.home / layout.journal_of(case.info_hash)
        for damage in DAMAGE if when == "when complete" else (torn, flipped, header_only):
            if when == "in the middle":
                assert run(node, *fetch, "--include", "model-1*").code == 0
            else:
                assert run(node, *fetch).code == 0
            journal.write_bytes(damage(journal.read_bytes()))
            with Sampler(node.home, case.files):
                done = run(node, *fetch)
            assert done.code == 0, f"{damage.__name__}: {done}\n{node.log[-2000:]}"
            case.check_whole(node)
            case.check_journal(node)
            if when == "in the middle":
                assert run(node, "rm", "lab/model", "-y").code == 0


@pytest.mark.swarm
def test_a_journal_of_another_kind_is_refused_and_kept(tmp_path: Path) -> None:
    case = Case.of(model(88, 1))
    with Witness(case, tmp_path / "seed") as seed, Node(tmp_path / "node", sections=SMALL_STORE).start() as node:
        bundle = case.trusted_by(node, tmp_path)
        fetch = ("fetch", bundle, "--peer", seed.address, "--timeout", "20")
        journal = node.home / layout.journal_of(case.info_hash)
        newer = MAGIC + (2).to_bytes(4, "big") + case.info_hash
        other = MAGIC + (1).to_bytes(4, "big") + bytes(32)
        for data in (newer, other, b"something else entirely, of some length" * 3):
            journal.write_bytes(data)
            refused(node, *fetch, code=1, kind="OTHER")
            assert journal.read_bytes() == data
        assert seed.uploaded == 0
        journal.unlink()
        assert run(node, *fetch).code == 0
    # A node that finds such a journal at its start serves everything else.
    journal.write_bytes(newer)
    with node.start():
        assert node.ok("status")["node"]["pid"]
        refused(node, *fetch[:2], code=1, kind="OTHER")


@pytest.mark.swarm
def test_a_daemon_killed_while_publishing_leaves_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path / "node", sections=ONE_WORKER)
    source = write_source(tmp_path / "source", model(89, 2))
    with node.start():
        node.publish(write_source(tmp_path / "own", model(79, 1)), "own/model")
        before = left_in(node.home)
        data = node.home / layout.DATA
        with hashing_stopped(node):
            client = node.spawn("publish", str(source), "--as", "lab/model", "--json")
            wait_until(lambda: any("publish" in path.name and any(path.iterdir()) for path in data.iterdir()), 15, "taken in")
            node.kill()
            client.communicate(timeout=20)
            assert client.returncode == 8
        node.start()
        assert left_in(node.home) == before
        assert (source / "model-0.safetensors").read_bytes() == model(89, 2)["model-0.safetensors"]
        assert node.ok("publish", str(source), "--as", "lab/model")["files"] == 2


@pytest.mark.swarm
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_disk_that_refuses_is_a_typed_error_and_can_be_overcome(what: str, tmp_path: Path) -> None:
    case = Case.of(model(86, 2))
    with Witness(case, tmp_path / "seed") as seed, Node(tmp_path / "node", sections=SMALL_STORE).start() as node:
        bundle = case.trusted_by(node, tmp_path)
        refused_once(node, "fetch", bundle, "--timeout", "1", code=5, kind="TIMED_OUT")
        stuck = case.data(node) / "model-0.safetensors"
        target = stuck if what == "file" else stuck.parent
        if what == "folder":
            stuck.unlink()
        made = subprocess.run(["chattr", "+i", str(target)], capture_output=True, text=True, check=False)
        assert made.returncode == 0, f"this test has to make a file immutable, and may not: {made.stderr}"
        try:
            refused_once(node, "fetch", bundle, "--peer", seed.address, "--timeout", "10", code=1, kind="OTHER")
            assert not (case.tree(node) / stuck.name).exists()
            assert not case.journal(node).complete
        finally:
            subprocess.run(["chattr", "-i", str(target)], check=True)
        assert run(node, "fetch", bundle, "--peer", seed.address, "--timeout", "20").code == 0
    case.check_whole(node)
