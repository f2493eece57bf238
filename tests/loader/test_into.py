"""A model's own tensors filled in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from modelp2p.loader import load
from modelp2p.loader.device import Device, HostDevice, device_for
from modelp2p.protocol.errors import IntegrityError, UsageError
from tests.loader.fake_cuda import FakeCuda
from tests.loader.models import MIB
from tests.loader.test_integrity import flip
from tests.loader.test_pipeline import add, open_on

DEVICES = [
    pytest.param(HostDevice, id="host"),
    *(pytest.param(lambda s=s: FakeCuda(s, proves=True, slot_bytes=MIB), id=f"fake-{s}") for s in range(3)),
    pytest.param(lambda: device_for("cuda:0"), id="cuda", marks=pytest.mark.gpu),
]
every_device = pytest.mark.parametrize("make", DEVICES)
Make = Callable[[], Device]


class Net(torch.nn.Module):
    def __init__(self, width: int = 700) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(width, 512)
        self.head = torch.nn.Linear(512, width, bias=False)
        self.norm = torch.nn.BatchNorm1d(512)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def stored(seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.rand_like(t) if t.is_floating_point() else t + 7 for name, t in Net().state_dict().items()}


@pytest.fixture
def tree(own_home: Path) -> Path:
    home = add(own_home, {"m.safetensors": save(stored())})
    (link,) = (home.path / "models" / "lab" / "model").iterdir()
    return link.resolve()


def holds(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(model.state_dict()[name].cpu(), tensor) for name, tensor in tensors.items())


@every_device
@pytest.mark.usefixtures("tree")
def test_parameters_and_buffers_are_filled_where_they_are(make: Make) -> None:
    device = make()
    model = Net().to(device.device)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with open_on(device) as release:
        done = release.into(model)
        assert release.stats.verified_bytes > release.stats.bytes
    assert holds(model, stored())
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert (set(done.filled), done.missing, done.unexpected) == (set(before), (), ())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Frugal(FakeCuda):
    def allocate(self, size_bytes: int) -> torch.Tensor:
        raise AssertionError("memory beside the model's own")


@pytest.mark.usefixtures("tree")
def test_no_second_copy_where_dtypes_agree() -> None:
    model = Net()
    device = Frugal()
    with open_on(device) as release:
        release.into(model)
    assert holds(model, stored())


@every_device
@pytest.mark.usefixtures("tree")
def test_other_dtypes_and_layouts_are_cast(make: Make) -> None:
    device = make()
    model = Net().to(device.device, torch.bfloat16)
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().t().contiguous().t())
    assert not model.head.weight.is_contiguous()
    with open_on(device) as release:
        release.into(model)
    want = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in stored().items()}
    assert holds(model, want)


@every_device
@pytest.mark.usefixtures("tree")
def test_tensors_by_name_and_cuts(make: Make) -> None:
    device = make()
    half = torch.zeros(700, 256, device=device.device)
    with open_on(device) as release:
        done = release.into({"embed.weight": half}, "embed.weight", plan={"embed.weight": (1, 256, 512)})
    assert torch.equal(half.cpu(), stored()["embed.weight"][:, 256:])
    assert done.filled == ("embed.weight",)


@pytest.mark.usefixtures("tree")
def test_tied_weights_count_under_any_name() -> None:
    model = Net()
    model.tied = torch.nn.Linear(512, 700, bias=False)
    model.tied.weight = model.head.weight
    with open_on(HostDevice()) as release:
        assert release.into(model).missing == ()
    assert torch.equal(model.tied.weight.detach(), stored()["head.weight"])


@pytest.mark.usefixtures("tree")
class TestMisfits:
    def refused(self, model: torch.nn.Module | dict[str, torch.Tensor], match: str) -> None:
        before = {n: t.clone() for n, t in (model.state_dict() if isinstance(model, torch.nn.Module) else model).items()}
        with open_on(HostDevice()) as release:
            read = release.stats.verified_bytes
            with pytest.raises(UsageError, match=match):
                release.into(model)
            assert release.stats.verified_bytes == read
        if isinstance(model, torch.nn.Module) and not any(t.is_meta for t in before.values()):
            assert holds(model, before)

    def test_missing(self) -> None:
        model = Net()
        model.extra = torch.nn.Linear(2, 2)
        self.refused(model, r"no tensor for extra\.weight, extra\.bias")

    def test_unexpected(self) -> None:
        model = Net()
        del model.head
        self.refused(model, r"no place for head\.weight")

    def test_shape(self) -> None:
        self.refused(Net(600), r"embed\.weight \(600, 512\), stored \(700, 512\)")

    def test_meta(self) -> None:
        self.refused(Net().to("meta"), "not on cpu")

    def test_dtype(self) -> None:
        model = Net()
        model.norm.num_batches_tracked = torch.zeros(())
        self.refused(model, "floating point")

    def test_loose(self) -> None:
        model = Net()
        model.extra = torch.nn.Linear(2, 2)
        del model.head
        with open_on(HostDevice()) as release:
            done = release.into(model, strict=False)
        assert (done.missing, done.unexpected) == (("extra.weight", "extra.bias"), ("head.weight",))
        assert torch.equal(model.embed.weight.detach(), stored()["embed.weight"])


Shown = dict[str, torch.Tensor]


class Showing(Net):
    """A net whose `state_dict` is changed by a hook, as some libraries do."""

    def __init__(self, change: Callable[[Shown], object], width: int = 700) -> None:
        super().__init__(width)

        def hook(module: torch.nn.Module, shown: Shown, prefix: str, metadata: object) -> None:
            change(shown)

        self.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("tree")
class TestWhatAModelShows:
    """`state_dict` may be anything; what counts is whether the module computes with it."""

    def test_copies_are_refused(self) -> None:
        model = Showing(lambda shown: shown.update({name: tensor.clone() for name, tensor in shown.items()}))
        before = model.embed.weight.detach().clone()
        with open_on(HostDevice()) as release:
            read = release.stats.verified_bytes
            with pytest.raises(UsageError, match=r"not show its own memory: embed\.weight, head\.weight, norm\.weight"):
                release.into(model)
            assert release.stats.verified_bytes == read
        assert torch.equal(model.embed.weight.detach(), before)

    def test_a_part_of_a_parameter_is_refused(self) -> None:
        model = Showing(lambda shown: shown.update({name: shown[name][:700] for name in ("embed.weight", "head.weight")}), 1400)
        with open_on(HostDevice()) as release, pytest.raises(UsageError, match=r"memory: embed\.weight, head\.weight$"):
            release.into(model)

    def test_parameters_may_be_renamed_and_shown_in_parts(self) -> None:
        def split(shown: Shown) -> None:
            both = shown.pop("both")
            shown |= {"embed.weight": both[:700], "head.weight": both[700:]}

        model = Showing(split)
        del model.embed, model.head
        model.both = torch.nn.Parameter(torch.zeros(1400, 512))
        with open_on(HostDevice()) as release:
            done = release.into(model)
        assert (set(done.filled), done.missing) == (set(stored()), ())
        assert torch.equal(model.both.detach(), torch.cat([stored()["embed.weight"], stored()["head.weight"]]))

    def test_a_copy_under_another_name_is_no_place(self) -> None:
        model = Showing(lambda shown: shown.update({"head.weight": shown.pop("mine.weight").clone()}))
        model.mine = model.head
        del model.head
        with open_on(HostDevice()) as release:
            with pytest.raises(UsageError, match=r"no tensor for mine\.weight"):
                release.into(model)
            done = release.into(model, strict=False)
        assert (done.missing, done.unexpected) == (("mine.weight",), ("head.weight",))

    def test_a_parameter_that_is_not_shown_is_missing(self) -> None:
        model = Showing(lambda shown: shown.pop("extra.weight"))
        model.extra = torch.nn.Linear(2, 2, bias=False)
        with open_on(HostDevice()) as release, pytest.raises(UsageError, match=r"no tensor for extra\.weight"):
            release.into(model)


@pytest.mark.usefixtures("tree")
class TestPlaces:
    """Where a tensor lies decides whether it can hold what is stored; told before anything is read."""

    def refused(self, tensors: dict[str, torch.Tensor], match: str) -> None:
        with open_on(HostDevice()) as release:
            read = release.stats.verified_bytes
            with pytest.raises(UsageError, match=match):
                release.into(tensors, list(tensors))
            assert release.stats.verified_bytes == read

    def test_two_stored_tensors_for_one_place(self) -> None:
        model = Net()
        model.head.weight = model.embed.weight
        with open_on(HostDevice()) as release:
            with pytest.raises(UsageError, match=r"one place in the model: embed\.weight and head\.weight"):
                release.into(model)
            release.into(model, [*(stored().keys() - {"embed.weight"})])
        assert torch.equal(model.embed.weight.detach(), stored()["head.weight"])

    def test_tensors_that_overlap(self) -> None:
        base = torch.zeros(1000, 512)
        self.refused({"embed.weight": base[:700], "head.weight": base[300:]}, "one place in the model")
        wide = torch.zeros(700, 513)
        self.refused({"embed.weight": wide[:, :512], "head.weight": wide[:, 1:]}, "one place in the model")
        self.refused({"embed.weight": base[:700], "norm.weight": base.view(-1)[700:1724:2]}, "one place in the model")

    def test_columns_of_one_matrix_do_not(self) -> None:
        both = torch.zeros(700, 1024)
        with open_on(HostDevice()) as release:
            release.into({"embed.weight": both[:, :512], "head.weight": both[:, 512:]}, ["*d.weight"])
        assert torch.equal(both, torch.cat([stored()["embed.weight"], stored()["head.weight"]], dim=1))

    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.zeros(1).expand(512),
            lambda: torch.zeros(600).as_strided((512,), (0,)),
            lambda: torch._neg_view(torch.zeros(512)),
            lambda: torch.zeros(512, dtype=torch.complex64).conj().imag,
            lambda: torch.zeros(512).to_sparse(),
        ],
        ids=["expanded", "stride 0", "negated", "of a conjugate", "sparse"],
    )
    def test_what_is_no_plain_memory(self, make: Callable[[], torch.Tensor]) -> None:
        self.refused({"norm.weight": make()}, r"conjugated, negated or sparse: norm\.weight")

    def test_rows_that_reach_into_each_other(self) -> None:
        self.refused({"embed.weight": torch.zeros(2000).as_strided((700, 512), (1, 1))}, r"share memory.*: embed\.weight")

    def test_views_of_the_store_are_read_only(self) -> None:
        model = Net()
        model.load_state_dict(load("lab/model"), assign=True)
        self.refused({"embed.weight": model.embed.weight.detach()}, r"read-only memory.*: embed\.weight")
        with open_on(HostDevice()) as release:
            with pytest.raises(UsageError, match="read-only memory"):
                release.into(model)
            assert set(release.attest(model).attested) == set(stored())


@every_device
def test_a_bad_piece_never_reaches_the_model(make: Make, tree: Path) -> None:
    place = tree / "m.safetensors"
    flip(place, -1)
    device = make()
    model = Net().to(device.device)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3)
    with open_on(device) as release, pytest.raises(IntegrityError) as caught:
        release.into(model)
    assert caught.value.facts["piece"] == (place.stat().st_size - 1) // MIB
    for name, tensor in model.state_dict().items():
        values, wanted = tensor.cpu(), stored()[name]
        assert bool(((values == 3) | (values == wanted)).all()), "a proven value, or the one it had"
