"""Several commands on one link at the same moment, again and again: all succeed, and the release stays usable."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from modelp2p.daemon.client import Client
from tests.endtoend.site import model
from tests.nodes import Node
from tests.releases import write_files

if TYPE_CHECKING:
    from pathlib import Path

    from modelp2p.protocol.codec import Map

CLIENTS, ROUNDS = 5, 3


@pytest.mark.swarm
def test_clients_of_one_new_link_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    files = {f"part-{number}.json": b'{"part": %d}' % number + bytes(200_000) for number in range(CLIENTS)}
    files |= model("weights", 1 << 20)
    with Node(tmp_path / "seed").start() as seed, Node(tmp_path / "node").start() as node:
        link = seed.publish(write_files(tmp_path / "model", files), "lab/model")["link"]
        address = seed.address

        def fetch(number: int) -> Map:
            # Each another file: whoever waits for its turn finds the torrent of the one before, and removes it at once.
            with Client.connect(str(node.home)) as client:
                wanted: Map = {"ref": link, "include": [f"part-{number}.json"], "peers": [address], "timeout_s": 20}
                return client.call("fetch", wanted).result

        for _ in range(ROUNDS):
            with ThreadPoolExecutor(CLIENTS) as threads:
                results = list(threads.map(fetch, range(CLIENTS)))
            assert [result["state"] for result in results] == ["partial"] * CLIENTS
            # Removed and asked for again at once: the swarms of its former life are just being left.
            node.ok("rm", "lab/model", "--yes")
        assert node.ok("fetch", link, "--peer", address, "--timeout", "20")["state"] == "complete"
        assert "already exists" not in node.log
