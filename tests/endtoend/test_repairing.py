"""A load that meets bit rot: the daemon fetches the piece from another node, and the load goes on with right numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load as load_bytes

from modelp2p.loader import open_release
from modelp2p.protocol.errors import IntegrityError
from tests.endtoend.site import MIB, check_uploaded, fetched, flip_byte, model, size_of
from tests.loader.models import same
from tests.nodes import tree_bytes

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair

pytestmark = pytest.mark.swarm

SHARD, OTHER = "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"


def test_a_load_repairs_what_it_meets_with_one_piece(pair: Pair) -> None:
    files = model("mend", 2 * MIB, 3 * MIB)
    published = pair.seed.publish(pair.site.write(files), "lab/mend")
    path = Path(fetched(pair.node, published, pair.seed)["path"])
    pair.node.ok("trust", "add", published["link"], "--name", "lab/mend")
    tree = path.resolve() if path.exists() else Path(pair.node.ok("show", "lab/mend")["path"]).resolve()
    check_uploaded(pair.seed, "lab/mend", size_of(files))
    flip_byte(tree / SHARD, 2 * MIB + 99)
    expected = {name: tensor for shard in (OTHER, SHARD) for name, tensor in load_bytes(files[shard]).items()}
    with open_release("lab/mend", home=pair.node.home, mapping="pread", verify="cpu") as release:
        tensors = release.load()
        assert tensors.keys() == expected.keys()
        assert all(same(tensors[name], tensor) for name, tensor in expected.items())
        assert (release.stats.refetches, release.stats.fallbacks) == (1, [])
    assert tree_bytes(tree) == files
    check_uploaded(pair.seed, "lab/mend", size_of(files) + MIB)
    assert pair.node.ok("verify", "lab/mend")["ok"] is True
    assert pair.node.release("lab/mend")["state"] == "seeding"


def test_without_peers_the_load_says_what_was_tried(pair: Pair) -> None:
    files = model("alone", 2 * MIB, 3 * MIB)
    published = pair.seed.publish(pair.site.write(files), "lab/alone")
    fetched(pair.node, published, pair.seed)
    pair.node.ok("trust", "add", published["link"], "--name", "lab/alone")
    tree = Path(pair.node.ok("show", "lab/alone")["path"]).resolve()
    assert pair.seed.run("rm", "lab/alone", "-y").code == 0
    flip_byte(tree / SHARD, 2 * MIB + 99)
    with open_release("lab/alone", home=pair.node.home, mapping="pread", verify="cpu", timeout=2) as release:
        with pytest.raises(IntegrityError) as caught:
            release.load()
        assert f"'{SHARD}' was not repaired: no new proven byte for 2 s" in release.stats.fallbacks[0]
    assert (caught.value.facts["path"], caught.value.facts["piece"]) == (SHARD, 2)
    row = pair.node.release("lab/alone")
    assert (row["state"], (tree / OTHER).exists(), (tree / SHARD).exists()) == ("error", True, False)
