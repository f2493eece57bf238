from __future__ import annotations

import json
import os
import tomllib
from typing import TYPE_CHECKING

import pytest

from tests.cli.fakes import FakeDaemon, modelp2p

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def files(own_home: Path) -> tuple[Path, Path]:
    """The user's configuration file and the home's."""
    user = own_home / "home/.config/modelp2p/config.toml"
    user.parent.mkdir(parents=True)
    return user, own_home / "modelp2p/config.toml"


def shown(capsys: pytest.CaptureFixture[str], *flags: str, env: dict[str, str] | None = None) -> dict[str, dict[str, object]]:
    assert modelp2p("config", "show", "--json", *flags, env=env) == 0
    body: dict[str, dict[str, object]] = json.loads(capsys.readouterr().out)
    return body


def test_later_layers_win_and_every_origin_is_told(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user, home = files
    user.write_text('[network]\nmax_up = "1M"\nmax_down = "2M"\nprofile = "lan"\n')
    home.write_text('[network]\nmax_up = "3M"\n')
    env = {"MODELP2P_NETWORK__MAX_DOWN": "4M", "MODELP2P_POLICY__ALLOW_CODE": "true"}
    body = shown(capsys, env=env)
    expected = {
        "network.max_up": (3_000_000, str(home)),
        "network.max_down": (4_000_000, "MODELP2P_NETWORK__MAX_DOWN"),
        "network.profile": ("lan", str(user)),
        "policy.allow_code": (True, "MODELP2P_POLICY__ALLOW_CODE"),
        "fetch.timeout_s": (300.0, "default"),
    }
    assert {key: (body["values"][key], body["origins"][key]) for key in expected} == expected
    only = tmp_path / "only.toml"
    only.write_text("[fetch]\ntimeout_s = 5\n")
    body = shown(capsys, "--config", str(only))
    assert (body["values"]["network.max_up"], body["values"]["fetch.timeout_s"]) == (0, 5.0)


def test_offline_for_the_hub_is_without_web_seeds(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    files[1].write_text("[web_seeds]\nenabled = true\n")
    for value, is_on in (("1", False), ("true", False), ("0", True), ("", True)):
        body = shown(capsys, env={"HF_HUB_OFFLINE": value})
        assert body["values"]["web_seeds.enabled"] is is_on
        assert body["origins"]["web_seeds.enabled"] == (str(files[1]) if is_on else "HF_HUB_OFFLINE")


def test_flags_win_over_everything() -> None:
    daemon = FakeDaemon({"ls": {"releases": []}}, is_running=False)
    assert modelp2p("ls", "--profile", "wan", daemon=daemon, env={"MODELP2P_NETWORK__PROFILE": "lan"}) == 0
    assert daemon.started_with is not None
    assert tomllib.loads(daemon.started_with)["network"]["profile"] == "wan"


def test_show_is_toml_again(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("config", "show") == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out)["network"]["profile"] == "wan"
    assert 'profile = "wan"  # default' in out
    assert f"# not there: {files[1]}" in out


def test_the_running_configuration_is_the_daemons(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("config", "show", "--running", daemon=FakeDaemon({"config": {"text": "[log]\n"}})) == 0
    assert capsys.readouterr().out == "[log]\n"
    assert modelp2p("config", "show", "--running", daemon=FakeDaemon({}, is_running=False)) == 8


def test_errors_name_the_file_or_variable(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    files[1].write_text("[network]\nmax_upp = 3\n")
    assert modelp2p("config", "show") == 2
    assert (
        capsys.readouterr().err
        == f"error: {files[1]}: Unknown configuration key network.max_upp\nHint: Did you mean network.max_up?\n"
    )
    files[1].unlink()
    assert modelp2p("config", "show", env={"MODELP2P_NETWORK__PROFIL": "lan"}) == 2
    assert "MODELP2P_NETWORK__PROFIL: Unknown configuration key network.profil" in capsys.readouterr().err


def test_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[network]\nprofile = "lan"\n')
    assert modelp2p("config", "validate", str(file)) == 0
    assert capsys.readouterr().out == f"{file}: ok, sets 1 key\n"
    assert modelp2p("config", "validate", str(file), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"v": 1, "ok": True, "file": str(file), "keys": 1}
    for text in ("[network]\nprofile = 3\n", "[nowhere]\n", "not toml"):
        file.write_text(text)
        assert modelp2p("config", "validate", str(file)) == 2
    file.write_bytes(b"\xff")
    assert modelp2p("config", "validate", str(file)) == 2
    assert modelp2p("config", "validate", str(tmp_path / "nothing")) == 3
    os.mkfifo(tmp_path / "fifo")
    assert modelp2p("config", "validate", str(tmp_path / "fifo")) == 2
    assert "not a regular file" in capsys.readouterr().err
