"""What `fetch`, `adopt` and `import` print of the release that they brought here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from modelp2p.cli.output import emit_block, emit_json, out

if TYPE_CHECKING:
    from modelp2p.cli.app import App
    from modelp2p.cli.results import Row

_KEYS = ("path", "name", "revision", "info_hash", "publisher", "state", "bytes", "from_peers", "from_web", "seconds")


def show_taken(app: App, result: Row, client_s: float, details: Callable[[float], list[tuple[str, str]]]) -> None:
    """Print it: the path first.

    Args:
        app: where, and in which form.
        result: of the daemon, and where it is in the Hugging Face cache.
        client_s: seconds that the client waited, for a daemon that does not tell its own.
        details: the rows that the verb adds, given the seconds that count.
    """
    result.source.setdefault("hf_cache", None)
    # The daemon's own time leaves out its start; on the wire it has no fraction.
    milliseconds = result.source.pop("milliseconds", None)
    seconds = milliseconds / 1000 if isinstance(milliseconds, int) else client_s
    if app.as_json:
        emit_json(result.first(*_KEYS) | {"seconds": round(seconds, 3)})
        return
    if app.quiet:
        out(result.text("path"))
        return
    unverified = "" if result.flag("name_verified") else " (name not verified: nobody is trusted for it here)"
    emit_block(
        [
            ("Path", result.text("path")),
            ("HF cache", result.source.get("hf_cache")),
            ("Release", result.ref),
            ("Signed by", result.text("publisher") + unverified),
            *details(seconds),
        ]
    )
