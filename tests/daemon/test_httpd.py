"""The HTTP server over real sockets: what it lets through, what it refuses, and what it does when somebody leaves."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h11
import pytest
import trio

from modelp2p.daemon import httpd
from modelp2p.daemon.http_connection import MAX_BODY_BYTES, MAX_HEAD_BYTES, READ_BYTES, Connection, Request, Response, Sink
from modelp2p.daemon.httpd import HttpServer, open_listeners
from modelp2p.protocol.errors import DaemonError


@dataclass
class FileBody:
    """Some of a file, perhaps less than was announced."""

    fd: int
    end: int
    closed: int = 0

    async def send(self, sink: Sink) -> None:
        await sink.send_file(self.fd, 0, self.end)

    def close(self) -> None:
        self.closed += 1


@dataclass
class Answer:
    """One response as a client reads it."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool = True


class Client:
    """A connection whose bytes the test writes itself."""

    def __init__(self, stream: trio.SocketStream, port: int) -> None:
        self.stream = stream
        self.port = port
        self._http = h11.Connection(h11.CLIENT)

    async def say(self, *requests: str) -> None:
        """Write requests, each `METHOD /path` and further header lines, at once."""
        text = ""
        for request in requests:
            first, *more = request.split("\n")
            text += "\r\n".join([f"{first} HTTP/1.1", *(more or [f"Host: 127.0.0.1:{self.port}"]), "", ""])
        await self.stream.send_all(text.encode("latin-1"))

    async def hear(self, method: str = "GET") -> Answer:
        """Read one response."""
        if self._http.our_state is h11.IDLE:
            self._http.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
            self._http.send(h11.EndOfMessage())
        head: h11.Response | None = None
        body = b""
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError:
                assert head is not None
                return Answer(head.status_code, _headers(head), body, is_whole=False)
            match event:
                case h11.NEED_DATA:
                    self._http.receive_data(await self.stream.receive_some(65536))
                case h11.Response():
                    head = event
                case h11.Data(data=data):
                    body += data
                case h11.EndOfMessage():
                    assert head is not None
                    if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
                        self._http.start_next_cycle()
                    return Answer(head.status_code, _headers(head), body)
                case _:
                    raise AssertionError(event)

    async def is_at_end(self) -> bool:
        return await self.stream.receive_some(1) == b""


def _headers(head: h11.Response) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in head.headers}


@dataclass
class Site:
    """A server whose handler answers with what it was asked, or with what the test put there."""

    port: int = 0
    seen: list[Request] = field(default_factory=list)
    bodies: dict[str, Response] = field(default_factory=dict)
    began: trio.Event = field(default_factory=trio.Event)
    cancelled: trio.Event = field(default_factory=trio.Event)

    async def handle(self, request: Request) -> Response:
        self.seen.append(request)
        if request.target == "/bug":
            raise RuntimeError("bug")
        if request.target == "/forever":
            self.began.set()
            try:
                await trio.sleep_forever()
            finally:
                self.cancelled.set()
        return self.bodies.get(request.target) or Response(200, (("X-Target", request.target),), request.target.encode())

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            yield Client(stream, self.port)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Site, HttpServer]]:
    site = Site()
    server = HttpServer(site.handle, 0)
    async with trio.open_nursery() as nursery:
        site.port = await nursery.start(server.serve)
        with trio.fail_after(30):
            yield site, server
        nursery.cancel_scope.cancel()


@contextmanager
def file_of(tmp_path: Path, data: bytes) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


async def test_a_connection_is_kept_and_requests_may_come_all_at_once() -> None:
    async with serving() as (site, server), site.client() as client:
        await client.say("GET /a", "GET /b", "GET /c")
        assert [(await client.hear()).body for _ in range(3)] == [b"/a", b"/b", b"/c"]
        await client.say("GET /d")
        answer = await client.hear()
        assert (answer.status, answer.body, answer.headers["x-target"]) == (200, b"/d", "/d")
        assert "date" in answer.headers
        assert server.statistics().requests == 4
        assert server.statistics().connections == 1


async def test_head_is_answered_without_a_body_and_does_not_end_the_connection() -> None:
    async with serving() as (site, _), site.client() as client:
        site.bodies["/large"] = Response(200, (("ETag", '"x"'),), None)
        await client.say("HEAD /a", "HEAD /large", "GET /b")
        head, large, get = [await client.hear(method) for method in ("HEAD", "HEAD", "GET")]
        assert (head.headers["content-length"], head.body) == ("2", b"")
        assert (large.headers.get("content-length"), large.headers["etag"]) == (None, '"x"')
        assert get.body == b"/b"


REFUSED = {
    "no host": ("GET / HTTP/1.0\r\n\r\n", 421),
    "a foreign host": ("GET / HTTP/1.1\r\nHost: evil.example:{port}\r\n\r\n", 421),
    "a host without the port": ("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 421),
    "another address of this machine": ("GET / HTTP/1.1\r\nHost: 127.0.0.2:{port}\r\n\r\n", 421),
    "two hosts": ("GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHost: evil\r\n\r\n", 400),
    "a web page": ("GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: https://evil.example\r\n\r\n", 403),
    "a page in a sandbox": ("GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: null\r\n\r\n", 403),
    "an image of another site": ("GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nSec-Fetch-Site: cross-site\r\n\r\n", 403),
    "as a proxy": ("GET http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n", 400),
    "no HTTP": ("hello\r\n\r\n", 400),
    "TLS": ("\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    "a head without end": ("GET / HTTP/1.1\r\nX: " + "a" * (MAX_HEAD_BYTES + 1), 431),
}


@pytest.mark.parametrize(("text", "status"), REFUSED.values(), ids=REFUSED)
async def test_what_is_refused_reaches_no_handler(text: str, status: int) -> None:
    async with serving() as (site, _), site.client() as client:
        await client.stream.send_all(text.replace("{port}", str(site.port)).encode("latin-1"))
        assert (await client.hear()).status == status
        assert site.seen == []


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}"])
async def test_its_own_names_are_answered(host: str) -> None:
    async with serving() as (site, _), site.client() as client:
        host = host.replace("{port}", str(site.port))
        await client.say(f"GET /a\nHost: {host}\nSec-Fetch-Site: same-origin")
        assert (await client.hear()).status == 200


async def test_a_handler_sees_no_credential() -> None:
    async with serving() as (site, _), site.client() as client:
        await client.say(f"GET /a\nHost: 127.0.0.1:{site.port}\nAuthorization: Bearer hf_secret\nCookie: a=b\nRange: bytes=0-1")
        await client.hear()
    assert "secret" not in repr(site.seen)
    assert dict(site.seen[0].headers) == {"host": f"127.0.0.1:{site.port}", "range": "bytes=0-1"}


async def test_a_small_body_is_read_and_a_large_one_ends_the_connection() -> None:
    async with serving() as (site, _), site.client() as client:
        await client.say(f"POST /a\nHost: 127.0.0.1:{site.port}\nContent-Length: 5")
        await client.stream.send_all(b"hello")
        assert (await client.hear()).status == 200
        assert site.seen[0].body == b"hello"
        await client.say(f"POST /b\nHost: 127.0.0.1:{site.port}\nContent-Length: {1 << 30}")
        await client.stream.send_all(bytes(MAX_BODY_BYTES + 1))
        answer = await client.hear()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert site.seen[1].body is None
        assert await client.is_at_end()


async def test_who_waits_before_sending_a_body_is_told_to_go_on() -> None:
    async with serving() as (site, _), site.client() as client:
        await client.say(f"POST /a\nHost: 127.0.0.1:{site.port}\nContent-Length: 2\nExpect: 100-continue")
        assert (await client.stream.receive_some(100)).startswith(b"HTTP/1.1 100")
        await client.stream.send_all(b"hi")
        assert (await client.hear()).status == 200


async def test_a_file_goes_out_whole_and_its_body_is_closed(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    with file_of(tmp_path, data) as fd:
        async with serving() as (site, server), site.client() as client:
            body = FileBody(fd, len(data))
            site.bodies["/f"] = Response(200, (("Content-Length", str(len(data))),), body)
            await client.say("GET /f", "GET /next")
            answer = await client.hear()
            assert answer.body == data
            assert (await client.hear()).body == b"/next"
            assert body.closed == 1
        assert server.statistics().file_bytes == len(data)


@pytest.mark.parametrize("missing", ["the handler ends early", "the file is shorter"])
async def test_a_body_that_is_cut_short_ends_the_connection_in_order(
    tmp_path: Path, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = os.urandom(10_000)
    with file_of(tmp_path, data) as fd:
        async with serving() as (site, _), site.client() as client:
            body = FileBody(fd, 10_000 if missing == "the handler ends early" else 20_000)
            site.bodies["/f"] = Response(200, (("Content-Length", "20000"),), body)
            await client.say("GET /f")
            answer = await client.hear()
            # No reset: what was sent has arrived, and the client asks for the rest.
            assert (answer.body, answer.is_whole) == (data, False)
            assert body.closed == 1
    assert "bug" not in caplog.text


async def test_who_hangs_up_cancels_what_is_done_for_them() -> None:
    async with serving() as (site, _):
        async with site.client() as client:
            await client.say("GET /forever")
            await site.began.wait()
        await site.cancelled.wait()


async def test_the_next_request_may_wait_behind_a_long_one() -> None:
    async with serving() as (site, _):
        async with site.client() as client:
            await client.say("GET /forever", "GET /a")
            await site.began.wait()
        await site.cancelled.wait()
        assert [request.target for request in site.seen] == ["/forever"]


async def test_what_waits_behind_a_request_is_bounded_however_many_are_answered() -> None:
    ours, theirs = trio.socket.socketpair()
    connection = Connection(ours, trio.CapacityLimiter(1))
    client = trio.SocketStream(theirs)

    async def respond(request: Request) -> Response:
        await trio.testing.wait_all_tasks_blocked()  # time enough to take in all that may be taken in
        return Response(200)

    async def send() -> None:
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 40_000)

    async def hear() -> None:
        async for _ in client:
            pass

    with ours, trio.fail_after(30):
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(hear)
            for _ in range(10):
                request = await connection.next_request()
                assert request is not None
                assert await connection.answer(request, respond)
                assert len(connection._http.trailing_data[0]) <= 2 * READ_BYTES
            nursery.cancel_scope.cancel()


async def test_a_bug_is_an_answer_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (site, _), site.client() as client:
        await client.say("GET /bug", "GET /a")
        assert (await client.hear()).status == 500
        assert (await client.hear()).status == 200
    assert "bug" in caplog.text


async def test_a_request_that_does_not_come_to_its_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpd, "REQUEST_S", 0.01)
    async with serving() as (site, _), site.client() as client:
        await client.stream.send_all(b"GET / HTTP/1.1\r\n")
        assert (await client.hear()).status == 408


async def test_a_connection_nobody_uses_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpd, "IDLE_S", 0.01)
    async with serving() as (site, _), site.client() as client:
        assert await client.is_at_end()


async def test_the_longest_idle_makes_place_and_a_busy_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpd, "MAX_CONNECTIONS", 2)
    async with serving() as (site, _), site.client() as idle, site.client() as busy:
        await idle.say("GET /a")
        await idle.hear()
        await busy.say("GET /forever")
        await site.began.wait()
        async with site.client() as third:
            await third.say("GET /b")
            assert (await third.hear()).body == b"/b"
            assert await idle.is_at_end()
            site.began = trio.Event()
            await third.say("GET /forever")
            await site.began.wait()
            async with site.client() as fourth:
                answer = await fourth.hear()
                assert (answer.status, answer.headers["retry-after"]) == (429, "1")


async def test_a_named_port_that_is_busy_is_an_error_and_the_default_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DaemonError, match=str(port)) as caught:
            open_listeners(port)
        assert "[gateway]" in caught.value.hint
        monkeypatch.setattr(httpd, "DEFAULT_HTTP_PORT", port)
        listeners = open_listeners(None)
        # Downwards: above lie the ports of BitTorrent.
        assert listeners[0].getsockname()[0] == "127.0.0.1"
        assert port - httpd.PORT_TRIES < listeners[0].getsockname()[1] < port
        for listener in listeners:
            listener.close()
