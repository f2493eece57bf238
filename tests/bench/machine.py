"""What a benchmark records beside its figures, and the synthetic data it works on."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

VERSIONS = ("modelp2p", "libtorrent", "trio", "cryptography", "msgpack")


def describe() -> dict[str, object]:
    """Machine and versions."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
    }


def report(name: str, figures: dict[str, object]) -> None:
    """Print one benchmark's result as a line of JSON, machine included."""
    print(json.dumps({"benchmark": name, **figures, "machine": describe()}))


def parse_size(text: str) -> int:
    """`512M`, `4G` (binary units: these are sizes on disk)."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1].upper()] if text[-1].upper() in units else int(text)


def resident_bytes(pid: int) -> int:
    """Resident memory of one process (VmRSS), 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0
