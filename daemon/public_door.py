"""The door of the public HTTP listener: its addresses, its names, and how many connections each visitor may hold.

Invariants:
- it listens where the configuration says and nowhere else; a port never moves, because proxies and firewalls are told about it;
- a request is answered where its `Host` is an address, `localhost`, or a name from the configuration. A page that points a name
  of its own at this machine (DNS rebinding) hears 421: behind a firewall this listener may be for those inside only;
- one visitor holds at most `PER_VISITOR` connections: an IPv4 address, or the /64 that a household or machine has of IPv6.
  Proxies stand for many visitors, and may hold more.

Rates are not its business: a proxy, or the kernel, can limit them better. No header such as `X-Forwarded-For` is believed.
"""

from __future__ import annotations

import ipaddress
import socket
from collections import Counter
from typing import TYPE_CHECKING

from modelp2p.daemon.http_connection import PLAIN, Request, Response
from modelp2p.daemon.httpd import listen_on
from modelp2p.daemon.settings import split_address
from modelp2p.protocol.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    import trio

    from modelp2p.daemon.config import PublicHttp

PER_VISITOR = 16
"""A browser opens 6, aria2c at most 16; libtorrent one for each torrent."""


class PublicDoor:
    """Lets everybody in, each a little."""

    max_body_bytes = 0

    def __init__(self, config: PublicHttp) -> None:
        self._listen = config.listen
        self._hosts = frozenset(config.hosts) | {"localhost"}
        self._proxies = frozenset(config.proxies)
        self._inside: Counter[str] = Counter()
        self.addresses: tuple[str, ...] = ()
        """Where it listens, as URLs; empty before `open`."""

    def __repr__(self) -> str:
        return f"<PublicDoor {' '.join(self.addresses)}, {self._inside.total()} connections of {len(self._inside)} visitors>"

    def open(self) -> list[trio.socket.SocketType]:
        opened: list[trio.socket.SocketType] = []
        try:
            for address in self._listen:
                host, port = split_address(address, "public_http.listen")
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                try:
                    opened.append(listen_on(family, host, port))
                except OSError as exc:
                    raise UnavailableError(
                        f"cannot listen on {address} for everybody: {exc.strerror}",
                        hint="Set another address as listen below [public_http], or enabled = false.",
                    ) from exc
            if not opened:
                raise UsageError("[public_http] is enabled, and listen names no address", hint="Set enabled = false.")
        except BaseException:
            for listener in opened:
                listener.close()
            raise
        self.addresses = tuple(_url(*listener.getsockname()[:2]) for listener in opened)
        return opened

    def enter(self, address: str) -> bool:
        visitor = _visitor(address)
        if address not in self._proxies and self._inside[visitor] >= PER_VISITOR:
            return False
        self._inside[visitor] += 1
        return True

    def leave(self, address: str) -> None:
        visitor = _visitor(address)
        self._inside[visitor] -= 1
        if not self._inside[visitor]:
            del self._inside[visitor]

    def objection(self, request: Request) -> Response | None:
        if not self._is_called(request.headers.get("host", "")):
            return Response(421, PLAIN, b"this is not the server of that host\n")
        if not request.target.startswith("/"):
            return Response(400, PLAIN, b"no proxy\n")
        return None

    def _is_called(self, host: str) -> bool:
        """Whether a `Host` means this server, on whatever port: a proxy has one of its own."""
        name, colon, port = host.lower().rpartition(":")
        if not colon or not port.isdigit():
            name = host.lower()
        if name in self._hosts:
            return True
        try:
            # The one thing that nobody can point elsewhere.
            ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
        except ValueError:
            return False
        return True


def _visitor(address: str) -> str:
    if ":" not in address:
        return address
    return str(ipaddress.IPv6Network((address.partition("%")[0], 64), strict=False))


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
