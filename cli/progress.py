"""Progress of a long command on stderr: a live bar on a terminal, else a plain line every ten seconds.

`MODELP2P_PROGRESS` is `rich`, `plain` or `off`; unset, a terminal that can move its cursor gets the bar. What is counted is
verified bytes, as the daemon proves them, never received ones.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from modelp2p.cli.output import talk
from modelp2p.cli.results import Row
from modelp2p.cli.units import duration_text, percent_text, rate_text, size_text
from modelp2p.protocol.errors import UsageError
from modelp2p.protocol.text import printable

if TYPE_CHECKING:
    from modelp2p.cli.app import App
    from modelp2p.protocol.codec import Map

PLAIN_INTERVAL_S = 10.0
MODES = ("rich", "plain", "off")
# Below this many columns the bar is left out, below the second everything but phase and percent.
_BAR_COLUMNS = 80
_FACTS_COLUMNS = 40


@dataclass(slots=True)
class Situation:
    """The last thing the daemon said about a running request."""

    phase: str = ""
    done: int = 0
    total: int = 0
    rate_down: int = 0
    rate_up: int = 0
    peers: int | None = None
    note: str = ""
    web: int = 0
    """Bytes of it that came from web seeds."""
    origin: str = ""
    """Why a web seed is not asked now."""
    files: str = ""

    def update(self, event: Map) -> None:
        """Take over what an event says; what it leaves out stays, except across phases."""
        phase = event.get("phase", self.phase)
        if isinstance(phase, str) and phase != self.phase:
            self.phase, self.rate_down, self.rate_up, self.note, self.origin = phase, 0, 0, "", ""
        for name in ("done", "total", "rate_down", "rate_up", "peers", "web"):
            value = event.get(name)
            if type(value) is int:
                setattr(self, name, value)
        for name in ("note", "origin"):
            if isinstance(event.get(name), str):
                setattr(self, name, event[name])
        if "files_total" in event:
            row = Row(event)
            self.files = f"{row.number('files_done')}/{row.number('files_total')} files"

    @property
    def percent(self) -> str:
        """Verified share, or nothing while the size is not known."""
        return percent_text(self.done, self.total) if self.total else ""

    @property
    def facts(self) -> list[str]:
        """Bytes, rates, peers, time left, the note and what a web seed waits for: each only where it is known."""
        facts = []
        if self.total:
            facts.append(f"{size_text(self.done)} of {size_text(self.total)}")
        if self.rate_down:
            facts.append(rate_text(self.rate_down))
        if self.rate_up:
            facts.append(f"up {rate_text(self.rate_up)}")
        if self.peers is not None:
            facts.append("1 peer" if self.peers == 1 else f"{self.peers} peers")
        if self.web:
            facts.append(f"{size_text(self.web)} from the web")
        if self.rate_down and self.done < self.total:
            facts.append(f"{duration_text((self.total - self.done) / self.rate_down)} left")
        return [fact for fact in (*facts, self.files, printable(self.note), printable(self.origin)) if fact]

    @property
    def line(self) -> str:
        """All of it on one line."""
        head = " ".join(part for part in (printable(self.phase), self.percent) if part)
        return ", ".join((head, *self.facts))


class _Display(Protocol):
    def show(self, situation: Situation) -> None: ...
    def close(self) -> None: ...


class Progress:
    """Context manager around a call; `on_event` is what the call takes."""

    def __init__(self, mode: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.situation = Situation()
        self._mode = mode
        self._clock = clock
        self._display: _Display | None = None

    def __enter__(self) -> Self:
        if self._mode == "rich":
            self._display = _Live()
        elif self._mode == "plain":
            self._display = _Plain(self._clock)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._display is not None:
            self._display.close()

    def on_event(self, event: Map) -> None:
        """Take note of one event and show it."""
        self.situation.update(event)
        if self._display is not None:
            self._display.show(self.situation)


def progress_of(app: App) -> Progress:
    """The progress this command should show.

    Raises:
        UsageError: MODELP2P_PROGRESS names no mode.
    """
    mode = app.environ.get("MODELP2P_PROGRESS", "")
    if mode and mode not in MODES:
        raise UsageError(f"MODELP2P_PROGRESS is '{mode[:40]}'", hint=f"Use one of: {', '.join(MODES)}.")
    if app.quiet:
        mode = "off"
    elif not mode:
        mode = "rich" if sys.stderr.isatty() and app.environ.get("TERM", "dumb") != "dumb" else "plain"
    return Progress(mode)


class _Plain:
    """A line now and then, for logs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()

    def show(self, situation: Situation) -> None:
        now = self._clock()
        if now - self._last >= PLAIN_INTERVAL_S:
            self._last = now
            talk(situation.line)

    def close(self) -> None:
        """Nothing is left to undo."""


class _Live:
    """One line that redraws itself; it fits the terminal, whatever its width, and is gone at the end."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        console = Console(file=sys.stderr, force_terminal=True, highlight=False)
        fixed = TextColumn("{task.fields[head]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        facts = TextColumn("{task.fields[facts]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        columns: list[ProgressColumn] = [fixed]
        if console.width >= _BAR_COLUMNS:
            columns.append(BarColumn(bar_width=20))
        if console.width >= _FACTS_COLUMNS:
            columns.append(facts)
        self._rich = RichProgress(*columns, console=console, transient=True, expand=True)
        self._task = self._rich.add_task("", total=None, head="", facts="")
        self._rich.start()

    def show(self, situation: Situation) -> None:
        self._rich.update(
            self._task,
            completed=situation.done,
            total=situation.total or None,
            head=f"{printable(situation.phase)} {situation.percent}".strip(),
            facts=", ".join(situation.facts),
        )

    def close(self) -> None:
        self._rich.stop()
