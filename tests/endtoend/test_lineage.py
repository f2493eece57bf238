"""What a release was made from: stated by whoever made it, and judged by what each node knows of its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.endtoend.site import MIB, fetched, model

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair
    from tests.nodes import Node

pytestmark = pytest.mark.swarm


def chain(node: Node, name: str) -> list[dict[str, Any]]:
    rows = node.ok("show", name, "--lineage")["chain"]
    assert isinstance(rows, list)
    return rows


def told(node: Node, name: str) -> list[tuple[str | None, str, str, str | None]]:
    return [(row["relation"], row["name"], row["standing"], row["end"]) for row in chain(node, name)]


def test_a_child_leads_back_to_its_base_and_says_who_vouches_for_it(pair: Pair, tmp_path: Path) -> None:
    lab, tuner = pair.seed, pair.node
    bundle = str(tmp_path / "base.modelp2p")
    weights = pair.site.write(model("base", MIB))
    base = lab.publish(weights, "lab/base")
    lab.ok("show", "lab/base", "--bundle", bundle)
    child = tuner.publish(pair.site.write(model("child", MIB)), "tuner/child", "--base", f"finetune={bundle}")

    # Who has only the child is told what its publisher stated, and that nothing else is known.
    lab_peer, tuner_peer = ("--peer", lab.address, "--timeout", "20"), ("--peer", tuner.address, "--timeout", "20")
    assert told(tuner, "tuner/child")[1:] == [("finetune", "lab/base", "not_here", None)]
    # The base comes by its link, which gives its publisher no name.
    fetched(tuner, base, lab)
    _, untrusted = chain(tuner, "tuner/child")
    assert (untrusted["standing"], untrusted["publisher"]) == ("untrusted", base["publisher"])
    assert (untrusted["revision"], untrusted["info_hash"]) == (base["revision"], base["info_hash"])
    tuner.ok("trust", "add", base["link"], "--name", "lab/*", *lab_peer)
    assert told(tuner, "tuner/child")[1:] == [("finetune", "lab/base", "trusted", None)]

    # Two publishers who name each other, which content alone cannot.
    lab.ok("trust", "add", child["link"], "--name", "tuner/*", *tuner_peer)
    fetched(lab, child, tuner)
    lab.publish(weights, "lab/base", "--base", "distilled=tuner/child")
    shown = chain(lab, "tuner/child")
    assert [(row["relation"], row["name"], row["end"]) for row in shown] == [
        (None, "tuner/child", None),
        ("finetune", "lab/base", None),
        ("distilled", "tuner/child", "circle"),
    ]
    assert [row["publisher"] for row in shown] == [child["publisher"], base["publisher"], child["publisher"]]
    both = [f"tuner/child@{child['revision']}", f"lab/base@{base['revision']}"]
    assert shown[-1]["circle"] == both
    short = [ref[: ref.index("@") + 13] for ref in both]
    assert f"in a circle: {short[0]} from {short[1]} from {short[0]}" in lab.run("show", "tuner/child", "--lineage").out
