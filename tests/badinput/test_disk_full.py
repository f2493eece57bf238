"""A disk that is full: nothing is asked of anyone, or the fetch stops, says so, and goes on when there is room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.badinput.cases import MIB, Case, Sampler, Witness, model, refused, refused_once, run
from tests.nodes import Node

FILES = model(30, 12, 8)
DISK = "8M"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB. These tests need root: a disk that is only said to be full proves nothing."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0755", "none", str(place)], capture_output=True, text=True, check=False
    )
    assert mounted.returncode == 0, f"this test has to mount a tmpfs, and may not: {mounted.stderr}"
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64M", str(disk)], check=True)


@pytest.mark.swarm
def test_a_release_that_does_not_fit_is_refused_before_a_byte_is_asked_for(disk: Path, tmp_path: Path) -> None:
    case = Case.of(FILES)
    node = Node(disk, sections={"store": {"reserve": 0}})
    bundle = case.trusted_by(node, tmp_path)
    with Witness(case, tmp_path / "seed") as seed:
        answer = refused(node, "fetch", bundle, "--peer", seed.address, "--timeout", "5", code=9, kind="NO_SPACE")
        assert answer.facts["needed"] > answer.facts["free"]
        assert not case.tree(node).exists()
        free = os.statvfs(disk)
        assert free.f_bavail * free.f_frsize > 7 << 20, "a refused reservation holds space"
        assert seed.uploaded == 0
        grow(disk)
        assert node.ok("fetch", bundle, "--peer", seed.address, "--timeout", "20")["state"] == "complete"
    case.check_whole(node)


@pytest.mark.swarm
def test_the_reserve_is_left_alone(tmp_path: Path) -> None:
    case = Case.of(model(31, 1))
    node = Node(tmp_path / "node", sections={"store": {"reserve": "1000T"}})
    bundle = case.trusted_by(node, tmp_path)
    refused_once(node, "fetch", bundle, "--timeout", "5", code=9, kind="NO_SPACE")


@pytest.mark.swarm
def test_a_disk_that_fills_up_under_way_is_never_called_complete(disk: Path, tmp_path: Path) -> None:
    case = Case.of(FILES)
    node = Node(disk, sections={"store": {"reserve": 0, "reservation": False}})
    bundle = case.trusted_by(node, tmp_path)
    with Witness(case, tmp_path / "seed") as seed:
        with Sampler(node.home, case.files):
            for _ in range(2):
                refused_once(node, "fetch", bundle, "--peer", seed.address, "--timeout", "20", code=9, kind="NO_SPACE")
                state = case.journal(node)
                assert not state.complete
                case.check_journal(node)
            kept = state.proven
            grow(disk)
            before = len(seed.uploads())
            done = node.ok("fetch", bundle, "--peer", seed.address, "--timeout", "20")
        assert done["state"] == "complete"
        again = {piece for piece, _ in seed.uploads()[before:]}
        assert not again & set(kept.ints()), "a proven piece was fetched again"
    case.check_whole(node)
    case.check_journal(node)


@pytest.mark.swarm
def test_damage_on_a_full_disk_is_out_of_sight_and_costs_only_the_bad_piece(disk: Path, tmp_path: Path) -> None:
    case = Case.of(model(33, 5))
    node = Node(disk, sections={"store": {"reserve": 0}})
    bundle = case.trusted_by(node, tmp_path)
    name = "model-0.safetensors"
    with Witness(case, tmp_path / "seed") as seed:
        node.ok("fetch", bundle, "--peer", seed.address, "--timeout", "20")
        damaged = case.tree(node) / name
        damaged.chmod(0o644)
        with damaged.open("r+b") as file:
            file.seek(2 * MIB + 5)
            file.write(b"rot")
        damaged.chmod(0o444)
        found = run(node, "verify", "lab/model", "--json")
        assert found.code == 4
        assert found.json["bad"] == [{"path": name, "piece": 2}]
        assert not damaged.exists(), "an unproven file is visible"
        before = len(seed.uploads())
        # There is still no room for a second copy.
        assert node.ok("fetch", bundle, "--peer", seed.address, "--timeout", "20")["state"] == "complete"
        first = case.release.pieces.first(name)
        assert {piece for piece, _ in seed.uploads()[before:]} == {first + 2}
    case.check_whole(node)
    case.check_journal(node)
