"""Loading while fetching against fetching and loading alone: what the overlap saves, and what memory a load takes.

    python -m tests.bench.bench_overlap --size 1G --runs 3 [--max-down 100M]

Interleaved. *Fetch* is the whole command, proof and sync included. *Load* is `stream` of the complete release, hashed and
copied as a stream from a fetch is, every byte read. *Overlapped* runs from the start of a detached fetch to the last byte of the
last tensor. The goal is overlapped <= 1.15 x the slower of the two alone. Seed, node and loader share this machine's cores; with
`--max-down` the network is the limit, as it is for most who fetch.

Memory is what the loading process holds beside the page cache (anonymous and shared memory), at its peak, tensors dropped as
they are read. Everything is imported before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.bench.bench_fetch import make_model
from tests.bench.machine import parse_size, report
from tests.nodes import Node

TENSOR_BYTES = 16 << 20


def own_memory_bytes() -> int:
    """Anonymous and shared memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def child(ref: str, home: str) -> None:
    """Import, say so, wait for a line, stream and read everything; prints a JSON line."""
    import torch

    from modelp2p.loader import stream

    base = peak = own_memory_bytes()
    running = True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, own_memory_bytes())
            time.sleep(0.02)

    print("ready", flush=True)
    sys.stdin.readline()
    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    size = total = 0
    first = 0.0
    for _, tensor in stream(ref, home=home, verify="cpu", mapping="pread"):
        first = first or time.perf_counter() - started
        total += int(tensor.view(torch.int64).sum())
        size += tensor.nbytes
    seconds = time.perf_counter() - started
    running = False
    watcher.join()
    print(json.dumps({"seconds": seconds, "first_s": first, "bytes": size, "sum": total % 2**64, "memory_bytes": peak - base}))


class Loading:
    """A child that is ready to load."""

    def __init__(self, ref: str, home: Path) -> None:
        command = [sys.executable, "-m", "tests.bench.bench_overlap", "--child", ref, str(home)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self) -> dict[str, float]:
        """Load; what the child says."""
        out, _ = self._process.communicate("go\n", timeout=900)
        assert self._process.returncode == 0
        found: dict[str, float] = json.loads(out)
        return found


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=1 << 30)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-down", help="limit of the fetch, bytes a second, as 'modelp2p fetch --max-down' takes it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    limit = ("--max-down", given.max_down) if given.max_down else ()
    fetched, loaded, both, first = [], [], [], []
    memory = 0
    sums = set()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_model(work / "model", given.size, tensors=max(1, given.size // 4 // TENSOR_BYTES))
        with Node(work / "a") as seed:
            seed.start()
            link = seed.publish(work / "model", "lab/bench")["link"]
            for run in range(given.runs):
                with Node(work / "b") as node:
                    node.start()
                    fetched.append(node.ok("fetch", link, "--peer", seed.address, "--no-seed", *limit, timeout_s=900)["seconds"])
                    alone = Loading(link, node.home).run()
                    loaded.append(alone["seconds"])
                shutil.rmtree(work / "b")
                with Node(work / "b") as node:
                    node.start()
                    loading = Loading(link, node.home)
                    started = time.perf_counter()
                    node.ok("fetch", link, "--peer", seed.address, "--no-seed", "--detach", *limit)
                    queued = time.perf_counter() - started
                    together = loading.run()
                    both.append(queued + together["seconds"])
                    first.append(queued + together["first_s"])
                shutil.rmtree(work / "b")
                sums |= {alone["sum"], together["sum"]}
                memory = max(memory, int(alone["memory_bytes"]), int(together["memory_bytes"]))
                line = f"run {run}: fetch {fetched[-1]:.2f} s, load {loaded[-1]:.2f} s, overlapped {both[-1]:.2f} s"
                print(f"{line}, first tensor after {first[-1]:.2f} s", file=sys.stderr, flush=True)
    if len(sums) != 1:
        sys.exit("the loads read different bytes")
    slower = max(statistics.median(fetched), statistics.median(loaded))
    figures: dict[str, object] = {
        "size_bytes": given.size,
        "max_down": given.max_down,
        "fetch_s": fetched,
        "load_s": loaded,
        "overlapped_s": both,
        "first_tensor_s": first,
        "ratio_to_slower": round(statistics.median(both) / slower, 3),
        "loader_memory_bytes": memory,
    }
    report("overlap", figures)


if __name__ == "__main__":
    main()
