"""Cuts and casts on their way through `load`, `stream` and `slice`: equal to torch's own slicing, and only the pieces needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save

from modelp2p.loader import load, open_release, stream
from modelp2p.loader.device import Device, HostDevice
from modelp2p.protocol.errors import NotFoundError, UsageError
from tests.loader.fake_cuda import FakeCuda
from tests.loader.models import MIB, same
from tests.loader.test_pipeline import add, checked, open_on

if TYPE_CHECKING:
    from modelp2p.loader.plan import Cut

TENSORS = {
    "wide": torch.randn(64, 12_000, generator=torch.Generator().manual_seed(1)),
    "deep": torch.randn(30, 17, 100, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16),
    "bias": torch.arange(1000),
    "empty": torch.empty(0, 4),
}
CUTS: dict[str, Cut] = {"wide": (1, 3000, 6000), "deep": (-2, 3, 9), "bias": (0, 500, 1000)}
DEVICES = [
    pytest.param(HostDevice, id="host"),
    *(pytest.param(lambda s=s: FakeCuda(s, proves=True), id=f"fake-{s}") for s in range(3)),
]


def cut(name: str) -> torch.Tensor:
    tensor = TENSORS[name]
    if name not in CUTS:
        return tensor
    dim, start, stop = CUTS[name]
    return tensor.narrow(dim, start, stop - start).contiguous()


@pytest.fixture(autouse=True)
def model(own_home: Path) -> None:
    add(own_home, {"m.safetensors": save(TENSORS)})


@pytest.mark.parametrize("make", DEVICES)
def test_cuts_are_what_torch_would_cut(make: type[Device]) -> None:
    device = make()
    with open_on(device) as release:
        got = dict(checked(device, release.stream(plan=CUTS)))
    assert got.keys() == TENSORS.keys()
    assert all(same(got[name], cut(name)) and got[name].is_contiguous() for name in got)


@pytest.mark.parametrize("options", [{}, {"verify": "cpu"}, {"mapping": "pread"}, {"verify": "off"}])
def test_by_every_way_on_the_host(options: dict[str, str]) -> None:
    for got in (load("lab/model", plan=CUTS, **options), dict(stream("lab/model", plan=CUTS, **options))):  # type: ignore[arg-type]
        assert all(same(got[name], cut(name)) for name in TENSORS)


def test_a_view_is_no_wider_than_its_cut() -> None:
    with open_release("lab/model") as release:
        got = release.load(plan=CUTS)
        assert got["bias"].untyped_storage().nbytes() == got["bias"].nbytes
        assert got["wide"].untyped_storage().nbytes() == got["wide"].nbytes
        # A stretch of the file is shown, everything else is a copy.
        assert release.stats.copied_bytes == got["wide"].nbytes + got["deep"].nbytes


def test_a_function_decides() -> None:
    got = load("lab/model", plan=lambda name, shape: (0, 0, shape[0] // 2) if len(shape) == 2 else None)
    assert same(got["wide"], TENSORS["wide"][:32])
    assert same(got["deep"], TENSORS["deep"])


def test_a_rank_reads_only_its_pieces() -> None:
    for make in (HostDevice, lambda: FakeCuda(proves=True)):
        with open_on(make()) as release:
            before = release.stats.verified_bytes
            got = release.load("wide", plan={"wide": (0, 0, 16)})
            assert same(got["wide"], TENSORS["wide"][:16])
            assert release.stats.verified_bytes - before == MIB, "of three"


@pytest.mark.parametrize("make", DEVICES)
def test_casts_after_cuts_and_of_floats_only(make: type[Device]) -> None:
    device = make()
    with open_on(device) as release:
        got = dict(checked(device, release.stream(dtype=torch.float16, plan=CUTS)))
    for name, tensor in got.items():
        want = cut(name)
        assert same(tensor, want.to(torch.float16) if want.is_floating_point() else want)


def test_slices_of_other_dimensions() -> None:
    for mapping in ("auto", "pread"):
        with open_release("lab/model", mapping=mapping) as release:
            assert same(release.slice("deep", 2, 5, dim=2), TENSORS["deep"][:, :, 2:5].contiguous())
            assert same(release.slice("deep", 2, 5), TENSORS["deep"][2:5])
            assert release.slice("wide", 7, 7, dim=1).shape == (64, 0)


def test_plans_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    with open_release("lab/model", verify="cpu") as release:
        before = release.stats.verified_bytes
        with pytest.raises(NotFoundError, match="nosuch"):
            release.load(plan={"nosuch": (0, 0, 1)})
        with pytest.raises(UsageError, match="dimension 3"):
            release.load(plan={"deep": (3, 0, 1)})
        with pytest.raises(UsageError, match="rows"):
            release.load(plan={"deep": (0, 0, 31)})
        assert release.stats.verified_bytes == before
