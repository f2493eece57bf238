"""How long short commands take, start of the process included: medians over many runs.

python -m tests.bench.bench_latency --runs 11
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from tests.bench.bench_fetch import make_model
from tests.bench.machine import report
from tests.nodes import Node


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_model(work / "model", 64 << 20)
        with Node(work / "a") as seed, Node(work / "b") as node:
            seed.start()
            link = seed.publish(work / "model", "lab/bench")["link"]
            node.start()
            node.ok("fetch", link, "--peer", seed.address)
            figures: dict[str, object] = {
                "help_ms": median_ms(node, given.runs, "--help"),
                "status_ms": median_ms(node, given.runs, "status"),
                "repeated_fetch_ms": median_ms(node, given.runs, "fetch", link, "-q"),
            }
            node.stop()
            figures["repeated_fetch_without_daemon_ms"] = median_ms(node, given.runs, "fetch", link, "-q")
    report("latency", figures)


def median_ms(node: Node, runs: int, *arguments: str) -> int:
    """Median wall time of one command."""
    times = []
    for _ in range(runs):
        started = time.monotonic()
        done = node.run(*arguments)
        times.append(time.monotonic() - started)
        assert done.code == 0, done
    return round(statistics.median(times) * 1000)


if __name__ == "__main__":
    main()
