"""Arguments of the control socket: what clients may ask, at the limits and beyond."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from modelp2p.daemon.requests import MAX_TIMEOUT_S, FetchRequest, Target, timeout_s
from modelp2p.protocol.errors import UsageError

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value


def test_a_timeout_is_whole_seconds_or_the_default() -> None:
    cases: list[tuple[Map, float]] = [({}, 7.0), ({"timeout_s": None}, 7.0), ({"timeout_s": 1}, 1.0)]
    cases.append(({"timeout_s": MAX_TIMEOUT_S}, float(MAX_TIMEOUT_S)))
    for args, seconds in cases:
        assert timeout_s(args, 7.0) == seconds


@pytest.mark.parametrize("value", [0, -1, MAX_TIMEOUT_S + 1, True, "5", b"5", [5]])
def test_any_other_timeout_is_refused(value: Value) -> None:
    with pytest.raises(UsageError, match="timeout"):
        timeout_s({"timeout_s": value}, 7.0)


def test_a_fetch_asks_web_seeds_unless_it_says_not_to() -> None:
    assert not FetchRequest.decode({"ref": "lab/model"}, Target(), 7.0).peers_only
    assert FetchRequest.decode({"ref": "lab/model", "peers_only": True}, Target(), 7.0).peers_only
    with pytest.raises(UsageError, match="peers_only"):
        FetchRequest.decode({"ref": "lab/model", "peers_only": 1}, Target(), 7.0)
