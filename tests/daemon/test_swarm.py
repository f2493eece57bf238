"""The contract of `Swarm`, over the in-memory twin and over real libtorrent."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from modelp2p.protocol.engine_wire import (
    AddFailed,
    Flushed,
    MagnetSpec,
    MetadataReceived,
    Peer,
    PeerUnresolved,
    PiecesFinished,
    Removed,
    TorrentFile,
    TorrentStatus,
    TransferFinished,
)
from modelp2p.protocol.errors import UnavailableError
from tests.daemon.swarming import NAME, PIECE, MemoryWorld, Node, RealWorld, Shared, World, running
from tests.sizes import seeded_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from modelp2p.protocol.engine_wire import TorrentSpec

CONTENTS = {
    "a/b.bin": seeded_bytes("b", 5 * PIECE + 7),
    "a.txt": seeded_bytes("a", 100),
    "config.json": seeded_bytes("c", PIECE),
    "empty": b"",
}
SETTLE_S = 0.4
"""How long to watch that something does not happen."""


@pytest.fixture(params=["memory", pytest.param("real", marks=pytest.mark.swarm)])
def world(request: pytest.FixtureRequest) -> World:
    return MemoryWorld() if request.param == "memory" else RealWorld()


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared(CONTENTS)


@pytest.fixture
async def seed(world: World, shared: Shared, tmp_path: Path) -> AsyncIterator[Node]:
    async with running(world.make(tmp_path / "seed"), tmp_path / "seed") as node:
        shared.write(node.folder)
        await node.swarm.add(shared.spec(node.folder, have=True))
        yield node


@pytest.fixture
async def node(world: World, tmp_path: Path) -> AsyncIterator[Node]:
    async with running(world.make(tmp_path / "node"), tmp_path / "node") as node:
        yield node


async def test_a_release_is_fetched_whole(seed: Node, node: Node, shared: Shared) -> None:
    await node.swarm.add(shared.spec(node.folder, have=False, peers=(await seed.peer(),)))
    await node.wait_for(TransferFinished)
    await node.wait_files(CONTENTS)
    assert node.announced() == set(range(shared.pieces.total))
    assert not (node.folder / NAME).exists()


async def test_pieces_that_were_there_are_no_news(seed: Node) -> None:
    await seed.wait_for(TransferFinished)
    assert not seed.heard(PiecesFinished)


async def test_only_what_is_wanted_is_fetched_and_the_rest_when_it_is(seed: Node, node: Node, shared: Shared) -> None:
    wanted = frozenset({"a.txt", "config.json"})
    await node.swarm.add(shared.spec(node.folder, have=False, wanted=wanted, peers=(await seed.peer(),)))
    await node.wait_files({path: CONTENTS[path] for path in wanted})
    asked = {*shared.pieces.pieces_of("a.txt"), *shared.pieces.pieces_of("config.json")}
    await node.wait_pieces(asked)
    assert node.announced() == asked
    assert not (node.folder / "a/b.bin").exists()
    await node.swarm.set_wanted(shared.info_hash, CONTENTS)
    await node.wait_files(CONTENTS)


async def test_a_piece_of_priority_zero_waits_until_it_has_one(seed: Node, node: Node, shared: Shared) -> None:
    *others, last = shared.pieces.pieces_of("a/b.bin")
    await node.swarm.add(shared.spec(node.folder, have=False, wanted=frozenset({"a/b.bin"})))
    await node.swarm.set_piece_priorities(shared.info_hash, {last: 0})
    await node.swarm.connect(shared.info_hash, [await seed.peer()])
    await node.wait_pieces(set(others))
    await trio.sleep(SETTLE_S)
    assert last not in node.announced()
    await node.swarm.set_piece_priorities(shared.info_hash, {last: 7})
    await node.wait_pieces({last})


async def test_a_magnet_gets_its_metadata_and_nothing_else(seed: Node, node: Node, shared: Shared) -> None:
    await node.swarm.add_magnet(MagnetSpec(shared.info_hash, str(node.folder), (await seed.peer(),)))
    heard = await node.wait_for(MetadataReceived)
    assert heard.info == shared.info
    assert {file.path: file.size for file in heard.files} == {path: len(data) for path, data in CONTENTS.items()}
    await trio.sleep(SETTLE_S)
    assert not node.heard(TransferFinished)
    assert not [path for path in node.folder.rglob("*") if path.is_file() and path.stat().st_size]
    # Added anew with what was learned, it is fetched.
    await node.swarm.remove(shared.info_hash)
    await node.swarm.add(shared.spec(node.folder, have=False, peers=(await seed.peer(),)))
    await node.wait_for(TransferFinished)
    await node.wait_files(CONTENTS)


async def test_a_release_of_one_file_lies_at_its_own_path(world: World, tmp_path: Path) -> None:
    one = Shared({"model.safetensors": seeded_bytes("one", 2 * PIECE + 1)})
    async with (
        running(world.make(tmp_path / "one"), tmp_path / "one") as first,
        running(world.make(tmp_path / "two"), tmp_path / "two") as second,
    ):
        one.write(first.folder)
        await first.swarm.add(one.spec(first.folder, have=True))
        await second.swarm.add(one.spec(second.folder, have=False, peers=(await first.peer(),)))
        await second.wait_files(one.contents)


WRONG: dict[str, Callable[[TorrentSpec], TorrentSpec]] = {
    "a file is missing": lambda spec: replace(spec, files=spec.files[1:]),
    "a file is listed that is not there": lambda spec: replace(spec, files=(*spec.files, TorrentFile("x", 1, "/x"))),
    "a size differs": lambda spec: replace(spec, files=(replace(spec.files[0], size=1), *spec.files[1:])),
    "a path differs": lambda spec: replace(spec, files=(replace(spec.files[0], path="a/c.bin"), *spec.files[1:])),
    "the info-hash differs": lambda spec: replace(spec, info_hash=bytes(32)),
    "the piece length differs": lambda spec: replace(spec, piece_length=2 * PIECE),
    "the bitmap is short": lambda spec: replace(spec, have=b""),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
async def test_a_spec_that_does_not_describe_its_torrent_is_refused(
    node: Node, shared: Shared, change: Callable[[TorrentSpec], TorrentSpec]
) -> None:
    spec = change(shared.spec(node.folder, have=False))
    await node.swarm.add(spec)
    refusal = await node.wait_for(AddFailed)
    assert refusal.info_hash == spec.info_hash
    assert refusal.message


async def test_adding_what_is_there_changes_nothing(seed: Node, node: Node, shared: Shared) -> None:
    spec = shared.spec(node.folder, have=False, peers=(await seed.peer(),))
    await node.swarm.add(spec)
    await node.swarm.add(spec)
    await node.wait_files(CONTENTS)
    assert not node.heard(AddFailed)


async def test_a_removed_torrent_keeps_its_files_and_comes_back_as_told(seed: Node, node: Node, shared: Shared) -> None:
    await node.swarm.add(shared.spec(node.folder, have=False, peers=(await seed.peer(),)))
    await node.wait_files(CONTENTS)
    await node.swarm.remove(shared.info_hash)
    await node.wait_for(Removed)
    await node.swarm.remove(shared.info_hash)
    await node.swarm.set_wanted(shared.info_hash, [])
    assert all((node.folder / path).exists() for path in CONTENTS)
    lost = "config.json"
    (node.folder / lost).write_bytes(bytes(PIECE))
    have = [piece not in shared.pieces.pieces_of(lost) for piece in range(shared.pieces.total)]
    spec = shared.spec(node.folder, have=True, peers=(await seed.peer(),))
    before = len(node.said)
    await node.swarm.add(
        replace(spec, have=int("".join("01"[bit] for bit in have), 2).__lshift__(-len(have) % 8).to_bytes(1, "big"))
    )
    await node.wait_files(CONTENTS)
    await node.wait_for(PiecesFinished, lambda event: any(event is new for new in node.said[before:]))
    again = {piece for event in node.said[before:] if isinstance(event, PiecesFinished) for piece in event.pieces}
    assert again == set(shared.pieces.pieces_of(lost))


async def test_a_torrent_removed_before_it_was_taken_leaves_no_trace(seed: Node, node: Node, shared: Shared) -> None:
    """Commands faster than answers: what counts is the last one, and nothing is refused for what came before."""
    for _ in range(3):
        await node.swarm.add(shared.spec(node.folder, have=True))
        await node.swarm.remove(shared.info_hash)
    await node.swarm.add(shared.spec(node.folder, have=False, peers=(await seed.peer(),)))
    await node.wait_for(TransferFinished)
    await node.wait_files(CONTENTS)
    assert not node.heard(AddFailed)
    await node.swarm.remove(shared.info_hash)
    await node.swarm.add(shared.spec(node.folder, have=True))
    await node.swarm.remove(shared.info_hash)
    await trio.sleep(SETTLE_S)
    assert not node.heard(AddFailed)


async def test_a_held_torrent_stands_nearly_still(seed: Node, node: Node, shared: Shared) -> None:
    await node.swarm.add(shared.spec(node.folder, have=False))
    await node.swarm.throttle(shared.info_hash, True)
    await node.swarm.connect(shared.info_hash, [await seed.peer()])
    await trio.sleep(SETTLE_S)
    assert len(node.announced()) <= 1
    await node.swarm.throttle(shared.info_hash, False)
    await node.wait_files(CONTENTS)


async def test_a_flush_is_answered(seed: Node, node: Node, shared: Shared) -> None:
    await node.swarm.add(shared.spec(node.folder, have=False, peers=(await seed.peer(),)))
    await node.wait_for(TransferFinished)
    await node.swarm.flush(shared.info_hash)
    await node.wait_for(Flushed)
    assert all((node.folder / path).read_bytes() == data for path, data in CONTENTS.items())


async def test_a_transfer_shows_in_the_status(seed: Node, node: Node, shared: Shared) -> None:
    await node.swarm.add(shared.spec(node.folder, have=False, peers=(await seed.peer(),)))
    total = sum(len(data) for data in CONTENTS.values())
    status = await node.wait_for(TorrentStatus, lambda status: status.payload_down >= total)
    assert status.info_hash == shared.info_hash
    assert status.wasted == 0
    await seed.wait_for(TorrentStatus, lambda status: status.payload_up >= total)


async def test_a_host_without_an_address_is_named(node: Node, shared: Shared) -> None:
    await node.swarm.add(shared.spec(node.folder, have=False, peers=(Peer("no..such.invalid", 1),)))
    assert (await node.wait_for(PeerUnresolved)).host == "no..such.invalid"


async def test_a_taken_port_is_an_error_and_never_moved(world: World, seed: Node, tmp_path: Path) -> None:
    taken = (await seed.peer()).port
    async with running(world.make(tmp_path / "late", taken), tmp_path / "late") as late:
        with pytest.raises(UnavailableError, match=f"{taken}.*in use"):
            await late.swarm.wait_listening()


async def test_closing_ends_the_run_and_the_events(world: World, tmp_path: Path) -> None:
    swarm = world.make(tmp_path)
    async with running(swarm, tmp_path) as node:
        await swarm.wait_listening()
        await swarm.aclose()
        await swarm.aclose()
        assert [event async for event in swarm.events] == []
    assert node.swarm.statistics().restarts == 0


async def test_a_swarm_that_is_never_used_never_starts(world: World, tmp_path: Path) -> None:
    async with running(world.make(tmp_path), tmp_path) as node:
        await node.swarm.set_limits(None, 1000, 1000)
        await node.swarm.set_connections(10)
    assert node.swarm.statistics().listen_port == 0
    assert not node.said
