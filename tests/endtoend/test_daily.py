"""A running daemon from day to day: its configuration read again, a look at its health, names behind a Tab."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.endtoend.site import MIB, Site, model, size_of
from tests.nodes import COMMAND, Node, wait_until

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair

pytestmark = pytest.mark.swarm

MB = 1_000_000


def reload(node: Node, sections: dict[str, dict[str, object]], said: str) -> str:
    """Write a configuration, send SIGHUP, and wait for a line of the log; returns what the daemon said."""
    before = len(node.log)
    node.network, node.sections = sections.pop("network", {}), sections
    node.write_config()
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    wait_until(lambda: said in node.log[before:], what=said)
    return node.log[before:]


def running_config(node: Node) -> dict[str, Any]:
    return tomllib.loads(str(node.ok("config", "show", "--running")["text"]))


def test_a_configuration_is_read_again_while_the_daemon_runs(site: Site) -> None:
    files = model("reload", 3 * MIB)
    seed, node = site.node("seed", start=False).start("--max-down", "9M"), site.node("node")
    seed.publish(site.write(files), "lab/reload")
    assert seed.process is not None
    pid = seed.process.pid

    # A mistake changes nothing: not even what is right beside it.
    broken: dict[str, dict[str, object]] = {"network": {"max_up": "5M"}, "fetch": {"timeout": 9}}
    (line,) = reload(seed, broken, "the configuration stays as it is").splitlines()
    assert "ERROR" in line
    assert "Did you mean fetch.timeout_s?" in line
    assert running_config(seed)["network"]["max_up"] == 0

    wanted: dict[str, dict[str, object]] = {
        "network": {"max_up": "1Mi", "max_down": "1M", "connections": 40, "listen": ["127.0.0.1:1"]},
        "fetch": {"timeout_s": 12},
        "gateway": {"unknown": "fetch"},
        "log": {"level": "warning"},
    }
    said = reload(seed, wanted, "before the daemon starts again")
    assert "WARNING changed in the configuration, but not before the daemon starts again: network.listen\n" in said
    config = running_config(seed)
    # The flag of the command line still wins.
    assert (config["network"]["max_up"], config["network"]["max_down"]) == (MIB, 9 * MB)
    assert config["network"]["connections"] == 40
    assert config["network"]["listen"] == ["127.0.0.1:0"]
    assert config["fetch"]["timeout_s"] == 12
    assert config["gateway"]["unknown"] == "fetch"
    assert seed.process.pid == pid

    # The limit is the engine's by now.
    bundle = str(seed.folder / "release.modelp2p")
    seed.ok("show", "lab/reload", "--bundle", bundle)
    node.ok("trust", "add", bundle, "--name", "lab/reload")
    fetched = node.ok("fetch", bundle, "--peer", seed.address, "--timeout", "20")
    assert fetched["from_peers"] == size_of(files)
    assert fetched["seconds"] > 2.2


def test_a_daemon_ends_with_the_terminal_it_was_started_in(site: Site) -> None:
    node = site.node("node", start=False)
    terminal, inner = pty.openpty()
    # The leader of a session without a terminal takes this one. Below `nohup` the signal would be ignored, and rightly so.
    claim = (
        "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", claim, *COMMAND, "--config", str(node.folder / "config.toml"), "daemon"]
    with (node.folder / "log").open("wb") as log:
        node.process = subprocess.Popen(
            command, env=node.environment, stdin=inner, stdout=log, stderr=log, start_new_session=True
        )
    os.close(inner)
    wait_until(lambda: "READY" in node.log, what="READY")
    # As long as the terminal is there the signal is a request to read the configuration.
    node.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "was read again" in node.log, what="a reload")
    os.close(terminal)
    assert node.process.wait(30) == 0
    assert "the terminal is gone: stopping" in node.log


def test_doctor_finds_a_daemon_well_and_changes_nothing(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    files = model("doctor", MIB)
    published = pair.seed.publish(pair.site.write(files), "lab/doctor", "--web-seed", "https://example.org/")
    before = sorted(path for path in pair.seed.home.rglob("*"))
    done = pair.seed.run("doctor", "lab/doctor", "--json")
    assert sorted(path for path in pair.seed.home.rglob("*")) == before
    checks = {check["name"]: check for check in done.json["checks"]}
    assert not {name for name, check in checks.items() if check["verdict"] in ("problem", "not checked")}
    assert done.code == 0
    assert checks["ports"]["fact"].startswith(f"TCP accepted on {pair.seed.address}")
    assert checks["gateway"]["fact"].startswith("answers on 127.0.0.1:")
    assert checks["descriptors"]["fact"].startswith(f"the daemon (pid {pair.seed.process.pid if pair.seed.process else 0})")
    assert checks["release"]["fact"].startswith(f"lab/doctor@{published['revision']}: seeding, 100.0 % of")
    assert " reading " in checks["disk"]["fact"]
    # The other node does not have it, and knows whom to ask only after a fetch.
    done = pair.node.run("doctor", published["link"], "--json")
    checks = {check["name"]: check for check in done.json["checks"]}
    assert (done.code, checks["release"]["verdict"]) == (1, "problem")
    pair.node.ok("fetch", published["link"], "--peer", pair.seed.address)
    done = pair.node.run("doctor", published["link"], "--json")
    checks = {check["name"]: check for check in done.json["checks"]}
    assert (done.code, checks["release"]["verdict"], checks["trust"]["verdict"]) == (0, "ok", "warning")


def test_the_releases_of_a_running_daemon_are_behind_a_tab(pair: Pair) -> None:
    published = pair.seed.publish(pair.site.write(model("tab", 1000)), "lab/tab")
    env = pair.seed.environment | {"_MODELP2P_COMPLETE": "zsh_complete", "COMP_CWORD": "2"}
    for typed, value in (("lab/ta", "lab/tab"), ("lab/tab@", f"lab/tab@{published['revision'][:12]}")):
        env["COMP_WORDS"] = f"modelp2p show {typed}"
        done = subprocess.run(COMMAND, env=env, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.splitlines()[:2] == ["plain", value]
        assert done.stderr == ""
