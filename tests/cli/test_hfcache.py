"""The Hugging Face cache without a daemon: what is written there, what is refused, and what is read from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from modelp2p.cli.hfcache import cache_folder
from modelp2p.cli.hfcache_reading import adoptable, blobs_of, find_snapshot, linked
from modelp2p.cli.hfcache_writing import Materialized, materialize
from modelp2p.daemon.space import KEEP_FREE_BYTES
from modelp2p.protocol import gitids, hfcache
from modelp2p.protocol.errors import (
    CorruptError,
    FormatError,
    ModelP2PError,
    NoSpaceError,
    NotFoundError,
    PartialError,
    StoreError,
    UsageError,
)
from modelp2p.protocol.hfcache import Listed
from modelp2p.protocol.manifest import FileEntry, Manifest, encode_manifest
from modelp2p.protocol.names import ModelName
from modelp2p.protocol.statement import verify_statement
from tests.cli.fakes import FETCHED, LINK, SHOWN_ROW, FakeDaemon, FakeReply, memory, modelp2p
from tests.cli.test_publish import CONTENT, Publishing
from tests.releases import NAME, Home, statement_of

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

FILES = {"config.json": b"{}", "empty.txt": b"", "sub/model.safetensors": b"weights" * 100, "model.safetensors": b"more" * 50}
WEIGHTS = "sub/model.safetensors"
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Store:
    """A complete release of a home, and an empty cache."""

    home: Home
    tree: Path
    manifest: Manifest
    cache: Path
    told: list[str] = dataclasses.field(default_factory=list)

    @property
    def repo(self) -> Path:
        return self.cache / "models--lab--model"

    @property
    def snapshot(self) -> Path:
        return self.repo / "snapshots" / self.manifest.revision

    def blob(self, path: str) -> Path:
        return self.repo / hfcache.blob_of(Listed.of(self.manifest.file(path)))

    def materialize(self, *, moves_main: bool = False, manifest: Manifest | None = None) -> Materialized:
        return materialize(str(self.tree), manifest or self.manifest, str(self.cache), self.told.append, moves_main=moves_main)


def store_of(folder: Path, cache: Path, **how: object) -> Store:
    home, statement = Home(folder / "node"), statement_of(FILES)
    tree = home.add(statement, FILES, **how)  # type: ignore[arg-type]  # what `add` takes
    return Store(home, tree, verify_statement(statement).manifest, cache)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_of(tmp_path, tmp_path / "hub")


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder of another file system than temporary files: neither links nor reflinks cross."""
    folder = Path(f"/dev/shm/modelp2p-test-{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def all_of(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Everything below a folder: inode, and content or what a link says."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_ino,
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b"",
        )
        for path in folder.rglob("*")
    }


HOME = os.path.expanduser("~")
PLACES: dict[str, tuple[dict[str, str], str]] = {
    "nothing set": ({}, "~/.cache/huggingface/hub"),
    "XDG": ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    "HF_HOME": ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, "/h/hub"),
    "HF_HOME below the user's": ({"HF_HOME": "~/h"}, "~/h/hub"),
    "the old name": ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
    "HF_HUB_CACHE": ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/new"}, "/new"),
    "a variable inside": ({"HF_HUB_CACHE": "$HOME/c"}, "~/c"),
    "set to nothing": ({"HF_HUB_CACHE": "", "HF_HOME": ""}, "~/.cache/huggingface/hub"),
}


@pytest.mark.parametrize(("environ", "place"), PLACES.values(), ids=PLACES)
def test_the_cache_is_where_huggingface_hub_keeps_it(environ: dict[str, str], place: str) -> None:
    assert cache_folder(environ) == os.path.expanduser(place)
    assert cache_folder(environ, "~/given") == os.path.expanduser("~/given")


def test_a_release_becomes_a_snapshot_of_the_stores_own_inodes(store: Store) -> None:
    placed = store.materialize()
    assert placed == Materialized(str(store.snapshot), 4, 0, 4, 0)
    assert {str(path.relative_to(store.snapshot)) for path in store.snapshot.rglob("*") if path.is_file()} == set(FILES)
    for path in FILES:
        assert os.readlink(store.snapshot / path).startswith("../")
        assert (store.snapshot / path).resolve() == store.blob(path)
        assert store.blob(path).lstat().st_ino == (store.tree / path).stat().st_ino
    assert (store.repo / "refs/main").read_text() == store.manifest.revision
    listing = hfcache.decode_tree((store.repo / "trees" / f"{store.manifest.revision}.json").read_bytes())
    assert {item.path for item in listing} == set(FILES)
    assert not [path for path in store.repo.rglob("*") if path.name.startswith(".")]


def test_doing_it_again_changes_nothing(store: Store) -> None:
    first = store.materialize()
    before = all_of(store.cache)
    assert store.materialize() == dataclasses.replace(first, linked=0)
    assert all_of(store.cache) == before


def test_a_stopped_run_is_finished_by_the_next(store: Store) -> None:
    store.materialize()
    whole = set(all_of(store.cache))
    for lost in (store.repo / "refs/main", store.repo / "trees" / f"{store.manifest.revision}.json", store.blob(WEIGHTS)):
        lost.unlink()
        store.materialize()
        assert set(all_of(store.cache)) == whole
    (store.snapshot / WEIGHTS).unlink()
    (store.snapshot / "config.json").unlink()
    (store.snapshot / "config.json").symlink_to("../../blobs/of-another-commit")
    store.materialize()
    assert set(all_of(store.cache)) == whole
    assert (store.snapshot / "config.json").read_bytes() == FILES["config.json"]


def test_a_good_blob_of_huggingface_hub_is_left_alone(store: Store) -> None:
    store.blob(WEIGHTS).parent.mkdir(parents=True)
    store.blob(WEIGHTS).write_bytes(FILES[WEIGHTS])
    inode = store.blob(WEIGHTS).stat().st_ino
    assert store.materialize().linked == 3
    assert store.blob(WEIGHTS).stat().st_ino == inode


def _wrong_blob(store: Store) -> None:
    store.blob(WEIGHTS).parent.mkdir(parents=True)
    store.blob(WEIGHTS).write_bytes(b"short")


def _folder_for_blob(store: Store) -> None:
    store.blob(WEIGHTS).mkdir(parents=True)


def _wrong_file_in_snapshot(store: Store) -> None:
    (store.snapshot / WEIGHTS).parent.mkdir(parents=True)
    (store.snapshot / WEIGHTS).write_bytes(b"short")


def _snapshot_is_a_link_into_the_store(store: Store) -> None:
    store.snapshot.parent.mkdir(parents=True)
    store.snapshot.symlink_to(store.tree)


def _blobs_is_a_link(store: Store) -> None:
    (store.cache / "other").mkdir(parents=True)
    store.repo.mkdir(parents=True)
    (store.repo / "blobs").symlink_to(store.cache / "other")


def _other_listing(store: Store) -> None:
    (store.repo / "trees").mkdir(parents=True)
    listing = hfcache.encode_tree([Listed("config.json", 2, bytes(20))])
    (store.repo / "trees" / f"{store.manifest.revision}.json").write_bytes(listing)


WRONG: dict[str, tuple[Callable[[Store], None], str]] = {
    "a blob of another size": (_wrong_blob, "has 5 bytes instead of 700"),
    "a folder in place of a blob": (_folder_for_blob, "is not a file"),
    "a file of another size in the snapshot": (_wrong_file_in_snapshot, "has 5 bytes instead of 700"),
    "a snapshot that is a link into the store": (_snapshot_is_a_link_into_the_store, "is a link"),
    "a folder of blobs elsewhere": (_blobs_is_a_link, "is a link"),
    "another listing of the commit": (_other_listing, "with other files than were signed"),
}


@pytest.mark.parametrize(("prepare", "words"), WRONG.values(), ids=WRONG)
def test_what_is_in_the_way_is_refused_and_nothing_is_overwritten(
    store: Store, prepare: Callable[[Store], None], words: str
) -> None:
    prepare(store)
    before, kept = all_of(store.cache), all_of(store.home.path)
    with pytest.raises(StoreError, match=words):
        store.materialize()
    assert all_of(store.cache) == before
    assert all_of(store.home.path) == kept


def test_only_files_that_are_as_they_were_proven_get_in(store: Store) -> None:
    (store.tree / "config.json").unlink()
    (store.tree / "config.json").write_bytes(b"[]")
    (store.tree / WEIGHTS).unlink()
    placed = store.materialize()
    assert (placed.files, placed.missing) == (2, 2)
    assert not store.blob("config.json").exists()
    # The listing names them all the same: clients then know that the snapshot is not complete.
    listing = hfcache.decode_tree((store.repo / "trees" / f"{store.manifest.revision}.json").read_bytes())
    assert {item.path for item in listing} == set(FILES)


def test_nothing_proven_is_nothing_to_give(store: Store) -> None:
    for path in FILES:
        (store.tree / path).unlink()
    with pytest.raises(NotFoundError, match="no finished file"):
        store.materialize()
    assert not list(store.cache.rglob("*.json"))


def test_a_record_that_others_may_write_is_not_believed(store: Store) -> None:
    (store.tree.parent / "record").chmod(0o666)
    with pytest.raises(StoreError, match="written by somebody else"):
        store.materialize()


def test_the_record_of_another_release_is_not_believed(store: Store) -> None:
    other = dataclasses.replace(store.manifest, info_hash=bytes(32))
    with pytest.raises(StoreError, match="record of another release"):
        store.materialize(manifest=other)


def with_git(manifest: Manifest, path: str, git_sha1: bytes) -> Manifest:
    """The same release, with a file that is kept in git."""

    def changed(entry: FileEntry) -> FileEntry:
        return dataclasses.replace(entry, etag="git", git_sha1=git_sha1) if entry.path == path else entry

    return dataclasses.replace(manifest, files=tuple(map(changed, manifest.files)))


def test_a_git_blob_id_is_checked_before_it_becomes_a_name(store: Store) -> None:
    right = with_git(store.manifest, "config.json", gitids.blob_id(FILES["config.json"]))
    wrong = with_git(store.manifest, "config.json", bytes(20))
    with pytest.raises(CorruptError, match="is not what was signed"):
        store.materialize(manifest=wrong)
    assert not (store.repo / "blobs" / ("00" * 20)).exists()
    assert not store.snapshot.exists()
    store.materialize(manifest=right)
    assert (store.repo / "blobs" / gitids.blob_id(b"{}").hex()).read_bytes() == b"{}"


def test_the_ref_is_kept_unless_the_name_was_asked_for(store: Store) -> None:
    main = store.repo / "refs/main"
    main.parent.mkdir(parents=True)
    main.write_text(COMMIT)
    store.materialize()
    assert main.read_text() == COMMIT
    store.materialize(moves_main=True)
    assert main.read_text() == store.manifest.revision


def test_a_borrowed_file_shares_no_inode_with_the_cache(tmp_path: Path) -> None:
    store = store_of(tmp_path, tmp_path / "hub", borrowed=[WEIGHTS])
    placed = store.materialize()
    assert placed.linked == 3
    # Where blocks can be shared nothing is copied; else no more than this file.
    assert all("Copying 700 B" in line for line in store.told)
    assert store.blob(WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert store.blob(WEIGHTS).stat().st_ino != (store.tree / WEIGHTS).stat().st_ino
    # A file of the cache like any other: as writable as the user's mask lets it be.
    (tmp_path / "usual").touch()
    assert store.blob(WEIGHTS).stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_on_another_file_system_it_is_copied_and_said(tmp_path: Path, elsewhere: Path) -> None:
    store = store_of(tmp_path, elsewhere / "hub")
    placed = store.materialize()
    assert (placed.linked, placed.copied_bytes) == (0, sum(map(len, FILES.values())))
    assert store.told == ["Copying 902 B into the Hugging Face cache: they cannot be linked there."]
    assert {path: (store.snapshot / path).read_bytes() for path in FILES} == FILES
    assert not any(path.is_symlink() for path in (store.repo / "blobs").iterdir())


def test_what_does_not_fit_is_not_begun(tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, elsewhere / "hub")
    real = os.statvfs(elsewhere)
    blocks = (KEEP_FREE_BYTES + sum(map(len, FILES.values()))) / real.f_frsize
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=blocks - 1 / real.f_frsize, f_frsize=real.f_frsize))
    with pytest.raises(NoSpaceError, match="902 B would have to be copied"):
        store.materialize()
    assert not list(store.cache.rglob("*.safetensors"))
    assert store.told == []
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=blocks, f_frsize=real.f_frsize))
    assert store.materialize().copied_bytes == 902


def test_another_users_store_is_pointed_at_blob_by_blob(tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, elsewhere / "hub")
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(store.tree).st_uid + 1)
    placed = store.materialize()
    assert (placed.linked, placed.copied_bytes) == (0, 0)
    for path in FILES:
        assert os.readlink(store.blob(path)) == str(store.tree / path)
        assert os.readlink(store.snapshot / path).startswith("../")
    # The release was removed there, and another one has it again.
    store.blob(WEIGHTS).unlink()
    store.blob(WEIGHTS).symlink_to("/nowhere/at/all")
    store.materialize()
    assert os.readlink(store.blob(WEIGHTS)) == str(store.tree / WEIGHTS)


def test_a_models_folder_may_be_a_link_to_a_larger_disk(store: Store, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    store.cache.mkdir()
    store.repo.symlink_to(tmp_path / "large")
    assert store.materialize().snapshot == str(tmp_path / "large" / "snapshots" / store.manifest.revision)


def shows(store: Store, **changes: object) -> FakeDaemon:
    """A daemon that has the release of a store."""
    row = {**SHOWN_ROW, "revision": store.manifest.revision, "info_hash": store.manifest.info_hash.hex(), "path": str(store.tree)}
    row |= changes  # type: ignore[arg-type]  # what tests give is what the protocol carries

    def show(args: Map, fds: object) -> FakeReply:
        return FakeReply(dict(row), (memory(encode_manifest(store.manifest)),))

    return FakeDaemon({"show": show, "linked": {"files": 4}})


def test_materialize_prints_the_snapshot_and_has_the_record_renewed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = shows(store)
    assert modelp2p("materialize", NAME, "--cache-dir", str(store.cache), "-q", daemon=daemon) == 0
    assert capsys.readouterr().out == f"{store.snapshot}\n"
    assert [(asked.verb, asked.args["ref"]) for asked in daemon.asked] == [
        ("show", NAME),
        ("linked", f"{NAME}@{store.manifest.revision}"),
    ]
    assert modelp2p("materialize", NAME, "--cache-dir", str(store.cache), "--json", daemon=shows(store)) == 0
    assert json.loads(capsys.readouterr().out) == {
        "v": 1,
        "hf_cache": str(store.snapshot),
        "name": NAME,
        "revision": store.manifest.revision,
        "info_hash": store.manifest.info_hash.hex(),
        "files": 4,
        "missing": 0,
        "copied_bytes": 0,
    }


@pytest.mark.parametrize(("ref", "moves"), [(NAME, True), (f"{NAME}@0123456", False)])
def test_a_revision_does_not_move_what_the_name_means(store: Store, ref: str, moves: bool) -> None:
    main = store.repo / "refs/main"
    main.parent.mkdir(parents=True)
    main.write_text(COMMIT)
    assert modelp2p("materialize", ref, "--cache-dir", str(store.cache), daemon=shows(store)) == 0
    assert main.read_text() == (store.manifest.revision if moves else COMMIT)


def test_materialize_is_refused_where_nobody_is_trusted_for_the_name(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = shows(store, name_verified=False)
    assert modelp2p("materialize", NAME, "--cache-dir", str(store.cache), daemon=daemon) == 4
    error = capsys.readouterr().err
    assert "modelp2p trust add 'magnet:?" in error
    assert f"--name {NAME}" in error
    assert not store.cache.exists()


def fetching(store: Store, **changes: object) -> FakeDaemon:
    """A daemon that has just fetched the release of a store."""
    revision, info_hash = store.manifest.revision, store.manifest.info_hash.hex()
    fetched = {**FETCHED, "revision": revision, "info_hash": info_hash, "path": str(store.tree), **changes}
    return FakeDaemon({**shows(store).answers, "fetch": fetched, "adopt": fetched})  # type: ignore[dict-item]  # as above


def test_a_fetch_puts_the_release_into_the_cache(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    env = {"HF_HUB_CACHE": str(store.cache)}
    assert modelp2p("fetch", LINK, "--json", daemon=fetching(store), env=env) == 0
    assert json.loads(capsys.readouterr().out)["hf_cache"] == str(store.snapshot)
    assert modelp2p("fetch", LINK, daemon=fetching(store), env=env) == 0
    assert f"HF cache:  {store.snapshot}" in capsys.readouterr().out.splitlines()
    assert modelp2p("adopt", NAME, str(store.tree), "--json", daemon=fetching(store), env=env) == 0
    assert json.loads(capsys.readouterr().out)["hf_cache"] == str(store.snapshot)


@pytest.mark.parametrize("flags", [["--no-hf-cache"], ["--local-dir", "elsewhere"]], ids=" ".join)
def test_a_fetch_that_is_told_not_to_leaves_the_cache_alone(
    store: Store, tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    daemon = fetching(store)
    assert modelp2p("fetch", NAME, *flags, "--json", daemon=daemon, env={"HF_HUB_CACHE": str(store.cache)}) == 0
    assert json.loads(capsys.readouterr().out)["hf_cache"] is None
    assert [asked.verb for asked in daemon.asked] == ["fetch"]
    assert not store.cache.exists()


SHUT: dict[str, tuple[dict[str, object], str]] = {
    "nobody is trusted": ({"name_verified": False}, f"Then: modelp2p trust add '{LINK}' --name {NAME}"),
    "the daemon shows another": ({"info_hash": "00" * 32}, "shows another lab/model@"),
}


@pytest.mark.parametrize(("changes", "words"), SHUT.values(), ids=SHUT)
def test_the_cache_stays_shut_and_the_fetch_is_none_the_worse(
    store: Store, changes: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = fetching(store, **changes)
    assert modelp2p("fetch", LINK, "--json", daemon=daemon, env={"HF_HUB_CACHE": str(store.cache)}) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["hf_cache"] is None
    assert words in output.err
    assert len(output.err.splitlines()) == 1
    assert not store.cache.exists()


def test_ctrl_c_while_the_cache_is_written_is_resumed_like_any_fetch(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({**fetching(store).answers, "show": KeyboardInterrupt()})
    assert modelp2p("fetch", NAME, daemon=daemon, env={"HF_HUB_CACHE": str(store.cache)}) == 7
    assert "Run the same command again to resume." in capsys.readouterr().err


def test_the_files_of_a_service_are_left_to_materialize(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(store.tree).st_uid + 1)
    assert modelp2p("fetch", NAME, daemon=fetching(store), env={"HF_HUB_CACHE": str(store.cache)}) == 0
    assert f"modelp2p materialize {NAME}" in capsys.readouterr().err
    assert not store.cache.exists()


def cached(tmp_path: Path, files: Mapping[str, bytes] | None = None, *, in_git: bool = True) -> Path:
    """A cache with one commit, laid out as huggingface_hub does it."""
    files = {"a.json": b"{}", "sub/b.bin": b"bbb"} if files is None else files
    repo = tmp_path / "hub" / "models--org--model"
    digest = gitids.blob_id if in_git else lambda data: hashlib.sha256(data).digest()
    listed = [Listed(path, len(data), digest(data)) for path, data in files.items()]
    for item in listed:
        blob, place = repo / hfcache.blob_of(item), repo / hfcache.snapshot_of(COMMIT, item.path)
        for folder in (blob.parent, place.parent):
            folder.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(files[item.path])
        place.symlink_to(hfcache.link_of(item))
    for name, data in ((hfcache.tree_of(COMMIT), hfcache.encode_tree(listed)), ("refs/main", COMMIT.encode())):
        (repo / name).parent.mkdir()
        (repo / name).write_bytes(data)
    return tmp_path / "hub"


REVISIONS = {"none": "", "branch": "@main", "commit": f"@{COMMIT}", "short": f"@{COMMIT[:7]}", "pull request": "@refs/pr/4"}


@pytest.mark.parametrize("revision", REVISIONS.values(), ids=REVISIONS)
def test_a_complete_snapshot_is_found_by_every_name_of_its_commit(tmp_path: Path, revision: str) -> None:
    cache = cached(tmp_path)
    pull = cache / "models--org--model/refs/refs/pr/4"
    pull.parent.mkdir(parents=True)
    pull.write_text(COMMIT)
    found = find_snapshot(str(cache), f"org/model{revision}")
    assert (str(found.name), found.commit) == ("org/model", COMMIT)
    assert [(item.path, item.size) for item in found.files] == [("a.json", 2), ("sub/b.bin", 3)]


def _no_listing(repo: Path) -> None:
    (repo / hfcache.tree_of(COMMIT)).unlink()


def _bad_listing(repo: Path) -> None:
    (repo / hfcache.tree_of(COMMIT)).write_text("{}")


def _lost_file(repo: Path) -> None:
    (repo / hfcache.snapshot_of(COMMIT, "a.json")).unlink()


def _cut_blob(repo: Path) -> None:
    (repo / hfcache.snapshot_of(COMMIT, "sub/b.bin")).resolve().write_bytes(b"b")


INCOMPLETE: dict[str, tuple[Callable[[Path], None], type[ModelP2PError], str]] = {
    "no listing": (_no_listing, NotFoundError, "does not say which files"),
    "a bad listing": (_bad_listing, FormatError, "another format"),
    "a file that is not there": (_lost_file, PartialError, "1 of 2 files .* a.json"),
    "a blob that was cut": (_cut_blob, PartialError, "1 of 2 files .* sub/b.bin"),
}


@pytest.mark.parametrize(("harm", "error", "words"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_an_incomplete_snapshot_is_refused(
    tmp_path: Path, harm: Callable[[Path], None], error: type[ModelP2PError], words: str
) -> None:
    cache = cached(tmp_path)
    harm(cache / "models--org--model")
    with pytest.raises(error, match=words):
        find_snapshot(str(cache), "org/model")


NOWHERE: dict[str, tuple[str, type[ModelP2PError]]] = {
    "another model": ("org/other", NotFoundError),
    "another branch": ("org/model@dev", NotFoundError),
    "another commit": (f"org/model@{'0' * 40}", NotFoundError),
    "another short commit": ("org/model@0000000", NotFoundError),
    "a folder of refs": ("org/model@refs", NotFoundError),
    "a way out": ("org/model@../../x", UsageError),
    "absolute": ("org/model@/etc/passwd", UsageError),
    "an empty revision": ("org/model@", UsageError),
    "no name": ("a/b/c", UsageError),
}


@pytest.mark.parametrize(("text", "error"), NOWHERE.values(), ids=NOWHERE)
def test_a_snapshot_that_is_not_there(tmp_path: Path, text: str, error: type[ModelP2PError]) -> None:
    cache = cached(tmp_path)
    (cache / "models--org--model/refs/refs").mkdir()
    with pytest.raises(error):
        find_snapshot(str(cache), text)


def test_publishing_gets_links_to_the_blobs_and_leaves_none(tmp_path: Path) -> None:
    cache = cached(tmp_path, {".gitattributes": b"x", "a/b.json": b"{}"})
    before = all_of(cache)
    snapshot = find_snapshot(str(cache), "org/model")
    with linked(snapshot, str(tmp_path / "node")) as fd:
        for item in snapshot.files:
            inode = os.stat(os.path.join(snapshot.repo, hfcache.blob_of(item))).st_ino
            assert os.stat(item.path, dir_fd=fd, follow_symlinks=False).st_ino == inode
        assert os.fstat(fd).st_mode & 0o777 == 0o700
    assert all_of(cache) == before
    assert not (tmp_path / "node").exists()


def publish(cache: Path, daemon: FakeDaemon, *more: str) -> int:
    assert modelp2p("keys", "init", "lab", "--no-passphrase", "-q") == 0
    return modelp2p("publish", "--from-hf", "org/model", "--cache-dir", str(cache), *more, daemon=daemon)


def test_a_commit_is_published_under_its_own_name_with_its_origin(tmp_path: Path) -> None:
    daemon = Publishing().daemon
    seed = ["--web-seed", "https://mirror.example/"]
    assert publish(cached(tmp_path, CONTENT, in_git=False), daemon, *seed) == 0
    asked = daemon.asked[0]
    assert (asked.verb, asked.args["name"]) == ("publish", "org/model")
    assert asked.args["origin"] == {"repo": "org/model", "commit": COMMIT}
    assert asked.args["web_seeds"] == ["https://mirror.example/", "https://huggingface.co/org/model/resolve/"]
    assert {item.path for item in hfcache.decode_listing(asked.contents[1])} == set(CONTENT)


def test_a_commit_can_be_published_without_the_hub_as_a_web_seed(tmp_path: Path) -> None:
    daemon = Publishing().daemon
    assert publish(cached(tmp_path, CONTENT, in_git=False), daemon, "--no-web-seed", "--web-seed", "https://a.example/") == 0
    assert daemon.asked[0].args["web_seeds"] == ["https://a.example/"]


def test_a_manifest_of_other_files_than_the_commit_has_is_not_signed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publishing = Publishing()
    assert publish(cached(tmp_path, CONTENT, in_git=True), publishing.daemon) == 4
    assert "of other files than the commit has. It was not signed." in capsys.readouterr().err
    assert publishing.envelopes == []


def test_a_snapshot_is_adopted_by_the_blobs_of_its_model(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    repo = cache / "models--org--model"
    assert adoptable(str(repo / "snapshots" / COMMIT)) == str(repo / "blobs")
    for other in (cache, repo, repo / "snapshots", repo / "blobs", tmp_path, tmp_path / "nowhere"):
        assert adoptable(str(other)) == str(other)
    assert blobs_of(str(cache), ModelName.parse("org/model")) == str(repo / "blobs")
    with pytest.raises(NotFoundError, match="nothing of org/other"):
        blobs_of(str(cache), ModelName.parse("org/other"))


USAGE = {
    "publish neither": ("publish", "--as", "a/b"),
    "publish both": ("publish", ".", "--from-hf", "a/b"),
    "publish a folder without a name": ("publish", "."),
    "publish a part of a commit": ("publish", "--from-hf", "a/b", "--include", "*.json"),
    "publish with another origin": ("publish", "--from-hf", "a/b", "--origin", f"a/b@{COMMIT}"),
    "publish a folder without a web seed it has not": ("publish", ".", "--as", "a/b", "--no-web-seed"),
    "adopt neither": ("adopt", "a/b"),
    "adopt both": ("adopt", "a/b", ".", "--from-hf"),
}


@pytest.mark.parametrize("args", USAGE.values(), ids=USAGE)
def test_flags_that_contradict_each_other_are_a_usage_error(args: tuple[str, ...]) -> None:
    daemon = FakeDaemon({}, is_running=False)
    assert modelp2p(*args, daemon=daemon) == 2
    assert daemon.started_with is None
