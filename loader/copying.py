"""Tensors that are copies: read a window of a file, prove it in memory, place it on the device.

Each window is a run of consecutive pieces. It is read and hashed piece by piece in the workers, so a piece is hashed while
it is still in the core's cache, then sliced to the tensors it touches. Two windows alternate: while a device still reads one,
the next is filled. A tensor is handed out when its last window has been placed; so what is handed out is what was hashed.

Memory beside the tensors themselves: two windows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from modelp2p.loader.hashing import Workers, pieces_per_run
from modelp2p.loader.pieces import runs_of

if TYPE_CHECKING:
    from modelp2p.loader.copier import Copier, Fence
    from modelp2p.loader.parts import Part
    from modelp2p.loader.shard import Shard

WINDOW_BYTES = 32 << 20


@dataclass(slots=True)
class _Slot:
    """Staging for one window, and what becomes ready when the device has read it."""

    memory: torch.Tensor
    view: memoryview
    fence: Fence | None = None
    ready: list[int] = field(default_factory=list)
    """Indexes of the parts whose last bytes are in this window."""


class Staging:
    """Windows of staging memory in pairs, made when first needed and used for file after file."""

    def __init__(self, copier: Copier) -> None:
        self.copier = copier
        self._free: list[list[_Slot]] = []

    @contextmanager
    def pair(self, window_bytes: int) -> Iterator[list[_Slot]]:
        """Two slots of at least this size for one reader; a second reader beside it gets a pair of its own."""
        slots = self._free.pop() if self._free else []
        if not slots or len(slots[0].view) < window_bytes:
            slots = [self._slot(window_bytes) for _ in range(2)]
        try:
            yield slots
        finally:
            for slot in slots:
                # Where a load is abandoned, the device may still read from it.
                if slot.fence is not None:
                    slot.fence.wait()
                slot.fence, slot.ready = None, []
            self._free.append(slots)

    def _slot(self, size_bytes: int) -> _Slot:
        memory = self.copier.staging(size_bytes)
        # Not through NumPy, which torch does not need; the slot keeps the tensor as long as the view.
        view = memoryview((ctypes.c_ubyte * size_bytes).from_address(memory.data_ptr())).cast("B")
        return _Slot(memory, view)


def copy_parts(
    shard: Shard, parts: Sequence[Part], staging: Staging, workers: Workers, on_bytes: Callable[[int], None]
) -> Iterator[tuple[Part, torch.Tensor]]:
    """Each part and its tensor on the device, in file order, as soon as all of it is proven and placed.

    Where the way of the shard says not hashed, nothing is handed out before the whole file was read and found unchanged.

    Args:
        shard: of any way; only whether it is hashed counts.
        parts: stretches of it, sorted by `begin`.
        staging: windows and the device.
        workers: who reads and hashes.
        on_bytes: told how many bytes were hashed, after each run.

    Raises:
        IntegrityError: a piece is bad, or the file changed; no tensor over it is handed out.
    """
    placed = _placed(shard, parts, staging, workers, on_bytes)
    if shard.way.is_hashed:
        yield from placed
        return
    kept = list(placed)
    shard.source.check_unchanged()
    yield from kept


def _placed(
    shard: Shard, parts: Sequence[Part], staging: Staging, workers: Workers, on_bytes: Callable[[int], None]
) -> Iterator[tuple[Part, torch.Tensor]]:
    table, copier = shard.table, staging.copier
    for part in parts:
        if part.size == 0:
            yield part, torch.empty(part.shape, dtype=part.dtype, device=copier.device)
    parts = [part for part in parts if part.size]
    needed = table.covering((part.begin, part.end) for part in parts)
    windows = list(runs_of(needed, max(1, WINDOW_BYTES // table.piece_length)))
    if not windows:
        return
    targets: dict[int, torch.Tensor] = {}
    at = 0
    with staging.pair(max(end - begin for begin, end in map(table.span, windows))) as slots:
        for number, window in enumerate(windows):
            slot = slots[number % 2]
            yield from _released(slot, parts, targets)
            _fill(shard, window, slot.view, workers, on_bytes)
            begin, end = table.span(window)
            while at < len(parts) and parts[at].begin < end:
                targets[at] = copier.allocate(parts[at].size)
                at += 1
            for index, target in targets.items():
                part = parts[index]
                first, last = max(part.begin, begin), min(part.end, end)
                if first < last:
                    copier.write(target[first - part.begin : last - part.begin], slot.memory[first - begin : last - begin])
                if begin < part.end <= end:
                    slot.ready.append(index)
            slot.fence = copier.fence()
        for number in range(len(windows), len(windows) + 2):
            yield from _released(slots[number % 2], parts, targets)


def _fill(shard: Shard, window: range, view: memoryview, workers: Workers, on_bytes: Callable[[int], None]) -> None:
    """Read a window to the start of `view`, and prove every piece of it where it lies."""
    table = shard.table
    base = table.span(window)[0]

    def task(run: range) -> None:
        for piece in run:
            begin, end = table.span(range(piece, piece + 1))
            data = view[begin - base : end - base]
            shard.source.read_into(data, begin)
            if shard.way.is_hashed:
                table.check(piece, data)

    def on_done(run: range) -> None:
        begin, end = table.span(run)
        if shard.way.is_hashed:
            on_bytes(end - begin)

    # Small enough that every worker has a run, also where a window is only a few pieces.
    step = min(pieces_per_run(table.piece_length), -(-len(window) // workers.count))
    runs = [range(at, min(at + step, window.stop)) for at in range(window.start, window.stop, step)]
    workers.run(task, runs, on_done)


def _released(slot: _Slot, parts: Sequence[Part], targets: dict[int, torch.Tensor]) -> Iterator[tuple[Part, torch.Tensor]]:
    """Wait until the device has read a slot, and hand out what that completed."""
    if slot.fence is None:
        return
    slot.fence.wait()
    ready, slot.fence, slot.ready = slot.ready, None, []
    for index in ready:
        yield parts[index], parts[index].shaped(targets.pop(index))
