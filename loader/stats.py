"""What a load did, in numbers: which way the bytes took and what stands behind them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LoadStats:
    """Running totals of one open release; grows with every tensor that is handed out."""

    device: str = "cpu"
    verify: str = "auto"
    transfer: str = "mmap"
    """The way the bytes took: `mmap` (views of the files), `copy` (at least one file was copied) or `cuda`."""
    tensors: int = 0
    """Tensors and slices handed out."""
    bytes: int = 0
    """Their size as stored, before any cast."""
    verified_bytes: int = 0
    """File bytes hashed here and found equal to the signed roots: whole pieces, headers included."""
    recorded_bytes: int = 0
    """Handed out on the word of the daemon's record, without hashing."""
    unverified_bytes: int = 0
    """Handed out with `verify="off"`."""
    copied_bytes: int = 0
    """Handed out as copies in memory of this process or on the device."""
    seconds: float = 0.0
    """Time spent inside the loader; what the caller does between two tensors does not count."""
    refetches: int = 0
    """Pieces fetched again because they were bad."""
