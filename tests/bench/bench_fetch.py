"""Fetch over loopback, proof included, against plain libtorrent with the same settings and with stock settings, in one run.

    python -m tests.bench.bench_fetch --size 1G --runs 3

Interleaved; prints medians and the two ratios of docs/BENCHMARKS.md. The source is in the page cache for all of them; every
fetch ends with its files synced.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from modelp2p.protocol.statement import decode_bundle, verify_statement
from tests.bench.machine import parse_size, report
from tests.nodes import Node

STOCK_S = 10.0
"""Stock settings would take minutes for a GiB; their rate is taken over this long."""


def make_model(folder: Path, size: int, shards: int = 4, tensors: int = 1) -> None:
    """Random shards (never zeros) of `size` bytes in all, each of so many equal tensors, and a small config."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        generator = random.Random(shard)
        with (folder / f"model-{shard + 1:05}-of-{shards:05}.safetensors").open("wb") as file:
            each = size // shards // tensors
            layout = {
                f"layers.{shard * tensors + n}.w": {"dtype": "U8", "shape": [each], "data_offsets": [n * each, (n + 1) * each]}
                for n in range(tensors)
            }
            header = json.dumps(layout).encode()
            header += b" " * (-len(header) % 8)
            file.write(len(header).to_bytes(8, "little") + header)
            left = each * tensors
            while left:
                chunk = min(left, 16 << 20)
                file.write(generator.randbytes(chunk))
                left -= chunk
    (folder / "config.json").write_text('{"model_type": "synthetic"}')


def plain(role: str, torrent: Path, folder: Path, settings: str, *more: str) -> subprocess.Popen[str]:
    """Start one plain peer."""
    command = [sys.executable, "-m", "tests.bench.plain_libtorrent", role, str(torrent), str(folder), "--settings", settings]
    return subprocess.Popen([*command, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def plain_seconds(torrent: Path, source: Path, work: Path, settings: str, stop_after_s: float) -> tuple[float, int]:
    """Seconds and bytes of one plain transfer."""
    seed = plain("seed", torrent, source, settings)
    assert seed.stdout is not None
    assert seed.stdin is not None
    port = seed.stdout.readline().strip()
    target = work / f"plain-{settings}"
    target.mkdir()
    fetch = plain("fetch", torrent, target, settings, "--peer", port, "--stop-after", str(stop_after_s))
    out, _ = fetch.communicate(timeout=700)
    seed.stdin.close()
    seed.wait(60)
    shutil.rmtree(target)
    result = json.loads(out)
    return result["seconds"], result["bytes"]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default=1 << 30)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-stock", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_model(work / "model", given.size)
        with Node(work / "a") as seed:
            seed.start()
            published = seed.publish(work / "model", "lab/bench")
            bundle = work / "r.modelp2p"
            seed.run("show", "lab/bench", "--bundle", str(bundle))
            release = verify_statement(decode_bundle(bundle.read_bytes()))
            torrent = work / "payload.torrent"
            torrent.write_bytes(release.torrent_bytes())
            source = work / "source"
            source.mkdir()
            (source / release.manifest.revision).symlink_to(work / "model")
            ours, theirs, stock = [], [], []
            for run in range(given.runs):
                with Node(work / f"b{run}") as node:
                    node.start()
                    result = node.ok("fetch", published["link"], "--peer", seed.address, "--no-seed")
                    ours.append(result["seconds"])
                shutil.rmtree(work / f"b{run}")
                theirs.append(plain_seconds(torrent, source, work, "tuned", 600)[0])
                print(f"run {run}: ours {ours[-1]:.2f} s, plain {theirs[-1]:.2f} s", file=sys.stderr, flush=True)
                if not given.no_stock:
                    seconds, size = plain_seconds(torrent, source, work, "stock", STOCK_S)
                    stock.append(size / seconds)
            figures: dict[str, object] = {
                "size_bytes": given.size,
                "ours_s": ours,
                "plain_tuned_s": theirs,
                "ratio_to_plain": round(statistics.median(ours) / statistics.median(theirs), 3),
            }
            if stock:
                slow = max(1.0, statistics.median(stock))
                figures["plain_stock_bytes_per_s"] = [int(rate) for rate in stock]
                figures["times_faster_than_stock"] = round(given.size / statistics.median(ours) / slow, 1)
                # What no proof and no daemon could reach: on few cores this, not the settings, is the limit.
                figures["plain_tuned_times_faster_than_stock"] = round(given.size / statistics.median(theirs) / slow, 1)
    report("fetch", figures)


if __name__ == "__main__":
    main()
