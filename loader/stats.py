"""What a load did, in numbers: which way the bytes took and what stands behind them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class LoadStats:
    """Running totals of one open release; grows with every tensor that is handed out."""

    device: str = "cpu"
    verify: str = "auto"
    transfer: str = "mmap"
    """The way the bytes took: `mmap` (views of the files), `copy` (at least one file was copied in memory), `ring` (page-locked
    host slots, then a slot on the device), `register` (from the file's mapping to a slot on the device), or `register+ring`."""
    reader: str = ""
    """How copies were read: `preadv`, `mmap`, `direct`, several joined by `+`; empty while there are only views."""
    verifier: str = ""
    """Who hashes what is handed out: `cuda-torch` or `cuda-nvrtc` (the bytes in device memory), `cpu`, or empty: nobody."""
    fallbacks: list[str] = field(default_factory=list)
    """Why a better way was not taken, in words."""
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
    rereads: int = 0
    """Spans read again because they were bad."""
    refetches: int = 0
    """Pieces fetched again because they were bad."""

    @property
    def bytes_per_s(self) -> float:
        """How fast tensors were handed out; 0 before the first."""
        return self.bytes / self.seconds if self.seconds > 0 else 0.0
