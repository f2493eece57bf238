from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from modelp2p.cli.main import VERBS, cli
from modelp2p.protocol.errors import Kind, ModelP2PError, NoSpaceError, StoreError, error_of
from tests.cli.fakes import FETCHED, LINK, RELEASE, FakeDaemon, failing, modelp2p

if TYPE_CHECKING:
    from pathlib import Path

# What makes a command slow to start. click, importlib and json are all that --help may need of size.
HEAVY = ("trio", "torch", "rich", "cryptography", "tuf", "libtorrent", "msgpack", "platformdirs")

EXIT_CODES = {
    Kind.OTHER: 1,
    Kind.USAGE: 2,
    Kind.NOT_FOUND: 3,
    Kind.BAD_SIGNATURE: 4,
    Kind.BAD_HASH: 4,
    Kind.UNKNOWN_PUBLISHER: 4,
    Kind.TIMED_OUT: 5,
    Kind.NETWORK: 6,
    Kind.INTERRUPTED: 7,
    Kind.DAEMON_UNREACHABLE: 8,
    Kind.NO_SPACE: 9,
    Kind.DENIED: 10,
    Kind.PARTIAL: 11,
    Kind.ROLLBACK: 20,
    Kind.EXPIRED: 21,
    Kind.WITHDRAWN: 22,
    Kind.EQUIVOCATION: 23,
    Kind.POLICY: 24,
}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fetch", "--help"], ["status", "--help"], ["keys", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from modelp2p.cli.main import main; sys.argv[1:] = " + repr(arguments) + "; code = main();"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_there_and_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p(verb, "--help") == 0
    assert f"modelp2p {verb}" in capsys.readouterr().out
    command = cli.get_command(cli.make_context("modelp2p", [verb], resilient_parsing=True), verb)
    assert command is not None
    assert command.help


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_exit_code_and_json_of_every_kind(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(kind.name, "it went wrong", "Do this.", {"path": "x"})
    # Kinds that no class of this version raises arrive as the root class; the table above still fixes their codes.
    expected = error.kind
    assert EXIT_CODES[kind] == kind.exit_code
    assert modelp2p("fetch", LINK, "--json", daemon=failing(error)) == EXIT_CODES[expected]
    output = capsys.readouterr()
    assert json.loads(output.out) == {
        "v": 1,
        "error": {
            "code": EXIT_CODES[expected],
            "kind": expected.name,
            "message": "it went wrong",
            "hint": "Do this.",
            "facts": {"path": "x"},
        },
    }
    assert output.err == ""


def test_an_error_is_one_line_and_a_hint_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("fetch", LINK, daemon=failing(NoSpaceError("the disk is full", hint="Free 3 GB."))) == 9
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "error: the disk is full\nHint: Free 3 GB.\n")


def test_what_a_stranger_named_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = {**RELEASE, "name": "lab/\x1b[2Jmodel\u202e", "files": 1}
    assert modelp2p("ls", daemon=FakeDaemon({"ls": {"releases": [evil]}})) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert r"lab/\x1b[2Jmodel\u202e" in out
    assert modelp2p("ls", "--json", daemon=FakeDaemon({"ls": {"releases": [evil]}})) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert json.loads(out)["releases"][0]["name"] == evil["name"]


@pytest.mark.parametrize(
    ("typed", "meant"), [("fecth", "fetch"), ("pull", "fetch"), ("download", "fetch"), ("stauts", "status"), ("fsck", "verify")]
)
def test_an_unknown_verb_names_the_one_that_was_meant(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p(typed) == 2
    assert f"Did you mean 'modelp2p {meant}'?" in capsys.readouterr().err


def test_usage_errors_follow_the_form_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("fetch", LINK, "--timout", "3", "--json") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["kind"]) == (2, "USAGE")
    assert "--timeout" in error["message"]
    assert modelp2p("fetch") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: Missing argument 'REF'.\nHint: Try 'modelp2p fetch --help'.")


BAD_VALUES = {
    "peer without port": ("--peer", "localhost"),
    "peer with port 0": ("--peer", "localhost:0"),
    "rate in bits": ("--max-up", "200Mbit"),
    "negative rate": ("--max-down", "-1"),
    "no time": ("--timeout", "0"),
}


@pytest.mark.parametrize("flags", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_wrong_value_is_a_usage_error_before_anything_starts(flags: tuple[str, str]) -> None:
    daemon = FakeDaemon({}, is_running=False)
    assert modelp2p("fetch", LINK, *flags, daemon=daemon) == 2
    assert daemon.started_with is None


def test_without_a_verb_the_help_is_shown_and_it_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p() == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Commands:" in output.err.splitlines()


def test_a_bug_is_one_line_unless_debugging(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("ls", daemon=FakeDaemon({"ls": ValueError("oops")})) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: internal error: ValueError: oops"
    assert "MODELP2P_DEBUG=1" in lines[1]
    assert len(lines) == 2
    assert modelp2p("ls", daemon=FakeDaemon({"ls": ValueError("oops")}), env={"MODELP2P_DEBUG": "1"}) == 1
    assert "Traceback (most recent call last):" in capsys.readouterr().err


def test_a_reply_of_another_shape_is_the_daemons_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("fetch", LINK, "-q", daemon=FakeDaemon({"fetch": {"state": "complete"}})) == 8
    assert "no 'path'" in capsys.readouterr().err


def test_ctrl_c_in_a_verb_that_is_no_fetch_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({"ls": KeyboardInterrupt()})
    assert modelp2p("ls", daemon=daemon) == 130
    assert "error: Interrupted.\n" in capsys.readouterr().err
    assert daemon.closed == 1


def test_errno_decides_where_nobody_translated(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("ls", daemon=FakeDaemon({"ls": OSError(28, "No space left on device")})) == 9
    assert modelp2p("ls", daemon=FakeDaemon({"ls": PermissionError(13, "Permission denied", "/x")})) == 10
    assert "error: /x: Permission denied" in capsys.readouterr().err


def in_process(code: str, stdout: int) -> subprocess.Popen[bytes]:
    """A command line in a process of its own, against the fake daemon."""
    script = f"import os, sys\nfrom tests.cli.fakes import *\nfrom modelp2p.cli.main import *\n{code}"
    return subprocess.Popen([sys.executable, "-c", script], stdout=stdout, stderr=subprocess.PIPE)


def test_a_reader_that_had_enough_ends_the_output_silently() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "rows = [dict(RELEASE, files=1)] * 5000\nsys.exit(modelp2p('ls', daemon=FakeDaemon({'ls': {'releases': rows}})))"
    process = in_process(code, stdout=write)
    os.close(write)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, b"")


def test_a_result_that_cannot_be_written_is_an_error() -> None:
    with open("/dev/full", "wb") as full:
        process = in_process(
            "sys.exit(modelp2p('fetch', LINK, '-q', daemon=FakeDaemon({'fetch': FETCHED})))", stdout=full.fileno()
        )
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == StoreError.kind.exit_code
    assert stderr.startswith(b"error: cannot write the result: No space left on device")


def test_sigterm_interrupts_a_fetch_as_ctrl_c_does() -> None:
    code = """
import time, modelp2p.cli.main as main
def slow(args, fds):
    print("waiting", flush=True)
    time.sleep(60)
main.SocketConnector = lambda: FakeDaemon({"fetch": slow})
sys.argv[1:] = ["fetch", LINK]
sys.exit(main.main())
"""
    process = in_process(code, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 7
    assert b"Run the same command again to resume." in stderr


def test_home_is_flag_then_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({}, is_running=False)
    for arguments in (("--home", str(tmp_path), "status"), ("status", "--home", str(tmp_path))):
        assert modelp2p(*arguments, daemon=daemon) == 8
        assert f"no daemon is running for {tmp_path}" in capsys.readouterr().err
    assert modelp2p("status", daemon=daemon, env={"MODELP2P_HOME": "/elsewhere"}) == 8
    assert "no daemon is running for /elsewhere" in capsys.readouterr().err


def test_status_and_watching_never_start_a_daemon() -> None:
    daemon = FakeDaemon({}, is_running=False)
    assert modelp2p("status", "-w", daemon=daemon) == 8
    assert daemon.started_with is None


def test_a_verb_that_may_start_a_daemon_says_so_and_hands_it_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({"fetch": FETCHED}, is_running=False)
    assert modelp2p("fetch", LINK, "--listen", "127.0.0.1:0", "--profile", "lan", daemon=daemon) == 0
    assert daemon.started_with is not None
    assert 'listen = ["127.0.0.1:0"]' in daemon.started_with
    assert 'profile = "lan"' in daemon.started_with
    assert "No daemon was running: started one for this command (pid 4321)." in capsys.readouterr().err
    assert daemon.closed == 1


def test_flags_for_a_daemon_that_runs_already_are_not_ignored_silently(capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("fetch", LINK, "--profile", "lan", daemon=FakeDaemon({"fetch": FETCHED})) == 0
    assert "A daemon runs already: network.profile" in capsys.readouterr().err


def test_no_error_class_is_missing_from_the_tree() -> None:
    assert set(EXIT_CODES) == set(Kind)
    assert ModelP2PError.kind is Kind.OTHER
    assert FETCHED["state"] == "complete"
