"""A small HTTP/1.1 server: how many it serves, and how long it waits for them. Whom it serves is its door's to say.

Invariants:
- the door of this page is `Loopback`, for programs of this machine: it listens on loopback and nowhere else, and a request is
  answered only where its `Host` is one of the server's own names: a web page that points a name of its own at this machine (DNS
  rebinding) hears 421, and a request that a browser makes for another site (`Origin`, `Sec-Fetch-Site`) hears 403;
- no handler sees a request that its door objects to;
- a request that has begun is whole within `REQUEST_S`;
- at most `MAX_CONNECTIONS`; the one that is idle longest makes place for a new one.

It knows no path and no release: that is the handler's. What happens on one connection is `http_connection`'s. Nothing about a
request is logged, because targets hold tokens.
"""

from __future__ import annotations

import errno
import logging
import socket
from dataclasses import dataclass
from typing import Protocol

import h11
import trio

from modelp2p.daemon.config import DEFAULT_HTTP_PORT
from modelp2p.daemon.http_connection import LINGER_S, MAX_BODY_BYTES, PLAIN, Connection, Handler, Request, Response
from modelp2p.protocol.errors import DaemonError

log = logging.getLogger(__name__)

PORT_TRIES = 100
"""How far the default port may move when it is busy: downwards, because 16881 and up are BitTorrent's."""
MAX_CONNECTIONS = 256
"""huggingface_hub opens 8 for a snapshot; a node of a cluster runs some tens of such processes at once."""
IDLE_S = 75.0
"""A connection nobody uses is closed after this long; nginx's keepalive_timeout."""
REQUEST_S = 10.0
_SENDERS = 16
_BACKLOG = 128
_FULL = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class HttpStatistics:
    """What the server has done."""

    connections: int
    requests: int
    file_bytes: int


class Door(Protocol):
    """Where a server listens, and whom it lets in."""

    max_body_bytes: int
    """Of a request with a larger body the handler sees none of it, and the connection ends with the answer."""

    def open(self) -> list[trio.socket.SocketType]:
        """Listening sockets, the server's to close. Called once. Raises ModelP2PError: it cannot listen there."""

    def enter(self, address: str) -> bool:
        """Whether a connection from this address may stay. Each that may is followed by one `leave`."""

    def leave(self, address: str) -> None:
        """A connection that was let in has ended."""

    def objection(self, request: Request) -> Response | None:
        """The answer to a request that no handler may see."""


class HttpServer:
    """Serves `handler`, on loopback where no other door is given.

    Args:
        handler: answers requests that the door lets through; raises nothing on purpose.
        port: of `Loopback`: 0 picks a free one; None is `DEFAULT_HTTP_PORT`, or the next free one below it.
        door: whom it lets in instead of programs of this machine.
    """

    def __init__(self, handler: Handler, port: int | None = None, *, door: Door | None = None) -> None:
        self._handler = handler
        self._door = door or Loopback(port)
        self._port: int | None = None
        self._idle: dict[trio.CancelScope, None] = {}
        """Connections between two requests, the one that is so longest first."""
        self._senders = trio.CapacityLimiter(_SENDERS)
        self._connections = 0
        self._requests = 0
        self._file_bytes = 0

    def __repr__(self) -> str:
        return f"<HttpServer port {self._port}, {self._connections} connections, {self._requests} requests served>"

    @property
    def port(self) -> int:
        """Where it listens; only once it does."""
        assert self._port is not None
        return self._port

    def statistics(self) -> HttpStatistics:
        """Counters since the start."""
        return HttpStatistics(self._connections, self._requests, self._file_bytes)

    async def serve(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept clients until cancelled; started, with the port, when connections are accepted.

        Raises:
            ModelP2PError: the port is busy.
        """
        listeners = self._door.open()
        try:
            self._port = port = listeners[0].getsockname()[1]
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._accept, listener, nursery)
                task_status.started(port)
        finally:
            for listener in listeners:
                listener.close()

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                connection, address = await listener.accept()
            except OSError as exc:
                # Out of descriptors, most likely: others are still served, and some will be closed.
                log.error("cannot accept an HTTP client: %s", exc)
                await trio.sleep(0.1)
                continue
            nursery.start_soon(self._serve_client, connection, address[0])

    async def _serve_client(self, connection: trio.socket.SocketType, address: str) -> None:
        self._connections += 1
        is_in = self._door.enter(address)
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if not is_in or (self._connections > MAX_CONNECTIONS and not self._evict()):
                    with trio.move_on_after(LINGER_S):
                        await connection.send(_FULL)
                    return
                client = Connection(connection, self._senders, self._door.max_body_bytes)
                try:
                    while await self._serve_request(client):
                        pass
                finally:
                    self._file_bytes += client.file_bytes
                await client.linger()
        except (OSError, trio.TooSlowError):
            log.debug("an HTTP client hung up")
        except Exception:
            log.exception("bug while serving an HTTP client")
        finally:
            self._connections -= 1
            if is_in:
                self._door.leave(address)

    def _evict(self) -> bool:
        """Let the connection go that is idle longest; False where none is."""
        scope = next(iter(self._idle), None)
        if scope is None:
            return False
        del self._idle[scope]
        scope.cancel()
        return True

    async def _serve_request(self, client: Connection) -> bool:
        """Read and answer one request; False where the connection is at its end."""
        with trio.move_on_after(IDLE_S) as scope:
            self._idle[scope] = None
            try:
                await client.wait_data()
            finally:
                self._idle.pop(scope, None)
        if scope.cancelled_caught:
            return False
        try:
            with trio.fail_after(REQUEST_S):
                request = await client.next_request()
        except trio.TooSlowError:
            return await client.refuse(408, b"the request did not come in time\n")
        except h11.RemoteProtocolError as exc:
            return await client.refuse(exc.error_status_hint, b"not a request\n")
        if request is None:
            return False
        self._requests += 1
        return await client.answer(request, self._response)

    async def _response(self, request: Request) -> Response:
        try:
            return self._door.objection(request) or await self._handler(request)
        except Exception:
            log.exception("bug while answering an HTTP request")
            return Response(500, PLAIN, b"internal error; the daemon's log has the details\n")


class Loopback:
    """The door for programs of this machine.

    Args:
        port: 0 picks a free one; None is `DEFAULT_HTTP_PORT`, or the next free one below it.
    """

    max_body_bytes = MAX_BODY_BYTES

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._hosts: frozenset[str] = frozenset()

    def open(self) -> list[trio.socket.SocketType]:
        listeners = open_listeners(self._port)
        port = listeners[0].getsockname()[1]
        self._hosts = frozenset({f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"})
        return listeners

    def enter(self, address: str) -> bool:
        return True

    def leave(self, address: str) -> None:
        pass

    def objection(self, request: Request) -> Response | None:
        if request.headers.get("host", "").lower() not in self._hosts:
            return Response(421, PLAIN, b"this is not the server of that host\n")
        if "origin" in request.headers or request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return Response(403, PLAIN, b"not for web pages\n")
        if not request.target.startswith("/"):
            return Response(400, PLAIN, b"no proxy\n")
        return None


def open_listeners(port: int | None) -> list[trio.socket.SocketType]:
    """Listening sockets on 127.0.0.1 and, where there is IPv6 and the port is free there too, on ::1.

    Raises:
        DaemonError: the port is busy, or for None all of `PORT_TRIES`.
    """
    tries = [port] if port is not None else list(range(DEFAULT_HTTP_PORT, DEFAULT_HTTP_PORT - PORT_TRIES, -1))
    for number in tries:
        try:
            first = listen_on(socket.AF_INET, "127.0.0.1", number)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise DaemonError(f"cannot listen on 127.0.0.1:{number} for HTTP: {exc.strerror}") from exc
            continue
        try:
            return [first, listen_on(socket.AF_INET6, "::1", first.getsockname()[1])]
        except OSError:
            return [first]  # the printed address is the other one
    raise DaemonError(
        f"port {tries[0]} is busy, and the gateway was told to listen there" if port else "no port is free for the gateway",
        hint="Set another port below [gateway], leave the port out so that it may move, or set enabled = false.",
    )


def listen_on(family: socket.AddressFamily, host: str, port: int) -> trio.socket.SocketType:
    """A socket that listens on one address, and for IPv6 on no IPv4 address beside it. Raises OSError."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        return trio.socket.from_stdlib_socket(listener)
    except BaseException:
        listener.close()
        raise
