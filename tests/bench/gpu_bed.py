"""What the GPU benchmark runs on: one CUDA device, or the tests' fake of one, on which all runs and nothing is measured."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelp2p.loader.cudart import READ_ONLY, HostRegistrar
from modelp2p.loader.device import device_for
from modelp2p.loader.gpu import HostVerifier
from modelp2p.loader.gpu.build import NvrtcWay, ways
from modelp2p.loader.gpu.verifier import verifier_for
from modelp2p.loader.readers import available_bytes, file_system_of
from tests.loader.fake_cuda import FakeCuda

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from modelp2p.loader.device import Device
    from modelp2p.loader.gpu import Verifier

MIB = 1 << 20
VERSIONS = (
    "torch",
    "triton",
    "safetensors",
    "instanttensor",
    "fastsafetensors",
    "runai-model-streamer",
    "flashpack",
    "tensorizer",
)
HOST_REGISTER_READ_ONLY_SUPPORTED = 113
"""cudaDevAttrHostRegisterReadOnlySupported, which has the same number in the driver's interface."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. All sizes in bytes; `runs` are timed, after one that is not."""

    data: int
    shards: int
    tensor: int
    copies: tuple[int, ...]
    kernels: tuple[int, ...]
    slots: tuple[int, ...]
    windows: tuple[int, ...]
    threads: tuple[int, ...]
    runs: int


REAL = Scale(
    data=16 << 30,
    shards=8,
    tensor=128 * MIB,
    copies=(32 * MIB, 64 * MIB, 256 * MIB),
    kernels=(16 * MIB, 64 * MIB, 256 * MIB, 512 * MIB, 1 << 30, 4 << 30),
    slots=(4 * MIB, 16 * MIB, 32 * MIB, 64 * MIB),
    windows=(64 * MIB, 128 * MIB, 256 * MIB),
    threads=(1, 2, 4, 8, 12, 16),
    runs=5,
)
FAKE = Scale(
    data=4 * MIB,
    shards=2,
    tensor=256 << 10,
    copies=(64 << 10, 128 << 10),
    kernels=(MIB, 2 * MIB),
    slots=(MIB,),
    windows=(MIB,),
    threads=(1, 2),
    runs=1,
)


class FakeRuntime:
    """cudaHostRegister that agrees to everything."""

    def cudaHostRegister(self, ptr: int, size: int, flags: int, /) -> int:
        return 0

    def cudaHostUnregister(self, ptr: int, /) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Bed:
    """The device of a run: `cuda:N`, or the fake."""

    name: str
    is_fake: bool

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu" if self.is_fake else self.name)

    def device(self, slot_bytes: int | None = None) -> Device:
        """A device of the loader, with slots of another length where asked."""
        device: Device = FakeCuda(slot_bytes=MIB) if self.is_fake else device_for(self.name)
        if slot_bytes is not None:
            device.slot_bytes = slot_bytes  # type: ignore[misc]  # a benchmark's right: both classes let it be set
        return device

    def registrar(self, flags: int = READ_ONLY) -> HostRegistrar:
        if self.is_fake:
            return HostRegistrar(FakeRuntime(), flags=flags)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch gives it no types
        return HostRegistrar(runtime, lambda: torch.cuda.device(self.torch_device), flags)

    def verifiers(self, folder: Path) -> dict[str, Callable[[], Verifier]]:
        """Every way to a verifier, by name; NVRTC once without its cache, which `folder` is, and once with."""
        if self.is_fake:
            return {"cpu": HostVerifier}
        nvrtc, by_torch = NvrtcWay(folder=str(folder)), ways()[1]
        return {
            "cuda-nvrtc, compiled": lambda: verifier_for(self.torch_device, [nvrtc]),
            "cuda-nvrtc, cached": lambda: verifier_for(self.torch_device, [nvrtc]),
            "cuda-torch": lambda: verifier_for(self.torch_device, [by_torch]),
        }

    def streams(self, count: int) -> list[AbstractContextManager[object]]:
        """Contexts in which work goes to streams of its own."""
        if self.is_fake:
            return [nullcontext() for _ in range(count)]
        return [torch.cuda.stream(torch.cuda.Stream(self.torch_device)) for _ in range(count)]  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        if not self.is_fake:
            torch.cuda.synchronize(self.torch_device)

    def memory(self) -> dict[str, int | None]:
        """Peaks of this process in bytes; None where nobody counts. `device_used`: of the whole device, now."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        # Not ru_maxrss, which a child inherits from the process it was forked from.
        peak_rss = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        if self.is_fake:
            return {"peak_rss": peak_rss, "peak_device": None, "device_used": None, "peak_pinned": None}
        free, total = torch.cuda.mem_get_info(self.torch_device)
        pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak") if hasattr(torch.cuda, "host_memory_stats") else None
        peak = torch.cuda.max_memory_reserved(self.torch_device)
        return {"peak_rss": peak_rss, "peak_device": peak, "device_used": total - free, "peak_pinned": pinned}

    def facts(self, places: dict[str, str]) -> dict[str, object]:
        """Where this ran, and with what."""
        facts: dict[str, object] = {
            "cpu": next(
                (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
                platform.machine(),
            ),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "available_bytes": available_bytes(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in VERSIONS},
            "file_systems": {place: file_system_of(os.stat(path).st_dev) for place, path in places.items()},
            "has_compile_kernel": hasattr(torch.cuda, "_compile_kernel"),
            "has_nvidia_fs": any(Path("/dev").glob("nvidia-fs*")),
            "device": "FAKE: the tests' device, on this machine's CPU",
        }
        if not self.is_fake:
            facts |= {
                "device": torch.cuda.get_device_name(self.torch_device),
                "cuda": torch.version.cuda,
                "driver": next(iter(_lines("/proc/driver/nvidia/version")), ""),
                "registers_read_only": _attribute(HOST_REGISTER_READ_ONLY_SUPPORTED, self.torch_device.index or 0),
            }
        return facts


@dataclass(slots=True)
class Clock:
    """Seconds and CPU seconds since it was made; children that have ended count."""

    started: float = 0.0
    cpu: float = 0.0

    def __post_init__(self) -> None:
        self.started, self.cpu = time.perf_counter(), _cpu_seconds()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def cpu_seconds(self) -> float:
        return _cpu_seconds() - self.cpu


def best_of(runs: int, work: Callable[[], object]) -> list[float]:
    """Seconds of each run, after one that does not count."""
    work()
    seconds = []
    for _ in range(runs):
        clock = Clock()
        work()
        seconds.append(clock.seconds)
    return seconds


def _cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _attribute(number: int, device: int) -> int | None:
    answer = ctypes.c_int()
    with suppress(OSError):
        if not ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(answer), number, device):
            return answer.value
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
