from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelp2p.protocol.names import ModelName, PublisherId, Revision
from modelp2p.protocol.publichttp import BundleOf, ChainOf, FileOf, Question, head_of_file, parse_target

COMMIT = Revision("0123456789" * 4)
LAB, BARE = ModelName.parse("lab/model"), ModelName.parse("model")
PUBLISHER = PublisherId("mp1" + "a2" * 26)

SERVED: dict[str, tuple[str, Question]] = {
    "a file": (f"/lab/model/resolve/{COMMIT}/config.json", FileOf(LAB, COMMIT, "config.json")),
    "a file in folders": (f"/lab/model/resolve/{COMMIT}/a/b/c", FileOf(LAB, COMMIT, "a/b/c")),
    "a file of a name without an organisation": (f"/model/resolve/{COMMIT}/a", FileOf(BARE, COMMIT, "a")),
    "a file that is called like a route": (
        f"/model/resolve/{COMMIT}/resolve/{COMMIT}",
        FileOf(BARE, COMMIT, f"resolve/{COMMIT}"),
    ),
    "a file that is a bundle": (f"/model/resolve/{COMMIT}/main.modelp2p", FileOf(BARE, COMMIT, "main.modelp2p")),
    "as libtorrent escapes": (f"/model/resolve/{COMMIT}/x%20y%2b%23%25.txt", FileOf(BARE, COMMIT, "x y+#%.txt")),
    "in capitals": (f"/model/resolve/{COMMIT}/%C3%BC%2B", FileOf(BARE, COMMIT, "\u00fc+")),
    "an escaped slash": (f"/model/resolve/{COMMIT}/a%2fb", FileOf(BARE, COMMIT, "a/b")),
    "with a query": (f"/model/resolve/{COMMIT}/a?download=true", FileOf(BARE, COMMIT, "a")),
    "a model called resolve": (f"/lab/resolve/resolve/{COMMIT}/a", FileOf(ModelName.parse("lab/resolve"), COMMIT, "a")),
    "a bare model called resolve": (f"/resolve/resolve/{COMMIT}/a", FileOf(ModelName.parse("resolve"), COMMIT, "a")),
    "a bundle": (f"/lab/model/{COMMIT}.modelp2p", BundleOf(LAB, COMMIT)),
    "the newest bundle": ("/lab/model/main.modelp2p", BundleOf(LAB, None)),
    "the newest bundle of a bare name": ("/model/main.modelp2p", BundleOf(BARE, None)),
    "a publisher": (f"/.well-known/modelp2p/publishers/{PUBLISHER}", ChainOf(PUBLISHER)),
}


@pytest.mark.parametrize(("target", "question"), SERVED.values(), ids=SERVED)
def test_a_path_has_one_meaning(target: str, question: Question) -> None:
    assert parse_target(target) == question


NOTHING = {
    "the root": "/",
    "nothing at all": "",
    "an organisation": "/lab",
    "a model": "/lab/model",
    "its revisions": "/lab/model/resolve",
    "its revisions, as a folder": "/lab/model/resolve/",
    "a release": f"/lab/model/resolve/{COMMIT}",
    "a release of a bare name": f"/model/resolve/{COMMIT}",
    "a release as a folder": f"/lab/model/resolve/{COMMIT}/",
    "a branch": "/lab/model/resolve/main/config.json",
    "half a revision": f"/lab/model/resolve/{COMMIT[:12]}/config.json",
    "a revision in capitals": f"/lab/model/resolve/{'AB' * 20}/config.json",
    "three segments": f"/a/b/c/resolve/{COMMIT}/x",
    "an empty segment in front": f"//lab/model/resolve/{COMMIT}/x",
    "an empty organisation": f"//model/resolve/{COMMIT}/x",
    "a name that climbs": f"/../model/resolve/{COMMIT}/x",
    "an escaped name that climbs": f"/%2e%2e/model/resolve/{COMMIT}/x",
    "a bundle of nothing": "/main.modelp2p",
    "a bundle of a branch": "/lab/model/dev.modelp2p",
    "a bundle in a folder": "/lab/model/x/main.modelp2p",
    "a bundle without a name": "/lab/model/.modelp2p",
    "well known, and nothing": "/.well-known/modelp2p",
    "all publishers": "/.well-known/modelp2p/publishers/",
    "a publisher and more": f"/.well-known/modelp2p/publishers/{PUBLISHER}/1.root.json",
    "a publisher in capitals": f"/.well-known/modelp2p/publishers/{PUBLISHER.upper()}",
    "another application": "/.well-known/security.txt",
    "the other server": "/api/models/lab/model",
    "not UTF-8": f"/lab/model/resolve/{COMMIT}/%ff",
    "a proxy's request": "http://host/lab/model/main.modelp2p",
    "an asterisk": "*",
}


@pytest.mark.parametrize("target", NOTHING.values(), ids=NOTHING)
def test_everything_else_is_nothing(target: str) -> None:
    assert parse_target(target) is None


@settings(max_examples=50)
@given(st.text(st.characters(max_codepoint=126, min_codepoint=33)).map("/".__add__))
def test_any_text_is_a_question_or_nothing(target: str) -> None:
    found = parse_target(target)
    assert found is None or isinstance(found, FileOf | BundleOf | ChainOf)


ROOT = bytes(range(32))
RANGES = {
    "no range": (None, None, 200, 0, 100),
    "the first bytes": ("bytes=0-9", None, 206, 0, 10),
    "all that libtorrent asks of a small file": ("bytes=0-99", None, 206, 0, 100),
    "from a byte on": ("bytes=90-", None, 206, 90, 100),
    "the last bytes": ("bytes=-1", None, 206, 99, 100),
    "beyond the end": ("bytes=90-1000", None, 206, 90, 100),
    "of the same file": ("bytes=0-9", f'"{ROOT.hex()}"', 206, 0, 10),
    "of another file": ("bytes=0-9", '"other"', 200, 0, 100),
    "several": ("bytes=0-1,5-6", None, 200, 0, 100),
    "behind the end": ("bytes=100-", None, 416, 0, 0),
}


@pytest.mark.parametrize(("wanted", "if_range", "status", "begin", "end"), RANGES.values(), ids=RANGES)
def test_a_range_is_answered_exactly(wanted: str | None, if_range: str | None, status: int, begin: int, end: int) -> None:
    head = head_of_file(100, ROOT, is_head=False, wanted=wanted, if_range=if_range)
    headers = dict(head.headers)
    assert (head.status, head.span.begin, head.span.end) == (status, begin, end)
    assert headers["Content-Length"] == str(end - begin)
    expected = {200: None, 206: f"bytes {begin}-{end - 1}/100", 416: "bytes */100"}[status]
    assert headers.get("Content-Range") == expected
    assert headers["ETag"] == f'"{ROOT.hex()}"'
    # An answer that says "no such range" is about a request, not about the file.
    assert ("immutable" in headers.get("Cache-Control", "")) == (status != 416)


def test_a_head_says_the_whole_length_whatever_range_it_asks_for() -> None:
    head = head_of_file(100, ROOT, is_head=True, wanted="bytes=200-", if_range=None)
    assert (head.status, dict(head.headers)["Content-Length"]) == (200, "100")


def test_an_empty_file_has_a_tag_too() -> None:
    head = head_of_file(0, b"", is_head=False, wanted=None, if_range=None)
    assert (head.status, len(head.span), dict(head.headers)["ETag"]) == (200, 0, '"empty"')
