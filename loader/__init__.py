"""Verified tensors from a release: `from modelp2p.loader import load, stream, open_release`.

    tensors = load("org/model")                                  # zero-copy CPU tensors, every byte checked
    for name, tensor in stream("org/model@0123abc", "cuda:0"):   # each as soon as it is proven
        ...
    with open_release("./folder", publisher="mp1...") as release:
        rows = release.slice("model.embed_tokens.weight", 0, 1024)

What is promised: signature, root, piece layer and the bytes below every tensor have been checked in this process before the
tensor is handed out. No daemon is needed for a release that is here. The trust anchor is `publisher=`, a link, or the pins of
the home on disk. What a reference may be is told in `locate`, what keeps the bytes true after the check in `release`.

The names are imported on first use, so that `import modelp2p.loader` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelp2p.loader.api import load, open_release, stream
    from modelp2p.loader.release import OpenRelease
    from modelp2p.loader.stats import LoadStats

__all__ = ["LoadStats", "OpenRelease", "load", "open_release", "stream"]

_MODULES = {"load": "api", "open_release": "api", "stream": "api", "OpenRelease": "release", "LoadStats": "stats"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
