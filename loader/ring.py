"""Staging memory in lanes: a host slot to read into and a device slot to prove in, used span after span and load after load.

Invariants:
- page-locked memory of one ring is at most `RING_BYTES`; a reader beyond that gets one lane of ordinary memory, which works too;
- lanes come back only after the device is drained and their readers have ended, so a slot is never reused under work that still
  touches it. Where draining fails, or a reader was not waited for, the lane is dropped.

A bare lane has no host slot yet: uploads from windows need none (`windows`), and page-locking one takes longer than filling it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.device import Device
    from modelp2p.loader.reading import Reading
    from modelp2p.loader.staging import HostSlot

RING_BYTES = 512 << 20


@dataclass(slots=True, eq=False)
class Lane:
    """Staging for one span."""

    slot: torch.Tensor
    is_locked: bool
    """Its host slot is page-locked, or will be."""
    staged: HostSlot | None = None
    reading: Reading | None = None
    """Who wrote to the host slot last."""

    @property
    def is_idle(self) -> bool:
        """Whether nobody writes to the host slot any more: whoever waits for readers may be interrupted, again and again."""
        return self.reading is None or self.reading.is_idle()

    @property
    def host(self) -> torch.Tensor:
        """The host slot; not of a bare lane."""
        assert self.staged is not None, "a bare lane"
        return self.staged.memory

    @property
    def view(self) -> memoryview:
        """The host slot for readers; not of a bare lane."""
        assert self.staged is not None, "a bare lane"
        return self.staged.view

    @property
    def fd(self) -> int:
        """The host slot for processes that hash; -1: not for them. Not of a bare lane."""
        assert self.staged is not None, "a bare lane"
        return self.staged.fd


class Ring:
    """The lanes of one device. Used by one thread at a time, by any number of readers in turns."""

    def __init__(self, device: Device, limit_bytes: int = RING_BYTES) -> None:
        self._device = device
        self._limit = limit_bytes
        self._free: list[Lane] = []
        self._staged: WeakSet[HostSlot] = WeakSet()
        self._kept_bytes = 0
        """Of the slots of all lanes but those of ordinary memory; each may be staged, so this is what the limit is for."""
        self.locked_bytes = 0
        """How much memory is page-locked now."""

    @contextmanager
    def lanes(self, size_bytes: int, *, is_bare: bool = False) -> Iterator[list[Lane]]:
        """At least one lane, for spans of up to `size_bytes`, until the block ends; a reader inside it gets others.

        `is_bare`: host slots are not needed at once, if ever; `stage` makes them.
        """
        size_bytes = _rounded(size_bytes)
        for lane in [lane for lane in self._free if lane.slot.numel() < size_bytes]:
            self._free.remove(lane)
            self._forget(lane)
        lanes = [self._free.pop() for _ in range(min(self._device.slots, len(self._free)))]
        try:
            while len(lanes) < self._device.slots and self._kept_bytes + size_bytes <= self._limit:
                lanes.append(self._lane(size_bytes, is_locked=True, is_bare=is_bare))
                self._kept_bytes += size_bytes
            if not lanes:
                lanes.append(self._lane(size_bytes, is_locked=False, is_bare=is_bare))
            for lane in lanes if not is_bare else ():
                self.stage(lane)
            yield lanes
        finally:
            kept, lanes = lanes, []
            try:
                self._device.drain()
            except BaseException:
                for lane in kept:
                    self._forget(lane)
                raise
            for lane in kept:
                if lane.is_locked and lane.is_idle:
                    self._free.append(lane)
                else:
                    self._forget(lane)

    def stage(self, lane: Lane) -> None:
        """Give a lane its host slot, if it is bare."""
        if lane.staged is None:
            self._stage(lane, self._device.host_slot(lane.slot.numel(), is_locked=lane.is_locked))

    def close(self) -> None:
        """Give back what is not memory, at once, though a traceback may hold the lanes. Idempotent."""
        for slot in list(self._staged):
            slot.close()
        self._free = []

    def _lane(self, size_bytes: int, *, is_locked: bool, is_bare: bool) -> Lane:
        if is_bare:
            return Lane(self._device.bare_slot(size_bytes), is_locked)
        host = self._device.host_slot(size_bytes, is_locked=is_locked)
        lane = Lane(self._device.slot(host.memory), is_locked)
        self._stage(lane, host)
        return lane

    def _stage(self, lane: Lane, host: HostSlot) -> None:
        lane.staged = host
        self._staged.add(host)
        self.locked_bytes += host.memory.numel() if lane.is_locked else 0

    def _forget(self, lane: Lane) -> None:
        self._kept_bytes -= lane.slot.numel() if lane.is_locked else 0
        self.locked_bytes -= lane.slot.numel() if lane.is_locked and lane.staged is not None else 0


def _rounded(size_bytes: int) -> int:
    """The next power of two: torch's page-locked allocator rounds to it anyway, and lanes fit more often."""
    return max(1 << 16, 1 << (size_bytes - 1).bit_length())
