"""Errors as users and scripts see them: the one function that turns any exception into an exit code and its lines.

Exit codes are the contract of docs/CLI.md and live in `protocol.errors.Kind`; nothing else in cli/ chooses one for an error.
A traceback is shown only with MODELP2P_DEBUG=1: also a bug is one line, so that logs stay readable, and exits 1.
"""

from __future__ import annotations

import errno
import traceback
from typing import TYPE_CHECKING, NamedTuple

import click

from modelp2p.cli.output import OutputClosedError, emit_json, flush, talk
from modelp2p.protocol.errors import Fact, Kind, ModelP2PError

if TYPE_CHECKING:
    from collections.abc import Mapping

INTERRUPTED_EXIT = 130
"""128 + SIGINT: what a shell reports for a program that Ctrl-C ended."""
_DEBUG_HINT = "This is a bug. Run again with MODELP2P_DEBUG=1 for the details, and report them."


# What to try where the place that raised had nothing better to say: no error leaves a user without a next step.
_HINTS = {
    Kind.OTHER: "Run it again with MODELP2P_DEBUG=1 for the details.",
    Kind.USAGE: "Try 'modelp2p --help'.",
    Kind.NOT_FOUND: "Check the spelling; 'modelp2p ls' shows what is here.",
    Kind.BAD_SIGNATURE: "Nothing of it was kept. Ask the publisher for the link or bundle again.",
    Kind.BAD_HASH: "'modelp2p verify --repair' fetches again what is bad.",
    Kind.UNKNOWN_PUBLISHER: "Fetch by a link you trust, or trust the publisher with 'modelp2p trust add'.",
    Kind.TIMED_OUT: "Check --peer and the network, then run the same command again.",
    Kind.NETWORK: "Check the network, then run the same command again.",
    Kind.INTERRUPTED: "Run the same command again.",
    Kind.DAEMON_UNREACHABLE: "Start one with 'modelp2p daemon', or look into the log of the one that runs.",
    Kind.NO_SPACE: "Free some space, or set MODELP2P_HOME to a larger disk.",
    Kind.DENIED: "Run it as the user who owns this home.",
    Kind.PARTIAL: "Run the same command again to fetch the rest.",
    Kind.ROLLBACK: "Ask the publisher which statement is the newest.",
    Kind.EXPIRED: "Ask the publisher to sign again.",
    Kind.WITHDRAWN: "Ask the publisher what replaces it.",
    Kind.EQUIVOCATION: "Ask the publisher which statement is meant.",
    Kind.POLICY: "Change the policy of this node, or choose other files.",
}


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be, so that both stop a verb the same way."""


class Failing(NamedTuple):
    """What is shown of one exception."""

    exit_code: int
    kind: str
    message: str
    hint: str
    facts: dict[str, Fact]


def failing_of(exc: BaseException) -> Failing:
    """The exit code, kind, message and hint of any exception a verb may end with."""
    match exc:
        case ModelP2PError():
            return Failing(exc.kind.exit_code, exc.kind.name, exc.message, exc.hint or _HINTS[exc.kind], exc.facts)
        case click.exceptions.UsageError():
            where = exc.ctx.command_path if exc.ctx else "modelp2p"
            hint = getattr(exc, "hint", "") or f"Try '{where} --help'."
            return Failing(Kind.USAGE.exit_code, Kind.USAGE.name, exc.format_message(), hint, {})
        case click.ClickException():
            return Failing(Kind.OTHER.exit_code, Kind.OTHER.name, exc.format_message(), _HINTS[Kind.OTHER], {})
        case KeyboardInterrupt() | click.Abort():
            return Failing(INTERRUPTED_EXIT, Kind.INTERRUPTED.name, "Interrupted.", "", {})
        case OSError():
            return _os_failing(exc)
        case _:
            kind = Kind.OTHER
            return Failing(kind.exit_code, kind.name, f"internal error: {type(exc).__name__}: {exc}", _DEBUG_HINT, {})


def report(exc: BaseException, *, as_json: bool, environ: Mapping[str, str]) -> int:
    """Show `exc` (stderr; with `as_json` an object on stdout) and return the exit code."""
    failing = failing_of(exc)
    if environ.get("MODELP2P_DEBUG") == "1":
        for line in "".join(traceback.format_exception(exc)).splitlines():
            talk(line)
    if as_json:
        body: dict[str, object] = {
            "code": failing.exit_code,
            "kind": failing.kind,
            "message": failing.message,
            "hint": failing.hint,
        }
        if failing.facts:
            body["facts"] = failing.facts
        try:
            emit_json({"error": body})
            flush()
        except (OutputClosedError, ModelP2PError):
            talk(f"error: {failing.message}")
        return failing.exit_code
    talk(f"error: {failing.message}")
    if failing.hint:
        talk(f"Hint: {failing.hint}")
    return failing.exit_code


def _os_failing(exc: OSError) -> Failing:
    # Adapters translate what they expect; this is for the user's own paths, where the errno says it all.
    kind = Kind.OTHER
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        kind = Kind.NO_SPACE
    elif exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        kind = Kind.DENIED
    elif exc.errno in (errno.ENOENT, errno.ENOTDIR):
        kind = Kind.NOT_FOUND
    subject = f"{exc.filename}: " if exc.filename else ""
    return Failing(kind.exit_code, kind.name, f"{subject}{exc.strerror or exc}", _HINTS[kind], {})
