"""Web seeds by the real command line: one node's public listener is the web seed of another that knows no peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.endtoend.site import MIB, model, size_of, some_bytes
from tests.nodes import Node, tree_bytes
from tests.releases import write_files

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.swarm

FILES = model("web", 2 * MIB + 5, MIB) | {"sub dir/100 %+#ä.txt": some_bytes("odd", 100)}


def test_a_node_without_peers_fetches_from_the_public_listener_of_another(tmp_path: Path) -> None:
    public = {"public_http": {"enabled": True, "listen": ["127.0.0.1:0"]}}
    bundle = str(tmp_path / "x.modelp2p")
    with Node(tmp_path / "seed", sections=public).start() as seed:
        (address,) = seed.ok("status")["node"]["public_http"]
        published = seed.publish(
            write_files(tmp_path / "source", FILES), "lab/model", "--web-seed", f"{address}/lab/model/resolve/"
        )
        assert seed.run("show", "lab/model", "--bundle", bundle).code == 0
        with Node(tmp_path / "node", sections={"web_seeds": {"patience_s": 0.2}}) as node:
            assert node.start().run("trust", "add", bundle, "--name", "lab/*").code == 0
            refused = node.run("fetch", bundle, "--timeout", "3")
            # Plain http, and at an address of this machine: not without its being listed.
            assert (refused.code, node.ok("ls")["releases"][0]["proven"]) == (5, 0)
            node.stop()
        sections = {"web_seeds": {"patience_s": 0.2, "hosts": [address.removeprefix("http://")]}}
        with Node(tmp_path / "node", sections=sections) as node:
            assert node.start().run("fetch", bundle, "--timeout", "2", "--no-web-seed").code == 5
            result = node.ok("fetch", "lab/model@" + published["revision"])
            assert (result["state"], result["from_web"], result["from_peers"]) == ("complete", size_of(FILES), 0)
            assert tree_bytes(tmp_path / result["path"]) == FILES
            assert node.release("lab/model")["origin"] == ""
            node.stop()
