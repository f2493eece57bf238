"""`show --lineage` over made-up nodes: chains, families, circles, and statements that are missing or about something else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from modelp2p.cli.lineage import MAX_LEVELS, MAX_ROWS
from modelp2p.protocol.errors import NotFoundError
from modelp2p.protocol.manifest import Lineage, encode_manifest
from modelp2p.protocol.names import ModelName, Revision
from tests.cli.fakes import PUBLISHER, SHOWN_MANIFEST, SHOWN_ROW, FakeDaemon, FakeReply, memory, modelp2p

if TYPE_CHECKING:
    import pytest

    from modelp2p.protocol.codec import Map

STRANGER = "mp1" + "b" * 52


def hash_of(name: str) -> str:
    return name.encode().hex().ljust(64, "0")


def ref_of(name: str) -> str:
    return f"lab/{name}@{revision_of(name)}"


def revision_of(name: str) -> str:
    return name.encode().hex().ljust(40, "0")


@dataclass(frozen=True)
class Kept:
    """A statement that is on the node."""

    bases: Sequence[str] = ()
    """`relation=name`, by default a fine-tune."""
    publisher: str = PUBLISHER
    is_named: bool = True
    content: str = ""
    """Which name's content it is about; by default its own."""


def node_of(statements: Mapping[str, Kept]) -> FakeDaemon:
    """A daemon whose `show` knows these."""

    def show(args: Map, fds: Sequence[int]) -> FakeReply:
        name = str(args["ref"]).partition("@")[0].removeprefix("lab/")
        if name not in statements:
            raise NotFoundError(f"{name} is not known here")
        kept = statements[name]
        info_hash = hash_of(kept.content or name)
        stated = [base.rpartition("=") for base in kept.bases]
        manifest = replace(
            SHOWN_MANIFEST,
            name=ModelName.parse(f"lab/{name}"),
            info_hash=bytes.fromhex(info_hash),
            lineage=tuple(
                Lineage(relation or "finetune", f"lab/{base}", Revision(revision_of(base)), bytes.fromhex(hash_of(base)))
                for relation, _, base in stated
            ),
        )
        row: Map = {
            **SHOWN_ROW,
            "name": f"lab/{name}",
            "revision": revision_of(name),
            "info_hash": info_hash,
            "publisher": kept.publisher,
            "name_verified": kept.is_named,
        }
        return FakeReply(row, (memory(encode_manifest(manifest)),))

    return FakeDaemon({"show": show})


def chain(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert modelp2p("show", "lab/child", "--lineage", "--json", daemon=daemon) == 0
    rows = json.loads(capsys.readouterr().out)["chain"]
    assert isinstance(rows, list)
    return rows


def short(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> list[tuple[int, str, str, str | None]]:
    return [(row["depth"], row["name"].removeprefix("lab/"), row["standing"], row["end"]) for row in chain(daemon, capsys)]


def test_each_base_is_told_with_who_vouches_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = node_of(
        {
            "child": Kept(["quantized=tuned", "merged=other"]),
            "tuned": Kept(["base"], STRANGER, is_named=False),
            "base": Kept(["distilled=lost"]),
            "other": Kept(content="something else"),
        }
    )
    assert modelp2p("show", "lab/child", "--lineage", daemon=daemon) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith("      distilled of lab/lost@")
    assert [" ".join(line.split()) for line in lines] == [
        "RELEASE PUBLISHER STANDING",
        f"lab/child@{revision_of('child')[:12]} {PUBLISHER} trusted for the name",
        f"quantized of lab/tuned@{revision_of('tuned')[:12]} {STRANGER} not trusted for the name",
        f"finetune of lab/base@{revision_of('base')[:12]} {PUBLISHER} trusted for the name",
        f"distilled of lab/lost@{revision_of('lost')[:12]} statement not here",
        f"merged of lab/other@{revision_of('other')[:12]} the statement here is about other content",
    ]
    rows = chain(daemon, capsys)
    assert [row["depth"] for row in rows] == [0, 1, 2, 3, 1]
    assert rows[3] == {
        "depth": 3,
        "relation": "distilled",
        "name": "lab/lost",
        "revision": revision_of("lost"),
        "info_hash": hash_of("lost"),
        "standing": "not_here",
        "publisher": None,
        "end": None,
        "circle": [],
    }
    assert rows[0]["relation"] is None
    # What is asked for is exactly what was pinned.
    assert [asked.args["ref"] for asked in daemon.asked[1:5]] == [ref_of(name) for name in ("tuned", "base", "lost", "other")]


def test_a_release_made_from_nothing_is_a_lineage_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert short(node_of({"child": Kept()}), capsys) == [(0, "child", "trusted", None)]


def test_the_lineage_is_told_only_to_who_asks(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = node_of({"child": Kept(["base"])})
    assert modelp2p("show", "lab/child", "--json", daemon=daemon) == 0
    assert "chain" not in json.loads(capsys.readouterr().out)
    assert len(daemon.asked) == 1


def test_statements_that_name_each_other_are_a_circle_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = node_of({"child": Kept(["a"]), "a": Kept(["b"]), "b": Kept(["a", "root"]), "root": Kept()})
    rows = chain(daemon, capsys)
    assert [row["name"] for row in rows] == ["lab/child", "lab/a", "lab/b", "lab/a", "lab/root"]
    assert [row["end"] for row in rows] == [None, None, None, "circle", None]
    assert rows[3]["circle"] == [ref_of("a"), ref_of("b")]
    assert modelp2p("show", "lab/child", "--lineage", daemon=daemon) == 0
    a, b = (f"lab/{name}@{revision_of(name)[:12]}" for name in "ab")
    assert f"in a circle: {a} from {b} from {a}" in capsys.readouterr().out


def test_a_release_that_names_itself_is_a_circle_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    (_, itself) = chain(node_of({"child": Kept(["child"])}), capsys)
    assert (itself["end"], itself["circle"]) == ("circle", [ref_of("child")])


def test_a_base_of_two_is_followed_once(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = node_of({"child": Kept(["merged=a", "merged=b"]), "a": Kept(["base"]), "b": Kept(["base"]), "base": Kept(["root"])})
    assert short(daemon, capsys) == [
        (0, "child", "trusted", None),
        (1, "a", "trusted", None),
        (2, "base", "trusted", None),
        (3, "root", "not_here", None),
        (1, "b", "trusted", None),
        (2, "base", "trusted", "again"),
    ]
    assert len(daemon.asked) == len({str(asked.args["ref"]) for asked in daemon.asked})


def test_a_long_lineage_is_cut_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    line = {"child": Kept(["0"])} | {str(number): Kept([str(number + 1)]) for number in range(MAX_LEVELS + 5)}
    rows = short(node_of(line), capsys)
    assert len(rows) == MAX_LEVELS + 1
    assert [end for *_, end in rows] == [None] * MAX_LEVELS + ["limit"]


def test_what_was_cut_is_followed_where_it_comes_earlier(capsys: pytest.CaptureFixture[str]) -> None:
    last = str(MAX_LEVELS - 1)
    line = {"child": Kept(["0", last])} | {str(number): Kept([str(number + 1)]) for number in range(MAX_LEVELS)}
    assert short(node_of(line), capsys)[MAX_LEVELS:] == [
        (MAX_LEVELS, last, "trusted", "limit"),
        (1, last, "trusted", None),
        (2, str(MAX_LEVELS), "not_here", None),
    ]


def test_a_wide_lineage_is_cut_and_asks_no_more_than_it_tells(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{number}" for number in range(64)]
    deeper = {name: Kept([f"{name}.{number}" for number in range(64)]) for name in names}
    daemon = node_of({"child": Kept(names), **deeper})
    rows = short(daemon, capsys)
    assert len(rows) <= MAX_ROWS
    assert len(daemon.asked) <= MAX_ROWS
    assert [end for depth, *_, end in rows if depth == 1] == [None] * 2 + ["limit"] * 62
