"""From sha256.cu to kernels that run: the ways, in order, and why each that was not taken was not.

1. `cuda-nvrtc`: NVRTC and the driver by ctypes, with the machine code kept on the disk. Needs nothing of torch but its stream.
2. `cuda-torch`: `torch.cuda._compile_kernel`. Private and changing, so absent, raising and present are all ordinary here.

Order and price: the first way compiles once for a user and architecture, 2 to 5 s; the second in every process, all of the source
for each of the four kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import torch

from modelp2p.loader.gpu import cubins
from modelp2p.loader.gpu.driver import CudaDriver, Driver
from modelp2p.loader.gpu.nvrtc import Nvrtc
from modelp2p.loader.gpu.way import Kernel, Kernels, Way, WayError
from modelp2p.protocol.errors import UsageError

KERNELS = ("sha256_leaves", "sha256_tail", "fold", "compare")
"""Every kernel of sha256.cu."""


def source() -> str:
    """The text of sha256.cu."""
    return files("modelp2p.loader.gpu").joinpath("sha256.cu").read_text(encoding="ascii")


class TorchWay:
    """By torch's own compiler call.

    Args:
        compiler: `torch.cuda._compile_kernel`, or a stand-in; None where this torch has none.
    """

    name = "cuda-torch"

    def __init__(self, compiler: Callable[..., Callable[..., object]] | None) -> None:
        self._compiler = compiler

    def build(self, text: str, arch: str) -> tuple[Mapping[str, Kernel], Sequence[str]]:
        if self._compiler is None:
            raise self._closed("absent", f"torch {torch.__version__} has no torch.cuda._compile_kernel")
        try:
            capability = arch.removeprefix("sm_")
            return {name: _adapted(self._compiler(text, name, compute_capability=capability)) for name in KERNELS}, ()
        except Exception as exc:  # not ours, and private: a changed signature is a TypeError, a missing toolkit an OSError
            raise self._closed("compile", f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}") from exc

    def _closed(self, stage: str, why: str) -> WayError:
        return WayError(why, way=self.name, stage=stage)


def _adapted(compiled: Callable[..., object]) -> Kernel:
    def launch(grid: int, block: int, args: Sequence[torch.Tensor | int]) -> None:
        compiled(grid=(grid, 1, 1), block=(block, 1, 1), args=list(args))  # on the current stream

    return launch


@dataclass(frozen=True, slots=True)
class NvrtcWay:
    """By NVIDIA's compiler and driver, with machine code from the cache where it has it."""

    name: str = "cuda-nvrtc"
    folder: str = field(default_factory=cubins.default_folder)
    """The cache."""
    compiler: Callable[[], Nvrtc] = field(default=lambda: Nvrtc.find(major=_cuda_major()))
    driver: Callable[[], Driver] = CudaDriver

    def build(self, text: str, arch: str) -> tuple[Mapping[str, Kernel], Sequence[str]]:
        driver, compiler, data = self.driver(), self.compiler(), text.encode("ascii")
        name = cubins.name_of(data, arch, compiler.version)
        notes: list[str] = []
        image = cubins.read(self.folder, name)
        if isinstance(image, str):
            image = compiler.compile(data, arch).image
            if trouble := cubins.write(self.folder, name, image):
                notes.append(f"compiled kernels were not kept: {trouble}")
        return driver.load(image, KERNELS), notes


def _cuda_major() -> int | None:
    """Of the CUDA that torch was built for; None on a torch without."""
    version = torch.version.cuda
    return int(version.partition(".")[0]) if version else None


def ways() -> tuple[Way, ...]:
    """The ways of this machine, best first."""
    return NvrtcWay(), TorchWay(getattr(torch.cuda, "_compile_kernel", None))


def compile_kernels(
    arch: str, tried: Sequence[Way] | None = None, accept: Callable[[Kernels], None] = lambda kernels: None
) -> Kernels:
    """The kernels for the current device by the first way that is open.

    Cost: 2 to 20 s where they are compiled, milliseconds from the cache.

    Args:
        arch: of the current device, as `shape.arch_of` names it.
        tried: the ways, best first; those of this machine by default.
        accept: raises WayError for kernels that are no good; the next way is taken then.

    Raises:
        UsageError: none is open; the message gives the reason of each, the facts name way and reason.
    """
    closed: dict[str, str] = {}
    for way in ways() if tried is None else tried:
        try:
            functions, notes = way.build(source(), arch)
            kernels = Kernels(way.name, arch, functions, (*(f"{name}: {why}" for name, why in closed.items()), *notes))
            accept(kernels)
        except WayError as exc:
            closed[way.name] = exc.message
        else:
            return kernels
    reasons = "; ".join(f"{name}: {why}" for name, why in closed.items())
    hint = "Load with verify='cpu', or install nvidia-cuda-nvrtc of the CUDA version that nvidia-smi shows."
    raise UsageError(f"no way to the GPU kernels on {arch}: {reasons}", hint=hint, **closed)
