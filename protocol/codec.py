"""Canonical msgpack: the one byte form of every value modelp2p signs, stores or sends.

Invariants:
- `pack(unpack(data)) == data` for everything `unpack` accepts: one value, one encoding;
- map keys are text, sorted by their UTF-8 bytes, each once; digests are bin, text is str;
- no floats, no extension types, no integers beyond 64 bits; depth and length are capped before objects are built.

msgpack itself is not canonical (of the public suite's 233 encodings 96 re-encode alike) and accepts duplicate keys, so the
check is by re-encoding. This is the only module that imports msgpack. Format: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar, cast

import msgpack

from modelp2p.protocol.errors import FormatError

Value: TypeAlias = "bool | int | str | bytes | list[Value] | dict[str, Value] | None"
Map: TypeAlias = "dict[str, Value]"

# Deepest value of ours is 5 (manifest > files > entry > field); 16 leaves room and stays far below the C stack.
MAX_DEPTH = 16

_T = TypeVar("_T")


def pack(value: Value) -> bytes:
    """The canonical bytes of `value`.

    Raises:
        FormatError: a type, integer or depth this format does not carry.
    """
    try:
        return cast("bytes", msgpack.packb(_sorted(value, MAX_DEPTH), use_bin_type=True, strict_types=True))
    except (OverflowError, TypeError, ValueError) as exc:
        raise FormatError(f"value cannot be encoded: {exc}") from exc


def unpack(data: bytes | memoryview, *, max_bytes: int) -> Value:
    """The value whose canonical encoding is exactly `data`.

    Raises:
        FormatError: longer than `max_bytes`, malformed, trailing bytes, or not the canonical form.
    """
    value = _decode(data, max_bytes)
    if pack(value) != data:
        raise FormatError("message is not in canonical form")
    return cast("Value", value)


def unpack_map(data: bytes | memoryview, *, max_bytes: int) -> Map:
    """`unpack`, for messages whose outermost value is a map."""
    value = unpack(data, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise FormatError("expected a map")
    return value


def pack_table(rows: Mapping[bytes, bytes]) -> bytes:
    """Canonical bytes of a map from digest (bin) to bytes, sorted by digest: the form of the `layers` file."""
    return cast("bytes", msgpack.packb({key: rows[key] for key in sorted(rows)}, use_bin_type=True))


def unpack_table(data: bytes | memoryview, *, max_bytes: int) -> dict[bytes, bytes]:
    """The inverse of `pack_table`, as strict as `unpack`.

    Raises:
        FormatError: see `unpack`; also a key or value that is not bin.
    """
    value = _decode(data, max_bytes)
    if type(value) is not dict or any(type(key) is not bytes or type(row) is not bytes for key, row in value.items()):
        raise FormatError("expected a map from digests to bytes")
    if pack_table(value) != data:
        raise FormatError("message is not in canonical form")
    return value


def take(source: Mapping[str, Value], key: str, kind: type[_T], where: str = "message") -> _T:
    """The required field `key`, of exactly type `kind` (a bool is not an int).

    Raises:
        FormatError: missing or of another type.
    """
    if key not in source:
        raise FormatError(f"{where}: field '{key}' is missing")
    value = source[key]
    if type(value) is not kind:
        raise FormatError(f"{where}: field '{key}' must be {kind.__name__}, not {type(value).__name__}")
    return value


def take_optional(source: Mapping[str, Value], key: str, kind: type[_T], where: str = "message") -> _T | None:
    """Like `take`, but None where the field is absent."""
    return take(source, key, kind, where) if key in source else None


def take_uint(source: Mapping[str, Value], key: str, *, maximum: int, where: str = "message") -> int:
    """The required whole number `key`, from 0 to `maximum` inclusive."""
    value = take(source, key, int, where)
    if not 0 <= value <= maximum:
        raise FormatError(f"{where}: field '{key}' must lie between 0 and {maximum}, not {value}")
    return value


def take_bytes(source: Mapping[str, Value], key: str, length: int, where: str = "message") -> bytes:
    """The required byte string `key` of exactly `length` bytes."""
    value = take(source, key, bytes, where)
    if len(value) != length:
        raise FormatError(f"{where}: field '{key}' must have {length} bytes, not {len(value)}")
    return value


def take_list(source: Mapping[str, Value], key: str, kind: type[_T], *, maximum: int, where: str = "message") -> list[_T]:
    """The required list `key`, at most `maximum` items, each of type `kind`."""
    items = take(source, key, list, where)
    if len(items) > maximum:
        raise FormatError(f"{where}: field '{key}' has {len(items)} items, more than the limit of {maximum}")
    for item in items:
        if type(item) is not kind:
            raise FormatError(f"{where}: every item of '{key}' must be {kind.__name__}, not {type(item).__name__}")
    return cast("list[_T]", items)


def only_fields(source: Mapping[str, Value], allowed: frozenset[str], where: str = "message") -> None:
    """Refuse fields this version does not know: a signed statement must mean the same to every reader."""
    for key in source:
        if key not in allowed:
            raise FormatError(f"{where}: unknown field '{key}'")


def _decode(data: bytes | memoryview, max_bytes: int) -> Any:  # noqa: ANN401  # what strangers sent has no type yet
    if len(data) > max_bytes:
        raise FormatError(f"message of {len(data)} bytes exceeds the limit of {max_bytes}", size=len(data), limit=max_bytes)
    try:
        # unpackb bounds every claimed length by the length of the input, so a claimed 4 G array allocates nothing.
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_unique,
            ext_hook=_no_extension,
        )
    except RecursionError as exc:
        raise FormatError("message is nested too deeply") from exc
    except (ValueError, msgpack.UnpackException) as exc:
        raise FormatError(f"not valid msgpack: {exc or type(exc).__name__}") from exc


def _sorted(value: Any, depth: int) -> Any:  # noqa: ANN401  # checked case by case below
    if depth == 0:
        raise ValueError("nested too deeply")
    match value:
        case dict():
            for key in value:
                if type(key) is not str:
                    raise TypeError(f"map keys must be text, not {type(key).__name__}")
            return {key: _sorted(value[key], depth - 1) for key in sorted(value, key=_utf8)}
        case list() | tuple():
            return [_sorted(item, depth - 1) for item in value]
        case None | bool() | int() | str() | bytes():
            return value
        case float():
            raise TypeError("floats are not carried")
        case _:
            # msgpack's own `Timestamp` among them: its decoder builds one without asking `ext_hook`.
            raise TypeError(f"{type(value).__name__} is not carried")


def _utf8(key: str) -> bytes:
    return key.encode("utf-8")


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate map key")
    return result


def _no_extension(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code} is not carried")
