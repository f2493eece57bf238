"""Ranges obey the laws of sets: every operation is compared with Python's own `set`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.protocol.codec import Value, pack, unpack
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.ranges import Ranges

INTS = st.frozensets(st.integers(0, 40))
SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)


def ints(ranges: Ranges) -> set[int]:
    return set(ranges.ints())


@given(values=INTS)
def test_the_set_holds_exactly_its_integers(values: frozenset[int]) -> None:
    ranges = Ranges.of_ints(values)
    assert list(ranges.ints()) == sorted(values)
    assert ranges.total == len(values)
    assert bool(ranges) == bool(values)
    assert [value in ranges for value in range(45)] == [value in values for value in range(45)]


@given(spans=SPANS)
def test_spans_in_any_order_give_one_canonical_value(spans: list[tuple[int, int]]) -> None:
    ranges = Ranges.of(spans)
    assert ints(ranges) == {value for begin, end in spans for value in range(begin, end)}
    assert ranges == Ranges.of(reversed(spans)) == Ranges.of_ints(ranges.ints())
    assert hash(ranges) == hash(Ranges.of(reversed(spans)))
    assert list(ranges) == list(ranges.spans)


@given(left=INTS, right=INTS)
def test_union_minus_and_intersect_are_those_of_sets(left: frozenset[int], right: frozenset[int]) -> None:
    mine, theirs = Ranges.of_ints(left), Ranges.of_ints(right)
    assert mine.union(theirs) == theirs.union(mine) == Ranges.of_ints(left | right)
    assert mine.minus(theirs) == Ranges.of_ints(left - right)
    assert mine.intersect(theirs) == theirs.intersect(mine) == Ranges.of_ints(left & right)


@given(values=INTS, total=st.integers(0, 50))
def test_missing_is_what_is_left_up_to_total(values: frozenset[int], total: int) -> None:
    assert Ranges.of_ints(values).missing(total) == Ranges.of_ints(set(range(total)) - values)


@given(values=INTS, begin=st.integers(0, 45), end=st.integers(0, 45))
def test_covers_means_every_integer(values: frozenset[int], begin: int, end: int) -> None:
    assert Ranges.of_ints(values).covers(begin, end) == (set(range(begin, end)) <= values)


@given(values=INTS)
def test_lists_round_trip_through_the_codec(values: frozenset[int]) -> None:
    ranges = Ranges.of_ints(values)
    assert Ranges.from_list(unpack(pack(ranges.to_list()), max_bytes=1000)) == ranges


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(None, id="no list"),
        pytest.param([1, 2], id="no pairs"),
        pytest.param([[1]], id="half a pair"),
        pytest.param([[1, 2, 3]], id="three numbers"),
        pytest.param([["1", "2"]], id="text"),
        pytest.param([[False, True]], id="booleans"),
        pytest.param([[2, 2]], id="empty range"),
        pytest.param([[3, 2]], id="backwards"),
        pytest.param([[-1, 2]], id="negative"),
        pytest.param([[4, 5], [0, 1]], id="unsorted"),
        pytest.param([[0, 3], [2, 5]], id="overlapping"),
        pytest.param([[0, 3], [3, 5]], id="touching"),
    ],
)
def test_a_list_in_another_form_is_refused(value: Value) -> None:
    with pytest.raises(FormatError):
        Ranges.from_list(value)


def test_an_invalid_set_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="touch"):
        Ranges(((0, 1), (1, 2)))
    assert Ranges.span(3, 3) == Ranges.span(4, 2) == Ranges()
    assert list(Ranges.span(3, 5)) == [(3, 5)]
