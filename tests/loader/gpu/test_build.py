"""Ways to the kernels: which is taken, what is said of those that are closed, and what the cache spares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from modelp2p.loader.gpu import cubins
from modelp2p.loader.gpu.build import KERNELS, NvrtcWay, TorchWay, compile_kernels, source, ways
from modelp2p.loader.gpu.driver import CudaDriver, Params
from modelp2p.loader.gpu.nvrtc import Cubin, Nvrtc, places
from modelp2p.loader.gpu.verifier import GpuVerifier, tried_out
from modelp2p.loader.gpu.way import Kernel, Kernels, WayError
from modelp2p.protocol.errors import UsageError
from tests.loader.gpu.host import HostDriver, row

if TYPE_CHECKING:
    from modelp2p.loader.gpu.driver import Driver

Args = Sequence[torch.Tensor | int]


@dataclass
class TorchCompiler:
    """Stands for `torch.cuda._compile_kernel` of torch 2.11 to 2.13, with its parameters and those of what it returns."""

    functions: Mapping[str, Kernel]
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def __call__(
        self,
        kernel_source: str,
        kernel_name: str,
        compute_capability: str | None = None,
        cuda_include_dirs: list[str] | None = None,
        nvcc_options: list[str] | None = None,
    ) -> Callable[..., None]:
        assert kernel_source == source()
        self.asked.append((kernel_name, compute_capability))

        def launch(
            grid: tuple[int, int, int] = (1, 1, 1),
            block: tuple[int, int, int] = (1, 1, 1),
            args: list[torch.Tensor | int] | None = None,
            shared_mem: int = 0,
            stream: object = None,
        ) -> None:
            assert (grid[1:], block[1:], stream) == ((1, 1), (1, 1), None)
            assert args is not None
            self.functions[kernel_name](grid[0], block[0], args)

        return launch


@dataclass
class Compiler:
    """An NVRTC that is done at once."""

    version: tuple[int, int] = (13, 0)
    compiled: list[str] = field(default_factory=list)

    def compile(self, text: bytes, arch: str) -> Cubin:
        self.compiled.append(arch)
        return Cubin(b"\x7fELF" + arch.encode() + text[:100], "")


def nvrtc_way(folder: Path, compiler: Compiler, driver: Driver) -> NvrtcWay:
    return NvrtcWay(folder=str(folder), compiler=lambda: compiler, driver=lambda: driver)  # type: ignore[arg-type,return-value]


def raising(error: Exception) -> Callable[..., Callable[..., object]]:
    def compiler(*_: object, **__: object) -> Callable[..., object]:
        raise error

    return compiler


def test_the_source_names_every_kernel_and_is_plain() -> None:
    text = source()
    assert text.count('extern "C" __global__') == len(KERNELS)
    assert all(f"\n{name}(" in text for name in KERNELS)
    assert "#include" not in text


def test_torch_compiles_every_kernel_for_the_device(kernels: Kernels) -> None:
    compiler = TorchCompiler(kernels.functions)
    made = compile_kernels("sm_90", [TorchWay(compiler)])
    assert (made.name, made.arch, made.notes) == ("cuda-torch", "sm_90", ())
    assert compiler.asked == [(name, "90") for name in KERNELS]
    tried_out(GpuVerifier(torch.device("cpu"), made))


def test_the_second_way_is_taken_with_the_reason_of_the_first(kernels: Kernels, tmp_path: Path) -> None:
    reasons: dict[Exception | None, str] = {
        None: "has no torch.cuda._compile_kernel",
        RuntimeError("Kernel compilation failed:\nno such\tthing"): "RuntimeError: Kernel compilation failed: no such thing",
        TypeError("unexpected keyword"): "TypeError: unexpected keyword",
        OSError("CUDA_HOME environment variable is not set"): "OSError: CUDA_HOME",
    }
    for number, (error, reason) in enumerate(reasons.items()):
        second = nvrtc_way(tmp_path / str(number), Compiler(), HostDriver(kernels.functions))
        made = compile_kernels("sm_90", [TorchWay(raising(error) if error else None), second])
        assert made.name == "cuda-nvrtc"
        (note,) = made.notes
        assert note.startswith("cuda-torch: ")
        assert reason in note
        tried_out(GpuVerifier(torch.device("cpu"), made))


def test_a_way_that_computes_wrong_is_passed_over(kernels: Kernels, tmp_path: Path) -> None:
    lazy: dict[str, Kernel] = {name: lambda grid, block, args: None for name in KERNELS}
    first, second = TorchWay(TorchCompiler(lazy)), nvrtc_way(tmp_path, Compiler(), HostDriver(kernels.functions))

    def accept(made: Kernels) -> None:
        tried_out(GpuVerifier(torch.device("cpu"), made))

    made = compile_kernels("sm_90", [first, second], accept)
    assert made.name == "cuda-nvrtc"
    assert "a trial with one bad piece of three gave" in made.notes[0]


def test_no_way_at_all_says_why_for_each(tmp_path: Path) -> None:
    class NoDriver:
        def load(self, image: bytes, names: Sequence[str]) -> Mapping[str, Kernel]:
            raise WayError("the driver refuses the kernels: 209 no kernel image", way="cuda-nvrtc", stage="load")

    with pytest.raises(UsageError, match=r"cuda-torch: .*; cuda-nvrtc: ") as caught:
        compile_kernels("sm_90", [TorchWay(None), nvrtc_way(tmp_path, Compiler(), NoDriver())])
    assert "sm_90" in caught.value.message
    assert "209 no kernel image" in caught.value.message
    assert set(caught.value.facts) == {"cuda-torch", "cuda-nvrtc"}
    assert "verify='cpu'" in caught.value.hint


def test_reasons_are_typed() -> None:
    for compiler, stage in ((None, "absent"), (raising(RuntimeError("x")), "compile")):
        with pytest.raises(WayError) as caught:
            TorchWay(compiler).build(source(), "sm_90")
        assert caught.value.facts == {"way": "cuda-torch", "stage": stage}


def test_this_machine_has_both_ways_in_order() -> None:
    assert [way.name for way in ways()] == ["cuda-nvrtc", "cuda-torch"]


def test_the_second_process_does_not_compile(kernels: Kernels, tmp_path: Path) -> None:
    compiler, driver = Compiler(), HostDriver(kernels.functions)
    for _ in range(2):
        assert compile_kernels("sm_90", [nvrtc_way(tmp_path / "new" / "folder", compiler, driver)]).notes == ()
    assert compiler.compiled == ["sm_90"]
    assert driver.images[0] == driver.images[1]
    compile_kernels("sm_80", [nvrtc_way(tmp_path / "new" / "folder", compiler, driver)])
    compile_kernels("sm_90", [nvrtc_way(tmp_path / "new" / "folder", Compiler((13, 1), compiler.compiled), driver)])
    assert compiler.compiled == ["sm_90", "sm_80", "sm_90"]


def test_a_damaged_cache_is_compiled_anew_and_mended(kernels: Kernels, tmp_path: Path) -> None:
    compiler, driver = Compiler(), HostDriver(kernels.functions)
    way = nvrtc_way(tmp_path, compiler, driver)
    compile_kernels("sm_90", [way])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damaged = {"empty": b"", "half": whole[:50], "digest only": whole[:32], "flipped": whole[:-1] + bytes([whole[-1] ^ 1])}
    for number, data in enumerate(damaged.values(), 2):
        file.write_bytes(data)
        compile_kernels("sm_90", [way])
        assert len(compiler.compiled) == number
        assert file.read_bytes() == whole
    assert len(set(driver.images)) == 1


def test_a_cache_that_can_not_be_written_is_told_and_not_needed(kernels: Kernels, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    driver = HostDriver(kernels.functions)
    made = compile_kernels("sm_90", [nvrtc_way(tmp_path / "file" / "kernels", Compiler(), driver)])
    (note,) = made.notes
    assert note.startswith("compiled kernels were not kept: ")
    assert len(driver.images) == 1


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cubins.default_folder() == str(tmp_path / "modelp2p" / "kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cubins.default_folder() == str(tmp_path / ".cache" / "modelp2p" / "kernels")


def test_a_machine_without_libraries_says_so(tmp_path: Path) -> None:
    with pytest.raises(WayError, match="no libnvrtc: no file") as caught:
        Nvrtc.find([tmp_path])
    assert caught.value.facts == {"way": "cuda-nvrtc", "stage": "library"}
    (tmp_path / "libnvrtc.so.13").write_bytes(b"no library")
    with pytest.raises(WayError, match=r"libnvrtc\.so\.13"):
        Nvrtc.find([tmp_path])
    if not torch.cuda.is_available():
        with pytest.raises(WayError, match="no CUDA driver"):
            CudaDriver()


def test_the_major_of_torch_is_looked_for_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for part in ("cu13/lib/libnvrtc.so.13", "cu13/lib/libnvrtc-builtins.so.13.0", "cuda_nvrtc/lib/libnvrtc.so.12"):
        (tmp_path / "nvidia" / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / part).touch()
    monkeypatch.syspath_prepend(tmp_path)
    for major, order in ((13, [13, 13, 12, 12]), (12, [12, 12, 13, 13]), (None, [13, 13, 12, 12]), (11, [13, 13, 12, 12])):
        ours = [place for place in places(major) if "/" not in place or place.startswith(str(tmp_path))]
        assert [place.rpartition("/")[2] for place in ours] == [f"libnvrtc.so.{number}" for number in order]
        assert ["/" in place for place in ours] == [True, False] * 2


def test_arguments_that_would_be_cut_off_are_refused() -> None:
    memory = row(b"x" * 16)
    assert Params((memory, (1 << 31) - 1)).array[0]
    for number in (-1, 1 << 31):
        with pytest.raises(ValueError, match="31 bits"):
            Params((memory, number))
