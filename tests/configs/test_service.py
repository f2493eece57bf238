from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modelp2p.daemon.client import SERVICE_SOCKET
from modelp2p.daemon.config import parse_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
UNIT = CONFIGS / "modelp2p.service"


def sections() -> configparser.ConfigParser:
    # A later line of the same key adds to the earlier one in systemd; here the last one is enough, so not strict.
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys are case-sensitive
    unit.read_string(UNIT.read_text(encoding="utf-8"))
    return unit


REQUIRED = {
    "Type": "notify",
    "NotifyAccess": "main",
    "ExecReload": "/bin/kill -HUP $MAINPID",
    "User": "modelp2p",
    "StateDirectory": "modelp2p",
    "RuntimeDirectory": "modelp2p",
    "CapabilityBoundingSet": "",
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "MemoryDenyWriteExecute": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "SystemCallArchitectures": "native",
}


@pytest.mark.parametrize(("key", "value"), REQUIRED.items(), ids=REQUIRED.keys())
def test_unit_is_hardened(key: str, value: str) -> None:
    assert sections()["Service"][key] == value


def test_unit_lets_the_engine_lock_itself_in() -> None:
    allowed = [
        line for line in UNIT.read_text(encoding="utf-8").splitlines() if line.startswith("SystemCallFilter=@system-service")
    ]
    assert len(allowed) == 1
    assert {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"} <= set(allowed[0].split())


def test_unit_starts_the_daemon_in_its_state_folder() -> None:
    command = shlex.split(sections()["Service"]["ExecStart"])
    assert command[1:] == ["daemon", "--home", "/var/lib/modelp2p", "--config", "/etc/modelp2p/config.toml"]


def test_configuration_named_in_the_units_comment_is_one_of_ours() -> None:
    comment = UNIT.read_text(encoding="utf-8")
    assert "configs/seed-node.toml" in comment
    assert not parse_config((CONFIGS / "seed-node.toml").read_text(encoding="utf-8")).network.port_may_move


def test_other_users_reach_the_public_socket_of_the_unit() -> None:
    service = sections()["Service"]
    assert parse_config((CONFIGS / "seed-node.toml").read_text(encoding="utf-8")).control.public
    # systemd makes /run/modelp2p and names it in RUNTIME_DIRECTORY.
    assert f"/run/{service['RuntimeDirectory']}/public.sock" == SERVICE_SOCKET
    assert service["RuntimeDirectoryMode"] == service["StateDirectoryMode"] == "0755"


@pytest.mark.slow
def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        # Without systemd the tests above are what can be said about the unit; with it, its own parser has the last word.
        return
    unit = tmp_path / UNIT.name
    text = UNIT.read_text(encoding="utf-8")
    unit.write_text(text.replace("ExecStart=/usr/bin/modelp2p", f"ExecStart={sys.executable}"), encoding="utf-8")
    verdict = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, timeout=60, check=False)
    # It also speaks of other units of this machine; only what it says of ours counts.
    about_ours = [line for line in verdict.stderr.splitlines() if UNIT.name in line]
    assert (verdict.returncode, about_ours) == (0, [])
