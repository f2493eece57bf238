"""How one value of the configuration is written: readers for sizes, rates, addresses and the like, and TOML text for them.

Invariants:
- a reader takes whatever stood in the file and returns the one canonical value, or raises `UsageError` naming the key;
- a reader accepts its own result, so reading twice changes nothing;
- k, M, G, T are powers of 1000 and Ki, Mi, Gi, Ti powers of 1024, of bytes (or bytes per second), never of bits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import field
from ipaddress import AddressValueError, IPv6Address, ip_address
from typing import NamedTuple, TypeVar

from modelp2p.protocol.errors import UsageError
from modelp2p.protocol.text import printable

T = TypeVar("T")
Reader = Callable[[object, str], T]

_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_QUANTITY = re.compile(r"(\d{1,15})(?:\.(\d{1,6}))?\s*([kKMGT]i?|)(?:B)?(/s)?", re.ASCII)
# Signed 64 bit: what file systems and our wire formats carry.
_MAX_QUANTITY = 2**63 - 1
# RFC 1035 section 2.3.4: names of 255 octets or less; IPv6 literals are shorter.
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253}[A-Za-z0-9.])?", re.ASCII)
_MAX_PORT = 65_535
_ORIGIN = re.compile(
    r"https?://(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,253}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(?::(\d{1,5}))?/?", re.ASCII
)
# useradd(8) allows less; directories such as LDAP and AD add capitals, dots and @.
_ACCOUNT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,254}\$?", re.ASCII)


class Endpoint(NamedTuple):
    """One `host:port`, taken apart; an IPv6 host has no brackets here."""

    host: str
    port: int


def setting(default: T, read: Reader[T]) -> T:
    """A dataclass field with its default and the reader that every value of it passes."""
    return field(default=default, metadata={"read": read})


def boolean(value: object, key: str) -> bool:
    """`true` or `false`."""
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


def text(value: object, key: str) -> str:
    """A string on one line, without hidden characters."""
    if not isinstance(value, str):
        raise _wrong(key, "a string", value)
    if printable(value) != value:
        raise UsageError(f"{key} holds a control or invisible character: {value}", key=key)
    return value


def size(value: object, key: str) -> int:
    """Bytes: an integer, or text such as `"1.5G"` or `"512Mi"`."""
    return parse_quantity(value, key)


def rate(value: object, key: str) -> int:
    """Bytes per second: as `size`, and `/s` may follow."""
    return parse_quantity(value, key, per_second=True)


def seconds(value: object, key: str) -> float:
    """A finite number of seconds above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise _wrong(key, "a number of seconds above 0", value)
    return float(value)


def choice(*known: str) -> Reader[str]:
    """One of the known words."""

    def read(value: object, key: str) -> str:
        if not isinstance(value, str) or value not in known:
            raise _wrong(key, " or ".join(known), value)
        return value

    return read


def count(least: int, most: int) -> Reader[int]:
    """A whole number from `least` to `most`, both included."""

    def read(value: object, key: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _wrong(key, f"a whole number from {least} to {most}", value)
        return value

    return read


def account(value: object, key: str) -> str:
    """A user or group of this machine, by name or number."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        value = str(value)
    if not isinstance(value, str) or not _ACCOUNT.fullmatch(value):
        raise _wrong(key, "the name or number of a user or group", value)
    return value


def address(*, zero_port: bool = False) -> Reader[str]:
    """`host:port` or `[IPv6]:port`; port 0 only where the caller picks a free one."""

    def read(value: object, key: str) -> str:
        found = split_address(value, key)
        if found.port == 0 and not zero_port:
            raise _wrong(key, "host:port with a port from 1", value)
        return f"[{found.host}]:{found.port}" if ":" in found.host else f"{found.host}:{found.port}"

    return read


def ip(value: object, key: str) -> str:
    """An IPv4 or IPv6 address, without brackets."""
    try:
        return str(ip_address(value if isinstance(value, str) else ""))
    except ValueError as exc:
        raise _wrong(key, "an IP address", value) from exc


def bound(value: object, key: str) -> str:
    """`IP:port` or `[IPv6]:port` to listen on; port 0 picks a free one."""
    read = address(zero_port=True)(value, key)
    ip(split_address(read, key).host, key)
    return read


def host_name(value: object, key: str) -> str:
    """A host name, without a port; in lower case."""
    if not isinstance(value, str) or not _HOST.fullmatch(value):
        raise _wrong(key, "a host name without a port", value)
    return value.lower()


def web_host(value: object, key: str) -> str:
    """`host`, `host:port` or `[IPv6]:port`, as it stands in a URL; in lower case."""
    given = value if isinstance(value, str) else ""
    has_port = ":" in given and not given.endswith("]")
    try:
        host, port = split_address(given if has_port else f"{given}:1", key)
    except UsageError as exc:
        raise _wrong(key, "host or host:port", value) from exc
    if not port:
        raise _wrong(key, "host or host:port, with a port from 1", value)
    shown = (f"[{host}]" if ":" in host else host).lower()
    return f"{shown}:{port}" if has_port else shown


def http_origin(value: object, key: str) -> str:
    """`https://HOST[:PORT]`, or with `http`; nothing behind it."""
    match = _ORIGIN.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[1] or 1) > _MAX_PORT:
        raise _wrong(key, "https://HOST, without a path", value)
    return match[0].rstrip("/")


def listed(read_one: Reader[T]) -> Reader[tuple[T, ...]]:
    """A list of values, each once."""

    def read(value: object, key: str) -> tuple[T, ...]:
        if not isinstance(value, list | tuple):
            raise _wrong(key, "a list", value)
        return tuple(dict.fromkeys(read_one(item, f"{key}[{index}]") for index, item in enumerate(value)))

    return read


def optional(read_one: Reader[T]) -> Reader[T | None]:
    """A value that may be unset (None)."""

    def read(value: object, key: str) -> T | None:
        return None if value is None else read_one(value, key)

    return read


def parse_quantity(value: object, key: str, *, per_second: bool = False) -> int:
    """Bytes (or bytes per second) from an integer or from text with a unit; fractions are cut to whole bytes.

    Raises:
        UsageError: not a quantity, below zero, or beyond signed 64 bit.
    """
    example = '"200M" or "1.5Gi"'
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_QUANTITY:
        return value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None or (match[4] and not per_second):
        raise _wrong(key, f"bytes{' per second' if per_second else ''} such as {example}", value)
    whole, fraction = match[1], match[2] or ""
    amount = int(whole + fraction) * _unit(match[3], key, value) // int(10 ** len(fraction))
    if amount > _MAX_QUANTITY:
        raise _wrong(key, "less than 8 EiB", value)
    return amount


def split_address(value: object, key: str) -> Endpoint:
    """The host and port of `host:port` or `[IPv6]:port`.

    Raises:
        UsageError: not of that form.
    """
    host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not colon or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or int(port) > _MAX_PORT:
        raise _wrong(key, "host:port", value)
    if host.startswith("[") and host.endswith("]"):
        try:
            IPv6Address(host[1:-1])
        except AddressValueError as exc:
            raise _wrong(key, "host:port", value) from exc
        return Endpoint(host[1:-1], int(port))
    if not _HOST.fullmatch(host):
        raise _wrong(key, "host:port, with an IPv6 address in [brackets]", value)
    return Endpoint(host, int(port))


def toml_value(value: object) -> str:
    """A value as it may stand in a TOML file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    # JSON strings are TOML basic strings as long as no surrogate pairs are escaped: https://toml.io/en/v1.0.0#string
    return json.dumps(value, ensure_ascii=False)


def _unit(name: str, key: str, value: object) -> int:
    if name not in _UNITS:
        raise _wrong(key, "k, M, G, T or Ki, Mi, Gi, Ti as the unit", value)
    return _UNITS[name]


def _wrong(key: str, wanted: str, got: object) -> UsageError:
    shown = json.dumps(got, ensure_ascii=False, default=str)
    return UsageError(f"{key} must be {wanted}, not {shown if len(shown) <= 80 else shown[:77] + '...'}", key=key)
