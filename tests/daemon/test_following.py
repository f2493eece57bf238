"""Streams of a daemon: who gets one, what it hears while a fetch goes on and ends, and what its order does to the engine."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import trio
import trio.testing

from modelp2p.daemon import following
from modelp2p.daemon.config import Config
from modelp2p.daemon.control import Answer, Call
from modelp2p.daemon.following import Streams
from modelp2p.daemon.hashing import HashPool
from modelp2p.daemon.library import Library
from modelp2p.daemon.memory_swarm import MemoryNetwork, MemorySwarm
from modelp2p.daemon.node import Node, Shared
from modelp2p.daemon.sealed import SealedCache
from modelp2p.daemon.store import Store
from modelp2p.daemon.watching import turn
from modelp2p.protocol import layout
from modelp2p.protocol.errors import (
    DeniedError,
    InterruptedFetchError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
    UnknownPublisherError,
    UsageError,
)
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.statement import Release, Statement, verify_statement
from modelp2p.protocol.trust import TrustBook, TrustEntry
from tests.releases import publisher, statement_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from modelp2p.daemon.transfer import Transfer
    from modelp2p.protocol.codec import Map

MIB = 1 << 20
FILES = {"a.bin": os.urandom(6 * MIB), "b.bin": b"b"}


class Listener(MemorySwarm):
    """A swarm that remembers what it was told about priorities."""

    def __init__(self) -> None:
        super().__init__(MemoryNetwork(), "127.0.0.1", 20_000, refused=False)
        self.told: list[dict[int, int]] = []

    async def set_piece_priorities(self, info_hash: bytes, priorities: Mapping[int, int]) -> None:
        await trio.lowlevel.checkpoint()
        self.told.append(dict(priorities))


@dataclass
class Client:
    """One connection, as the control server would keep it."""

    streams: Streams
    session: dict[str, object] = field(default_factory=dict)
    is_strangers: bool = False
    heard: list[Map] = field(default_factory=list)

    async def call(self, verb: str, **args: object) -> Answer:
        async def send(body: Map) -> None:
            await trio.lowlevel.checkpoint()
            self.heard.append(body)

        call = Call(f"stream_{verb}", cast("Map", args), (), lambda _: None, self.session, self.is_strangers, send=send)
        match verb:
            case "open":
                answer = await self.streams.open(call)
            case "follow":
                answer = await self.streams.follow(call)
            case "file":
                answer = await self.streams.file(call)
            case _:
                answer = await self.streams.want(call)
        return answer

    async def open(self, **args: object) -> str:
        answer = await self.call("open", **{"ref": "lab/model", **args})
        contents = [os.pread(fd, 1 << 20, 0) for fd in answer.fds]
        for fd in answer.fds:
            os.close(fd)
        verify_statement(Statement(contents[1], contents[0], contents[2]))
        token = answer.result["stream"]
        assert isinstance(token, str)
        return token

    @property
    def proven(self) -> Ranges:
        found = Ranges()
        for event in self.heard:
            found = found.union(Ranges.from_list(event.get("proven", [])))
        return found


@dataclass
class World:
    """A node that knows one release, and nothing of it is here."""

    node: Node
    swarm: Listener
    streams: Streams
    release: Release
    shared: Shared

    def client(self) -> Client:
        return Client(self.streams)

    def transfer(self, *paths: str) -> SimpleNamespace:
        """As much of a `Transfer` as a follower looks at."""
        folder = SimpleNamespace(release=self.release, state=SimpleNamespace(proven=Ranges()))
        found = SimpleNamespace(folder=folder, wanted=paths or tuple(FILES), lives=1)
        self.shared.transfer = cast("Transfer", found)
        self.shared.watch.ring()
        return found

    def prove(self, transfer: SimpleNamespace, *pieces: int) -> None:
        transfer.folder.state.proven = transfer.folder.state.proven.union(Ranges.of_ints(pieces))
        self.shared.watch.ring()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "home")
    yield opened
    opened.close()


@asynccontextmanager
async def world_of(store: Store, *, is_trusted: bool = True) -> AsyncIterator[World]:
    swarm = Listener()
    node = Node(store, Library(store), swarm, HashPool(workers=1), Config(), [])
    if is_trusted:
        node.book = TrustBook((TrustEntry("lab/*", publisher().id),))
    statement = statement_of(FILES)
    release = verify_statement(statement)
    node.library.add(statement, release)
    async with trio.open_nursery() as nursery:
        yield World(node, swarm, Streams(node, nursery, SealedCache()), release, node.of(release.info_hash))
        nursery.cancel_scope.cancel()


async def test_what_nobody_fetches_has_no_stream(store: Store) -> None:
    async with world_of(store) as world:
        with pytest.raises(NotFoundError, match="nobody is fetching it") as caught:
            await world.client().open()
        assert "modelp2p fetch" in caught.value.hint
        with pytest.raises(NotFoundError):
            await world.client().open(ref="lab/other")


async def test_a_name_is_streamed_from_whom_the_node_trusts_or_the_caller_names(store: Store) -> None:
    async with world_of(store, is_trusted=False) as world, turn(world.shared):
        with pytest.raises(UnknownPublisherError):
            await world.client().open()
        assert await world.client().open(publisher=publisher().id)
        assert await world.client().open(ref=str(world.release.link()))
        with pytest.raises(NotFoundError):
            await world.client().open(publisher=publisher("other").id)
        with pytest.raises(UsageError):
            await world.client().open(publisher="me")


async def test_streams_are_bounded_and_end_with_their_connection(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "MAX_STREAMS_OF_RELEASE", 2)
    async with world_of(store) as world, turn(world.shared):
        first, second, third = (world.client() for _ in range(3))
        await first.open()
        with pytest.raises(UsageError):
            await first.open()
        await second.open()
        with pytest.raises(DeniedError):
            await third.open()
        # Other users of the machine have their own, and never take the owner's.
        await Client(world.streams, is_strangers=True).open()
        world.streams.end(first.session)
        world.streams.end(first.session)
        await third.open()


async def test_followers_hear_what_is_proven_until_the_fetch_has_ended(
    store: Store, autojump_clock: trio.testing.MockClock
) -> None:
    async with world_of(store) as world:
        client = world.client()
        results: list[Answer] = []

        async def follow(token: str) -> None:
            results.append(await client.call("follow", stream=token))

        async with trio.open_nursery() as nursery, turn(world.shared):
            token = await client.open()
            nursery.start_soon(follow, token)
            await trio.testing.wait_all_tasks_blocked()
            assert client.heard == []
            transfer = world.transfer("a.bin")
            world.prove(transfer, 1)
            await trio.sleep(1)
            owned = world.release.pieces.pieces_of("a.bin")
            assert client.heard[0]["wanted"] == [[owned.start, owned.stop]]
            assert client.proven == Ranges.of_ints([1])
            before = len(client.heard)
            # However many steps there are, ten a second are told.
            for number in range(2, 6):
                world.prove(transfer, number)
                await trio.sleep(0.01)
            await trio.sleep(1)
            assert client.proven == Ranges.span(1, 6)
            assert len(client.heard) - before <= 2
            world.shared.transfer = None
            world.shared.is_complete = True
        assert results[0].result["proven"] == [[0, world.release.pieces.total]]


async def test_a_follower_hears_why_a_fetch_ended(store: Store) -> None:
    async with world_of(store) as world:
        client = world.client()
        heard: list[str] = []

        async def follow(token: str) -> None:
            with pytest.raises(NoSpaceError) as caught:
                await client.call("follow", stream=token)
            heard.append(caught.value.message)

        async def fail() -> None:
            async with turn(world.shared):
                nursery.start_soon(follow, await client.open())
                await trio.testing.wait_all_tasks_blocked()
                raise NoSpaceError("full")

        async with trio.open_nursery() as nursery:
            with pytest.raises(NoSpaceError):
                await fail()
        assert heard == ["full"]


async def test_a_fetch_that_was_stopped_is_interrupted_for_its_followers(store: Store) -> None:
    async with world_of(store) as world:
        client = world.client()
        with trio.CancelScope() as scope:
            async with turn(world.shared):
                token = await client.open()
                scope.cancel()
                await trio.lowlevel.checkpoint()
        with pytest.raises(InterruptedFetchError):
            await client.call("follow", stream=token)


async def test_a_job_that_waits_is_still_followed_and_says_why(store: Store, autojump_clock: trio.testing.MockClock) -> None:
    async with world_of(store) as world:
        client = world.client()
        world.shared.jobs, world.shared.waits_for = 1, "no space: full"
        token = await client.open()
        with trio.move_on_after(5):
            await client.call("follow", stream=token)
        assert client.heard == [{"phase": "waiting", "note": "no space: full"}]
        world.shared.jobs = 0
        other = world.client()
        with pytest.raises(NotFoundError):
            await other.open()
        with pytest.raises(UsageError, match="followed already"):
            await client.call("follow", stream=token)


async def test_a_job_that_was_given_up_ends_its_streams(store: Store) -> None:
    async with world_of(store) as world:
        client = world.client()
        world.shared.jobs = 1
        token = await client.open()
        world.shared.jobs = 0
        with pytest.raises(UnavailableError):
            await client.call("follow", stream=token)


async def test_an_order_becomes_priorities_and_is_taken_back(store: Store) -> None:
    async with world_of(store) as world, turn(world.shared):
        one, two = world.client(), world.client()
        await one.open()
        await two.open()
        transfer = world.transfer("a.bin")
        await one.call("want", pieces=[[4, 6]])
        await two.call("want", pieces=[[0, 1]])
        assert world.swarm.told == [{4: 7, 5: 7}, {0: 7}]
        # A torrent that was added anew has forgotten everything.
        transfer.lives += 1
        await one.call("want", pieces=[[5, 6]])
        assert world.swarm.told[2] == {5: 7, 0: 7}
        world.prove(transfer, 0)
        world.streams.end(one.session)
        await trio.testing.wait_all_tasks_blocked()
        assert world.swarm.told[3:] == [{5: 4}]
        # Not part of this fetch: it must not be asked for.
        (apart,) = world.release.pieces.pieces_of("b.bin")
        await two.call("want", pieces=[[apart, apart + 1]])
        assert world.swarm.told[4:] == []
        with pytest.raises(UsageError):
            await two.call("want", pieces=[[0, world.release.pieces.total + 1]])
        with pytest.raises(UsageError, match="no stream"):
            await world.client().call("want", pieces=[])


async def test_a_file_is_a_read_only_descriptor_of_the_release_and_of_nothing_else(store: Store) -> None:
    async with world_of(store) as world, turn(world.shared):
        client = world.client()
        await client.open()
        world.transfer()
        staged = store.path(layout.data_of(world.release.info_hash)) / "a.bin"
        staged.parent.mkdir(mode=0o700, parents=True)
        staged.write_bytes(b"begun")
        (fd,) = (await client.call("file", path="a.bin")).fds
        assert os.pread(fd, 10, 0) == b"begun"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
        os.close(fd)
        for path in ("b.bin", "c.bin", "../a.bin", "/etc/passwd", ""):
            with pytest.raises(NotFoundError):
                await client.call("file", path=path)
