"""Loading while the fetch is still running: tensors as they are proven, in the order asked, and a typed error at a bad end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from modelp2p.daemon.client import Client
from modelp2p.loader import load, open_release, stream
from modelp2p.protocol import layout
from modelp2p.protocol.errors import (
    DaemonError,
    InterruptedFetchError,
    ModelP2PError,
    NotFoundError,
    UnknownPublisherError,
)
from tests.endtoend.site import MIB, Site, model, some_bytes
from tests.loader.models import same
from tests.nodes import Node, tree_bytes, wait_until

if TYPE_CHECKING:
    import torch

    from tests.endtoend.conftest import Pair

pytestmark = pytest.mark.swarm

LAYERS, LAYER_BYTES = 20, 2 * MIB
# What is requested already comes first, whatever is asked later: about three seconds of traffic.
SLOWLY = ("--max-down", "2Mi")


def layered(seed: str) -> dict[str, bytes]:
    """One shard of twenty tensors of 2 MiB each, an index and a card."""
    header: dict[str, Any] = {
        f"layer.{n}": {"dtype": "I32", "shape": [LAYER_BYTES // 4], "data_offsets": [n * LAYER_BYTES, (n + 1) * LAYER_BYTES]}
        for n in range(LAYERS)
    }
    text = json.dumps(header).encode().ljust(1024)
    shard = len(text).to_bytes(8, "little") + text + some_bytes(seed, LAYERS * LAYER_BYTES)
    index = {"metadata": {}, "weight_map": {name: "model.safetensors" for name in header}}
    return {
        "model.safetensors": shard,
        "model.safetensors.index.json": json.dumps(index).encode(),
        "README.md": f"# {seed}\n".encode(),
    }


def begin(site: Site, seed: Node, node: Node, name: str, *more: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
    """A detached slow fetch of a layered model: what was published, its tensors, its size."""
    files = layered(name)
    source = site.write(files)
    published = seed.publish(source, name)
    said = node.ok("fetch", published["link"], "--peer", seed.address, "--timeout", "20", "--detach", *SLOWLY, *more)
    assert said["state"] == "queued"
    return published, load_file(source / "model.safetensors"), sum(map(len, files.values()))


def test_tensors_come_while_the_fetch_is_running(pair: Pair) -> None:
    published, expected, size = begin(pair.site, pair.seed, pair.node, "lab/stream")
    seen: list[int] = []
    tensors = {}
    for name, tensor in stream(published["link"], home=pair.node.home, timeout=60):
        seen.append(pair.node.release("lab/stream")["proven"])
        tensors[name] = tensor
        if len(tensors) > LAYERS // 3:
            pair.node.hurry("lab/stream")
    assert list(tensors) == [f"layer.{n}" for n in range(LAYERS)]
    assert all(same(tensors[name], tensor) for name, tensor in expected.items())
    # By the daemon's own count, not by time: not everything was here when the first one was. What was under way when the order
    # was told, up to 16 MiB, comes before it, and a busy machine is seconds late.
    assert seen[0] < size * 3 // 4, seen
    assert seen[LAYERS // 3] < size, seen
    wait_until(lambda: pair.node.release("lab/stream")["state"] == "seeding", 20)
    tree = Path(pair.node.ok("show", "lab/stream")["path"])
    assert tree_bytes(tree).keys() == layered("lab/stream").keys()
    # What is complete is loaded from the disk, without any daemon.
    again = load(published["link"], home=pair.node.home)
    assert all(same(again[name], tensor) for name, tensor in expected.items())


def test_what_is_asked_for_is_fetched_first(pair: Pair) -> None:
    published, expected, size = begin(pair.site, pair.seed, pair.node, "lab/order")
    with open_release(published["link"], home=pair.node.home, timeout=60) as release:
        assert same(release.tensor("layer.19"), expected["layer.19"])
        at = pair.node.release("lab/order")["proven"]
        assert at < size * 3 // 4, at
        assert release.stats.verified_bytes > 0
        pair.node.hurry("lab/order")
        rest = release.load(["layer.0", "layer.7"])
        assert all(same(rest[name], expected[name]) for name in rest)
    pair.node.ok("rm", "lab/order", "-y")


def test_a_name_is_streamed_if_its_publisher_is_trusted(pair: Pair) -> None:
    published, expected, _ = begin(pair.site, pair.seed, pair.node, "lab/named")
    home = pair.node.home
    with pytest.raises(UnknownPublisherError):
        load("lab/named", home=home)
    other = "mp1" + "a" * 52
    with pytest.raises(NotFoundError):
        load("lab/named", home=home, publisher=other)
    tensors = load("lab/named", home=home, publisher=published["publisher"], include="layer.1", timeout=60)
    assert same(tensors["layer.1"], expected["layer.1"])
    # Trust the loader's own way: the pins on the disk decide, whatever the daemon says.
    pair.node.ok("trust", "add", published["link"], "--name", "lab/named")
    tensors = load(f"lab/named@{published['revision'][:12]}", home=home, include="layer.2", timeout=60)
    assert same(tensors["layer.2"], expected["layer.2"])
    (home / layout.TRUST / "book").rename(home / layout.TRUST / "book.kept")
    with pytest.raises(UnknownPublisherError):
        load("lab/named", home=home)
    (home / layout.TRUST / "book.kept").rename(home / layout.TRUST / "book")
    pair.node.ok("rm", "lab/named", "-y")
    with pytest.raises(NotFoundError):
        load("lab/named", home=home)


def test_what_is_not_selected_is_not_waited_for(pair: Pair) -> None:
    published, _, _ = begin(pair.site, pair.seed, pair.node, "lab/some", "--include", "*.json", "--include", "README.md")
    with pytest.raises(NotFoundError) as caught:
        load(published["link"], home=pair.node.home, timeout=60)
    assert "modelp2p fetch" in caught.value.hint
    wait_until(lambda: pair.node.release("lab/some")["state"] in ("partial", "seeding"), 20)


def test_an_abandoned_stream_gives_everything_back(pair: Pair) -> None:
    published, expected, _ = begin(pair.site, pair.seed, pair.node, "lab/left")
    tensors = stream(published["link"], home=pair.node.home, timeout=60)
    name, tensor = next(tensors)
    assert same(tensor, expected[name])
    tensors.close()  # type: ignore[attr-defined]  # a generator, whatever it is called
    # Every stream has gone with its connection: the node takes as many as ever.
    for _ in range(3):
        with open_release(published["link"], home=pair.node.home, timeout=60) as release:
            assert release.keys()
    pair.node.ok("rm", "lab/left", "-y")


def test_removal_ends_a_stream_with_words(pair: Pair) -> None:
    published, _, _ = begin(pair.site, pair.seed, pair.node, "lab/removed")
    tensors = stream(published["link"], home=pair.node.home, timeout=60)
    next(tensors)
    pair.node.ok("rm", "lab/removed", "-y")
    with pytest.raises((NotFoundError, InterruptedFetchError)):
        list(tensors)


def test_a_daemon_that_is_killed_ends_a_stream_and_the_next_one_goes_on(site: Site) -> None:
    seed, node = site.node("seed"), site.node("node")
    published, expected, size = begin(site, seed, node, "lab/killed")
    tensors = stream(published["link"], home=node.home, timeout=60)
    name, tensor = next(tensors)
    assert same(tensor, expected[name])
    node.kill()
    with pytest.raises(DaemonError):
        list(tensors)
    # Without a daemon there is nobody to follow.
    with pytest.raises(NotFoundError):
        load(published["link"], home=node.home)
    node.start()
    assert node.release("lab/killed")["proven"] < size
    node.hurry("lab/killed")
    tensors = stream(published["link"], home=node.home, timeout=60)
    assert all(same(tensor, expected[name]) for name, tensor in tensors)


def test_a_release_that_nobody_fetches_is_not_found_as_ever(pair: Pair) -> None:
    published = pair.seed.publish(pair.site.write(model("never", MIB)), "lab/never")
    for ref in (published["link"], "lab/never"):
        with pytest.raises(NotFoundError) as caught:
            load(ref, home=pair.node.home)
        assert "modelp2p fetch" in caught.value.hint


def test_a_fetch_that_is_stopped_ends_its_streams(pair: Pair) -> None:
    published = pair.seed.publish(pair.site.write(layered("lab/stopped")), "lab/stopped")
    client = pair.node.spawn("fetch", published["link"], "--peer", pair.seed.address, *SLOWLY)
    tensors = None
    try:
        wait_until(lambda: _is_fetching(pair.node, "lab/stopped"), 20)
        tensors = stream(published["link"], home=pair.node.home, timeout=60)
        next(tensors)
    finally:
        client.terminate()
        client.communicate(timeout=30)
    with pytest.raises(ModelP2PError) as caught:
        list(tensors)
    assert isinstance(caught.value, InterruptedFetchError), caught.value
    assert caught.value.hint


def _is_fetching(node: Node, name: str) -> bool:
    with Client.connect(str(node.home)) as client:
        rows = client.call("status", {}).result["releases"]
    assert isinstance(rows, list)
    return any(isinstance(row, dict) and row["name"] == name and row["state"] == "fetching" for row in rows)
