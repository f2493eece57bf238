"""Ctrl-C and nobody there: every phase ends at once with its own exit code, resumable, and no process stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelp2p.protocol import layout
from tests.badinput.cases import SMALL_STORE, Case, Witness, check_clean, children_of, model, refused_once, run, wait_gone
from tests.nodes import Done, Node, wait_until

ONE_WORKER = {**SMALL_STORE, "hashing": {"workers": 1}}
PHASE_S = 15


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.of(model(70, 3, 2))


@contextlib.contextmanager
def hashing_stopped(node: Node) -> Iterator[None]:
    """While the block runs, the daemon's hash worker does not: what needs a hash waits for ever."""
    assert node.process is not None
    workers = [pid for pid, command in children_of(node.process.pid).items() if "hasher" in command]
    assert len(workers) == 1, children_of(node.process.pid)
    os.kill(workers[0], signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(workers[0], signal.SIGCONT)


def interrupt(client: subprocess.Popen[bytes]) -> Done:
    """Ctrl-C to a command; it must end in seconds."""
    began = time.monotonic()
    client.send_signal(signal.SIGINT)
    out, err = client.communicate(timeout=20)
    assert time.monotonic() - began < 10
    done = Done(client.returncode, out.decode(), err.decode())
    check_clean(done.out + done.err)
    assert "Traceback" not in done.err
    return done


def check_interrupted_fetch(done: Done) -> None:
    assert done.code == 7, done
    assert done.json["error"]["kind"] == "INTERRUPTED"
    assert "resume" in done.json["error"]["hint"]


def write_source(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for path, data in files.items():
        (folder / path).write_bytes(data)
    return folder


@pytest.mark.swarm
@pytest.mark.parametrize("by", ["link", "bundle"])
def test_no_peers_is_exit_5_within_the_timeout(case: Case, by: str, tmp_path: Path) -> None:
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    ref = case.trusted_by(node, tmp_path) if by == "bundle" else case.link
    began = time.monotonic()
    # A port of loopback where nobody listens.
    refused_once(node, "fetch", ref, "--peer", "127.0.0.1:9", "--timeout", "1", code=5, kind="TIMED_OUT")
    assert time.monotonic() - began < 8
    wait_gone(node.home)


@pytest.mark.swarm
def test_a_peer_that_only_connects_does_not_stretch_the_timeout(case: Case, tmp_path: Path) -> None:
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    with Witness(case, tmp_path / "seed") as seed:  # it has the payload, and not the manifest that is asked for
        began = time.monotonic()
        refused_once(node, "fetch", case.link, "--peer", seed.address, "--timeout", "3", code=5, kind="TIMED_OUT")
        assert time.monotonic() - began < 10
        assert seed.uploaded == 0


@pytest.mark.swarm
def test_ctrl_c_while_resolving(case: Case, tmp_path: Path) -> None:
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    folder = node.home / layout.data_of(case.release.manifest_hash)
    client = node.spawn("fetch", case.link, "--timeout", "60", "--json")
    wait_until(folder.exists, PHASE_S, "the manifest is asked for")
    check_interrupted_fetch(interrupt(client))
    wait_gone(node.home)
    assert not folder.exists()


@pytest.mark.swarm
def test_ctrl_c_while_fetching_keeps_what_is_proven(case: Case, tmp_path: Path) -> None:
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    bundle = case.trusted_by(node, tmp_path)
    with Witness(case, tmp_path / "seed", max_up=4 << 20) as seed:
        client = node.spawn("fetch", bundle, "--peer", seed.address, "--json")
        wait_until(lambda: case.journal(node).proven, PHASE_S, "a piece is proven")
        check_interrupted_fetch(interrupt(client))
        wait_gone(node.home)
        kept = case.check_journal(node)
        assert kept
        sent = len(seed.uploads())
        assert node.ok("fetch", bundle, "--peer", seed.address, "--timeout", "20")["state"] == "complete"
        assert not {piece for piece, _ in seed.uploads()[sent:]} & set(kept.ints())
    case.check_whole(node)
    wait_gone(node.home)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A running node with one release of its own, whose only hash worker runs already."""
    folder = tmp_path_factory.mktemp("n")
    with Node(folder / "node", sections=ONE_WORKER).start() as node:
        node.publish(write_source(folder / "own", model(79, 1)), "own/model")
        yield node


@pytest.mark.swarm
def test_ctrl_c_while_proving(busy: Node, case: Case, tmp_path: Path) -> None:
    bundle = case.trusted_by(busy, tmp_path)
    with Witness(case, tmp_path / "seed") as seed:
        with hashing_stopped(busy):
            client = busy.spawn("fetch", bundle, "--peer", seed.address, "--json")
            wait_until(lambda: seed.uploaded >= case.size, PHASE_S, "everything is received")
            check_interrupted_fetch(interrupt(client))
            assert not any((case.tree(busy) / path).exists() for path in case.files)
        assert run(busy, "fetch", bundle, "--peer", seed.address, "--timeout", "20").code == 0
    case.check_whole(busy)
    assert run(busy, "rm", "lab/model", "-y").code == 0


@pytest.mark.swarm
def test_ctrl_c_while_publish_hashes(busy: Node, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", model(75, 2))

    def staged() -> list[Path]:
        return [path for path in (busy.home / layout.DATA).iterdir() if "publish" in path.name and any(path.iterdir())]

    with hashing_stopped(busy):
        client = busy.spawn("publish", str(source), "--as", "lab/other", "--json")
        wait_until(staged, PHASE_S, "files are taken in")
        done = interrupt(client)
        assert (done.code, done.json["error"]["kind"]) == (130, "INTERRUPTED")
        wait_until(lambda: not staged(), 5, "the staging folder is removed")
    assert {row["name"] for row in busy.ok("ls")["releases"]} == {"own/model"}
    assert (source / "model-0.safetensors").read_bytes() == model(75, 2)["model-0.safetensors"]


@pytest.mark.swarm
def test_ctrl_c_while_verifying(busy: Node) -> None:
    assert busy.process is not None
    opened = Path(f"/proc/{busy.process.pid}/fd")

    def is_reading() -> bool:
        return any(f"/{layout.STORE}/" in target for target in links_of(opened))

    with hashing_stopped(busy):
        client = busy.spawn("verify", "own/model", "--json")
        wait_until(is_reading, PHASE_S, "it reads")
        done = interrupt(client)
        assert (done.code, done.json["error"]["kind"]) == (130, "INTERRUPTED")
    # The worker held a descriptor of its own until it could go on.
    wait_until(lambda: not is_reading(), 5, "it stops reading")
    assert busy.ok("verify", "own/model")["ok"] is True


def links_of(folder: Path) -> Iterator[str]:
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(entry)


COMMANDS: dict[str, Callable[[Case, Path], tuple[str, ...]]] = {
    "ls": lambda case, folder: ("ls",),
    "show": lambda case, folder: ("show", "lab/none"),
    "gc": lambda case, folder: ("gc",),
    "trust": lambda case, folder: ("trust", "add", case.bundle(folder), "--name", "*"),
}


@pytest.mark.swarm
@pytest.mark.parametrize("verb", COMMANDS)
def test_no_daemon_stays_behind_an_on_demand_command(case: Case, verb: str, tmp_path: Path) -> None:
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    done = node.run(*COMMANDS[verb](case, tmp_path))
    assert done.code == (3 if verb == "show" else 0), done
    wait_gone(node.home, 5)
