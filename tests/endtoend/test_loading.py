"""From the swarm to tensors: what is loaded is the source's, and damage on disk is found, said and repaired."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from modelp2p.loader import load, stream
from tests.endtoend.site import LOAD_KEYS, MIB, VERIFY_KEYS, check_uploaded, fetched, flip_byte, model, size_of
from tests.loader.models import same
from tests.nodes import tree_bytes

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair

pytestmark = pytest.mark.swarm

SHARD = "model-00002-of-00002.safetensors"


def test_what_was_fetched_loads_as_the_sources_own_tensors(pair: Pair) -> None:
    files = model("load", 2 * MIB, 3 * MIB)
    source = pair.site.write(files)
    published = pair.seed.publish(source, "lab/load")
    result = fetched(pair.node, published, pair.seed)
    pair.node.ok("trust", "add", published["link"], "--name", "lab/load")
    expected = {name: tensor for shard in sorted(source.glob("*.safetensors")) for name, tensor in load_file(shard).items()}
    tensors = load("lab/load", "cpu", verify="cpu", home=pair.node.home)
    assert tensors.keys() == expected.keys()
    assert all(same(tensors[name], tensor) for name, tensor in expected.items())
    # One at a time, in the order they lie on the disk.
    streamed = list(stream(published["link"], "cpu", home=pair.node.home))
    assert [name for name, _ in streamed] == ["load0.a", "load0.b", "load1.a", "load1.b"]
    assert all(same(tensor, expected[name]) for name, tensor in streamed)

    said = pair.node.ok("load", f"lab/load@{published['revision']}", "--device", "cpu", "--verify", "cpu")
    assert list(said)[: len(LOAD_KEYS)] == LOAD_KEYS
    assert (said["tensors"], said["device"]) == (len(expected), "cpu")
    assert said["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert said["verified_bytes"] >= said["bytes"]
    # The name was given after the fetch: the path the fetch printed has moved.
    assert not Path(result["path"]).is_symlink()


def test_a_flipped_byte_is_found_and_repaired_with_one_piece(pair: Pair) -> None:
    files = model("flip", MIB, 3 * MIB)
    published = pair.seed.publish(pair.site.write(files), "lab/flip")
    path = Path(fetched(pair.node, published, pair.seed)["path"])
    good = pair.node.ok("verify", "lab/flip")
    assert list(good)[: len(VERIFY_KEYS)] == VERIFY_KEYS
    assert (good["ok"], good["bad"]) == (True, [])
    flip_byte((path / SHARD).resolve(), 2 * MIB + 99)
    # A load that meets it has the daemon fetch that piece; where nobody has it, the load is refused (tests/badinput).
    loaded = pair.node.run("load", str(path), "--publisher", published["publisher"], "--verify", "cpu", "--json")
    assert (loaded.code, loaded.json["refetches"]) == (0, 1), loaded.err
    assert tree_bytes(path) == files
    check_uploaded(pair.seed, "lab/flip", size_of(files) + MIB)

    flip_byte((path / SHARD).resolve(), 2 * MIB + 99)
    done = pair.node.run("verify", "lab/flip", "--repair", "--peer", pair.seed.address, "--json")
    assert done.code == 0, done.err
    assert done.json["bad"] == [{"path": SHARD, "piece": 2}]
    assert done.json["repaired"] == 1
    assert tree_bytes(path) == files
    check_uploaded(pair.seed, "lab/flip", size_of(files) + 2 * MIB)

    flip_byte((path / SHARD).resolve(), 5)
    done = pair.node.run("verify", "lab/flip", "--json")
    assert done.code == 4
    assert done.json["bad"] == [{"path": SHARD, "piece": 0}]
    # Damaged bytes are out of sight, and come back whole.
    assert not (path / SHARD).exists()
    assert fetched(pair.node, published, pair.seed)["state"] == "complete"
    assert tree_bytes(path) == files
