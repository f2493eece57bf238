"""What clients ask, decoded from control-socket arguments; a bad argument is a `UsageError` before work starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from modelp2p.protocol import codec
from modelp2p.protocol.codec import Map, Value
from modelp2p.protocol.errors import FormatError, UsageError
from modelp2p.protocol.job import MAX_PATTERNS, MAX_PEERS, MAX_RATE
from modelp2p.protocol.job import MAX_TIMEOUT_S as MAX_TIMEOUT_S  # the command line asks for it here
from modelp2p.protocol.links import Link, PeerAddress, parse_link
from modelp2p.protocol.names import BundleRef, LinkRef, NameRef, parse_ref

if TYPE_CHECKING:
    from modelp2p.protocol.statement import Statement

Emit = Callable[[Map], None]
"""Where a verb tells its progress; a map with `phase` and what fits it (docs/PROTOCOL.md)."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Target:
    """Which release: exactly one of the three is set."""

    name: NameRef | None = None
    link: Link | None = None
    statement: Statement | None = None

    @classmethod
    def of(cls, text: str) -> Target:
        """A name or link as a user typed it.

        Raises:
            UsageError: neither; a bundle must come as a descriptor.
        """
        match parse_ref(text):
            case NameRef() as name:
                return cls(name=name)
            case LinkRef(link):
                return cls(link=parse_link(link))
            case BundleRef():
                raise UsageError("a bundle has to be sent as a file descriptor")


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """Everything `fetch` and `adopt` may be told. Rates in bytes per second, 0 is unlimited."""

    target: Target
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    peers: tuple[PeerAddress, ...] = ()
    timeout_s: float | None = None
    dry_run: bool = False
    allow_code: bool = False
    seed: bool = True
    detach: bool = False
    max_up: int = 0
    max_down: int = 0
    is_strangers: bool = False
    """It came by the public socket: it may add to what is here, and not change how the owner has it."""
    peers_only: bool = False
    """No web seed is asked."""

    @classmethod
    def decode(cls, args: Map, target: Target, default_timeout_s: float) -> FetchRequest:
        """The request in `args`; unknown arguments are refused, so that a misspelt one is not ignored."""
        known = frozenset(
            [
                "ref",
                "bundle",
                "include",
                "exclude",
                "peers",
                "timeout_s",
                "dry_run",
                "allow_code",
                "seed",
                "detach",
                "max_up",
                "max_down",
                "peers_only",
            ]
        )
        for key in args:
            if key not in known:
                raise UsageError(f"unknown argument '{key}'")
        return cls(
            target,
            texts(args, "include", MAX_PATTERNS),
            texts(args, "exclude", MAX_PATTERNS),
            peers(args),
            timeout_s(args, default_timeout_s),
            flag(args, "dry_run"),
            flag(args, "allow_code"),
            flag(args, "seed", default=True),
            flag(args, "detach"),
            rate(args, "max_up"),
            rate(args, "max_down"),
            peers_only=flag(args, "peers_only"),
        )


def texts(args: Map, key: str, maximum: int) -> tuple[str, ...]:
    """An optional list of strings."""
    if args.get(key) is None:
        return ()
    return tuple(_usage(lambda: codec.take_list(args, key, str, maximum=maximum, where="request")))


def peers(args: Map) -> tuple[PeerAddress, ...]:
    """The optional `peers` list."""
    return tuple(_usage(lambda: [PeerAddress.parse(text) for text in texts(args, "peers", MAX_PEERS)]))


def flag(args: Map, key: str, *, default: bool = False) -> bool:
    """An optional boolean."""
    value = args.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise UsageError(f"'{key}' must be true or false")
    return value


def timeout_s(args: Map, default_s: float) -> float:
    """The optional `timeout_s`: how long nothing new may come, in whole seconds, because the protocol carries no fractions."""
    value = args.get("timeout_s")
    if value is None:
        return default_s
    if type(value) is not int or not 0 < value <= MAX_TIMEOUT_S:
        raise UsageError("the timeout must be a whole number of seconds, at least 1")
    return float(value)


def rate(args: Map, key: str) -> int:
    """An optional rate."""
    value = args.get(key)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= MAX_RATE:
        raise UsageError(f"'{key}' must be a rate between 0 and {MAX_RATE} bytes per second")
    return value


def text(args: Map, key: str, default: str | None = None) -> str:
    """A string argument.

    Raises:
        UsageError: missing without a default, or no string.
    """
    value: Value = args.get(key, default)
    if not isinstance(value, str):
        raise UsageError(f"'{key}' must be given as text")
    return value


def _usage(read: Callable[[], _T]) -> _T:
    try:
        return read()
    except FormatError as exc:
        raise UsageError(exc.message, hint=exc.hint) from exc
