"""Publish against the rate at which all cores can compute the two hashes it needs, in one run; and its memory by size.

    python -m tests.bench.bench_publish --size 4G --runs 3

The ceiling is what one process per core reaches on 16 KiB leaves and on flat SHA-256 of data in memory: no reading, no tree.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.bench.bench_fetch import make_model
from tests.bench.machine import parse_size, report, resident_bytes
from tests.nodes import Node

CEILING_S = 2.0
LEAF = 16 << 10


def hash_for(seconds: float, _: int) -> int:
    """Bytes that one core takes through both hashes in that time."""
    data = memoryview(random.Random(0).randbytes(8 << 20))
    done = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for at in range(0, len(data), LEAF):
            hashlib.sha256(data[at : at + LEAF]).digest()
        hashlib.sha256(data).digest()
        done += len(data)
    return done


def ceiling_bytes_per_s() -> float:
    """What all cores reach together."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.starmap(hash_for, [(0.1, core) for core in range(cores)])
        return sum(pool.starmap(hash_for, [(CEILING_S, core) for core in range(cores)])) / CEILING_S


def publish_once(work: Path, source: Path) -> tuple[float, int]:
    """Seconds of one publish, and the peak resident memory of the daemon with its hash workers."""
    with Node(work) as node:
        node.start()
        assert node.process is not None
        peak = 0
        running = True

        def watch() -> None:
            nonlocal peak
            while running:
                assert node.process is not None
                peak = max(peak, sum(map(resident_bytes, family(node.process.pid))))
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        node.run("keys", "init", "lab", "--no-passphrase")
        result = node.ok("publish", str(source), "--as", "lab/bench", "--no-seed", timeout_s=600)
        running = False
        watcher.join()
    shutil.rmtree(work)
    return result["seconds"], peak


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += family(int(child))
    return found


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default=4 << 30)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    rates, ceilings, peaks = [], [], {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for size in (given.size // 4, given.size):
            make_model(work / f"model-{size}", size)
        # What is published has usually been on the disk for a while; waiting for that is not publishing.
        os.sync()
        for run in range(given.runs):
            ceilings.append(ceiling_bytes_per_s())
            seconds, peaks[given.size] = publish_once(work / "node", work / f"model-{given.size}")
            rates.append(given.size / seconds)
            print(f"run {run}: {rates[-1] / 1e6:.0f} MB/s of {ceilings[-1] / 1e6:.0f} MB/s", file=sys.stderr, flush=True)
        _, peaks[given.size // 4] = publish_once(work / "node", work / f"model-{given.size // 4}")
    figures: dict[str, object] = {
        "size_bytes": given.size,
        "bytes_per_s": [int(rate) for rate in rates],
        "ceiling_bytes_per_s": [int(rate) for rate in ceilings],
        "ratio_to_ceiling": round(statistics.median(r / c for r, c in zip(rates, ceilings, strict=True)), 3),
        "peak_resident_bytes": peaks,
    }
    report("publish", figures)


if __name__ == "__main__":
    main()
