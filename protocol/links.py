"""Links: one string that finds and pins a release (docs/DESIGN.md).

A link is a v2 magnet any BitTorrent v2 client opens, plus three parts of ours: `x.mp` (manifest swarm, 64 hex), `x.pub`
(publisher id) and the model's name in `dn`. The content is pinned by `xt`, the signer by `x.pub`. BEP 9, BEP 52.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote

from modelp2p.protocol.errors import FormatError, UntrustedError
from modelp2p.protocol.names import ModelName, PublisherId, check_publisher_id
from modelp2p.protocol.text import printable

MAX_LINK_CHARS = 16 << 10
MAX_PARTS = 256
_BTMH = "urn:btmh:1220"
_HEX64 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a node listens: host name or IP literal (without brackets) and TCP port."""

    host: str
    port: int

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise FormatError(f"port {self.port} is out of range")
        if not re.fullmatch(r"[A-Za-z0-9.:_-]{1,253}", self.host, re.ASCII):
            raise FormatError(f"'{self.host[:80]}' is not a host name or address")
        if ":" in self.host:
            try:
                ipaddress.IPv6Address(self.host)
            except ValueError as exc:
                raise FormatError(f"'{self.host[:80]}' is not an IPv6 address") from exc

    @classmethod
    def parse(cls, text: str) -> PeerAddress:
        """`HOST:PORT` or `[IPv6]:PORT`.

        Raises:
            FormatError: anything else.
        """
        host, colon, port = text.strip().rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or len(port) > 5:
            raise FormatError(f"'{text[:120]}' is not HOST:PORT")
        if host.startswith("[") and host.endswith("]") and ":" in host:
            host = host[1:-1]
        elif ":" in host:
            raise FormatError(f"'{text[:120]}': write an IPv6 address as [address]:port")
        return cls(host, int(port))

    @property
    def is_public(self) -> bool:
        """A literal address that the whole internet routes; a host name is not one, whatever it resolves to."""
        try:
            return ipaddress.ip_address(self.host).is_global
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Link:
    """What a link says. `manifest_hash` and `publisher` are what makes it ours; both are required."""

    info_hash: bytes
    """v2 info-hash of the payload swarm, 32 bytes."""
    name: ModelName
    manifest_hash: bytes
    """v2 info-hash of the manifest swarm, 32 bytes."""
    publisher: PublisherId
    trackers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()
    peers: tuple[PeerAddress, ...] = ()

    def __str__(self) -> str:
        parts = [
            f"xt={_BTMH}{self.info_hash.hex()}",
            f"dn={quote(str(self.name), safe='/')}",
            f"x.mp={self.manifest_hash.hex()}",
            f"x.pub={self.publisher}",
            *(f"tr={quote(url, safe='')}" for url in self.trackers),
            *(f"ws={quote(url, safe='')}" for url in self.web_seeds),
            *(f"x.pe={peer}" for peer in self.peers),
        ]
        return "magnet:?" + "&".join(parts)


def parse_link(text: str) -> Link:
    """The link `text` spells; unknown parts are ignored, as magnets demand.

    Raises:
        FormatError: malformed.
        UntrustedError: a bare magnet: it pins bytes, but carries no signed manifest.
    """
    if len(text) > MAX_LINK_CHARS or not text.isascii() or not text.isprintable():
        raise FormatError("the link is too long or holds characters that links do not")
    if not text.lower().startswith("magnet:?"):
        raise FormatError("a link starts with 'magnet:?'")
    query = text[len("magnet:?") :].partition("#")[0]
    try:
        parts = parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_PARTS, errors="strict")
    except ValueError as exc:
        raise FormatError(f"malformed link: {exc}") from exc
    values: dict[str, list[str]] = {}
    for key, value in parts:
        values.setdefault(key.split(".")[0] if re.fullmatch(r"(xt|tr|ws)\.\d+", key) else key, []).append(value)
    if "x.mp" not in values or "x.pub" not in values:
        raise UntrustedError(
            "this magnet carries no signed manifest (no x.mp and x.pub), so nothing about it can be verified",
            hint="Ask the publisher for the modelp2p link, or for the .modelp2p bundle.",
        )
    if any(printable(url) != url for key in ("tr", "ws") for url in values.get(key, ())):
        raise FormatError("an address in the link holds control, bidi or invisible characters")
    topics = [topic for topic in values.get("xt", []) if topic.startswith(_BTMH)]
    if len(topics) != 1 or len(values["x.mp"]) != 1 or len(values["x.pub"]) != 1:
        raise FormatError("a link has exactly one v2 topic (xt=urn:btmh:1220...), one x.mp and one x.pub")
    return Link(
        info_hash=_hash(topics[0].removeprefix(_BTMH), "xt"),
        name=ModelName.parse(values.get("dn", [""])[0]),
        manifest_hash=_hash(values["x.mp"][0], "x.mp"),
        publisher=check_publisher_id(values["x.pub"][0]),
        trackers=tuple(values.get("tr", ())),
        web_seeds=tuple(values.get("ws", ())),
        peers=tuple(PeerAddress.parse(peer) for peer in values.get("x.pe", ())),
    )


def _hash(text: str, key: str) -> bytes:
    if not _HEX64.fullmatch(text):
        raise FormatError(f"{key} must be 64 lower-case hex digits")
    return bytes.fromhex(text)
