"""Staging memory in lanes: a host slot to read into and a device slot to prove in, used span after span and load after load.

Invariants:
- page-locked memory of one ring is at most `RING_BYTES`; a reader beyond that gets one lane of ordinary memory, which works too;
- lanes come back only after the device is drained, so a slot is never reused under work that still touches it. Where draining
  fails the lanes are dropped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.device import Device

RING_BYTES = 512 << 20


@dataclass(slots=True)
class Lane:
    """Staging for one span."""

    host: torch.Tensor
    view: memoryview
    """The host slot for readers."""
    slot: torch.Tensor
    is_locked: bool


class Ring:
    """The lanes of one device. Used by one thread at a time, by any number of readers in turns."""

    def __init__(self, device: Device, limit_bytes: int = RING_BYTES) -> None:
        self._device = device
        self._limit = limit_bytes
        self._free: list[Lane] = []
        self.locked_bytes = 0
        """How much memory is page-locked now."""

    @contextmanager
    def lanes(self, size_bytes: int) -> Iterator[list[Lane]]:
        """At least one lane, for spans of up to `size_bytes`, until the block ends; a reader inside it gets others."""
        size_bytes = _rounded(size_bytes)
        for lane in [lane for lane in self._free if len(lane.view) < size_bytes]:
            self._free.remove(lane)
            self._forget(lane)
        lanes = [self._free.pop() for _ in range(min(self._device.slots, len(self._free)))]
        while len(lanes) < self._device.slots and self.locked_bytes + size_bytes <= self._limit:
            lanes.append(self._lane(size_bytes, is_locked=True))
        if not lanes:
            lanes.append(self._lane(size_bytes, is_locked=False))
        try:
            yield lanes
        finally:
            kept, lanes = lanes, []
            try:
                self._device.drain()
            except BaseException:
                for lane in kept:
                    self._forget(lane)
                raise
            self._free += [lane for lane in kept if lane.is_locked]

    def _lane(self, size_bytes: int, *, is_locked: bool) -> Lane:
        host = self._device.host_slot(size_bytes, is_locked=is_locked)
        # Not through NumPy, which torch does not need; the lane keeps the tensor as long as the view.
        view = memoryview((ctypes.c_ubyte * size_bytes).from_address(host.data_ptr())).cast("B")
        lane = Lane(host, view, self._device.slot(host), is_locked)
        self.locked_bytes += size_bytes if is_locked else 0
        return lane

    def _forget(self, lane: Lane) -> None:
        self.locked_bytes -= len(lane.view) if lane.is_locked else 0


def _rounded(size_bytes: int) -> int:
    """The next power of two: torch's page-locked allocator rounds to it anyway, and lanes fit more often."""
    return max(1 << 16, 1 << (size_bytes - 1).bit_length())
