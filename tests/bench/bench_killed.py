"""A download that is killed with SIGKILL halfway and run again: what the server sent in all, against the size.

    python -m tests.bench.bench_killed --size 512M --rounds 3

`hf download` of three generations from a Hub on loopback that counts what it sends, over plain HTTP; beside them a fetch whose
daemon is killed, from a seed that counts what it uploads. All of them in turn, each round into an empty cache. What a killed
client had not read yet is counted too: some MB for each of its connections.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from modelp2p.daemon.client import Client
from tests.bench.bench_fetch import make_model
from tests.bench.machine import parse_size, report
from tests.clients.programs import GENERATIONS, Generation, environment_of
from tests.endtoend.hub import Hub
from tests.nodes import Node, tree_bytes

OURS = "modelp2p fetch"
COUNT_S = 2.0
"""After this a daemon's counters are up to date."""
OURS_AT_MOST = 1.05
"""What was received and not yet proven when the daemon ended is all that may come twice."""


class Killed(NamedTuple):
    """Bytes: of the server's in all, and of those that the killed client had already cost."""

    sent: int
    at_kill: int


def main() -> None:
    """Run it; the figures count bytes, not seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default=512 << 20)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    rounds: dict[str, list[Killed]] = {OURS: []}
    with tempfile.TemporaryDirectory() as name, Node(Path(name) / "seed") as seed:
        work = Path(name)
        make_model(work / "model", given.size)
        files = tree_bytes(work / "model")
        size = sum(map(len, files.values()))
        hub = Hub("lab/bench", "a" * 40, files, frozenset(path for path in files if path.endswith(".safetensors")))
        seed.start()
        link = seed.publish(work / "model", "lab/bench")["link"]
        for number in range(given.rounds):
            for generation in GENERATIONS:
                found = hf_download(generation, hub, work / f"{generation.version}-{number}", size)
                rounds.setdefault(f"hf download {generation.version}", []).append(found)
            rounds[OURS].append(fetch(seed, link, work / f"node-{number}", size))
    over = {client: [round(one.sent / size, 4) for one in each] for client, each in rounds.items()}
    at_kill = {client: [round(one.at_kill / size, 4) for one in each] for client, each in rounds.items()}
    report("killed", {"size_bytes": size, "sent_over_size": over, "at_kill_over_size": at_kill})
    assert max(over[OURS]) <= OURS_AT_MOST, over


def hf_download(generation: Generation, hub: Hub, home: Path, size: int) -> Killed:
    """What the Hub sent until a download that was killed halfway was complete."""
    hub.sent.clear()
    with hub.serve() as endpoint:
        command = [str(Path(generation.python).with_name("hf")), "download", hub.name]
        environment = environment_of(endpoint, home)
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            wait_half(lambda: sum(hub.sent), size)
            process.kill()
        at_kill = sum(hub.sent)
        subprocess.run(command, env=environment, check=True, capture_output=True)
    (snapshot,) = home.glob("hub/models--*/snapshots/*")
    assert tree_bytes(snapshot) == hub.files
    return Killed(sum(hub.sent), at_kill)


def fetch(seed: Node, link: str, folder: Path, size: int) -> Killed:
    """What the seed uploaded until a fetch whose daemon was killed halfway was complete."""
    with Node(folder) as node:
        before = uploaded(seed)
        node.start()
        # Slow enough for a counter that moves once a second.
        client = node.spawn("fetch", link, "--peer", seed.address, "--no-hf-cache", "--max-down", str(size // 8))
        wait_half(lambda: uploaded(seed) - before, size)
        node.kill()
        client.wait(30)
        time.sleep(COUNT_S)
        at_kill = uploaded(seed) - before
        assert at_kill < size * 0.9
        node.start()
        node.ok("fetch", link, "--peer", seed.address, "--no-hf-cache", timeout_s=600)
        time.sleep(COUNT_S)
        return Killed(uploaded(seed) - before, at_kill)


def uploaded(seed: Node) -> int:
    """Bytes of the one release that left the seed, as it knows them once a second."""
    with Client.connect(str(seed.home)) as client:
        rows = client.call("status", {}).result["releases"]
    assert isinstance(rows, list)
    (row,) = rows
    assert isinstance(row, dict)
    assert isinstance(row["uploaded"], int)
    return row["uploaded"]


def wait_half(sent: Callable[[], int], size: int) -> None:
    """Wait until half of it was sent."""
    deadline = time.monotonic() + 120
    while sent() < size // 2:
        assert time.monotonic() < deadline, "not half of it within 120 s"
        time.sleep(0.005)


if __name__ == "__main__":
    main()
