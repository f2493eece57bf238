"""The HTTP client of web seeds against real servers on loopback, over TLS and without, that misbehave in many ways."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from modelp2p.daemon.origin import MAX_REDIRECTS, SILENCE_S, SLOW_BYTES, OriginBody, OriginClient, resolve
from modelp2p.protocol.httprange import Span
from modelp2p.protocol.webseeds import OriginError
from tests.origins import RIGHT, Asked, Origin, Reply, certificates, redirect
from tests.sizes import seeded_bytes

PATH = "/org/model/resolve/ab/a b+%#ä.bin"
TARGET = "/org/model/resolve/ab/a%20b%2B%25%23%C3%A4.bin"
DATA = seeded_bytes("origin", 300_000)
SPAN = Span(1000, 250_001)
TOKEN = "hf_secret"
NEVER_S = 0.2
"""How long nothing may happen before a test's clock jumps to the next deadline."""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return certificates(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def client_of(*hosts: str, **options: object) -> AsyncIterator[OriginClient]:
    client = OriginClient(hosts, **options)  # type: ignore[arg-type]
    try:
        yield client
    finally:
        await client.aclose()


async def taken(client: OriginClient, url: str, span: Span = SPAN, size: int = len(DATA)) -> bytes:
    found = b""
    async with client.open(url, span, size) as body:
        while data := await body.read():
            assert len(data) <= 64 << 10
            found += data
    return found


async def refusal(client: OriginClient, url: str, span: Span = SPAN, size: int = len(DATA)) -> OriginError:
    with pytest.raises(OriginError) as caught:
        await taken(client, url, span, size)
    return caught.value


@contextmanager
def plain(respond: Callable[[Asked], Reply] = lambda _: RIGHT, host: str = "127.0.0.1") -> Iterator[Origin]:
    with Origin({PATH: DATA}, respond, host=host) as origin:
        yield origin


async def test_exactly_the_range_comes_over_one_connection_again_and_again() -> None:
    with plain() as origin:
        async with client_of(origin.place) as client:
            for span in (SPAN, Span(0, 1), Span(299_999, 300_000), Span(0, 300_000)):
                assert await taken(client, origin.url + TARGET, span) == DATA[span.begin : span.end]
        assert origin.asked[0] == Asked(TARGET, "bytes=1000-250000", None)


async def test_https_is_checked_against_the_authorities(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, trusting = tls
    with Origin({PATH: DATA}, tls=server) as origin:
        async with client_of(origin.place, tls=trusting) as client:
            assert await taken(client, origin.url + TARGET) == DATA[1000:250_001]
        async with client_of(origin.place) as client:
            assert (await refusal(client, origin.url + TARGET)).message == "its certificate is not valid"
        async with client_of(origin.place, tls=trusting, look_up=_loopback) as client:
            url = origin.url.replace("127.0.0.1", "other.example")
            assert "private" in (await refusal(client, url + TARGET)).message
        async with client_of("other.example", tls=trusting, look_up=_loopback) as client:
            # A right certificate, of somebody else.
            assert (await refusal(client, url + TARGET)).message == "its certificate is not valid"
        assert len(origin.asked) == 1


async def _loopback(host: str, port: int) -> list[str]:
    await trio.lowlevel.checkpoint()
    return ["127.0.0.1"]


WHOLE = Span(0, len(DATA))
NOT_THE_RANGE: dict[str, tuple[Span, Reply, str]] = {
    "not found": (SPAN, Reply(404, content=b"x"), "404"),
    "gated": (SPAN, Reply(401), "401"),
    "refused": (SPAN, Reply(403), "403"),
    "broken": (SPAN, Reply(500), "500"),
    "nothing": (SPAN, Reply(204, content=b""), "204"),
    "all of it": (SPAN, Reply(200, content=DATA), "it ignores ranges"),
    "another range": (SPAN, Reply(headers=(("Content-Range", f"bytes 1001-250001/{len(DATA)}"),)), "another range"),
    "of another file": (SPAN, Reply(headers=(("Content-Range", f"bytes 1000-250000/{len(DATA) + 1}"),)), "another range"),
    "of a file of unknown size": (SPAN, Reply(headers=(("Content-Range", "bytes 1000-250000/*"),)), "another range"),
    "packed": (SPAN, Reply(headers=(("Content-Encoding", "gzip"),)), "an encoding"),
    "less than asked": (SPAN, Reply(content=DATA[1000:2000]), "another number"),
    "more than asked": (SPAN, Reply(content=DATA), "another number"),
    "all of it, and more": (WHOLE, Reply(200, content=DATA + b"x"), "another number"),
    "less than asked, without saying how much": (SPAN, Reply(content=DATA[1000:2000], length=-1), "another number"),
    "more than asked, without saying how much": (SPAN, Reply(content=DATA, length=-1), "another number"),
    "a head too long": (SPAN, Reply(headers=(("X", "y" * 200_000),)), "the connection broke"),
}


@pytest.mark.parametrize(("span", "reply", "words"), NOT_THE_RANGE.values(), ids=NOT_THE_RANGE)
async def test_what_is_not_exactly_the_range_is_an_error(span: Span, reply: Reply, words: str) -> None:
    with plain(lambda _: reply) as origin:
        async with client_of(origin.place) as client:
            assert words in (await refusal(client, origin.url + TARGET, span)).message


async def test_the_whole_file_may_come_without_a_range() -> None:
    with plain(lambda _: Reply(200, content=DATA)) as origin:
        async with client_of(origin.place) as client:
            assert await taken(client, origin.url + TARGET, WHOLE) == DATA


async def test_a_body_that_breaks_off_is_an_error_after_its_bytes() -> None:
    with plain(lambda _: Reply(content=DATA[1000:100_000], length=len(SPAN))) as origin:
        async with client_of(origin.place) as client:
            async with client.open(origin.url + TARGET, SPAN, len(DATA)) as body:
                found = b""
                while len(found) < 99_000:
                    found += await body.read()
                assert found == DATA[1000:100_000]
                with pytest.raises(OriginError, match="the connection broke"):
                    await body.read()
            # And the next one is as good as any.
            origin.respond = lambda _: RIGHT
            assert await taken(client, origin.url + TARGET) == DATA[1000:250_001]


class Drip:
    """An answer of chunks with a pause before each."""

    def __init__(self, pause_s: float, size: int) -> None:
        self._pause_s = pause_s
        self._size = size

    def __aiter__(self) -> Drip:
        return self

    async def __anext__(self) -> bytes:
        await trio.sleep(self._pause_s)
        return bytes(self._size)


async def test_an_origin_that_drips_is_as_good_as_silent(autojump_clock: MockClock) -> None:
    body = OriginBody(Drip(4.0, 1000), 1 << 20)
    for _ in range(3):
        assert len(await body.read()) == 1000
    with pytest.raises(OriginError, match="less than 64 KiB in 15 s"):
        await body.read()


SLOW = {
    "enough": (OriginBody(Drip(SILENCE_S, SLOW_BYTES), 1 << 20), 5),
    "a reader that takes its time": (OriginBody(Drip(0.0, 1000), 1 << 20), 5),
    "the end of a range": (OriginBody(Drip(SILENCE_S + 1, 9), 9), 1),
}


@pytest.mark.parametrize(("body", "reads"), SLOW.values(), ids=SLOW)
async def test_no_origin_is_blamed_for(body: OriginBody, reads: int, autojump_clock: MockClock) -> None:
    for _ in range(reads):
        assert await body.read()
        await trio.sleep(100)


async def test_a_cancelled_handshake_leaves_no_connection() -> None:
    greeted, closed = trio.Event(), trio.Event()

    async def say_nothing(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        greeted.set()
        async for _ in stream:
            pass
        closed.set()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, say_nothing, 0, host="127.0.0.1"))
        place = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        async with client_of(place) as client:
            async with trio.open_nursery() as asking:
                asking.start_soon(taken, client, f"https://{place}/")
                await greeted.wait()
                asking.cancel_scope.cancel()
            with trio.fail_after(30):
                await closed.wait()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_server_says_for_how_long(status: int) -> None:
    with plain(lambda _: Reply(status, (("Retry-After", "77"),))) as origin:
        async with client_of(origin.place) as client:
            error = await refusal(client, origin.url + TARGET)
            assert (error.message, error.retry_after_s) == (str(status), 77.0)
            origin.respond = lambda _: Reply(status)
            assert (await refusal(client, origin.url + TARGET)).retry_after_s is None


@dataclass
class Hub:
    """A hub that redirects to a store with signatures that expire."""

    hub: Origin
    store: Origin
    signature: int = 1

    @property
    def url(self) -> str:
        return self.hub.url + TARGET


@contextmanager
def hub() -> Iterator[Hub]:
    with plain() as first, plain(host="localhost") as second:
        both = Hub(first, second)
        first.respond = lambda asked: redirect(f"{second.url}{asked.target}?X-Sig=secret{both.signature}")
        second.respond = lambda asked: RIGHT if asked.target.endswith(f"=secret{both.signature}") else Reply(403)
        yield both


async def test_a_redirect_is_remembered_until_it_fails_and_then_resolved_anew() -> None:
    with hub() as both:
        async with client_of(both.hub.place, both.store.place) as client:
            for _ in range(3):
                assert await taken(client, both.url) == DATA[1000:250_001]
            assert (len(both.hub.asked), len(both.store.asked)) == (1, 3)
            both.signature = 2
            assert await taken(client, both.url) == DATA[1000:250_001]
            assert (len(both.hub.asked), len(both.store.asked)) == (2, 5)


async def test_a_new_signature_that_fails_as_well_is_an_error() -> None:
    with hub() as both:
        async with client_of(both.hub.place, both.store.place) as client:
            await taken(client, both.url)
            both.store.respond = lambda _: Reply(403)
            assert (await refusal(client, both.url)).message == "403"
            assert (len(both.hub.asked), len(both.store.asked)) == (2, 3)
            # What failed is not remembered: the next question goes to the hub first.
            await refusal(client, both.url)
            assert (len(both.hub.asked), len(both.store.asked)) == (3, 4)


async def test_a_store_that_asks_for_rest_is_not_asked_at_once_by_another_way() -> None:
    with hub() as both:
        async with client_of(both.hub.place, both.store.place) as client:
            await taken(client, both.url)
            both.store.respond = lambda _: Reply(429, (("Retry-After", "30"),))
            assert (await refusal(client, both.url)).retry_after_s == 30
            assert len(both.hub.asked) == 1


async def test_only_the_configured_origin_sees_the_token_and_only_before_a_redirect_leaves_it() -> None:
    with hub() as both:
        async with client_of(both.hub.place, both.store.place, token=TOKEN, token_origin=both.hub.url) as client:
            await taken(client, both.url)
            await taken(client, both.url)
            assert both.hub.tokens == {f"Bearer {TOKEN}"}
            assert both.store.tokens == {None}
            # The store sends back to the hub: still none.
            both.store.respond = lambda asked: redirect(f"{both.hub.url}/back")
            both.hub.asked.clear()
            await refusal(client, both.url)
            assert {asked.token for asked in both.hub.asked if asked.target == "/back"} == {None}
        async with client_of(both.hub.place, both.store.place, token=TOKEN, token_origin="https://huggingface.co") as client:
            both.hub.asked.clear()
            await refusal(client, both.url)
            assert both.hub.tokens == {None}


async def test_what_is_remembered_within_the_origin_of_the_token_is_shown_it_again() -> None:
    def gated(asked: Asked) -> Reply:
        if asked.token != f"Bearer {TOKEN}":
            return Reply(401)
        return redirect(TARGET + "?x") if asked.target == "/a" else RIGHT

    with plain(gated) as origin:
        async with client_of(origin.place, token=TOKEN, token_origin=origin.url) as client:
            for _ in range(3):
                assert await taken(client, f"{origin.url}/a") == DATA[1000:250_001]
        assert [asked.target for asked in origin.asked] == ["/a", *[TARGET + "?x"] * 3]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_may_be_relative(status: int) -> None:
    with plain() as origin:
        origin.respond = lambda asked: redirect(TARGET + "?x", status) if asked.target == "/a" else RIGHT
        async with client_of(origin.place, token=TOKEN, token_origin=origin.url) as client:
            assert await taken(client, origin.url + "/a") == DATA[1000:250_001]
            # It never left the origin.
            assert origin.tokens == {f"Bearer {TOKEN}"}


async def test_redirects_end() -> None:
    with plain(lambda asked: redirect(asked.target + "x")) as origin:
        async with client_of(origin.place) as client:
            assert "redirects" in (await refusal(client, origin.url + "/")).message
        assert len(origin.asked) == MAX_REDIRECTS + 1


BAD_PLACES = {
    "unencrypted": ("http://elsewhere.example/x?sig=secret", "without encryption"),
    "a private address": ("https://127.0.0.1:1/x?sig=secret", "private"),
    "a private name": ("https://inside.example/x?sig=secret", "private"),
    "the cloud's own": ("https://169.254.169.254/latest", "private"),
    "a file": ("file:///etc/passwd", "not a URL"),
    "with a user": ("https://me@elsewhere.example/", "not a URL"),
    "half an IPv6 address": ("//[", "not a URL"),
    "nowhere": ("", "redirects"),
}


@pytest.mark.parametrize(("place", "words"), BAD_PLACES.values(), ids=BAD_PLACES)
async def test_a_redirect_cannot_lead_to(place: str, words: str) -> None:
    async def look_up(host: str, port: int) -> list[str]:
        return ["10.0.0.1", "::1"] if host == "inside.example" else await resolve(host, port)

    with plain(lambda _: redirect(place)) as origin:
        async with client_of(origin.place, look_up=look_up) as client:
            error = await refusal(client, origin.url + TARGET)
            assert words in error.message
            assert "secret" not in str(error)


async def test_a_name_is_looked_up_and_checked_for_each_connection_and_only_what_was_checked_is_called() -> None:
    """A name whose address changes between a check and a connection (DNS rebinding) gains nothing."""
    asked: list[tuple[str, int]] = []

    async def look_up(host: str, port: int) -> list[str]:
        await trio.lowlevel.checkpoint()
        asked.append((host, port))
        return ["127.0.0.1"] if len(asked) % 2 else ["10.0.0.1", "127.0.0.1"]

    with plain(lambda _: Reply(headers=(("Connection", "close"),))) as origin:
        port = int(origin.place.rpartition(":")[2])
        async with client_of(f"mirror.example:{port}", look_up=look_up) as client:
            assert await taken(client, f"http://mirror.example:{port}{TARGET}") == DATA[1000:250_001]
        assert asked == [("mirror.example", port)]
        async with client_of(look_up=look_up) as client:
            for _ in range(2):
                assert "private" in (await refusal(client, f"https://mirror.example:{port}{TARGET}")).message
        assert len(asked) == 3
        assert len(origin.asked) == 1


async def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    async def look_up(host: str, port: int) -> list[str]:
        await trio.lowlevel.checkpoint()
        return ["127.0.0.2", "127.0.0.1"]  # the server listens at the second

    with plain() as origin:
        port = int(origin.place.rpartition(":")[2])
        async with client_of("mirror.example", look_up=look_up) as client:
            assert await taken(client, f"http://mirror.example:{port}{TARGET}") == DATA[1000:250_001]


async def test_a_name_without_an_address() -> None:
    async def look_up(host: str, port: int) -> list[str]:
        await trio.lowlevel.checkpoint()
        raise OSError("no such name")

    async with client_of(look_up=look_up) as client:
        assert (await refusal(client, "https://nowhere.example/")).message == "its name has no address"


async def test_nobody_listens() -> None:
    with plain() as origin:
        place = origin.place
    async with client_of(place) as client:
        assert (await refusal(client, f"http://{place}{TARGET}")).message == "cannot connect"


async def test_the_environment_names_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with plain() as origin, plain() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        async with client_of(origin.place) as client:
            assert await taken(client, origin.url + TARGET) == DATA[1000:250_001]
        assert not proxy.asked


async def test_no_log_holds_a_signature_or_a_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with hub() as both:
        async with client_of(both.hub.place, both.store.place, token=TOKEN, token_origin=both.hub.url) as client:
            await taken(client, both.url)
            both.store.respond = lambda _: Reply(500)
            error = await refusal(client, both.url)
    assert "secret" not in caplog.text
    assert "secret" not in repr(client) + repr(error) + str(error)


@pytest.mark.slow
class TestSilence:
    """The clock jumps where nothing happens: what these servers hold back would never come."""

    @pytest.fixture
    def mock_clock(self) -> MockClock:
        return MockClock(autojump_threshold=NEVER_S)

    async def test_no_first_byte(self, mock_clock: MockClock) -> None:
        wait = threading.Event()
        try:
            with plain(lambda _: Reply(wait=wait)) as origin:
                async with client_of(origin.place) as client:
                    assert (await refusal(client, origin.url + TARGET)).message == "no answer within 15 s"
                assert trio.current_time() == pytest.approx(15, abs=5)
                wait.set()
        finally:
            wait.set()

    async def test_a_remembered_place_that_is_silent_leaves_time_for_the_way_there(self, mock_clock: MockClock) -> None:
        wait = threading.Event()
        try:
            with hub() as both:
                async with client_of(both.hub.place, both.store.place) as client:
                    await taken(client, both.url)
                    silent = iter([Reply(wait=wait)])
                    both.store.respond = lambda _: next(silent, RIGHT)
                    assert await taken(client, both.url) == DATA[1000:250_001]
                assert len(both.hub.asked) == 2
                wait.set()
        finally:
            wait.set()
