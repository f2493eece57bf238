"""The gateway without a network: names, policies, finished files, and files whose pieces are proven while a client waits."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trio.testing

from modelp2p.daemon.adopting import Source
from modelp2p.daemon.config import Config
from modelp2p.daemon.config import Gateway as GatewayConfig
from modelp2p.daemon.fetch import fetch
from modelp2p.daemon.following import Stream, Streams
from modelp2p.daemon.gateway import FIRST_BYTE_S, RETRY_AFTER_S, Gateway, load_token
from modelp2p.daemon.gateway_files import DROP_BYTES, HELD_BACK_BYTES, SILENCE_S
from modelp2p.daemon.hashing import HashPool
from modelp2p.daemon.http_connection import Request, Response
from modelp2p.daemon.jobs import Jobs
from modelp2p.daemon.library import Library
from modelp2p.daemon.memory_swarm import MemoryNetwork
from modelp2p.daemon.node import Node
from modelp2p.daemon.requests import FetchRequest, Target
from modelp2p.daemon.sealed import SealedCache
from modelp2p.daemon.store import Store
from modelp2p.daemon.watching import turn
from modelp2p.protocol import layout
from modelp2p.protocol.links import PeerAddress
from modelp2p.protocol.manifest import Origin
from modelp2p.protocol.names import Revision
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.statement import Release, Statement, verify_statement
from modelp2p.protocol.trust import TrustBook, TrustEntry
from tests.endtoend.site import weights
from tests.memory_node import SEED, Swarm
from tests.releases import Home, publisher, statement_of, write_files

if TYPE_CHECKING:
    from modelp2p.daemon.http_connection import Body
    from modelp2p.daemon.transfer import Transfer

MIB = 1 << 20
TOKEN = "0123456789abcdef" * 2
FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": weights("m", 5 * MIB + 5),
    "sub/empty.txt": b"",
    "train.py": b"print()\n",
}
WEIGHTS = FILES["model.safetensors"]


@dataclass
class Sink:
    """Takes a body, and says when each part came."""

    data: bytes = b""
    parts: list[tuple[int, float]] = field(default_factory=list)
    came: trio.Event = field(default_factory=trio.Event)

    async def send_file(self, fd: int, begin: int, end: int) -> None:
        await trio.lowlevel.checkpoint()
        self.data += os.pread(fd, end - begin, begin)
        self.parts.append((end - begin, trio.current_time()))
        self.came.set()
        self.came = trio.Event()

    async def send_data(self, data: bytes) -> None:
        raise AssertionError("the gateway serves files")


class Listener(Swarm):
    """A swarm that remembers what it was told about priorities."""

    def __init__(self) -> None:
        super().__init__(MemoryNetwork(), SEED)
        self.told: list[dict[int, int]] = []

    async def set_piece_priorities(self, info_hash: bytes, priorities: Mapping[int, int]) -> None:
        await trio.lowlevel.checkpoint()
        self.told.append(dict(priorities))


@dataclass
class World:
    """A gateway over a node."""

    node: Node
    gateway: Gateway
    streams: Streams
    release: Release
    seed: Node

    async def ask(self, path: str, method: str = "GET", *, token: str = TOKEN, **headers: str) -> Response:
        kept = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.gateway.handle(Request(method, f"/t/{token}{path}", kept, b""))

    async def json(self, path: str) -> Any:  # noqa: ANN401  # JSON
        response = await self.ask(path)
        assert response.status == 200
        assert isinstance(response.body, bytes)
        return json.loads(response.body)

    async def read(self, path: str, **headers: str) -> tuple[int, bytes]:
        response = await self.ask(path, **headers)
        return response.status, (await taken(response)).data

    async def stream(self) -> Stream:
        """The one reader of a file, once there is one and it waits."""
        while not self.streams._streams:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        (found,) = self.streams._streams.values()
        return found

    async def have(self) -> None:
        """Fetch everything from the seed."""
        statement = await trio.to_thread.run_sync(self.node.store.load_statement, self.release.digest)
        await fetch(self.node, FetchRequest(Target(statement=statement), allow_code=True), lambda event: None)

    def begin(self, *paths: str) -> SimpleNamespace:
        """As much of a `Transfer` as a reader looks at; its file is whole, and unproven."""
        staged = write_files(self.node.store.path(layout.data_of(self.release.info_hash)), {path: FILES[path] for path in paths})
        staged.chmod(0o700)
        folder = SimpleNamespace(release=self.release, state=SimpleNamespace(proven=Ranges()))
        found = SimpleNamespace(folder=folder, wanted=paths, lives=1)
        shared = self.node.of(self.release.info_hash)
        shared.transfer = cast("Transfer", found)
        shared.watch.ring()
        return found

    def prove(self, transfer: SimpleNamespace, path: str, *pieces: int) -> None:
        first = self.release.pieces.first(path)
        transfer.folder.state.proven = transfer.folder.state.proven.union(Ranges.of_ints(first + piece for piece in pieces))
        self.node.of(self.release.info_hash).watch.ring()


async def taken(response: Response) -> Sink:
    """The body of a response, sent to its end and closed."""
    sink = Sink()
    if isinstance(response.body, bytes):
        sink.data = response.body
    elif response.body is not None:
        try:
            await response.body.send(sink)
        finally:
            response.body.close()
    return sink


def headers(response: Response) -> Mapping[str, str]:
    return dict(response.headers)


@asynccontextmanager
async def world_of(
    tmp_path: Path,
    unknown: str = "deny",
    *,
    statement: Statement | None = None,
    is_trusted: bool = True,
) -> AsyncIterator[World]:
    """A node that knows a release and holds nothing of it, beside a seed that holds everything."""
    statement = statement or statement_of(FILES)
    release, network = verify_statement(statement), MemoryNetwork()
    source = os.open(write_files(tmp_path / "source", FILES), os.O_RDONLY | os.O_DIRECTORY)
    config = Config(gateway=GatewayConfig(unknown=unknown, origin="https://hub.example"))
    stores = [Store.open(tmp_path / name) for name in ("seed", "home")]
    try:
        async with HashPool(workers=1) as pool, trio.open_nursery() as nursery:
            swarms = [Swarm(network, SEED), Swarm(network, PeerAddress("127.0.0.1", 20_001))]
            nodes = [
                Node(store, Library(store), swarm, pool, config, peers)
                for store, swarm, peers in zip(stores, swarms, ([], [SEED]), strict=True)
            ]
            for node, swarm in zip(nodes, swarms, strict=True):
                if is_trusted:
                    node.book = TrustBook((TrustEntry("lab/*", publisher().id),))
                await nursery.start(swarm.run)
                await nursery.start(node.run)
            if is_trusted:
                request = FetchRequest(Target(statement=statement), allow_code=True)
                await fetch(nodes[0], request, lambda event: None, Source(source, ""))
            nodes[1].library.add(statement, release)
            streams = Streams(nodes[1], nursery, SealedCache())
            jobs = Jobs(nodes[1], nursery, lambda: None)
            yield World(nodes[1], Gateway(nodes[1], streams, jobs, TOKEN), streams, release, nodes[0])
            nursery.cancel_scope.cancel()
    finally:
        os.close(source)
        for store in stores:
            store.close()


@asynccontextmanager
async def quiet_world_of(tmp_path: Path, unknown: str = "deny") -> AsyncIterator[World]:
    """The same without a network, for tests whose clock jumps: nothing in it waits but the gateway."""
    statement = statement_of(FILES)
    release, store = verify_statement(statement), Store.open(tmp_path / "home")
    config = Config(gateway=GatewayConfig(unknown=unknown))
    try:
        async with trio.open_nursery() as nursery:
            node = Node(store, Library(store), Listener(), HashPool(workers=1), config, [])
            node.book = TrustBook((TrustEntry("lab/*", publisher().id),))
            node.library.add(statement, release)
            streams = Streams(node, nursery, SealedCache())
            yield World(node, Gateway(node, streams, Jobs(node, nursery, lambda: None), TOKEN), streams, release, node)
            nursery.cancel_scope.cancel()
    finally:
        store.close()


@pytest.mark.parametrize(
    "target", ["/", "/t", "/t/", "/t/x", f"/t/{TOKEN}x/lab/model", f"/x/{TOKEN}/a", "/lab/model/resolve/main/a"]
)
async def test_nothing_is_there_without_the_token(tmp_path: Path, target: str) -> None:
    async with quiet_world_of(tmp_path, "redirect") as world:
        response = await world.gateway.handle(Request("GET", target, {}, b""))
        # Not even where the rest would be sent elsewhere.
        assert response.status == 404


def test_a_token_is_made_once_for_each_home_and_is_the_owners(tmp_path: Path) -> None:
    homes = [Store.open(tmp_path / name) for name in "ab"]
    tokens = [load_token(home) for home in homes]
    assert [load_token(home) for home in homes] == tokens
    assert len({*tokens}) == 2
    assert all(len(bytes.fromhex(token)) == 16 for token in tokens)
    path = homes[0].path(layout.GATEWAY_TOKEN)
    assert path.stat().st_mode & 0o777 == 0o600
    # One that others could read, or that is none, or a link, is not used any more.
    path.chmod(0o644)
    second = load_token(homes[0])
    path.write_text("short\n")
    third = load_token(homes[0])
    path.unlink()
    path.symlink_to(homes[1].path(layout.GATEWAY_TOKEN))
    fourth = load_token(homes[0])
    assert len({*tokens, second, third, fourth}) == 5
    assert path.stat().st_mode & 0o777 == 0o600
    for home in homes:
        home.close()


async def test_names_are_answered_from_the_manifest_before_a_byte_is_here(tmp_path: Path) -> None:
    async with quiet_world_of(tmp_path) as world:
        commit = world.release.manifest.revision
        for path in (
            "/api/models/lab/model",
            f"/api/models/lab/model/revision/{commit}",
            f"/api/models/lab/model/revision/{commit[:9]}",
        ):
            assert (await world.json(path))["sha"] == commit
        listed = await world.json("/api/models/lab/model/tree/main?recursive=true")
        assert [row["path"] for row in listed if row["type"] == "file"] == sorted(FILES)
        assert (await world.json("/api/models/lab/model/refs"))["branches"][0]["targetCommit"] == commit
        head = await world.ask("/lab/model/resolve/main/model.safetensors", "HEAD")
        assert (head.status, headers(head)["Content-Length"], head.body) == (200, str(len(WEIGHTS)), None)
        assert headers(head)["X-Repo-Commit"] == commit
        # Known, not here: anything but "does not exist", which clients would remember.
        missing = await world.ask("/lab/model/resolve/main/model.safetensors")
        assert missing.status == 503
        assert "modelp2p fetch" in headers(missing)["X-Error-Message"]


NOT_HERE = {
    "another name": ("/api/models/lab/other", "RepoNotFound"),
    "no name at all": ("/api/models/..%2F..", "RepoNotFound"),
    "a file of another name": ("/lab/other/resolve/main/config.json", "RepoNotFound"),
    "another commit": ("/api/models/lab/model/revision/" + "0" * 40, "RevisionNotFound"),
    "a branch": ("/lab/model/resolve/dev/config.json", "RevisionNotFound"),
    "a pull request": ("/lab/model/resolve/refs%2Fpr%2F1/config.json", "RevisionNotFound"),
    "a file": ("/lab/model/resolve/main/adapter_config.json", "EntryNotFound"),
    "a path that climbs": ("/lab/model/resolve/main/..%2f..%2fjournal", "EntryNotFound"),
    "a path that climbs as it is": ("/lab/model/resolve/main/../../../journal", "EntryNotFound"),
    "a path that is quoted twice": ("/lab/model/resolve/main/%252e%252e/config.json", "EntryNotFound"),
    "a path to a file by way of a folder": ("/lab/model/resolve/main/sub/../config.json", "EntryNotFound"),
    "an absolute path": ("/lab/model/resolve/main//config.json", "EntryNotFound"),
    "a path with a zero byte": ("/lab/model/resolve/main/config.json%00", "EntryNotFound"),
    "a path with a line of its own": ("/lab/model/resolve/main/x%0d%0aX-Repo-Commit:%20x", "EntryNotFound"),
    "a folder as a file": ("/lab/model/resolve/main/sub", "EntryNotFound"),
}


@pytest.mark.parametrize(("path", "code"), NOT_HERE.values(), ids=NOT_HERE)
async def test_what_is_not_here_has_the_code_that_clients_know(tmp_path: Path, path: str, code: str) -> None:
    async with quiet_world_of(tmp_path) as world:
        for method in ("GET", "HEAD"):
            response = await world.ask(path, method)
            assert (response.status, headers(response)["X-Error-Code"]) == (404, code)
            assert ("X-Repo-Commit" in headers(response)) == (code == "EntryNotFound")


async def test_what_is_not_here_is_elsewhere_where_the_configuration_says_so(tmp_path: Path) -> None:
    async with quiet_world_of(tmp_path, "redirect") as world:
        for path, code in [*NOT_HERE.values(), ("/api/datasets/lab/data?x=1", "")]:
            response = await world.ask(path)
            if code == "EntryNotFound":
                # The release is here: what its manifest does not list does not exist.
                assert response.status == 404
            else:
                assert (response.status, headers(response)["Location"]) == (307, "https://huggingface.co" + path)
                assert TOKEN not in repr(response)


async def test_a_file_elsewhere_is_that_of_the_same_commit(tmp_path: Path) -> None:
    async with quiet_world_of(tmp_path, "redirect") as world:
        # Nobody elsewhere knows a content revision.
        assert (await world.ask("/lab/model/resolve/main/config.json")).status == 503
        commit, manifest = Revision("c" * 40), world.release.manifest
        origin = replace(manifest, revision=commit, origin=Origin("lab/model", commit))
        world.gateway._releases[world.release.digest] = replace(world.release, manifest=origin)
        response = await world.ask("/lab/model/resolve/main/sub/empty.txt")
        assert response.status == 200  # no byte of it is missing
        response = await world.ask("/lab/model/resolve/main/model.safetensors")
        location = f"https://huggingface.co/lab/model/resolve/{commit}/model.safetensors"
        assert (response.status, headers(response)["Location"]) == (307, location)


async def test_a_name_is_answered_only_for_whom_the_node_trusts(tmp_path: Path) -> None:
    async with quiet_world_of(tmp_path) as world:
        world.node.book = TrustBook()
        response = await world.ask("/api/models/lab/model")
        assert (response.status, headers(response)["X-Error-Code"]) == (404, "RepoNotFound")
        assert "trust" in headers(response)["X-Error-Message"]


async def test_main_is_the_newest_release(tmp_path: Path) -> None:
    async with quiet_world_of(tmp_path) as world:
        later = statement_of({**FILES, "config.json": b"{}"}, sequence=2)
        release = verify_statement(later)
        world.node.library.add(later, release)
        assert (await world.json("/api/models/lab/model"))["sha"] == release.manifest.revision
        old = world.release.manifest.revision
        assert (await world.json(f"/api/models/lab/model/revision/{old}"))["sha"] == old


async def test_fixed_answers(tmp_path: Path) -> None:
    async with quiet_world_of(tmp_path) as world:
        assert (await world.ask("/api/agent-harnesses")).status == 404
        assert (await world.ask("/api/whoami-v2")).status == 401
        assert (await world.ask("/api/spaces/lab/x")).status == 404
        assert (await world.ask("/lab/model/resolve/main/%ff")).status == 400
        upload = await world.ask("/api/models/lab/model/commit/main", "POST")
        assert upload.status == 403
        assert "read-only" in headers(upload)["X-Error-Message"]
        paths = Request("POST", f"/t/{TOKEN}/api/models/lab/model/paths-info/main", {}, b"paths=sub&paths=x")
        body = (await world.gateway.handle(paths)).body
        assert isinstance(body, bytes)
        assert [row["path"] for row in json.loads(body)] == ["sub"]
        large = Request("POST", f"/t/{TOKEN}/api/models/lab/model/paths-info/main", {}, None)
        assert (await world.gateway.handle(large)).status == 413


@pytest.mark.slow
async def test_finished_files_are_served_and_changed_ones_are_not(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        await world.have()
        path = "/lab/model/resolve/main/model.safetensors"
        assert await world.read(path) == (200, WEIGHTS)
        assert await world.read(path, range="bytes=5-9") == (206, WEIGHTS[5:10])
        assert await world.read(path, range="bytes=-5") == (206, WEIGHTS[-5:])
        assert (await world.ask(path, range=f"bytes={len(WEIGHTS)}-")).status == 416
        empty = await world.ask("/lab/model/resolve/main/sub/empty.txt")
        assert (empty.status, empty.body, headers(empty)["Content-Length"]) == (200, None, "0")
        # Also where another release comes: the record is read again.
        tree = world.node.store.path(layout.tree_of(world.release.info_hash, world.release.manifest.revision))
        (tree / "config.json").chmod(0o644)
        (tree / "config.json").write_bytes(b'{"a": 2}')
        assert (await world.ask("/lab/model/resolve/main/config.json")).status == 503
        (tree / "model.safetensors").unlink()
        (tree / "model.safetensors").symlink_to("/etc/passwd")
        assert (await world.ask(path)).status == 503


@pytest.mark.slow
async def test_a_borrowed_file_that_changes_while_it_is_sent_is_cut_off(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        await world.have()
        store, info_hash = world.node.store, world.release.info_hash
        record = store.load_record(info_hash)
        assert record is not None
        files = {path: replace(item, borrowed=True) for path, item in record.files.items()}
        store.save_record(replace(record, files=files))
        response = await world.ask("/lab/model/resolve/main/model.safetensors")
        tree = store.path(layout.tree_of(info_hash, record.revision))
        os.utime(tree / "model.safetensors", ns=(1, 1))
        assert len((await taken(response)).data) < len(WEIGHTS)


@pytest.mark.slow
async def test_a_known_release_is_fetched_for_who_asks_where_the_configuration_says_so(tmp_path: Path) -> None:
    async with world_of(tmp_path, "fetch") as world:
        assert await world.read("/lab/model/resolve/main/model.safetensors") == (200, WEIGHTS)
        # All of it, in one job; programs are left out as the policy has it.
        while world.node.of(world.release.info_hash).jobs:
            await world.node.of(world.release.info_hash).watch.wait()
        assert await world.read("/lab/model/resolve/main/config.json") == (200, FILES["config.json"])
        refused = await world.ask("/lab/model/resolve/main/train.py")
        assert refused.status == 403
        assert "allow_code" in headers(refused)["X-Error-Message"]
        assert (await world.ask("/lab/other/resolve/main/config.json")).status == 404


async def test_pieces_are_asked_for_in_the_order_of_the_request_and_sent_as_they_are_proven(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with quiet_world_of(tmp_path) as world, turn(world.node.of(world.release.info_hash)):
        transfer = world.begin("model.safetensors")
        first = world.release.pieces.first("model.safetensors")
        sink, response = Sink(), []

        async def get() -> None:
            response.append(await world.ask("/lab/model/resolve/main/model.safetensors", range=f"bytes={MIB + 3}-{4 * MIB + 1}"))
            body = cast("Body", response[0].body)
            await body.send(sink)
            body.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(get)
            stream = await world.stream()
            assert stream.wishes == ((first + 1, first + 5),)
            world.prove(transfer, "model.safetensors", 0, 2)
            await trio.sleep(FIRST_BYTE_S / 2)
            assert not response
            world.prove(transfer, "model.safetensors", 1)
            await sink.came.wait()
            # The first byte waited for its own piece; then everything came that could, but for what keeps the line alive.
            assert response[0].status == 206
            assert sink.data == WEIGHTS[MIB + 3 : 3 * MIB - HELD_BACK_BYTES]
            world.prove(transfer, "model.safetensors", 3, 4)
        assert sink.data == WEIGHTS[MIB + 3 : 4 * MIB + 2]
        assert world.streams._streams == {}


async def test_what_was_ordered_stays_in_force_until_the_reader_has_gone(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with quiet_world_of(tmp_path) as world, turn(world.node.of(world.release.info_hash)):
        world.begin("model.safetensors")

        async def ring() -> None:
            while True:  # other pieces arrive all the time
                world.node.of(world.release.info_hash).watch.ring()
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ring)
            assert (await world.ask("/lab/model/resolve/main/model.safetensors", range="bytes=0-9")).status == 429
            nursery.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        swarm, first = world.node.swarm, world.release.pieces.first("model.safetensors")
        assert isinstance(swarm, Listener)
        # libtorrent forgets: it is told again, at least every second and a bit.
        assert FIRST_BYTE_S / 1.5 < len(swarm.told) < FIRST_BYTE_S * 1.5
        assert all(told == {first: 7} for told in swarm.told[:-1])
        assert swarm.told[-1] == {first: 4}


async def test_an_answer_is_never_silent_for_long_and_then_ends(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with quiet_world_of(tmp_path) as world, turn(world.node.of(world.release.info_hash)):
        transfer = world.begin("model.safetensors")
        world.prove(transfer, "model.safetensors", 0)
        sink = await taken(await world.ask("/lab/model/resolve/main/model.safetensors"))
        # Nobody had the second piece: drops of what was held back, then the end.
        assert sink.data == WEIGHTS[:MIB]
        times = [when for _, when in sink.parts]
        assert max(later - earlier for earlier, later in pairwise(times)) < SILENCE_S
        assert len(times) == 1 + HELD_BACK_BYTES // DROP_BYTES
        assert SILENCE_S <= trio.current_time() - times[-1] <= SILENCE_S + 2


async def test_who_asks_too_early_is_told_when_to_come_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with quiet_world_of(tmp_path) as world, turn(world.node.of(world.release.info_hash)):
        world.begin("model.safetensors")
        started = trio.current_time()
        response = await world.ask("/lab/model/resolve/main/model.safetensors")
        assert (response.status, headers(response)["Retry-After"]) == (429, str(RETRY_AFTER_S))
        assert FIRST_BYTE_S <= trio.current_time() - started < SILENCE_S
        old = await world.ask(
            "/lab/model/resolve/main/model.safetensors", user_agent="unknown/None; hf_hub/0.36.2; python/3.11.7"
        )
        assert (old.status, headers(old)["Retry-After"]) == (503, str(RETRY_AFTER_S))
        assert not world.streams._streams
        # What this fetch does not ask for will not come by it.
        other = await world.ask("/lab/model/resolve/main/config.json")
        assert other.status == 503


async def test_a_fetch_that_ends_ends_its_readers(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with quiet_world_of(tmp_path) as world:
        shared, sink = world.node.of(world.release.info_hash), Sink()

        async def get() -> None:
            response = await world.ask("/lab/model/resolve/main/model.safetensors")
            body = cast("Body", response.body)
            await body.send(sink)
            body.close()

        async with trio.open_nursery() as nursery, turn(shared):
            transfer = world.begin("model.safetensors")
            nursery.start_soon(get)
            await trio.testing.wait_all_tasks_blocked()
            world.prove(transfer, "model.safetensors", 0, 1)
            await sink.came.wait()
            shared.transfer = None
        assert sink.data == WEIGHTS[: 2 * MIB - HELD_BACK_BYTES]


async def test_what_is_complete_when_a_fetch_ends_is_sent_to_its_end(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with quiet_world_of(tmp_path) as world:
        shared, sink = world.node.of(world.release.info_hash), Sink()

        async def get() -> None:
            response = await world.ask("/lab/model/resolve/main/model.safetensors", range=f"bytes=7-{len(WEIGHTS) - 2}")
            body = cast("Body", response.body)
            await body.send(sink)
            body.close()

        async with trio.open_nursery() as nursery, turn(shared):
            transfer = world.begin("model.safetensors")
            nursery.start_soon(get)
            await world.stream()
            world.prove(transfer, "model.safetensors", 0, 1)
            await sink.came.wait()
            tree = world.node.store.path(layout.tree_of(world.release.info_hash, world.release.manifest.revision))
            write_files(tree, FILES)
            Home(tmp_path / "home").record(world.release)
            shared.transfer = None
        assert sink.data == WEIGHTS[7:-1]


async def test_a_job_that_waits_says_why_at_once(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with quiet_world_of(tmp_path) as world:
        started = trio.current_time()
        shared = world.node.of(world.release.info_hash)
        shared.jobs, shared.waits_for = 1, "no space: 3 bytes are free"
        response = await world.ask("/lab/model/resolve/main/config.json")
        assert response.status == 503
        assert "no space: 3 bytes are free" in headers(response)["X-Error-Message"]
        assert trio.current_time() == started


async def test_a_reader_that_leaves_gives_its_stream_back(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with quiet_world_of(tmp_path) as world, turn(world.node.of(world.release.info_hash)):
        world.begin("model.safetensors")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.ask, "/lab/model/resolve/main/model.safetensors")
            await world.stream()
            nursery.cancel_scope.cancel()
        assert not world.streams._streams
