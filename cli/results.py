"""Result maps of the daemon, read with types: every verb formats a `Row` and none of them casts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from modelp2p.protocol.errors import DaemonError

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

SHORT_REVISION = 12
"""Hex digits of a revision in tables: enough to be unique, and what `@` accepts."""


class Row:
    """A map that came from the daemon. Missing or mistyped fields are its error, not a traceback of ours."""

    __slots__ = ("source",)

    def __init__(self, source: Value) -> None:
        if not isinstance(source, dict):
            raise DaemonError("the daemon's reply has another shape than this version knows", hint="Install the same version.")
        self.source: Map = source

    def text(self, key: str, default: str | None = None) -> str:
        """A string, exactly as sent. Raises DaemonError where it is missing and has no default."""
        value = self.source.get(key)
        if isinstance(value, str):
            return value
        if default is None:
            raise DaemonError(f"the daemon's reply has no '{key}'", hint="Client and daemon may differ in version.")
        return default

    def number(self, key: str) -> int:
        """A whole number; 0 where the daemon does not say."""
        value = self.source.get(key)
        return value if isinstance(value, int) else 0

    def flag(self, key: str, *, default: bool = False) -> bool:
        """A boolean."""
        value = self.source.get(key, default)
        return value if isinstance(value, bool) else default

    def rows(self, key: str) -> list[Row]:
        """A list of maps; empty where the daemon does not say."""
        return [Row(item) for item in self._list(key)]

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty where the daemon does not say."""
        return [item for item in self._list(key) if isinstance(item, str)]

    def row(self, key: str) -> Row | None:
        """A map inside, or None."""
        value = self.source.get(key)
        return Row(value) if isinstance(value, dict) else None

    def first(self, *keys: str) -> dict[str, object]:
        """All fields, those of the contract first; a missing one of them is null."""
        rest: dict[str, object] = {key: value for key, value in self.source.items() if key not in keys}
        return {key: self.source.get(key) for key in keys} | rest

    @property
    def ref(self) -> str:
        """`org/model@revision`."""
        return f"{self.text('name')}@{self.text('revision')}"

    @property
    def short_revision(self) -> str:
        """The revision as tables show it."""
        return self.text("revision")[:SHORT_REVISION]

    def _list(self, key: str) -> Iterator[Value]:
        value = self.source.get(key)
        return iter(value if isinstance(value, list) else ())
