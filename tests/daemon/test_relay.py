"""The loopback relay over real sockets: whom it answers, what it forwards, and that no origin's failure becomes an answer."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
import trio

from modelp2p.daemon.origin import OriginClient
from modelp2p.daemon.relay import Relay, Relayed
from modelp2p.protocol.statement import verify_statement
from modelp2p.protocol.webseeds import MAX_ORIGINS, OriginError, usable_origins
from tests.origins import RIGHT, Origin, Reply
from tests.releases import statement_of
from tests.sizes import seeded_bytes

FILES = {"sub dir/ä+b%20#1?.bin": seeded_bytes("relay", 200_000), "config.json": b"{}", "empty.txt": b""}
ODD = "sub%20dir/%c3%a4%2bb%2520%231%3f.bin"
"""The first file, quoted as libtorrent does: in lower case."""
RELEASE = verify_statement(statement_of(FILES))
ONE = verify_statement(statement_of({"only file.bin": FILES["config.json"]}))
NEVER = "http://127.0.0.1:1/"
"""An origin that nobody asks."""


@dataclass
class World:
    """A relay with one release."""

    relay: Relay
    relayed: Relayed
    reports: list[tuple[int, OriginError | None]] = field(default_factory=list)

    @property
    def base(self) -> str:
        """The address of the first origin, as far as its server."""
        parts = urlsplit(self.relay.url(self.relayed, 0))
        return f"{parts.scheme}://{parts.netloc}"

    def target(self, number: int = 0, path: str = ODD) -> str:
        revision = self.relayed.release.manifest.revision
        base = urlsplit(self.relay.url(self.relayed, number)).path.removesuffix(f"{revision}/")
        return f"{base}{revision}/{path}"

    async def ask(
        self, target: str, *headers: str, method: str = "GET", host: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and what came of the body; status 0 for no answer at all."""
        place = urlsplit(self.base).netloc
        stream = await trio.open_tcp_stream("127.0.0.1", int(place.rpartition(":")[2]))
        async with stream:
            lines = (f"{method} {target} HTTP/1.1", f"Host: {host or place}", "Connection: close", *headers)
            await stream.send_all("\r\n".join((*lines, "", "")).encode())
            data = b""
            async for chunk in stream:
                data += chunk
        head, _, body = data.partition(b"\r\n\r\n")
        status, *rest = head.decode("latin-1").split("\r\n")
        return (
            int(status.split()[1]) if status else 0,
            {name.lower(): value for name, value in (line.split(": ", 1) for line in rest)},
            body,
        )


@asynccontextmanager
async def world_of(*bases: str, release: object = RELEASE) -> AsyncIterator[World]:
    hosts = [urlsplit(base).netloc for base in bases]
    reports: list[tuple[int, OriginError | None]] = []
    relay, client = Relay(), OriginClient(hosts)
    relayed = Relayed(release, usable_origins(bases, hosts), client, lambda number, error: reports.append((number, error)))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        await relay.add(relayed)
        with trio.fail_after(30):
            yield World(relay, relayed, reports)
        await client.aclose()
        nursery.cancel_scope.cancel()


def contents(folder: str, files: dict[str, bytes] = FILES, release: object = RELEASE) -> dict[str, bytes]:
    return {f"{folder}{release.manifest.revision}/{path}": data for path, data in files.items()}  # type: ignore[attr-defined]


async def test_a_range_of_a_file_with_an_odd_name_is_forwarded_to_the_origin_that_was_asked() -> None:
    with Origin(contents("/a/")) as first, Origin(contents("/b/x/")) as second:
        async with world_of(f"{first.url}/a/", f"{second.url}/b/x") as world:
            data = FILES["sub dir/ä+b%20#1?.bin"]
            for number, origin in enumerate((first, second)):
                status, headers, body = await world.ask(world.target(number), "Range: bytes=16384-131071")
                assert (status, body) == (206, data[16_384:131_072])
                assert headers["content-range"] == f"bytes 16384-131071/{len(data)}"
                assert origin.asked[0].range == "bytes=16384-131071"
            assert (await world.ask(world.target()))[::2] == (200, data)
            assert world.relayed.sent == [131_072 - 16_384 + len(data), 131_072 - 16_384]
            assert world.reports == [(0, None), (1, None), (0, None)]


async def test_a_release_of_one_file_is_named_whole() -> None:
    with Origin(contents("/a/", {"only file.bin": b"{}"}, ONE)) as origin:
        async with world_of(f"{origin.url}/a/", release=ONE) as world:
            # libtorrent adds no revision to the address of a torrent of one file: `test_web_seeding` has it ask.
            assert world.relay.url(world.relayed, 0).endswith(f"/0/{ONE.manifest.revision}/")
            assert (await world.ask(world.target(path="only%20file.bin")))[::2] == (200, b"{}")
        # Where the manifest names the whole address of the file, that is what is asked.
        async with world_of(f"{origin.url}/a/{ONE.manifest.revision}/only%20file.bin", release=ONE) as world:
            assert (await world.ask(world.target(path="only%20file.bin")))[::2] == (200, b"{}")


async def test_only_the_random_segment_opens_anything_and_only_files_of_the_manifest() -> None:
    async with world_of(NEVER) as world:
        good = world.target()
        _, secret, info_hash, number, revision, _ = good.split("/", 5)
        assert re.fullmatch("[0-9a-f]{32}", secret)
        for target in (
            "/",
            f"/{secret}",
            good.replace(secret, "0" * 32),
            good.replace(secret, secret.upper()),
            good.replace(info_hash, "0" * 64),
            good.replace(f"/{number}/", "/1/"),
            good.replace(f"/{number}/", "/0-0/"),
            good.replace(f"/{number}/", "/00/"),
            good.replace(f"/{number}/", "/-1/"),
            good.replace(revision, "0" * 40),
            good.replace(ODD, "other.bin"),
            good.replace(ODD, "../" + ODD),
            good.replace(ODD, "%ff"),
            good.replace(ODD, "empty.txt"),
            good + "?x",
            "/" + good,
        ):
            assert (await world.ask(target))[0] == 404, target
        assert (await world.ask(good, method="POST"))[0] == 405
        assert (await world.ask(good, host="evil.example"))[0] == 421
        assert (await world.ask(good, "Range: bytes=200000-"))[0] == 416
        world.relay.remove(world.relayed)
        assert (await world.ask(good))[0] == 404
        assert world.reports == []


async def test_two_relays_have_different_secrets_and_origins_different_ports() -> None:
    bases = [f"http://127.0.0.1:{port}/" for port in range(1, MAX_ORIGINS + 3)]
    async with world_of(*bases) as world, world_of(NEVER) as other:
        numbers = range(len(world.relayed.origins))
        urls = [world.relay.url(world.relayed, number) for number in numbers]
        assert len({urlsplit(url).port for url in urls}) == len(urls) == MAX_ORIGINS
        assert world.target().split("/")[1] != other.target().split("/")[1]
        assert [world.relay.number_of(world.relayed, url) for url in urls] == list(numbers)
        assert world.relay.number_of(world.relayed, other.relay.url(other.relayed, 0)) is None


BAD = {
    "busy": (Reply(429, (("Retry-After", "9"),)), "429"),
    "broken": (Reply(500), "500"),
    "gone": (Reply(404), "404"),
    "all of it": (Reply(200, content=b"x" * 200_000), "it ignores ranges"),
    "nothing at all": (Reply(content=b"", length=10), "it sends another number of bytes than were asked for"),
}


@pytest.mark.parametrize(("reply", "words"), BAD.values(), ids=BAD)
async def test_a_failure_of_the_origin_is_told_to_the_fetch_and_never_to_the_engine(reply: Reply, words: str) -> None:
    with Origin(contents("/"), lambda _: reply) as origin:
        async with world_of(f"{origin.url}/") as world:
            status, headers, body = await world.ask(world.target(), "Range: bytes=0-99")
            assert (status, headers["content-length"], body) == (206, "100", b"")
            ((number, error),) = world.reports
            assert number == 0
            assert error is not None
            assert error.message == words
            # The server goes on.
            origin.respond = lambda _: RIGHT
            assert len((await world.ask(world.target(), "Range: bytes=0-99"))[2]) == 100


async def test_what_came_before_a_connection_broke_is_handed_on_and_counted() -> None:
    data = FILES["sub dir/ä+b%20#1?.bin"]
    with Origin(contents("/"), lambda _: Reply(content=data[:5000], length=len(data))) as origin:
        async with world_of(f"{origin.url}/") as world:
            assert (await world.ask(world.target(), "Range: bytes=0-199999"))[2] == data[:5000]
            assert world.relayed.sent == [5000]
            ((_, error),) = world.reports
            assert error is not None


async def test_it_listens_only_once_a_release_is_there() -> None:
    relay = Relay()
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        assert repr(relay) == "<Relay at 0 ports, 0 releases>"
        nursery.cancel_scope.cancel()
