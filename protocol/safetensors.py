"""Safetensors headers, read strictly: what lies where in a file of tensors.

The header is data from a stranger, also when it is signed. This parser accepts a subset of what the `safetensors` package
accepts, with the same meaning; everything else is a `FormatError`, never another exception.

Stricter than upstream, each because two readers could disagree or a terminal could be steered:
- no name twice ("Duplicate keys are disallowed. Not all parsers may respect this."), no unknown or repeated field;
- the first byte of the header is "{", padding after the last "}" is spaces only;
- no control, bidi or other invisible character in a name or metadata key;
- a non-empty tensor begins at a multiple of its element size, so that views of it are aligned;
- at most 200,000 tensors, 64 dimensions, and element counts whose size in bits fits 63 bits.

Invariants of what comes out: tensors are sorted by place and tile the data exactly, without hole, overlap or rest.

The grammar has a fixed depth, so this reads it directly: there is no recursion to exhaust, and nothing is built that is not
a tensor. It deliberately does not read files and gives no meaning to metadata.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import NoReturn

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.text import is_hidden

LENGTH_BYTES = 8
DEFAULT_MAX_HEADER_BYTES = 16 << 20
# What `safetensors` itself reads at most: nobody else could load a file above it, so no caller may raise the limit further.
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
# NumPy and torch stop at 64 dimensions.
MAX_RANK = 64
_MAX_BITS = 1 << 63
_METADATA = "__metadata__"

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of every dtype of safetensors 0.8."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: row-major elements at `begin` up to `end`, bytes counted from the header's end."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; `tensors` lie in file order, their data starts at byte `data_offset` of the file."""

    tensors: tuple[TensorInfo, ...]
    data_offset: int
    metadata: dict[str, str] = field(default_factory=dict)


def header_bytes(prefix: bytes | memoryview, file_size: int, max_header_bytes: int = DEFAULT_MAX_HEADER_BYTES) -> int:
    """How many bytes from the start of the file `parse_header` needs, judged by the first 8.

    Raises:
        FormatError: the announced header is over the limit or longer than the file.
    """
    if len(prefix) < LENGTH_BYTES or file_size < LENGTH_BYTES:
        raise FormatError(f"file of {file_size} bytes is too short for a safetensors header")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    limit = min(max_header_bytes, MAX_HEADER_BYTES)
    if length > limit:
        raise FormatError(f"safetensors header of {length} bytes exceeds the limit of {limit}", size=length, limit=limit)
    if length > file_size - LENGTH_BYTES:
        raise FormatError(f"safetensors header of {length} bytes in a file of {file_size}")
    return LENGTH_BYTES + length


def parse_header(data: bytes | memoryview, file_size: int, max_header_bytes: int = DEFAULT_MAX_HEADER_BYTES) -> Header:
    """The header at the start of `data`, which may be the whole file or any prefix that holds the header.

    Verify those bytes first. Cost: about 25 microseconds a tensor.

    Raises:
        FormatError: the header is not exactly what the module docstring allows.
    """
    end = header_bytes(data, file_size, max_header_bytes)
    if len(data) < end:
        raise FormatError(f"only {len(data)} of {end} bytes of the safetensors header are here")
    raw = bytes(data[LENGTH_BYTES:end])
    # Every tensor spells this field once, so a bomb is refused before it is read; escapes only delay it to the loop.
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise FormatError(f"more than {MAX_TENSORS} tensors in one file")
    try:
        reader = _Reader(raw.decode())
    except UnicodeDecodeError as exc:
        raise FormatError("safetensors header is not UTF-8") from exc
    tensors, metadata = reader.read()
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    at = 0
    for tensor in tensors:
        if tensor.begin != at:
            kind = "overlaps the one before" if tensor.begin < at else "leaves a hole before it"
            raise FormatError(f"tensor {_short(tensor.name)} {kind}", tensor=_short(tensor.name))
        at = tensor.end
    if at != file_size - end:
        raise FormatError(f"tensors cover {at} bytes of {file_size - end}")
    return Header(tuple(tensors), end, metadata)


# JSON whitespace (RFC 8259) around one structural character, and an integer without sign, fraction or leading zero.
_SPACE = r"[ \t\n\r]*"
_PUNCTUATION = {character: re.compile(rf"{_SPACE}{re.escape(character)}{_SPACE}") for character in ",:[]{}"}
_INTEGER = re.compile(r"(?:0|[1-9][0-9]{0,18})(?![0-9.eE])")
# Possessive, so that a header of one endless string costs one pass and no backtracking.
_STRING = re.compile(r'"((?:[^"\\\x00-\x1f]++|\\.)*+)"')


class _Reader:
    """One pass over the header text; every method leaves `_at` behind what it read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def read(self) -> tuple[list[TensorInfo], dict[str, str]]:
        if not self._text.startswith("{"):
            raise FormatError("safetensors header does not start with '{'")
        tensors: list[TensorInfo] = []
        metadata: dict[str, str] = {}
        names: set[str] = set()
        more = self._opens("{", "}")
        while more:
            name = self._key(names)
            if name == _METADATA:
                metadata = self._metadata()
            elif len(tensors) == MAX_TENSORS:
                raise FormatError(f"more than {MAX_TENSORS} tensors in one file")
            else:
                tensors.append(self._tensor(name))
            more = self._continues("}")
        # "The header may be trailing padded with whitespace (0x20)." A closing brace took other space along: look back.
        if self._text.rstrip(" ")[-1] != "}" or self._at != len(self._text):
            self._fail("something after the closing brace")
        return tensors, metadata

    def _metadata(self) -> dict[str, str]:
        metadata: dict[str, str] = {}
        names: set[str] = set()
        more = self._opens("{", "}")
        while more:
            key = self._key(names)
            metadata[key] = self._string()
            more = self._continues("}")
        return metadata

    def _tensor(self, name: str) -> TensorInfo:
        fields: set[str] = set()
        dtype = ""
        shape: tuple[int, ...] = ()
        offsets: tuple[int, ...] = ()
        more = self._opens("{", "}")
        while more:
            match self._key(fields):
                case "dtype":
                    dtype = self._string()
                case "shape":
                    shape = self._integers(MAX_RANK)
                case "data_offsets":
                    offsets = self._integers(2)
                case other:
                    raise FormatError(f"tensor {_short(name)} has an unknown field {_short(other)}", tensor=_short(name))
            more = self._continues("}")
        if len(fields) != 3 or len(offsets) != 2:
            raise FormatError(f"tensor {_short(name)} lacks a field", tensor=_short(name))
        info = TensorInfo(name, dtype, shape, begin=offsets[0], end=offsets[1])
        _check(info)
        return info

    def _integers(self, at_most: int) -> tuple[int, ...]:
        values: list[int] = []
        more = self._opens("[", "]")
        while more:
            found = _INTEGER.match(self._text, self._at)
            if found is None or len(values) == at_most:
                self._fail(f"expected at most {at_most} non-negative integers below 10**19")
            values.append(int(found[0]))
            self._at = found.end()
            more = self._continues("]")
        return tuple(values)

    def _key(self, seen: set[str]) -> str:
        key = self._string()
        if key in seen:
            raise FormatError(f"duplicate key {_short(key)} in the safetensors header", key=_short(key))
        if not (key.isascii() and key.isprintable()) and any(map(is_hidden, key)):
            raise FormatError(f"key {_short(key)} in the safetensors header holds an invisible character", key=_short(key))
        seen.add(key)
        if not self._take(":"):
            self._fail("expected ':'")
        return key

    def _string(self) -> str:
        found = _STRING.match(self._text, self._at)
        if found is None:
            self._fail("expected a string")
        value = found[1]
        if "\\" in value:
            value = self._unescaped(found[0])
        self._at = found.end()
        return value

    def _unescaped(self, literal: str) -> str:
        try:
            value = str(json.loads(literal))
            # Python reads an escaped lone surrogate; it is no text, and upstream refuses it.
            value.encode()
        except ValueError as exc:
            raise FormatError(f"safetensors header has a malformed string at character {self._at}", at=self._at) from exc
        return value

    def _opens(self, opening: str, closing: str) -> bool:
        """Steps into an object or array; whether it has a member."""
        if not self._take(opening):
            self._fail(f"expected '{opening}'")
        return not self._take(closing)

    def _continues(self, closing: str) -> bool:
        """Steps over the comma or the end after a member; whether another must follow."""
        if self._take(","):
            return True
        if not self._take(closing):
            self._fail(f"expected ',' or '{closing}'")
        return False

    def _take(self, character: str) -> bool:
        found = _PUNCTUATION[character].match(self._text, self._at)
        if found is None:
            return False
        self._at = found.end()
        return True

    def _fail(self, reason: str) -> NoReturn:
        raise FormatError(f"safetensors header is malformed at character {self._at}: {reason}", at=self._at)


def _check(tensor: TensorInfo) -> None:
    name = _short(tensor.name)
    bits = DTYPE_BITS.get(tensor.dtype)
    if bits is None:
        raise FormatError(f"tensor {name} has an unknown dtype {_short(tensor.dtype)}", tensor=name)
    # Counted without the zeros: `[2**62, 2**62, 0]` is empty, but its strides overflow in every reader.
    total = bits
    for dimension in tensor.shape:
        total *= dimension or 1
        if total >= _MAX_BITS:
            raise FormatError(f"tensor {name} is larger than any file", tensor=name)
    if 0 in tensor.shape:
        total = 0
    if total % 8:
        raise FormatError(f"tensor {name} does not end on a whole byte", tensor=name)
    if tensor.end - tensor.begin != total // 8:
        raise FormatError(f"tensor {name} needs {total // 8} bytes and claims {tensor.begin} to {tensor.end}", tensor=name)
    if total and tensor.begin % max(1, bits // 8):
        message = f"tensor {name} begins at byte {tensor.begin}, not at a multiple of its element size"
        raise FormatError(message, tensor=name, hint="write the file again with the safetensors package")


def _short(text: str) -> str:
    """`text` cut to what fits one line of a message; a name may be as long as the header."""
    return text if len(text) <= 120 else f"{text[:120]}..."
