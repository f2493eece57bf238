"""The whole error tree, by who must act, with the exit code each kind maps to.

Invariants:
- every error the product raises on purpose is a `ModelP2PError` with one `kind`;
- a kind has exactly one exit code (docs/DESIGN.md), so the code never depends on where it was raised;
- the message is one line a user may read; `hint` is the next thing to try;
- facts (paths, digests, byte counts) travel in `facts`, so a script never parses prose.

It deliberately does not print or log. Bugs (`TypeError`, `AssertionError`) are not part of the tree.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

from modelp2p.protocol.text import printable

Fact = str | int | bool | None


class Kind(Enum):
    """What went wrong, as scripts see it: `error.kind` in JSON is the member's name."""

    OTHER = 1
    USAGE = 2
    NOT_FOUND = 3
    BAD_SIGNATURE = 4
    BAD_HASH = 4.1
    UNKNOWN_PUBLISHER = 4.2
    TIMED_OUT = 5
    NETWORK = 6
    INTERRUPTED = 7
    DAEMON_UNREACHABLE = 8
    NO_SPACE = 9
    DENIED = 10
    PARTIAL = 11
    ROLLBACK = 20
    EXPIRED = 21
    WITHDRAWN = 22
    EQUIVOCATION = 23
    POLICY = 24

    @property
    def exit_code(self) -> int:
        """The process exit code of docs/DESIGN.md; several kinds may share one."""
        return int(self.value)


class ModelP2PError(Exception):
    """Something modelp2p could not do."""

    kind: ClassVar[Kind] = Kind.OTHER

    def __init__(self, message: str, *, hint: str = "", **facts: Fact) -> None:
        # Names and paths in messages come from strangers: a terminal must never obey them.
        self.message = printable(message)
        self.hint = printable(hint)
        self.facts = facts
        super().__init__(self.message)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint, self.facts))


def _rebuild(cls: type[ModelP2PError], message: str, hint: str, facts: dict[str, Fact]) -> ModelP2PError:
    return cls(message, hint=hint, **facts)


class UsageError(ModelP2PError):
    """The request itself is wrong; nothing was done."""

    kind = Kind.USAGE


class NotFoundError(ModelP2PError):
    """No such release, file or key here."""

    kind = Kind.NOT_FOUND


class UntrustedError(ModelP2PError):
    """A publisher or peer said something that is not proven by a signature; nothing was kept."""

    kind = Kind.BAD_SIGNATURE


class FormatError(UntrustedError):
    """Bytes from outside do not follow their format."""


class UnknownPublisherError(UntrustedError):
    """A valid statement by a publisher this node has no reason to believe."""

    kind = Kind.UNKNOWN_PUBLISHER


class EquivocationError(UntrustedError):
    """One publisher signed two different statements under one name and sequence."""

    kind = Kind.EQUIVOCATION


class RollbackError(UntrustedError):
    """An older statement than one already seen."""

    kind = Kind.ROLLBACK


class PolicyError(ModelP2PError):
    """The release is authentic, but this node's policy refuses it."""

    kind = Kind.POLICY


class CorruptError(ModelP2PError):
    """Bytes differ from their signed hash."""

    kind = Kind.BAD_HASH


class IntegrityError(CorruptError):
    """A loader met a leaf whose bytes differ from the signed root; no tensor over it was handed out."""


class UnavailableError(ModelP2PError):
    """The network did not deliver; trying again may work."""

    kind = Kind.NETWORK


class TimedOutError(UnavailableError):
    """No peer delivered a new proven byte in time."""

    kind = Kind.TIMED_OUT


class InterruptedFetchError(ModelP2PError):
    """A fetch stopped part-way; what is proven is kept."""

    kind = Kind.INTERRUPTED


class PartialError(ModelP2PError):
    """Some of the selected files could not be had."""

    kind = Kind.PARTIAL


class StoreError(ModelP2PError):
    """This node's disk or store refused."""


class NoSpaceError(StoreError):
    """There is not enough room for what was asked."""

    kind = Kind.NO_SPACE


class DeniedError(ModelP2PError):
    """The caller may not do this."""

    kind = Kind.DENIED


class DaemonError(ModelP2PError):
    """The daemon cannot be reached, or does not speak as expected."""

    kind = Kind.DAEMON_UNREACHABLE


_BY_KIND: dict[Kind, type[ModelP2PError]] = {
    Kind.OTHER: ModelP2PError,
    Kind.USAGE: UsageError,
    Kind.NOT_FOUND: NotFoundError,
    Kind.BAD_SIGNATURE: UntrustedError,
    Kind.BAD_HASH: CorruptError,
    Kind.UNKNOWN_PUBLISHER: UnknownPublisherError,
    Kind.TIMED_OUT: TimedOutError,
    Kind.NETWORK: UnavailableError,
    Kind.INTERRUPTED: InterruptedFetchError,
    Kind.DAEMON_UNREACHABLE: DaemonError,
    Kind.NO_SPACE: NoSpaceError,
    Kind.DENIED: DeniedError,
    Kind.PARTIAL: PartialError,
    Kind.ROLLBACK: RollbackError,
    Kind.EQUIVOCATION: EquivocationError,
    Kind.POLICY: PolicyError,
}


def error_of(kind_name: str, message: str, hint: str = "", facts: dict[str, Fact] | None = None) -> ModelP2PError:
    """The error value for a kind named on the wire; an unknown kind (a newer peer) becomes the root class."""
    kind = Kind.__members__.get(kind_name, Kind.OTHER)
    clean = {key: value for key, value in (facts or {}).items() if key not in ("message", "hint", "self")}
    return _BY_KIND.get(kind, ModelP2PError)(message, hint=hint, **clean)
