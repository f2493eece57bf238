"""One release from one home to another: what the user types, gets and sees."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.endtoend.site import (
    FETCH_KEYS,
    MIB,
    NODE_KEYS,
    PUBLISH_KEYS,
    ROW_KEYS,
    check_uploaded,
    fetched,
    inodes,
    model,
    size_of,
    snapshot,
    some_bytes,
)
from tests.nodes import tree_bytes

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair

pytestmark = pytest.mark.swarm


def test_a_release_travels_by_its_link(pair: Pair) -> None:
    files = model("travel", 3 * MIB + 77, 2 * MIB)
    source = pair.site.write(files)
    published = pair.seed.publish(source, "lab/travel")
    assert list(published)[: len(PUBLISH_KEYS)] == PUBLISH_KEYS
    assert (published["files"], published["bytes"]) == (len(files), size_of(files))

    result = fetched(pair.node, published, pair.seed)
    assert list(result)[: len(FETCH_KEYS)] == FETCH_KEYS
    assert result["state"] == "complete"
    assert result["bytes"] == result["from_peers"] == size_of(files)
    assert result["from_web"] == 0
    for key in ("name", "revision", "info_hash", "publisher"):
        assert result[key] == published[key]
    assert tree_bytes(Path(result["path"])) == files
    check_uploaded(pair.seed, "lab/travel", size_of(files))

    # Two homes, two copies: nothing was linked across.
    seeds = pair.seed.ok("show", "lab/travel")["path"]
    assert not set(inodes(seeds).values()) & set(inodes(result["path"]).values())
    # The source was taken in without a byte being copied, and without being changed.
    assert inodes(seeds) == inodes(source)


def test_status_ls_and_show_say_what_the_contract_says(pair: Pair) -> None:
    files = model("said", 2 * MIB)
    published = pair.seed.publish(pair.site.write(files), "lab/said", "--license", "apache-2.0", "--note", "data=seeded")
    fetched(pair.node, published, pair.seed)
    status = pair.node.ok("status")
    assert list(status["node"])[: len(NODE_KEYS)] == NODE_KEYS
    assert status["node"]["profile"] == "lan"
    assert published["publisher"] in status["node"]["publisher_ids"]
    assert pair.node.process is not None
    assert status["node"]["pid"] == pair.node.process.pid
    (row,) = [item for item in status["releases"] if item["name"] == "lab/said"]
    assert list(row)[: len(ROW_KEYS)] == ROW_KEYS
    assert (row["state"], row["size"], row["proven"]) == ("seeding", size_of(files), size_of(files))

    (listed,) = [item for item in pair.node.ok("ls")["releases"] if item["name"] == "lab/said"]
    shown = pair.node.ok("show", "lab/said")
    for item in (listed, shown, row):
        assert item["revision"] == published["revision"]
        assert item["info_hash"] == published["info_hash"]
        assert item["publisher"] == published["publisher"]
        assert item["name_verified"] is False
    assert shown["link"] == published["link"]
    assert shown["manifest"] == published["manifest"]
    assert (shown["license"], shown["notes"]) == ("apache-2.0", {"data": "seeded"})
    assert {item["path"]: item["size"] for item in shown["files"]} == {path: len(data) for path, data in files.items()}


def test_publishing_the_same_again_gives_the_same_link(pair: Pair) -> None:
    source = pair.site.write(model("again", MIB))
    first, second = pair.seed.publish(source, "lab/again"), pair.seed.publish(source, "lab/again")
    assert first["link"] == second["link"]


def test_only_what_is_selected_exists_and_only_the_rest_is_fetched_later(pair: Pair) -> None:
    files = model("select", 3 * MIB, 2 * MIB)
    published = pair.seed.publish(pair.site.write(files), "lab/select")
    small = {path: data for path, data in files.items() if not path.endswith(".safetensors")}

    part = fetched(pair.node, published, pair.seed, more=("--exclude", "*.safetensors"))
    assert part["state"] == "partial"
    assert part["bytes"] == part["from_peers"] == size_of(small)
    assert tree_bytes(Path(part["path"])) == small
    assert set(inodes(pair.node.home / "data" / published["info_hash"])) == set(small)
    assert pair.node.release("lab/select")["state"] == "partial"

    first = "model-00001-of-00002.safetensors"
    part = fetched(pair.node, published, pair.seed, more=("--include", "model-00001*"))
    assert (part["state"], part["from_peers"]) == ("partial", len(files[first]))
    assert set(inodes(pair.node.home / "data" / published["info_hash"])) == {*small, first}

    whole = fetched(pair.node, published, pair.seed)
    assert (whole["state"], whole["from_peers"]) == ("complete", len(files["model-00002-of-00002.safetensors"]))
    assert tree_bytes(Path(whole["path"])) == files
    check_uploaded(pair.seed, "lab/select", size_of(files))


def test_a_pattern_that_matches_nothing_is_a_usage_error(pair: Pair) -> None:
    published = pair.seed.publish(pair.site.write(model("nothing", MIB)), "lab/nothing")
    done = pair.node.run("fetch", published["link"], "--peer", pair.seed.address, "--include", "*.gguf")
    assert done.code == 2
    assert "Hint:" in done.err


def test_a_dry_run_writes_nothing(pair: Pair) -> None:
    files = model("dry", 2 * MIB)
    published = pair.seed.publish(pair.site.write(files), "lab/dry")
    before = snapshot(pair.node.home)
    plan = fetched(pair.node, published, pair.seed, more=("--dry-run",))
    assert snapshot(pair.node.home) == before
    assert plan["bytes"] == plan["needed_bytes"] == size_of(files)
    assert {item["path"]: (item["size"], item["have"]) for item in plan["files"]} == {
        path: (len(data), 0) for path, data in files.items()
    }
    assert pair.seed.release("lab/dry")["uploaded"] == 0


def test_a_second_fetch_is_up_to_date_and_quiet_prints_only_the_path(pair: Pair) -> None:
    files = model("quiet", 2 * MIB)
    published = pair.seed.publish(pair.site.write(files), "lab/quiet")
    address = pair.seed.address
    done = pair.node.run("fetch", published["link"], "--peer", address, "-q")
    assert (done.code, done.err) == (0, "")
    path = Path(done.out.removesuffix("\n"))
    assert tree_bytes(path) == files
    again = fetched(pair.node, published, pair.seed)
    assert (again["state"], again["from_peers"], again["path"]) == ("complete", 0, str(path))
    assert "up to date" in pair.node.run("fetch", published["link"], "--peer", address).out
    check_uploaded(pair.seed, "lab/quiet", size_of(files))


def test_local_dir_holds_copies_of_the_users_own(pair: Pair) -> None:
    files = model("local", 2 * MIB)
    published = pair.seed.publish(pair.site.write(files), "lab/local")
    target = pair.site.folder / "local"
    result = fetched(pair.node, published, pair.seed, more=("--local-dir", str(target)))
    assert result["path"] == str(target)
    assert tree_bytes(target) == files
    assert not set(inodes(target).values()) & set(inodes(result["store_path"]).values())
    assert all(os.access(path, os.W_OK) and path.stat().st_mode & 0o200 for path in target.iterdir())
    # What the user does with them is no matter to the store.
    (target / "config.json").write_text("{}")
    assert pair.node.ok("verify", "lab/local")["ok"] is True


SHAPES = {
    "one file": {"weights.dat": some_bytes("one", 2 * MIB + 1)},
    "one small file": {"folder/tiny.txt": b"x"},
    "nested and empty": {"a/b/c/deep.dat": some_bytes("deep", MIB), "a/empty.txt": b"", "z.txt": some_bytes("z", 16384)},
    "names of all scripts": {"Überblick/naïve café.md": some_bytes("de", 5000), "模型/重み.dat": some_bytes("ja", MIB + 3)},
}


def test_every_shape_of_release_arrives_and_fetches_run_beside_each_other(pair: Pair) -> None:
    published = [pair.seed.publish(pair.site.write(files), f"lab/shape{n}") for n, files in enumerate(SHAPES.values())]
    with ThreadPoolExecutor(len(SHAPES)) as pool:
        results = list(pool.map(lambda release: fetched(pair.node, release, pair.seed), published))
    for files, result in zip(SHAPES.values(), results, strict=True):
        assert (result["state"], result["from_peers"]) == ("complete", size_of(files))
        assert tree_bytes(Path(result["path"])) == files
