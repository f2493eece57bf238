"""Proof of pieces where they lie: SHA-256 and the Merkle tree of BEP 52 on the device, after the copy.

    verifier = verifier_for(torch.device("cuda:0"))
    verifier.submit(slot, Batch(size, piece_length, is_whole_file, expected), bad)   # bad[i] becomes 1 where piece i differs

Invariants:
- what is hashed is the copy in device memory, so a bad disk, page cache, cable or copy is found alike;
- a way to the kernels counts only after it told good pieces from bad ones on this device (`verifier.verifier_for`);
- why a faster way was not taken is kept and reported, never swallowed (`way.Kernels.notes`).

It deliberately does not copy, wait, retry or decide what a bad piece means: that is the pipeline's.

`sha256.cu` holds the kernels, `shape` what to launch, `way` and `build` the ways to compile them, `nvrtc` and `driver` the two
libraries behind the second way, `cubins` its cache.

The names are imported on first use, so that importing the room costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelp2p.loader.gpu.build import compile_kernels
    from modelp2p.loader.gpu.verifier import Batch, GpuVerifier, HostVerifier, Verifier, verifier_for
    from modelp2p.loader.gpu.way import Kernels

__all__ = ["Batch", "GpuVerifier", "HostVerifier", "Kernels", "Verifier", "compile_kernels", "verifier_for"]

_MODULES = {name: "verifier" for name in __all__} | {"Kernels": "way", "compile_kernels": "build"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
