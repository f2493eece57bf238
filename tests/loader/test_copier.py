"""One suite over every way onto a device: the host, the fake, and CUDA where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as oracle

from modelp2p.loader import load
from modelp2p.loader.copier import Copier, CpuCopier, CudaCopier, copier_for
from modelp2p.loader.copying import WINDOW_BYTES
from modelp2p.loader.home import default_home
from modelp2p.loader.locate import locate
from modelp2p.loader.release import OpenRelease
from modelp2p.protocol.errors import IntegrityError, UsageError
from tests.loader.fake_device import POISON, FakeDevice
from tests.loader.models import MIB, file_of, same
from tests.releases import Home, statement_of

COPIERS = [
    pytest.param(CpuCopier, id="cpu"),
    pytest.param(FakeDevice, id="fake"),
    pytest.param(lambda: CudaCopier(torch.device("cuda:0")), id="cuda", marks=pytest.mark.gpu),
]
every_copier = pytest.mark.parametrize("make", COPIERS)


def open_on(copier: Copier, **options: str) -> OpenRelease:
    located = locate("lab/model", publisher=None, home=default_home())
    return OpenRelease(located, copier, mapping="pread", **options)  # type: ignore[arg-type]


@every_copier
def test_what_was_written_is_there_after_the_fence(make: Callable[[], Copier]) -> None:
    copier = make()
    source = copier.staging(1000)
    source.copy_(torch.arange(1000).to(torch.uint8))
    target = copier.allocate(600)
    copier.write(target[:100], source[900:])
    copier.write(target[100:], source[:500])
    fence = copier.fence()
    fence.wait()
    fence.wait()
    assert target.device == copier.device
    assert target.tolist() == [*(n % 256 for n in range(900, 1000)), *(n % 256 for n in range(500))]


@every_copier
def test_staging_may_be_reused_after_the_fence(make: Callable[[], Copier]) -> None:
    copier = make()
    source, targets = copier.staging(64), [copier.allocate(64) for _ in range(3)]
    for value, target in enumerate(targets):
        source.fill_(value)
        copier.write(target, source)
        copier.fence().wait()
    assert [target.tolist() for target in targets] == [[value] * 64 for value in range(3)]


@every_copier
@pytest.mark.usefixtures("home")
def test_a_release_arrives_whole(make: Callable[[], Copier], shards: dict[str, bytes]) -> None:
    copier = make()
    with open_on(copier, verify="cpu") as release:
        got = release.load()
    want = {name: t for path, data in shards.items() if path.endswith(".safetensors") for name, t in oracle(data).items()}
    assert got.keys() == want.keys()
    assert all(got[name].device == copier.device and same(got[name].cpu(), want[name]) for name in want)
    assert release.stats.transfer == copier.transfer
    assert release.stats.copied_bytes == release.stats.bytes


@every_copier
@pytest.mark.slow
def test_tensors_over_several_windows(make: Callable[[], Copier], own_home: Path) -> None:
    files = {"m.safetensors": file_of(1, small=64, large=2 * WINDOW_BYTES + 12_340, last=MIB), "n.safetensors": file_of(2, x=64)}
    home = Home(own_home / "modelp2p")
    home.trust()
    home.add(statement_of(files), files)
    want = {name: t for data in files.values() for name, t in oracle(data).items()}
    with open_on(make(), verify="cpu") as release:
        for name, tensor in release.stream():
            assert same(tensor.cpu(), want[name])
            assert same(release.tensor("last").cpu(), want["last"]), "a second reader beside the stream"
        assert same(release.slice("large", 5, 12_000_000).cpu(), want["large"][5:12_000_000])


@every_copier
@pytest.mark.usefixtures("home")
def test_an_abandoned_stream_leaves_a_usable_release(make: Callable[[], Copier], shards: dict[str, bytes]) -> None:
    with open_on(make(), verify="cpu") as release:
        stream = release.stream()
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert same(release.tensor("d").cpu(), oracle(shards["model-2.safetensors"])["d"])


@every_copier
def test_a_bad_piece_reaches_nobody(make: Callable[[], Copier], home: Home, tree: Path) -> None:
    place = tree / "model-2.safetensors"
    place.chmod(0o644)
    with place.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"\xff\xff")
    handed: list[tuple[str, torch.Tensor]] = []
    with open_on(make(), files="model-2*") as release, pytest.raises(IntegrityError):
        handed += release.stream()
    assert handed == []


@pytest.mark.usefixtures("home")
def test_a_device_is_not_satisfied_with_the_record() -> None:
    for copier, hashes in ((FakeDevice(), True), (CpuCopier(), False)):
        with open_on(copier) as release:
            release.load()
            assert (release.stats.verified_bytes > 0) is hashes


@pytest.mark.usefixtures("home")
def test_the_device_still_reads_while_the_next_window_is_filled() -> None:
    device = FakeDevice()
    with open_on(device, verify="cpu") as release:
        release.load()
    assert device.most_pending > 0
    assert not device.pending


def test_the_fake_reads_late() -> None:
    device = FakeDevice()
    source, target = device.staging(4), device.allocate(4)
    device.write(target, source)
    assert target.tolist() == [POISON] * 4
    source.fill_(7)
    device.fence().wait()
    assert target.tolist() == [7] * 4


def test_devices_that_are_not_here_or_not_served() -> None:
    assert isinstance(copier_for("cpu"), CpuCopier)
    absent = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(UsageError, match="CUDA device"):
        load("lab/model", absent)
    for device in ("meta", "teapot"):
        with pytest.raises(UsageError):
            copier_for(device)
