"""What a shell is offered behind a Tab, by its own script or by the variables that the script sets."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from click.types import StringParamType

from modelp2p.cli.completion import with_values
from modelp2p.cli.main import VERBS, cli
from modelp2p.protocol.errors import DeniedError
from tests.cli.fakes import PUBLISHER, RELEASE, FakeDaemon, FakeReply, modelp2p

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

OTHER = "mp1" + "b" * 52
LS: Map = {
    "releases": [
        {**RELEASE, "name": "lab/model"},
        {**RELEASE, "name": "lab/two", "revision": "a" * 40, "proven": 1_500_000, "state": "fetching"},
        {**RELEASE, "name": "lab/two", "revision": "b" * 40},
    ]
}
TRUSTED: Map = {"entries": [{"name": "lab/*", "publisher": OTHER}]}


def node() -> FakeDaemon:
    return FakeDaemon({"ls": LS, "trust_list": TRUSTED})


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    assert modelp2p("keys", "init", "mine", "--no-passphrase", "-q", env={"MODELP2P_KEYS": str(tmp_path / "keys")}) == 0
    return tmp_path / "keys"


def offered(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str, daemon: FakeDaemon) -> list[str]:
    """What bash is answered when the last of the words is being typed."""
    for name, value in {
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_MODELP2P_COMPLETE": "bash_complete",
    }.items():
        monkeypatch.setenv(name, value)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        modelp2p(daemon=daemon)
    output = capfd.readouterr()
    assert (ended.value.code, output.err) == (0, "")
    return [line for line in output.out.splitlines() if line]


OFFERED: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "verb": (("modelp2p", "sho"), ["plain,show"]),
    "verb behind a flag": (("modelp2p", "--home", "/h", "unp"), ["plain,unpin"]),
    "verb below a verb": (("modelp2p", "trust", "a"), ["plain,add"]),
    "flag": (("modelp2p", "show", "--lin"), ["plain,--lineage"]),
    "choice": (("modelp2p", "fetch", "--profile", "w"), ["plain,wan"]),
    "releases": (
        ("modelp2p", "show", ""),
        ["plain,lab/model", "plain,lab/two", "plain,lab/two@aaaaaaaaaaaa", "plain,lab/two@bbbbbbbbbbbb"],
    ),
    "release": (("modelp2p", "rm", "lab/m"), ["plain,lab/model"]),
    "revision": (("modelp2p", "verify", "lab/model@"), ["plain,lab/model@0123456789ab"]),
    "releases, one after another": (("modelp2p", "seed", "lab/model", "lab/m"), ["plain,lab/model"]),
    "release behind a flag": (("modelp2p", "fetch", "--max-up", "1M", "lab/m"), ["plain,lab/model"]),
    "bundle": (("modelp2p", "fetch", "./x"), ["file,./x"]),
    "bundle in this folder": (("modelp2p", "fetch", "x.m"), ["file,x.m"]),
    "bundle to trust": (("modelp2p", "trust", "add", ""), ["file,"]),
    "folder": (("modelp2p", "fetch", "lab/model", "--local-dir", "a"), ["dir,a"]),
    "file": (("modelp2p", "config", "validate", "a"), ["file,a"]),
    "key": (("modelp2p", "publish", "--key", ""), ["plain,mine"]),
    "key to show": (("modelp2p", "keys", "show", "m"), ["plain,mine"]),
    "publishers": (("modelp2p", "trust", "remove", ""), [f"plain,{PUBLISHER}", f"plain,{OTHER}"]),
    "publisher": (("modelp2p", "load", "lab/model", "--publisher", "mp1b"), [f"plain,{OTHER}"]),
    "a new name": (("modelp2p", "keys", "init", ""), []),
}


@pytest.mark.parametrize(("words", "answer"), OFFERED.values(), ids=OFFERED)
def test_what_is_offered(
    words: tuple[str, ...],
    answer: list[str],
    keys: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MODELP2P_KEYS", str(keys))
    assert offered(monkeypatch, capfd, *words, daemon=node()) == answer


def never(args: Map, fds: Sequence[int]) -> FakeReply:
    threading.Event().wait(60)
    return FakeReply(LS)


SILENT: dict[str, FakeDaemon] = {
    "none runs": FakeDaemon({}, is_running=False),
    "it refuses": FakeDaemon({"ls": DeniedError("not for you")}),
    "it says something else": FakeDaemon({"ls": {"releases": [{"name": 3}]}}),
    "it hangs": FakeDaemon({"ls": never}),
}


@pytest.mark.parametrize("daemon", SILENT.values(), ids=SILENT)
@pytest.mark.slow
def test_without_an_answer_nothing_is_offered_started_or_said(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODELP2P_HOME", str(tmp_path))
    assert offered(monkeypatch, capfd, "modelp2p", "show", "", daemon=daemon) == []
    assert daemon.started_with is None


def test_the_service_of_the_machine_is_asked_as_well_and_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MODELP2P_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    daemon = FakeDaemon({}, is_running=False, service=node())
    assert offered(monkeypatch, capfd, "modelp2p", "show", "lab/m", daemon=daemon) == ["plain,lab/model"]


def parameters(command: click.Command, path: str) -> Iterator[tuple[str, click.Parameter]]:
    """Every parameter of a command and of those below it."""
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        yield from parameters(below, f"{path} {below.name}")
    for param in command.params:
        yield path, param


FREE_TEXT = {"keys init name", "trust add name", "trust remove name"}
"""Arguments and options called like something that is known, which are not."""


def test_every_reference_file_and_folder_of_every_verb_is_completed() -> None:
    plain = []
    context = click.Context(cli, resilient_parsing=True)
    for verb in VERBS:
        command = cli.get_command(context, verb)
        assert command is not None
        for path, param in parameters(command, verb):
            is_known = isinstance(param, click.Argument) or param.metavar in ("DIR", "FILE", "PATH")
            if is_known and type(param.type) is StringParamType:
                plain.append(f"{path} {param.name}")
    assert set(plain) <= FREE_TEXT


def test_what_a_command_parses_stays_the_same() -> None:
    seen = []

    @click.command()
    @click.argument("ref")
    @click.option("--key")
    def verb(ref: str, key: str | None) -> None:
        seen.append((ref, key))

    with_values(verb)
    verb.main(["lab/model", "--key", "a"], standalone_mode=False)
    verb.main(["x"], standalone_mode=False)
    assert seen == [("lab/model", "a"), ("x", None)]


def test_each_shell_gets_its_form(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    answers = {}
    for shell, cword in (("zsh", "2"), ("fish", "lab/m")):
        for name, value in {
            "COMP_WORDS": "modelp2p show lab/m",
            "COMP_CWORD": cword,
            "_MODELP2P_COMPLETE": f"{shell}_complete",
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit):
            modelp2p(daemon=node())
        answers[shell] = capfd.readouterr().out
    assert answers["zsh"] == "plain\nlab/model\ncomplete, 100.0 % of 3.0 MB\n"
    assert answers["fish"] == "plain,lab/model\tcomplete, 100.0 % of 3.0 MB\n"


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", "complete -o nosort -F _modelp2p_completion modelp2p"),
        ("zsh", "#compdef modelp2p"),
        ("fish", "complete --no-files --command modelp2p"),
    ],
)
def test_the_script_is_printed(shell: str, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("completion", shell) == 0
    script = capfd.readouterr().out
    assert line in script
    assert f"_MODELP2P_COMPLETE={shell}_complete" in script


def test_a_shell_that_is_not_known_is_a_usage_error() -> None:
    assert modelp2p("completion", "csh") == 2


TYPED = """
eval "$(modelp2p completion bash)"
complete -p modelp2p
COMP_WORDS=(modelp2p trust rem) COMP_CWORD=2
_modelp2p_completion modelp2p
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.slow
def test_bash_itself_completes_with_it(tmp_path: Path) -> None:
    program = tmp_path / "modelp2p"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m modelp2p.cli.main "$@"\n')
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODELP2P_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "--norc", "-c", TYPED], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["complete -o nosort -F _modelp2p_completion modelp2p", "remove"]
    assert done.stderr == ""
