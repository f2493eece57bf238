"""Web seeds: which origins of a manifest may be asked, for which URL, and when. Pure: time, bytes and failures come in.

    peers deliver ──────────────► no origin is used
    not in `patience_s` ────────► every origin that is not resting
    429 or 503 with Retry-After ► that origin rests as long as it said, an hour at most
    another failure ────────────► it rests 5 s, twice as long each time, 5 minutes at most
    wrong bytes ────────────────► it is not asked again in this fetch

Invariants:
- an origin is used only while peers deliver nothing, and only while it does not rest;
- a URL that is asked is https, or of a host that the configuration lists; it carries no user and no password;
- what is asked of an origin is one file of the signed manifest, at the place BEP 19 gives it below the origin's address.

Who opens connections is `daemon/origin.py`. Spec: https://www.bittorrent.org/beps/bep_0019.html
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import quote, urlsplit

from modelp2p.protocol.errors import Fact, FormatError, UnavailableError

PATIENCE_S = 5.0
"""How long peers may deliver nothing before origins are asked, where the configuration says nothing else."""
ENOUGH_BYTES = 256 << 10
"""Peers that send less than this in their patience deliver nothing: else one that drips keeps the origins away for ever."""
FIRST_REST_S = 5.0
LAST_REST_S = 300.0
MAX_RETRY_AFTER_S = 3600.0
"""Longer than this no server is believed: a fetch that runs for hours looks again."""
MAX_ORIGINS = 8
"""Of one manifest; libtorrent uses three at a time."""
MAX_URL_CHARS = 8192
_URL = re.compile(r"[!-~]+", re.ASCII)
_NAT64 = IPv6Network("64:ff9b::/96")
_UNICAST = IPv6Network("2000::/3")
"""What of IPv6 the internet routes (RFC 4291 section 4): Python calls all else global that has no use, or had one once."""
_MINUTE_S = 60


class OriginError(UnavailableError):
    """An origin did not deliver; `retry_after_s` is how long it asked to be left alone."""

    def __init__(self, message: str, retry_after_s: float | None = None, *, hint: str = "", **facts: Fact) -> None:
        super().__init__(message, hint=hint, **facts)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class HttpUrl:
    """A URL taken apart; `target` is path and query, `host` has no brackets."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, url: str) -> HttpUrl:
        """The URL in a text; a fragment is dropped, as clients do.

        Raises:
            FormatError: not http or https, not plain ASCII, or with a user in it.
        """
        if len(url) > MAX_URL_CHARS or not _URL.fullmatch(url):
            raise FormatError("not a URL of printable ASCII characters")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise FormatError("not a URL") from exc
        if parts.scheme not in ("https", "http") or not host or "@" in parts.netloc or port == 0:
            raise FormatError("not a URL of a web server")
        query = f"?{parts.query}" if parts.query else ""
        return cls(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), (parts.path or "/") + query)

    @property
    def origin(self) -> tuple[str, str, int]:
        """What makes two URLs of one origin (RFC 6454): scheme, host and port."""
        return (self.scheme, self.host, self.port)

    @property
    def shown(self) -> str:
        """The host as people see it; the port only where it is not the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def is_listed(self, hosts: Collection[str]) -> bool:
        """Whether the configuration names this host, with its port or without one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host in hosts or f"{host}:{self.port}" in hosts

    def is_allowed(self, hosts: Collection[str]) -> bool:
        """Whether it may be asked at all: encrypted, or listed."""
        return self.scheme == "https" or self.is_listed(hosts)


@dataclass(frozen=True, slots=True)
class WebOrigin:
    """One web seed of a manifest that this node may use; `shown` is its host."""

    base: str
    shown: str

    def file_url(self, revision: str, path: str, *, is_only_file: bool) -> str:
        """Where a file of the release lies at this origin.

        The release is a folder of the name of its revision. Only the URL of a release of one file may be that of the file.
        """
        if is_only_file and not self.base.endswith("/"):
            return self.base
        return f"{self.base.rstrip('/')}/{revision}/{quote(path)}"


def usable_origins(urls: Iterable[str], hosts: Collection[str]) -> tuple[WebOrigin, ...]:
    """The web seeds of a manifest that may be asked, each once, in its order; `MAX_ORIGINS` at most."""
    found: dict[str, WebOrigin] = {}
    for url in urls:
        try:
            parsed = HttpUrl.parse(url)
        except FormatError:
            continue
        # A query would stand in front of the file's path.
        if parsed.is_allowed(hosts) and "?" not in url and "#" not in url:
            found.setdefault(url, WebOrigin(url, parsed.shown))
    return tuple(found.values())[:MAX_ORIGINS]


def is_public_address(address: str) -> bool:
    """Whether the whole internet routes an address, also where it is wrapped into another family's."""
    found: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        if found.sixtofour is not None or found.teredo is not None:
            return False
        if found in _NAT64:
            found = IPv4Address(int(found) & 0xFFFF_FFFF)
        elif found.ipv4_mapped is not None:  # the same in every version of Python
            found = found.ipv4_mapped
        elif found not in _UNICAST:
            return False
    return found.is_global and not found.is_multicast


def retry_after_s(header: str | None, wall: datetime) -> float | None:
    """Seconds that a `Retry-After` header asks for, `MAX_RETRY_AFTER_S` at most; None where it asks for nothing.

    Args:
        header: whole seconds, or an HTTP date (RFC 9110 section 10.2.3).
        wall: the time now, with its zone.
    """
    text = (header or "").strip()
    if re.fullmatch(r"\d{1,18}", text, re.ASCII):
        return min(float(text), MAX_RETRY_AFTER_S)
    try:
        until = parsedate_to_datetime(text)
        seconds = (until - wall).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None  # not a date, or one without a zone
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S)


@dataclass(slots=True)
class _Condition:
    """What became of one origin so far."""

    shown: str
    rests_until: float = -math.inf
    failures: int = 0
    """In a row; what it delivers ends the row."""
    words: str = ""
    is_banned: bool = False


@dataclass(slots=True)
class WebSeedPlan:
    """When the origins of one fetch are used. Times are seconds of any monotonic clock.

    Args:
        origins: in the manifest's order; an origin's number is its place.
        now: when the fetch began: peers get `patience_s` from then on.
        patience_s: how long peers may deliver nothing.
    """

    origins: tuple[WebOrigin, ...]
    now: float
    patience_s: float = PATIENCE_S
    _conditions: tuple[_Condition, ...] = field(init=False)
    _peers_heard: float = field(init=False)
    _counted_bytes: int = 0
    """What peers had sent when..."""
    _counted: float = field(init=False)
    """...it was last looked at whether it is enough."""
    _held_since: float | None = None

    def __post_init__(self) -> None:
        self._conditions = tuple(_Condition(origin.shown) for origin in self.origins)
        self._peers_heard = self._counted = self.now

    def heard_peers(self, total_bytes: int, now: float) -> None:
        """Peers have sent this much so far; they are heard where it is `ENOUGH_BYTES` more within their patience."""
        is_enough = total_bytes - self._counted_bytes >= ENOUGH_BYTES
        if is_enough:
            self._peers_heard = now
        if is_enough or now >= self._counted + self.patience_s:
            self._counted_bytes, self._counted = total_bytes, now

    def held(self, on: bool, now: float) -> None:
        """The transfer is held, or let go again: nobody can deliver meanwhile, and nobody is blamed for it."""
        if on and self._held_since is None:
            self._held_since = now
        elif not on and self._held_since is not None:
            self._peers_heard += max(0.0, now - max(self._held_since, self._peers_heard))
            self._held_since = None

    def delivered(self, number: int) -> None:
        """An origin sent all it was asked for."""
        self._conditions[number].failures = 0

    def failed(self, number: int, error: OriginError, now: float) -> None:
        """An origin did not deliver. What fails while it rests already was asked before."""
        condition = self._conditions[number]
        if now >= condition.rests_until:
            condition.failures += 1
        # Beyond ten doublings only the cap counts, and a float has an end.
        rest_s = min(LAST_REST_S, FIRST_REST_S * 2.0 ** min(max(0, condition.failures - 1), 10))
        if error.retry_after_s is not None:
            rest_s = min(max(error.retry_after_s, 1.0), MAX_RETRY_AFTER_S)
        if now + rest_s > condition.rests_until:
            condition.rests_until = now + rest_s
            condition.words = error.message

    def banned(self, number: int) -> None:
        """An origin's bytes were not those of the manifest."""
        self._conditions[number].is_banned = True

    def usable(self, now: float) -> tuple[int, ...]:
        """The numbers of the origins to use now; none while peers deliver."""
        # The patience with peers stands still during a hold: what was in use stays in use, and nothing else is begun.
        if (now if self._held_since is None else self._held_since) < self._peers_heard + self.patience_s:
            return ()
        return tuple(
            number
            for number, condition in enumerate(self._conditions)
            if not condition.is_banned and now >= condition.rests_until
        )

    def next_deadline(self, now: float) -> float | None:
        """When `usable` may change by time alone; None where it cannot."""
        times = [self._peers_heard + self.patience_s]
        times += [condition.rests_until for condition in self._conditions if not condition.is_banned]
        return min((time for time in times if time > now), default=None)

    def reason(self, now: float, wall: datetime) -> str:
        """Which origins are not used, and until when, on one line for people; empty where none is kept from it.

        Args:
            now: the monotonic time.
            wall: the same moment on the clock of whoever reads it.
        """
        parts = []
        for condition in self._conditions:
            if condition.is_banned:
                parts.append(f"origin {condition.shown}: sent wrong bytes, not asked again")
            elif now < condition.rests_until:
                # Rounded up: at the minute that is shown it may be asked again.
                until = wall + timedelta(seconds=condition.rests_until - now + _MINUTE_S - 1)
                parts.append(f"origin {condition.shown}: {condition.words} until {until:%H:%M}")
        return "; ".join(parts)


@dataclass(slots=True)
class Shares:
    """Who sent what one torrent received: `web` and `peers` in bytes, `web_wasted` of the first for nothing.

    The engine counts all together, and what it counts of a web seed is lost with the connection. What was handed to it for web
    seeds is known exactly: as much of what it received is theirs.
    """

    web: int = 0
    peers: int = 0
    web_wasted: int = 0
    _received: int = 0
    _wasted: int = 0
    _sent: int = 0
    _under_way: int = 0
    """Handed over and not received yet: in a socket, or lost with one."""
    _was_on_duty: bool = False

    def update(self, *, received: int, wasted: int, sent: int, is_on_duty: bool) -> None:
        """Take over counters that only grow.

        Args:
            received: what the engine got, from everybody.
            wasted: how much of it was of no use.
            sent: what was handed to it for web seeds.
            is_on_duty: whether it had any since the last time.
        """
        news, self._received = max(0, received - self._received), max(received, self._received)
        trash, self._wasted = max(0, wasted - self._wasted), max(wasted, self._wasted)
        self._under_way += sent - self._sent
        self._sent = sent
        if not (is_on_duty or self._was_on_duty):
            self._under_way, trash = 0, 0
        of_web = min(news, self._under_way)
        self._under_way -= of_web
        self.web += of_web
        self.peers += news - of_web
        self.web_wasted += trash
        self._was_on_duty = is_on_duty

    @property
    def from_web(self) -> int:
        """Bytes of web seeds that were of use."""
        return max(0, self.web - self.web_wasted)

    @property
    def from_peers(self) -> int:
        """Bytes of peers that were of use."""
        return max(0, self._received - self._wasted - self.from_web)
