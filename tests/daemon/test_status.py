"""What `status` says of the engine and of a swarm, for `doctor` to judge."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from modelp2p.cli.results import Row
from modelp2p.daemon.client import build
from modelp2p.daemon.control import Call
from modelp2p.daemon.engine.session import STATS_TICKS, Session
from modelp2p.daemon.service import Service
from modelp2p.protocol import engine_wire as wire
from tests.daemon.swarming import quiet_settings
from tests.memory_node import World, world_of
from tests.nodes import wait_until
from tests.releases import statement_of

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

pytestmark = pytest.mark.slow

FILES = {"a.txt": b"text"}


async def tell(world: World, event: wire.Event) -> None:
    """What the engine says reaches the node."""
    await world.swarm._tell.send(event)
    await trio.testing.wait_all_tasks_blocked()


async def test_status_says_how_the_engine_and_each_swarm_stand(tmp_path: Path) -> None:
    async with world_of(tmp_path, statement_of(FILES), FILES) as world, trio.open_nursery() as nursery:
        service = Service(world.node, nursery, on_demand=False, stop=lambda: None)

        async def send(event: Map) -> None:
            raise AssertionError(event)

        async def status() -> tuple[Row, Row]:
            answer = await service.handle(Call("status", {}, (), lambda event: None, send=send))
            node, (release,) = Row(answer.result).row("node"), Row(answer.result).rows("releases")
            assert node is not None
            return node, release

        peers = tuple(wire.PeerStatus(f"10.0.0.{has}:1", "x/1", 0, 0, has, "peer") for has in (1, 999, 500))
        await tell(world, wire.Listening(16881, ("0.0.0.0:16881", "[::]:16881"), 7))
        await tell(world, wire.SessionStatus(42))
        found = wire.TorrentStatus(world.release.info_hash, 1, 2, 3, 4, 5, 6, wasted=7, peer_list=peers, known=9)
        await tell(world, found)
        node, release = await status()
        assert node.text("build") == build()
        assert node.texts("listen_addresses") == ["0.0.0.0:16881", "[::]:16881"]
        assert node.number("dht_nodes") == 42
        assert [release.number(key) for key in ("peers", "seeds", "peers_known", "fullest_peer")] == [3, 4, 9, 999]

        # A new engine begins with empty tables.
        await tell(world, wire.EngineDied("killed"))
        node, release = await status()
        assert node.number("dht_nodes") == release.number("peers_known") == 0
        service.close()
        nursery.cancel_scope.cancel()


@pytest.mark.swarm
def test_a_live_engine_counts_the_nodes_of_its_dht_and_changes_how_many_peers_it_has() -> None:
    settings = replace(quiet_settings(), dht=True, dht_bootstrap=())
    with closing(Session(settings)) as session, closing(Session(settings)) as other:
        (heard,) = [event for event in other.listening(0) if isinstance(event, wire.Listening)]
        session._lt.add_dht_node(("127.0.0.1", heard.port))
        said: list[wire.Event] = []

        def is_told() -> bool:
            for _ in range(STATS_TICKS):
                session.tick()
            said.extend(session.read_events())
            return wire.SessionStatus(1) in said

        wait_until(is_told, what="one node in the table")
        assert [event for event in said if isinstance(event, wire.SessionStatus)] == [wire.SessionStatus(1)]
        assert list(session.handle(wire.SetConnections(7))) == []
        assert session._lt.get_settings()["connections_limit"] == 7
