"""From what is wanted of open files to tensors in the hands of a caller: views where the way allows them, copies elsewhere.

Consecutive files that are copied share one flow, so that reading the next begins while the last is placed. What was done is
counted as it is handed out; what the caller does between two tensors is not time of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelp2p.loader.order import place_of
from modelp2p.loader.parts import Part
from modelp2p.loader.pipeline import REPAIRS, flow
from modelp2p.loader.plan import pieces_under
from modelp2p.loader.plan import plan as plan_of
from modelp2p.loader.repairing import DaemonRepair
from modelp2p.loader.views import view_parts
from modelp2p.protocol.errors import IntegrityError

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.arriving import Arrivals
    from modelp2p.loader.device import Device
    from modelp2p.loader.plan import Want
    from modelp2p.loader.shard import Shard
    from modelp2p.loader.stats import LoadStats
    from modelp2p.loader.targets import Target
    from modelp2p.loader.tools import Tools

ARRIVING_SPAN_BYTES = 4 << 20
"""Spans of a release that is still being fetched: a tensor is handed out with its span, and large ones are long in coming."""

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes to do) in the thread of the caller."""

TargetOf = Callable[["Device", "Want", int], "Target"]
"""Where the want of that number is made."""

Files = Sequence[tuple["Shard", Sequence["Want"]]]


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one open release makes its tensors with.

    Args:
        tools: device, staging, threads, processes.
        stats: counts.
        arrivals: of a release that is still being fetched; they are told the order of reading, which is that of use.
    """

    tools: Tools
    stats: LoadStats
    arrivals: Arrivals | None = None

    def deliver(
        self, files: Files, progress: Progress | None, target_of: TargetOf | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of each want, after every piece under it was proven.

        Args:
            files: open files, and what is wanted of each.
            progress: told as bytes are read.
            target_of: where tensors are made, which are then copies; new memory, or views, by default.
        """
        batches = list(_batches(files, may_view=target_of is None))
        sizes = [_bytes_under(of_batch) for _, of_batch in batches]
        meter = _Meter(progress, sum(sizes))
        started = time.perf_counter()
        for (is_view, of_batch), size in zip(batches, sizes, strict=True):
            before = meter.done
            made = self._views(of_batch, meter) if is_view else self._copies(of_batch, meter, target_of)
            for want, shard, tensor, is_shown in made:
                self._tally(shard, want, is_shown)
                self.stats.seconds += time.perf_counter() - started
                yield want.part.name, tensor
                started = time.perf_counter()
            meter.reach(before + size)
        trouble = self.tools.hashers.trouble
        if trouble and trouble not in self.stats.fallbacks:
            self.stats.fallbacks.append(trouble)
        self.stats.seconds += time.perf_counter() - started

    def _views(self, files: Files, meter: _Meter) -> Iterator[tuple[Want, Shard, torch.Tensor, bool]]:
        """`(want, shard, tensor, whether it is a view)`."""
        self._warm(files)
        for shard, wants in files:
            by_part = {_part_under(want): want for want in wants}

            def on_bytes(size: int, shard: Shard = shard) -> None:
                self._count(shard, size, meter)

            for part, tensor, is_shown in self._shown(shard, list(by_part), on_bytes):
                yield by_part[part], shard, tensor, is_shown

    def _shown(
        self, shard: Shard, parts: Sequence[Part], on_bytes: Callable[[int], None]
    ) -> list[tuple[Part, torch.Tensor, bool]]:
        """`view_parts`, with a repair where a piece is bad. Reading it again would read the same page."""
        repairs = 0
        while True:
            try:
                return view_parts(shard, parts, self.tools.workers, self.tools.hashers, on_bytes)
            except IntegrityError as exc:
                piece, on_bad = exc.facts.get("piece"), self.tools.on_bad
                if not isinstance(piece, int) or on_bad is None or repairs == REPAIRS or not on_bad(shard.table.path, piece):
                    raise self._explained(exc) from exc
            repairs += 1
            self.tools.on_repair(1)
            shard.reopen()

    def _copies(
        self, files: Files, meter: _Meter, target_of: TargetOf | None
    ) -> Iterator[tuple[Want, Shard, torch.Tensor, bool]]:
        if self.tools.device.is_host:
            # Only there do other processes see what is to be hashed.
            self._warm(files)
        shards = [shard for shard, _ in files]
        owners = [shard for shard, wants in files for _ in wants]
        slot_bytes, rank = self.tools.device.slot_bytes, None
        if self.arrivals is not None:
            slot_bytes, rank = min(slot_bytes, ARRIVING_SPAN_BYTES), lambda want: place_of(want.part.name)
        made = plan_of([shard.table for shard in shards], [wants for _, wants in files], slot_bytes, rank)
        if self.arrivals is not None:
            self.arrivals.want((shards[span.file].table.path, span.begin, span.end) for span in made.spans)
        try:
            for number, tensor in flow(
                shards, made, self.tools, lambda file, size: self._count(shards[file], size, meter), target_of
            ):
                yield made.wants[number], owners[number], tensor, False
        except IntegrityError as exc:
            raise self._explained(exc) from exc

    def _explained(self, error: IntegrityError) -> IntegrityError:
        """The error, with what was done about it."""
        return self.tools.on_bad.explained(error) if isinstance(self.tools.on_bad, DaemonRepair) else error

    def _warm(self, files: Files) -> None:
        self.tools.hashers.warm(_bytes_under([(shard, wants) for shard, wants in files if shard.way.is_hashed]))

    def _count(self, shard: Shard, size: int, meter: _Meter) -> None:
        if shard.way.is_hashed:
            self.stats.verified_bytes += size
            self.stats.verifier = self.stats.verifier or "cpu"
        meter.add(size)

    def _tally(self, shard: Shard, want: Want, is_shown: bool) -> None:
        self.stats.tensors += 1
        self.stats.bytes += want.size
        if not is_shown:
            self.stats.copied_bytes += want.size
            self.stats.transfer = self.tools.transfers.taken or self.tools.device.transfer
        if self.stats.verify == "off":
            self.stats.unverified_bytes += want.size
        elif not shard.way.is_hashed:
            self.stats.recorded_bytes += want.size


class _Meter:
    """Bytes done of bytes to do, told as they change."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self.done = 0

    def add(self, count: int) -> None:
        self.reach(min(self.done + count, self._total))

    def reach(self, done: int) -> None:
        if done != self.done:
            self.done = done
            if self._progress is not None:
                self._progress(done, self._total)


def _batches(files: Files, *, may_view: bool) -> Iterator[tuple[bool, list[tuple[Shard, list[Want]]]]]:
    """`(whether views are made, files)`: consecutive files that take the same way."""
    viewed: list[tuple[Shard, list[Want]]] = []
    copied: list[tuple[Shard, list[Want]]] = []
    for shard, wants in files:
        shown: list[Want] = []
        others: list[Want] = []
        for want in wants:
            (shown if may_view and shard.way.is_view and _can_be_shown(want) else others).append(want)
        if shown:
            if copied:
                yield False, copied
                copied = []
            viewed.append((shard, shown))
        if others:
            if viewed:
                yield True, viewed
                viewed = []
            copied.append((shard, others))
    for is_view, left in ((True, viewed), (False, copied)):
        if left:
            yield is_view, left


def _can_be_shown(want: Want) -> bool:
    """Whether a view does. A cut of another dimension is no stretch of the file: a view would reach over bytes nobody proved.

    A cast makes a copy, and copies are made of bytes that were private when they were hashed.
    """
    return want.dtype is None and (not want.size or want.rows.count == 1)


def _part_under(want: Want) -> Part:
    """A want that is one stretch of its file, as a part of its own."""
    if not want.size:
        return Part(want.part.name, want.part.dtype, want.shape, want.part.begin, want.part.begin)
    return Part(want.part.name, want.part.dtype, want.shape, want.rows.begin, want.rows.end)


def _bytes_under(files: Files) -> int:
    return sum(shard.table.bytes_in(pieces_under(shard.table, wants)) for shard, wants in files)
