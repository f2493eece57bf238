"""The faults of the in-memory twin: each does what it says, once, so that tests of the daemon can stand on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
import trio.testing

from modelp2p.daemon.memory_swarm import MemoryNetwork
from modelp2p.protocol.engine_wire import FileFailed, TransferFinished
from tests.daemon.swarming import PIECE, Shared, running
from tests.sizes import seeded_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock

CONTENTS = {"a.bin": seeded_bytes("a", 3 * PIECE), "b.bin": seeded_bytes("b", PIECE)}


async def test_a_lost_piece_is_announced_and_not_written_and_comes_when_asked_again(tmp_path: Path) -> None:
    await _tampered(tmp_path, "lose", bytes(PIECE))


async def test_a_corrupt_piece_is_announced_and_other_bytes_are_written(tmp_path: Path) -> None:
    await _tampered(tmp_path, "corrupt", bytes(byte ^ 0xFF for byte in CONTENTS["a.bin"][PIECE : 2 * PIECE]))


async def _tampered(tmp_path: Path, fault: str, found: bytes) -> None:
    shared, network = Shared(CONTENTS), MemoryNetwork()
    swarm = network.join()
    async with running(network.join(), tmp_path / "seed") as seed, running(swarm, tmp_path / "node") as node:
        shared.write(seed.folder)
        await seed.swarm.add(shared.spec(seed.folder, have=True))
        getattr(swarm, fault)(shared.info_hash, 1)
        spec = shared.spec(node.folder, have=False, peers=(await seed.peer(),))
        await swarm.add(spec)
        await node.wait_for(TransferFinished)
        assert 1 in node.announced()
        good = CONTENTS["a.bin"]
        assert node.holds({"a.bin": good[:PIECE] + found + good[2 * PIECE :]})
        await swarm.remove(shared.info_hash)
        await swarm.add(spec)
        await node.wait_files(CONTENTS)


async def test_a_full_disk_stops_the_torrent_until_it_is_added_again(tmp_path: Path) -> None:
    shared, network = Shared(CONTENTS), MemoryNetwork()
    swarm = network.join()
    async with running(network.join(), tmp_path / "seed") as seed, running(swarm, tmp_path / "node") as node:
        shared.write(seed.folder)
        await seed.swarm.add(shared.spec(seed.folder, have=True))
        swarm.fill_disk()
        spec = shared.spec(node.folder, have=False, peers=(await seed.peer(),))
        await swarm.add(spec)
        assert (await node.wait_for(FileFailed)).no_space
        swarm.fill_disk(False)
        await trio.testing.wait_all_tasks_blocked()
        assert not node.announced()
        await swarm.remove(shared.info_hash)
        await swarm.add(spec)
        await node.wait_files(CONTENTS)


async def test_pieces_take_their_time_on_the_clock(tmp_path: Path, autojump_clock: MockClock) -> None:
    shared, network = Shared(CONTENTS), MemoryNetwork(piece_s=2)
    async with running(network.join(), tmp_path / "seed") as seed, running(network.join(), tmp_path / "node") as node:
        shared.write(seed.folder)
        await seed.swarm.add(shared.spec(seed.folder, have=True))
        began = trio.current_time()
        await node.swarm.add(shared.spec(node.folder, have=False, peers=(await seed.peer(),)))
        await node.wait_pieces({3})
        assert trio.current_time() - began == 6
        assert sorted(node.announced()) == [0, 1, 2, 3]
