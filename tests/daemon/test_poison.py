"""A seed that lies, against the real engine: it is banned, and the honest seed delivers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from modelp2p.daemon.memory_swarm import MemoryNetwork
from modelp2p.protocol.engine_wire import Peer, PeerBanned, PieceFailed, TorrentStatus, TransferFinished
from tests.daemon.swarming import PIECE, RealWorld, Shared, running
from tests.sizes import seeded_bytes

CONTENTS = {"model.safetensors": seeded_bytes("model", 9 * PIECE + 3), "config.json": b"{}"}
POISONER = Path(__file__).with_name("poisoner.py")


@pytest.mark.swarm
async def test_a_poisoner_is_banned_and_the_fetch_completes_from_the_good_seed(tmp_path: Path) -> None:
    shared, world = Shared(CONTENTS), RealWorld()
    shared.write(tmp_path / "bad")
    torrent = tmp_path / "t.torrent"
    torrent.write_bytes(shared.torrent)
    command = [sys.executable, str(POISONER), str(torrent), str(tmp_path / "bad"), "127.0.0.2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as poisoner:  # noqa: ASYNC220  # starts at once
        assert poisoner.stdout is not None
        bad = Peer("127.0.0.2", int(poisoner.stdout.readline()))
        async with (
            running(world.make(tmp_path / "seed"), tmp_path / "seed") as seed,
            running(world.make(tmp_path / "node"), tmp_path / "node") as node,
        ):
            shared.write(seed.folder)
            await seed.swarm.add(shared.spec(seed.folder, have=True))
            await node.swarm.add(shared.spec(node.folder, have=False, peers=(bad,)))
            failure = await node.wait_for(PieceFailed)
            banned = await node.wait_for(PeerBanned)
            assert failure.piece not in node.announced()
            assert banned.address.startswith("127.0.0.2:")
            await node.swarm.connect(shared.info_hash, [await seed.peer()])
            await node.wait_for(TransferFinished)
            await node.wait_files(CONTENTS)
            await node.wait_for(TorrentStatus, lambda status: status.wasted > 0)


async def test_the_twin_bans_a_poisoner_too(tmp_path: Path) -> None:
    shared, network = Shared(CONTENTS), MemoryNetwork()
    async with (
        running(network.join("127.0.0.2"), tmp_path / "bad") as bad,
        running(network.join(), tmp_path / "seed") as seed,
        running(network.join(), tmp_path / "node") as node,
    ):
        for source in (bad, seed):
            shared.write(source.folder)
            await source.swarm.add(shared.spec(source.folder, have=True))
        network.nodes["127.0.0.2", 20_000].poison(shared.info_hash, 0)
        await node.swarm.add(shared.spec(node.folder, have=False, peers=(Peer("127.0.0.2", 20_000),)))
        assert (await node.wait_for(PeerBanned)).address == "127.0.0.2:20000"
        await node.swarm.connect(shared.info_hash, [await seed.peer()])
        await node.wait_files(CONTENTS)
