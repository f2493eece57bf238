"""Memory that files are read into: the same bytes for this process and for others, and nothing left of it."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from modelp2p.loader.device import HostDevice
from modelp2p.loader.ring import Ring
from modelp2p.loader.staging import HostSlot


def descriptors() -> set[str]:
    gc.collect()
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_a_shared_slot_is_seen_through_its_descriptor() -> None:
    slot = HostSlot.shared(1 << 16)
    slot.view[5:8] = b"abc"
    assert os.pread(slot.fd, 3, 5) == b"abc"
    os.pwrite(slot.fd, b"d", 9)
    assert slot.memory[9] == ord("d")
    assert slot.memory.data_ptr() % 4096 == 0
    slot.close()
    slot.close()
    assert slot.fd == -1
    assert bytes(slot.view[5:8]) == b"abc", "the memory stays"


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_slot_costs_one_descriptor_and_gives_it_back(is_closed: bool) -> None:
    before = descriptors()
    slot = HostSlot.shared(1 << 16)
    assert len(descriptors()) == len(before) + 1
    if is_closed:
        slot.close()
    else:
        del slot
    assert descriptors() == before


def test_a_closed_ring_holds_no_descriptor_though_somebody_holds_its_lanes() -> None:
    before = descriptors()
    ring = Ring(HostDevice())
    with ring.lanes(1 << 16) as lanes:
        assert len(descriptors()) == len(before) + len(lanes)
    ring.close()
    assert descriptors() == before
    assert all(lane.fd == -1 for lane in lanes)


def test_ordinary_memory_does_where_none_can_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError("not here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    slot = HostSlot.shared(100)
    slot.view[:] = bytes(range(100))
    assert slot.fd == -1
    assert slot.memory.tolist() == list(range(100))
