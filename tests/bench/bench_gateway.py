"""GET of one large file over loopback: the gateway, nginx where it is installed, and the least Python server, in turns.

python -m tests.bench.bench_gateway --size 2G --rounds 5 [--nginx PATH]
python -m tests.bench.bench_gateway --arriving --size 256M --rounds 3 --rate 32Mi

The goal is 0.7 of nginx's rate with flat memory. Each round asks every server once, in turn, so that what else the machine does
meets all of them; ratios are those of the medians. With --arriving: `snapshot_download` of a release that the node is still
fetching at a limited rate, against that fetch alone; the goal is 1.15 of its time, the start of the client's process included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.bench.bench_fetch import make_model
from tests.bench.machine import parse_size, report, resident_bytes
from tests.nodes import Node, wait_until

_NGINX = """
daemon off; master_process off; worker_processes 1; pid {work}/pid; error_log {work}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off; sendfile on; tcp_nopush on; client_body_temp_path {work}; proxy_temp_path {work};
  fastcgi_temp_path {work}; uwsgi_temp_path {work}; scgi_temp_path {work};
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


class Server(NamedTuple):
    """Where the file is, and whose memory counts."""

    name: str
    url: str
    pid: int


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="2G", type=parse_size)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--nginx", default=shutil.which("nginx") or "", help="the binary, where it is not on the path")
    parser.add_argument("--arriving", action="store_true", help="a release under way instead")
    parser.add_argument("--rate", default="32Mi", help="of the fetch, with --arriving")
    given = parser.parse_args()
    if given.arriving:
        report("gateway_arriving", arriving(given.size, given.rounds, given.rate))
        return
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        work = Path(name)
        make_model(work / "model", given.size, shards=1)
        file = max((work / "model").rglob("*"), key=lambda path: path.stat().st_size)
        servers = [stack.enter_context(gateway(work, file)), stack.enter_context(least(file))]
        if given.nginx:
            servers.append(stack.enter_context(nginx(given.nginx, work, file)))
        size = file.stat().st_size
        for server in servers:  # the page cache, and whatever each does once
            assert get(server.url) == size, server
        before = {server.name: resident_bytes(server.pid) for server in servers}
        times: dict[str, list[float]] = {server.name: [] for server in servers}
        highest = dict(before)
        for _ in range(given.rounds):
            for server in servers:
                with watched(server, highest):
                    started = time.monotonic()
                    assert get(server.url) == size
                    times[server.name].append(time.monotonic() - started)
        rates = {name: size / statistics.median(taken) / 1e9 for name, taken in times.items()}
        figures: dict[str, object] = {
            "bytes": size,
            "rounds": given.rounds,
            "gb_per_s": {name: round(rate, 2) for name, rate in rates.items()},
            "all_gb_per_s": {name: [round(size / one / 1e9, 2) for one in taken] for name, taken in times.items()},
            "to_nginx": round(rates["gateway"] / rates["nginx"], 2) if "nginx" in rates else "nginx is not installed",
            "to_least": round(rates["gateway"] / rates["least"], 2),
            "gateway_memory_growth_mb": round((highest["gateway"] - before["gateway"]) / 1e6, 1),
        }
    report("gateway", figures)


def arriving(size: int, rounds: int, rate: str) -> dict[str, object]:
    """Seconds of plain fetches, and of snapshots of fetches that began with them, in turns."""
    plain: list[float] = []
    through: list[float] = []
    sections: dict[str, dict[str, object]] = {"store": {"reserve": 0}, "gateway": {"port": 0}}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_model(work / "model", size)
        with Node(work / "seed", sections=sections) as seed, Node(work / "node", sections=sections) as node:
            seed.start()
            node.start()
            link = seed.publish(work / "model", "lab/bench")["link"]
            fetch = ("fetch", link, "--peer", seed.address, "--max-down", rate, "--no-hf-cache")
            assert node.run("trust", "add", link, "--name", "lab/*", "--peer", seed.address).code == 0
            endpoint = node.ok("env")["env"]["HF_ENDPOINT"]
            for number in range(rounds):
                started = time.monotonic()
                node.ok(*fetch)
                plain.append(time.monotonic() - started)
                node.ok("rm", "lab/bench", "-y")
                started = time.monotonic()
                node.ok(*fetch, "--detach")
                environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(work / f"hf{number}")}
                code = "from huggingface_hub import snapshot_download; snapshot_download('lab/bench')"
                subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
                through.append(time.monotonic() - started)
                node.ok("rm", "lab/bench", "-y")
    ratio = statistics.median(through) / statistics.median(plain)
    seconds = {"fetch": [round(one, 2) for one in plain], "snapshot": [round(one, 2) for one in through]}
    return {"bytes": size, "rate": rate, "seconds": seconds, "to_fetch": round(ratio, 2)}


@contextlib.contextmanager
def gateway(work: Path, file: Path) -> Iterator[Server]:
    """A daemon that has published the folder of the file."""
    with Node(work / "node", sections={"store": {"reserve": 0}, "gateway": {"port": 0}}) as node:
        node.start()
        link = node.publish(file.parent, "lab/bench")["link"]
        assert node.run("trust", "add", link, "--name", "lab/*").code == 0
        endpoint = node.ok("env")["env"]["HF_ENDPOINT"]
        assert node.process is not None
        yield Server("gateway", f"{endpoint}/lab/bench/resolve/main/{file.name}", node.process.pid)


@contextlib.contextmanager
def least(file: Path) -> Iterator[Server]:
    """The least server there is."""
    command = [sys.executable, "-m", "tests.bench.plain_sendfile", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())
        try:
            yield Server("least", f"http://127.0.0.1:{port}/{file.name}", process.pid)
        finally:
            process.terminate()


@contextlib.contextmanager
def nginx(binary: str, work: Path, file: Path) -> Iterator[Server]:
    """One worker of nginx with sendfile."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    conf = work / "nginx.conf"
    conf.write_text(_NGINX.format(work=work, port=port, root=file.parent))
    with subprocess.Popen([binary, "-p", str(work), "-c", str(conf)], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: _answers(port), 10, "nginx")
            yield Server("nginx", f"http://127.0.0.1:{port}/{file.name}", process.pid)
        finally:
            process.terminate()


@contextlib.contextmanager
def watched(server: Server, highest: dict[str, int]) -> Iterator[None]:
    """Notes the server's highest resident memory during the block."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            highest[server.name] = max(highest[server.name], resident_bytes(server.pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def get(url: str) -> int:
    """GET, and throw the bytes away; returns how many came. A client that costs as little as one in Python can."""
    at = urlsplit(url)
    assert at.hostname is not None
    with socket.create_connection((at.hostname, at.port or 80)) as connection:
        connection.sendall(f"GET {at.path} HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode("ascii"))
        buffer = bytearray(1 << 20)
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(65536)
        lines, _, rest = head.partition(b"\r\n\r\n")
        status, *headers = lines.decode("latin-1").split("\r\n")
        assert " 200 " in status, lines
        size = next(int(line.split(":")[1]) for line in headers if line.lower().startswith("content-length:"))
        left = size - len(rest)
        while left and (count := connection.recv_into(buffer)):
            left -= count
        return size - left


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


if __name__ == "__main__":
    main()
