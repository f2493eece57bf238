"""The HTTP client of web seeds: one range of one file from an origin, exactly, or an error.

Invariants:
- a connection goes to an address that was looked up and checked for it, and to no other: what the whole internet does not route
  is refused, unless the configuration lists the host; no proxy is used, whatever the environment says;
- https only, the first URL and every redirect, but for listed hosts; five redirects at most, followed here;
- the token goes to the configured origin alone, and not even there after a redirect has left it;
- bytes are handed on as they come, and no more than were asked for; a reply that is not exactly that range is an error;
- neither a query, which may hold a signature, nor a token is logged or part of an error.

Where a redirect led is remembered until it fails: the Hub's signed addresses hold for an hour, and each is a request less.
Import it late: the client library costs a daemon some 50 ms. Spec: RFC 9110, https://www.rfc-editor.org/rfc/rfc9110
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import httpcore2
import trio

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.webseeds import HttpUrl, OriginError, is_public_address, retry_after_s

if TYPE_CHECKING:
    from modelp2p.protocol.httprange import Span

CONNECT_S = 10.0
FIRST_BYTE_S = 15.0
"""From the question to the head of the last answer, redirects included; the engine gives a web seed 20 s."""
REMEMBERED_S = 7.0
"""What a remembered address gets of that, so that there is time to resolve it anew."""
SILENCE_S = 15.0
SLOW_BYTES = 64 << 10
"""An origin that sends less than this in as long is as good as silent: the engine uses three at a time, and this one is one."""
CLOSE_S = 2.0
ADDRESS_S = 3.0
"""What each address of a host but the last gets."""
MAX_ADDRESSES = 4
MAX_REDIRECTS = 5
MAX_REMEMBERED = 4096
_CONNECTIONS = 64
_KEPT_CONNECTIONS = 16
_KEPT_S = 60.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({429, 503})

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, in the system's order. Raises OSError."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[4][0]) for address in found))


class OriginClient:
    """Asks origins.

    Args:
        hosts: hosts that may be reached unencrypted and at private addresses, `host` or `host:port`.
        token: shown to `token_origin` as a bearer token; empty for none.
        token_origin: `scheme://host[:port]`.
        tls: what certificates are checked with; the system's authorities where None.
        look_up: the addresses of a host.

    Resources: idle connections, until `aclose`.
    """

    def __init__(
        self,
        hosts: Collection[str] = (),
        *,
        token: str = "",
        token_origin: str = "https://huggingface.co",
        tls: ssl.SSLContext | None = None,
        look_up: Resolve = resolve,
    ) -> None:
        # At its most talkative it writes whole heads, with tokens and signatures.
        logging.getLogger("httpcore2").setLevel(logging.WARNING)
        self._hosts = frozenset(hosts)
        self._token = token
        self._token_origin = HttpUrl.parse(token_origin).origin
        self._remembered: OrderedDict[str, tuple[HttpUrl, bool]] = OrderedDict()
        """Where each URL led, and whether the way never left the origin of the token."""
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls or httpcore2.default_ssl_context(),
            max_connections=_CONNECTIONS,
            max_keepalive_connections=_KEPT_CONNECTIONS,
            keepalive_expiry=_KEPT_S,
            network_backend=_CheckedNetwork(self._hosts, look_up),
        )

    def __repr__(self) -> str:
        return f"<OriginClient {len(self._remembered)} addresses remembered>"

    @asynccontextmanager
    async def open(self, url: str, span: Span, size: int) -> AsyncIterator[OriginBody]:
        """Bytes `span` of the file of `size` bytes at `url`.

        Raises:
            OriginError: it does not deliver exactly that.
        Cancellation: the connection is closed.
        """
        try:
            response = await self._answer(url, span, size)
            try:
                async with aclosing(response.aiter_stream()) as chunks:
                    yield OriginBody(chunks, len(span))
            finally:
                await _close(response)
        except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError) as exc:
            raise _error_of(exc) from exc

    async def aclose(self) -> None:
        """Close idle connections."""
        with trio.move_on_after(CLOSE_S) as scope:
            scope.shield = True
            await self._pool.aclose()

    async def _answer(self, url: str, span: Span, size: int) -> httpcore2.Response:
        try:
            with trio.fail_after(FIRST_BYTE_S):
                if (response := await self._from_memory(url, span, size)) is not None:
                    return response
                return await self._follow(url, span, size)
        except trio.TooSlowError as exc:
            raise OriginError(f"no answer within {FIRST_BYTE_S:g} s") from exc

    async def _from_memory(self, url: str, span: Span, size: int) -> httpcore2.Response | None:
        """The answer of where `url` led before; None where there is no such place, or it does not answer any more."""
        known = self._remembered.get(url)
        if known is None:
            return None
        with trio.move_on_after(REMEMBERED_S):
            try:
                target, shows_token = known
                return await self._checked(await self._ask(target, span, shows_token=shows_token), span, size)
            except OriginError as exc:
                if exc.retry_after_s is not None:
                    raise
            except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):
                pass  # whatever it was: it is resolved anew, once
        self._remembered.pop(url, None)
        return None

    async def _follow(self, url: str, span: Span, size: int) -> httpcore2.Response:
        target, shows_token = _parsed(url), True
        for _ in range(MAX_REDIRECTS + 1):
            if not target.is_allowed(self._hosts):
                raise OriginError(f"it leads to {target.shown} without encryption")
            shows_token = shows_token and target.origin == self._token_origin
            response = await self._ask(target, span, shows_token=shows_token)
            if response.status not in _REDIRECTS:
                checked = await self._checked(response, span, size)
                self._remember(url, target, shows_token)
                return checked
            await _close(response)
            target = _parsed(_header(response, b"location"), _text(target))
        raise OriginError(f"more than {MAX_REDIRECTS} redirects")

    def _remember(self, url: str, target: HttpUrl, shows_token: bool) -> None:
        if target != _parsed(url):
            self._remembered[url] = target, shows_token
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)

    async def _ask(self, url: HttpUrl, span: Span, *, shows_token: bool) -> httpcore2.Response:
        headers = [
            ("Host", url.shown),
            ("User-Agent", "modelp2p/0.1"),
            ("Accept", "*/*"),
            ("Accept-Encoding", "identity"),
            ("Range", f"bytes={span.begin}-{span.end - 1}"),
        ]
        if self._token and shows_token:
            headers.append(("Authorization", f"Bearer {self._token}"))
        timeouts = {"connect": CONNECT_S, "pool": CONNECT_S, "write": SILENCE_S, "read": SILENCE_S}
        address = httpcore2.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target)
        request = httpcore2.Request("GET", address, headers=headers, extensions={"timeout": timeouts})
        return await self._pool.handle_async_request(request)

    async def _checked(self, response: httpcore2.Response, span: Span, size: int) -> httpcore2.Response:
        """The response, where its head promises the bytes that were asked for."""
        try:
            _check_head(response, span, size)
        except OriginError:
            await _close(response)
            raise
        return response


class OriginBody:
    """The bytes of an answer; exactly as many as were asked for."""

    def __init__(self, chunks: AsyncIterator[bytes], length: int) -> None:
        self._chunks = chunks
        self._left = length
        self._came = 0
        self._waited_s = 0.0
        """For that; not what the reader takes its time for."""

    async def read(self) -> bytes:
        """The next bytes, 64 KiB at most; empty at the end.

        Raises:
            OriginError: it ended early, sends more, is silent or drips.
        """
        began = trio.current_time()
        try:
            chunk = await anext(self._chunks, b"")
        except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError) as exc:
            raise _error_of(exc) from exc
        self._left -= len(chunk)
        if self._left < 0 or (not chunk and self._left):
            raise OriginError("it sends another number of bytes than it announced")
        self._came += len(chunk)
        self._waited_s += trio.current_time() - began
        if self._came >= SLOW_BYTES:
            self._came, self._waited_s = 0, 0.0
        elif self._waited_s > SILENCE_S and self._left:
            raise OriginError(f"less than {SLOW_BYTES >> 10} KiB in {SILENCE_S:g} s")
        return chunk


class _CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to addresses that were checked."""

    def __init__(self, hosts: Collection[str], look_up: Resolve) -> None:
        self._hosts = hosts
        self._look_up = look_up
        self._trio = httpcore2.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._addresses(host, port)
        for address in addresses[:-1]:
            try:
                return _Stream(await self._trio.connect_tcp(address, port, ADDRESS_S))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue  # the next one may be reachable: IPv6 is often announced and does not work
        return _Stream(await self._trio.connect_tcp(addresses[-1], port, timeout))

    async def _addresses(self, host: str, port: int) -> list[str]:
        try:
            with trio.fail_after(CONNECT_S):
                found = await self._look_up(host, port)
        except (OSError, UnicodeError, trio.TooSlowError) as exc:
            raise OriginError("its name has no address") from exc
        if not HttpUrl("https", host, port, "/").is_listed(self._hosts):
            found = [address for address in found if is_public_address(address)]
            if not found:
                raise OriginError("its address is private, and its host is not below [web_seeds] hosts")
        return found[:MAX_ADDRESSES]


class _Stream(httpcore2.AsyncNetworkStream):
    """A connection that is closed where its handshake is cancelled; the library closes it after errors alone."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        try:
            return await self._stream.start_tls(ssl_context, server_hostname, timeout)
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self.aclose()
            raise

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


def _check_head(response: httpcore2.Response, span: Span, size: int) -> None:
    status = response.status
    if status in _BUSY:
        raise OriginError(str(status), retry_after_s(_header(response, b"retry-after"), datetime.now(UTC)))
    is_whole = status == 200 and len(span) == size
    if status != 206 and not is_whole:
        raise OriginError("it ignores ranges" if status == 200 else str(status))
    if _header(response, b"content-encoding") not in ("", "identity"):
        raise OriginError("it sends an encoding of the file instead of the file")
    if _header(response, b"content-length") not in ("", str(len(span))):
        raise OriginError("it sends another number of bytes than were asked for")
    if status == 206 and _header(response, b"content-range") != f"bytes {span.begin}-{span.end - 1}/{size}":
        raise OriginError("it sends another range than was asked for, or of another file")


def _header(response: httpcore2.Response, name: bytes) -> str:
    """The first header of that name; empty where there is none."""
    return next((value.decode("latin-1").strip() for key, value in response.headers if key.lower() == name), "")


def _parsed(url: str, base: str = "") -> HttpUrl:
    """A URL, which may be relative to `base`."""
    try:
        whole = urljoin(base, url)
    except ValueError as exc:
        raise OriginError("it leads to what is not a URL") from exc
    try:
        return HttpUrl.parse(whole)
    except FormatError as exc:
        raise OriginError(f"it leads to what is {exc.message}") from exc


def _text(url: HttpUrl) -> str:
    host = f"[{url.host}]" if ":" in url.host else url.host
    return f"{url.scheme}://{host}:{url.port}{url.target}"


async def _close(response: httpcore2.Response) -> None:
    with trio.move_on_after(CLOSE_S) as scope:
        # The library forgets the connection only at the end of this.
        scope.shield = True
        await response.aclose()


def _error_of(exc: Exception) -> OriginError:
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return OriginError("its certificate is not valid")
        cause = cause.__cause__ or cause.__context__
    match exc:
        case httpcore2.ConnectError() | httpcore2.ConnectTimeout():
            return OriginError("cannot connect")
        case httpcore2.ReadTimeout() | httpcore2.WriteTimeout():
            return OriginError(f"silent for {SILENCE_S:g} s")
        case httpcore2.PoolTimeout():
            return OriginError("too many downloads at once on this node")
        case _:
            return OriginError("the connection broke")
