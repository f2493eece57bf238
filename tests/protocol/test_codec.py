"""One value, one encoding: what canonical msgpack carries, and every other spelling refused."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

LIMIT = 1 << 16

VALUES: st.SearchStrategy[Value] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=40) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)

# Each decodes with plain msgpack, or looks as if it might; none is the one encoding of a value we carry.
REFUSED = {
    "empty": b"",
    "one byte truncated": msgpack.packb({"a": 1})[:-1],
    "trailing byte": msgpack.packb({"a": 1}) + b"\xc0",
    "two values": b"\x01\x02",
    "never used byte c1": b"\xc1",
    "uint8 that fits a fixint": b"\xcc\x01",
    "uint16 that fits uint8": b"\xcd\x00\xff",
    "uint32 that fits uint16": b"\xce\x00\x00\xff\xff",
    "uint64 that fits uint32": b"\xcf" + (2**32 - 1).to_bytes(8, "big"),
    "int8 that fits a fixint": b"\xd0\xff",
    "int64 that is positive": b"\xd3" + (5).to_bytes(8, "big"),
    "str8 that fits a fixstr": b"\xd9\x01a",
    "str16 that fits a str8": b"\xda\x00\x20" + b"a" * 32,
    "bin16 that fits a bin8": b"\xc5\x00\x01a",
    "array16 that fits a fixarray": b"\xdc\x00\x01\x01",
    "map16 that fits a fixmap": b"\xde\x00\x01\xa1a\x01",
    "keys out of order": b"\x82\xa1b\x01\xa1a\x01",
    "duplicate key": b"\x82\xa1a\x01\xa1a\x02",
    "bin key": b"\x81\xc4\x01a\x01",
    "text and bin twins": b"\x82\xa1a\x01\xc4\x01a\x02",
    "int key": b"\x81\x01\x01",
    "list as key": b"\x81\x90\x01",
    "float32": b"\xca\x3f\x80\x00\x00",
    "float64": msgpack.packb(1.0),
    "NaN": b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    "infinity inside a list": b"\x91\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",
    "extension": msgpack.packb(msgpack.ExtType(5, b"x")),
    "timestamp, which msgpack decodes without asking": b"\xd6\xff\x00\x00\x00\x01",
    "timestamp inside a map": b"\x81\xa1a\xd6\xff\x00\x00\x00\x01",
    "malformed timestamp": b"\xd4\xff\x00",
    "text that is not UTF-8": b"\xa1\xff",
    "text with a surrogate": b"\xa3\xed\xa0\x80",
    "overlong UTF-8": b"\xa2\xc0\xaf",
    "depth 17": b"\x91" * 17 + b"\xc0",
    "depth 1024": b"\x91" * 1024 + b"\xc0",
    "depth 60000": b"\x91" * 60_000 + b"\xc0",
    "maps 1024 deep": b"\x81\xa1a" * 1024 + b"\xc0",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_every_other_spelling_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        codec.unpack(data, max_bytes=LIMIT)


CLAIMS = {
    "array32 of 4 G": b"\xdd\xff\xff\xff\xff",
    "map32 of 4 G": b"\xdf\xff\xff\xff\xff",
    "str32 of 4 G": b"\xdb\xff\xff\xff\xff",
    "bin32 of 4 G": b"\xc6\xff\xff\xff\xff",
    "ext32 of 4 G": b"\xc9\xff\xff\xff\xff\x01",
    "nested claims": b"\xdd\x00\x00\x00\x05" * 5,
}


@pytest.mark.parametrize("data", CLAIMS.values(), ids=CLAIMS.keys())
def test_absurd_claim_is_refused_without_allocating(data: bytes) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(FormatError):
        codec.unpack(data + bytes(1000), max_bytes=LIMIT)
    taken = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert taken < 0.5


@given(VALUES)
@settings(max_examples=150)
def test_round_trip(value: Value) -> None:
    data = codec.pack(value)
    assert codec.unpack(data, max_bytes=LIMIT) == value
    assert codec.unpack(memoryview(data), max_bytes=LIMIT) == value
    with pytest.raises(FormatError):
        codec.unpack(data + b"\xc0", max_bytes=LIMIT)
    with pytest.raises(FormatError):
        codec.unpack(data[:-1], max_bytes=LIMIT)


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_any_bytes_give_a_canonical_value_or_the_one_error(data: bytes) -> None:
    try:
        value = codec.unpack(data, max_bytes=LIMIT)
    except FormatError:
        return
    assert codec.pack(value) == data


@given(VALUES, st.data())
@settings(max_examples=100)
def test_a_flipped_bit_never_decodes_to_the_same_value(value: Value, data: st.DataObject) -> None:
    packed = bytearray(codec.pack(value))
    bit = data.draw(st.integers(0, len(packed) * 8 - 1))
    packed[bit // 8] ^= 1 << bit % 8
    try:
        other = codec.unpack(bytes(packed), max_bytes=LIMIT)
    except FormatError:
        return
    assert codec.pack(other) != codec.pack(value)


def test_keys_are_sorted_by_utf8_bytes_at_every_level() -> None:
    assert codec.pack({"b": 1, "a": {"\uffff": 1, "\U00010000": 2, "z": 3}}) == codec.pack(
        {"a": {"z": 3, "\U00010000": 2, "\uffff": 1}, "b": 1}
    )
    # Code points order these two the other way round in UTF-16.
    assert codec.pack({"\U00010000": 1, "\uffff": 2}).index("\uffff".encode()) < 6


def test_deepest_value_passes_and_one_deeper_does_not() -> None:
    value: Value = None
    for _ in range(codec.MAX_DEPTH - 1):
        value = [value]
    assert codec.unpack(codec.pack(value), max_bytes=LIMIT) == value
    with pytest.raises(FormatError, match="deep"):
        codec.pack([value])


UNPACKABLE = {
    "float": 1.0,
    "timestamp": msgpack.Timestamp(1),
    "bytearray": bytearray(b"a"),
    "set": {1},
    "object": object(),
    "2**64": 2**64,
    "-2**63-1": -(2**63) - 1,
    "surrogate": "\ud800",
    "surrogate key": {"\ud800": 1},
    "int key": {1: 1},
}


@pytest.mark.parametrize("value", UNPACKABLE.values(), ids=UNPACKABLE.keys())
def test_what_the_format_does_not_carry_is_not_packed(value: object) -> None:
    with pytest.raises(FormatError):
        codec.pack(value)  # type: ignore[arg-type]  # the point


def test_length_limit_is_checked_before_decoding() -> None:
    data = codec.pack(b"x" * 10)
    assert codec.unpack(data, max_bytes=len(data)) == b"x" * 10
    with pytest.raises(FormatError, match="limit"):
        codec.unpack(data, max_bytes=len(data) - 1)


def test_map_is_asked_for_by_name() -> None:
    assert codec.unpack_map(b"\x80", max_bytes=1) == {}
    with pytest.raises(FormatError, match="map"):
        codec.unpack_map(b"\x90", max_bytes=1)


TABLES = {
    "text key": codec.pack({"a": b"x"}),
    "text value": b"\x81\xc4\x01a\xa1x",
    "unsorted": b"\x82\xc4\x01b\xc4\x01x\xc4\x01a\xc4\x01x",
    "duplicate": b"\x82\xc4\x01a\xc4\x01x\xc4\x01a\xc4\x01x",
    "not a map": b"\x90",
    "trailing": b"\x80\xc0",
    "long form": b"\xde\x00\x00",
}


@pytest.mark.parametrize("data", TABLES.values(), ids=TABLES.keys())
def test_table_is_as_strict(data: bytes) -> None:
    with pytest.raises(FormatError):
        codec.unpack_table(data, max_bytes=LIMIT)


@given(st.dictionaries(st.binary(max_size=8), st.binary(max_size=8), max_size=6))
@settings(max_examples=50)
def test_table_round_trip(rows: dict[bytes, bytes]) -> None:
    assert codec.unpack_table(codec.pack_table(rows), max_bytes=LIMIT) == rows


SOURCE: Map = {"int": 5, "bool": True, "text": "a", "bytes": b"abc", "list": [1, 2], "mixed": [1, "a"], "flags": [True]}

TAKES: dict[str, Callable[[], object]] = {
    "missing": lambda: codec.take(SOURCE, "nothing", int),
    "other type": lambda: codec.take(SOURCE, "text", int),
    "a bool is not an int": lambda: codec.take(SOURCE, "bool", int),
    "optional of another type": lambda: codec.take_optional(SOURCE, "text", int),
    "above the maximum": lambda: codec.take_uint(SOURCE, "int", maximum=4),
    "negative": lambda: codec.take_uint({"int": -1}, "int", maximum=4),
    "wrong length": lambda: codec.take_bytes(SOURCE, "bytes", 4),
    "list too long": lambda: codec.take_list(SOURCE, "list", int, maximum=1),
    "mixed list": lambda: codec.take_list(SOURCE, "mixed", int, maximum=9),
    "list of flags as ints": lambda: codec.take_list(SOURCE, "flags", int, maximum=9),
    "unknown field": lambda: codec.only_fields(SOURCE, frozenset({"int"})),
}


@pytest.mark.parametrize("name", TAKES)
def test_field_of_the_wrong_shape_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        TAKES[name]()


def test_fields_of_the_right_shape_are_taken() -> None:
    assert codec.take(SOURCE, "bool", bool) is True
    assert codec.take_optional(SOURCE, "nothing", int) is None
    assert codec.take_uint(SOURCE, "int", maximum=5) == 5
    assert codec.take_bytes(SOURCE, "bytes", 3) == b"abc"
    assert codec.take_list(SOURCE, "list", int, maximum=2) == [1, 2]
    codec.only_fields(SOURCE, frozenset(SOURCE))
