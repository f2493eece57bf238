from __future__ import annotations

import io
import json
import os
import re
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from modelp2p.cli.progress import Progress, Situation
from modelp2p.protocol.errors import PolicyError
from tests.cli.fakes import FETCHED, LINK, PATH, PLAN, PLANNED_FILES, PUBLISHER, REVISION, FakeDaemon, modelp2p, plans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from modelp2p.protocol.codec import Map

FETCH_KEYS = ["v", "path", "name", "revision", "info_hash", "publisher", "state", "bytes", "from_peers", "from_web", "seconds"]
HALF: Map = {"phase": "fetching", "done": 1_246_500, "total": 1_500_000, "rate_down": 250_000, "rate_up": 1000, "peers": 3}


def fetching(**changes: object) -> FakeDaemon:
    return FakeDaemon({"fetch": {**FETCHED, **changes}})  # type: ignore[dict-item]  # tests give values the protocol carries


def test_json_has_the_keys_of_the_contract_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("fetch", LINK, "--json", daemon=fetching()) == 0
    body = json.loads(capsys.readouterr().out)
    assert list(body)[: len(FETCH_KEYS)] == FETCH_KEYS
    assert (body["v"], body["path"], body["seconds"]) == (1, FETCHED["path"], 1.5)
    assert "milliseconds" not in body


def test_quiet_prints_only_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = fetching()
    daemon.is_running = False
    assert modelp2p("fetch", LINK, "-q", daemon=daemon) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == (f"{PATH}\n", "")


def test_the_result_is_on_stdout_and_says_who_signed(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("fetch", LINK, daemon=fetching(name_verified=False)) == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        f"Path:      {PATH}",
        f"Release:   lab/model@{REVISION}",
        f"Signed by: {PUBLISHER} (name not verified: nobody is trusted for it here)",
        "Status:    complete: 3.0 MB from peers in 1.5 s, 2.0 MB/s",
    ]
    assert output.err == ""


def test_a_second_fetch_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("fetch", LINK, daemon=fetching(from_peers=0)) == 0
    assert "Status:    complete: up to date, 3.0 MB" in capsys.readouterr().out


def test_every_flag_reaches_the_daemon() -> None:
    daemon = fetching()
    flags = "--include *.json --include b/ --exclude *.bin --peer 127.0.0.1:16881 --peer [::1]:5 --timeout 1.5 --no-web-seed"
    assert (
        modelp2p(
            "fetch",
            "lab/model",
            *flags.split(),
            "--allow-code",
            "--no-seed",
            "--max-up",
            "200M",
            "--max-down",
            "1Ki",
            daemon=daemon,
        )
        == 0
    )
    (asked,) = daemon.asked
    assert asked.args == {
        "ref": "lab/model",
        "include": ["*.json", "b/"],
        "exclude": ["*.bin"],
        "peers": ["127.0.0.1:16881", "[::1]:5"],
        "timeout_s": 2,
        "peers_only": True,
        "allow_code": True,
        "seed": False,
        "dry_run": False,
        "detach": False,
        "max_up": 200_000_000,
        "max_down": 1024,
    }


def test_what_is_not_said_is_left_to_the_daemon() -> None:
    daemon = fetching()
    assert modelp2p("fetch", "lab/model", daemon=daemon) == 0
    assert not {"timeout_s", "max_up", "max_down"} & set(daemon.asked[0].args)


def test_revision_completes_a_name_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = fetching()
    assert modelp2p("fetch", "lab/model", "--revision", REVISION, daemon=daemon) == 0
    assert daemon.asked[0].args["ref"] == f"lab/model@{REVISION}"
    assert modelp2p("fetch", LINK, "--revision", REVISION, daemon=daemon) == 2
    assert modelp2p("fetch", "lab/model@0000000", "--revision", REVISION, daemon=daemon) == 2
    assert "--revision goes with a plain org/model" in capsys.readouterr().err


def test_a_bundle_travels_as_a_descriptor_never_as_a_path(tmp_path: Path) -> None:
    bundle = tmp_path / "x.modelp2p"
    bundle.write_bytes(b"statement")
    daemon = fetching()
    assert modelp2p("fetch", str(bundle), daemon=daemon) == 0
    (asked,) = daemon.asked
    assert (asked.args["ref"], asked.args["bundle"], asked.contents) == ("", True, [b"statement"])


REFUSED = {
    "missing bundle": ("./nowhere.modelp2p", 3),
    "bare magnet": ("magnet:?xt=urn:btmh:1220" + "0" * 64, 4),
    "torrent": ("model.torrent", 4),
    "not a name": ("a/b/c", 2),
    "publisher id": (PUBLISHER, 3),
}


@pytest.mark.parametrize(("ref", "code"), REFUSED.values(), ids=REFUSED.keys())
def test_a_reference_that_cannot_be_is_refused_before_a_daemon_is_started(
    ref: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = FakeDaemon({}, is_running=False)
    assert modelp2p("fetch", ref, daemon=daemon) == code
    assert daemon.started_with is None
    if code != 3 or ref == PUBLISHER:
        assert "Hint: " in capsys.readouterr().err


def test_ctrl_c_is_exit_7_and_says_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({"fetch": KeyboardInterrupt()}, events=[HALF])
    assert modelp2p("fetch", LINK, daemon=daemon) == 7
    assert capsys.readouterr().err == (
        "error: Interrupted at 83.1 %; what is verified is kept.\nHint: Run the same command again to resume.\n"
    )
    assert daemon.closed == 1


def test_detach_leaves_an_on_demand_daemon_alone(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = fetching(state="queued")
    daemon.is_running = False
    assert modelp2p("fetch", LINK, "--detach", daemon=daemon) == 0
    assert daemon.detached == 1
    assert "queued" in capsys.readouterr().out


def test_dry_run_shows_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("fetch", LINK, "--dry-run", daemon=plans()) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[:3] == ["FILE           SIZE  HERE", "a.safetensors  10 B  10 B", "b.safetensors  20 B   0 B"]
    assert "nothing was fetched" in output.err
    assert modelp2p("fetch", LINK, "--dry-run", "-q", daemon=plans()) == 0
    assert capsys.readouterr().out == "b.safetensors\n"
    assert modelp2p("fetch", LINK, "--dry-run", "--json", daemon=plans()) == 0
    assert json.loads(capsys.readouterr().out) == {"v": 1, **PLAN, "files": PLANNED_FILES}


def test_dry_run_of_a_daemon_that_sends_no_plan_is_exit_8() -> None:
    assert modelp2p("fetch", LINK, "--dry-run", daemon=FakeDaemon({"fetch": PLAN})) == 8


def test_adopt_sends_the_folder_or_the_file_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"bytes")
    daemon = FakeDaemon({"adopt": {**FETCHED, "adopted": 5}})
    assert modelp2p("adopt", LINK, str(tmp_path), daemon=daemon) == 0
    assert modelp2p("adopt", LINK, str(file), daemon=daemon) == 0
    folder, single = daemon.asked
    assert "file_name" not in folder.args
    assert (single.args["file_name"], single.contents) == ("a.safetensors", [b"bytes"])
    assert "Adopted:   5 B" in capsys.readouterr().out
    assert modelp2p("adopt", LINK, str(tmp_path / "nothing"), daemon=daemon) == 3


def test_policy_is_exit_24(capsys: pytest.CaptureFixture[str]) -> None:
    error = PolicyError("model.py runs code", hint="Use --allow-code if you trust it.")
    assert modelp2p("fetch", LINK, daemon=FakeDaemon({"fetch": error})) == 24


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A visible tree as the store has it: read-only files behind a symlink."""
    folder = tmp_path / "store" / REVISION
    (folder / "sub").mkdir(parents=True)
    for name in ("model.safetensors", "sub/config.json"):
        (folder / name).write_bytes(name.encode() * 1000)
        (folder / name).chmod(0o444)
    link = tmp_path / "visible"
    link.symlink_to(folder)
    return link


def test_local_dir_gets_files_of_its_own(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = tmp_path / "mine"
    assert modelp2p("fetch", LINK, "--local-dir", str(local), "--json", daemon=fetching(path=str(tree))) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["path"], body["store_path"]) == (str(local), str(tree))
    for name in ("model.safetensors", "sub/config.json"):
        ours, theirs = local / name, tree / name
        assert ours.read_bytes() == theirs.read_bytes()
        assert ours.stat().st_ino != theirs.stat().st_ino
        assert stat.S_IMODE(ours.stat().st_mode) & 0o200
    assert modelp2p("fetch", LINK, "--local-dir", str(local), "-q", daemon=fetching(path=str(tree))) == 0
    assert capsys.readouterr().out == f"{local}\n"


def test_local_dir_takes_only_what_was_selected(tree: Path, tmp_path: Path) -> None:
    local = tmp_path / "mine"
    assert modelp2p("fetch", LINK, "--include", "*.json", "--local-dir", str(local), daemon=fetching(path=str(tree))) == 0
    assert [path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()] == ["sub/config.json"]


def test_local_dir_never_replaces_other_content(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = tmp_path / "mine"
    (local / "sub").mkdir(parents=True)
    (local / "sub/config.json").write_text("mine")
    assert modelp2p("fetch", LINK, "--local-dir", str(local), daemon=fetching(path=str(tree))) == 1
    assert "other content" in capsys.readouterr().err
    assert (local / "sub/config.json").read_text() == "mine"
    assert not (local / "model.safetensors").exists()


def test_local_dir_follows_no_symlink_out(tree: Path, tmp_path: Path) -> None:
    local, outside = tmp_path / "mine", tmp_path / "outside"
    outside.mkdir()
    local.mkdir()
    (local / "sub").symlink_to(outside)
    assert modelp2p("fetch", LINK, "--local-dir", str(local), daemon=fetching(path=str(tree))) == 1
    assert list(outside.iterdir()) == []


def test_plain_progress_is_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 5.0, 10.0, 12.0, 20.5])
    with Progress("plain", lambda: next(times)) as progress:
        for _ in range(4):
            progress.on_event(HALF)
    line = "fetching 83.1 %, 1.2 MB of 1.5 MB, 250.0 kB/s, up 1.0 kB/s, 3 peers, 1 s left"
    assert capsys.readouterr().err.splitlines() == [line, line]


def test_progress_never_says_100_before_it_is_true() -> None:
    situation = Situation()
    situation.update({"phase": "fetching", "done": 10**12 - 1, "total": 10**12})
    assert situation.percent == "99.9 %"
    situation.update({"done": 10**12})
    assert situation.percent == "100.0 %"


def test_a_note_cannot_steer_the_terminal() -> None:
    situation = Situation()
    situation.update({"phase": "a\x1b[2J", "note": "b\x07", "origin": "c\x1b"})
    assert situation.line == r"a\x1b[2J, b\x07, c\x1b"


def test_progress_says_what_came_from_the_web_and_which_web_seed_rests() -> None:
    situation = Situation()
    situation.update({"phase": "fetching", "peers": 0, "web": 2_000_000, "origin": "origin huggingface.co: 429 until 14:02"})
    assert situation.line == "fetching, 0 peers, 2.0 MB from the web, origin huggingface.co: 429 until 14:02"
    situation.update({"phase": "fetching", "origin": ""})
    assert situation.line == "fetching, 0 peers, 2.0 MB from the web"


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, *, columns: int) -> Iterator[Callable[[], str]]:
    """Stderr is a terminal of so many columns for the time of the block; gives a function that reads what it shows."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")

    def shown() -> str:
        data = b""
        # The kernel hands out a terminal's output in small parts.
        with suppress(BlockingIOError):
            while part := os.read(ours, 1 << 16):
                data += part
        return data.decode()

    with io.TextIOWrapper(io.FileIO(theirs, "w"), encoding="utf-8", write_through=True) as stream, monkeypatch.context() as patch:
        # Here and not in a fixture: between the two pytest puts its own stream in place.
        patch.setattr("sys.stderr", stream)
        yield shown
    os.close(ours)


WIDTHS = {20: ("fetching 83.1 %", "1.5 MB"), 60: ("250.0 kB/s", "\u2501"), 120: ("3 peers", "Traceback")}


@pytest.mark.parametrize(("columns", "here", "absent"), [(width, *texts) for width, texts in WIDTHS.items()])
def test_the_bar_fits_the_terminal(columns: int, here: str, absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = FakeDaemon({"fetch": FETCHED}, events=[HALF] * 3)
    with terminal(monkeypatch, columns=columns) as shown:
        assert modelp2p("fetch", LINK, daemon=daemon) == 0
        text = shown()
    assert here in text
    assert absent not in text
    # Gone at the end: the last thing sent erases the line.
    assert text.rstrip().endswith("\x1b[2K")


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = FakeDaemon({"fetch": FETCHED}, events=[HALF])
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal(monkeypatch, columns=120) as shown:
        assert modelp2p("fetch", LINK, daemon=daemon) == 0
        assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown())


@pytest.mark.parametrize(("mode", "code"), [("off", 0), ("plain", 0), ("fancy", 2)])
def test_the_environment_chooses_the_progress(mode: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = FakeDaemon({"fetch": FETCHED}, events=[HALF])
    with terminal(monkeypatch, columns=80) as shown:
        assert modelp2p("fetch", LINK, daemon=daemon, env={"MODELP2P_PROGRESS": mode}) == code
        text = shown()
    assert "\x1b" not in text
    assert ("MODELP2P_PROGRESS" in text) == (code == 2)


def test_quiet_shows_no_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, columns=80) as shown:
        assert modelp2p("fetch", LINK, "-q", daemon=FakeDaemon({"fetch": FETCHED}, events=[HALF])) == 0
        assert shown() == ""
