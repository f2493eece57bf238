"""Places below a home: relative, distinct, and never outside."""

from __future__ import annotations

from modelp2p.protocol import layout
from modelp2p.protocol.names import ModelName, PublisherId

HASH = bytes(range(32))
REVISION = "a" * 40
PUBLISHER = PublisherId("mp1" + "a" * 52)
NAME = ModelName.parse("org/model")

PLACES = {
    "data": layout.data_of(HASH),
    "tree": layout.tree_of(HASH, REVISION),
    "record": layout.record_of(HASH),
    "statement": layout.statement_of(HASH),
    "journal": layout.journal_of(HASH),
    "job": layout.job_of(HASH),
    "model": layout.model_of(NAME, REVISION),
    "bare model": layout.model_of(ModelName.parse("model"), REVISION),
    "unnamed model": layout.unnamed_model_of(PUBLISHER, NAME, REVISION),
}


def test_places_are_the_documented_ones() -> None:
    digest = HASH.hex()
    expected = {
        "data": f"data/{digest}",
        "tree": f"store/{digest}/{REVISION}",
        "record": f"store/{digest}/record",
        "statement": f"manifests/{digest}",
        "journal": f"journal/{digest}",
        "job": f"jobs/{digest}",
        "model": f"models/org/model/{REVISION}",
        "bare model": f"models/_/model/{REVISION}",
        "unnamed model": f"models/by-publisher/{PUBLISHER}/org/model/{REVISION}",
    }
    assert expected == PLACES


def test_no_place_leaves_the_home_or_is_another() -> None:
    assert len(set(PLACES.values())) == len(PLACES)
    for place in PLACES.values():
        assert not place.startswith("/")
        assert ".." not in place.split("/")


def test_secret_folders_are_private() -> None:
    assert {"data", "journal", "jobs", "keys", "run"} <= set(layout.PRIVATE)
