from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from modelp2p.cli import status as status_verb
from tests.cli.fakes import (
    INFO_HASH,
    LINK,
    PUBLISHER,
    RELEASE,
    REVISION,
    SHOWN,
    SHOWN_MANIFEST,
    SHOWN_ROW,
    STATUS,
    FakeDaemon,
    FakeReply,
    memory,
    modelp2p,
    shows,
)

if TYPE_CHECKING:
    from pathlib import Path

    from modelp2p.protocol.codec import Map

NODE_KEYS = ["pid", "listen_port", "profile", "publisher_ids"]
RELEASE_KEYS = ["name", "revision", "info_hash", "state", "size", "proven", "rate_down", "rate_up", "peers", "uploaded"]
VERIFIED: Map = {"name": "lab/model", "revision": REVISION, "ok": True, "bad": [], "repaired": 0, "bytes": 3_000_000}
BAD: Map = {**VERIFIED, "ok": False, "bad": [{"path": "a.safetensors", "piece": 3}]}


def test_ls_table_quiet_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    other = {**RELEASE, "name": "b/longer-name", "name_verified": False, "state": "fetching", "proven": 1_500_000, "files": 12}
    daemon = FakeDaemon({"ls": {"releases": [{**RELEASE, "files": 3}, other]}})
    assert modelp2p("ls", daemon=daemon) == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAME                          REVISION      STATE       SIZE  VERIFIED  FILES",
        "lab/model                     0123456789ab  complete  3.0 MB   100.0 %      3",
        "b/longer-name (not verified)  0123456789ab  fetching  3.0 MB    50.0 %     12",
    ]
    assert modelp2p("ls", "-q", daemon=daemon) == 0
    assert capsys.readouterr().out.splitlines() == [f"lab/model@{REVISION}", f"b/longer-name@{REVISION}"]
    assert modelp2p("ls", "--json", daemon=daemon) == 0
    assert [row["files"] for row in json.loads(capsys.readouterr().out)["releases"]] == [3, 12]


def test_an_empty_node_says_what_to_do_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("ls", daemon=FakeDaemon({"ls": {"releases": []}})) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert "modelp2p fetch REF" in output.err


def test_status_json_has_the_keys_of_the_contract_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("status", "--json", daemon=FakeDaemon({"status": STATUS})) == 0
    body = json.loads(capsys.readouterr().out)
    assert list(body) == ["v", "node", "releases"]
    assert list(body["node"])[: len(NODE_KEYS)] == NODE_KEYS
    assert list(body["releases"][0])[: len(RELEASE_KEYS)] == RELEASE_KEYS


def test_status_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    broken = {**STATUS["releases"][0], "error": "the disk is full"}  # type: ignore[index,dict-item]  # a list of maps
    assert modelp2p("status", daemon=FakeDaemon({"status": {**STATUS, "releases": [broken]}})) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pid 7, port 16881, profile wan, up 1 min 5 s, engine confined (Landlock 4)"
    assert lines[1].split() == ["NAME", "REVISION", "STATE", "VERIFIED", "SIZE", "DOWN", "UP", "PEERS", "UPLOADED"]
    assert lines[3] == "lab/model: the disk is full"


def test_watching_prints_one_object_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    naps = iter([None, None])

    def sleep(seconds: float) -> None:
        assert seconds == status_verb.REFRESH_S
        if next(naps, "end") == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    assert modelp2p("status", "-w", "--json", daemon=FakeDaemon({"status": STATUS})) == 130
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["node"]["pid"] for line in lines[:3]] == [7, 7, 7]
    assert json.loads(lines[3])["error"]["code"] == 130


def test_show_tells_everything(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({"show": shows()})
    assert modelp2p("show", "lab/model", daemon=daemon) == 0
    out = capsys.readouterr().out
    for said in (
        f"Signed by:    {PUBLISHER}",
        "Created:      2023-11-14 22:13 UTC, sequence 1",
        "License:      apache-2.0",
        f"Made from:    finetune of lab/base@{REVISION}",
        "Note compute: 12 GPU hours",
        "Web seed:     https://example.org/",
        f"Info-hash:    {INFO_HASH}",
        f"Link:         {LINK}",
        "a.safetensors  3.0 MB  weights  1111",
    ):
        assert said in out
    assert modelp2p("show", "lab/model", "-q", daemon=daemon) == 0
    assert capsys.readouterr().out == f"{SHOWN['link']!s}\n"
    assert modelp2p("show", "lab/model", "--json", daemon=daemon) == 0
    assert json.loads(capsys.readouterr().out) == {"v": 1, **SHOWN}


def test_show_tells_of_as_many_files_as_a_release_may_have(capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = SHOWN_MANIFEST.files
    files = tuple(replace(shard, path=f"{'d' * 190}/{number:05}", size=1) for number in range(10_000))
    manifest = replace(SHOWN_MANIFEST, files=files)
    assert modelp2p("show", "lab/model", "--json", daemon=FakeDaemon({"show": shows(manifest=manifest)})) == 0
    shown = json.loads(capsys.readouterr().out)["files"]
    assert [item["path"] for item in shown] == [entry.path for entry in files]


def test_a_show_without_a_manifest_is_the_daemons_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("show", "lab/model", daemon=FakeDaemon({"show": SHOWN_ROW})) == 8
    assert "no manifest" in capsys.readouterr().err
    garbage = FakeReply(dict(SHOWN_ROW), (memory(b"\xc1"),))
    assert modelp2p("show", "lab/model", "--json", daemon=FakeDaemon({"show": garbage})) == 4
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "BAD_SIGNATURE"


def test_show_writes_the_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({"show": shows(b"statement")})
    assert modelp2p("show", "lab/model", "--bundle", str(tmp_path / "x.modelp2p"), daemon=daemon) == 0
    assert daemon.asked[0].args == {"ref": "lab/model", "bundle_out": True}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x.modelp2p": b"statement"}


def test_verify_is_exit_4_when_a_byte_is_bad(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("verify", "lab/model", daemon=FakeDaemon({"verify": VERIFIED})) == 0
    assert capsys.readouterr().err == f"lab/model@{REVISION}: every byte is good, 3.0 MB read\n"
    assert modelp2p("verify", "lab/model", daemon=FakeDaemon({"verify": BAD})) == 4
    output = capsys.readouterr()
    assert output.out == "bad: a.safetensors, piece 3\n"
    assert "--repair" in output.err
    daemon = FakeDaemon({"verify": BAD})
    assert modelp2p("verify", "lab/model", "--json", "--repair", "--peer", "a:1", daemon=daemon) == 4
    assert daemon.asked[0].args == {"ref": "lab/model", "repair": True, "peers": ["a:1"]}
    body = json.loads(capsys.readouterr().out)
    assert list(body)[:4] == ["v", "name", "ok", "bad"]
    assert body["bad"] == [{"path": "a.safetensors", "piece": 3}]


def test_verify_of_some_files_names_them_to_the_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = SHOWN_MANIFEST.files
    files = tuple(replace(shard, path=path) for path in ("a.safetensors", "b.safetensors", "c.json"))
    daemon = FakeDaemon({"verify": VERIFIED, "show": shows(manifest=replace(SHOWN_MANIFEST, files=files))})
    assert modelp2p("verify", "lab/model", "--include", "a*", "--include", "*.json", daemon=daemon) == 0
    assert [asked.verb for asked in daemon.asked] == ["show", "verify"]
    assert daemon.asked[1].args == {"ref": "lab/model", "repair": False, "peers": [], "only": ["a.safetensors", "c.json"]}
    capsys.readouterr()
    assert modelp2p("verify", "lab/model", "--include", "*.gguf", daemon=daemon) == 2
    assert "no file of lab/model matches" in capsys.readouterr().err
    assert len(daemon.asked) == 3


def test_rm_asks_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({"rm": {"name": "lab/model", "revision": REVISION, "freed": 3_000_000}})
    assert modelp2p("rm", "lab/model", daemon=daemon) == 0
    assert f"Removed lab/model@{REVISION}, 3.0 MB freed" in capsys.readouterr().err
    for answer, code, calls in ((b"n\n", 1, 1), (b"y\n", 0, 2)):
        ours, theirs = os.openpty()
        os.write(ours, answer)
        with os.fdopen(theirs, encoding="utf-8") as stdin, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", stdin)
            assert modelp2p("rm", "lab/model", daemon=daemon) == code
        os.close(ours)
        assert len(daemon.asked) == calls
    assert modelp2p("rm", "lab/model", "-y", "--json", daemon=daemon) == 0


def test_gc_names_what_goes(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({"gc": {"removed": ["data/x"], "freed": 5}})
    assert modelp2p("gc", "--dry-run", daemon=daemon) == 0
    assert capsys.readouterr() == ("data/x\n", "5 B would be freed\n")
    assert daemon.asked[0].args == {"dry_run": True}
    assert modelp2p("gc", "--json", daemon=daemon) == 0
    assert json.loads(capsys.readouterr().out) == {"v": 1, "removed": ["data/x"], "freed": 5}


def test_trust_is_added_for_a_link_or_bundle_and_never_for_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({"trust_add": {"publisher": PUBLISHER, "name": "lab/*", "keyids": ["00"]}})
    assert modelp2p("trust", "add", LINK, "--name", "lab/*", daemon=daemon) == 0
    assert daemon.asked[0].args == {"ref": LINK, "name": "lab/*"}
    assert capsys.readouterr().out == f"Publisher: {PUBLISHER}\nMay sign:  lab/*\n"
    assert modelp2p("trust", "add", "lab/model", "--name", "lab/*", daemon=daemon) == 2
    assert modelp2p("trust", "add", PUBLISHER, "--name", "lab/*", daemon=daemon) == 3
    assert modelp2p("trust", "add", LINK, daemon=daemon) == 2


def test_trust_says_whom_to_ask_for_the_statement_and_how_long() -> None:
    daemon = FakeDaemon({"trust_add": {"publisher": PUBLISHER, "name": "lab/*", "keyids": ["00"]}})
    add = ("trust", "add", LINK, "--name", "lab/*")
    assert modelp2p(*add, "--peer", "a:1", "--peer", "[::1]:5", "--timeout", "1.5", daemon=daemon) == 0
    assert daemon.asked[0].args == {"ref": LINK, "name": "lab/*", "peers": ["a:1", "[::1]:5"], "timeout_s": 2}


@pytest.mark.parametrize("verb", [("fetch", LINK), ("trust", "add", LINK, "--name", "lab/*")], ids=["fetch", "trust add"])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e10", "1000000000.5", "soon", ""])
def test_a_timeout_that_is_none_is_a_usage_error(verb: tuple[str, ...], seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({})
    assert modelp2p(*verb, f"--timeout={seconds}", daemon=daemon) == 2
    assert "--timeout" in capsys.readouterr().err
    assert not daemon.asked


def test_trust_list_and_remove(capsys: pytest.CaptureFixture[str]) -> None:
    entries: Map = {"entries": [{"name": "lab/*", "publisher": PUBLISHER}]}
    assert modelp2p("trust", "list", daemon=FakeDaemon({"trust_list": entries})) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"lab/*  {PUBLISHER}"
    assert modelp2p("trust", "list", "--json", daemon=FakeDaemon({"trust_list": entries})) == 0
    assert json.loads(capsys.readouterr().out) == {"v": 1, **entries}
    daemon = FakeDaemon({"trust_remove": {"removed": 1}})
    assert modelp2p("trust", "remove", PUBLISHER, "--name", "lab/*", daemon=daemon) == 0
    assert modelp2p("trust", "remove", PUBLISHER, daemon=daemon) == 0
    assert [asked.args for asked in daemon.asked] == [{"publisher": PUBLISHER, "name": "lab/*"}, {"publisher": PUBLISHER}]
    assert modelp2p("trust", "remove", "lab/model", daemon=daemon) == 2


def test_seed_asks_a_daemon_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({"seed": {"releases": [f"lab/model@{REVISION}"], "listen_port": 16881}})
    assert modelp2p("seed", "lab/model", LINK, "--max-up", "1M", "--peer", "a:1", daemon=daemon) == 0
    assert daemon.asked[0].args == {"refs": ["lab/model", LINK], "peers": ["a:1"], "max_up": 1_000_000}
    output = capsys.readouterr()
    assert output.out == f"lab/model@{REVISION}\n"
    assert "A daemon runs already (port 16881)" in output.err
