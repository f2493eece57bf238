"""What those wait for who follow a fetch without being its client: that it goes on, and how it ended.

Invariants:
- `Shared.lock` is taken for a fetch only by `turn`, so whoever follows a content knows of every fetch of it;
- whoever changes what a follower looks at (a journaled piece, a transfer, a job) rings afterwards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from modelp2p.protocol.errors import InterruptedFetchError, ModelP2PError

if TYPE_CHECKING:
    from modelp2p.daemon.node import Shared


@dataclass(slots=True)
class Watch:
    """What followers of one content wait for."""

    fetches: int = 0
    """Fetches under way, those that wait for their turn included."""
    failure: ModelP2PError | None = None
    """How the last of them ended, where that was badly."""
    _rung: trio.Event = field(default_factory=trio.Event)

    def ring(self) -> None:
        """Something may have changed. Cheap where nobody waits."""
        if self._rung.statistics().tasks_waiting:
            self._rung.set()
            self._rung = trio.Event()

    async def wait(self) -> None:
        """Until it rings. Nothing is missed between a look and this, as long as nothing is awaited in between."""
        await self._rung.wait()


@asynccontextmanager
async def turn(shared: Shared) -> AsyncIterator[None]:
    """The one fetch that may work on a content at a time; followers hear that it waits, works, and how it ended."""
    watch = shared.watch
    watch.fetches += 1
    watch.ring()
    try:
        async with shared.lock:
            watch.failure = None
            yield
    except ModelP2PError as exc:
        watch.failure = exc
        raise
    except BaseException:  # its client has gone, the daemon stops, or a bug that is logged where it is caught
        watch.failure = InterruptedFetchError("the fetch was stopped; what is proven is kept", hint="Run it again to go on.")
        raise
    finally:
        watch.fetches -= 1
        watch.ring()
