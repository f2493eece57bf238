"""`export` without a daemon: what lies in the folder, what is refused there, and that nothing but proven bytes gets a name."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from modelp2p.cli.export_writing import Export
from modelp2p.protocol import exported
from modelp2p.protocol.errors import StoreError
from modelp2p.protocol.manifest import encode_manifest
from modelp2p.protocol.statement import Release, Statement, encode_bundle, verify_statement
from tests.cli.fakes import FakeDaemon, FakeReply, memory, modelp2p
from tests.endtoend.site import Kept, flip_byte, snapshot, some_bytes
from tests.nodes import tree_bytes
from tests.releases import NAME, Home, statement_of

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

FILES = {
    "config.json": b"{}",
    "empty.txt": b"",
    "model.safetensors": some_bytes("export", 5 << 20),
    "sub/more.safetensors": some_bytes("more", 1000),
}
SHARD, BELOW = "model.safetensors", "sub/more.safetensors"
TOTAL = sum(map(len, FILES.values()))
STATEMENT = statement_of(FILES)


@dataclass
class Exporting:
    """A release on a node, and a folder to take it away in."""

    tree: Path
    target: Path
    statement: Statement = field(default_factory=lambda: STATEMENT)
    state: str = "complete"

    @property
    def release(self) -> Release:
        return verify_statement(self.statement)

    @property
    def base(self) -> Path:
        return self.target / "lab--model"

    @property
    def folder(self) -> Path:
        return self.base / self.release.manifest.revision

    @property
    def names(self) -> list[str]:
        """All that lies beside the files."""
        return [f"{self.release.manifest.revision}{suffix}" for suffix in (".modelp2p", ".sha256", ".torrent")]

    def show(self, args: Map, fds: Sequence[int]) -> FakeReply:
        release = self.release
        row: Map = {
            "name": NAME,
            "revision": release.manifest.revision,
            "info_hash": release.info_hash.hex(),
            "state": self.state,
            "path": str(self.tree),
        }
        return FakeReply(row, (memory(encode_manifest(release.manifest)), memory(encode_bundle(self.statement))))

    def run(self, *args: str) -> int:
        return modelp2p("export", NAME, str(self.target), *args, daemon=FakeDaemon({"show": self.show}))

    def there(self) -> dict[str, Kept | None]:
        return snapshot(self.target) if self.target.exists() else {}


@pytest.fixture
def exporting(tmp_path: Path) -> Exporting:
    return Exporting(Home(tmp_path / "node").add(STATEMENT, FILES), tmp_path / "stick")


@pytest.fixture
def elsewhere(exporting: Exporting) -> Iterator[Exporting]:
    """The same onto another file system: reflinks do not cross."""
    exporting.target = Path(f"/dev/shm/modelp2p-export-{os.getpid()}")
    exporting.target.mkdir()
    yield exporting
    shutil.rmtree(exporting.target)


def sums_of(*paths: str) -> bytes:
    return b"".join(f"{hashlib.sha256(FILES[path]).hexdigest()}  {path}\n".encode() for path in paths)


def test_the_folder_holds_the_files_and_what_proves_them(exporting: Exporting, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(exporting.tree)
    mask = os.umask(0o027)
    try:
        assert exporting.run("--json") == 0
    finally:
        os.umask(mask)
    body = json.loads(capsys.readouterr().out)
    release, bundle, sums, torrent = exporting.release, *(exporting.base / name for name in exporting.names)
    assert body.pop("seconds") >= 0
    assert body == {
        "v": 1,
        "path": str(exporting.folder),
        "name": NAME,
        "revision": release.manifest.revision,
        "info_hash": release.info_hash.hex(),
        "publisher": release.publisher_id,
        "state": "complete",
        "files": 4,
        "bytes": TOTAL,
        "copied_bytes": TOTAL,
        "bundle": str(bundle),
        "torrent": str(torrent),
        "save_path": str(exporting.base),
    }
    assert tree_bytes(exporting.folder) == FILES
    assert bundle.read_bytes() == encode_bundle(STATEMENT)
    assert torrent.read_bytes() == exported.torrent_file(release)
    assert sums.read_bytes() == sums_of(*sorted(FILES))
    assert sorted(path.name for path in exporting.base.iterdir()) == sorted([release.manifest.revision, *exporting.names])
    files = [path for path in exporting.target.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}, "not what this user's files get"
    assert {path.stat().st_nlink for path in files} == {1}
    assert snapshot(exporting.tree) == before


def test_for_people_and_for_scripts(exporting: Exporting, capsys: pytest.CaptureFixture[str]) -> None:
    assert exporting.run() == 0
    out = capsys.readouterr().out
    assert f"Torrent:   {exporting.base / exporting.names[2]}, to be saved in {exporting.base}" in out
    assert "complete: 4 of 4 files, 5.2 MB, every byte verified" in out
    assert exporting.run("-q") == 0
    assert capsys.readouterr() == (f"{exporting.folder}\n", "")


def test_a_single_file_is_where_clients_look_for_it(exporting: Exporting, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"model.gguf": b"weights"}
    exporting.statement = statement_of(files)
    exporting.tree = Home(exporting.tree.parents[2]).add(exporting.statement, files)
    assert exporting.run("--json") == 0
    assert json.loads(capsys.readouterr().out)["save_path"] == str(exporting.folder)


def test_again_changes_nothing_and_goes_on_where_it_ended(exporting: Exporting, capsys: pytest.CaptureFixture[str]) -> None:
    assert exporting.run() == 0
    whole = exporting.there()
    assert exporting.run("--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["copied_bytes"] == 0
    assert exporting.there() == whole
    # As after `kill -9`: half a file without a name, the lock, and no bundle yet.
    revision = exporting.release.manifest.revision
    (exporting.base / exporting.names[0]).unlink()
    (exporting.folder / SHARD).unlink()
    (exporting.base / f".{revision}.part").write_bytes(FILES[SHARD][:1000])
    (exporting.base / f".{revision}.lock").touch()
    assert exporting.run("--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["copied_bytes"] == len(FILES[SHARD])
    again = exporting.there()
    assert again.keys() == whole.keys()
    fresh = {f"lab--model/{revision}/{SHARD}", f"lab--model/{exporting.names[0]}"}
    assert {path for path, kept in again.items() if kept != whole[path]} == fresh
    assert tree_bytes(exporting.folder) == FILES


def _flip(exporting: Exporting) -> None:
    flip_byte(exporting.folder / SHARD, 77)


def _cut(exporting: Exporting) -> None:
    os.truncate(exporting.folder / SHARD, 77)


def _folder(exporting: Exporting) -> None:
    (exporting.folder / SHARD).unlink()
    (exporting.folder / SHARD).mkdir()


def _fifo(exporting: Exporting) -> None:
    (exporting.folder / SHARD).unlink()
    os.mkfifo(exporting.folder / SHARD)


def _link(exporting: Exporting) -> None:
    (exporting.folder / SHARD).rename(exporting.target / "elsewhere")
    (exporting.folder / SHARD).symlink_to(exporting.target / "elsewhere")


def _link_to_nothing(exporting: Exporting) -> None:
    (exporting.folder / SHARD).unlink()
    (exporting.folder / SHARD).symlink_to(exporting.target / "outside")


def _linked_folder(exporting: Exporting) -> None:
    (exporting.target / "outside").mkdir()
    shutil.rmtree(exporting.folder / "sub")
    (exporting.folder / "sub").symlink_to(exporting.target / "outside")


def _linked_revision(exporting: Exporting) -> None:
    exporting.folder.rename(exporting.target / "outside")
    exporting.folder.symlink_to(exporting.target / "outside")


def _other_bundle(exporting: Exporting) -> None:
    (exporting.base / exporting.names[0]).write_bytes(b"another")


def _other_torrent(exporting: Exporting) -> None:
    (exporting.base / exporting.names[2]).write_bytes(b"another")


def _other_sums(exporting: Exporting) -> None:
    (exporting.base / exporting.names[1]).write_bytes(b"0" * 64 + b"  config.json\n")


def _no_sums(exporting: Exporting) -> None:
    (exporting.base / exporting.names[1]).write_bytes(b"\xff")


IN_THE_WAY: dict[str, Callable[[Exporting], None]] = {
    "one flipped byte": _flip,
    "half a file": _cut,
    "a folder": _folder,
    "a FIFO": _fifo,
    "a link to the right file": _link,
    "a link to nothing": _link_to_nothing,
    "a folder that is a link": _linked_folder,
    "all of it behind a link": _linked_revision,
    "another bundle": _other_bundle,
    "another torrent": _other_torrent,
    "sums of another release": _other_sums,
    "sums that are none": _no_sums,
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_what_is_in_the_way_stays_and_nothing_is_written(
    exporting: Exporting, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    assert exporting.run() == 0
    (exporting.folder / "config.json").unlink()
    IN_THE_WAY[what](exporting)
    before = exporting.there()
    capsys.readouterr()
    assert exporting.run() == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 2, output.err
    # The folder of the revision may be new: an empty one says nothing.
    assert exporting.there() == before


def test_what_is_damaged_in_the_store_gets_no_name(exporting: Exporting, capsys: pytest.CaptureFixture[str]) -> None:
    flip_byte(exporting.tree / SHARD, (4 << 20) + 3)
    assert exporting.run("--json") == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], error["facts"]["path"]) == ("BAD_HASH", SHARD)
    assert f"modelp2p verify {exporting.release.ref} --repair" in error["hint"]
    assert SHARD not in tree_bytes(exporting.folder)
    assert [path.name for path in exporting.base.iterdir()] == [exporting.folder.name], "a bundle, or something half"


def test_a_selection_is_partial_and_grows(exporting: Exporting, capsys: pytest.CaptureFixture[str]) -> None:
    assert exporting.run("--include", "*.json", "--include", "sub/") == 0
    output = capsys.readouterr()
    assert "partial: 2 of 4 files, 1.0 kB, every byte verified" in output.out
    assert "The torrent is that of all 4 files" in output.err
    assert tree_bytes(exporting.folder).keys() == {"config.json", BELOW}
    assert (exporting.base / exporting.names[1]).read_bytes() == sums_of("config.json", BELOW)
    assert (exporting.base / exporting.names[2]).read_bytes() == exported.torrent_file(exporting.release)
    assert exporting.run("--include", "empty.txt") == 0
    assert (exporting.base / exporting.names[1]).read_bytes() == sums_of("config.json", "empty.txt", BELOW)
    assert exporting.run() == 0
    assert (exporting.base / exporting.names[1]).read_bytes() == sums_of(*sorted(FILES))
    capsys.readouterr()
    assert exporting.run("--include", "*.bin") == 2


@pytest.mark.parametrize(("state", "args", "code"), [
    ("partial", (), 0),
    ("partial", ("--exclude", SHARD), 0),
    ("partial", ("--include", "*.safetensors"), 11),
    ("paused", (), 11),
    ("partial", ("--include", SHARD), 3),
])  # fmt: skip
def test_of_a_part_that_part(
    exporting: Exporting, capsys: pytest.CaptureFixture[str], state: str, args: tuple[str, ...], code: int
) -> None:
    exporting.state = state
    (exporting.tree / SHARD).unlink()
    assert exporting.run(*args, "--json") == code
    body = json.loads(capsys.readouterr().out)
    if code == 0:
        assert body["state"] == "partial"
        assert tree_bytes(exporting.folder).keys() == FILES.keys() - {SHARD}
    else:
        assert not exporting.target.exists()


def test_of_nothing_nothing(exporting: Exporting, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(exporting.tree)
    assert exporting.run() == 3
    assert f"modelp2p fetch {exporting.release.ref}" in capsys.readouterr().err
    assert not exporting.target.exists()


REFUSALS = {
    errno.ENOSPC: (9, "No space left on device", "whole files stay"),
    errno.EROFS: (10, "Read-only file system", "a folder you may write to"),
    errno.EFBIG: (1, f"'{SHARD}' has 5.2 MB, more than this file system takes in one file", "FAT ends at 4 GiB"),
    errno.EIO: (1, "Input/output error", ""),
}


@pytest.mark.parametrize("code", REFUSALS, ids=lambda code: errno.errorcode[code])
def test_a_disk_that_refuses_is_one_clear_line(
    elsewhere: Exporting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    real, written = os.write, []

    def write(fd: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".part"):
            written.append(len(data))
            if len(written) == 3:
                raise OSError(code, os.strerror(code))
        return real(fd, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        exit_code, message, hint = REFUSALS[code]
        assert elsewhere.run() == exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert message in lines[0]
    assert hint in lines[1]
    assert tree_bytes(elsewhere.folder) == {"config.json": b"{}", "empty.txt": b""}
    assert [path.name for path in elsewhere.base.iterdir()] == [elsewhere.folder.name]
    assert elsewhere.run() == 0
    assert tree_bytes(elsewhere.folder) == FILES


def test_a_folder_that_cannot_be_made(exporting: Exporting, capsys: pytest.CaptureFixture[str]) -> None:
    exporting.target.write_bytes(b"a file")
    assert exporting.run() == 1
    assert "cannot use the folder" in capsys.readouterr().err
    exporting.target = Path("/proc/sys/kernel")
    assert exporting.run() in (1, 10)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_file_system_with_short_files_says_so_before_anything_is_copied(
    elsewhere: Exporting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.lseek

    def lseek(fd: int, at: int, whence: int) -> int:
        if at > 4 << 20:
            raise OSError(errno.EINVAL, "as vfat does beyond 4 GiB")
        return real(fd, at, whence)

    monkeypatch.setattr(os, "lseek", lseek)
    assert elsewhere.run() == 1
    assert f"'{SHARD}' has 5.2 MB, more than this file system takes" in capsys.readouterr().err
    assert tree_bytes(elsewhere.base) == {}
    assert elsewhere.run("--exclude", SHARD) == 0


def test_what_does_not_fit_is_not_begun(
    elsewhere: Exporting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = [TOTAL - 1]
    monkeypatch.setattr(os, "statvfs", lambda where: SimpleNamespace(f_bavail=free[0], f_frsize=1))
    assert elsewhere.run("--json") == 9
    assert json.loads(capsys.readouterr().out)["error"]["facts"] == {"needed": TOTAL, "free": TOTAL - 1}
    assert tree_bytes(elsewhere.base) == {}
    free[0] = TOTAL
    assert elsewhere.run() == 0
    free[0] = 0
    assert elsewhere.run() == 0, "nothing is missing there"


def test_two_at_once_do_not_meet(exporting: Exporting, capsys: pytest.CaptureFixture[str]) -> None:
    exporting.base.mkdir(parents=True)
    lock = exporting.base / f".{exporting.release.manifest.revision}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = exporting.there()
        assert exporting.run() == 1
        assert "another export writes" in capsys.readouterr().err
        assert exporting.there() == before
    assert exporting.run() == 0


def test_what_appears_while_it_is_copied_stays(exporting: Exporting) -> None:
    theirs = exporting.folder / SHARD

    def appear(event: Map) -> None:
        theirs.write_bytes(b"theirs")

    tree = os.open(os.path.realpath(exporting.tree), os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(StoreError, match="exists there with other content"):
            Export(str(exporting.target), tree, STATEMENT, exporting.release, appear).write([SHARD])
    finally:
        os.close(tree)
    assert tree_bytes(exporting.base) == {f"{exporting.folder.name}/{SHARD}": b"theirs"}


def test_the_lock_of_one_that_ends_just_now_locks_nobody_out(
    exporting: Exporting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        # The other one removes the file that this one has opened, and only then gives up its lock.
        (exporting.base / f".{exporting.release.manifest.revision}.lock").unlink()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert exporting.run() == 1
    assert "another export writes" in capsys.readouterr().err
    assert exporting.there().keys() == {"lab--model"}
    monkeypatch.undo()
    assert exporting.run() == 0


def test_the_daemon_is_not_believed(exporting: Exporting, capsys: pytest.CaptureFixture[str]) -> None:
    other = statement_of({"a.json": b"[]"})
    right = exporting.show

    def replies(*data: bytes) -> FakeDaemon:
        return FakeDaemon({"show": lambda args, fds: FakeReply(right({}, ()).result, tuple(map(memory, data)))})

    arguments = ("export", NAME, str(exporting.target))
    assert modelp2p(*arguments, daemon=replies(b"manifest")) == 8
    assert modelp2p(*arguments, daemon=replies(b"manifest", encode_bundle(other))) == 8
    bent = encode_bundle(STATEMENT).replace(b"lab/model", b"lab/modex")
    assert modelp2p(*arguments, daemon=replies(b"manifest", bent)) == 4
    assert not exporting.target.exists()
