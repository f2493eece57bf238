"""Every dtype that torch has, by every way its bytes can take, is what the `safetensors` package loads, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file as oracle
from safetensors.torch import save

from modelp2p.loader.device import HostDevice
from modelp2p.loader.home import default_home
from modelp2p.loader.locate import locate
from modelp2p.loader.parts import TORCH_NAMES, part_of
from modelp2p.loader.release import OpenRelease
from modelp2p.protocol.errors import UsageError
from modelp2p.protocol.safetensors import parse_header
from tests.loader.fake_cuda import FakeCuda
from tests.loader.models import MIB, bits, same
from tests.releases import bundle_of, publisher, write_files

FOUR_BITS = torch.float4_e2m1fn_x2
DTYPES: list[torch.dtype] = [getattr(torch, name) for name in TORCH_NAMES.values()]
VISIBLE = st.text('ab.0é重😀"\\/ ', max_size=5)
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point and dtype != FOUR_BITS]
"""torch has no arithmetic for two numbers in a byte."""
SHAPE = (40, 30, 64)
"""Over all dtypes about five pieces, whose borders lie inside of rows."""


def raw(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits: also every kind of NaN."""
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.frombuffer(bytearray(Random(seed).randbytes(count) or b"x"), dtype=torch.uint8)[:count]
    return (data % 2 if dtype is torch.bool else data).view(dtype).reshape(shape)


def values(dtype: torch.dtype) -> torch.Tensor:
    """Numbers that every dtype has nearly."""
    return torch.linspace(-3, 3, 5000, dtype=torch.float64).reshape(20, 10, 25).to(dtype)


RAW = {
    f"{dtype}".removeprefix("torch.") + kind: raw(dtype, shape, seed)
    for seed, dtype in enumerate(DTYPES)
    for kind, shape in {"": SHAPE, ".row": (7, 2), ".none": (0, 4), ".one": (2,) if dtype == FOUR_BITS else ()}.items()
}
VALUES = {f"{dtype}".removeprefix("torch."): values(dtype) for dtype in FLOATS}
FILES = {"raw.safetensors": save(RAW), "values.safetensors": save(VALUES)}

WAYS: dict[str, Callable[[Path, str], OpenRelease]] = {
    "views": lambda place, file: opened(place, file, HostDevice(), verify="cpu", mapping="mmap"),
    "copies": lambda place, file: opened(place, file, HostDevice(), verify="cpu", mapping="pread"),
    "past the cache": lambda place, file: opened(place, file, HostDevice(), verify="cpu", mapping="pread", reader="direct"),
    "ring": lambda place, file: opened(place, file, fake(1), verify="gpu"),
    "ring of one": lambda place, file: opened(place, file, fake(2, slots=1), verify="gpu"),
    "ring, proven on the host": lambda place, file: opened(place, file, FakeCuda(3, slot_bytes=MIB), verify="cpu"),
}
every_way = pytest.mark.parametrize("way", WAYS)


def fake(seed: int, slots: int = 3) -> FakeCuda:
    return FakeCuda(seed, slot_bytes=MIB, slots=slots, proves=True)


def opened(place: Path, file: str, device: HostDevice | FakeCuda, **options: Any) -> OpenRelease:  # noqa: ANN401 - as they are
    located = locate(place, publisher=publisher().id, home=default_home())
    return OpenRelease(located, device, files=file, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files in a plain folder."""
    folder = write_files(tmp_path_factory.mktemp("equality"), FILES)
    (folder / "lab.modelp2p").write_bytes(bundle_of(FILES))
    return folder


@every_way
def test_whole_tensors(place: Path, way: str) -> None:
    want = oracle(place / "raw.safetensors")
    with WAYS[way](place, "raw.safetensors") as release:
        got = release.load()
        assert release.stats.verified_bytes > len(FILES["raw.safetensors"])
    assert got.keys() == want.keys() == RAW.keys()
    assert [name for name in want if not same(got[name], want[name])] == []


def cuts(dim: int) -> list[tuple[int, int, int]]:
    rows = SHAPE[dim]
    return [(dim, 0, 1), (dim - 3, rows - 1, rows), (dim, 3, rows - 5), (dim, 0, rows), (dim, rows // 2, rows // 2)]


def sliced(file: Path, name: str, cut: tuple[int, int, int]) -> torch.Tensor:
    """As the package cuts it; the last dimension of 4-bit numbers counts single ones there."""
    dim, start, stop = cut
    with safe_open(file, framework="pt") as theirs:
        if name == "float4_e2m1fn_x2":
            whole: torch.Tensor = theirs.get_tensor(name).view(torch.uint8)
            return whole.narrow(dim, start, stop - start).contiguous().view(FOUR_BITS)
        index = [slice(None)] * len(SHAPE)
        index[dim] = slice(start, stop)
        found = theirs.get_slice(name)[tuple(index)]
        assert isinstance(found, torch.Tensor)
        return found


@pytest.mark.parametrize("way", ["views", "copies", "ring of one"])
@pytest.mark.parametrize("dim", range(len(SHAPE)))
@pytest.mark.slow
def test_cuts_of_every_dimension(place: Path, way: str, dim: int) -> None:
    file = place / "raw.safetensors"
    whole = [name for name in RAW if "." not in name]
    with WAYS[way](place, file.name) as release:
        for cut in cuts(dim):
            want = {name: sliced(file, name, cut) for name in whole}
            planned = release.load(whole, plan=dict.fromkeys(whole, cut))
            assert [name for name in whole if not same(planned[name], want[name])] == []
        one, start, stop = cuts(dim)[2]
        got = {name: release.slice(name, start, stop, dim=one) for name in whole}
        want = {name: sliced(file, name, (one, start, stop)) for name in whole}
        assert [name for name in whole if not same(got[name], want[name])] == []


@every_way
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts_to_every_floating_point_dtype(place: Path, way: str, dtype: torch.dtype) -> None:
    want = {name: tensor.to(dtype) for name, tensor in oracle(place / "values.safetensors").items()}
    with WAYS[way](place, "values.safetensors") as release:
        got = release.load(dtype=dtype)
    assert [name for name in want if not same(got[name], want[name])] == []


@every_way
def test_a_cast_leaves_what_is_no_floating_point(place: Path, way: str) -> None:
    names = [name for name, tensor in RAW.items() if not tensor.is_floating_point()]
    with WAYS[way](place, "raw.safetensors") as release:
        got = release.load(names, dtype=torch.float16)
    assert [name for name in names if not same(got[name], RAW[name])] == []


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of the same shape that is not contiguous."""
    return torch.empty_like(tensor.mT, memory_format=torch.contiguous_format).mT if tensor.dim() > 1 else torch.empty_like(tensor)


@every_way
def test_into_tensors_of_the_same_dtype(place: Path, way: str) -> None:
    model = {name: torch.empty_like(tensor) for name, tensor in RAW.items()}
    with WAYS[way](place, "raw.safetensors") as release:
        assert set(release.into(model).filled) == set(RAW)
    assert [name for name in RAW if not same(model[name], RAW[name])] == []


@every_way
def test_into_tensors_that_are_not_contiguous(place: Path, way: str) -> None:
    model = {name: transposed(tensor) for name, tensor in RAW.items()}
    assert not model["float32"].is_contiguous()
    with WAYS[way](place, "raw.safetensors") as release:
        release.into(model)
    assert [name for name in RAW if not same(model[name], RAW[name])] == []


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e5m2], ids=str)
def test_into_tensors_of_another_dtype(place: Path, way: str, dtype: torch.dtype) -> None:
    model = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in VALUES.items()}
    with WAYS[way](place, "values.safetensors") as release:
        release.into(model)
    assert [name for name in VALUES if not same(model[name], VALUES[name].to(dtype))] == []


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_into_tensors_of_another_dtype_that_are_not_contiguous(place: Path, way: str, dtype: torch.dtype) -> None:
    model = {name: torch.zeros(tensor.mT.shape, dtype=dtype).mT for name, tensor in VALUES.items()}
    with WAYS[way](place, "values.safetensors") as release:
        release.into(model)
    assert [name for name in VALUES if not same(model[name], VALUES[name].to(dtype))] == []


@settings(max_examples=60)
@given(
    stored=st.dictionaries(VISIBLE, st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)), max_size=5),
    metadata=st.none() | st.dictionaries(VISIBLE, st.text(max_size=5), min_size=1, max_size=3),
)
def test_whatever_torch_saves_is_found_at_its_place(
    stored: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str] | None
) -> None:
    tensors = {
        # A single number of 4 bits cannot be saved.
        name: raw(dtype, (*shape, 2) if dtype == FOUR_BITS else tuple(shape), seed)
        for seed, (name, (dtype, shape)) in enumerate(stored.items())
    }
    file = save(tensors, metadata)
    header = parse_header(file, len(file))
    parts = {info.name: part_of(info, header) for info in header.tensors}
    assert header.metadata == (metadata or {})
    assert {name: (part.dtype, part.shape) for name, part in parts.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert all(file[part.begin : part.end] == bytes(bits(tensors[name]).tolist()) for name, part in parts.items())


def packed(tmp_path: Path) -> Path:
    """A release of one good tensor, and one of 4-bit numbers, which torch can hold and cannot convert."""
    files = {"m.safetensors": save({"first": torch.ones(9), "packed": raw(FOUR_BITS, (4, 6), 1)})}
    (write_files(tmp_path, files) / "lab.modelp2p").write_bytes(bundle_of(files))
    return tmp_path


@pytest.mark.parametrize("way", ["views", "copies", "ring"])
def test_numbers_that_torch_cannot_cast_stay_as_they_are_stored(tmp_path: Path, way: str) -> None:
    with WAYS[way](packed(tmp_path), "m.safetensors") as release:
        loaded = release.load(dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {"first": torch.bfloat16, "packed": FOUR_BITS}


@pytest.mark.parametrize("way", ["copies", "ring"])
def test_a_copy_that_torch_cannot_do_is_refused_before_anything_is_written(tmp_path: Path, way: str) -> None:
    model = {"first": torch.zeros(9), "packed": torch.zeros(4, 6)}
    with WAYS[way](packed(tmp_path), "m.safetensors") as release, pytest.raises(UsageError, match="packed"):
        release.into(model)
    assert not model["first"].any()


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.slow
def test_what_was_handed_out_stays_as_it_is(place: Path, seed: int) -> None:
    """Whatever the order of events, and while all that is behind it goes through the same slots."""
    device = fake(seed, slots=1 + seed % 3)
    got = {}
    with opened(place, "raw.safetensors", device, verify="gpu", workers=1 + seed % 2) as release:
        for name, tensor in release.stream():
            device.check_handed_out(tensor)
            got[name] = (tensor, tensor.clone())
        assert len(device.locked) == device.slots
    assert got.keys() == RAW.keys()
    assert [name for name in RAW if not same(got[name][1], RAW[name])] == [], "when it was handed out"
    assert [name for name in RAW if not same(got[name][0], RAW[name])] == [], "and at the end"
    memory = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor, _ in got.values() if tensor.nbytes]
    assert all(end <= begin for (_, end), (begin, _) in pairwise(sorted(memory))), "no two share memory"
