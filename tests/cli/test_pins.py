from __future__ import annotations

import json

import pytest

from modelp2p.protocol.errors import DeniedError
from tests.cli.fakes import INFO_HASH, LINK, RELEASE, REVISION, STATUS, FakeDaemon, modelp2p, shows

PINNED = {**RELEASE, "pinned": True, "changed": True}
UNKNOWN = "ef" * 32


def test_pin_and_unpin_say_what_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({"pin": PINNED, "unpin": {**PINNED, "pinned": False}})
    assert modelp2p("pin", "lab/model", daemon=daemon) == 0
    assert capsys.readouterr() == ("", f"lab/model@{REVISION} is pinned\n")
    assert modelp2p("unpin", LINK, daemon=daemon) == 0
    assert capsys.readouterr() == ("", f"lab/model@{REVISION} is not pinned\n")
    assert [(asked.verb, asked.args) for asked in daemon.asked] == [("pin", {"ref": "lab/model"}), ("unpin", {"ref": LINK})]
    daemon = FakeDaemon({"pin": {**PINNED, "changed": False}})
    assert modelp2p("pin", "lab/model", daemon=daemon) == 0
    assert capsys.readouterr().err == f"lab/model@{REVISION} is pinned, as it was before\n"
    assert modelp2p("pin", "lab/model", "--json", daemon=daemon) == 0
    assert json.loads(capsys.readouterr().out) == {
        "v": 1,
        "name": "lab/model",
        "revision": REVISION,
        "info_hash": INFO_HASH,
        "pinned": True,
        "changed": False,
    }


def test_the_list_names_also_what_has_lost_its_statement(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({"pins": {"pins": [PINNED, {"info_hash": UNKNOWN}]}})
    assert modelp2p("pin", "--list", daemon=daemon) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["NAME", "REVISION", "STATE", "SIZE"],
        ["lab/model", REVISION[:12], "complete", "3.0", "MB"],
        ["unknown", "content", UNKNOWN],
    ]
    assert modelp2p("pin", "--list", "-q", daemon=daemon) == 0
    assert capsys.readouterr() == (f"lab/model@{REVISION}\n", "")
    assert modelp2p("pin", "--list", "--json", daemon=daemon) == 0
    assert json.loads(capsys.readouterr().out) == {"v": 1, "pins": [PINNED, {"info_hash": UNKNOWN}]}
    assert modelp2p("pin", "--list", daemon=FakeDaemon({"pins": {"pins": []}})) == 0
    assert capsys.readouterr() == ("", "Nothing is pinned. Pin a release: modelp2p pin REF.\n")


@pytest.mark.parametrize("args", [(), ("lab/model", "--list")])
def test_either_a_release_or_the_list(args: tuple[str, ...]) -> None:
    daemon = FakeDaemon({})
    assert modelp2p("pin", *args, daemon=daemon) == 2
    assert not daemon.asked


def test_ls_show_and_status_say_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    row = {**STATUS["releases"][0], "pinned": True}  # type: ignore[index,dict-item]  # a list of maps
    shown = shows()({}, ())
    shown.result["pinned"] = True
    daemon = FakeDaemon({"ls": {"releases": [row]}, "status": {**STATUS, "releases": [row]}, "show": shown})
    for verb in (("ls",), ("status",), ("show", "lab/model")):
        assert modelp2p(*verb, daemon=daemon) == 0
        assert "complete (pinned)" in capsys.readouterr().out


def test_rm_of_a_pinned_release_is_exit_10_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    refusal = DeniedError("lab/model is pinned", hint="If it may go: modelp2p unpin lab/model")
    assert modelp2p("rm", "lab/model", "-y", daemon=FakeDaemon({"rm": refusal})) == 10
    assert capsys.readouterr().err.splitlines()[1] == "Hint: If it may go: modelp2p unpin lab/model"
