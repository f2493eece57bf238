"""What was expected of one H200 on PCIe 5 before anything was run, so that a result cannot change what it is compared with.

From research before the first run: 55.6 GB/s host to device, a kernel of 1,418 instructions for 64 bytes, published loaders.
"""

from __future__ import annotations

from dataclasses import dataclass

MADE_ON = "2026-11-23"
"""Before the first run of this script on any GPU."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A figure by the name it has in the results, and where it should lie."""

    experiment: str
    figure: str
    what: str
    low: float
    high: float
    unit: str


PREDICTIONS = (
    Prediction("E0", "h2d_gb_s", "page-locked memory to the device, largest copy", 50, 56, "GB/s"),
    Prediction("E0", "d2d_gb_s", "device to device, bytes copied", 1500, 2300, "GB/s"),
    Prediction("E1", "largest_gb_s", "SHA-256 of leaves and trees, 512 MiB and more", 500, 830, "GB/s"),
    Prediction("E1", "floor_ms", "the same for 16 MiB: a floor for any small launch", 0.35, 0.5, "ms"),
    Prediction("E1", "slot_gb_s", "the same for 64 MiB, one slot", 120, 180, "GB/s"),
    Prediction("E2", "preadv_best_gb_s", "page cache to page-locked memory by preadv, best of threads and slots", 15, 30, "GB/s"),
    Prediction("E2", "mmap_best_gb_s", "the same by copies out of a mapping", 15, 30, "GB/s"),
    Prediction("E3", "overlapped_gb_s", "windows: page-lock, upload, let go, overlapped", 5, 40, "GB/s"),
    Prediction("E3", "register_over_ring", "verified load by windows over one by the ring, rate", 0.3, 1.6, "times"),
    Prediction("E4", "verified_over_unverified", "time of a verified load over an unverified one", 0.99, 1.03, "times"),
    Prediction("E4", "verified_gb_s", "verified load, warm page cache, steady", 15, 30, "GB/s"),
    Prediction("E4", "verified_of_ceiling", "the same over the measured host to device rate", 0.3, 0.6, "times"),
    Prediction("E5", "over_safetensors", "verified load over safetensors.load_file, rate", 3, 8, "times"),
    Prediction("E5", "over_fastest", "verified load over the fastest rival, which verifies nothing, rate", 0.4, 1.0, "times"),
    Prediction("E6", "direct_over_preadv", "cold: reads past the page cache over preadv, rate", 1.0, 3.0, "times"),
    Prediction("E7", "caught", "flipped bits that a verified load refused", 1, 1, "of 1"),
)
