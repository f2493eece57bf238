"""sha256.cu without a GPU: the same text, built by the host's C++ compiler over shim.h, as kernels for host tensors."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from modelp2p.loader.gpu.build import KERNELS, source
from modelp2p.loader.gpu.driver import Params
from modelp2p.loader.gpu.nvrtc import Nvrtc
from modelp2p.loader.gpu.way import Kernel, Kernels

SHIM = Path(__file__).with_name("shim.h")


def host_kernels(folder: Path, text: str | None = None) -> Kernels:
    """All kernels of sha256.cu (or of a changed text of it), built in `folder`."""
    compiler = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        pytest.fail("no C++ compiler (g++, c++, clang++): the kernels' arithmetic can not be tested without one")
    code, library = folder / "kernels.cpp", folder / "kernels.so"
    runners = "".join(f"RUNNER({name})\n" for name in KERNELS)
    code.write_text(f'#include "{SHIM}"\n{text or source()}\n{runners}', encoding="ascii")
    # -O1: a fifth of the build time of -O2, and the tests hash little.
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    done = subprocess.run([compiler, *flags, "-o", str(library), str(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    return Kernels("host", "host", {name: _kernel(loaded, name) for name in KERNELS})


def _kernel(library: ctypes.CDLL, name: str) -> Kernel:
    function = getattr(library, f"run_{name}")
    function.argtypes, function.restype = [ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)], None

    def launch(grid: int, block: int, args: Sequence[torch.Tensor | int]) -> None:
        params = Params(args)
        function(grid, block, params.array)

    return launch


class HostDriver:
    """A driver that takes any machine code for that of the host's kernels, and remembers what it was given."""

    def __init__(self, functions: Mapping[str, Kernel]) -> None:
        self.functions = functions
        self.images: list[bytes] = []

    def load(self, image: bytes, names: Sequence[str]) -> Mapping[str, Kernel]:
        self.images.append(image)
        return {name: self.functions[name] for name in names}


def wheel_nvrtc() -> Nvrtc:
    """The compiler of the wheel that the tests depend on."""
    spec = find_spec("nvidia")
    roots = [Path(place) / "cu13" / "lib" for place in (spec.submodule_search_locations or [] if spec else [])]
    if not any(root.is_dir() and list(root.glob("libnvrtc.so.*")) for root in roots):
        pytest.fail("nvidia-cuda-nvrtc is missing: pip install --constraint constraints.txt '.[test]'")
    return Nvrtc.find(roots)


def row(data: bytes) -> torch.Tensor:
    """Bytes as an aligned tensor of the host."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).clone() if data else torch.empty(0, dtype=torch.uint8)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor of any device."""
    return bytes(tensor.cpu().tolist()) if tensor.dtype is torch.uint8 else bytes_of(tensor.view(torch.uint8))
