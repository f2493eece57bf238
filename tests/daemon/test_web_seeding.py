"""Web seeds of a fetch: what the swarm is told and when, and whole fetches over real libtorrent from web servers on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from modelp2p.daemon.adopting import Source
from modelp2p.daemon.config import Config, WebSeeds
from modelp2p.daemon.config import Gateway as GatewayConfig
from modelp2p.daemon.fetch import fetch
from modelp2p.daemon.hashing import HashPool
from modelp2p.daemon.library import Library
from modelp2p.daemon.memory_swarm import MemoryNetwork, MemorySwarm
from modelp2p.daemon.node import Node
from modelp2p.daemon.origin import OriginClient
from modelp2p.daemon.relay import Relay
from modelp2p.daemon.requests import FetchRequest, Target
from modelp2p.daemon.store import Store
from modelp2p.daemon.supervisor import EngineFolders, EngineSwarm
from modelp2p.daemon.web_seeding import MAX_TOKEN_BYTES, TICK_S, WebSeeding, _client_of, allowed_origins
from modelp2p.protocol import layout
from modelp2p.protocol.engine_wire import Peer, TorrentFile, TorrentSpec, WebSeedFailed, pack_bits
from modelp2p.protocol.errors import NotFoundError, StoreError, TimedOutError, UsageError
from modelp2p.protocol.statement import verify_statement
from modelp2p.protocol.trust import TrustBook, TrustEntry
from modelp2p.protocol.webseeds import ENOUGH_BYTES, FIRST_REST_S, OriginError, WebOrigin
from tests.daemon.swarming import NAME, PIECE, RealWorld, Shared, quiet_settings, running
from tests.origins import RIGHT, Asked, Origin, Reply, redirect
from tests.releases import publisher, statement_of, write_files
from tests.sizes import seeded_bytes

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map
    from modelp2p.protocol.statement import Statement

PATIENCE_S = 5.0
SOON_S = TICK_S + 0.1
"""After this long everything that is due was done."""
FILES = {"a.txt": seeded_bytes("a", 100), "b.txt": seeded_bytes("b", 200)}
RELEASE = verify_statement(statement_of(FILES))
TWO = (WebOrigin("https://a.example/", "a.example"), WebOrigin("https://b.example/", "b.example"))


@dataclass
class Directed:
    """A web seeding over a swarm that remembers what it was told."""

    swarm: MemorySwarm
    seeding: WebSeeding
    made: list[OriginClient]

    @property
    def used(self) -> list[int]:
        """Which origins the engine has."""
        urls = self.swarm.web_seeds.get(RELEASE.info_hash, ())
        return sorted({int(url.split("/")[5]) for url in urls})

    @property
    def urls(self) -> tuple[str, ...]:
        return self.swarm.web_seeds[RELEASE.info_hash]


@asynccontextmanager
async def directed(tmp_path: Path, origins: tuple[WebOrigin, ...] = TWO) -> AsyncIterator[Directed]:
    swarm, relay, made = MemoryNetwork().join(), Relay(), []
    files = tuple(TorrentFile(path, len(data), str(tmp_path / path)) for path, data in FILES.items())
    pieces = RELEASE.pieces.total
    spec = TorrentSpec(
        RELEASE.info_hash,
        RELEASE.torrent_bytes(),
        str(tmp_path),
        RELEASE.manifest.piece_length,
        files,
        pack_bits([False] * pieces),
    )

    async def make_client() -> OriginClient:
        await trio.lowlevel.checkpoint()
        made.append(OriginClient())
        return made[-1]

    seeding = WebSeeding(swarm, relay, RELEASE, origins, make_client, PATIENCE_S)
    async with trio.open_nursery() as nursery:
        await nursery.start(swarm.run)
        await nursery.start(relay.run)
        await swarm.add(spec)
        nursery.start_soon(_drain, swarm)
        nursery.start_soon(seeding.run)
        yield Directed(swarm, seeding, made)
        await seeding.aclose()
        nursery.cancel_scope.cancel()


async def _drain(swarm: MemorySwarm) -> None:
    async for _ in swarm.events:
        pass


async def test_origins_are_used_after_a_silence_and_left_when_peers_deliver(tmp_path: Path, autojump_clock: object) -> None:
    async with directed(tmp_path) as world:
        await trio.sleep(PATIENCE_S - 0.5)
        assert (world.used, world.made) == ([], [])
        await trio.sleep(0.5 + SOON_S)
        assert world.used == [0, 1]
        world.seeding.count(ENOUGH_BYTES, 0)
        await trio.sleep(SOON_S)
        assert world.used == []
        assert (world.seeding.from_peers, world.seeding.from_web) == (ENOUGH_BYTES, 0)
        await trio.sleep(PATIENCE_S)
        assert world.used == [0, 1]
        # What asks them is made once.
        assert len(world.made) == 1


async def test_an_origin_that_rests_is_taken_out_and_set_anew(tmp_path: Path, autojump_clock: object) -> None:
    async with directed(tmp_path) as world:
        await trio.sleep(PATIENCE_S + SOON_S)
        world.seeding._report(0, OriginError("429", 30.0))
        await trio.testing.wait_all_tasks_blocked()
        assert world.used == [1]
        assert world.seeding.reason.startswith("origin a.example: 429 until ")
        await trio.sleep(30 + SOON_S)
        assert world.used == [0, 1]
        assert world.seeding.reason == ""


async def test_an_origin_that_delivers_in_between_rests_no_longer_than_before(tmp_path: Path, autojump_clock: object) -> None:
    async with directed(tmp_path) as world:
        await trio.sleep(PATIENCE_S + SOON_S)
        for _ in range(3):
            world.seeding._report(0, OriginError("500"))
            await trio.sleep(FIRST_REST_S + SOON_S)
            assert world.used == [0, 1]
            world.seeding._report(0, None)


async def test_what_the_engine_says_of_a_web_seed_counts(tmp_path: Path, autojump_clock: object) -> None:
    async with directed(tmp_path) as world:
        await trio.sleep(PATIENCE_S + SOON_S)
        first, second, *_ = world.urls
        world.seeding.failed(WebSeedFailed(RELEASE.info_hash, second, "sent bytes", True))
        world.seeding.failed(WebSeedFailed(RELEASE.info_hash, first, "no answer", False))
        world.seeding.failed(WebSeedFailed(RELEASE.info_hash, "http://127.0.0.1:1/other", "an older one", True))
        await trio.testing.wait_all_tasks_blocked()
        assert world.used == []
        await trio.sleep(1000)
        assert world.used == [0]
        # A ban counts for one that was taken out, too; a failure does not.
        world.seeding._report(0, OriginError("429", 1.0))
        await trio.testing.wait_all_tasks_blocked()
        world.seeding.failed(WebSeedFailed(RELEASE.info_hash, first, "an old one", False))
        await trio.sleep(1 + SOON_S)
        assert world.used == [0]
        world.seeding._report(0, OriginError("429", 1.0))
        await trio.testing.wait_all_tasks_blocked()
        world.seeding.failed(WebSeedFailed(RELEASE.info_hash, first, "sent bytes", True))
        await trio.sleep(1000)
        assert world.used == []
        assert world.seeding.reason.endswith("origin b.example: sent wrong bytes, not asked again")


async def test_a_new_engine_is_told_again(tmp_path: Path, autojump_clock: object) -> None:
    async with directed(tmp_path) as world:
        await trio.sleep(PATIENCE_S + SOON_S)
        world.swarm.web_seeds.clear()
        world.seeding.added()
        await trio.testing.wait_all_tasks_blocked()
        assert world.used == [0, 1]


async def test_a_hold_ends_with_the_torrent_that_was_held(tmp_path: Path, autojump_clock: object) -> None:
    async with directed(tmp_path) as world:
        await trio.sleep(PATIENCE_S + SOON_S)
        world.seeding.hold(True)
        world.swarm.web_seeds.clear()
        world.seeding.added()  # a torrent that is added anew runs free, and nobody says so once more
        world.seeding.count(ENOUGH_BYTES, 0)
        await trio.sleep(SOON_S)
        assert world.used == []
        await trio.sleep(PATIENCE_S)
        assert world.used == [0, 1]


async def test_a_release_without_origins_opens_nothing(tmp_path: Path, autojump_clock: object) -> None:
    async with directed(tmp_path, ()) as world:
        await trio.sleep(100)
        assert (world.made, world.swarm.web_seeds) == ([], {})
        world.seeding.count(100, 30)
        assert (world.seeding.from_peers, world.seeding.from_web) == (70, 0)


def test_the_configuration_says_which_origins_may_be_asked() -> None:
    manifest = verify_statement(statement_of(FILES, web_seeds=("https://a.example/", "http://mirror:80/"))).manifest
    asked = {
        "https only": Config(),
        "a mirror": Config(web_seeds=WebSeeds(hosts=("Mirror:80",))),
        "none": Config(web_seeds=WebSeeds(enabled=False, hosts=("mirror",))),
    }
    assert [[origin.shown for origin in allowed_origins(manifest, config)] for config in asked.values()] == [
        ["a.example"],
        ["a.example", "mirror"],
        [],
    ]


@pytest.mark.parametrize("data", [b"", b"\n", b"two words", b"hf_x\r\nX-Evil: 1", b"\xff", b"a" * (MAX_TOKEN_BYTES + 1)])
def test_a_file_that_holds_no_token_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "token").write_bytes(data)
    with pytest.raises(UsageError):
        _client_of(Config(web_seeds=WebSeeds(token_file=str(tmp_path / "token"))))


def test_a_token_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="token file"):
        _client_of(Config(web_seeds=WebSeeds(token_file=str(tmp_path / "token"))))


def test_authorities_that_cannot_be_read_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authorities"))
    with pytest.raises(NotFoundError, match="authorities"):
        _client_of(Config())
    (tmp_path / "authorities").write_text("none\n")
    with pytest.raises(StoreError, match="authorities"):
        _client_of(Config())


@pytest.mark.slow
def test_a_daemon_starts_without_the_http_client() -> None:
    code = "import sys, modelp2p.daemon.main; sys.exit('httpcore2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Whole fetches

TOKEN = "hf_secret"
MIB = 1 << 20
BLOCK = 16 << 10


@dataclass
class World:
    """A node with a real engine, and an origin of everything that it fetches."""

    nursery: trio.Nursery
    folder: Path
    origin: Origin
    store: Origin
    """Where the origin may redirect to; it serves the same."""
    contents: dict[str, bytes]
    node: Node = field(init=False)
    told: list[Map] = field(default_factory=list)

    def release(self, name: str, files: Mapping[str, bytes], base: str = "") -> Statement:
        """A release that the origin has, with the origin as its web seed."""
        statement = statement_of(files, name=f"lab/{name}", web_seeds=(base or f"{self.origin.url}/{name}/resolve/",))
        revision = verify_statement(statement).manifest.revision
        self.contents.update({f"/{name}/resolve/{revision}/{path}": data for path, data in files.items()})
        return statement

    async def start(self, name: str, config: Config) -> Node:
        store = Store.open(self.folder / name)
        folders = EngineFolders(
            str(store.home / layout.DATA), (str(store.home / layout.STORE), str(store.home / layout.MANIFESTS))
        )
        swarm = EngineSwarm(quiet_settings(), folders, first_backoff_s=0.05)
        pool = await self.nursery.start(_pool)
        node = Node(store, Library(store), swarm, pool, config, [])
        node.book = TrustBook((TrustEntry("lab/*", publisher().id),))
        await self.nursery.start(swarm.run)
        await self.nursery.start(node.run)
        return node

    async def fetch(self, statement: Statement, timeout_s: float = 60.0, *, peers_only: bool = False) -> Map:
        self.origin.asked.clear()
        self.store.asked.clear()
        self.told.clear()
        request = FetchRequest(Target(statement=statement), timeout_s=timeout_s, allow_code=True, peers_only=peers_only)
        return await fetch(self.node, request, self.told.append)

    def holds(self, result: Map, files: Mapping[str, bytes]) -> bool:
        return all((Path(str(result["path"])) / path).read_bytes() == data for path, data in files.items())

    async def heard(self, words: str) -> None:
        """Until the fetch under way says so of its origins."""
        while not any(words in str(event.get("origin", "")) for event in self.told):  # noqa: ASYNC110  # nothing else tells
            await trio.sleep(0.05)


async def _pool(*, task_status: trio.TaskStatus[HashPool]) -> None:
    async with HashPool(workers=1) as pool:
        task_status.started(pool)
        await trio.sleep_forever()


@asynccontextmanager
async def world_of(tmp_path: Path) -> AsyncIterator[World]:
    contents: dict[str, bytes] = {}
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with Origin(contents) as origin, Origin(contents, host="localhost") as store:
        seeds = WebSeeds(hosts=(origin.place, store.place), token_file=str(tmp_path / "token"), patience_s=0.1)
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                world = World(nursery, tmp_path, origin, store, contents)
                world.node = await world.start("home", Config(web_seeds=seeds, gateway=GatewayConfig(origin=origin.url)))
                yield world
                with trio.CancelScope(shield=True):
                    await world.node.swarm.aclose()
                nursery.cancel_scope.cancel()


@pytest.mark.swarm
async def test_the_engine_names_a_web_seed_that_fails_as_it_was_set_and_revives_it_when_it_is_set_again(tmp_path: Path) -> None:
    shared = Shared({"a/b c%+.bin": seeded_bytes("b", 5 * PIECE + 7), "a.txt": seeded_bytes("a", 100)})
    contents = {f"/x/{NAME}/{path}": data for path, data in shared.contents.items()}
    with Origin(contents, lambda _: Reply(404)) as origin, Origin(contents, lambda _: Reply(503)) as other:
        async with running(RealWorld().make(tmp_path), tmp_path) as node:
            await node.swarm.add(shared.spec(node.folder, have=False))
            for bad in (origin, other):
                url = f"{bad.url}/x/"
                await node.swarm.set_web_seeds(shared.info_hash, [url])
                failed = await node.wait_for(WebSeedFailed, lambda event, url=url: event.url == url)  # type: ignore[misc]
                assert not failed.is_banned
            other.respond = lambda _: RIGHT
            await node.swarm.set_web_seeds(shared.info_hash, [url])
            await node.wait_files(shared.contents)


@pytest.mark.swarm
async def test_without_peers_the_origin_carries_a_fetch_whatever_happens_on_the_way(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        origin, store = world.origin, world.store

        # Names that need quoting, an empty file, one that is larger than a piece.
        files = {"sub dir/a b+%20#1?ä.bin": seeded_bytes("odd", 3 * MIB + 5), "config.json": b"{}", "empty": b"", "x.txt": b"x"}
        result = await world.fetch(world.release("odd", files))
        assert (result["state"], result["from_web"], result["from_peers"]) == ("complete", 3 * MIB + 8, 0)
        assert world.holds(result, files)
        assert origin.tokens == {f"Bearer {TOKEN}"}

        # A release of one file, in a folder or not, with a last piece that is whole or not; and by the address of the file.
        for name, path, size in (
            ("one", "a b.gguf", MIB),
            ("part", "a.gguf", 5),
            ("deep", "d e/a.gguf", 5),
            ("whole", "a.gguf", 6),
        ):
            files = {path: seeded_bytes(name, size)}
            revision = verify_statement(statement_of(files, name=f"lab/{name}")).manifest.revision
            base = f"{origin.url}/whole/resolve/{revision}/{path}" if name == "whole" else ""
            result = await world.fetch(world.release(name, files, base))
            assert (result["from_web"], world.holds(result, files)) == (size, True)

        # It is too busy for a while.
        files = {f"{number}.bin": seeded_bytes(f"busy{number}", 5000) for number in range(3)}
        refused: list[Asked] = []

        def busy(asked: Asked) -> Reply:
            refused.append(asked)
            return Reply(429, (("Retry-After", "1"),)) if len(refused) in (1, 3) else RIGHT

        origin.respond = busy
        result = await world.fetch(world.release("busy", files))
        assert (result["from_web"], world.holds(result, files)) == (15_000, True)
        assert any("429 until" in str(event.get("origin")) for event in world.told)

        # Gated, with files in a store whose addresses expire after two questions.
        files = {f"{number}.bin": seeded_bytes(f"gated{number}", MIB + 1) for number in range(3)}
        used: dict[str, int] = {}

        def gate(asked: Asked) -> Reply:
            used[signature := f"sig{len(used)}"] = 0
            return redirect(f"{store.url}{asked.target}?{signature}") if asked.token == f"Bearer {TOKEN}" else Reply(401)

        def expire(asked: Asked) -> Reply:
            signature = asked.target.partition("?")[2]
            used[signature] += 1
            return RIGHT if used[signature] < 3 else Reply(403)

        origin.respond, store.respond = gate, expire
        result = await world.fetch(world.release("gated", files))
        assert (result["from_web"], world.holds(result, files)) == (3 * MIB + 3, True)
        assert (origin.tokens, store.tokens) == ({f"Bearer {TOKEN}"}, {None})

        # The engine dies while the origin is slow.
        files = {"slow.bin": seeded_bytes("slow", 2 * MIB), "fast.bin": seeded_bytes("fast", MIB)}
        wait = threading.Event()
        origin.respond = lambda asked: Reply(wait=wait) if "slow" in asked.target else RIGHT
        statement = world.release("dies", files)
        results: list[Map] = []

        async def run() -> None:
            results.append(await world.fetch(statement))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            while not any("slow" in asked.target for asked in origin.asked):  # noqa: ASYNC110  # it is another thread
                await trio.sleep(0.02)
            os.kill(world.node.swarm.statistics().engine_pid, signal.SIGKILL)
            wait.set()
        assert world.node.engine_deaths == 1
        assert (results[0]["from_peers"], world.holds(results[0], files)) == (0, True)

        # Not asked where that is not wished, and named where it is to blame.
        files = {"never.bin": seeded_bytes("never", 1000)}
        statement = world.release("never", files)
        with pytest.raises(TimedOutError) as caught:
            await world.fetch(statement, 1.0, peers_only=True)
        assert (origin.asked, "Web seeds" in caught.value.hint) == ([], False)
        origin.respond = lambda _: Reply(500)
        with pytest.raises(TimedOutError) as caught:
            await world.fetch(statement, 4.0)
        assert f"Web seeds: origin {origin.place}: 500 until " in caught.value.hint


@pytest.mark.swarm
async def test_beside_a_peer_the_origin_is_not_used_and_wrong_bytes_end_its_use(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        origin = world.origin
        seed = await world.start("seed", Config())
        peer = Peer("127.0.0.1", (await seed.swarm.wait_listening()).port)

        async def give(statement: Statement, files: Mapping[str, bytes]) -> None:
            fd = os.open(write_files(tmp_path / statement.digest.hex(), files), os.O_RDONLY | os.O_DIRECTORY)
            try:
                await fetch(seed, FetchRequest(Target(statement=statement), allow_code=True), lambda _: None, Source(fd, ""))
            finally:
                os.close(fd)

        async def fetched(statement: Statement, meet: Callable[[bytes], Awaitable[None]]) -> Map:
            results: list[Map] = []
            info_hash = verify_statement(statement).info_hash

            async def run() -> None:
                results.append(await world.fetch(statement))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await meet(info_hash)
            return results[0]

        files = {"a.bin": seeded_bytes("peer", 5 * MIB), "b.bin": seeded_bytes("peer2", MIB)}
        statement = world.release("peer", files)
        await give(statement, files)
        world.node.config = world.node.config.replace({"web_seeds.patience_s": 5.0})

        async def at_once(info_hash: bytes) -> None:
            while (transfer := world.node.of(info_hash).transfer) is None or not transfer.lives:  # noqa: ASYNC110  # nothing tells
                await trio.sleep(0.01)
            await world.node.swarm.connect(info_hash, [peer])

        result = await fetched(statement, at_once)
        assert (result["from_web"], result["from_peers"], world.holds(result, files)) == (0, 6 * MIB, True)
        assert origin.asked == []

        # Only the origin is there at first, and it lies.
        files = {"a.bin": seeded_bytes("lie", 3 * MIB), "b.bin": seeded_bytes("lie2", 2 * MIB)}
        statement = world.release("lie", files)
        await give(statement, files)
        world.node.config = world.node.config.replace({"web_seeds.patience_s": 0.1})

        def lie(asked: Asked) -> Reply:
            first, last = map(int, str(asked.range).removeprefix("bytes=").split("-"))
            return Reply(content=bytes(last + 1 - first))

        origin.respond = lie
        asked_by_then: list[int] = []

        async def when_banned(info_hash: bytes) -> None:
            await world.heard("sent wrong bytes")
            asked_by_then.append(len(origin.asked))
            await world.node.swarm.connect(info_hash, [peer])

        result = await fetched(statement, when_banned)
        assert world.holds(result, files)
        # Of the last block before its connection ended nobody counts what came of it as waste.
        assert int(str(result["from_web"])) < BLOCK
        assert abs(int(str(result["from_peers"])) - 5 * MIB) < BLOCK
        assert asked_by_then == [len(origin.asked)]
        with trio.CancelScope(shield=True):
            await seed.swarm.aclose()
