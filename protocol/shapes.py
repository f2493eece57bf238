"""Frozen dataclasses as codec values and back: the fields are the format.

Invariants:
- `from_value(to_value(x), type(x)) == x` for dataclasses of `bool`, `int` (not negative), `str`, `bytes`, `X | None`,
  `tuple[X, ...]` and dataclasses of these;
- what comes back is complete: every field present, none unknown, each of exactly its type.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Union, get_args, get_origin, get_type_hints

from modelp2p.protocol.errors import FormatError

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

_MAX_INT = 2**63 - 1
_SCALARS = (bool, int, str, bytes)


def to_value(item: object) -> Value:
    """`item` as the codec takes it; a dataclass becomes a map of its fields."""
    if isinstance(item, _SCALARS) or item is None:
        return item
    if isinstance(item, tuple):
        return [to_value(part) for part in item]
    return {spot.name: to_value(getattr(item, spot.name)) for spot in fields(item)}  # type: ignore[arg-type]  # a dataclass


def from_value(value: Value, kind: object, where: str) -> object:
    """`value` as a `kind`; `where` names it in errors.

    Raises:
        FormatError: not of that shape, or refused by the dataclass itself.
    """
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        wanted = next(part for part in get_args(kind) if part is not type(None))
        return None if value is None else from_value(value, wanted, where)
    if origin is tuple and type(value) is list:
        return tuple(from_value(part, get_args(kind)[0], where) for part in value)
    if kind is int and type(value) is int and not 0 <= value <= _MAX_INT:
        raise FormatError(f"{where}: {value} lies outside 0 to {_MAX_INT}")
    if kind in _SCALARS and type(value) is kind:
        return value
    if isinstance(kind, type) and kind not in _SCALARS and isinstance(value, dict):
        return _dataclass(value, kind, where)
    raise FormatError(f"{where}: {type(value).__name__} is not {getattr(kind, '__name__', kind)}")


def _dataclass(value: Map, kind: type, where: str) -> object:
    hints = _hints(kind)
    if value.keys() != hints.keys():
        wrong = ", ".join(sorted(value.keys() ^ hints.keys()))
        raise FormatError(f"{where}: missing or unknown: {wrong}")
    return kind(**{name: from_value(value[name], hint, f"{where}.{name}") for name, hint in hints.items()})


@cache
def _hints(kind: type) -> dict[str, object]:
    return get_type_hints(kind)
