"""One suite over every device: the host, the fake, and CUDA where there is one."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from modelp2p.loader import load
from modelp2p.loader.device import Device, HostDevice, device_for
from modelp2p.loader.gpu import Batch
from modelp2p.loader.plan import Move
from modelp2p.loader.ring import Ring
from modelp2p.loader.strided import unit_of
from modelp2p.loader.windows import WindowError
from modelp2p.protocol.errors import ModelP2PError, UsageError
from modelp2p.protocol.merkle import piece_hash
from tests.loader.fake_cuda import POISON, FakeCuda

PIECE = 1 << 16
DEVICES = [
    pytest.param(HostDevice, id="host"),
    *(pytest.param(lambda seed=seed: FakeCuda(seed), id=f"fake-{seed}") for seed in range(4)),
    pytest.param(lambda: device_for("cuda:0"), id="cuda", marks=pytest.mark.gpu),
]
every_device = pytest.mark.parametrize("make", DEVICES)
Make = Callable[[], Device]


def numbers(size: int) -> torch.Tensor:
    return torch.arange(size).remainder_(251).to(torch.uint8)


def uploaded(device: Device, data: torch.Tensor) -> torch.Tensor:
    host = device.host_slot(data.numel()).memory
    host.copy_(data)
    slot = device.slot(host)
    device.follow(device.upload(slot, host))
    return slot


@every_device
def test_moves_put_bytes_where_they_belong(make: Make) -> None:
    device = make()
    data = numbers(1000)
    slot = uploaded(device, data)
    target = device.allocate(600)
    device.move(target, slot, Move(0, 900, 0, 100))
    device.move(target, slot, Move(0, 0, 100, 500))
    event = device.mark()
    event.wait()
    event.wait()
    assert event.is_done()
    assert target.device == device.device
    assert target.tolist() == [*data[900:].tolist(), *data[:500].tolist()]
    device.drain()


STRIDED = {
    "by eights": Move(0, 8, 16, 24, 5, 64, 24),
    "by twos": Move(0, 2, 0, 6, 10, 50, 6),
    "single bytes": Move(0, 3, 1, 5, 9, 11, 7),
    "source at an odd place": Move(0, 1, 0, 8, 4, 16, 8),
}


@every_device
@pytest.mark.parametrize("move", STRIDED.values(), ids=STRIDED.keys())
def test_strided_moves(make: Make, move: Move) -> None:
    device = make()
    data = numbers(1000)
    slot, target = uploaded(device, data), device.allocate(200)
    device.move(target, device.constant(bytes(200)), Move(0, 0, 0, 200))
    device.move(target, slot, move)
    device.mark().wait()
    want = [0] * 200
    for run in range(move.count):
        source, begin = move.source + run * move.source_stride, move.target + run * move.target_stride
        want[begin : begin + move.length] = data[source : source + move.length].tolist()
    assert target.tolist() == want
    device.drain()


def test_the_widest_unit_that_fits() -> None:
    assert unit_of(64, 64, Move(0, 0, 0, 24, 2, 64, 24)) == 8
    assert unit_of(64, 68, Move(0, 0, 0, 24, 2, 64, 24)) == 4
    assert unit_of(64, 64, Move(0, 0, 0, 6, 2, 64, 24)) == 2
    assert unit_of(64, 64, Move(0, 0, 0, 8, 2, 9, 8)) == 1


@every_device
def test_casts_follow_moves(make: Make) -> None:
    device = make()
    values = torch.tensor([1.5, -2.0, 3.25])
    memory, result = device.allocate(12), device.allocate(6).view(torch.float16)
    device.move(memory, uploaded(device, values.view(torch.uint8)), Move(0, 0, 0, 12))
    device.cast(result, memory.view(torch.float32))
    device.mark().wait()
    assert result.tolist() == values.tolist()
    device.drain()


@every_device
@pytest.mark.parametrize("size", [1, PIECE, 3 * PIECE, 3 * PIECE + 17])
def test_a_verdict_names_the_pieces_that_differ(make: Make, size: int) -> None:
    device = make()
    data = numbers(size)
    is_whole = size <= PIECE
    layer = b"".join(piece_hash(bytes(data[at : at + PIECE].tolist()), PIECE, is_whole) for at in range(0, size, PIECE))
    batch = Batch(size, PIECE, is_whole, device.constant(layer))
    slot = uploaded(device, data)
    verdict = device.verify(device.verifier(), slot, batch)
    verdict.wait()
    assert verdict.bad() == ()
    data[-1] ^= 1
    verdict = device.verify(device.verifier(), uploaded(device, data), batch)
    verdict.wait()
    assert verdict.bad() == ((size - 1) // PIECE,)
    device.drain()


@every_device
def test_a_constant_is_there_at_once(make: Make) -> None:
    data = sha256(b"x").digest()
    assert bytes(make().constant(data).tolist()) == data


def mapped(place: Path, data: bytes) -> torch.Tensor:
    """A file of these bytes, as it lies in a shared read-only mapping."""
    place.write_bytes(data)
    with place.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), len(data), mmap.MAP_SHARED, mmap.PROT_READ)
    return torch.frombuffer(mapping, dtype=torch.uint8)


@every_device
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_a_mapped_file_is_uploaded_where_it_lies_or_refused_with_a_reason(make: Make, tmp_path: Path) -> None:
    device = make()
    data = bytes(numbers(3 * mmap.PAGESIZE + 17).tolist())
    memory = mapped(tmp_path / "file", data)
    event = device.register(memory)
    try:
        event.wait()
    except WindowError:
        # The host always; a GPU where driver, kernel or file system do not go along.
        assert not isinstance(device, FakeCuda)
    else:
        assert event.is_done()
        slot = device.bare_slot(len(data))
        upload = device.upload(slot, memory)
        upload.wait()
        target = device.allocate(len(data))
        device.move(target, slot, Move(0, 0, 0, len(data)))
        device.mark().wait()
        assert bytes(target.tolist()) == data
    for _ in range(2):
        device.unregister(memory).wait()
    device.drain()
    if isinstance(device, FakeCuda):
        device.check_let_go()


@every_device
def test_a_bare_slot_takes_what_a_host_slot_holds(make: Make) -> None:
    device = make()
    host, slot = device.host_slot(1000).memory, device.bare_slot(1000)
    host.copy_(numbers(1000))
    device.follow(device.upload(slot, host))
    target = device.allocate(1000)
    device.move(target, slot, Move(0, 0, 0, 1000))
    device.mark().wait()
    assert target.tolist() == numbers(1000).tolist()
    device.drain()


@every_device
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_memory_that_was_never_registered_may_be_unregistered(make: Make, tmp_path: Path) -> None:
    device = make()
    device.unregister(mapped(tmp_path / "file", bytes(100))).wait()


@every_device
def test_lanes_are_used_again(make: Make) -> None:
    device = make()
    ring = Ring(device)
    with ring.lanes(100_000) as lanes:
        first = {lane.host.data_ptr() for lane in lanes}
        assert len(lanes) == device.slots
        assert all(len(lane.view) >= 100_000 and lane.slot.numel() >= 100_000 for lane in lanes)
        assert all(lane.host.data_ptr() % 4096 == 0 for lane in lanes), "reads past the page cache need that"
        lanes[0].view[:3] = b"abc"
        assert lanes[0].host[:3].tolist() == list(b"abc")
    with ring.lanes(90_000) as lanes:
        assert {lane.host.data_ptr() for lane in lanes} == first
    before = ring.locked_bytes
    with ring.lanes(300_000) as lanes:
        assert ring.locked_bytes == 512 * 1024 * device.slots, "lanes that are too short are given back"
        assert before < ring.locked_bytes


def test_a_ring_never_locks_more_than_its_limit() -> None:
    device = FakeCuda(slots=3)
    ring = Ring(device, limit_bytes=5 << 16)
    with ring.lanes(1 << 16) as first, ring.lanes(1 << 16) as second, ring.lanes(1 << 16) as third:
        assert [len(lanes) for lanes in (first, second, third)] == [3, 2, 1]
        assert [lane.is_locked for lanes in (first, second, third) for lane in lanes] == [True] * 5 + [False]
        assert sum(memory.numel() for memory in device.locked) == ring.locked_bytes == 5 << 16


def test_bare_lanes_get_their_host_slots_when_they_are_needed() -> None:
    device = FakeCuda(slots=2)
    ring = Ring(device, limit_bytes=3 << 16)
    with ring.lanes(1 << 16, is_bare=True) as lanes, ring.lanes(1 << 16) as others:
        assert (len(lanes), len(others)) == (2, 1)
        assert ring.locked_bytes == 1 << 16, "a bare lane locks nothing, and counts all the same"
        ring.stage(lanes[0])
        ring.stage(lanes[0])
        assert ring.locked_bytes == 2 << 16
        lanes[0].view[:3] = b"abc"
        assert lanes[0].host[:3].tolist() == list(b"abc")
        with pytest.raises(AssertionError, match="bare"):
            _ = lanes[1].host
    with ring.lanes(1 << 16) as lanes:
        assert all(lane.staged for lane in lanes)
    with ring.lanes(2 << 16, is_bare=True):
        # One lane of the old length is left over, the others are too short and were given back.
        assert ring.locked_bytes == 0
    assert sum(memory.numel() for memory in device.locked) <= 3 << 16


def test_lanes_of_a_broken_device_are_dropped() -> None:
    device = FakeCuda(fails_at=0)
    ring = Ring(device)
    with pytest.raises(ModelP2PError, match="fake device"), ring.lanes(1000) as lanes:
        device.upload(lanes[0].slot, lanes[0].host)
    assert ring.locked_bytes == 0


def test_devices_that_are_not_here_or_not_served() -> None:
    assert isinstance(device_for("cpu"), HostDevice)
    absent = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(UsageError, match="CUDA device"):
        load("lab/model", absent)
    for device in ("meta", "teapot"):
        with pytest.raises(UsageError):
            device_for(device)


class TestTheFake:
    """What it must not let pass."""

    def test_work_is_late(self) -> None:
        device = FakeCuda()
        slot, host = device.slot(device.host_slot(4).memory), device.host_slot(4).memory
        event = device.upload(slot, host.fill_(7))
        assert slot.tolist() == [POISON] * 4
        event.wait()
        assert slot.tolist() == [7] * 4

    def test_streams_finish_out_of_order(self) -> None:
        seen = set()
        for seed in range(16):
            device = FakeCuda(seed)
            upload = device.upload(device.slot(device.host_slot(4).memory), device.host_slot(4).memory)
            device.move(device.allocate(4), device.allocate(4), Move(0, 0, 0, 4))
            move = device.mark()
            while not (upload.has_passed or move.is_done()):
                pass
            seen.add(upload.has_passed)
        assert seen == {True, False}

    def test_a_race_is_found(self) -> None:
        found = 0
        for seed in range(16):
            device = FakeCuda(seed)
            host = device.host_slot(4).memory
            slot, target = device.slot(host), device.allocate(4)
            device.upload(slot, host)
            device.move(target, slot, Move(0, 0, 0, 4))
            try:
                device.drain()
            except AssertionError as exc:
                found += "a race" in str(exc)
        assert found

    def test_a_ring_slot_rewritten_too_early(self) -> None:
        device = FakeCuda()
        host = device.host_slot(4).memory
        device.upload(device.slot(host), host)
        host.fill_(1)
        with pytest.raises(AssertionError, match="host slot changed"):
            device.drain()

    def test_an_upload_from_memory_that_is_not_locked(self) -> None:
        device = FakeCuda()
        memory, slot = numbers(4096), device.bare_slot(4096)
        with pytest.raises(AssertionError, match="not page-locked"):
            device.upload(slot, memory)
        registered = device.register(memory)
        with pytest.raises(AssertionError, match="not page-locked"):
            device.upload(slot, memory)
        registered.wait()
        device.upload(slot, memory).wait()

    def test_what_is_unregistered_too_early_or_never(self) -> None:
        device = FakeCuda()
        memory = numbers(4096)
        device.register(memory).wait()
        with pytest.raises(AssertionError, match="still registered"):
            device.check_let_go()
        event = device.upload(device.bare_slot(4096), memory)
        with pytest.raises(AssertionError, match="before its upload had ended"):
            device.unregister(memory)
        event.wait()
        device.unregister(memory)
        device.check_let_go()

    def test_memory_that_is_unmapped_too_early(self) -> None:
        device = FakeCuda()
        memory = numbers(4096)
        device.register(memory).wait()
        ending = device.unregister(memory)
        del memory
        with pytest.raises(AssertionError, match="unmapped"):
            ending.wait()

    def test_registration_is_late_and_can_be_refused(self) -> None:
        device = FakeCuda(codes=(0, 801))
        first, second = numbers(4096), numbers(4096)
        late = device.register(first)
        seen = [late.has_passed]
        with pytest.raises(WindowError, match="read-only"):
            device.register(second).wait()
        seen.append(late.has_passed)
        assert seen == [False, True], "late, and in order"
        for memory in (first, second):
            device.unregister(memory).wait()
        device.check_let_go()

    def test_a_verdict_nobody_waited_for(self) -> None:
        device = FakeCuda()
        batch = Batch(16, PIECE, True, device.constant(bytes(32)))
        verdict = device.verify(device.verifier(), device.slot(device.host_slot(16).memory), batch)
        with pytest.raises(AssertionError, match="nobody waited"):
            verdict.bad()

    def test_a_move_out_of_an_unproven_slot(self) -> None:
        device = FakeCuda(proves=True)
        slot = device.slot(device.host_slot(16).memory)
        with pytest.raises(AssertionError, match="not proven"):
            device.move(device.allocate(4), slot, Move(0, 0, 0, 4))

    def test_what_is_handed_out_too_early_or_from_staging(self) -> None:
        device = FakeCuda()
        slot, target = device.slot(device.host_slot(16).memory), device.allocate(4)
        device.move(target, slot, Move(0, 0, 0, 4))
        with pytest.raises(AssertionError, match="before it was made"):
            device.check_handed_out(target)
        device.drain()
        device.check_handed_out(target)
        with pytest.raises(AssertionError, match="part of staging"):
            device.check_handed_out(slot[4:8])
