"""The CUDA driver by ctypes: a cubin becomes kernels that run on torch's current stream.

Everything happens in torch's own context of the current device (the primary one); nothing here makes or changes contexts.

Spec: https://docs.nvidia.com/cuda/cuda-driver-api/
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from modelp2p.loader.gpu.way import Kernel, WayError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Driver(Protocol):
    """Who turns machine code into kernels."""

    def load(self, image: bytes, names: Sequence[str]) -> Mapping[str, Kernel]:
        """The named kernels of a cubin, on the current device; they stay loaded as long as the process.

        Raises:
            WayError: the driver refuses it: another architecture, or a newer major version than its own.
        """


class CudaDriver:
    """The driver of this machine.

    Raises:
        WayError: there is none.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as exc:
            raise WayError(f"no CUDA driver: {exc}", way="cuda-nvrtc", stage="library") from exc
        _declare(self._library)

    def load(self, image: bytes, names: Sequence[str]) -> Mapping[str, Kernel]:
        module = ctypes.c_void_p()
        self._check(self._library.cuModuleLoadData(ctypes.byref(module), image))
        return {name: self._kernel(module, name) for name in names}

    def _kernel(self, module: ctypes.c_void_p, name: str) -> Kernel:
        function = ctypes.c_void_p()
        self._check(self._library.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))

        def launch(grid: int, block: int, args: Sequence[torch.Tensor | int]) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            params = Params(args)
            result = self._library.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, stream, params.array, None)
            if result:
                raise RuntimeError(f"CUDA error while starting {name}: {self._text(result)}")

        return launch

    def _check(self, result: int) -> None:
        if result:
            raise WayError(f"the driver refuses the kernels: {self._text(result)}", way="cuda-nvrtc", stage="load")

    def _text(self, result: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(result, ctypes.byref(text))
        return f"{result} {(text.value or b'unknown').decode(errors='replace')}"


class Params:
    """Arguments as the driver takes them: pointers to the values, which live as long as this does."""

    def __init__(self, args: Sequence[torch.Tensor | int]) -> None:
        self._values = [
            ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, torch.Tensor) else ctypes.c_uint32(_fitting(arg)) for arg in args
        ]
        self.array = (ctypes.c_void_p * len(args))(*(ctypes.addressof(value) for value in self._values))


def _fitting(number: int) -> int:
    # ctypes would cut it off in silence. Torch's launcher passes signed integers, so that both ways have the smaller limit.
    if not 0 <= number < 1 << 31:
        raise ValueError(f"{number} is no kernel argument of 31 bits")
    return number


def _declare(library: ctypes.CDLL) -> None:
    handle, number, unsigned = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
    handles = ctypes.POINTER(handle)
    signatures = {
        # The image is binary: c_char_p passes a pointer to all of it, zero bytes included.
        "cuModuleLoadData": [handles, ctypes.c_char_p],
        "cuModuleGetFunction": [handles, handle, ctypes.c_char_p],
        "cuLaunchKernel": [handle, *[unsigned] * 7, handle, handles, handles],
        "cuGetErrorString": [number, ctypes.POINTER(ctypes.c_char_p)],
    }
    for name, types in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, number
