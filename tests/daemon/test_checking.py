"""`verify`: some files instead of all, what the journal and the swarm know afterwards, and one look at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from modelp2p.daemon.checking import verify_release
from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.daemon.node import pieces_of
from modelp2p.protocol.engine_wire import unpack_bits
from modelp2p.protocol.errors import NotFoundError, UnavailableError
from modelp2p.protocol.journal import Selection
from tests.endtoend.site import MIB, flip_byte, weights
from tests.memory_node import World, world_of
from tests.releases import statement_of

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

pytestmark = pytest.mark.slow

FILES = {"a.safetensors": weights("a", 3 * MIB + 8), "b.safetensors": weights("b", 2 * MIB), "c.json": b"{}"}
NOBODY_S = 1.0
"""How long a repair waits for a peer that there is not: the least the protocol can say."""


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with world_of(tmp_path, statement_of(FILES), FILES) as made:
        yield made


async def look(world: World, *only: str, repair: bool = False) -> tuple[Map, list[Map]]:
    """The result of one verify, and its events."""
    events: list[Map] = []
    result = await verify_release(world.node, world.entry, events.append, repair=repair, peers=(), timeout_s=NOBODY_S, only=only)
    return result, events


def borrow(world: World, own: Path, path: str) -> None:
    """Hold a file as `publish` leaves it: the user's own, under one more name."""
    folder = ReleaseFolder.open(world.node.store, world.release)
    folder.disown(path)
    Path(folder.disk_path(path)).hardlink_to(own)
    folder.sync_proven(pieces_of(world.release, (path,)))
    folder.finish(path, borrowed=True, replace=True)
    folder.complete()
    folder.close()


def check_whole(world: World) -> None:
    assert {path: (world.tree / path).read_bytes() for path in FILES} == FILES
    state = world.journal()
    assert state.complete
    assert state.files.keys() == FILES.keys()
    assert state.proven.total == world.release.pieces.total


async def test_only_what_is_named_is_read(world: World) -> None:
    flip_byte(world.tree / "a.safetensors", MIB + 1)
    read = world.node.pool.statistics().bytes_read
    result, events = await look(world, "b.safetensors")
    assert (result["ok"], result["bad"], result["bytes"]) == (True, [], 2 * MIB)
    assert {event["total"] for event in events} == {2 * MIB}
    assert world.node.pool.statistics().bytes_read - read == 2 * MIB
    assert world.node.of(world.release.info_hash).is_seeding
    # It was not looked at, so nothing about it was recorded anew.
    before = world.journal().files["a.safetensors"]
    assert before.stamp.ctime_ns != (world.tree / "a.safetensors").stat().st_ctime_ns


async def test_a_repair_brings_the_named_file_alone_and_keeps_what_was_asked_for(world: World) -> None:
    flip_byte(world.tree / "a.safetensors", MIB + 1)
    flip_byte(world.tree / "b.safetensors", 3)
    asked_for = world.journal().selection
    old = (world.tree / "a.safetensors").stat().st_ino
    other = (world.tree / "b.safetensors").stat().st_ino
    result, _ = await look(world, "a.safetensors", repair=True)
    assert (result["ok"], result["bad"], result["repaired"]) == (True, [{"path": "a.safetensors", "piece": 1}], 1)
    assert (world.tree / "a.safetensors").read_bytes() == FILES["a.safetensors"]
    assert (world.tree / "a.safetensors").stat().st_ino != old
    assert (world.tree / "b.safetensors").stat().st_ino == other
    assert world.journal().selection == asked_for
    asked = [spec for spec in world.swarm.added if any(file.wanted for file in spec.files)][-1]
    assert [file.path for file in asked.files if file.wanted] == ["a.safetensors"]
    have = unpack_bits(asked.have, world.release.pieces.total)
    assert [piece for piece in world.release.pieces.pieces_of("a.safetensors") if not have[piece]] == [1]

    result, _ = await look(world, repair=True)
    assert result["bad"] == [{"path": "b.safetensors", "piece": 0}]
    check_whole(world)
    assert world.node.of(world.release.info_hash).state == "seeding"


async def test_a_repair_of_one_file_does_not_call_the_release_complete(world: World) -> None:
    flip_byte(world.tree / "a.safetensors", 1)
    flip_byte(world.tree / "b.safetensors", 3)
    result, _ = await look(world)
    assert (result["ok"], len(result["bad"])) == (False, 2)  # type: ignore[arg-type]  # a list
    await look(world, "b.safetensors", repair=True)
    state = world.journal()
    assert (set(state.files), state.complete) == ({"b.safetensors", "c.json"}, False)
    assert world.node.store.load_record(world.release.info_hash).files.keys() == {"b.safetensors", "c.json"}  # type: ignore[union-attr]  # there is one
    await look(world, "a.safetensors", repair=True)
    check_whole(world)


@pytest.mark.parametrize("path", ["d.safetensors", "../a.safetensors", "/etc/passwd", "", "a.safetensors\0", "x" * 5000])
async def test_what_is_not_in_the_manifest_is_refused_before_anything_is_read(world: World, path: str) -> None:
    with pytest.raises(NotFoundError, match="has no file"):
        await look(world, "a.safetensors", path)
    check_whole(world)


async def test_without_peers_the_good_files_are_served_on(world: World) -> None:
    await world.leave_alone()
    flip_byte(world.tree / "a.safetensors", MIB + 1)
    with pytest.raises(UnavailableError):
        await look(world, "a.safetensors", repair=True)
    shared = world.node.of(world.release.info_hash)
    assert shared.is_seeding
    assert (shared.state, bool(shared.error)) == ("error", True)
    assert not (world.tree / "a.safetensors").exists(), "bytes that are known to be wrong are still visible"
    served = [spec for spec in world.swarm.added if spec.info_hash == world.release.info_hash][-1]
    have = unpack_bits(served.have, world.release.pieces.total)
    assert [piece for piece, has in enumerate(have) if not has] == [world.release.pieces.first("a.safetensors") + 1]
    assert not any(file.wanted for file in served.files)


async def test_a_look_that_finds_damage_keeps_serving_the_rest_and_says_so(world: World) -> None:
    flip_byte(world.tree / "a.safetensors", MIB + 1)
    assert (await look(world, "a.safetensors"))[0]["ok"] is False
    shared = world.node.of(world.release.info_hash)
    assert shared.is_seeding
    assert "1 bad piece(s) in 1 file(s), 'a.safetensors' first" in shared.error


async def test_what_nobody_asked_for_is_not_fetched_by_a_repair(world: World) -> None:
    folder = ReleaseFolder.open(world.node.store, world.release)
    folder.disown("c.json")
    folder.select(Selection(("*.safetensors",), (), ("a.safetensors", "b.safetensors")))
    folder.close()
    with pytest.raises(NotFoundError, match=r"'c.json' of .* was never fetched"):
        await look(world, "a.safetensors", "c.json", repair=True)
    assert not (world.tree / "c.json").exists()


async def test_borrowed_files_are_replaced_and_never_written(world: World, tmp_path: Path) -> None:
    own = tmp_path / "own.bin"
    own.write_bytes(FILES["a.safetensors"])
    borrow(world, own, "a.safetensors")
    flip_byte(own, MIB + 1)
    damaged = own.read_bytes()
    result, _ = await look(world, "a.safetensors", repair=True)
    assert result["repaired"] == 1
    assert (world.tree / "a.safetensors").read_bytes() == FILES["a.safetensors"]
    assert own.read_bytes() == damaged
    assert own.stat().st_nlink == 1


async def test_looks_take_turns_and_the_second_finds_the_work_done(world: World) -> None:
    flip_byte(world.tree / "a.safetensors", MIB + 1)
    results: list[tuple[Map, list[Map]]] = []

    async def one() -> None:
        results.append(await look(world, "a.safetensors", repair=True))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        nursery.start_soon(one)
    assert [result["ok"] for result, _ in results] == [True, True]
    assert sum(event["phase"] == "waiting" for _, events in results for event in events) >= 1
    check_whole(world)


@pytest.mark.parametrize("moment", ["checking", "fetching"])
async def test_a_cancelled_repair_can_be_done_again(world: World, moment: str) -> None:
    flip_byte(world.tree / "a.safetensors", MIB + 1)
    with trio.CancelScope() as scope:

        def on_event(event: Map) -> None:
            if event["phase"] == moment:
                scope.cancel()

        if moment == "fetching":
            world.swarm.on_add = scope.cancel
        await verify_release(
            world.node, world.entry, on_event, repair=True, peers=(), timeout_s=NOBODY_S, only=("a.safetensors",)
        )
    served = trio.Event()
    world.swarm.on_add = served.set
    assert scope.cancelled_caught
    shared = world.node.of(world.release.info_hash)
    if not shared.is_seeding:
        # What is still good, by a task of the node.
        await served.wait()
    result, _ = await look(world, "a.safetensors", repair=True)
    assert result["ok"]
    check_whole(world)
    assert shared.is_seeding


async def test_what_was_served_is_served_again_after_a_cancelled_transfer(world: World) -> None:
    flip_byte(world.tree / "a.safetensors", MIB + 1)
    await world.leave_alone()
    shared = world.node.of(world.release.info_hash)
    with trio.CancelScope() as scope:

        def on_event(event: Map) -> None:
            if event["phase"] == "fetching":
                scope.cancel()

        await verify_release(world.node, world.entry, on_event, repair=True, peers=(), timeout_s=30.0, only=("a.safetensors",))
    assert scope.cancelled_caught
    await trio.testing.wait_all_tasks_blocked()
    async with shared.lock:
        assert shared.is_seeding
