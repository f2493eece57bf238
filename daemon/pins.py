"""Pins: contents that the owner of this node does not want removed, neither by `rm` nor by `gc`.

A pin is a file named by the info-hash, so every statement about that content is pinned. The name alone decides: a pin whose bytes
rotted, or that a newer version wrote, still holds.

Invariants:
- a pin is on the disk, synced, before any client hears of it;
- a content that is being removed cannot be pinned, and one that is pinned cannot be removed, whoever comes first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.files import write_atomic
from modelp2p.protocol import codec, layout
from modelp2p.protocol.errors import DeniedError, NotFoundError

if TYPE_CHECKING:
    from modelp2p.daemon.library import Entry
    from modelp2p.daemon.store import Store

MAGIC = b"MP2PPIN\n"
VERSION = 1
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Pins:
    """The pins of one home."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pinned = {bytes.fromhex(name) for name in store.names(layout.PINS) if _DIGEST.fullmatch(name)}
        self._leaving: set[bytes] = set()
        # What the disk and this object say changes together: one at a time.
        self._changing = trio.Lock()

    def __repr__(self) -> str:
        return f"<Pins {len(self._pinned)}>"

    def __contains__(self, info_hash: bytes) -> bool:
        return info_hash in self._pinned

    def __iter__(self) -> Iterator[bytes]:
        return iter(sorted(self._pinned))

    async def add(self, entry: Entry) -> bool:
        """Pin a content; False where it was pinned already.

        Raises:
            NotFoundError: it is being removed.
            StoreError: the pin could not be kept, and does not hold.
        """
        async with self._changing:
            info_hash = entry.info_hash
            if info_hash in self._leaving:
                raise NotFoundError(f"{entry.ref} is being removed", hint="Fetch it again first.")
            if info_hash in self._pinned:
                return False
            # Before it is written: from here on nobody begins to remove it.
            self._pinned.add(info_hash)
            try:
                await trio.to_thread.run_sync(self._write, info_hash)
            except BaseException:
                self._pinned.discard(info_hash)
                raise
            return True

    async def remove(self, info_hash: bytes) -> bool:
        """Take a pin off; False where there was none.

        Raises:
            StoreError: it could not be removed, and still holds.
        """
        async with self._changing:
            if info_hash not in self._pinned:
                return False
            await trio.to_thread.run_sync(self._store.remove, layout.pin_of(info_hash))
            self._pinned.discard(info_hash)
            return True

    def check_free(self, entry: Entry) -> None:
        """Refuse to remove what is pinned.

        Raises:
            DeniedError: it is.
        """
        if entry.info_hash in self._pinned:
            raise DeniedError(f"{entry.ref} is pinned", hint=f"If it may go: modelp2p unpin {entry.ref}")

    @contextmanager
    def leaving(self, entry: Entry) -> Iterator[None]:
        """For the time of the block the content is removed, and cannot be pinned.

        Raises:
            DeniedError: it is pinned.
        """
        self.check_free(entry)
        self._leaving.add(entry.info_hash)
        try:
            yield
        finally:
            self._leaving.discard(entry.info_hash)

    def _write(self, info_hash: bytes) -> None:
        data = MAGIC + codec.pack({"v": VERSION, "info_hash": info_hash})
        write_atomic(self._store.path(layout.PINS), info_hash.hex(), data)
