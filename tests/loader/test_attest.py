"""A look at a model's memory: every changed byte is found, and what cannot be judged is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from modelp2p.loader import open_release
from modelp2p.loader.device import Device, HostDevice, device_for
from modelp2p.protocol.errors import IntegrityError
from tests.loader.fake_cuda import FakeCuda
from tests.loader.models import MIB, raw_file, tensors_of
from tests.loader.test_integrity import flip
from tests.loader.test_pipeline import add, open_on
from tests.releases import Home, statement_of

DEVICES = [
    pytest.param(HostDevice, id="host"),
    *(pytest.param(lambda s=s: FakeCuda(s, slot_bytes=MIB), id=f"fake-{s}") for s in range(3)),
    pytest.param(lambda: device_for("cuda:0"), id="cuda", marks=pytest.mark.gpu),
]
every_device = pytest.mark.parametrize("make", DEVICES)
Make = Callable[[], Device]

LARGE = tensors_of(1, a=MIB + 400, b=2 * MIB, c=64)
SMALL = tensors_of(2, x=4096, y=0)
ALL = {*LARGE, *SMALL}


@pytest.fixture(autouse=True)
def tree(own_home: Path) -> Path:
    home = add(own_home, {"large.safetensors": save(LARGE), "small.safetensors": save(SMALL)})
    (link,) = (home.path / "models" / "lab" / "model").iterdir()
    return link.resolve()


@every_device
def test_what_was_loaded_is_attested(make: Make) -> None:
    device = make()
    with open_on(device) as release:
        model = release.load()
        found = release.attest(model)
    assert (set(found.attested), found.bad, dict(found.skipped)) == (ALL, (), {})
    assert found.bytes == sum(tensor.nbytes for tensor in model.values())
    assert not isinstance(device, FakeCuda) or not device.pending


@every_device
@pytest.mark.parametrize(("name", "index", "path", "pieces"), [
    ("a", 0, "large", {0}), ("a", -1, "large", {1}), ("b", 0, "large", {1}), ("b", -1, "large", {3}), ("x", 5, "small", {0}),
])  # fmt: skip
def test_one_changed_number_is_found(make: Make, name: str, index: int, path: str, pieces: set[int]) -> None:
    with open_on(make()) as release:
        model = release.load()
        model[name][index] += 1
        found = release.attest(model)
    assert {(bad.path, bad.piece) for bad in found.bad} == {(f"{path}.safetensors", piece) for piece in pieces}
    assert all(name in bad.tensors for bad in found.bad)
    assert name not in found.attested
    assert found.skipped == {}
    assert found.bytes < sum(tensor.nbytes for tensor in model.values())


@every_device
def test_what_is_not_as_stored_is_named_with_its_neighbours(make: Make) -> None:
    device = make()
    with open_on(device) as release:
        model = release.load()
        model["c"] = model["c"].to(torch.float16)
        del model["x"]
        found = release.attest(model)
    assert found.skipped == {
        "c": "cast to torch.float16 from torch.float32",
        "b": "shares piece 3 of 'large.safetensors' with a tensor that is not as stored",
        "x": "not in the model",
    }
    assert set(found.attested) == {"a", "y"}
    assert found.bad == ()


def test_pieces_that_can_be_judged_are_also_where_the_tensor_is_not_whole() -> None:
    with open_on(HostDevice()) as release:
        model = release.load()
        del model["c"]
        model["b"][MIB // 8] += 1
        found = release.attest(model)
    assert [bad.piece for bad in found.bad] == [1]
    assert "b" in found.skipped


def test_layouts_shapes_and_places() -> None:
    with open_on(HostDevice()) as release:
        model = release.load()
        model["a"] = torch.stack([model["a"], model["a"]], 1)[:, 0]
        model["b"] = model["b"].reshape(2, -1)
        model["x"] = model["x"].to("meta")
        found = release.attest(model)
    assert found.skipped["a"] == "not contiguous"
    assert "stored (524288,)" in found.skipped["b"]
    assert found.skipped["x"] == "on meta, not on cpu"


def test_a_module_filled_in_place() -> None:
    model = torch.nn.Module()
    for name, tensor in {**LARGE, **SMALL}.items():
        model.register_parameter(name, torch.nn.Parameter(torch.zeros_like(tensor)))
    with open_on(HostDevice()) as release:
        assert {bad.piece for bad in release.attest(model).bad} == {0, 1, 2, 3}
        release.into(model)
        assert set(release.attest(model).attested) == ALL


def test_memory_is_judged_and_not_the_disk(tree: Path) -> None:
    with open_on(HostDevice()) as release:
        model = {name: tensor.clone() for name, tensor in release.load().items()}
        flip(tree / "large.safetensors", -1)
        assert set(release.attest(model).attested) == ALL
        flip(tree / "large.safetensors", 20)
        with pytest.raises(IntegrityError):
            release.attest(model)


def test_a_header_of_several_pieces(own_home: Path) -> None:
    header = b'{"t":{"dtype":"U8","shape":[9],"data_offsets":[0,9]},"u":{"dtype":"U8","shape":[3],"data_offsets":[9,12]}}'
    data = raw_file(header + b" " * (2 * MIB - len(header)), bytes(range(12)))
    home = Home(own_home / "modelp2p")
    home.add(statement_of({"m.safetensors": data}, name="lab/long"), {"m.safetensors": data})
    with open_release("lab/long", home=home.path, mapping="pread") as release:
        model = release.load()
        assert release.attest(model).attested == ("t", "u")
        del model["t"]
        found = release.attest(model)
    assert set(found.skipped) == {"t", "u"}
    assert found.bad == ()
