"""What verification costs on the CPU: our loads beside safetensors and tensorizer, every byte consumed.

    python tests/bench/bench_load.py --size 512M [--shards 4] [--runs 9] [--folder DIR] [--json FILE]

Protocol: one seeded random checkpoint on disk and in the page cache; each run is a new process that imports first, then times
"load and read every byte" (an int64 sum of each tensor, equal for all or the run fails); the contestants take turns, each
round in the reverse order of the one before; medians and quartiles over all rounds, ratios of each round by itself.

Read the columns for what they are: `safetensors` checks nothing; `tensorizer` (if it can be imported; `pip install tensorizer`)
checks a SHA-256 stored in its own converted file, which no signature covers; `record` is our second load, when the daemon has
proven the file before. "hash ceiling" is bare hashlib over 16 KiB leaves, in one process for each core at once, the most any
SHA-256 verifier in Python could do; over 256 MiB each, for a checkpoint is in no processor's cache either; it is measured in
every round, for the machine is not the same in all of them. "load s" ends when all tensors are there, before they are read: a
view that was verified has been read, a lazy one has not. CPU seconds are those of the process and of those it started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

NAME = "bench/model"
TENSOR_BYTES = 16 << 20
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
Named = Iterable[tuple[str, torch.Tensor]]


def ours(work: Path, **options: str) -> Named:
    from modelp2p.loader import load

    return load(NAME, home=work / "home", **options).items()  # type: ignore[arg-type]


def safetensors(work: Path) -> Named:
    from safetensors.torch import load_file

    loaded: dict[str, torch.Tensor] = {}
    for shard in sorted((work / "plain").iterdir()):
        loaded |= load_file(shard)
    return loaded.items()


def safetensors_copied(work: Path) -> Named:
    return [(name, tensor.clone()) for name, tensor in safetensors(work)]


def tensorizer(work: Path) -> Named:
    from tensorizer import TensorDeserializer  # type: ignore[import-not-found]  # installed by hand, for this run only

    return list(TensorDeserializer(str(work / "model.tensors"), device="cpu", verify_hash=True).items())


CONTESTANTS: dict[str, Callable[[Path], Named]] = {
    "modelp2p verify=cpu": lambda work: ours(work, verify="cpu"),
    "modelp2p verify=cpu, copied": lambda work: ours(work, verify="cpu", mapping="pread"),
    "modelp2p record": lambda work: ours(work, verify="record"),
    "safetensors": safetensors,
    "safetensors, copied": safetensors_copied,
    "tensorizer verify_hash": tensorizer,
}
MODULES = {"modelp2p": "modelp2p.loader.api", "safetensors": "safetensors.torch", "tensorizer": "tensorizer"}


def child(contestant: str, work: Path) -> None:
    """One timed run; prints a JSON line."""
    __import__(MODULES[contestant.split()[0].rstrip(",")])
    before = cpu_seconds()
    started = time.perf_counter()
    total, size = 0, 0
    tensors = list(CONTESTANTS[contestant](work))
    loaded = time.perf_counter() - started
    for _, tensor in tensors:
        total += int(tensor.view(torch.int64).sum())
        size += tensor.nbytes
    seconds = time.perf_counter() - started
    cpu = cpu_seconds() - before
    # Not ru_maxrss, which a child inherits from the process it was forked from.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    result = {"seconds": seconds, "load_seconds": loaded, "cpu_seconds": cpu, "peak_rss_bytes": peak, "bytes": size}
    print(json.dumps(result | {"sum": total % 2**64}))


def cpu_seconds() -> float:
    """Of this process and of all it started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def build(work: Path, size: int, shards: int) -> None:
    """The checkpoint in a plain folder, in a home, and where possible in tensorizer's format."""
    from safetensors.torch import save

    from tests.releases import Home, publisher, statement_of, write_files

    per_shard = max(1, size // shards // TENSOR_BYTES)
    files: dict[str, bytes] = {}
    every: dict[str, torch.Tensor] = {}
    for shard in range(shards):
        generator = torch.Generator().manual_seed(shard)
        tensors = {
            f"layers.{shard}.{n}.weight": torch.randint(-(2**63), 2**63 - 1, (TENSOR_BYTES // 8,), generator=generator)
            .view(torch.bfloat16)
            .view(-1, 4096)
            for n in range(per_shard)
        }
        files[f"model-{shard:05}.safetensors"] = save(tensors)
        every |= tensors
    write_files(work / "plain", files)
    home = Home(work / "home")
    home.add(statement_of(files, name=NAME), files)
    home.trust(pattern="bench/*")
    assert publisher().id
    if find_spec("tensorizer"):
        from tensorizer import TensorSerializer

        serializer = TensorSerializer(str(work / "model.tensors"))
        serializer.write_state_dict(every)
        serializer.close()


HASH = """
import hashlib, os, sys, time
block = memoryview(os.urandom(256 << 20))
print(flush=True)
sys.stdin.readline()
for at in range(0, len(block), 16384):
    hashlib.sha256(block[at : at + 16384]).digest()
"""


def hash_ceiling(processes: int) -> float:
    """Bytes per second of hashlib over 16 KiB leaves, all processes together."""
    running = [
        subprocess.Popen([sys.executable, "-c", HASH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for one in running:
        assert one.stdout is not None
        one.stdout.readline()
    started = time.perf_counter()
    for one in running:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    for one in running:
        one.wait()
    seconds = time.perf_counter() - started
    for one in running:
        one.communicate()
    return processes * (256 << 20) / seconds


def rounds(work: Path, names: list[str], count: int) -> tuple[dict[str, list[dict[str, float]]], dict[int, list[float]]]:
    """All runs by contestant, and the ceiling of hashing by processes; one untimed round first warms the page cache."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    ceiling: dict[int, list[float]] = {processes: [] for processes in sorted({1, len(os.sched_getaffinity(0))})}
    sums = set()
    for number in range(count + 1):
        for name in names if number % 2 else names[::-1]:
            command = [sys.executable, __file__, "--child", name, "--folder", str(work)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            run = json.loads(done.stdout.splitlines()[-1])
            sums.add(run["sum"])
            if number:
                found[name].append(run)
        for processes, rates in ceiling.items():
            rates.append(hash_ceiling(processes))
        print(f"round {number} of {count}", file=sys.stderr)
    if len(sums) != 1:
        sys.exit("the contestants read different bytes")
    return found, ceiling


def machine() -> dict[str, str | int]:
    """Where this was measured, and with what."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **dict(versions(["torch", "safetensors", "tensorizer"])),
    }


def versions(packages: list[str]) -> Iterator[tuple[str, str]]:
    """Installed versions; `absent` says why a row is missing."""
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "absent"


def report(found: dict[str, list[dict[str, float]]], size: int) -> list[dict[str, object]]:
    """Prints the table, and gives it as rows."""
    rows: list[dict[str, object]] = []
    print(
        f"{'':30}{'load s':>8}{'all read':>9}{'quartiles':>16}{'GB/s':>8}{'CPU s/GiB':>11}{'peak RSS':>10}{'x safetensors':>15}"
    )
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median, median, median)
        load = statistics.median(run["load_seconds"] for run in runs)
        cpu = statistics.median(run["cpu_seconds"] for run in runs) / (size / 2**30)
        rss = max(run["peak_rss_bytes"] for run in runs)
        # Of each round by itself, too: this is what is left of the swings of a virtual machine.
        ratio = statistics.median(run["seconds"] / base["seconds"] for run, base in zip(runs, found["safetensors"], strict=True))
        row = {"name": name, "load_s": load, "median_s": median, "low_s": low, "high_s": high, "gb_per_s": size / median / 1e9}
        rows.append(row | {"cpu_s_per_gib": cpu, "peak_rss_bytes": rss, "ratio": ratio, "runs": len(runs)})
        rate = size / median / 1e9
        times = f"{load:8.3f}{median:9.3f}{low:8.3f}{high:8.3f}"
        print(f"{name:30}{times}{rate:8.2f}{cpu:11.2f}{rss / 2**20:8.0f}Mi{ratio:15.2f}")
    return rows


def main() -> None:
    """Parse, build, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512M", help="size of the checkpoint, with K, M or G")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to put three copies of the checkpoint; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="write the result to this file as well")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder)
        return
    number = args.size.upper().removesuffix("B").removesuffix("I").rstrip("KMG")
    size = int(number) * UNITS[args.size.upper().removesuffix("B").removesuffix("I")[len(number) :]]
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="modelp2p-bench-") as temporary:
        work = Path(temporary)
        build(work, size, args.shards)
        exact = sum(place.stat().st_size for place in (work / "plain").iterdir())
        names = [name for name in CONTESTANTS if not name.startswith("tensorizer") or find_spec("tensorizer")]
        where = machine()
        print(" · ".join(f"{key} {value}" for key, value in where.items()))
        found, rates = rounds(work, names, args.runs)
    ceiling = {processes: statistics.median(of_one) for processes, of_one in rates.items()}
    rows = report(found, exact)
    print("hash ceiling: " + ", ".join(f"{rate / 1e9:.2f} GB/s in {number} processes" for number, rate in ceiling.items()))
    # Of each round by itself: the machine of one round is not that of the next.
    best = rates[max(rates)][1:]
    for what, key in (("verified load", "load_seconds"), ("verified load, every byte read as well", "seconds")):
        runs = zip(found["modelp2p verify=cpu"], best, strict=True)
        share = statistics.median(run["bytes"] / run[key] / rate for run, rate in runs)
        print(f"{what}, over the ceiling of its round: {share:.2f}")
    if where["tensorizer"] == "absent":
        print("tensorizer is not installed: its row is missing")
    result = {"v": 1, "machine": where, "bytes": exact, "runs": args.runs, "rows": rows}
    result["hash_ceiling_gb_per_s"] = {str(threads): rate / 1e9 for threads, rate in ceiling.items()}
    text = json.dumps(result)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
