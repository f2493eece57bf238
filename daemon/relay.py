"""The loopback relay: to the engine a web seed like any other, to the origins the one client they see of this node.

    libtorrent ── GET /SECRET/INFO-HASH/ORIGIN/REVISION/PATH ──► relay ── GET, https ──► origin

Invariants:
- only who knows the random segment is answered: the engine is told it, and nobody else;
- what can be asked for is a file of the signed manifest of a release that is being fetched, at an origin that the manifest names;
- an origin's failure never becomes an answer, since libtorrent strikes a file for ever after one: the connection ends, and the
  fetch hears why;
- bytes are handed on as they come; nothing is kept, and nothing is checked: the engine and the fetch check every piece.

Each origin has a port of its own, because libtorrent names a web seed that it bans by its address.
"""

from __future__ import annotations

import hmac
import re
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

import trio

from modelp2p.daemon.http_connection import PLAIN, Request, Response, Sink
from modelp2p.daemon.httpd import HttpServer, listen_on
from modelp2p.protocol.errors import DaemonError
from modelp2p.protocol.httprange import Span, UnsatisfiableError, parse_range
from modelp2p.protocol.webseeds import MAX_ORIGINS, OriginError, WebOrigin

if TYPE_CHECKING:
    from modelp2p.daemon.origin import OriginClient
    from modelp2p.protocol.manifest import FileEntry
    from modelp2p.protocol.statement import Release

_SECRET_BYTES = 16
_HOST = "127.0.0.1"
_TARGET = re.compile(r"/([0-9a-f]{32})/([0-9a-f]{64})/([0-9])/([^/?]+)/([^?]+)", re.ASCII)


@dataclass(slots=True)
class Relayed:
    """One release that is relayed.

    Args:
        release: whose files may be asked for.
        origins: where they are taken from; an origin's number is its place.
        client: asks them.
        report: told after each question what became of it; None where all was delivered.
    """

    release: Release
    origins: tuple[WebOrigin, ...]
    client: OriginClient
    report: Callable[[int, OriginError | None], None]
    sent: list[int] = field(init=False)
    """Bytes handed to the engine, by origin."""

    def __post_init__(self) -> None:
        self.sent = [0] * len(self.origins)


class Relay:
    """The relay of one node; it listens from the first release on.

    Resources: its server runs while `run` does.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_hex(_SECRET_BYTES)
        self._door = _Door()
        self._releases: dict[str, Relayed] = {}
        self._nursery: trio.Nursery | None = None
        self._starting = trio.Lock()

    def __repr__(self) -> str:
        return f"<Relay at {len(self._door.ports)} ports, {len(self._releases)} releases>"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the server, once there is one, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def add(self, relayed: Relayed) -> None:
        """Relay a release from now on, in place of what was relayed of it before.

        Raises:
            DaemonError: this machine has no port left.
        """
        async with self._starting:
            if not self._door.ports:
                assert self._nursery is not None, "the relay does not run"
                await self._nursery.start(HttpServer(self.handle, door=self._door).serve)
        self._releases[relayed.release.info_hash.hex()] = relayed

    def remove(self, relayed: Relayed) -> None:
        """Relay it no longer. Idempotent."""
        key = relayed.release.info_hash.hex()
        if self._releases.get(key) is relayed:
            del self._releases[key]

    def url(self, relayed: Relayed, number: int) -> str:
        """What the engine is told of an origin; it adds revision and path."""
        base = f"http://{_HOST}:{self._door.ports[number]}/{self._secret}/{relayed.release.info_hash.hex()}/{number}/"
        manifest = relayed.release.manifest
        # One file alone, in no folder, is a torrent of that name to libtorrent: it adds the path only.
        is_alone = len(manifest.files) == 1 and "/" not in manifest.files[0].path
        return f"{base}{manifest.revision}/" if is_alone else base

    def number_of(self, relayed: Relayed, url: str) -> int | None:
        """The origin that `url` was told to the engine for; None where it is none of this release's."""
        return next((number for number in range(len(relayed.origins)) if self.url(relayed, number) == url), None)

    async def handle(self, request: Request) -> Response:
        """Answer the engine."""
        await trio.lowlevel.checkpoint()
        asked = self._asked(request.target)
        if asked is None:
            return Response(404, PLAIN, b"not here\n")
        if request.method != "GET":
            return Response(405, (*PLAIN, ("Allow", "GET")), b"only GET\n")
        size = asked.entry.size
        try:
            span = parse_range(request.headers.get("range"), size)
        except UnsatisfiableError:
            return Response(416, (*PLAIN, ("Content-Range", f"bytes */{size}")), b"behind the end\n")
        body = _Forwarded(asked, span or Span(0, size))
        headers = (("Content-Type", "application/octet-stream"), ("Content-Length", str(len(body.span))))
        if span is None:
            return Response(200, headers, body)
        return Response(206, (*headers, ("Content-Range", f"bytes {span.begin}-{span.end - 1}/{size}")), body)

    def _asked(self, target: str) -> _Asked | None:
        """Whose file it is; None for what is not here."""
        match = _TARGET.fullmatch(target)
        if match is None or not hmac.compare_digest(match[1], self._secret):
            return None
        relayed, number = self._releases.get(match[2]), int(match[3])
        if relayed is None or number >= len(relayed.origins) or match[4] != relayed.release.manifest.revision:
            return None
        try:
            entry = relayed.release.manifest.file(unquote(match[5], errors="strict"))
        except (KeyError, UnicodeDecodeError):
            return None
        return _Asked(relayed, number, entry) if entry.size else None


class _Asked(NamedTuple):
    """One file at one origin."""

    relayed: Relayed
    number: int
    entry: FileEntry

    @property
    def url(self) -> str:
        manifest = self.relayed.release.manifest
        origin = self.relayed.origins[self.number]
        return origin.file_url(manifest.revision, self.entry.path, is_only_file=len(manifest.files) == 1)


class _Forwarded:
    """A body that an origin still delivers."""

    def __init__(self, asked: _Asked, span: Span) -> None:
        self._asked = asked
        self.span = span

    async def send(self, sink: Sink) -> None:
        relayed, number = self._asked.relayed, self._asked.number
        try:
            async with relayed.client.open(self._asked.url, self.span, self._asked.entry.size) as body:
                while data := await body.read():
                    # Before they are sent: the engine may say that it has them before this task goes on.
                    relayed.sent[number] += len(data)
                    await sink.send_data(data)
        except OriginError as exc:
            relayed.report(number, exc)
            return
        relayed.report(number, None)

    def close(self) -> None:
        pass  # what it owns lives no longer than `send`


class _Door:
    """The door of the relay: the first origin of any release at its first port, the second at its second."""

    max_body_bytes = 0

    def __init__(self) -> None:
        self.ports: tuple[int, ...] = ()

    def open(self) -> list[trio.socket.SocketType]:
        opened: list[trio.socket.SocketType] = []
        try:
            for _ in range(MAX_ORIGINS):
                opened.append(listen_on(socket.AF_INET, _HOST, 0))
        except OSError as exc:
            for listener in opened:
                listener.close()
            raise DaemonError(f"cannot listen on {_HOST} for web seeds: {exc.strerror}", hint="Try --peers-only.") from exc
        self.ports = tuple(listener.getsockname()[1] for listener in opened)
        return opened

    def enter(self, address: str) -> bool:
        return True

    def leave(self, address: str) -> None:
        pass

    def objection(self, request: Request) -> Response | None:
        # A web page that guesses the port still lacks the secret; one that points a name of its own here is not even heard.
        if request.headers.get("host", "") not in {f"{_HOST}:{port}" for port in self.ports}:
            return Response(421, PLAIN, b"this is not the server of that host\n")
        return None
