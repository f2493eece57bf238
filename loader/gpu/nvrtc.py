"""NVIDIA's runtime compiler by ctypes: the kernels as a cubin for one architecture, without a GPU.

A cubin and not PTX: the driver need not compile it again, and within one major version a compiler newer than the driver will do.

Spec: https://docs.nvidia.com/cuda/nvrtc/
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from modelp2p.loader.gpu.way import WayError

WHEEL_FOLDERS = {13: "cu13", 12: "cuda_nvrtc"}
"""Majors in which everything used here is the same, and where their wheels lie below the namespace package `nvidia`."""

SYSTEM_FOLDERS = ("/usr/local/cuda/lib64",)
"""Where NVIDIA's installer puts the toolkit, which often is not on the linker's path."""

_LIBRARY = re.compile(r"libnvrtc\.so(\.\d+)*")


def options_for(arch: str) -> tuple[str, ...]:
    """What the compiler is told. `-v` puts registers and spills into the log."""
    return (f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v")


@dataclass(frozen=True, slots=True)
class Cubin:
    """Machine code for one architecture."""

    image: bytes
    log: str


class Nvrtc:
    """One loaded compiler library. Calls free the GIL and may come from any thread."""

    def __init__(self, library: ctypes.CDLL, place: str) -> None:
        self.place = place
        self._library = library
        _declare(library)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    @classmethod
    def find(cls, folders: Sequence[Path] | None = None, major: int | None = None) -> Nvrtc:
        """The first library that loads: of the wheels torch comes with, by the linker's path, of NVIDIA's installer.

        Args:
            folders: look only here.
            major: try this version of CUDA first; a driver refuses machine code of a newer major than its own.

        Raises:
            WayError: none does; says what was tried.
        """
        tried: list[str] = []
        for place in _files(folders) if folders is not None else places(major):
            try:
                return cls(_opened(place), place)
            except (OSError, AttributeError) as exc:  # not there or not loadable; not the library we know
                tried.append(str(exc))
        what = "; ".join(tried) or "no file libnvrtc.so.*"
        raise WayError(f"no libnvrtc: {what}", hint="Install nvidia-cuda-nvrtc.", way="cuda-nvrtc", stage="library")

    def compile(self, source: bytes, arch: str) -> Cubin:
        """The kernels of a source without includes. Takes 2 to 5 s for ours.

        Raises:
            WayError: it does not compile, or this compiler does not know the architecture.
        """
        library, program = self._library, ctypes.c_void_p()
        self._check(library.nvrtcCreateProgram(ctypes.byref(program), source, b"sha256.cu", 0, None, None))
        try:
            options = [option.encode() for option in options_for(arch)]
            result = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if result:
                raise self._error(result, log)
            return Cubin(self._read(program, "CUBIN"), log)
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, data))
        return data.raw

    def _check(self, result: int) -> None:
        if result:
            raise self._error(result, "")

    def _error(self, result: int, log: str) -> WayError:
        name = self._library.nvrtcGetErrorString(result).decode(errors="replace")
        # The first lines name the cause; a log can be pages.
        return WayError(f"{self.place}: {name} {' '.join(log.split())[:300]}".rstrip(), way="cuda-nvrtc", stage="compile")


def places(major: int | None) -> Iterator[str]:
    """Where a library may be, best first: paths, and bare names for the linker."""
    spec = find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations or [] if spec else [])]
    for version in sorted(WHEEL_FOLDERS, key=lambda known: (known != major, -known)):
        yield from _files([root / WHEEL_FOLDERS[version] / "lib" for root in roots])
        yield f"libnvrtc.so.{version}"
    yield from _files([Path(folder) for folder in SYSTEM_FOLDERS])


def _files(folders: Sequence[Path]) -> Iterator[str]:
    for folder in folders:
        if folder.is_dir():
            yield from sorted(str(path) for path in folder.iterdir() if _LIBRARY.fullmatch(path.name))


def _opened(place: str) -> ctypes.CDLL:
    # NVRTC opens its builtins by bare name when it compiles, and the folder of a wheel is on no search path. Loaded before, they
    # are found by that name. Without this, every process would need LD_LIBRARY_PATH from its start on.
    if "/" in place:
        for builtins in sorted(Path(place).parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))
    return ctypes.CDLL(place)


def _declare(library: ctypes.CDLL) -> None:
    """Without declared types ctypes would pass pointers as 32-bit integers."""
    handle, text, number, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_size_t)
    texts = ctypes.POINTER(text)
    signatures = {
        "nvrtcVersion": [ctypes.POINTER(number), ctypes.POINTER(number)],
        "nvrtcCreateProgram": [ctypes.POINTER(handle), text, text, number, texts, texts],
        "nvrtcCompileProgram": [handle, number, texts],
        "nvrtcGetProgramLogSize": [handle, size],
        "nvrtcGetProgramLog": [handle, text],
        "nvrtcGetCUBINSize": [handle, size],
        "nvrtcGetCUBIN": [handle, text],
        "nvrtcDestroyProgram": [ctypes.POINTER(handle)],
    }
    for name, types in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, number
    library.nvrtcGetErrorString.argtypes, library.nvrtcGetErrorString.restype = [number], text
