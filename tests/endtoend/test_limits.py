"""Rate limits bind, on loopback as anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.endtoend.site import MIB, Site, model, size_of
from tests.nodes import Node, tree_bytes

pytestmark = pytest.mark.swarm

MB = 1_000_000


def bundle_of(seed: Node, node: Node, name: str) -> str:
    """The release's statement as a file that `node` believes: a fetch by it is payload alone."""
    bundle = seed.folder / "release.modelp2p"
    seed.ok("show", name, "--bundle", str(bundle))
    node.ok("trust", "add", str(bundle), "--name", name)
    return str(bundle)


@pytest.mark.slow
def test_a_nodes_upload_limit_is_kept_and_used(site: Site) -> None:
    files = model("limit", 20 * MB)
    seed, node = site.node("seed", {"max_up": "2M"}), site.node("node")
    seed.publish(site.write(files), "lab/limit")
    bundle = bundle_of(seed, node, "lab/limit")
    result = node.ok("fetch", bundle, "--peer", seed.address, "--timeout", "20")
    assert tree_bytes(Path(result["path"])) == files
    rate = size_of(files) / result["seconds"]
    # The second that two nodes take to meet is in the time: it is not the limit's.
    assert size_of(files) / (result["seconds"] - 1.0) >= 0.85 * 2 * MB
    assert rate <= 1.05 * 2 * MB


def test_a_limit_given_to_a_running_seed_binds_that_release(site: Site) -> None:
    files = model("release-limit", 3 * MIB)
    seed, node = site.node("seed"), site.node("node")
    seed.publish(site.write(files), "lab/limited")
    bundle = bundle_of(seed, node, "lab/limited")
    assert seed.run("seed", "lab/limited", "--max-up", "1Mi", "-q").code == 0
    result = node.ok("fetch", bundle, "--peer", seed.address, "--timeout", "20")
    assert result["from_peers"] == size_of(files)
    assert result["seconds"] > 2.2
