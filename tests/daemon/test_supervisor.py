"""The engine process: it starts late, dies alone, comes back, and never outlives its daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel

from modelp2p.daemon.memory_swarm import MemoryNetwork
from modelp2p.protocol.engine_wire import EngineDied, EngineRestarted, Listening, TransferFinished
from tests.daemon.swarming import PATIENCE_S, PIECE, Node, RealWorld, Shared, running
from tests.sizes import seeded_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from trio.testing import MockClock

CONTENTS = {"a.bin": seeded_bytes("a", 3 * PIECE + 1), "b.bin": seeded_bytes("b", PIECE)}


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with running(RealWorld().make(tmp_path / "node"), tmp_path / "node") as node:
        yield node


async def engine_pid(node: Node) -> int:
    await node.swarm.wait_listening()
    return node.swarm.statistics().engine_pid


async def wait_gone(pid: int) -> None:
    with trio.fail_after(PATIENCE_S):
        while os.path.exists(f"/proc/{pid}/fd/0"):  # noqa: ASYNC110, ASYNC240  # somebody else's child: there is no event
            await trio.sleep(0.02)


@pytest.mark.swarm
async def test_a_killed_engine_is_told_and_replaced_and_takes_the_torrents_again(node: Node, tmp_path: Path) -> None:
    shared = Shared(CONTENTS)
    shared.write(node.folder)
    await node.swarm.add(shared.spec(node.folder, have=True))
    await node.wait_for(TransferFinished)
    os.kill(await engine_pid(node), signal.SIGKILL)
    assert "SIGKILL" in (await node.wait_for(EngineDied)).reason
    await node.wait_for(EngineRestarted)
    order = [type(event) for event in node.said if isinstance(event, EngineDied | EngineRestarted | Listening)]
    assert order[:3] == [Listening, EngineDied, EngineRestarted]
    await node.swarm.add(shared.spec(node.folder, have=True))
    async with running(RealWorld().make(tmp_path / "other"), tmp_path / "other") as other:
        await node.wait_for(Listening, lambda event: event is not node.heard(Listening)[0])
        await other.swarm.add(shared.spec(other.folder, have=False, peers=(await node.peer(),)))
        await other.wait_files(CONTENTS)
    assert node.swarm.statistics().restarts == 1


@pytest.mark.swarm
async def test_a_new_engine_knows_no_torrent(node: Node) -> None:
    shared = Shared(CONTENTS)
    shared.write(node.folder)
    await node.swarm.add(shared.spec(node.folder, have=True))
    await node.wait_for(TransferFinished)
    os.kill(await engine_pid(node), signal.SIGKILL)
    await node.wait_for(EngineDied)
    await node.swarm.add(shared.spec(node.folder, have=True))
    await node.wait_for(EngineRestarted)
    await node.wait_for(Listening, lambda event: event is not node.heard(Listening)[0])
    assert len(node.heard(TransferFinished)) == 1, "a command given in the gap was kept"


@pytest.mark.swarm
async def test_ctrl_c_on_the_terminal_does_not_reach_the_engine(node: Node) -> None:
    pid = await engine_pid(node)
    os.kill(pid, signal.SIGINT)
    await trio.sleep(0.3)
    assert node.swarm.statistics().engine_pid == pid
    assert not node.heard(EngineDied)


@pytest.mark.swarm
async def test_sigterm_ends_the_engine_cleanly(node: Node) -> None:
    os.kill(await engine_pid(node), signal.SIGTERM)
    assert (await node.wait_for(EngineDied)).reason.endswith("code 0")


@pytest.mark.swarm
@pytest.mark.slow
async def test_closing_ends_a_stopped_engine_within_5_seconds(node: Node) -> None:
    pid = await engine_pid(node)
    os.kill(pid, signal.SIGSTOP)
    with trio.fail_after(5.5):
        await node.swarm.aclose()
    await wait_gone(pid)


@pytest.mark.swarm
async def test_the_engine_ends_with_a_killed_daemon(tmp_path: Path) -> None:
    script = f"""
import trio
from modelp2p.daemon.supervisor import EngineFolders, EngineSwarm
from tests.daemon.swarming import quiet_settings
async def main():
    swarm = EngineSwarm(quiet_settings(), EngineFolders({str(tmp_path)!r}))
    async with trio.open_nursery() as nursery:
        await nursery.start(swarm.run)
        await swarm.wait_listening()
        print(swarm.statistics().engine_pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as daemon:  # noqa: ASYNC220  # starts at once
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        daemon.kill()
    await wait_gone(pid)


async def test_the_twin_dies_and_comes_back_alike(tmp_path: Path, autojump_clock: MockClock) -> None:
    shared, network = Shared(CONTENTS), MemoryNetwork()
    swarm = network.join()
    async with running(swarm, tmp_path) as node:
        shared.write(tmp_path)
        await swarm.add(shared.spec(tmp_path, have=True))
        await node.wait_for(TransferFinished)
        swarm.die()
        await node.wait_for(EngineDied)
        await swarm.add(shared.spec(tmp_path, have=True))
        await node.wait_for(EngineRestarted)
        assert len(node.heard(TransferFinished)) == 1
        await swarm.add(shared.spec(tmp_path, have=True))
        await trio.lowlevel.checkpoint()
        order = [type(event) for event in node.said if isinstance(event, EngineDied | EngineRestarted | Listening)]
        assert order[:3] == [Listening, EngineDied, EngineRestarted]
    assert swarm.statistics().restarts == 1
