"""The first stage of a span: its bytes made ready to be uploaded.

They are read into a host slot and, where CPUs prove, proven there; or the window of the mapping they lie in is page-locked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from modelp2p.loader.hashing import RUN_BYTES
from modelp2p.protocol.errors import StoreError

if TYPE_CHECKING:
    from modelp2p.loader.plan import Span
    from modelp2p.loader.ring import Lane
    from modelp2p.loader.shard import Shard
    from modelp2p.loader.tools import Tools
    from modelp2p.loader.windows import Window, Windows

READ_ALIGNMENT = 1 << 20
"""Reads are cut at multiples of this, where pieces do not say otherwise: blocks of any disk divide it."""


class Reading(Protocol):
    """What makes the bytes of a span ready to be uploaded: readers of a host slot, or a window being page-locked."""

    def is_done(self) -> bool:
        """Whether `wait` would not block."""

    def wait(self) -> None:
        """Return when they are ready; raises what went wrong."""

    def finish(self) -> None:
        """Return when nothing reads any more, well or not."""

    def abandon(self) -> None:
        """Stop, and return when nothing reads any more."""

    def is_idle(self) -> bool:
        """Whether nothing reads now, or will unless `wait` is called; never blocks."""


@dataclass(frozen=True, slots=True)
class Readings:
    """Begins to read the spans of one flow."""

    shards: Sequence[Shard]
    tools: Tools
    windows: Windows

    def first(self, lane: Lane, span: Span) -> tuple[Reading, Window | None]:
        """By the way that the file takes; the window, if that is one."""
        window = self._window_on(span)
        return (self.again(lane, span), None) if window is None else (window, window)

    def again(self, lane: Lane, span: Span) -> Reading:
        """Read a span to the start of a host slot and, if the workers prove, prove every piece of it there."""
        self.tools.ring.stage(lane)
        shard = self.shards[span.file]
        table, reader = shard.table, self.tools.reader_of(shard)
        is_proving = shard.way.is_hashed and self.tools.verifier is None
        unit = table.piece_length if is_proving else READ_ALIGNMENT

        def task(run: range) -> None:
            data = lane.view[run.start - span.begin : run.stop - span.begin]
            reader.read_into(data, run.start)
            if is_proving:
                self.tools.hashers.prove(table, table.over(run.start, run.stop), data, lane.fd, span.begin)

        # Small enough that every worker has a run, also where a span is only a few pieces.
        units = -(-span.size // unit)
        step = unit * max(1, min(RUN_BYTES // unit, -(-units // self.tools.workers.count)))
        runs = [range(at, min(at + step, span.end)) for at in range(span.begin, span.end, step)]
        lane.reading = self.tools.workers.start(task, runs)
        return lane.reading

    def _window_on(self, span: Span) -> Window | None:
        shard = self.shards[span.file]
        if not self.tools.transfers.is_by_window(shard):
            return None
        try:
            return self.windows.open(shard.source, span.begin, span.end)
        except StoreError as exc:
            self.tools.transfers.refuse(shard, exc.message)
            return None
