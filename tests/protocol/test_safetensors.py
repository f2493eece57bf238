"""The strict header parser: hostile headers one by one, then the `safetensors` package as oracle."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.safetensors import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    MAX_RANK,
    MAX_TENSORS,
    Header,
    TensorInfo,
    header_bytes,
    parse_header,
)

# The package ships no types for it.
DESERIALIZE: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


def file_of(header: str | bytes, data_bytes: int = 0) -> bytes:
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + bytes(data_bytes)


def parse(file: bytes) -> Header:
    return parse_header(file, len(file))


def entry(dtype: object, shape: object, offsets: object) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


def one(dtype: object, shape: object, offsets: object, data_bytes: int) -> bytes:
    return file_of(f'{{"a":{entry(dtype, shape, offsets)}}}', data_bytes)


BYTE = entry("U8", [1], [0, 1])

ACCEPTED = {
    "no tensor": file_of("{}"),
    "spaces before, between and after": file_of('{ \n"a" :\t' + BYTE + " }   ", 1),
    "scalar": one("F64", [], [0, 8], 8),
    "zero-size tensor": one("F32", [0, 7], [0, 0], 0),
    "zero-size tensor at an odd place": file_of(f'{{"a":{BYTE},"b":{entry("F32", [0], [1, 1])}}}', 1),
    "tensors out of order": file_of(f'{{"b":{entry("U8", [2], [1, 3])},"a":{BYTE}}}', 3),
    "fields out of order": file_of('{"a":{"data_offsets":[0,1],"shape":[1],"dtype":"U8"}}', 1),
    "metadata with line breaks": file_of('{"__metadata__":{"format":"pt","notes":"a\\nb\\u00e9"},"a":' + BYTE + "}", 1),
    "empty metadata last": file_of('{"a":' + BYTE + ',"__metadata__":{}}', 1),
    "escaped name": file_of('{"\\u0061\\"\\\\\\/":' + BYTE + "}", 1),
    "escaped surrogate pair": file_of('{"\\ud83d\\ude00":' + BYTE + "}", 1),
    "name in another script": file_of('{"重み":' + BYTE + "}", 1),
    "two 4-bit values": one("F4", [2], [0, 1], 1),
    "four 6-bit values": one("F6_E2M3", [4], [0, 3], 3),
    "as many dimensions as NumPy has": one("U8", [1] * MAX_RANK, [0, 1], 1),
}


@pytest.mark.parametrize("file", [pytest.param(file, id=name) for name, file in ACCEPTED.items()])
def test_odd_but_honest_headers_are_read_as_safetensors_reads_them(file: bytes) -> None:
    assert_same_as_safetensors(parse(file), file)


REFUSED = {
    "nothing": b"",
    "cut length": b"\x02\0\0\0\0\0\0",
    "header of zero bytes": file_of(""),
    "header longer than the file": struct.pack("<Q", 3) + b"{}",
    "length of 2**64 - 1": b"\xff" * 8 + b"{}",
    "not UTF-8": file_of(b'{"\xff":{}}'),
    "encoded surrogate": file_of('{"\ud800":' + BYTE + "}", 1),
    "byte order mark": file_of("\ufeff{}"),
    "leading space": file_of(" {}"),
    "trailing line break": file_of("{}\n"),
    "trailing line break and space": file_of("{}\n "),
    "second object": file_of("{}{}"),
    "array": file_of("[]"),
    "null": file_of("null"),
    "unclosed": file_of("{"),
    "trailing comma": file_of('{"a":' + BYTE + ",}", 1),
    "missing comma": file_of('{"a":' + BYTE + ' "b":' + entry("U8", [1], [1, 2]) + "}", 2),
    "missing colon": file_of('{"a"' + BYTE + "}", 1),
    "single quotes": file_of("{'a':" + BYTE + "}", 1),
    "number as key": file_of("{1:" + BYTE + "}", 1),
    "comment": file_of("{/**/}"),
    "duplicate tensor": file_of('{"a":' + BYTE + ',"a":' + BYTE + "}", 1),
    "duplicate tensor by escape": file_of('{"a":' + BYTE + ',"\\u0061":' + BYTE + "}", 1),
    "duplicate field": file_of('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    "duplicate metadata": file_of('{"__metadata__":{},"__metadata__":{}}'),
    "duplicate metadata key": file_of('{"__metadata__":{"a":"1","a":"2"}}'),
    "unknown field": file_of('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}', 1),
    "missing field": file_of('{"a":{"dtype":"U8","shape":[1]}}', 1),
    "empty entry": file_of('{"a":{}}'),
    "NUL in a name": file_of('{"a\\u0000":' + BYTE + "}", 1),
    "raw NUL in a name": file_of('{"a\0":' + BYTE + "}", 1),
    "escape sequence in a name": file_of('{"\\u001b[2J":' + BYTE + "}", 1),
    "bidi override in a name": file_of('{"a\u202eb":' + BYTE + "}", 1),
    "zero width space in a name": file_of('{"a\u200bb":' + BYTE + "}", 1),
    "lone surrogate in a name": file_of('{"\\ud800":' + BYTE + "}", 1),
    "bad escape": file_of('{"\\x41":' + BYTE + "}", 1),
    "cut escape": file_of('{"\\u00'),
    "metadata null": file_of('{"__metadata__":null}'),
    "metadata with a number": file_of('{"__metadata__":{"a":1}}'),
    "metadata with an object": file_of('{"__metadata__":{"a":{}}}'),
    "metadata with a lone surrogate": file_of('{"__metadata__":{"a":"\\ud800"}}'),
    "metadata with a control key": file_of('{"__metadata__":{"\\u0007":""}}'),
    "unknown dtype": one("F33", [1], [0, 4], 4),
    "dtype in lower case": one("f32", [1], [0, 4], 4),
    "dtype of no text": one(None, [1], [0, 4], 4),
    "negative dimension": one("U8", [-1], [0, 1], 1),
    "minus zero": file_of('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
    "bool dimension": one("U8", [True], [0, 1], 1),
    "float dimension": one("U8", [1.0], [0, 1], 1),
    "exponent dimension": file_of('{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', 1),
    "leading zero": file_of('{"a":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}', 1),
    "text dimension": one("U8", ["1"], [0, 1], 1),
    "NaN dimension": file_of('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', 1),
    "nested dimension": one("U8", [[1]], [0, 1], 1),
    "shape of no array": one("U8", 1, [0, 1], 1),
    "dimension of 5000 digits": file_of('{"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,1]}}', 1),
    "elements overflow 64 bits": one("U8", [2**32, 2**32], [0, 0], 0),
    "elements overflow behind a zero": one("U8", [0, 2**62, 2**62], [0, 0], 0),
    "bytes overflow 64 bits": one("F64", [2**61], [0, 0], 0),
    "one dimension too many": one("U8", [1] * (MAX_RANK + 1), [0, 1], 1),
    "one offset": one("U8", [1], [0], 1),
    "three offsets": one("U8", [1], [0, 1, 1], 1),
    "offsets backwards": one("U8", [1], [1, 0], 1),
    "offset past 2**64": one("U8", [1], [2**64, 2**64 + 1], 1),
    "shape larger than the data": one("F32", [2], [0, 4], 4),
    "shape smaller than the data": one("F32", [1], [0, 8], 8),
    "half a byte": one("F4", [3], [0, 1], 1),
    "six bits": one("F6_E3M2", [1], [0, 1], 1),
    "hole at the start": one("U8", [1], [1, 2], 2),
    "hole in the middle": file_of(f'{{"a":{BYTE},"b":{entry("U8", [1], [2, 3])}}}', 3),
    "overlap": file_of(f'{{"a":{entry("U8", [2], [0, 2])},"b":{entry("U8", [2], [1, 3])}}}', 3),
    "same place twice": file_of(f'{{"a":{BYTE},"b":{BYTE}}}', 1),
    "zero-size tensor inside another": file_of(f'{{"a":{entry("U8", [2], [0, 2])},"b":{entry("U8", [0], [1, 1])}}}', 2),
    "data short": one("F32", [2], [0, 8], 7),
    "data with a rest": one("F32", [2], [0, 8], 9),
    "data without tensors": file_of("{}", 1),
    "element across its alignment": file_of(f'{{"a":{BYTE},"b":{entry("F32", [1], [1, 5])}}}', 5),
    "100,000 levels of arrays": file_of('{"a":' + "[" * 100_000),
    "100,000 levels of objects": file_of('{"a":' * 100_000),
    "100,000 levels in a shape": file_of('{"a":{"shape":' + "[" * 100_000),
}


@pytest.mark.parametrize("file", [pytest.param(file, id=name) for name, file in REFUSED.items()])
def test_a_header_that_is_not_exact_is_refused(file: bytes) -> None:
    with pytest.raises(FormatError):
        parse(file)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_the_size_that_safetensors_gives_it(dtype: str) -> None:
    file = one(dtype, [8], [0, DTYPE_BITS[dtype]], DTYPE_BITS[dtype])
    assert parse(file).tensors == (TensorInfo("a", dtype, (8,), 0, DTYPE_BITS[dtype]),)
    assert_same_as_safetensors(parse(file), file)


def test_a_prefix_that_holds_the_header_is_enough_and_a_shorter_one_is_not() -> None:
    file = one("F32", [1000], [0, 4000], 4000)
    end = header_bytes(file[:8], len(file))
    header = parse_header(memoryview(file)[:end], len(file))
    assert header == parse(file)
    assert header.data_offset == end
    for cut in range(end):
        with pytest.raises(FormatError):
            parse_header(file[:cut], len(file))


@pytest.mark.parametrize(("length", "limit"), [(101, 100), (MAX_HEADER_BYTES + 1, 2**62), (2**64 - 1, 2**62)])
def test_an_announced_header_over_the_limit_is_refused_from_eight_bytes(length: int, limit: int) -> None:
    prefix = struct.pack("<Q", length)
    with pytest.raises(FormatError, match="exceeds the limit"):
        header_bytes(prefix, 2**63, limit)
    assert header_bytes(struct.pack("<Q", 100), 2**63, 100) == 108


def many(count: int, spelling: str = "data_offsets") -> bytes:
    field = '{"dtype":"U8","shape":[0],"' + spelling + '":[0,0]}'
    return file_of("{" + ",".join(f'"{number}":{field}' for number in range(count)) + "}")


def test_a_bomb_of_tensors_is_refused_before_it_is_read() -> None:
    # Broken from its first byte on: had the reader started, it would complain about that.
    bomb = b"!" + many(MAX_TENSORS + 1)[8:]
    with pytest.raises(FormatError, match="more than 200000 tensors"):
        parse(file_of(bomb))


@pytest.mark.slow
def test_a_bomb_of_tensors_in_disguise_is_refused_by_counting() -> None:
    with pytest.raises(FormatError, match="more than 200000 tensors"):
        parse_header(file := many(MAX_TENSORS + 1, "data_offset\\u0073"), len(file), MAX_HEADER_BYTES)


@pytest.mark.slow
def test_the_largest_allowed_count_of_tensors_is_read() -> None:
    assert len(parse(many(MAX_TENSORS)).tensors) == MAX_TENSORS


def test_names_in_messages_are_short_and_printable() -> None:
    with pytest.raises(FormatError) as caught:
        parse(file_of('{"' + "n" * 100_000 + '":{}}'))
    assert len(caught.value.message) < 300
    with pytest.raises(FormatError) as caught:
        parse(file_of('{"\\u001b[2J":{}}'))
    assert caught.value.message.isprintable()


# --- the package as oracle ---------------------------------------------------------------------------------------
def assert_same_as_safetensors(header: Header, file: bytes) -> None:
    theirs = {name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in DESERIALIZE(file)}
    body = file[header.data_offset :]
    assert {tensor.name: (tensor.dtype, tensor.shape, body[tensor.begin : tensor.end]) for tensor in header.tensors} == theirs


def test_files_of_the_package_are_read_with_their_metadata() -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "bias": np.arange(3, dtype=np.float16),
        "mask": np.array([True, False, True]),
        "step": np.array(7, dtype=np.int64),
        "none": np.zeros((0, 5), dtype=np.uint8),
    }
    file = safetensors.numpy.save(arrays, {"format": "np", "who": "J\u00f6rg"})
    header = parse(file)
    assert_same_as_safetensors(header, file)
    assert header.metadata == {"format": "np", "who": "J\u00f6rg"}
    assert header.data_offset % 8 == 0
    for tensor in header.tensors:
        raw = file[header.data_offset + tensor.begin : header.data_offset + tensor.end]
        assert raw == arrays[tensor.name].tobytes()
        assert tensor.shape == arrays[tensor.name].shape


SAMPLE = file_of(
    '{"__metadata__":{"format":"pt"},"a":' + entry("F32", [2, 3], [0, 24]) + ',"b.\\u00e9":' + entry("F4", [2], [24, 25]) + "}  ",
    25,
)
SNIPPETS = [
    b'"',
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"0",
    b"-",
    b"1e9",
    b"9" * 20,
    b"null",
    b"\xff",
    b" ",
]
SNIPPETS += [b'"dtype":"U8"', b'"shape":[]', b'"data_offsets":[0,0]', b'"a":', b"\n", b"true", b"U8", b"F64", b"24", b"25"]


def check_subset(file: bytes) -> None:
    """Ours refuses with `FormatError`, or the package reads the same tensors."""
    try:
        header = parse(file)
    except FormatError:
        return
    assert_same_as_safetensors(header, file)


@settings(max_examples=150, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(SAMPLE)), st.integers(0, 12), st.sampled_from(SNIPPETS)), min_size=1, max_size=3),
    relength=st.booleans(),
)
def test_whatever_ours_accepts_of_a_damaged_file_safetensors_reads_alike(
    edits: list[tuple[int, int, bytes]], relength: bool
) -> None:
    file = SAMPLE
    for at, removed, inserted in edits:
        file = file[:at] + inserted + file[at + removed :]
    if relength:
        file = struct.pack("<Q", max(0, len(file) - 8 - 25)) + file[8:]
    check_subset(file)


@given(raw=st.binary(max_size=60))
@example(raw=b"{}")
def test_arbitrary_bytes_raise_nothing_but_format_errors(raw: bytes) -> None:
    check_subset(raw)
    check_subset(file_of(raw))
    check_subset(file_of(b"{" + raw + b"}"))


NUMBERS = st.integers(0, 9) | st.sampled_from([2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BITS)),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
    }
)


@settings(deadline=None)
@given(header=st.dictionaries(st.text("ab\u00e9\u202e\0", max_size=2), ENTRIES, max_size=3), data_bytes=st.integers(0, 16))
def test_whatever_numbers_ours_accepts_safetensors_accepts(header: dict[str, object], data_bytes: int) -> None:
    check_subset(file_of(json.dumps(header), data_bytes))


@settings(deadline=None)
@given(
    tensors=st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 3), max_size=3)), max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_a_well_laid_out_file_is_accepted_in_any_header_order(tensors: list[tuple[str, list[int]]], order: Random) -> None:
    entries: dict[str, object] = {}
    at = 0
    for number, (dtype, shape) in enumerate(sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor[0]])):
        # Eight elements at least, so that every size is whole in bytes and aligned for every smaller dtype.
        size = DTYPE_BITS[dtype] * int(np.prod(shape, dtype=np.int64))
        entries[f"t{number}"] = {"dtype": dtype, "shape": [*shape, 8], "data_offsets": [at, at + size]}
        at += size
    keys = list(entries)
    order.shuffle(keys)
    file = file_of(json.dumps({key: entries[key] for key in keys}), at)
    assert_same_as_safetensors(parse(file), file)
