"""The order of a reader as priorities, events that fit their frame, and wishes from outside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.protocol import codec
from modelp2p.protocol.control import MAX_FRAME_BYTES
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.streaming import (
    MAX_RANGES,
    MAX_WISHES,
    changes,
    decode_wishes,
    joined,
    news,
    still_open,
    together,
    urgency,
)

MIB = 1 << 20
ALL = Ranges.span(0, 1000)
sets = st.lists(st.integers(0, 60), max_size=40).map(Ranges.of_ints)
spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda s: (s[0], s[0] + s[1])), max_size=8)


def test_what_is_read_first_is_most_urgent() -> None:
    found = urgency([(500, 504), (10, 300)], ALL, MIB)
    assert [piece for piece, priority in found.items() if priority == 7] == [500, 501, 502, 503]
    assert [piece for piece, priority in found.items() if priority == 6] == list(range(10, 26))
    assert [piece for piece, priority in found.items() if priority == 5] == list(range(26, 154))
    assert len(found) == 148


def test_a_piece_larger_than_a_band_still_fills_it() -> None:
    assert list(urgency([(0, 9)], ALL, 16 * MIB).items())[:4] == [(0, 7), (1, 6), (2, 5), (3, 5)]


def test_what_is_proven_or_not_asked_for_is_never_urgent() -> None:
    missing = Ranges.of([(2, 4), (8, 9)])
    assert list(urgency([(0, 3), (0, 100)], missing, MIB)) == [2, 3, 8]
    assert urgency([(0, 100)], Ranges(), MIB) == {}
    assert urgency([], ALL, MIB) == {}


@given(spans, sets)
def test_urgency_takes_exactly_what_is_wished_and_missing(wishes: list[tuple[int, int]], missing: Ranges) -> None:
    found = urgency(wishes, missing, MIB)
    assert set(found) == {piece for begin, end in wishes for piece in range(begin, end) if piece in missing}
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_piece_is_as_urgent_as_its_most_urgent_reader_has_it() -> None:
    assert together([{1: 7, 2: 5}, {2: 6, 3: 5}]) == {1: 7, 2: 6, 3: 5}
    assert together([]) == {}


def test_the_engine_hears_differences_only() -> None:
    told = {1: 7, 2: 7, 3: 6, 4: 5}
    # 1 is proven meanwhile; nobody wishes 2 any more; 3 has become more urgent; 4 is as it was; 5 is new.
    assert changes(told, {3: 7, 4: 5, 5: 5}, Ranges.span(2, 10)) == {3: 7, 5: 5, 2: 4}
    assert changes(told, told, ALL) == {}
    assert changes({}, {}, ALL) == {}


@given(sets, sets)
def test_a_reader_who_applies_the_news_knows_what_is_proven(told: Ranges, now: Ranges) -> None:
    known = told
    for event in news(told, now):
        known = known.union(Ranges.from_list(event.get("proven", []))).minus(Ranges.from_list(event.get("lost", [])))
    assert known == now
    assert told != now or not list(news(told, now))


def test_news_of_many_ranges_fit_their_frames() -> None:
    far = Ranges(tuple((2**40 + 2 * n, 2**40 + 2 * n + 1) for n in range(2 * MAX_RANGES + 1)))
    events = list(news(Ranges(), far))
    assert len(events) == 3
    assert all(len(codec.pack(event)) < MAX_FRAME_BYTES for event in events)


BAD_WISHES: dict[str, object] = {
    "nothing": None,
    "a map": {},
    "a number": [3],
    "three numbers": [[1, 2, 3]],
    "empty": [[2, 2]],
    "reversed": [[3, 2]],
    "negative": [[-1, 2]],
    "behind the end": [[0, 11]],
    "true": [[True, 2]],
    "text": [["1", 2]],
    "too many": [[0, 1]] * (MAX_WISHES + 1),
}


@pytest.mark.parametrize("what", BAD_WISHES)
def test_bad_wishes_are_refused(what: str) -> None:
    with pytest.raises(FormatError):
        decode_wishes(BAD_WISHES[what], 10)


def test_good_wishes_keep_their_order() -> None:
    assert decode_wishes([[5, 10], [0, 3]], 10) == ((5, 10), (0, 3))
    assert len(decode_wishes([[0, 1]] * MAX_WISHES, 1)) == MAX_WISHES


def test_neighbours_in_an_order_become_one() -> None:
    assert joined([(4, 6), (5, 8), (8, 9), (2, 2), (0, 1), (1, 3)]) == ((4, 9), (0, 3))
    assert joined([(9, 10), (8, 9)]) == ((9, 10), (8, 9))
    assert joined([(n, n + 1) for n in range(0, 30, 3)], 4) == ((0, 1), (3, 4), (6, 7), (9, 10))


def test_fulfilled_wishes_at_the_front_are_dropped() -> None:
    assert still_open(((0, 2), (5, 6), (2, 4), (5, 6)), Ranges.of([(0, 3), (5, 6)])) == ((2, 4), (5, 6))
    assert still_open(((0, 2),), ALL) == ()
