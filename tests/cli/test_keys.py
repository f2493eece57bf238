from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING

import pytest

from modelp2p.cli.keyring import key_of
from modelp2p.protocol.errors import UsageError
from modelp2p.protocol.names import check_publisher_id
from tests.cli.fakes import modelp2p

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def keys(own_home: Path) -> Path:
    """Where keys lie when MODELP2P_HOME is set."""
    return own_home / "modelp2p" / "keys"


def test_a_new_key_prints_the_publisher_id_and_is_private(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("keys", "init", "lab", "--no-passphrase", "-q") == 0
    publisher = check_publisher_id(capsys.readouterr().out.strip())
    assert stat.S_IMODE((keys / "lab").stat().st_mode) == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (keys / "lab").iterdir()}
    assert files == dict.fromkeys(("release.key", "pointer.key", "publisher", "sequences"), 0o600)
    assert [path.name for path in keys.iterdir()] == ["lab"]
    assert modelp2p("keys", "show", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["v"], shown["name"], shown["publisher"], shown["encrypted"]) == (1, "lab", publisher, False)


def test_a_key_is_never_overwritten(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("keys", "init", "lab", "--no-passphrase") == 0
    before = (keys / "lab" / "release.key").read_bytes()
    assert modelp2p("keys", "init", "lab", "--no-passphrase") == 2
    assert "there is a key 'lab' already" in capsys.readouterr().err
    assert (keys / "lab" / "release.key").read_bytes() == before


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "-x", "x" * 65])
def test_a_key_name_is_no_path(name: str, keys: Path) -> None:
    assert modelp2p("keys", "init", "--no-passphrase", "--", name) == 2
    assert not keys.exists() or not list(keys.iterdir())


def test_without_a_terminal_a_passphrase_has_to_be_given(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("keys", "init", "lab") == 2
    assert "--passphrase-file" in capsys.readouterr().err
    assert not keys.exists()
    assert modelp2p("keys", "init", "lab", "--no-passphrase", "--passphrase-file", "x") == 2


def test_list_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("keys", "list") == 0
    assert "There is no key" in capsys.readouterr().err
    for name in ("b", "a"):
        assert modelp2p("keys", "init", name, "--no-passphrase", "-q") == 0
    capsys.readouterr()
    assert modelp2p("keys", "list", "-q") == 0
    assert capsys.readouterr().out.split() == ["a", "b"]
    assert modelp2p("keys", "list", "--json") == 0
    assert [key["name"] for key in json.loads(capsys.readouterr().out)["keys"]] == ["a", "b"]
    assert modelp2p("keys", "show") == 2
    assert "Choose one with --key: a, b." in capsys.readouterr().err
    assert modelp2p("keys", "show", "c") == 3


def test_the_keys_folder_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("keys", "init", "lab", "--no-passphrase", "-q", env={"MODELP2P_KEYS": str(tmp_path / "k")}) == 0
    assert (tmp_path / "k" / "lab" / "publisher").exists()


def test_an_empty_or_missing_passphrase_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\nsecond line\n")
    assert modelp2p("keys", "init", "lab", "--passphrase-file", str(tmp_path / "empty")) == 2
    assert modelp2p("keys", "init", "lab", "--passphrase-file", str(tmp_path / "nothing")) == 3


def test_a_sequence_is_signed_once(keys: Path) -> None:
    assert modelp2p("keys", "init", "lab", "--no-passphrase", "-q") == 0
    folder = key_of(str(keys), None)
    assert folder.highest_sequence("lab/model") == 0
    folder.record_sequence("lab/model", 3)
    folder.record_sequence("lab/other", 1)
    for used in (1, 3):
        with pytest.raises(UsageError, match=f"sequence {used} of lab/model is used"):
            folder.record_sequence("lab/model", used)
    assert (folder.highest_sequence("lab/model"), folder.highest_sequence("lab/other")) == (3, 1)
    assert len(list((keys / "lab").iterdir())) == 4
