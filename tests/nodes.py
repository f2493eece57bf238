"""Real nodes for tests and benchmarks: daemons in processes of their own, driven by the real command line.

Everything stays on loopback; discovery is off. A node's home, configuration and log lie in one folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from modelp2p.daemon.client import Client

READY_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 180.0
COMMAND = (sys.executable, "-m", "modelp2p.cli.main")
QUIET_NETWORK = {"profile": "lan", "lsd": False, "dht": False, "listen": ["127.0.0.1:0"]}


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one JSON object it must be."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@dataclass
class Node:
    """One home with its configuration; a daemon while `running`."""

    folder: Path
    network: Mapping[str, object] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_config()

    @property
    def home(self) -> Path:
        """The node's home."""
        return self.folder / "home"

    @property
    def log(self) -> str:
        """What the daemon said on stderr."""
        return (self.folder / "log").read_text() if (self.folder / "log").exists() else ""

    @property
    def environment(self) -> dict[str, str]:
        """Environment of every process of this node."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MODELP2P_", "XDG_"))}
        return kept | {"MODELP2P_HOME": str(self.home), "MODELP2P_PROGRESS": "off"}

    def write_config(self) -> None:
        """Write `config.toml` from `network` and `sections`."""
        lines = []
        for section, values in {"network": {**QUIET_NETWORK, **self.network}, **self.sections}.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        (self.folder / "config.toml").write_text("\n".join(lines) + "\n")

    def run(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Done:
        """Run one command to its end."""
        done = subprocess.run(
            [*COMMAND, "--config", str(self.folder / "config.toml"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, Any]:
        """Run a command with --json that must succeed; returns its object."""
        done = self.run(*arguments, "--json", timeout_s=timeout_s)
        assert done.code == 0, f"{arguments}: exit {done.code}\n{done.out}\n{done.err}\n{self.log[-2000:]}"
        return done.json

    def spawn(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            [*COMMAND, "--config", str(self.folder / "config.toml"), *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start(self, *arguments: str) -> Self:
        """Start the daemon and wait until it says READY."""
        before = len(self.log)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "--config", str(self.folder / "config.toml"), "daemon", *arguments],
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while "READY" not in self.log[before:]:
            assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"the daemon is not ready:\n{self.log}"
            time.sleep(0.02)
        return self

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.process = None
        return code

    def kill(self) -> None:
        """SIGKILL to the daemon alone, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)
        self.process = None

    @property
    def port(self) -> int:
        """The BitTorrent port of the running daemon."""
        return int(self.ok("status")["node"]["listen_port"])

    @property
    def address(self) -> str:
        """`HOST:PORT` for --peer."""
        return f"127.0.0.1:{self.port}"

    def release(self, name: str) -> dict[str, Any]:
        """The status row of a release, without the cost of a process: it is asked for again and again."""
        with Client.connect(str(self.home)) as client:
            releases = client.call("status", {}).result["releases"]
        assert isinstance(releases, list)
        (row,) = [row for row in releases if isinstance(row, dict) and row["name"] == name]
        return dict(row)

    def hurry(self, name: str) -> None:
        """Let the rest of a slow fetch come as fast as it can."""
        with Client.connect(str(self.home)) as client:
            client.call("limits", {"ref": name, "max_down": 0})

    def publish(self, source: Path, name: str, *arguments: str) -> dict[str, Any]:
        """Make a key if there is none, and publish a folder."""
        if not (self.home / "keys").exists() or not any((self.home / "keys").iterdir()):
            assert self.run("keys", "init", "lab", "--no-passphrase").code == 0
        return self.ok("publish", str(source), "--as", name, *arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(15)


def tree_bytes(path: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    root = path.resolve()
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0, what: str = "") -> None:
    """Poll until `condition()` is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.05)
