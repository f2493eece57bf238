"""One HTTP/1.1 connection: h11 decides what its bytes mean, trio moves them, the kernel sends files.

Invariants:
- whoever answers sees the few headers in `_KEPT` and no others: there is no credential in this process to log, keep or pass on;
- a request is read whole, within `MAX_HEAD_BYTES` and at most `MAX_BODY_BYTES` of body, before anybody sees it;
- a client that hangs up cancels what is being done for it; one that does not read for `SEND_S` loses its connection;
- a body is closed exactly once, whatever becomes of it.

Bytes of files go from the page cache to the socket (`sendfile`), in threads: a cold disk stops one transfer, not the daemon. Whom
to serve and how long to wait for a request is the server's (`httpd`). Spec: RFC 9112, https://www.rfc-editor.org/rfc/rfc9112
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

import h11
import trio

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 << 10
MAX_BODY_BYTES = 1 << 20
SEND_S = 60.0
"""A client that takes no byte for this long has gone; nginx's send_timeout."""
LINGER_S = 1.0
_LINGER_BYTES = 8 << 20
READ_BYTES = 64 << 10
_PUSH_BYTES = 64 << 20
"""Most bytes one visit to a thread sends: about 50 ms on loopback, so that threads are shared."""
_KEPT = frozenset({b"host", b"origin", b"sec-fetch-site", b"range", b"if-range", b"content-type", b"user-agent"})
PLAIN = (("Content-Type", "text/plain; charset=utf-8"),)


@dataclass(frozen=True, slots=True)
class Request:
    """One request, whole."""

    method: str
    target: str
    """Path and query, as sent."""
    headers: Mapping[str, str]
    """The headers of `_KEPT`, in lower case; of one that came twice, the first."""
    body: bytes | None
    """None where it is larger than the server takes; the rest was not read, and the connection ends with the answer."""


class Sink(Protocol):
    """Where a body goes."""

    async def send_file(self, fd: int, begin: int, end: int) -> None:
        """Send these bytes of a file. Raises EOFError where it is shorter. Cancellation: the connection is lost."""

    async def send_data(self, data: bytes) -> None:
        """Send bytes from elsewhere; returns when the socket took them. Cancellation: the connection is lost."""


class Body(Protocol):
    """The bytes of an answer that come from a file, or from somebody who still delivers them."""

    async def send(self, sink: Sink) -> None:
        """Send what `Content-Length` announced, or less: then the connection is closed, and clients ask for the rest."""

    def close(self) -> None:
        """Give back what this owns. Called once, also where nothing was sent."""


@dataclass(frozen=True, slots=True)
class Response:
    """What a handler answers. The length of bytes is added to the headers; with a `Body`, or with None, they are whole."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | Body | None = b""


Handler = Callable[[Request], Awaitable[Response]]


class Connection:
    """One connection; the sink of its bodies."""

    def __init__(
        self, connection: trio.socket.SocketType, senders: trio.CapacityLimiter, max_body_bytes: int = MAX_BODY_BYTES
    ) -> None:
        self._socket = connection
        self._senders = senders
        self._max_body_bytes = max_body_bytes
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._is_head = False
        self.file_bytes = 0

    async def wait_data(self) -> None:
        """Until a request begins, or the client hangs up."""
        if not self._http.trailing_data[0]:
            await trio.lowlevel.wait_readable(self._socket)

    async def next_request(self) -> Request | None:
        """The next request, or None where the client has hung up between two.

        Raises:
            h11.RemoteProtocolError: not HTTP, or a head that is too long.
        """
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = self._http.next_event()
            match event:
                case h11.NEED_DATA:
                    if self._http.they_are_waiting_for_100_continue:
                        await self._send_event(h11.InformationalResponse(status_code=100, headers=[]))
                    self._http.receive_data(await self._socket.recv(READ_BYTES))
                case h11.Request():
                    head, self._is_head = event, event.method == b"HEAD"
                case h11.Data(data=data):
                    body += data
                    if len(body) > self._max_body_bytes:
                        assert head is not None
                        return _request_of(head, None)
                case h11.EndOfMessage():
                    assert head is not None
                    return _request_of(head, bytes(body))
                case _:
                    return None

    async def answer(self, request: Request, respond: Handler) -> bool:
        """Have a request answered while its client is there; False where nothing may follow on this connection."""
        may_follow = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, nursery.cancel_scope)
            may_follow = await self._send(await respond(request), may_go_on=request.body is not None)
            nursery.cancel_scope.cancel()
        return may_follow

    async def refuse(self, status: int, words: bytes) -> bool:
        """Answer what was no request; False: nothing may follow."""
        return await self._send(Response(status, PLAIN, words), may_go_on=False)

    async def send_file(self, fd: int, begin: int, end: int) -> None:
        while begin < end:
            sent = await trio.to_thread.run_sync(_push, self._socket.fileno(), fd, begin, end, limiter=self._senders)
            self._http.send_with_data_passthrough(h11.Data(data=_Sent(sent)))  # type: ignore[arg-type]  # only its length counts
            self.file_bytes += sent
            begin += sent
            if begin < end:
                await self._wait_writable()

    async def send_data(self, data: bytes) -> None:
        await self._send_event(h11.Data(data=data))

    async def linger(self) -> None:
        """Say that nothing follows, and give the client a moment to read what was said.

        Closing while something of it is unread would reset the connection, and destroy the answer on its way.
        """
        with contextlib.suppress(OSError), trio.move_on_after(LINGER_S):
            self._socket.shutdown(socket.SHUT_WR)
            left = _LINGER_BYTES
            while left > 0 and (data := await self._socket.recv(READ_BYTES)):
                left -= len(data)

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Cancel `scope` when the client hangs up."""
        # What waits from before counts: else each answer to one of many small requests would let more of them in.
        held = len(self._http.trailing_data[0])
        while held < READ_BYTES:
            try:
                data = await self._socket.recv(READ_BYTES)
            except OSError:
                data = b""
            if not data:
                scope.cancel()
                return
            # Its next request already: it waits its turn. Who sends much more is not watched any longer.
            held += len(data)
            self._http.receive_data(data)

    async def _send(self, response: Response, *, may_go_on: bool) -> bool:
        try:
            return await self._send_whole(response, may_go_on=may_go_on)
        except (OSError, EOFError, trio.TooSlowError) as exc:
            log.debug("an answer ended early: %s", exc)
            return False
        finally:
            if response.body is not None and not isinstance(response.body, bytes):
                response.body.close()

    async def _send_whole(self, response: Response, *, may_go_on: bool) -> bool:
        # "An origin server with a clock MUST generate a Date header field" (RFC 9110 6.6.1).
        headers, body = [("Date", formatdate(usegmt=True)), *response.headers], response.body
        if isinstance(body, bytes):
            headers.append(("Content-Length", str(len(body))))
        if not may_go_on:
            headers.append(("Connection", "close"))
        await self._send_event(h11.Response(status_code=response.status, headers=headers, reason=_reason(response.status)))
        if isinstance(body, bytes):
            if body and not self._is_head:
                await self._send_event(h11.Data(data=body))
        elif body is not None:
            await body.send(self)
        try:
            await self._send_event(h11.EndOfMessage())
        except h11.LocalProtocolError:
            return False  # fewer bytes than announced: the end of the connection says so
        if not may_go_on or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def _send_event(self, event: h11.Event) -> None:
        data = self._http.send(event)
        view = memoryview(data or b"")
        while view:
            with trio.fail_after(SEND_S):
                view = view[await self._socket.send(view) :]

    async def _wait_writable(self) -> None:
        with trio.fail_after(SEND_S):
            await trio.lowlevel.wait_writable(self._socket)


class _Sent:
    """Bytes that the kernel sent already, for h11 to count."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def _push(sock: int, fd: int, begin: int, end: int) -> int:
    """In a thread: send until the socket takes no more. Returns the bytes sent."""
    sent, end = 0, min(end, begin + _PUSH_BYTES)
    while begin + sent < end:
        try:
            count = os.sendfile(sock, fd, begin + sent, end - begin - sent)
        except BlockingIOError:
            break
        if count == 0:
            raise EOFError("a file is shorter than its manifest says")
        sent += count
    return sent


def _request_of(head: h11.Request, body: bytes | None) -> Request:
    headers = {name.decode("ascii"): value.decode("latin-1") for name, value in reversed(list(head.headers)) if name in _KEPT}
    return Request(head.method.decode("ascii"), head.target.decode("ascii"), headers, body)


def _reason(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode("ascii")
    except ValueError:
        return b""
