from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.cli.fakes import modelp2p
from tests.releases import Home, statement_of

pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

if TYPE_CHECKING:
    from pathlib import Path

LOAD_KEYS = ["v", "name", "device", "tensors", "bytes", "verified_bytes", "seconds", "gb_per_s", "transfer"]


@pytest.fixture
def home(own_home: Path) -> Home:
    """A home with one complete release of a trusted publisher."""
    import torch

    home = Home(own_home / "modelp2p")
    files = {"model.safetensors": safetensors.save({"a": torch.zeros(100), "b": torch.ones(3)})}
    home.add(statement_of(files), files, has_record=False)
    home.trust()
    return home


def test_load_reports_what_it_did_without_a_daemon(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("load", "lab/model", "--device", "cpu", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert list(body)[: len(LOAD_KEYS)] == LOAD_KEYS
    assert (body["name"], body["device"], body["tensors"], body["bytes"]) == ("lab/model", "cpu", 2, 412)
    assert body["verified_bytes"] >= 412
    assert modelp2p("load", "lab/model", "--include", "b") == 0
    assert "Tensors:  1, 12 B" in capsys.readouterr().out


def test_load_refuses_bytes_that_were_altered(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = (home.path / "store").rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    assert modelp2p("load", "lab/model", "--json") == 4
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "BAD_HASH"


def test_load_of_what_is_not_here_is_exit_3(home: Home) -> None:
    assert modelp2p("load", "lab/other") == 3
    assert modelp2p("load", "lab/model", "--verify", "maybe") == 2
