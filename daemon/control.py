"""The control-socket server: clients command one daemon, each as far as the socket's gate lets it.

Invariants:
- a peer that the gate does not take is refused by its credentials before a byte of it is read;
- a request that the gate does not take reaches no handler;
- at most `MAX_CLIENTS` connections a socket, so that the public one never fills the owner's, and there few for each user;
- a reply with descriptors waits until what was sent before is read: those on their way count against this process's own limit;
- a request that is not whole within `REQUEST_TIMEOUT_S`, or a reader that does not read for as long, loses its connection
  and nothing else;
- every descriptor received is closed here when its request ends.

It knows no verb (what each socket is for is `gate.py`'s to say): a handler gets a `Call` and returns a result. Closing a
connection cancels its running request.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
import sys
import termios
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.client import build
from modelp2p.daemon.listening import bind, peer_of
from modelp2p.protocol import control
from modelp2p.protocol.codec import Map
from modelp2p.protocol.control import Event, Failure, Hello, Message, Request, Result
from modelp2p.protocol.errors import DeniedError, FormatError, ModelP2PError
from modelp2p.protocol.framing import FrameDecoder

if TYPE_CHECKING:
    from modelp2p.daemon.gate import Gate

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 16
_READ_POLL_S = 0.02
MAX_STRANGERS = 64
_BUG_HINT = "This is a bug of modelp2p: please report it. The daemon's log has the details."


@dataclass(slots=True)
class Answer:
    """What a handler returns; `fds` are sent and then closed here."""

    result: Map
    fds: tuple[int, ...] = ()


@dataclass(slots=True)
class Call:
    """One request as a handler sees it. `fds` stay open until the handler returns."""

    verb: str
    args: Map
    fds: tuple[int, ...]
    emit: Callable[[Map], None]
    """Queue a progress event; a slow client misses events, never the result."""
    session: dict[str, object] = field(default_factory=dict)
    """State of this connection (what `publish` prepared, for its `publish_commit`)."""
    is_strangers: bool = False
    """It came by a socket that is not the owner's."""
    send: Callable[[Map], Awaitable[None]] = field(kw_only=True)
    """Send an event and wait while the client is behind. Those not yet on their way when the handler returns are lost."""


Handler = Callable[[Call], Awaitable[Answer]]


class ControlServer:
    """Listens on one Unix socket and hands requests that `gate` takes to `handler`."""

    def __init__(self, path: Path, handler: Handler, gate: Gate) -> None:
        self.path = path
        self._handler = handler
        self._gate = gate
        self._clients = 0
        self._users: Counter[int] = Counter()
        self._served = 0
        self._strangers: dict[trio.CancelScope, None] = {}
        """Connections that did not say hello yet, oldest first: they never take a client's place."""
        self.on_idle: Callable[[], None] = lambda: None
        """Called when the last client has gone."""
        self.on_close: Callable[[dict[str, object]], None] = lambda state: None
        """Called with a connection's state when it ends."""

    @property
    def clients(self) -> int:
        """Connections open now."""
        return self._clients

    def __repr__(self) -> str:
        return f"<ControlServer {self.path}, {self._clients} clients, {self._served} requests served>"

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept clients until cancelled; started when the socket accepts connections.

        Resources: removes the socket file at the end.
        """
        listener = bind(self.path, self._gate.mode)
        inode = os.stat(self.path).st_ino
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    try:
                        connection, _ = await listener.accept()
                    except OSError as exc:
                        # Out of descriptors, most likely: others are still served, and some will be closed.
                        log.error("cannot accept a control client: %s", exc)
                        await trio.sleep(0.1)
                        continue
                    nursery.start_soon(self._serve_client, connection)
        finally:
            listener.close()
            # Only our own file: a successor may already have put its socket there.
            if self.path.exists() and os.stat(self.path).st_ino == inode:
                self.path.unlink()

    async def _serve_client(self, connection: trio.socket.SocketType) -> None:
        session = _Connection(connection, self._gate)
        try:
            peer = peer_of(connection)
        except OSError:
            session.close()
            return
        self._users[peer.uid] += 1
        try:
            self._gate.check_peer(peer)
            if 0 < self._gate.max_per_user < self._users[peer.uid]:
                raise DeniedError(
                    f"user {peer.uid} has {self._gate.max_per_user} connections to this service already",
                    hint="Wait until one of those commands has ended.",
                )
            if not await self._greet(session):
                return
            if self._clients >= control.MAX_CLIENTS:
                raise DeniedError("too many clients", hint=f"{control.MAX_CLIENTS} commands wait for this daemon already.")
            await self._serve_requests(session)
        except ModelP2PError as exc:
            log.info("a control client was refused: %s", exc.message)
            with trio.move_on_after(1, shield=True):
                await session.refuse(exc)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("a control client hung up")
        except Exception:
            log.exception("bug while serving a control client")
        finally:
            session.close()
            self._users[peer.uid] -= 1
            if not self._users[peer.uid]:
                del self._users[peer.uid]

    async def _greet(self, session: _Connection) -> bool:
        """Exchange hellos; False for a connection that kept silent until others needed its place."""
        if len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.cancel()
        with trio.CancelScope() as scope:
            self._strangers[scope] = None
            try:
                await session.greet()
            finally:
                self._strangers.pop(scope, None)
        return not scope.cancelled_caught

    async def _serve_requests(self, session: _Connection) -> None:
        self._clients += 1
        try:
            while (request := await session.next_request()) is not None:
                await self._serve_request(session, request)
                self._served += 1
        finally:
            self.on_close(session.state)
            self._clients -= 1
            if self._clients == 0:
                self.on_idle()

    async def _serve_request(self, session: _Connection, request: Request) -> None:
        events, queued = trio.open_memory_channel[Map](16)

        def emit(body: Map) -> None:
            try:
                events.send_nowait(body)
            except (trio.WouldBlock, trio.ClosedResourceError):
                session.missed_events += 1

        fds = session.take_fds(request.fds)
        answer: Answer | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.cancel_on_hangup, nursery.cancel_scope)
                nursery.start_soon(session.send_events, request.id, queued, nursery.cancel_scope)
                try:
                    self._gate.check_request(request.verb, request.args)
                    is_strangers = self._gate.is_public
                    call = Call(request.verb, request.args, fds, emit, session.state, is_strangers, send=events.send)
                    answer = await self._handler(call)
                    reply: Message = Result(request.id, answer.result, len(answer.fds))
                except ModelP2PError as exc:
                    reply = Failure.of(request.id, exc)
                except Exception as exc:
                    # A bug costs the request that met it, not everybody else's transfers.
                    log.exception("bug while serving '%s'", request.verb)
                    reply = Failure.of(request.id, ModelP2PError(f"internal error: {type(exc).__name__}: {exc}", hint=_BUG_HINT))
                nursery.cancel_scope.cancel()
            if session.is_gone:
                raise trio.BrokenResourceError
            await session.send(reply, answer.fds if answer else ())
        finally:
            for fd in (*fds, *(answer.fds if answer else ())):
                os.close(fd)


class _Connection:
    """One client's byte stream with its descriptors."""

    def __init__(self, connection: trio.socket.SocketType, gate: Gate) -> None:
        self._socket = connection
        self._gate = gate
        self._decoder = FrameDecoder(control.MAX_FRAME_BYTES)
        self._fds: list[int] = []
        self._sending = trio.Lock()
        self.state: dict[str, object] = {}
        self.is_gone = False
        self.missed_events = 0

    async def greet(self) -> None:
        with _deadline():
            message = await self._next_message()
        if message is None:
            raise trio.BrokenResourceError
        await self.send(Hello(control.V_MIN, control.V_MAX, build()), ())
        control.check_hello(message)

    async def next_request(self) -> Request | None:
        message = await self._next_message()
        if message is not None and not isinstance(message, Request):
            raise FormatError("a client may only send requests")
        return message

    def take_fds(self, count: int) -> tuple[int, ...]:
        if count > len(self._fds):
            raise FormatError("a request announced descriptors that did not come")
        taken, self._fds = tuple(self._fds[:count]), self._fds[count:]
        return taken

    async def send_events(self, number: int, queued: trio.MemoryReceiveChannel[Map], scope: trio.CancelScope) -> None:
        """Send what is queued; where the client does not take it any more, cancel `scope`."""
        try:
            async for body in queued:
                await self.send(Event(number, body), ())
        except (OSError, FormatError, trio.BrokenResourceError, trio.ClosedResourceError):
            # An ordinary end: a client that hangs up does it while it is being told something, too.
            self.is_gone = True
            scope.cancel()

    async def cancel_on_hangup(self, scope: trio.CancelScope) -> None:
        """Cancel `scope` when the client closes; the peek leaves pipelined requests where they are."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                waiting = self._socket._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)  # type: ignore[attr-defined]  # trio offers no peek
            except BlockingIOError:
                continue
            except OSError:
                waiting = b""
            if not waiting:
                self.is_gone = True
                scope.cancel()
                return
            await trio.sleep(1)

    async def send(self, message: Message, fds: tuple[int, ...]) -> None:
        data = control.encode_message(message)
        with _deadline():
            async with self._sending:
                if fds:
                    await self._wait_read()
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
                    data = data[await self._socket.sendmsg([data], ancillary) :]
                while data:
                    data = data[await self._socket.send(data) :]

    async def _wait_read(self) -> None:
        """Return when the peer has read everything; a deadline is the caller's."""
        unread = bytearray(4)
        while True:
            fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, unread)
            if not int.from_bytes(unread, sys.byteorder):
                return
            await trio.sleep(_READ_POLL_S)

    async def refuse(self, error: ModelP2PError) -> None:
        try:
            await self.send(Failure.of(0, error), ())
        except (OSError, ModelP2PError, trio.BrokenResourceError):
            self.is_gone = True

    def close(self) -> None:
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    async def _next_message(self) -> Message | None:
        """The next message, or None at the end of the stream between two messages."""
        frame = self._decoder.next_frame()
        if frame is None and self._decoder.is_between_frames:
            if not await self._read():
                return None
            frame = self._decoder.next_frame()
        if frame is None:
            with _deadline():
                frame = await self._rest_of_frame()
        return control.decode_message(frame)

    async def _rest_of_frame(self) -> bytes:
        while (frame := self._decoder.next_frame()) is None:
            if not await self._read():
                raise FormatError("the client hung up in the middle of a message")
        return frame

    async def _read(self) -> bool:
        most = self._gate.max_fds
        # Without room for them the kernel drops descriptors before they are ours.
        space = socket.CMSG_SPACE(most * 4) if most else 0
        data, ancillary, flags, _ = await self._socket.recvmsg(_READ_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, body in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.extend(struct.unpack(f"{len(body) // 4}i", body[: len(body) // 4 * 4]))
        if flags & socket.MSG_CTRUNC or len(self._fds) > most:
            raise self._gate.too_many_fds()
        self._decoder.receive_data(data)
        return bool(data)


class _deadline:  # used like a function
    """Turns a stall of `REQUEST_TIMEOUT_S` into an error that costs the peer its connection."""

    def __enter__(self) -> None:
        self._scope = trio.move_on_after(control.REQUEST_TIMEOUT_S)
        self._scope.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        self._scope.__exit__(*exc_info)  # type: ignore[arg-type]  # the three values python passes
        if self._scope.cancelled_caught:
            raise FormatError(f"a control client stalled for {control.REQUEST_TIMEOUT_S} s in the middle of a message")
