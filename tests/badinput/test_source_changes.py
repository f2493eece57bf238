"""A source that is edited while it is served: serving stops, the owner is told, and no fetcher ever gets a wrong byte."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.badinput.cases import MIB, SMALL_STORE, Case, Sampler, Witness, model, refused_once, run
from tests.nodes import Node, wait_until

FILES = model(50, 3, 1)
NAME = "model-0.safetensors"
NOTICED_S = 8


def edit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(MIB + 17)
        file.write(b"not what was signed")


def truncate(path: Path) -> None:
    os.truncate(path, 2 * MIB)


@pytest.mark.swarm
@pytest.mark.parametrize("change", [edit, truncate])
def test_a_source_changed_in_place_is_not_served_any_more(change: Callable[[Path], None], tmp_path: Path) -> None:
    case = Case.of(FILES)
    source = tmp_path / "source"
    source.mkdir()
    for path, data in FILES.items():
        (source / path).write_bytes(data)
    with (
        Node(tmp_path / "owner", sections=SMALL_STORE).start() as owner,
        Node(tmp_path / "node", sections=SMALL_STORE).start() as node,
    ):
        link = owner.publish(source, "lab/model")["link"]
        assert os.path.samefile(source / NAME, case.data(owner) / NAME), "this test needs a source on the disk of the home"
        change(source / NAME)
        changed = (source / NAME).read_bytes()
        with Sampler(node.home, FILES):
            refused_once(node, "fetch", link, "--peer", owner.address, "--timeout", "2", code=5, kind="TIMED_OUT")
        case.check_journal(node)
        wait_until(lambda: owner.release("lab/model")["state"] == "error", NOTICED_S, "the owner is told")
        row = owner.release("lab/model")
        assert "changed" in run(owner, "status").out + str(row)
        verified = run(owner, "verify", "lab/model", "--json")
        assert verified.code == 4
        assert {item["path"] for item in verified.json["bad"]} == {NAME}
        assert (source / NAME).read_bytes() == changed, "a user's file was touched"
        with Witness(case, tmp_path / "seed") as seed, Sampler(node.home, FILES):
            assert run(node, "fetch", link, "--peer", seed.address, "--timeout", "20").code == 0
    case.check_whole(node)
