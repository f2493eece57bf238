"""The Hub's interface as values: which request is which question, and what a manifest answers to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.protocol import torrent
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.hfapi import (
    LARGE_BYTES,
    MAX_PATHS,
    Code,
    File,
    FileReply,
    Fixed,
    ModelInfo,
    PathsInfo,
    Refs,
    Reply,
    Route,
    Tree,
    answer,
    error,
    file_reply,
    not_found,
    not_ready,
    parse_paths,
    parse_route,
    redirect,
    redirect_file,
)
from modelp2p.protocol.httprange import Span, UnsatisfiableError, parse_range
from modelp2p.protocol.kinds import kind_of
from modelp2p.protocol.manifest import FileEntry, Manifest, content_revision
from modelp2p.protocol.merkle import leaf_hashes, root_of
from modelp2p.protocol.names import ModelName, PublisherId
from modelp2p.protocol.statement import payload_info

PUBLISHER = PublisherId("mp1" + "a" * 52)
FILES = {"a.json": b"{}\n", "sub.txt": b"x", "sub/b.txt": b"hi\n", "sub/deep/w.safetensors": b"abc"}


def entry_of(path: str, data: bytes) -> FileEntry:
    is_git = not path.endswith(".safetensors")
    blob = hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).digest() if is_git else None
    etag = "git" if is_git else "sha256"
    return FileEntry(path, len(data), root_of(leaf_hashes(data)), hashlib.sha256(data).digest(), etag, blob, kind_of(path))


def manifest_of(entries: tuple[FileEntry, ...], created: int = 1_700_000_000, license_: str = "") -> Manifest:
    files = tuple(sorted(entries, key=lambda entry: entry.path.encode()))
    length = torrent.piece_length_for(sum(entry.size for entry in files))
    revision = content_revision(files)
    info_hash = torrent.info_hash(payload_info(revision, files, length))
    return Manifest(ModelName.parse("lab/model"), revision, created, 1, info_hash, length, files, license=license_)


MANIFEST = manifest_of(tuple(entry_of(path, data) for path, data in FILES.items()))


def said(reply: Reply) -> Any:  # noqa: ANN401  # JSON
    return json.loads(reply.body)


def headers(reply: Reply | FileReply) -> Mapping[str, str]:
    found = dict(reply.headers)
    assert len(found) == len(reply.headers)
    return found


ROUTES: dict[str, tuple[str, str, Route]] = {
    "info of one segment": ("GET", "/api/models/gpt2", ModelInfo("gpt2")),
    "info of two": ("GET", "/api/models/lab/model?blobs=true", ModelInfo("lab/model", blobs=True)),
    "info of a revision": ("GET", "/api/models/lab/model/revision/refs%2Fpr%2F4", ModelInfo("lab/model", "refs/pr/4")),
    "tree": ("GET", "/api/models/lab/model/tree/main?recursive=True&expand=False", Tree("lab/model", "main", "", True)),
    "tree of a folder": ("GET", "/api/models/gpt2/tree/main/a%20b/c", Tree("gpt2", "main", "a b/c", False)),
    "refs": ("GET", "/api/models/lab/model/refs", Refs("lab/model")),
    "paths": ("POST", "/api/models/lab/model/paths-info/main", PathsInfo("lab/model", "main")),
    "file": ("GET", "/lab/model/resolve/main/sub/x%20y%2b%23%25.txt", File("lab/model", "main", "sub/x y+#%.txt")),
    "head of a file": ("HEAD", "/gpt2/resolve/main/a.json", File("gpt2", "main", "a.json")),
    "a path that climbs": ("GET", "/lab/model/resolve/main/../%2e%2e/etc/passwd", File("lab/model", "main", "../../etc/passwd")),
    "an encoded slash": ("GET", "/lab/model/resolve/main/sub%2Fb.txt", File("lab/model", "main", "sub/b.txt")),
    "a name that is a marker": ("GET", "/resolve/resolve/main/a", File("resolve", "main", "a")),
    "whoami": ("GET", "/api/whoami-v2", Fixed.WHOAMI),
    "harnesses": ("GET", "/api/agent-harnesses", Fixed.AGENTS),
    "datasets": ("GET", "/api/datasets/lab/data", Fixed.ELSEWHERE),
    "nothing": ("GET", "/", Fixed.ELSEWHERE),
    "no path at all": ("GET", "", Fixed.ELSEWHERE),
    "resolve without a file": ("GET", "/lab/model/resolve/main", Fixed.ELSEWHERE),
    "paths by GET": ("GET", "/api/models/lab/model/paths-info/main", Fixed.ELSEWHERE),
    "a new repository": ("POST", "/api/repos/create", Fixed.UPLOAD),
    "a commit": ("POST", "/api/models/lab/model/commit/main", Fixed.UPLOAD),
    "an upload": ("PUT", "/lab/model/resolve/main/a.json", Fixed.UPLOAD),
    "lfs": ("POST", "/lab/model.git/info/lfs/objects/batch", Fixed.UPLOAD),
    "a removal": ("DELETE", "/api/repos/delete", Fixed.UPLOAD),
}


@pytest.mark.parametrize(("method", "target", "route"), ROUTES.values(), ids=ROUTES)
def test_a_request_is_one_question(method: str, target: str, route: Route) -> None:
    assert parse_route(method, target) == route


def test_a_path_that_is_no_text_is_refused() -> None:
    with pytest.raises(FormatError):
        parse_route("GET", "/lab/model/resolve/main/%ff")


@given(st.sampled_from(["GET", "HEAD", "POST", "PUT"]), st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40))
def test_any_target_is_some_question(method: str, target: str) -> None:
    try:
        parse_route(method, target)
    except FormatError:
        assert "%" in target


BODIES = {
    "form": ("application/x-www-form-urlencoded", b"paths=a.json&paths=sub%2Fb.txt&expand=True", ["a.json", "sub/b.txt"]),
    "no kind": ("", b"paths=a", ["a"]),
    "json": ("application/json; charset=utf-8", b'{"paths": ["a", "b"]}', ["a", "b"]),
    "one as text": ("application/json", b'{"paths": "a"}', ["a"]),
    "nothing": ("", b"", []),
}


@pytest.mark.parametrize(("kind", "body", "paths"), BODIES.values(), ids=BODIES)
def test_paths_come_as_a_form_or_as_json(kind: str, body: bytes, paths: list[str]) -> None:
    assert parse_paths(kind, body) == paths


BAD_BODIES = {
    "not json": ("application/json", b"{"),
    "no list": ("application/json", b'{"paths": 3}'),
    "no texts": ("application/json", b'{"paths": [1]}'),
    "another json": ("application/json", b"[]"),
    "deep": ("application/json", b"[" * 200_000),
    "no text": ("", b"\xff"),
    "too many": ("application/json", json.dumps({"paths": ["a"] * (MAX_PATHS + 1)}).encode()),
    "too many in a form": ("", b"&".join([b"paths=a"] * (MAX_PATHS + 2))),
}


@pytest.mark.parametrize(("kind", "body"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_other_bodies_are_refused(kind: str, body: bytes) -> None:
    with pytest.raises(FormatError):
        parse_paths(kind, body)


def test_what_a_release_is_comes_from_its_manifest() -> None:
    reply = answer(ModelInfo("lab/model", blobs=True), MANIFEST, PUBLISHER)
    body = said(reply)
    assert reply.status == 200
    assert (body["id"], body["sha"], body["private"], body["gated"]) == ("lab/model", MANIFEST.revision, False, False)
    assert [row["rfilename"] for row in body["siblings"]] == [entry.path for entry in MANIFEST.files]
    assert body["siblings"][-1]["lfs"]["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert body["lastModified"] == "2023-11-14T22:13:20.000Z"
    assert headers(reply)["X-HF-Warning"] == f"modelp2p; served from swarm, signed by {PUBLISHER}"
    assert headers(reply)["X-Repo-Commit"] == MANIFEST.revision


def test_a_time_beyond_the_calendar_is_its_end() -> None:
    late = manifest_of(MANIFEST.files, created=2**53 - 1, license_="Apache-2.0")
    body = said(answer(ModelInfo("lab/model"), late, PUBLISHER))
    assert body["lastModified"].startswith("9999-12-31T23:59:59")
    assert body["tags"] == ["license:apache-2.0"]


def test_ids_are_those_that_git_gives() -> None:
    # By git 2.39, `write-tree` of these files with the pointer file of git-lfs in the place of the weights.
    rows = {row["path"]: row for row in said(answer(Tree("lab/model", "main", "", True), MANIFEST, PUBLISHER))}
    assert {path: row["oid"] for path, row in rows.items()} == {
        "a.json": "0967ef424bce6791893e9a57bb952f80fd536e93",
        "sub.txt": "c1b0730e0133447badcfd47fd144e254807b06e1",
        "sub": "5a679e367be0a2b9cc70c2ab84dcb440dc096d4a",
        "sub/b.txt": "45b983be36b73c0788dc9cbcb76cbb80fc7bb057",
        "sub/deep": "3a7b4ecc68c1fd1161f18a1aecb020e95396388c",
        "sub/deep/w.safetensors": "80d7d501c2b256023dc42e46d958b9ac2ec283ee",
    }
    assert rows["sub/deep/w.safetensors"]["lfs"] == {"oid": hashlib.sha256(b"abc").hexdigest(), "size": 3, "pointerSize": 126}
    assert "lfs" not in rows["a.json"]
    assert all("xetHash" not in row for row in rows.values())


def test_a_folder_is_listed_without_what_lies_deeper() -> None:
    def listed(folder: str) -> list[str]:
        return [row["path"] for row in said(answer(Tree("lab/model", "main", folder, False), MANIFEST, PUBLISHER))]

    assert listed("") == ["a.json", "sub", "sub.txt"]
    assert listed("sub") == ["sub/b.txt", "sub/deep"]
    missing = answer(Tree("lab/model", "main", "su", False), MANIFEST, PUBLISHER)
    assert (missing.status, headers(missing)["X-Error-Code"]) == (404, "EntryNotFound")
    assert headers(missing)["X-Repo-Commit"] == MANIFEST.revision


def test_paths_are_told_apart_and_unknown_ones_left_out() -> None:
    rows = said(answer(PathsInfo("lab/model", "main"), MANIFEST, PUBLISHER, ["sub", "a.json", "nope", "a.json", ""]))
    assert [(row["type"], row["path"]) for row in rows] == [("directory", "sub"), ("file", "a.json")]


def test_the_one_branch_is_main() -> None:
    body = said(answer(Refs("lab/model"), MANIFEST, PUBLISHER))
    assert [(branch["name"], branch["targetCommit"]) for branch in body["branches"]] == [("main", MANIFEST.revision)]


def asked(
    entry: FileEntry, *, is_head: bool = False, wanted: str | None = None, if_range: str | None = None
) -> FileReply | Reply:
    return file_reply(MANIFEST, PUBLISHER, entry, is_head=is_head, wanted=wanted, if_range=if_range)


def test_a_file_is_called_by_the_etag_of_the_hub() -> None:
    git, lfs = MANIFEST.file("a.json"), MANIFEST.file("sub/deep/w.safetensors")
    assert headers(asked(git))["ETag"] == '"0967ef424bce6791893e9a57bb952f80fd536e93"'
    assert headers(asked(lfs))["ETag"] == f'"{hashlib.sha256(b"abc").hexdigest()}"'
    for reply in (asked(git), asked(lfs, is_head=True), asked(lfs, wanted="bytes=9-")):
        assert headers(reply)["X-Repo-Commit"] == MANIFEST.revision
        assert not any("xet" in name.lower() or name == "Content-Encoding" for name in headers(reply))


def test_a_head_of_a_large_file_does_not_say_its_size() -> None:
    entry = MANIFEST.file("sub/deep/w.safetensors")
    sizes = {LARGE_BYTES: str(LARGE_BYTES), LARGE_BYTES + 1: None}
    for size, told in sizes.items():
        large = FileEntry(entry.path, size, entry.root, entry.sha256, entry.etag, None, entry.kind)
        head, get = asked(large, is_head=True), asked(large)
        assert headers(head).get("Content-Length") == told
        assert headers(get)["Content-Length"] == str(size)
        assert isinstance(head, FileReply)
        assert len(head.span) == 0


def test_a_range_is_a_part_and_anything_else_is_the_whole() -> None:
    entry = MANIFEST.file("a.json")
    part, whole = asked(entry, wanted="bytes=1-"), asked(entry, wanted="bytes=0-0,2-2")
    assert isinstance(part, FileReply)
    assert isinstance(whole, FileReply)
    assert (part.status, part.span, headers(part)["Content-Range"]) == (206, Span(1, 3), "bytes 1-2/3")
    assert (whole.status, whole.span) == (200, Span(0, 3))
    assert "Content-Range" not in headers(whole)
    behind = asked(entry, wanted="bytes=3-")
    assert (behind.status, headers(behind)["Content-Range"]) == (416, "bytes */3")
    # Another version of the file was begun: it is begun anew.
    assert asked(entry, wanted="bytes=1-", if_range='"other"').status == 200
    assert asked(entry, wanted="bytes=1-", if_range=headers(part)["ETag"]).status == 206
    assert asked(entry, wanted="bytes=1-", is_head=True).status == 200


RANGES = {
    "first byte": ("bytes=0-0", 10, Span(0, 1)),
    "to the end": ("bytes=4-", 10, Span(4, 10)),
    "beyond the end": ("bytes=4-99", 10, Span(4, 10)),
    "suffix": ("bytes=-3", 10, Span(7, 10)),
    "suffix longer than the file": ("bytes=-30", 10, Span(0, 10)),
    "blanks around it": ("  bytes=1-2 ", 10, Span(1, 3)),
    "none": (None, 10, None),
    "empty": ("", 10, None),
    "several": ("bytes=0-1,3-4", 10, None),
    "another unit": ("lines=0-1", 10, None),
    "backwards": ("bytes=5-4", 10, None),
    "no number": ("bytes=-", 10, None),
    "negative": ("bytes=-1-2", 10, None),
    "an endless number": ("bytes=0-" + "9" * 5000, 10, None),
}


@pytest.mark.parametrize(("header", "size", "span"), RANGES.values(), ids=RANGES)
def test_ranges(header: str | None, size: int, span: Span | None) -> None:
    assert parse_range(header, size) == span


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=99-100", 10), ("bytes=-0", 10), ("bytes=0-", 0)])
def test_a_range_without_a_byte_cannot_be_satisfied(header: str, size: int) -> None:
    with pytest.raises(UnsatisfiableError):
        parse_range(header, size)


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
def test_a_range_lies_in_its_file(size: int, first: int, last: int) -> None:
    for header in (f"bytes={first}-{last}", f"bytes={first}-", f"bytes=-{last}"):
        try:
            span = parse_range(header, size)
        except UnsatisfiableError:
            continue
        assert span is None or 0 <= span.begin < span.end <= size


def test_errors_say_it_in_the_body_and_in_a_header() -> None:
    reply = not_found(Code.REPO, "no ümläut\r\nX-Evil: 1")
    assert reply.status == 404
    assert said(reply)["error"] == "no ümläut\r\nX-Evil: 1"
    assert headers(reply)["X-Error-Code"] == "RepoNotFound"
    assert headers(reply)["X-Error-Message"] == "no \\xfcml\\xe4ut  X-Evil: 1"
    assert "X-Repo-Commit" not in headers(reply)
    assert len(headers(error(500, "x" * 10_000))["X-Error-Message"]) == 500


@pytest.mark.parametrize(
    ("agent", "status"),
    [
        ("", 429),
        ("curl/7.88.1", 429),
        ("unknown/None; hf_hub/2.4.0; python/3.11.7", 429),
        ("unknown/None; hf_hub/1.0.1; python/3.11.7", 429),
        ("unknown/None; hf_hub/0.36.2; python/3.11.7", 503),
    ],
)
def test_not_ready_is_what_the_client_tries_again_and_says_when(agent: str, status: int) -> None:
    reply = not_ready("soon", 8, agent)
    assert (reply.status, headers(reply)["Retry-After"]) == (status, "8")


def test_a_redirect_keeps_path_and_query() -> None:
    reply = redirect("https://hub.example", "/api/models/a%2Fb?x=1&y=%20")
    assert (reply.status, reply.headers) == (307, (("Location", "https://hub.example/api/models/a%2Fb?x=1&y=%20"),))
    file = redirect_file("https://hub.example", File("lab/model", "main", "a b/ü.txt"), MANIFEST)
    assert headers(file)["Location"] == f"https://hub.example/lab/model/resolve/{MANIFEST.revision}/a%20b/%C3%BC.txt"
