"""Uploads without a copy in host memory: windows of a mapped file, page-locked while the device reads them in place.

A **window** is what one span covers of a file's own read-only shared mapping. It is page-locked in the background
(`Device.register`), uploaded from, and let go when its upload has ended.

Which files go this way (`Transfers`):
- never safetensors' own storage: that is a private mapping, and a long-lived pin copies every page of it;
- where the device proves, or nobody does. Where CPUs prove it would be wrong: what they hashed in the page cache could change
  before it is uploaded. Where nobody proves it is as good as the ring: either takes what the page cache holds at that moment, and
  the file is looked at again after the last upload;
- without being asked for, only files whose inode the store made: nobody truncates those. The pages of a window are locked before
  anything reads them and a lost page makes the locking fail, but a driver that reads by the CPU's page tables would die (SIGBUS);
- not where it was refused before on the same file system. What is refused goes through the ring, and so does what is read again.

Invariants:
- a window is let go after its upload has ended, whatever ended the flow, and its mapping lives until then;
- a lane has one window at most, so as much is page-locked as a ring would have.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from modelp2p.loader.mapped import mapped_bytes
from modelp2p.protocol.errors import StoreError

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.device import Device, Event
    from modelp2p.loader.shard import Shard, Way
    from modelp2p.loader.source import SourceFile

TRANSFERS = ("auto", "ring", "register")
AUTO = "ring"
"""What `auto` means for the store's own files. XX: experiment E3 of tests/bench/gpu_load.py says what it should be."""


class WindowError(StoreError):
    """A mapped file cannot be uploaded from where it lies."""


def transfer_of(asked: str, way: Way, *, is_proven_on_device: bool) -> tuple[str, str]:
    """`ring` or `register` for one file, and why not `register` where that was asked for."""
    if asked == "ring" or (asked == "auto" and not way.is_own):
        return "ring", ""
    if way.is_hashed and not is_proven_on_device:
        why = "what the CPUs hash is a copy of their own: a file uploaded in place could change in between"
        return "ring", why if asked == "register" else ""
    return ("register" if asked == "register" else AUTO), ""


class Transfers:
    """Which way the bytes of each file take to a device, and took.

    Args:
        asked: one of `TRANSFERS`.
        is_proven_on_device: whether what is hashed is hashed by the device.
        on_reason: told why a file that should go by windows does not.
    """

    def __init__(
        self, asked: str = "ring", *, is_proven_on_device: bool = False, on_reason: Callable[[str], None] = lambda reason: None
    ) -> None:
        self._asked = asked
        self._is_proven_on_device = is_proven_on_device
        self._on_reason = on_reason
        self._closed: set[int] = set()
        self._told: set[str] = set()
        self._taken: set[str] = set()

    @property
    def taken(self) -> str:
        """The ways spans took so far, as `LoadStats.transfer` shows them."""
        return "+".join(sorted(self._taken))

    def is_by_window(self, shard: Shard) -> bool:
        """Whether a file goes by windows now."""
        name, why = transfer_of(self._asked, shard.way, is_proven_on_device=self._is_proven_on_device)
        self._tell(why)
        return name == "register" and shard.source.stat.st_dev not in self._closed

    def refuse(self, shard: Shard, reason: str) -> None:
        """Send this file, and all others of its file system, through the ring from now on."""
        self._closed.add(shard.source.stat.st_dev)
        self._tell(reason)

    def count(self, name: str) -> None:
        """A span took this way."""
        self._taken.add(name)

    def _tell(self, reason: str) -> None:
        if reason and reason not in self._told:
            self._told.add(reason)
            self._on_reason(reason)


class Window:
    """A stretch of a file, being page-locked. Waited for like the readers of a host slot."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        """Its bytes, where they lie: (size,) uint8."""
        self._locked: Event | None = None

    def lock(self, device: Device) -> None:
        """Begin."""
        self._locked = device.register(self.memory)

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return self._locked is not None and self._locked.is_done()

    def wait(self) -> None:
        """Return when it may be uploaded from.

        Raises:
            WindowError: it may not.
        """
        assert self._locked is not None, "a window is locked by who opens it"
        self._locked.wait()

    def finish(self) -> None:
        """Nothing reads into a slot here."""

    def abandon(self) -> None:
        """As `finish`: `Windows` lets it go."""

    def is_idle(self) -> bool:
        """Nothing writes to a slot here."""
        return True


class Windows:
    """The windows of one flow. Use it in a `with` block that ends after the device was drained."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._mappings: dict[SourceFile, memoryview] = {}
        self._open: list[Window] = []
        self._ending: list[tuple[Event, Window]] = []
        """Being let go; kept, and with them their mappings, until they are."""

    def open(self, source: SourceFile, begin: int, end: int) -> Window:
        """Bytes `begin` up to `end` of a file.

        Raises:
            IntegrityError: the file has shrunk.
            StoreError: the file system cannot map files.
        """
        if source not in self._mappings:
            self._mappings[source] = source.mapping()
        window = Window(mapped_bytes(self._mappings[source], begin, end - begin))
        # Before it is locked: whatever happens in between, `__exit__` knows of it.
        self._open.append(window)
        window.lock(self._device)
        return window

    def close(self, window: Window) -> None:
        """Let go of a window in the background. Its upload, if any, has ended. Idempotent."""
        if window in self._open:
            self._ending.append((self._device.unregister(window.memory), window))
            self._open.remove(window)
            self._ending = [ending for ending in self._ending if not ending[0].is_done()]

    def forget(self, source: SourceFile) -> None:
        """Map the file anew when it is asked for again, or never; open windows keep their mapping."""
        self._mappings.pop(source, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # All first: on a broken device waiting for one fails.
        self._ending += [(self._device.unregister(window.memory), window) for window in self._open]
        for event, _ in self._ending:
            try:
                event.wait()
            except Exception:
                # The first error is the cause of this one.
                if error is None:
                    raise
