"""Several revisions of one model, and what is on the disk when they come and go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modelp2p.loader import load
from tests.endtoend.site import MIB, Site, disk_bytes, fetched, inodes, model, size_of, snapshot, weights
from tests.nodes import tree_bytes, wait_until

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair

pytestmark = pytest.mark.swarm

SHARED, CHANGED = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SLACK = 256 << 10
"""Journals, records, statements and folders of a few releases."""


def test_a_new_revision_brings_only_what_is_new(pair: Pair) -> None:
    first = model("revisions", 3 * MIB, 2 * MIB)
    second = first | {CHANGED: weights("second", MIB + 9)}
    node, seed = pair.node, pair.seed
    old, new = (seed.publish(pair.site.write(files), "lab/revisions") for files in (first, second))
    assert old["revision"] != new["revision"]
    old_path = Path(fetched(node, old, seed)["path"])
    result = fetched(node, new, seed)
    new_path = Path(result["path"])
    assert result["from_peers"] == len(second[CHANGED])
    assert result["reused"] == size_of(first) - len(first[CHANGED])
    assert (tree_bytes(old_path), tree_bytes(new_path)) == (first, second)
    assert inodes(old_path)[SHARED] == inodes(new_path)[SHARED]

    # What goes with the first revision is exactly what the second does not share.
    before = disk_bytes(node.home)
    removed = node.ok("rm", old["link"], "--yes")
    assert removed["revision"] == old["revision"]
    assert removed["freed"] == pytest.approx(len(first[CHANGED]), abs=8192)
    assert before - disk_bytes(node.home) == pytest.approx(removed["freed"], abs=SLACK)
    assert not old_path.exists()
    assert [row["revision"] for row in node.ok("ls")["releases"] if row["name"] == "lab/revisions"] == [new["revision"]]
    assert node.ok("verify", new["link"])["ok"] is True
    assert len(load(new_path, verify="cpu", publisher=new["publisher"], home=node.home)) == 4

    # And it is served to others: the shared file from the visible tree, whose first name is gone.
    seed.ok("rm", new["link"], "--yes")
    third = pair.site.node("third")
    assert tree_bytes(Path(fetched(third, new, node)["path"])) == second


def test_rm_of_a_published_release_leaves_the_users_files(pair: Pair) -> None:
    source = pair.site.write(model("mine", MIB))
    before = snapshot(source)
    pair.seed.publish(source, "lab/mine")
    removed = pair.seed.ok("rm", "lab/mine", "--yes")
    assert removed["freed"] == 0
    assert snapshot(source) == before
    assert pair.seed.run("show", "lab/mine").code == 3


def test_gc_removes_what_nothing_refers_to_and_nothing_else(site: Site) -> None:
    seed, node = site.node("seed"), site.node("node")
    files = model("kept", MIB)
    kept = fetched(node, seed.publish(site.write(files), "lab/kept"), seed)
    orphan = node.home / "data" / ("ab" * 32)
    orphan.mkdir(mode=0o700)
    (orphan / "left.dat").write_bytes(weights("left", MIB))
    # A statement that is being fetched this very moment is no leftover.
    seed.stop()
    other = site.node("other")
    wanted = other.publish(site.write(model("wanted", MIB)), "lab/wanted")
    address = other.address
    other.stop()
    waiting = node.spawn("fetch", wanted["link"], "--peer", address, "--timeout", "30", "--json")
    wait_until(lambda: len(list((node.home / "data").iterdir())) == 3, 20, "the statement's folder")

    before = snapshot(node.home)
    planned = node.ok("gc", "--dry-run")
    assert snapshot(node.home) == before
    assert planned["removed"] == [f"data/{orphan.name}"]
    space = disk_bytes(node.home)
    collected = node.ok("gc")
    assert collected["removed"] == planned["removed"]
    assert collected["freed"] == planned["freed"] >= MIB
    assert space - disk_bytes(node.home) == pytest.approx(collected["freed"], abs=SLACK)
    assert not orphan.exists()
    assert tree_bytes(Path(kept["path"])) == files
    assert node.ok("gc")["removed"] == []
    waiting.terminate()
    waiting.communicate(timeout=20)
