"""What lies beside an exported release: a torrent of the signed manifest alone, and sums that any machine can check."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import libtorrent as lt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.protocol import exported
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.exported import decode_sums, encode_sums, torrent_file
from modelp2p.protocol.names import ModelName
from modelp2p.protocol.paths import MAX_FILES
from modelp2p.protocol.statement import Release, verify_statement
from tests.releases import statement_of

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
FILES = {"a.safetensors": b"a" * (2 * MIB + 1), "b/ä b.json": b"{}", "empty.txt": b""}
TRACKERS = ("https://one.example/announce", "udp://two.example:6969/announce")
SEEDS = ("https://example.org/lab/model/resolve/",)

digests = st.dictionaries(
    st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}){0,2}", fullmatch=True), st.binary(min_size=32, max_size=32), max_size=5
)


def release_of(files: dict[str, bytes] = FILES, **changes: tuple[str, ...]) -> Release:
    release = verify_statement(statement_of(files))
    return replace(release, manifest=replace(release.manifest, **changes))  # type: ignore[arg-type]  # tuples of text


def test_names() -> None:
    assert exported.folder_of(ModelName.parse("lab/model")) == "lab--model"
    assert exported.folder_of(ModelName.parse("model")) == "model"
    release = release_of()
    revision = release.manifest.revision
    names = (exported.bundle_of(revision), exported.torrent_of(revision), exported.sums_of(revision))
    assert names == (f"{revision}.modelp2p", f"{revision}.torrent", f"{revision}.sha256")


@pytest.mark.parametrize("trackers", [(), TRACKERS[:1], TRACKERS], ids=["no tracker", "one", "two"])
@pytest.mark.parametrize("seeds", [(), SEEDS], ids=["no web seed", "one web seed"])
def test_the_torrent_is_that_of_the_content_with_what_was_signed(trackers: tuple[str, ...], seeds: tuple[str, ...]) -> None:
    release = release_of(trackers=trackers, web_seeds=seeds)
    data = torrent_file(release)
    assert lt.bencode(lt.bdecode(data)) == data, "keys out of order, or twice"
    params = lt.load_torrent_buffer(data)
    assert params.ti is not None
    assert params.ti.info_hashes().v2.to_bytes() == release.info_hash
    assert tuple(params.trackers) == trackers
    assert tuple(params.url_seeds) == seeds
    # Which libtorrent does not read where there is a list, and others read alone.
    assert (b"8:announce28:https://one.example/announce" in data) == bool(trackers)
    bare = release.torrent_bytes()
    assert (data == bare) == (not trackers and not seeds)
    assert bare[1:-1] in data, "another info dict, or other piece layers"


@pytest.mark.parametrize(
    ("files", "has_folder"),
    [({"a.gguf": b"a"}, False), ({"b/a.gguf": b"a"}, True), ({"a.gguf": b"a", "b": b"b"}, True)],
    ids=["one file", "one file in a folder", "two files"],
)
def test_which_torrents_have_a_folder_is_what_libtorrent_says(files: dict[str, bytes], has_folder: bool) -> None:
    release = release_of(files)
    assert exported.has_own_folder(release) == has_folder
    info = lt.load_torrent_buffer(torrent_file(release)).ti
    assert info is not None
    assert info.layout().file_path(0).startswith(release.manifest.revision) == has_folder


@given(digests)
def test_sums_round_trip(sums: dict[str, bytes]) -> None:
    assert decode_sums(encode_sums(sums)) == sums


def test_sha256sum_takes_them(tmp_path: Path) -> None:
    for path, data in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    sums = {path: hashlib.sha256(data).digest() for path, data in FILES.items()}
    (tmp_path / "sums").write_bytes(encode_sums(sums))
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "sums"], cwd=tmp_path, check=True)
    written = subprocess.run(["sha256sum", "--binary", *FILES], cwd=tmp_path, check=True, capture_output=True).stdout
    assert decode_sums(written) == sums


LINE = b"0" * 64 + b"  a\n"
BENT = {
    "no line end": LINE[:-1],
    "an empty line": LINE + b"\n",
    "a short digest": LINE[1:],
    "capital digits": b"A" * 64 + b"  a\n",
    "one space": b"0" * 64 + b" a\n",
    "no path": b"0" * 64 + b"  \n",
    "an escaped path": b"\\" + LINE,
    "a comment": b"# sums\n" + LINE,
    "a path outside": b"0" * 64 + b"  ../a\n",
    "an absolute path": b"0" * 64 + b"  /a\n",
    "one path twice": LINE + LINE,
    "another line end": LINE[:-1] + b"\r\n",
    "not text": b"0" * 64 + b"  \xff\n",
    "too many lines": b"".join(b"0" * 64 + b"  %d\n" % number for number in range(MAX_FILES + 1)),
    "too large": bytes(exported.MAX_SUMS_BYTES + 1),
}


@pytest.mark.parametrize("what", BENT)
def test_anything_else_is_refused(what: str) -> None:
    with pytest.raises(FormatError):
        decode_sums(BENT[what])


def test_no_sums_are_sums() -> None:
    assert decode_sums(b"") == {}
