"""`import` up to the daemon: which export is meant, what is asked for, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from modelp2p.cli.importing import find_export
from modelp2p.protocol import exported
from modelp2p.protocol.errors import NotFoundError, PartialError, UnknownPublisherError, UsageError
from modelp2p.protocol.job import MAX_PATTERNS
from modelp2p.protocol.statement import encode_bundle, verify_statement
from tests.cli.fakes import FETCHED, PATH, Asked, FakeDaemon, FakeReply, modelp2p
from tests.releases import publisher, statement_of, write_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from modelp2p.protocol.codec import Map

FILES = {"config.json": b"{}", "odd [1]*?.safetensors": b"weights", "sub/more.safetensors": b"more"}
STATEMENT = statement_of(FILES)
RELEASE = verify_statement(STATEMENT)
REVISION = RELEASE.manifest.revision
RESULT: Map = {**FETCHED, "from_peers": 0, "adopted": 3_000_000}


@dataclass
class Stick:
    """An export on a disk, and the daemon that is asked to take it in."""

    path: Path
    daemon: FakeDaemon = field(default_factory=lambda: FakeDaemon({"adopt": RESULT}))

    @property
    def base(self) -> Path:
        return self.path / "lab--model"

    @property
    def folder(self) -> Path:
        return self.base / REVISION

    @property
    def bundle(self) -> Path:
        return self.base / f"{REVISION}.modelp2p"

    def sums(self, *paths: str) -> None:
        digests = {entry.path: entry.sha256 for entry in RELEASE.manifest.files if entry.path in paths}
        (self.base / f"{REVISION}.sha256").write_bytes(exported.encode_sums(digests))

    def run(self, *args: str, path: Path | None = None) -> int:
        return modelp2p("import", str(path or self.path), "--no-hf-cache", *args, daemon=self.daemon)

    @property
    def asked(self) -> Asked:
        return self.daemon.asked[-1]


@pytest.fixture
def stick(tmp_path: Path) -> Stick:
    made = Stick(tmp_path / "stick")
    write_files(made.folder, FILES)
    made.bundle.write_bytes(encode_bundle(STATEMENT))
    made.sums(*FILES)
    return made


def test_the_daemon_gets_the_bundle_and_the_folder_and_no_network(stick: Stick, capsys: pytest.CaptureFixture[str]) -> None:
    opened = []

    def adopt(args: Map, fds: Sequence[int]) -> FakeReply:
        opened.append(os.readlink(f"/proc/self/fd/{fds[1]}"))
        return FakeReply(dict(RESULT))

    stick.daemon = FakeDaemon({"adopt": adopt})
    assert stick.run("--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert list(body)[:11] == [
        "v", "path", "name", "revision", "info_hash", "publisher", "state", "bytes", "from_peers", "from_web", "seconds",
    ]  # fmt: skip
    assert (body["adopted"], body["seconds"], body["hf_cache"]) == (3_000_000, 1.5, None)
    assert stick.asked.args == {"ref": "", "bundle": True, "offline": True, "allow_code": False, "seed": True}
    assert (stick.asked.contents[0], opened) == (encode_bundle(STATEMENT), [str(stick.folder)])
    assert stick.run("-q") == 0
    assert capsys.readouterr() == (f"{PATH}\n", "")
    assert stick.run("--allow-code", "--no-seed", "--publisher", publisher().id) == 0
    given = {"allow_code": True, "seed": False, "publisher": publisher().id}
    assert stick.asked.args == {"ref": "", "bundle": True, "offline": True, **given}
    assert "complete: 3.0 MB taken in and verified in 1.5 s" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["", "lab--model", f"lab--model/{REVISION}", f"lab--model/{REVISION}.modelp2p"])
def test_an_export_is_found_by_any_part_of_it(stick: Stick, part: str) -> None:
    # What other systems leave beside everything.
    (stick.base / f"._{REVISION}.modelp2p").write_bytes(b"")
    found = find_export(str(stick.path / part))
    assert (found.bundle, found.folder) == (str(stick.bundle), str(stick.folder))
    assert found.sums == str(stick.base / f"{REVISION}.sha256")


def test_a_bundle_among_its_files_is_an_export_too(stick: Stick) -> None:
    inside = stick.folder / "release.modelp2p"
    stick.bundle.rename(inside)
    for path in (stick.folder, inside):
        found = find_export(str(path))
        assert (found.bundle, found.folder) == (str(inside), str(stick.folder))


def test_none_or_several_are_no_export(stick: Stick) -> None:
    with pytest.raises(NotFoundError, match="no exported release"):
        find_export(str(stick.path / "nowhere"))
    with pytest.raises(NotFoundError, match="no exported release"):
        find_export(str(stick.folder / "config.json"))
    (stick.base / f"{'0' * 40}.modelp2p").write_bytes(b"")
    with pytest.raises(UsageError, match="holds 2 exports"):
        find_export(str(stick.path))
    assert find_export(str(stick.folder)).folder == str(stick.folder)
    stick.bundle.unlink()
    with pytest.raises(NotFoundError):
        find_export(str(stick.path / "lab--model" / "sub"))


def test_what_was_exported_is_what_is_asked_for(stick: Stick) -> None:
    stick.sums("config.json", "sub/more.safetensors")
    assert stick.run() == 0
    assert stick.asked.args["exclude"] == ["odd [[]1][*][?].safetensors"]
    assert "include" not in stick.asked.args
    assert stick.run("--include", "*.json") == 0
    assert (stick.asked.args["include"], stick.asked.args["exclude"]) == (["*.json"], [])
    (stick.base / f"{REVISION}.sha256").unlink()
    assert stick.run() == 0
    assert not {"include", "exclude"} & stick.asked.args.keys()


@pytest.mark.parametrize(("exported_files", "key"), [(range(1), "include"), (range(1, MAX_PATTERNS + 2), "exclude")])
def test_of_many_files_the_shorter_list_is_sent(stick: Stick, exported_files: range, key: str) -> None:
    statement = statement_of({f"{number:04}.json": b"%d" % number for number in range(MAX_PATTERNS + 2)})
    release = verify_statement(statement)
    stick.bundle.write_bytes(encode_bundle(statement))
    digests = {entry.path: entry.sha256 for entry in release.manifest.files}
    listed = {f"{number:04}.json": digests[f"{number:04}.json"] for number in exported_files}
    (stick.base / f"{REVISION}.sha256").write_bytes(exported.encode_sums(listed))
    assert stick.run() == 0
    assert stick.asked.args[key] == ["0000.json"]


BAD_SUMS = {
    "another release's": b"0" * 64 + b"  config.json\n",
    "empty": b"",
    "cut": b"0" * 64 + b"  conf",
    "not text": b"\xff\n",
}


@pytest.mark.parametrize("what", BAD_SUMS)
def test_a_bad_list_of_sums_is_not_guessed_around(stick: Stick, capsys: pytest.CaptureFixture[str], what: str) -> None:
    (stick.base / f"{REVISION}.sha256").write_bytes(BAD_SUMS[what])
    assert stick.run() == 1
    assert "--include" in capsys.readouterr().err
    assert not stick.daemon.asked
    assert stick.run("--include", "*") == 0


BENT = {
    "cut": encode_bundle(STATEMENT)[:-1],
    "empty": b"",
    "flipped": encode_bundle(STATEMENT).replace(b"lab/model", b"lab/modex"),
}


@pytest.mark.parametrize("what", BENT)
def test_a_bundle_that_does_not_hold_is_refused_before_anything(
    stick: Stick, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    stick.bundle.write_bytes(BENT[what])
    assert stick.run("--json") == 4
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "BAD_SIGNATURE"
    assert not stick.daemon.asked


def _link_away(path: Path) -> None:
    path.rename(path.with_name("outside"))
    path.symlink_to("outside")


def _fifo_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("instead", [_link_away, _fifo_instead, _folder_instead])
def test_a_list_of_sums_that_is_no_file_is_not_read(
    stick: Stick, capsys: pytest.CaptureFixture[str], instead: Callable[[Path], None]
) -> None:
    # As somebody might plant it who wants a line of a file of the reader's to be shown as a bad one.
    sums = stick.base / f"{REVISION}.sha256"
    sums.write_bytes(b"secret\n")
    instead(sums)
    assert stick.run() == 1
    error = capsys.readouterr().err
    assert f"'{sums}' is not a file" in error
    assert "--include" in error
    assert "secret" not in error
    assert not stick.daemon.asked


@pytest.mark.parametrize("instead", [_fifo_instead, _folder_instead])
def test_a_bundle_that_is_no_file_is_none(
    stick: Stick, capsys: pytest.CaptureFixture[str], instead: Callable[[Path], None]
) -> None:
    instead(stick.bundle)
    assert stick.run(path=stick.bundle) == 3
    assert not stick.daemon.asked
    error = capsys.readouterr().err
    assert "is not a file" in error or "no exported release" in error


def test_a_link_in_the_place_of_the_files_is_not_followed(stick: Stick, capsys: pytest.CaptureFixture[str]) -> None:
    _link_away(stick.folder)
    assert stick.run(path=stick.bundle) == 1
    assert "is a symlink, which is not followed" in capsys.readouterr().err
    assert not stick.daemon.asked


@pytest.mark.parametrize("given", ["", "mp1", f"{publisher().id} "])
def test_what_is_no_publisher_id_starts_nothing(stick: Stick, capsys: pytest.CaptureFixture[str], given: str) -> None:
    assert stick.run("--publisher", given) == 2
    assert "is not a publisher id" in capsys.readouterr().err
    assert not stick.daemon.asked


def test_a_stranger_needs_a_word_of_consent(stick: Stick, capsys: pytest.CaptureFixture[str]) -> None:
    stick.daemon = FakeDaemon({"adopt": UnknownPublisherError("nobody is trusted for lab/model")})
    assert stick.run() == 4
    hint = capsys.readouterr().err.splitlines()[1]
    assert f"modelp2p trust add {stick.bundle} --name lab/model" in hint
    assert f"--publisher {publisher().id}" in hint
    assert stick.run("--publisher", publisher().id) == 4
    assert "trust add" not in capsys.readouterr().err.replace("'modelp2p trust add'", "")


def test_a_name_on_the_stick_does_not_get_into_the_command_of_a_hint(stick: Stick, capsys: pytest.CaptureFixture[str]) -> None:
    stick.daemon = FakeDaemon({"adopt": UnknownPublisherError("nobody is trusted for lab/model")})
    odd = stick.path.rename(stick.path.with_name("';touch x;'"))
    assert stick.run(path=odd) == 4
    hint = capsys.readouterr().err.splitlines()[1]
    command = hint.partition("modelp2p ")[2].partition("; or for")[0]
    assert shlex.split(command) == ["trust", "add", str(odd / "lab--model" / stick.bundle.name), "--name", "lab/model"]


def test_what_is_missing_is_exit_11_with_its_name(stick: Stick, capsys: pytest.CaptureFixture[str]) -> None:
    stick.daemon = FakeDaemon({"adopt": PartialError("1 of 3 files are missing", path="config.json", files=1)})
    assert stick.run("--json") == 11
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], error["facts"]) == ("PARTIAL", {"path": "config.json", "files": 1})


def test_ctrl_c_keeps_what_is_verified(stick: Stick, capsys: pytest.CaptureFixture[str]) -> None:
    stick.daemon = FakeDaemon({"adopt": KeyboardInterrupt()})
    assert stick.run() == 7
    assert "what is verified is kept" in capsys.readouterr().err
