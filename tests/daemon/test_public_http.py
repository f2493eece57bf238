"""The public listener over real sockets and a node without a network: what everybody gets, and what nobody learns."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import pytest
import trio

from modelp2p.daemon import http_connection
from modelp2p.daemon.config import Config
from modelp2p.daemon.config import PublicHttp as PublicHttpConfig
from modelp2p.daemon.hashing import HashPool
from modelp2p.daemon.httpd import HttpServer
from modelp2p.daemon.library import Library
from modelp2p.daemon.memory_swarm import MemoryNetwork
from modelp2p.daemon.node import Node
from modelp2p.daemon.public_door import PER_VISITOR, PublicDoor
from modelp2p.daemon.public_http import PublicHttp
from modelp2p.daemon.store import Store
from modelp2p.protocol import layout
from modelp2p.protocol.errors import UnavailableError, UsageError
from modelp2p.protocol.publisher import decode_chain
from modelp2p.protocol.statement import Release, decode_bundle, verify_statement
from modelp2p.protocol.trust import TrustBook, TrustEntry
from tests.daemon.test_httpd import Answer, Client
from tests.memory_node import SEED, Swarm
from tests.releases import Home, publisher, statement_of

FILES = {
    "config.json": b'{"a": 1}',
    "empty": b"",
    "sub/x y+#%.txt": b"odd\n",
    "sub/\u00fcber.txt": b"also odd\n",
    "weights.bin.gguf": b"GGUF" + bytes(range(256)) * 5000,
}
WEIGHTS = FILES["weights.bin.gguf"]


@dataclass
class World:
    """A node whose public listener is up; nothing in its store is held by anybody else."""

    node: Node
    home: Home
    port: int

    def add(self, files: Mapping[str, bytes], *, name: str = "lab/model", sequence: int = 1, is_complete: bool = True) -> Release:
        """Put a release into the store, as a fetch that ended does."""
        statement = statement_of(files, name=name, sequence=sequence)
        release = verify_statement(statement)
        self.home.add(statement, files)
        self.node.library.add(statement, release)
        self.node.of(release.info_hash).is_complete = is_complete
        return release

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            yield Client(stream, self.port)

    async def ask(self, target: str, method: str = "GET", **headers: str) -> Answer:
        async with self.client() as client:
            lines = [f"Host: 127.0.0.1:{self.port}", *(f"{name.replace('_', '-')}: {text}" for name, text in headers.items())]
            await client.say("\n".join([f"{method} {target}", *lines]))
            return await client.hear(method)


@asynccontextmanager
async def world_of(tmp_path: Path, **settings: tuple[str, ...]) -> AsyncIterator[World]:
    store = Store.open(tmp_path / "home")
    config = Config(public_http=PublicHttpConfig(True, **{"listen": ("127.0.0.1:0",), **settings}))
    node = Node(store, Library(store), Swarm(MemoryNetwork(), SEED), HashPool(workers=1), config, [])
    node.book = TrustBook((TrustEntry("lab/*", publisher().id),))
    public = PublicHttp(node)
    try:
        async with trio.open_nursery() as nursery:
            server = HttpServer(public.handle, door=PublicDoor(config.public_http))
            port = await nursery.start(server.serve)
            with trio.fail_after(30):
                yield World(node, Home(store.home), port)
            nursery.cancel_scope.cancel()
    finally:
        public.close()
        store.close()


async def test_every_file_of_a_release_is_where_a_web_seed_has_it(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        base = f"/lab/model/resolve/{world.add(FILES).manifest.revision}"
        for path, data in FILES.items():
            escaped = f"{base}/{quote(path, safe='/')}"
            answer = await world.ask(escaped)
            assert (answer.status, answer.body, answer.is_whole) == (200, data, True)
            assert answer.headers["content-type"] == "application/octet-stream"
            assert answer.headers["x-content-type-options"] == "nosniff"
            # The same file by other spellings of its name: libtorrent's hexadecimal is in small letters.
            assert (await world.ask(f"{escaped.lower()}?download=true")).body == data
            head = await world.ask(escaped, "HEAD")
            assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(data)))
            assert head.headers["etag"] == answer.headers["etag"]


async def test_ranges_and_many_requests_on_one_connection(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        target = f"/lab/model/resolve/{world.add(FILES).manifest.revision}/weights.bin.gguf"
        asked = {"bytes=0-9": WEIGHTS[:10], "bytes=1000-": WEIGHTS[1000:], "bytes=-7": WEIGHTS[-7:], "bytes=0-999999999": WEIGHTS}
        async with world.client() as client:
            # All at once, as libtorrent asks.
            await client.say(*(f"GET {target}\nHost: localhost\nRange: {wanted}" for wanted in asked))
            for wanted, data in asked.items():
                answer = await client.hear()
                assert (answer.status, answer.body) == (206, data), wanted
                begin = len(WEIGHTS) - len(data) if wanted != "bytes=0-9" else 0
                assert answer.headers["content-range"] == f"bytes {begin}-{begin + len(data) - 1}/{len(WEIGHTS)}"
        behind = await world.ask(target, range=f"bytes={len(WEIGHTS)}-")
        assert (behind.status, behind.headers["content-range"], behind.body) == (416, f"bytes */{len(WEIGHTS)}", b"")
        etag = (await world.ask(target, "HEAD")).headers["etag"]
        assert (await world.ask(target, range="bytes=0-0", if_range=etag)).status == 206
        assert (await world.ask(target, range="bytes=0-0", if_range='"x"')).status == 200


TRICKS = {
    "a folder above": "{base}/../../../../home/version",
    "escaped": "{base}/%2e%2e/%2e%2e/record",
    "a slash escaped": "{base}/..%2f..%2frecord",
    "the record": "{base}/../record",
    "an absolute path": "{base}//etc/passwd",
    "an absolute path, escaped": "{base}/%2fetc%2fpasswd",
    "a NUL": "{base}/config.json%00",
    "a dot": "{base}/./config.json",
    "a folder": "{base}/sub",
    "a folder with its slash": "{base}/sub/",
    "the release": "{base}",
    "the release with its slash": "{base}/",
    "another case": "{base}/CONFIG.JSON",
    "not UTF-8": "{base}/%fc",
    "another name of the publisher": "/lab/other/resolve/{revision}/config.json",
    "the bundle of another name": "/lab/other/main.modelp2p",
    "a branch": "/lab/model/resolve/main/config.json",
    "a revision that is not here": "/lab/model/resolve/0123456789012345678901234567890123456789/config.json",
    "the root": "/",
    "the name": "/lab/model",
    "the models": "/api/models",
    "the gateway": "/t/0123456789abcdef0123456789abcdef/lab/model/resolve/main/config.json",
    "the publishers": "/.well-known/modelp2p/publishers/",
    "a publisher nobody knows": f"/.well-known/modelp2p/publishers/mp1{'a' * 52}",
    "a publisher who climbs": "/.well-known/modelp2p/publishers/..%2fbook",
}


@pytest.mark.parametrize("target", TRICKS.values(), ids=TRICKS)
async def test_nothing_else_is_there(tmp_path: Path, target: str) -> None:
    async with world_of(tmp_path) as world:
        revision = world.add(FILES).manifest.revision
        asked = target.format(base=f"/lab/model/resolve/{revision}", revision=revision)
        for method in ("GET", "HEAD"):
            assert (await world.ask(asked, method)).status == 404
        answer = await world.ask(asked)
        # Nothing in the answer tells a name that is wrong from one that is kept back.
        assert (answer.body, "etag" in answer.headers) == (b"not here\n", False)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_nothing_is_taken(tmp_path: Path, method: str) -> None:
    async with world_of(tmp_path) as world:
        target = f"/lab/model/resolve/{world.add(FILES).manifest.revision}/config.json"
        answer = await world.ask(target, method)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_a_body_is_not_read_and_ends_the_connection(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world, world.client() as client:
        await client.say("POST /lab/model/main.modelp2p\nHost: localhost\nContent-Length: 1000000000")
        await client.stream.send_all(b"x")
        answer = await client.hear()
        assert (answer.status, answer.headers["connection"]) == (405, "close")
        assert await client.is_at_end()


async def test_a_release_is_spoken_of_when_it_is_complete_and_only_then(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        old, new = world.add(FILES), world.add({**FILES, "config.json": b"{}"}, sequence=2, is_complete=False)
        target = f"/lab/model/resolve/{new.manifest.revision}/weights.bin.gguf"
        bundle = f"/lab/model/{new.manifest.revision}.modelp2p"
        # Its file is whole, and the node shows it to its own programs.
        assert [(await world.ask(asked)).status for asked in (target, bundle)] == [404, 404]
        newest = decode_bundle((await world.ask("/lab/model/main.modelp2p")).body)
        assert newest.digest == old.digest
        world.node.of(new.info_hash).is_complete = True
        assert (await world.ask(target)).body == WEIGHTS
        newest = decode_bundle((await world.ask("/lab/model/main.modelp2p")).body)
        assert newest.digest == new.digest


async def test_a_name_is_spoken_of_while_its_publisher_is_trusted_for_it(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        revision = world.add(FILES).manifest.revision
        targets = (
            f"/lab/model/resolve/{revision}/config.json",
            f"/lab/model/{revision}.modelp2p",
            "/lab/model/main.modelp2p",
            f"/.well-known/modelp2p/publishers/{publisher().id}",
        )
        assert [(await world.ask(target)).status for target in targets] == [200] * 4
        # Trusted for another name: the publisher is spoken of, the release is not.
        world.node.book = TrustBook((TrustEntry("lab/other", publisher().id),))
        assert [(await world.ask(target)).status for target in targets] == [404, 404, 404, 200]
        world.node.book = TrustBook()
        assert [(await world.ask(target)).status for target in targets] == [404] * 4


async def test_a_bundle_is_the_statement_that_is_kept(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        release = world.add(FILES)
        target = f"/lab/model/{release.manifest.revision}.modelp2p"
        answer = await world.ask(target)
        statement = decode_bundle(answer.body)
        assert statement == world.node.store.load_statement(release.digest)
        assert verify_statement(statement).info_hash == release.info_hash
        assert (answer.headers["content-type"], answer.headers["cache-control"]) == ("application/octet-stream", "no-cache")
        head = await world.ask(target, "HEAD")
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(answer.body)))
        # Made once, whoever asks.
        shutil.rmtree(world.node.store.path(layout.statement_of(release.digest)))
        assert (await world.ask("/lab/model/main.modelp2p")).body == answer.body


async def test_a_statement_that_has_gone_is_not_here(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        release = world.add(FILES)
        shutil.rmtree(world.node.store.path(layout.statement_of(release.digest)))
        assert (await world.ask("/lab/model/main.modelp2p")).status == 404


async def test_a_publisher_is_the_chain_that_is_kept(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        world.add(FILES)
        target = f"/.well-known/modelp2p/publishers/{publisher().id}"
        answer = await world.ask(target)
        assert decode_chain(answer.body).publisher_id == publisher().id
        kept = world.node.store.path(layout.TRUST) / "publishers" / publisher().id
        assert answer.body == kept.read_bytes()
        head = await world.ask(target, "HEAD")
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(answer.body)))
        kept.unlink()
        assert (await world.ask(target)).status == 404


async def test_what_is_not_as_it_was_proven_is_not_given(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        release = world.add(FILES)
        revision = release.manifest.revision
        tree, base = world.node.store.path(layout.tree_of(release.info_hash, revision)), f"/lab/model/resolve/{revision}"
        (tree / "config.json").chmod(0o644)
        (tree / "config.json").write_bytes(b'{"a": 2}')
        assert (await world.ask(f"{base}/config.json")).status == 404
        (tree / "weights.bin.gguf").unlink()
        assert (await world.ask(f"{base}/weights.bin.gguf")).status == 404
        (tree / "weights.bin.gguf").symlink_to("/etc/passwd")
        answer = await world.ask(f"{base}/weights.bin.gguf")
        assert (answer.status, answer.body) == (503, b"not now\n")
        assert (await world.ask(f"{base}/empty")).status == 200


async def test_a_borrowed_file_that_changes_while_it_is_sent_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world_of(tmp_path) as world:
        release = world.add(FILES)
        record = world.node.store.load_record(release.info_hash)
        assert record is not None
        borrowed = {path: replace(item, borrowed=True) for path, item in record.files.items()}
        world.node.store.save_record(replace(record, files=borrowed))
        path = world.node.store.path(layout.tree_of(release.info_hash, record.revision)) / "weights.bin.gguf"
        push = http_connection._push

        def push_and_touch(sock: int, fd: int, begin: int, end: int) -> int:
            os.utime(path, ns=(1, 1))
            return push(sock, fd, begin, end)

        monkeypatch.setattr(http_connection, "_push", push_and_touch)
        answer = await world.ask(f"/lab/model/resolve/{record.revision}/weights.bin.gguf")
        assert (answer.status, answer.is_whole) == (200, False)
        assert WEIGHTS.startswith(answer.body)


HOSTS = {
    "its address": ("127.0.0.1:{port}", 200),
    "its address, without the port": ("127.0.0.1", 200),
    "an address outside": ("203.0.113.5:443", 200),
    "an IPv6 address": ("[2001:db8::1]:443", 200),
    "an IPv6 address without a port": ("[::1]", 200),
    "localhost": ("LOCALHOST:{port}", 200),
    "its name": ("models.example.org", 200),
    "its name, in capitals, with a port": ("Models.Example.ORG:8443", 200),
    "a name below": ("evil.models.example.org", 421),
    "a name that ends the same": ("evilmodels.example.org", 421),
    "another name": ("evil.example", 421),
    "a number that is no address": ("127.0.0.1.evil.example", 421),
    "an address in pieces": ("::1", 421),
    "nothing": ("", 421),
}


@pytest.mark.parametrize(("host", "status"), HOSTS.values(), ids=HOSTS)
async def test_it_answers_to_its_names_and_to_addresses(tmp_path: Path, host: str, status: int) -> None:
    async with world_of(tmp_path, hosts=("models.example.org",)) as world, world.client() as client:
        world.add(FILES)
        await client.say(f"GET /lab/model/main.modelp2p\nHost: {host.replace('{port}', str(world.port))}")
        assert (await client.hear()).status == status


async def test_a_page_is_answered_like_anybody_and_cannot_read_the_answer(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world:
        world.add(FILES)
        answer = await world.ask("/lab/model/main.modelp2p", origin="https://page.example", sec_fetch_site="cross-site")
        assert answer.status == 200
        assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_one_visitor_takes_no_more_than_a_share(tmp_path: Path) -> None:
    async with world_of(tmp_path, proxies=()) as world, AsyncExitStack() as stack:
        world.add(FILES)
        inside = [await stack.enter_async_context(world.client()) for _ in range(PER_VISITOR)]
        for client in inside:
            await client.say("GET /lab/model/main.modelp2p")
            assert (await client.hear()).status == 200
        async with world.client() as client:
            refused = await client.hear()
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        # The next one comes in as soon as one has gone.
        await inside[0].stream.send_eof()
        assert await inside[0].is_at_end()
        await inside[0].stream.aclose()
        assert (await world.ask("/lab/model/main.modelp2p")).status == 200


async def test_a_proxy_stands_for_many_visitors(tmp_path: Path) -> None:
    async with world_of(tmp_path) as world, AsyncExitStack() as stack:
        world.add(FILES)
        for _ in range(PER_VISITOR + 1):
            client = await stack.enter_async_context(world.client())
            await client.say("GET /lab/model/main.modelp2p")
            assert (await client.hear()).status == 200


def test_a_visitor_is_an_address_or_a_network_of_ipv6() -> None:
    door = PublicDoor(PublicHttpConfig(True))
    assert all(door.enter(f"2001:db8:0:7::{number:x}") for number in range(PER_VISITOR))
    assert not door.enter("2001:db8:0:7:ffff::1")
    assert door.enter("2001:db8:0:8::1")
    assert all(door.enter("192.0.2.1") for _ in range(PER_VISITOR))
    assert not door.enter("192.0.2.1")
    assert door.enter("192.0.2.2")
    assert "34 connections of 4 visitors" in repr(door)
    for number in range(PER_VISITOR):
        door.leave(f"2001:db8:0:7::{number:x}")
    # Who has gone is forgotten: there are more addresses than memory.
    assert "18 connections of 3 visitors" in repr(door)
    assert door.enter("2001:db8:0:7:ffff::1")


async def test_a_busy_port_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError, match=str(port)) as caught:
            PublicDoor(PublicHttpConfig(True, listen=(f"127.0.0.3:{port}", f"127.0.0.1:{port}"))).open()
        assert "[public_http]" in caught.value.hint
        # The other address, which was free, is so again.
        socket.create_server(("127.0.0.3", port)).close()
    with pytest.raises(UsageError, match="no address"):
        PublicDoor(PublicHttpConfig(True, listen=())).open()


async def test_it_listens_on_every_address_it_was_given() -> None:
    door = PublicDoor(PublicHttpConfig(True, listen=("127.0.0.1:0", "127.0.0.2:0")))
    listeners = door.open()
    ports = [listener.getsockname()[1] for listener in listeners]
    assert door.addresses == (f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.2:{ports[1]}")
    for listener in listeners:
        listener.close()


async def test_two_of_them_listen_side_by_side(tmp_path: Path) -> None:
    async with world_of(tmp_path / "a") as one, world_of(tmp_path / "b") as other:
        one.add(FILES)
        assert one.port != other.port
        assert [(await world.ask("/lab/model/main.modelp2p")).status for world in (one, other)] == [200, 404]
