"""The cache's layout and listings; huggingface_hub's own reader and writer are the judges."""

from __future__ import annotations

import hashlib
import json
import posixpath
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import _tree_cache as oracle
from huggingface_hub.file_download import repo_folder_name

from modelp2p.protocol import codec, gitids, hfcache
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.hfcache import Listed
from modelp2p.protocol.kinds import FileKind
from modelp2p.protocol.manifest import GIT_MAX_BYTES, MAX_UINT, FileEntry
from modelp2p.protocol.names import ModelName

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHA, GIT = b"\x11" * 32, b"\x22" * 20
LARGE = Listed("onnx/model.safetensors", 12_345_678, SHA)
SMALL = Listed(".gitattributes", 7, GIT)


@pytest.mark.parametrize("name", ["gpt2", "org/model", "Org.x/a_b-c.d"])
def test_the_folder_of_a_model_is_the_one_huggingface_hub_uses(name: str) -> None:
    assert hfcache.repo_folder(ModelName.parse(name)) == repo_folder_name(repo_id=name, repo_type="model")


def test_a_blob_has_the_name_that_the_hub_gives_the_file() -> None:
    git = FileEntry("a", 3, b"\0" * 32, SHA, "git", GIT, FileKind.TEXT)
    lfs = FileEntry("a", 3, b"\0" * 32, SHA, "sha256", None, FileKind.WEIGHTS)
    assert hfcache.blob_of(Listed.of(git)) == f"blobs/{'22' * 20}"
    assert hfcache.blob_of(Listed.of(lfs)) == f"blobs/{'11' * 32}"


@pytest.mark.parametrize("path", ["a", "b/a", "c/b/a"])
def test_the_link_of_a_file_leads_from_the_snapshot_to_its_blob(path: str) -> None:
    item = Listed(path, 1, SHA)
    place = posixpath.join("/repo", hfcache.snapshot_of(COMMIT, path))
    assert posixpath.normpath(posixpath.join(posixpath.dirname(place), hfcache.link_of(item))) == f"/repo/{hfcache.blob_of(item)}"


def test_a_git_blob_id_is_gits() -> None:
    # `git hash-object` of an empty file, and of "hello\n".
    assert gitids.blob_id(b"").hex() == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert gitids.blob_id(b"hello\n").hex() == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_huggingface_hub_reads_what_we_list(tmp_path: Path) -> None:
    (tmp_path / "trees").mkdir()
    (tmp_path / hfcache.tree_of(COMMIT)).write_bytes(hfcache.encode_tree([LARGE, SMALL]))
    found = oracle.read_tree_cache(str(tmp_path), COMMIT)
    assert found is not None
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'11' * 32}\nsize 12345678\n".encode()
    blob_id = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    assert found == {
        ".gitattributes": oracle.TreeCacheEntry(7, "22" * 20),
        "onnx/model.safetensors": oracle.TreeCacheEntry(12_345_678, blob_id, "11" * 32, 12_345_678),
    }


def test_we_write_byte_for_byte_what_huggingface_hub_writes(tmp_path: Path) -> None:
    ours = hfcache.encode_tree([LARGE, SMALL])
    entries = {path: oracle.TreeCacheEntry.from_json(row) for path, row in json.loads(ours)["files"].items()}
    oracle.write_tree_cache(str(tmp_path), COMMIT, entries)
    assert (tmp_path / hfcache.tree_of(COMMIT)).read_bytes() == ours


def test_a_listing_is_read_back_as_it_was_written() -> None:
    assert hfcache.decode_tree(hfcache.encode_tree([LARGE, SMALL])) == (SMALL, LARGE)
    assert hfcache.decode_listing(hfcache.encode_listing([LARGE, SMALL])) == (SMALL, LARGE)


def test_a_listing_that_names_xet_storage_is_read() -> None:
    row = {"size": 9, "blob_id": "33" * 20, "lfs_sha256": "11" * 32, "lfs_size": 9, "xet_hash": "44" * 32}
    assert hfcache.decode_tree(_tree({"a": row})) == (Listed("a", 9, SHA),)


def _tree(files: object, version: object = 1) -> bytes:
    return json.dumps({"format_version": version, "files": files}).encode()


GOOD = {"size": 1, "blob_id": "22" * 20}
BAD_TREES = {
    "not JSON": b"{",
    "not a map": b"[]",
    "nested without end": b"[" * 100_000,
    "another version": _tree({"a": GOOD}, 2),
    "files is a list": _tree([]),
    "no file": _tree({}),
    "a file is a text": _tree({"a": "x"}),
    "no size": _tree({"a": {"blob_id": "22" * 20}}),
    "size is true": _tree({"a": GOOD | {"size": True}}),
    "size below zero": _tree({"a": GOOD | {"size": -1}}),
    "size too large": _tree({"a": {"size": MAX_UINT + 1, "blob_id": "1", "lfs_sha256": "11" * 32}}),
    "no digest": _tree({"a": {"size": 1}}),
    "digest not hex": _tree({"a": GOOD | {"blob_id": "xy" * 20}}),
    "digest of another length": _tree({"a": GOOD | {"blob_id": "22" * 19}}),
    "too large for git": _tree({"a": GOOD | {"size": GIT_MAX_BYTES}}),
    "path leaves": _tree({"../a": GOOD}),
    "absolute path": _tree({"/a": GOOD}),
    "not unicode": b'{"format_version": 1, "files": {"\\ud800": {"size": 1, "blob_id": "%s"}}}' % (b"22" * 20),
    "file and folder": _tree({"a": GOOD, "a/b": GOOD}),
}


@pytest.mark.parametrize("data", BAD_TREES.values(), ids=BAD_TREES)
def test_a_bad_listing_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        hfcache.decode_tree(data)


BAD_LISTINGS = {
    "not a map": codec.pack([]),
    "no file": codec.pack({}),
    "no digest": codec.pack({"a": [1]}),
    "size is true": codec.pack({"a": [True, SHA]}),
    "digest is text": codec.pack({"a": [1, "11"]}),
    "path leaves": codec.pack({"../a": [1, SHA]}),
}


@pytest.mark.parametrize("data", BAD_LISTINGS.values(), ids=BAD_LISTINGS)
def test_a_bad_listing_for_the_daemon_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        hfcache.decode_listing(data)


def test_the_largest_git_file_and_one_byte_more() -> None:
    Listed("a", GIT_MAX_BYTES - 1, GIT)
    with pytest.raises(FormatError, match="too large"):
        Listed("a", GIT_MAX_BYTES, GIT)
    Listed("a", GIT_MAX_BYTES, SHA)
