"""Resident memory of daemon, engine and hash workers: while fetching, and while seeding many large releases.

    python -m tests.bench.bench_memory --size 4G --releases 100

The many releases are 10 GiB each and sparse: their statements, layers and journals are real, their files hold one random
block and otherwise holes, so they are served by metadata only. Nothing is hashed: the store is written as a finished one.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

from tests.bench.bench_fetch import make_model
from tests.bench.bench_publish import family
from tests.bench.machine import parse_size, report, resident_bytes
from tests.bench.sparse import hold_sparse
from tests.nodes import Node

SPARSE_BYTES = 10 << 30


def fetch_peak(work: Path, size: int) -> dict[str, int]:
    """Peak resident bytes of the fetching node, by process kind."""
    make_model(work / "model", size)
    with Node(work / "a") as seed, Node(work / "b") as node:
        seed.start()
        published = seed.publish(work / "model", "lab/bench", "--json")
        node.start()
        peaks: dict[str, int] = {"daemon": 0, "engine": 0, "hash_workers": 0, "daemon_and_engine": 0}
        running = True

        def watch() -> None:
            while running:
                sample(node, peaks)
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        node.ok("fetch", published["link"], "--peer", seed.address, timeout_s=900)
        running = False
        watcher.join()
    return peaks


def sample(node: Node, peaks: dict[str, int]) -> None:
    """Raise each peak to what is resident now."""
    assert node.process is not None
    now = {"daemon": 0, "engine": 0, "hash_workers": 0}
    for pid in family(node.process.pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        kind = "engine" if b"daemon.engine" in command else "hash_workers" if b"hasher" in command else "daemon"
        now[kind] += resident_bytes(pid)
    for kind, size in now.items():
        peaks[kind] = max(peaks[kind], size)
    peaks["daemon_and_engine"] = max(peaks["daemon_and_engine"], now["daemon"] + now["engine"])


def seeding(work: Path, releases: int) -> dict[str, int]:
    """Resident bytes of a node that serves many sparse releases."""
    with Node(work / "many") as node:
        for number in range(releases):
            hold_sparse(node.home, number, SPARSE_BYTES)
        node.start()
        time.sleep(5)
        peaks = {"daemon": 0, "engine": 0, "hash_workers": 0, "daemon_and_engine": 0}
        sample(node, peaks)
        states = [row["state"] for row in node.ok("status")["releases"]]
        assert states == ["seeding"] * releases, states
    return peaks


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default=4 << 30)
    parser.add_argument("--releases", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        many = seeding(Path(name), given.releases)
    with tempfile.TemporaryDirectory() as name:
        fetching = fetch_peak(Path(name), given.size)
    figures: dict[str, object] = {
        "fetch_size_bytes": given.size,
        "fetch_peak_bytes": fetching,
        "releases": given.releases,
        "release_size_bytes": SPARSE_BYTES,
        "seeding_bytes": many,
    }
    report("memory", figures)


if __name__ == "__main__":
    main()
