"""What a user or a script sees: results on stdout, talk on stderr, aligned tables, JSON objects.

Invariants:
- text from strangers passes `printable` before it reaches a terminal; JSON escapes everything beyond ASCII;
- every JSON object has `"v": 1` first;
- a reader that closed its end (`| head`) ends the output silently, never the work before it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from modelp2p.protocol.errors import StoreError
from modelp2p.protocol.text import printable

if TYPE_CHECKING:
    from modelp2p.cli.app import App

JSON_VERSION = 1


class OutputClosedError(Exception):
    """Nobody reads our stdout any more. Not a failure: the reader had enough."""


def out(text: str = "") -> None:
    """Write one line of the result to stdout. `text` must be printable already.

    Raises:
        OutputClosedError: the reader is gone.
        StoreError: the result cannot be written (a full disk behind `>`).
    """
    try:
        sys.stdout.write(text + "\n")
    except BrokenPipeError as exc:
        raise OutputClosedError from exc
    except OSError as exc:
        raise StoreError(f"cannot write the result: {exc.strerror}") from exc


def flush() -> None:
    """Make sure the result has left. Raises as `out`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError as exc:
        raise OutputClosedError from exc
    except OSError as exc:
        raise StoreError(f"cannot write the result: {exc.strerror}") from exc


def mute(stream: TextIO) -> None:
    """Point a broken stream at nothing, so that Python's flush at exit has nothing to complain about."""
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, stream.fileno())
    except (OSError, ValueError):
        return  # a stream without a descriptor (a test's) is not flushed to anybody at exit
    finally:
        os.close(sink)


def talk(text: str) -> None:
    """Write one line to stderr; where nobody listens the work goes on."""
    try:
        sys.stderr.write(printable(text) + "\n")
        sys.stderr.flush()
    except OSError:
        mute(sys.stderr)


def say(app: App, text: str) -> None:
    """`talk`, unless the user asked for quiet."""
    if not app.quiet:
        talk(text)


def emit_json(body: Mapping[str, object]) -> None:
    """Write the one JSON object of this command."""
    out(json.dumps({"v": JSON_VERSION, **body}, default=_jsonable))


def emit_block(rows: Iterable[tuple[str, object]]) -> None:
    """Write `Key: value` lines, aligned; empty values are left out."""
    shown = [(key, printable(str(value))) for key, value in rows if value not in (None, "", [])]
    width = max((len(key) for key, _ in shown), default=0) + 1
    for key, value in shown:
        out(f"{key + ':':<{width}} {value}")


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, right: str = "") -> list[str]:
    """Lines of an aligned table. `right` names the columns that are aligned right, by header, separated by spaces."""
    cells = [list(headers), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    to_right = set(right.split())
    lines = []
    for row in cells:
        aligned = (
            cell.rjust(width) if header in to_right else cell.ljust(width)
            for header, cell, width in zip(headers, row, widths, strict=True)
        )
        lines.append("  ".join(aligned).rstrip())
    return lines


def _jsonable(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} in a JSON result")
