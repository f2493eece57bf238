from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from modelp2p.protocol.errors import NotFoundError
from tests.cli.fakes import FakeDaemon, modelp2p

if TYPE_CHECKING:
    from tests.cli.fakes import Answer

ENDPOINT = "http://127.0.0.1:16880/t/" + "0" * 32
ANSWERS: dict[str, Answer] = {"gateway": {"endpoint": ENDPOINT, "unknown": "deny"}}


@pytest.mark.parametrize(
    ("flags", "printed"),
    [
        ((), f"export HF_ENDPOINT={ENDPOINT}\n"),
        (("--shell", "fish"), f"set -gx HF_ENDPOINT {ENDPOINT}\n"),
        (("--shell", "csh"), f"setenv HF_ENDPOINT {ENDPOINT}\n"),
        (("-q",), f"{ENDPOINT}\n"),
    ],
    ids=["sh", "fish", "csh", "quiet"],
)
def test_the_address_is_printed_for_a_shell(flags: tuple[str, ...], printed: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("env", *flags, daemon=FakeDaemon(ANSWERS)) == 0
    assert capfd.readouterr().out == printed


def test_json_names_the_variable(capfd: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("env", "--json", daemon=FakeDaemon(ANSWERS)) == 0
    assert json.loads(capfd.readouterr().out) == {"v": 1, "env": {"HF_ENDPOINT": ENDPOINT}}


def test_what_a_daemon_says_is_never_a_command_of_the_shell(capfd: pytest.CaptureFixture[str]) -> None:
    hostile = FakeDaemon({"gateway": {"endpoint": "x; echo evil `echo evil` $(echo evil) '", "unknown": "deny"}})
    assert modelp2p("env", daemon=hostile) == 0
    line = capfd.readouterr().out
    done = subprocess.run(["sh", "-c", line + 'printf %s "$HF_ENDPOINT"'], capture_output=True, text=True, check=True)
    assert done.stdout == "x; echo evil `echo evil` $(echo evil) '"


def test_no_daemon_is_exit_8_and_no_gateway_exit_3() -> None:
    assert modelp2p("env", daemon=FakeDaemon(ANSWERS, is_running=False)) == 8
    assert modelp2p("env", daemon=FakeDaemon({"gateway": NotFoundError("this daemon has no gateway")})) == 3
