"""Visible files that rot: found, named, never loaded, and repaired by fetching exactly the bad piece into a new inode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelp2p.protocol.errors import IntegrityError
from tests.badinput.cases import MIB, SMALL_STORE, Case, Witness, check_told, model, run
from tests.nodes import Node

FILES = model(60, 3, 1)
NAME = "model-0.safetensors"
BAD_PIECE = 1


@pytest.fixture
def case() -> Case:
    return Case.of(FILES)


@pytest.fixture
def seed(case: Case, tmp_path: Path) -> Iterator[Witness]:
    with Witness(case, tmp_path / "seed") as witness:
        yield witness


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("n") / "node", sections=SMALL_STORE).start() as node:
        yield node


@pytest.fixture
def node(running: Node, case: Case, seed: Witness, tmp_path: Path) -> Iterator[Node]:
    """A running node that holds the whole release, for one test."""
    bundle = case.trusted_by(running, tmp_path)
    assert run(running, "fetch", bundle, "--peer", seed.address, "--timeout", "20").code == 0
    yield running
    assert run(running, "rm", "lab/model", "-y").code == 0


def flip(path: Path, *, keep_times: bool = False) -> bytes:
    """Damage one byte of a visible file; returns its bytes from then on."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(BAD_PIECE * MIB + 4321)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    path.chmod(0o444)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path.read_bytes()


def check_repaired(node: Node, case: Case, seed: Witness, sent: int, pieces: int, old: int, damaged: bytes) -> None:
    """Only `pieces` were asked for, and whoever had the old file open keeps what it had."""
    repaired = seed.uploads()[sent:]
    assert len(repaired) * (16 << 10) == pieces * MIB
    case.check_whole(node)
    case.check_journal(node)
    after = run(node, "verify", "lab/model", "--json")
    assert (after.code, after.json["ok"], after.json["bad"]) == (0, True, [])
    assert (case.tree(node) / NAME).stat().st_ino != os.fstat(old).st_ino
    assert os.pread(old, len(damaged) + 1, 0) == damaged
    os.close(old)


@pytest.mark.swarm
@pytest.mark.parametrize("keep_times", [False, True], ids=["touched", "silent"])
def test_one_flipped_byte_is_found_and_repaired_with_one_piece(node: Node, case: Case, seed: Witness, keep_times: bool) -> None:
    visible = case.tree(node) / NAME
    damaged = flip(visible, keep_times=keep_times)
    old = os.open(visible, os.O_RDONLY)
    sent = len(seed.uploads())
    found = run(node, "verify", "lab/model", "--json")
    assert (found.code, found.json["ok"]) == (4, False)
    assert found.json["bad"] == [{"path": NAME, "piece": BAD_PIECE}]
    assert not visible.exists(), "bytes that are known to be wrong are still visible"
    again = run(node, "verify", "lab/model", "--json")
    assert (again.code, again.json["ok"]) == (4, False), "a second look calls it good"
    repaired = run(node, "verify", "lab/model", "--repair", "--peer", seed.address, "--json")
    assert (repaired.code, repaired.json["ok"]) == (0, True), repaired
    check_repaired(node, case, seed, sent, 1, old, damaged)


@pytest.mark.swarm
def test_repair_at_once_fetches_one_piece(node: Node, case: Case, seed: Witness) -> None:
    visible = case.tree(node) / NAME
    damaged = flip(visible)
    old = os.open(visible, os.O_RDONLY)
    sent = len(seed.uploads())
    repaired = run(node, "verify", "lab/model", "--repair", "--peer", seed.address, "--json")
    assert repaired.code == 0, repaired
    assert repaired.json["bad"] == [{"path": NAME, "piece": BAD_PIECE}]
    check_repaired(node, case, seed, sent, 1, old, damaged)


@pytest.mark.swarm
def test_a_truncated_file_is_found_and_only_its_tail_is_fetched(node: Node, case: Case, seed: Witness) -> None:
    visible = case.tree(node) / NAME
    visible.chmod(0o644)
    os.truncate(visible, 2 * MIB + 5)
    damaged = visible.read_bytes()
    old = os.open(visible, os.O_RDONLY)
    sent = len(seed.uploads())
    found = run(node, "verify", "lab/model", "--json")
    assert (found.code, {item["path"] for item in found.json["bad"]}) == (4, {NAME})
    repaired = run(node, "verify", "lab/model", "--repair", "--peer", seed.address, "--json")
    assert repaired.code == 0, repaired
    # Pieces 0 and 1 are rescued; the file has a fourth piece of some hundred bytes.
    lost = sum(case.release.pieces.locate(piece).length for piece in list(case.release.pieces.pieces_of(NAME))[2:])
    blocks = {block for block in seed.uploads()[sent:]}
    assert len(blocks) == -(-lost // (16 << 10))
    case.check_whole(node)
    os.close(old)
    assert len(damaged) == 2 * MIB + 5


@pytest.mark.swarm
def test_a_release_whose_name_nobody_is_trusted_for_is_repaired_too(node: Node, case: Case, seed: Witness) -> None:
    assert run(node, "trust", "remove", case.release.publisher_id, "--name", "lab/model").code == 0
    flip(case.tree(node) / NAME)
    repaired = run(node, "verify", "lab/model", "--repair", "--peer", seed.address, "--json")
    assert repaired.code == 0, repaired
    case.check_whole(node)


@pytest.mark.swarm
def test_a_deleted_file_is_named_and_fetched_again(node: Node, case: Case, seed: Witness) -> None:
    (case.tree(node) / NAME).unlink()
    found = run(node, "verify", "lab/model", "--json")
    assert (found.code, {item["path"] for item in found.json["bad"]}) == (4, {NAME})
    assert run(node, "fetch", "lab/model", "--peer", seed.address, "--timeout", "20").code == 0
    case.check_whole(node)


@pytest.mark.swarm
@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_damaged_files_are_never_loaded(node: Node, case: Case, how: str) -> None:
    loader = pytest.importorskip("modelp2p.loader")
    visible = case.tree(node) / NAME
    if how == "flip":
        flip(visible)
    else:
        visible.chmod(0o644)
        os.truncate(visible, 2 * MIB)
    # As where there is no seed to repair it from.
    with (
        pytest.raises(IntegrityError),
        loader.open_release("lab/model", "cpu", home=str(node.home), on_bad=lambda path, piece: False) as release,
    ):
        release.load()
    if how == "truncate":
        check_told(node.run("load", "lab/model"), 4)
