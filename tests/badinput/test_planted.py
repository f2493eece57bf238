"""Links planted where the engine will write: refused, and the file they point at keeps every byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.badinput.cases import SMALL_STORE, Case, Witness, model, refused, refused_once
from tests.nodes import Node

NAME = "model-0.safetensors"
VICTIM = b"precious\n" * 1000


def symlink(data: Path, victim: Path) -> None:
    data.mkdir(mode=0o700, exist_ok=True)
    (data / NAME).unlink(missing_ok=True)
    (data / NAME).symlink_to(victim)


def hard_link(data: Path, victim: Path) -> None:
    data.mkdir(mode=0o700, exist_ok=True)
    (data / NAME).unlink(missing_ok=True)
    os.link(victim, data / NAME)


def folder(data: Path, victim: Path) -> None:
    """The whole staging folder is a symlink to where the victim lies."""
    if data.exists():
        data.rename(data.with_name(f"aside-{data.name}"))
    data.symlink_to(victim.parent, target_is_directory=True)


def fifo(data: Path, victim: Path) -> None:
    data.mkdir(mode=0o700, exist_ok=True)
    (data / NAME).unlink(missing_ok=True)
    os.mkfifo(data / NAME)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One running node for all of these tests; each brings a release of its own."""
    with Node(tmp_path_factory.mktemp("n") / "node", sections=SMALL_STORE).start() as running:
        yield running


PLANTS = (symlink, hard_link, folder, fifo)


@pytest.mark.swarm
@pytest.mark.parametrize("plant", PLANTS)
def test_a_link_planted_before_the_fetch_is_refused(node: Node, plant: Callable[[Path, Path], None], tmp_path: Path) -> None:
    case = Case.of(model(40 + 2 * PLANTS.index(plant), 2, 1), name=f"lab/{plant.__name__}-before")
    victim = tmp_path / "elsewhere" / NAME
    victim.parent.mkdir()
    victim.write_bytes(VICTIM)
    before = victim.stat()
    with Witness(case, tmp_path / "seed") as seed:
        bundle = case.trusted_by(node, tmp_path)
        plant(case.data(node), victim)
        refused(node, "fetch", bundle, "--peer", seed.address, "--timeout", "10", code=1, kind="OTHER")
        assert seed.uploaded == 0
    after = victim.stat()
    assert victim.read_bytes() == VICTIM
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert set(victim.parent.iterdir()) == {victim}


@pytest.mark.swarm
@pytest.mark.parametrize("plant", PLANTS)
def test_a_link_planted_between_two_runs_is_refused(node: Node, plant: Callable[[Path, Path], None], tmp_path: Path) -> None:
    case = Case.of(model(50 + 2 * PLANTS.index(plant), 2, 1), name=f"lab/{plant.__name__}-between")
    victim = tmp_path / "elsewhere" / NAME
    victim.parent.mkdir()
    victim.write_bytes(case.files[NAME][:-1] + b"?")
    victim_bytes = victim.read_bytes()
    with Witness(case, tmp_path / "seed") as seed:
        bundle = case.trusted_by(node, tmp_path)
        refused_once(node, "fetch", bundle, "--timeout", "1", code=5, kind="TIMED_OUT")
        plant(case.data(node), victim)
        refused(node, "fetch", bundle, "--peer", seed.address, "--timeout", "10", code=1, kind="OTHER")
        assert not (case.tree(node) / NAME).exists()
    assert victim.read_bytes() == victim_bytes


@pytest.mark.swarm
def test_a_link_where_the_visible_file_goes_is_replaced_and_never_followed(node: Node, tmp_path: Path) -> None:
    case = Case.of(model(60, 2, 1), name="lab/visible")
    victim = tmp_path / "victim"
    victim.write_bytes(VICTIM)
    with Witness(case, tmp_path / "seed") as seed:
        bundle = case.trusted_by(node, tmp_path)
        case.tree(node).mkdir(parents=True)
        (case.tree(node) / NAME).symlink_to(victim)
        node.ok("fetch", bundle, "--peer", seed.address, "--timeout", "10")
        case.check_whole(node)
    assert victim.read_bytes() == VICTIM
