"""Three times kill -9 in one fetch: what the seed had to upload in all, against the size.

python -m tests.bench.bench_resume --size 1G
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

from modelp2p.protocol.fetching import WINDOW_BYTES
from tests.bench.bench_fetch import make_model
from tests.bench.machine import parse_size, report
from tests.nodes import Node, wait_until

KILLS_AT = (0.2, 0.45, 0.7)
"""Shares of the size proven when the daemon is killed."""


def main() -> None:
    """Run it once; the figure counts bytes, not seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default=1 << 30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_model(work / "model", given.size)
        with Node(work / "a") as seed, Node(work / "b") as node:
            seed.start()
            published = seed.publish(work / "model", "lab/bench")
            address, proven = seed.address, []
            for share in KILLS_AT:
                node.start()
                client = node.spawn("fetch", published["link"], "--peer", address)
                wait_until(partial(has_proven, node, int(share * given.size)), 120, "proven bytes")
                proven.append(progress(node))
                node.kill()
                client.wait(30)
            node.start()
            result = node.ok("fetch", published["link"], "--peer", address, timeout_s=600)
            time.sleep(2)
            uploaded = seed.release("lab/bench")["uploaded"]
    over = uploaded - published["bytes"]
    figures: dict[str, object] = {
        "size_bytes": published["bytes"],
        "proven_at_kill": proven,
        "last_run_from_peers": result["from_peers"],
        "seed_uploaded": uploaded,
        "uploaded_over_size": round(uploaded / published["bytes"], 4),
        "extra_bytes_per_kill": over // len(KILLS_AT),
        "window_bytes": WINDOW_BYTES,
    }
    report("resume", figures)


def has_proven(node: Node, size: int) -> bool:
    """Whether the only release has this many bytes proven."""
    return progress(node) >= size


def progress(node: Node) -> int:
    """Proven bytes of the only release, 0 before it is known."""
    releases = node.ok("status")["releases"]
    return int(releases[0]["proven"]) if releases else 0


if __name__ == "__main__":
    main()
