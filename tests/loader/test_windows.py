"""Uploads straight from the mapping: what reaches the device is proven there, and every window is let go, whatever happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modelp2p.loader.device import HostDevice, device_for
from modelp2p.loader.shard import Way
from modelp2p.loader.source import SourceFile
from modelp2p.loader.windows import TRANSFERS, transfer_of
from modelp2p.protocol.errors import IntegrityError, ModelP2PError, StoreError, UsageError
from tests.loader.fake_cuda import FakeCuda, FakeEvent
from tests.loader.models import MIB, same
from tests.loader.test_integrity import REGIONS, flip
from tests.loader.test_load import expected
from tests.loader.test_pipeline import FILE, checked, fake, open_on

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.device import Device
    from modelp2p.loader.release import OpenRelease

pytestmark = pytest.mark.usefixtures("home")
SEEDS = pytest.mark.parametrize("seed", range(3))


def by_windows(device: Device, asked: str = "register", **options: object) -> OpenRelease:
    """As `open_on`, by windows."""
    return open_on(device, transfer=asked, **options)


def taken(release: OpenRelease) -> str:
    return release.stats.transfer


@pytest.fixture
def devices() -> Iterator[Callable[..., FakeCuda]]:
    """Makes fakes, and looks at the end whether anything is still page-locked on one of them."""
    made: list[FakeCuda] = []

    def make(
        seed: int = 0, *, like: type[FakeCuda] = FakeCuda, codes: tuple[int, ...] = (), fails_at: int | None = None
    ) -> FakeCuda:
        made.append(like(seed, proves=True, slot_bytes=MIB, codes=codes, fails_at=fails_at))
        return made[-1]

    yield make
    for device in made:
        device.check_let_go()


Make = Callable[..., FakeCuda]


class TestWhichWay:
    OWN, BORROWED = Way(False, True, is_own=True), Way(False, True)

    def test_the_ring_unless_asked(self) -> None:
        for way in (self.OWN, self.BORROWED):
            for is_proven in (True, False):
                assert transfer_of("auto", way, is_proven_on_device=is_proven) == ("ring", "")
                assert transfer_of("ring", way, is_proven_on_device=is_proven) == ("ring", "")

    def test_windows_where_the_device_proves_or_nobody_does(self) -> None:
        for way in (self.OWN, self.BORROWED):
            assert transfer_of("register", way, is_proven_on_device=True) == ("register", "")
        assert transfer_of("register", Way(False, False), is_proven_on_device=False) == ("register", "")

    def test_never_where_cpus_prove(self) -> None:
        name, why = transfer_of("register", self.OWN, is_proven_on_device=False)
        assert name == "ring"
        assert "could change in between" in why

    def test_if_it_became_the_default_it_would_be_for_own_files_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("modelp2p.loader.windows.AUTO", "register")
        assert transfer_of("auto", self.OWN, is_proven_on_device=True) == ("register", "")
        assert transfer_of("auto", self.BORROWED, is_proven_on_device=True) == ("ring", "")
        assert transfer_of("auto", self.OWN, is_proven_on_device=False) == ("ring", ""), "and nothing to explain"
        assert TRANSFERS == ("auto", "ring", "register")


@SEEDS
@pytest.mark.parametrize("workers", [1, None])
def test_a_release_arrives_whole(devices: Make, seed: int, workers: int | None, shards: dict[str, bytes]) -> None:
    device, want = devices(seed), expected(shards)
    got = {}
    with by_windows(device, workers=workers) as release:
        for name, tensor in checked(device, release.stream()):
            assert same(tensor, want[name])
            got[name] = tensor
        assert taken(release) == "register"
        assert (release.stats.fallbacks, release.stats.rereads, release.stats.reader) == ([], 0, "")
        assert release._ring.locked_bytes == 0, "no host slot was needed"
    assert got.keys() == want.keys()
    assert 0 < device.most_windows <= device.slots
    assert device.windows >= 6


@SEEDS
@pytest.mark.parametrize("verify", ["record", "off"])
def test_where_nobody_hashes(devices: Make, seed: int, verify: str, shards: dict[str, bytes]) -> None:
    device = FakeCuda(seed, slot_bytes=MIB)
    with by_windows(device, verify=verify) as release:
        got = release.load()
        assert taken(release) == "register"
    assert all(same(got[name], tensor) for name, tensor in expected(shards).items())
    device.check_let_go()


def test_where_cpus_hash_the_ring_is_taken_and_the_reason_told(shards: dict[str, bytes]) -> None:
    device = FakeCuda(slot_bytes=MIB)
    with by_windows(device, verify="cpu") as release:
        got = release.load()
        assert taken(release) == "ring"
        (why,) = release.stats.fallbacks
    assert "could change in between" in why
    assert device.windows == 0
    assert all(same(got[name], tensor) for name, tensor in expected(shards).items())


@pytest.mark.parametrize(("seed", "code"), [(0, 1), (1, 2), (2, 304), (3, 712), (4, 801)])
def test_a_refusal_goes_through_the_ring_and_is_not_tried_again(
    devices: Make, seed: int, code: int, shards: dict[str, bytes]
) -> None:
    device = devices(seed, codes=(code,) * 3)
    with by_windows(device) as release:
        got = release.load()
        assert taken(release) == "ring"
        (why,) = release.stats.fallbacks
        asked = device.windows
        assert same(release.tensor("d"), got["d"])
    assert "cannot be uploaded in place" in why
    assert asked == device.windows == 3, "as many as were under way, and never again on this file system"
    assert all(same(got[name], tensor) for name, tensor in expected(shards).items())


@SEEDS
def test_a_refusal_in_the_middle(devices: Make, seed: int, shards: dict[str, bytes]) -> None:
    device = devices(seed, codes=(0, 0, 0, 2))
    with by_windows(device) as release:
        got = release.load()
        assert taken(release) == "register+ring"
        assert len(release.stats.fallbacks) == 1
    assert all(same(got[name], tensor) for name, tensor in expected(shards).items())


def test_a_file_system_that_maps_nothing(devices: Make, monkeypatch: pytest.MonkeyPatch, shards: dict[str, bytes]) -> None:
    def refused(self: SourceFile) -> memoryview:
        raise StoreError("'x' cannot be mapped: No such device")

    monkeypatch.setattr(SourceFile, "mapping", refused)
    with by_windows(devices()) as release:
        got = release.load()
        assert (taken(release), release.stats.fallbacks) == ("ring", ["'x' cannot be mapped: No such device"])
    assert all(same(got[name], tensor) for name, tensor in expected(shards).items())


@SEEDS
@pytest.mark.parametrize("at", REGIONS.values(), ids=REGIONS.keys())
def test_one_bit_anywhere_reaches_nobody(devices: Make, seed: int, tree: Path, at: int) -> None:
    flip(tree / FILE, at)
    device, handed = devices(seed), []
    with pytest.raises(IntegrityError) as caught, by_windows(device) as release:  # noqa: PT012 - what came before matters
        for name, _ in checked(device, release.stream(["a", "b", "c"])):
            handed.append(name)
    where = at % (tree / FILE).stat().st_size
    assert (caught.value.facts["path"], caught.value.facts["piece"]) == (FILE, where // MIB)
    assert caught.value.facts["expected"] != caught.value.facts["got"]
    assert not device.pending


class Unsteady(FakeCuda):
    """Breaks the first things it uploads: a bad cable."""

    times = 2

    def upload(self, slot: torch.Tensor, host: torch.Tensor) -> FakeEvent:
        event = super().upload(slot, host)
        if self.times:
            self.times -= 1
            event.wait()
            slot[host.numel() // 2] ^= 1
        return event


@SEEDS
def test_a_bad_span_is_read_again_as_a_private_copy(devices: Make, seed: int, shards: dict[str, bytes]) -> None:
    with by_windows(devices(seed, like=Unsteady)) as release:
        got = release.load()
        assert release.stats.rereads >= 1
        assert taken(release) == "register+ring"
        assert release.stats.fallbacks == []
    assert all(same(got[name], tensor) for name, tensor in expected(shards).items())


@SEEDS
def test_a_file_that_changes_under_the_window_is_found_on_the_device(devices: Make, seed: int, tree: Path) -> None:
    """What is proven is what was uploaded, not what lay in the page cache when the upload was ordered."""
    place, uploads = tree / "model-2.safetensors", []

    class Writing(FakeCuda):
        def upload(self, slot: torch.Tensor, host: torch.Tensor) -> FakeEvent:
            event = super().upload(slot, host)
            uploads.append(host)
            if len(uploads) == 3:
                flip(place, 2 * MIB + 5)
            return event

    with by_windows(devices(seed, like=Writing)) as release, pytest.raises(IntegrityError) as caught:
        release.tensor("d")
    assert caught.value.facts["piece"] == 2


@pytest.mark.parametrize("verify", ["record", "off"])
def test_a_file_that_changes_where_nobody_hashes_is_refused_at_the_end(tree: Path, verify: str) -> None:
    place = tree / "model-2.safetensors"

    class Writing(FakeCuda):
        def upload(self, slot: torch.Tensor, host: torch.Tensor) -> FakeEvent:
            os.utime(place, ns=(0, 1))
            return super().upload(slot, host)

    device, handed = Writing(slot_bytes=MIB), []
    with by_windows(device, verify=verify) as release, pytest.raises(IntegrityError, match="written to"):
        handed += list(release.stream("d"))
    assert handed == []
    device.check_let_go()


def test_a_repaired_file_is_mapped_anew(tree: Path, shards: dict[str, bytes]) -> None:
    place = tree / "model-2.safetensors"
    for piece in (1, 3):
        flip(place, piece * MIB + 5)

    def on_bad(path: str, piece: int) -> bool:
        fresh = place.with_name("fresh")
        fresh.write_bytes(shards[path])
        fresh.replace(place)
        return True

    # One span after the other: the last window is opened after the repair.
    device = FakeCuda(slot_bytes=MIB, slots=1, proves=True)
    with by_windows(device, on_bad=on_bad) as release:
        assert same(release.tensor("d"), expected(shards)["d"])
        assert (release.stats.refetches, release.stats.rereads) == (1, 2), "piece 3 came from the new file at once"
        assert taken(release) == "register+ring"
    assert device.windows == 4
    device.check_let_go()


@SEEDS
@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 8, 13, 21, 34])
def test_a_device_that_fails(devices: Make, seed: int, number: int) -> None:
    device = devices(seed, fails_at=number)
    with by_windows(device) as release, pytest.raises(ModelP2PError, match="fake device"):  # noqa: PT012
        for _, tensor in release.stream():
            device.check_handed_out(tensor)


@SEEDS
def test_ctrl_c_and_a_stream_that_is_dropped(devices: Make, seed: int) -> None:
    device = devices(seed)

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with by_windows(device) as release:
        with pytest.raises(KeyboardInterrupt):
            release.load(progress=interrupted)
        device.check_let_go()
        stream = release.stream()
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        device.check_let_go()
        assert not device.pending


def test_ctrl_c_while_a_window_is_opened(devices: Make) -> None:
    class Interrupting(FakeCuda):
        def register(self, memory: torch.Tensor) -> FakeEvent:  # type: ignore[override]  # the answer is lost
            event = super().register(memory)
            if self.windows == 2:
                raise KeyboardInterrupt
            return event

    device = devices(like=Interrupting)
    with by_windows(device) as release, pytest.raises(KeyboardInterrupt):
        release.load()


def test_two_readers_of_one_file_have_mappings_of_their_own(devices: Make, shards: dict[str, bytes]) -> None:
    want = expected(shards)
    with by_windows(devices()) as release:
        for name, tensor in release.stream():
            assert same(tensor, want[name])
            assert same(release.tensor("d"), want["d"])
        assert taken(release) == "register"


def test_a_short_lane_is_enough_for_windows(shards: dict[str, bytes]) -> None:
    device = fake(0, slots=1)
    with by_windows(device) as release:
        got = release.load()
    assert all(same(got[name], tensor) for name, tensor in expected(shards).items())
    assert device.most_windows == 1
    device.check_let_go()


@pytest.mark.gpu
@pytest.mark.slow
def test_a_gpu_loads_the_same_by_windows_or_says_why_not(tree: Path, shards: dict[str, bytes]) -> None:
    with by_windows(device_for("cuda:0")) as release:
        got = release.load()
        assert taken(release) == "register" or any("in place" in reason for reason in release.stats.fallbacks)
    assert all(same(got[name].cpu(), tensor) for name, tensor in expected(shards).items())
    flip(tree / FILE, 2 * MIB + 5)
    with by_windows(device_for("cuda:0")) as release, pytest.raises(IntegrityError) as caught:
        release.tensor("b")
    assert caught.value.facts["piece"] == 2


def test_what_is_asked_for_has_to_exist() -> None:
    with pytest.raises(UsageError, match="transfer"):
        open_on(fake(), transfer="gds")
    for transfer in ("ring", "register"):
        with pytest.raises(UsageError, match="for GPUs"):
            open_on(HostDevice(), transfer=transfer)
