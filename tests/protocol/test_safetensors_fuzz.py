"""The strict header parser against the `safetensors` package, both given the same made and broken files.

The law: a header is accepted here exactly where the package accepts it and no row of `STRICTER` holds, and then both read the
same names, dtypes, shapes, bytes and metadata. `STRICTER` looks with Python's own `json`, and knows nothing of our parser.
"""

from __future__ import annotations

import ctypes
import json
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.safetensors import (
    DEFAULT_MAX_HEADER_BYTES,
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    MAX_RANK,
    header_bytes,
    parse_header,
)
from modelp2p.protocol.text import is_hidden

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name to dtype, shape and bytes."""
Reading = tuple[Tensors, dict[str, str]]
"""Tensors and metadata."""

# The package ships no types for these.
DESERIALIZE: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize
SERIALIZE: Callable[[dict[str, Any], dict[str, str] | None], bytes] = safetensors.serialize
SPEC: Callable[..., Any] = safetensors.TensorSpec
OPEN: Callable[..., Any] = safetensors.safe_open

DATA = Random(1).randbytes(1 << 16)
"""Repeats nowhere: bytes read at a wrong offset are never equal to the right ones, but for a few very short ones."""


def ours(file: bytes) -> Reading | None:
    """What our parser reads; None: refused. Anything but a `FormatError` fails the test."""
    try:
        header = parse_header(file, len(file))
    except FormatError:
        return None
    body = file[header.data_offset :]
    return {t.name: (t.dtype, t.shape, body[t.begin : t.end]) for t in header.tensors}, header.metadata


def theirs(file: bytes, place: Path) -> Reading | None:
    """What the package reads, by both of its doors; None: refused."""
    place.write_bytes(file)
    try:
        with OPEN(place, framework="np") as opened:
            names, metadata = set(opened.keys()), opened.metadata()
    except safetensors.SafetensorError:
        with pytest.raises(safetensors.SafetensorError):
            DESERIALIZE(file)
        return None
    tensors = {name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in DESERIALIZE(file)}
    assert tensors.keys() == names
    return tensors, metadata or {}


# --- where we are stricter -----------------------------------------------------------------------------------------
class Pairs(list[tuple[str, Any]]):
    """A JSON object as it is spelled."""

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self]

    def get(self, wanted: str) -> Any:  # noqa: ANN401 - any JSON value
        return next((value for key, value in self if key == wanted), None)


@dataclass(frozen=True)
class Spelled:
    """A header that the package accepted."""

    text: str
    root: Pairs

    @classmethod
    def of(cls, file: bytes) -> Spelled:
        text = file[8 : 8 + int.from_bytes(file[:8], "little")].decode()
        return cls(text, json.loads(text, object_pairs_hook=Pairs))

    @property
    def entries(self) -> list[Any]:
        return [value for key, value in self.root if key != "__metadata__"]

    @property
    def objects(self) -> list[Pairs]:
        """The entries spelled as objects."""
        return [entry for entry in self.entries if isinstance(entry, Pairs)]

    @property
    def metadata(self) -> Pairs:
        return self.root.get("__metadata__") or Pairs()


def is_twice(keys: list[str]) -> bool:
    return len(set(keys)) < len(keys)


def has_misaligned(header: Spelled) -> bool:
    for entry in header.objects:
        shape, (begin, end) = entry.get("shape"), entry.get("data_offsets")
        size = max(1, DTYPE_BITS.get(str(entry.get("dtype")), 8) // 8)
        if prod(shape) and begin != end and begin % size:
            return True
    return False


def has_overflow(header: Spelled) -> bool:
    shapes = [(entry.get("shape"), DTYPE_BITS.get(str(entry.get("dtype")), 8)) for entry in header.objects]
    return any(bits * prod(n or 1 for n in shape) >= 1 << 63 for shape, bits in shapes)


def has_large_number(header: Spelled) -> bool:
    return any(n >= 10**19 for entry in header.objects for n in [*entry.get("shape"), *entry.get("data_offsets")])


FIELDS = {"dtype", "shape", "data_offsets"}
STRICTER: dict[str, Callable[[Spelled], bool]] = {
    # Two readers take different ones: "Duplicate keys are disallowed. Not all parsers may respect this."
    "a tensor twice": lambda header: is_twice(header.root.keys),
    "a metadata key twice": lambda header: is_twice(header.metadata.keys),
    # Nobody knows what it means, and a later format may.
    "an unknown field": lambda header: any(set(entry.keys) - FIELDS for entry in header.objects),
    # Rust's serde reads an object's fields off an array, and an enum's variant off `{"U8": null}`; the format knows neither.
    "an entry as an array": lambda header: len(header.objects) < len(header.entries),
    "a dtype as an object": lambda header: any(not isinstance(entry.get("dtype"), str) for entry in header.objects),
    "metadata null": lambda header: "__metadata__" in header.root.keys and header.root.get("__metadata__") is None,
    # "The header data MUST begin with a { character", "MAY be trailing padded with whitespace (0x20)".
    "space before the header": lambda header: not header.text.startswith("{"),
    "other space behind the header": lambda header: not header.text.rstrip(" ").endswith("}"),
    # A name is shown on terminals.
    "an invisible character": lambda header: any(is_hidden(c) for c in "".join(header.root.keys + header.metadata.keys)),
    # A view of it could not be made.
    "a misaligned tensor": has_misaligned,
    # NumPy and torch stop there.
    "more than 64 dimensions": lambda header: any(len(entry.get("shape")) > MAX_RANK for entry in header.objects),
    # Its strides overflow, though a zero among the dimensions makes it empty.
    "dimensions past 63 bits": has_overflow,
    "a number of twenty digits": has_large_number,
}


def reasons_of(file: bytes) -> set[str]:
    """The rows that hold for a header the package accepted."""
    header = Spelled.of(file)
    # The rows behind that one look into fields.
    if header.entries != header.objects:
        return {"an entry as an array"}
    return {name for name, holds in STRICTER.items() if holds(header)}


def judge(file: bytes, place: Path) -> bool:
    """Check the law; returns whether ours accepted."""
    mine, other = ours(file), theirs(file, place)
    if other is None:
        assert mine is None, "accepted what the package refuses"
    elif mine is None:
        assert reasons_of(file), "refused for no reason that is listed"
    else:
        assert mine == other
        assert not reasons_of(file), "accepted what is listed as refused"
    return mine is not None


def file_of(header: str | bytes, data_bytes: int = 0) -> bytes:
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + DATA[:data_bytes]


BYTE = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
EXAMPLES = {
    "a tensor twice": file_of(f'{{"a":{BYTE},"\\u0061":{BYTE}}}', 1),
    "a metadata key twice": file_of('{"__metadata__":{"a":"1","a":"1"}}'),
    "an unknown field": file_of('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"sparse":[[true]]}}', 1),
    "an entry as an array": file_of('{"a":["U8",[1],[0,1]]}', 1),
    "a dtype as an object": file_of('{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}', 1),
    "metadata null": file_of('{"__metadata__":null}'),
    "space before the header": file_of("\n{}"),
    "other space behind the header": file_of("{}\n "),
    "an invisible character": file_of(f'{{"a\\u202e":{BYTE}}}', 1),
    "a misaligned tensor": file_of(f'{{"a":{BYTE},"b":{{"dtype":"F16","shape":[1],"data_offsets":[1,3]}}}}', 3),
    "more than 64 dimensions": file_of(f'{{"a":{BYTE.replace("[1]", str([1] * 65))}}}', 1),
    "dimensions past 63 bits": file_of(f'{{"a":{{"dtype":"U8","shape":[0,{2**62},2],"data_offsets":[0,0]}}}}'),
    "a number of twenty digits": file_of(f'{{"a":{{"dtype":"U8","shape":[0,{10**19}],"data_offsets":[0,0]}}}}'),
}


@pytest.mark.parametrize("reason", STRICTER)
def test_every_row_stands_for_a_file_that_the_package_reads(reason: str, tmp_path: Path) -> None:
    file = EXAMPLES[reason]
    assert theirs(file, tmp_path / "f") is not None
    assert reason in reasons_of(file)
    assert not judge(file, tmp_path / "f")


# --- files as the package writes them ------------------------------------------------------------------------------
SPELLINGS = {
    "bool": 8, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32, "int64": 64, "uint64": 64,
    "float16": 16, "bfloat16": 16, "float32": 32, "float64": 64, "complex64": 64, "float4_e2m1fn_x2": 8, "float8_e4m3fn": 8,
    "float8_e4m3fnuz": 8, "float8_e5m2": 8, "float8_e5m2fnuz": 8, "float8_e8m0fnu": 8,
}  # fmt: skip
"""Bits per element of the dtypes `serialize` writes; two 4-bit numbers are one of its elements."""

NAMES = st.text('ab.0é重😀"\\/\u00a0\n\u200b', max_size=5) | st.text(max_size=4)
# For an empty dictionary 0.8.0 writes `{},"__metadata__":{}}`, which it cannot read either.
METADATA = st.none() | st.dictionaries(NAMES, NAMES, min_size=1, max_size=3)
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@pytest.mark.slow
@given(tensors=st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(SPELLINGS)), SHAPES), max_size=5), metadata=METADATA)
def test_what_the_package_writes_is_read_alike(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    file = written(tensors, metadata)
    is_accepted = judge(file, tmp_path / "f")
    names = "".join([*tensors, *(metadata or {})])
    # It writes a tensor of that name as the metadata; nobody reads that.
    if "__metadata__" not in tensors:
        assert is_accepted is not any(is_hidden(character) for character in names)


def written(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None) -> bytes:
    memory = ctypes.create_string_buffer(DATA, len(DATA))
    specs, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        if dtype.startswith("float4"):
            # Single ones would end inside a byte.
            shape = [*shape, 2]
        size = prod(shape) * SPELLINGS[dtype] // 8
        # Each its own bytes.
        specs[name] = SPEC(dtype=dtype, shape=shape, data_ptr=ctypes.addressof(memory) + at, data_len=size)
        at += size
    return SERIALIZE(specs, metadata)


# --- broken files --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Raw:
    """JSON text as it is, right or wrong."""

    text: str


WEIRD = [
    *("-1", "-0", "1.0", "1e0", "1E+2", "01", "NaN", "Infinity", "-Infinity", "true", "false", "null", "[]", "{}", "[[1]]", '""'),
    *("0", "1", "2", "8", str(2**31), str(2**32), str(2**62), str(2**63 - 1), str(2**63), str(10**19 - 1), str(10**19)),
    *(str(2**64 - 1), str(2**64), "9" * 40, "9" * 5000, '"\\ud800"', '"\\u0041"', '"U8"', '"f32"', '"\\x41"', '"\t"', "[0,0]"),
    *('{"U8":null}', '{"F32":{}}', '["U8",[1],[0,1]]', "[" * 200, "{" * 3, '{"a":' * 130 + "1" + "}" * 130, "'a'", "0x10", "+1"),
]
KINDS = [*sorted(DTYPE_BITS), *("F4", "F6_E2M3") * 3]
KEYS = ["a", "b", "__metadata__", "dtype", "shape", "data_offsets", "dType", "", "\u202e", "a\0", "\ud800", "__METADATA__"]
SPACES = " \t\n\r"
Edit = tuple[str, int, int]
"""What is done, where, and with what; numbers are taken modulo what there is."""


def base(choice: int) -> tuple[Pairs, int]:
    """One of many good headers, and how much data it describes."""
    random = Random(choice)
    kinds = sorted(random.choices(KINDS, k=random.randrange(4)), key=lambda kind: -DTYPE_BITS[kind])
    if random.random() < 0.2:
        random.shuffle(kinds)
    tree = Pairs()
    at = 0
    for number, kind in enumerate(kinds):
        shape = [random.randrange(4) for _ in range(random.randrange(3))]
        # A whole number of bytes, whatever the dtype.
        shape.append(random.choice((1, 2, 8)) * (4 if DTYPE_BITS[kind] < 8 else 1))
        size = prod(shape) * DTYPE_BITS[kind] // 8
        fields = Pairs([("dtype", kind), ("shape", shape), ("data_offsets", [at, at + size])])
        random.shuffle(fields)
        tree.append((f"{'abc'[number]}{random.choice(('', '.é', '/0'))}", fields))
        at += size
    if random.random() < 0.5:
        tree.insert(
            random.randrange(len(tree) + 1), ("__metadata__", Pairs([("format", "pt"), ("n", "\u202e\n")][: random.randrange(3)]))
        )
    random.shuffle(tree)
    return tree, at


def places(tree: Pairs) -> list[tuple[Any, int]]:
    """Every member of every object and array: the container and the index in it."""
    found: list[tuple[Any, int]] = []
    todo: list[Any] = [tree]
    while todo:
        here = todo.pop()
        for index, member in enumerate(here):
            found.append((here, index))
            value = member[1] if isinstance(member, tuple) else member
            if isinstance(value, list):
                todo.append(value)
    return found


def edit(tree: Pairs, change: Edit) -> None:
    """Do one thing to the tree of a header."""
    kind, where, what = change
    spots = places(tree)
    if not spots:
        return
    here, index = spots[where % len(spots)]
    member = here[index]
    key, value = member if isinstance(member, tuple) else (None, member)

    def put(new: object) -> None:
        here[index] = new if key is None else (key, new)

    match kind:
        case "drop":
            del here[index]
        case "repeat":
            here.insert(what % (len(here) + 1), member)
        case "reverse":
            here.reverse()
        case "rename" if key is not None:
            here[index] = (KEYS[what % len(KEYS)], value)
        case "add a member":
            here.insert(index, (KEYS[what % len(KEYS)], Raw(WEIRD[where % len(WEIRD)])) if key is not None else what % 70)
        case "replace":
            put(Raw(WEIRD[what % len(WEIRD)]))
        case "nudge" if isinstance(value, int):
            put(value + (-8, -1, 1, 2, 8, 2**32, 2**63, 2**64)[what % 8])
        case "respell" if isinstance(value, int):
            # As another reader might take it: the number is right.
            put(Raw(("0{}", "{}.0", "{}e0", "{}E+0", "-{}", "+{}", '"{}"', "[{}]", "0x{}", " {} ")[what % 10].format(value)))
        case "one more":
            # Of elements; where they are parts of bytes, the size may seem to fit still.
            for shape in numbers_of(tree, "shape")[where % 2 :: 2]:
                shape[-1] += 1
        case "wrap":
            put([value] if what % 2 else Pairs([("x", value)]))
        case "many ones" if isinstance(value, list) and value and isinstance(value[0], int):
            put([1] * (60 + what % 10) + value)
        case "shift":
            # A hole, or an overlap: everything behind one tensor moves.
            begins = sorted(offsets[0] for offsets in numbers_of(tree, "data_offsets"))
            for offsets in numbers_of(tree, "data_offsets"):
                if offsets[0] > begins[where % len(begins)]:
                    offsets[:] = [offset + (-1, 1, -8, 8)[what % 4] for offset in offsets]
        case "swap":
            found = numbers_of(tree, "data_offsets")
            one, two = (found[which % len(found)] for which in (where, what)) if found else ([], [])
            one[:], two[:] = two[:], one[:]
        case _:
            return


def numbers_of(tree: Pairs, field: str) -> list[list[int]]:
    """The offsets, or the shapes, of all tensors that still have some."""
    return [
        value for _, fields in tree if isinstance(fields, Pairs) for key, value in fields if key == field and is_numbers(value)
    ]


def is_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(n, int) for n in value)


def spelled(value: object, random: Random) -> str:
    """JSON text, with space where there may be some, and some characters escaped."""

    def text(string: str) -> str:
        if random.random() < 0.1:
            return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 1 << 16 else c for c in string) + '"'
        return json.dumps(string, ensure_ascii=random.random() < 0.5)

    def spaced(mark: str) -> str:
        return mark if random.random() < 0.9 else random.choice(SPACES) + mark + random.choice(SPACES)

    match value:
        case Raw():
            return value.text
        case str():
            return text(value)
        case int():
            return str(value)
        case Pairs():
            members = (f"{text(key)}{spaced(':')}{spelled(of, random)}" for key, of in value)
            return spaced("{") + spaced(",").join(members) + spaced("}")
        case list():
            return spaced("[") + spaced(",").join(spelled(of, random) for of in value) + spaced("]")
        case _:
            raise AssertionError(value)


def wrap(kind: str, number: int, raw: bytes, data: bytes) -> bytes:
    """The file around a header, wrong in one way."""
    length = len(raw)
    match kind:
        case "byte order mark":
            raw = b"\xef\xbb\xbf" + raw
        case "space before":
            raw = b" \n\t\r"[number % 4 : number % 4 + 1] + raw
        case "something behind":
            raw += (
                b" ",
                b"        ",
                b"\n",
                b"\t ",
                b" \r",
                b"\0",
                b"{}",
                b"}",
                b"x",
                b"\xff",
                b",",
                b"/**/",
                b"\v",
                b"\xc2\xa0",
            )[number % 14]
        case "wrong length":
            delta = (-8, -1, 1, 8, 100, 10**8, 2**62, -(10**6))[number % 8]
            return struct.pack("<Q", (length + delta) % 2**64) + raw + data
        case "less data":
            data = data[: -1 - number % 9]
        case "more data":
            data += DATA[-1 - number % 9 :]
        case "cut":
            return (struct.pack("<Q", length) + raw + data)[: number % (length + 8)]
        case _:
            pass
    return struct.pack("<Q", len(raw)) + raw + data


EDITS = [
    "drop",
    "repeat",
    "reverse",
    "rename",
    "add a member",
    "replace",
    "nudge",
    "respell",
    "one more",
    "wrap",
    "many ones",
    "shift",
    "swap",
]
WRAPS = ["byte order mark", "space before", "something behind", "wrong length", "less data", "more data", "cut"]
NUMBER = st.integers(0, 1 << 20)


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A good file after up to three edits of its tree, one of its envelope, and up to two of its bytes."""
    choice = draw(NUMBER)
    tree, size = base(choice)
    for change in draw(st.lists(st.tuples(st.sampled_from(EDITS), NUMBER, NUMBER), max_size=3)):
        edit(tree, change)
    if draw(st.booleans()):
        # As much data as the last tensor ends at, so that only what lies before it is wrong.
        size = min(max(max((offsets[-1] for offsets in numbers_of(tree, "data_offsets")), default=0), 0), len(DATA))
    raw = bytearray(spelled(tree, Random(choice)).encode("utf-8", "surrogatepass"))
    for at, bit in draw(st.lists(st.tuples(NUMBER, st.integers(0, 7)), max_size=2)):
        raw[at % len(raw)] ^= 1 << bit
    return wrap(draw(st.sampled_from(["", *WRAPS])), draw(NUMBER), bytes(raw), DATA[:size])


@pytest.mark.slow
@settings(max_examples=1200)
@given(file=broken())
def test_nothing_is_accepted_that_the_package_refuses(file: bytes, tmp_path: Path) -> None:
    judge(file, tmp_path / "f")


@pytest.mark.slow
def test_the_breaking_reaches_every_answer(tmp_path: Path) -> None:
    """The law above says something only where both accept, only they do, and nobody does."""
    seen: dict[str, int] = {}

    @settings(max_examples=400)
    @given(file=broken())
    def look(file: bytes) -> None:
        found = "refused" if theirs(file, tmp_path / "f") is None else "stricter" if ours(file) is None else "accepted"
        seen[found] = seen.get(found, 0) + 1

    look()
    assert min(seen.get(answer, 0) for answer in ("accepted", "stricter", "refused")) > 20, seen


# --- bounds --------------------------------------------------------------------------------------------------------
BOMB_BYTES = 1 << 20


def filled(pattern: str, before: str = "{", behind: str = "") -> bytes:
    text = pattern * (BOMB_BYTES // len(pattern))
    return file_of(f"{before}{text}{behind}")


def numbered(pattern: str, before: str, behind: str) -> bytes:
    return file_of(before + ",".join(pattern.format(n) for n in range(BOMB_BYTES // (len(pattern) + 5))) + behind)


BOMBS = {
    "arrays in arrays": filled("[", '{"a":'),
    "objects in objects": filled('{"a":', ""),
    "arrays in an unknown field": filled("[", '{"a":{"x":'),
    "objects in metadata": filled('{"a":', '{"__metadata__":'),
    "a string without end": filled("x", '{"'),
    "escapes without end": filled("\\\\", '{"'),
    "quotes, all escaped": filled('\\"', '{"'),
    "half an escape at the end": filled("\\u0041", '{"', "\\u00"),
    "a number without end": filled("9", '{"a":{"shape":['),
    "spaces": filled(" ", "{", "x"),
    "line breaks behind": filled("\n", "{}"),
    "commas": filled(","),
    "dimensions": filled("1,", '{"a":{"shape":['),
    "one long name": filled("n", '{"', '":' + BYTE + "}"),
    "one long name in escapes": filled("\\u00e9", '{"', '":' + BYTE + "}"),
    "empty tensors": numbered('"{:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "{", "}"),
    "metadata": numbered('"{:x}":""', '{"__metadata__":{', "}}"),
}


@pytest.mark.parametrize("file", [pytest.param(file, id=name) for name, file in BOMBS.items()])
@pytest.mark.slow
def test_a_bomb_costs_memory_in_proportion_and_raises_nothing_else(file: bytes) -> None:
    """A reader whose time is not in proportion runs into the timeout: a megabyte squared is a day."""
    tracemalloc.start()
    try:
        ours(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * len(file)


CLAIMS = [DEFAULT_MAX_HEADER_BYTES + 1, 99_999_999, 100_000_000, 100_000_001, MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1]


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("limit", [DEFAULT_MAX_HEADER_BYTES, MAX_HEADER_BYTES])
def test_a_claimed_length_costs_nothing(claim: int, limit: int) -> None:
    file = struct.pack("<Q", claim) + b"{}"
    tracemalloc.start()
    try:
        for size in (len(file), 200_000_000) if claim > limit else (len(file),):
            with pytest.raises(FormatError):
                header_bytes(file, size, limit)
            with pytest.raises(FormatError):
                parse_header(file, size, limit)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 16


@pytest.mark.slow
def test_no_header_is_longer_than_the_package_reads() -> None:
    file = file_of(b"{}".ljust(100_000_001))
    with pytest.raises(safetensors.SafetensorError, match="too large"):
        DESERIALIZE(file)
    with pytest.raises(FormatError):
        parse_header(file, len(file), MAX_HEADER_BYTES)
