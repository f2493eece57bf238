"""A release that is still being fetched, as the loader reads it: files whose bytes are there once the daemon has proven them.

Invariants:
- nothing is read before the daemon said that its pieces are proven; it is hashed here all the same, and always copied;
- a reader that waits ends: with the bytes, with the error of the fetch or of the daemon, after a time without progress, or by
  `interrupt` and `close`;
- what is waited for is asked for: a piece that no declared order holds goes to its front.

What a daemon says is a hint about when to read, never about what was read. How it is asked is `following`'s.
"""

from __future__ import annotations

import copy
import errno
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from modelp2p.loader.source import SourceFile
from modelp2p.protocol.errors import (
    DaemonError,
    IntegrityError,
    InterruptedFetchError,
    ModelP2PError,
    NotFoundError,
    StoreError,
    TimedOutError,
    UsageError,
)
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.streaming import joined

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map
    from modelp2p.protocol.manifest import FileEntry
    from modelp2p.protocol.statement import Release
    from modelp2p.protocol.streaming import Span

DEFAULT_TIMEOUT_S = 300.0
"""How long a reader waits without one newly proven piece; what a fetch itself waits."""


def check_timeout(timeout_s: float) -> float:
    """The same seconds, which may be infinite: for ever.

    Raises:
        UsageError: they are negative, or no number.
    """
    if math.isnan(timeout_s) or timeout_s < 0:
        raise UsageError(f"timeout must be 0 or more seconds, not {timeout_s:g}", hint="float('inf') waits for ever.")
    return timeout_s


class Follower(Protocol):
    """A fetch under way as somebody tells it. Pieces have their global numbers."""

    def follow(self, on_event: Callable[[Map], None]) -> Ranges:
        """Hand on events (`proven`, `lost`, `wanted`, `note`) until the fetch has ended well; returns all that is proven.

        Raises:
            ModelP2PError: how it ended otherwise, `close` included.
        """

    def want(self, pieces: Sequence[Span]) -> None:
        """The order of reading from now on. Thread-safe."""

    def open_file(self, path: str) -> int:
        """A read-only descriptor of a file of the release; the caller closes it. Thread-safe.

        Raises:
            ModelP2PError: there is none, or nobody to ask.
        """

    def interrupt(self) -> None:
        """End `want` and `open_file` where they are under way and stuck; those that will soon end are let be. Thread-safe."""

    def close(self) -> None:
        """End `follow`, from any thread. Idempotent."""


class Arrivals:
    """What of one release has arrived. Thread-safe; `start` it, and close it.

    Args:
        release: the verified statement.
        follower: who tells.
        timeout_s: how long a reader waits without progress; infinite: for ever.

    Raises:
        UsageError: `timeout_s` is negative, or no number.
    """

    def __init__(self, release: Release, follower: Follower, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.release = release
        self._follower = follower
        self._timeout_s = check_timeout(timeout_s)
        self._changed = threading.Condition()
        self._proven = Ranges()
        self._wanted: Ranges | None = None
        self._error: ModelP2PError | None = None
        self._is_over = False
        self._progress_at = time.monotonic()
        self._note = ""
        self._interrupts = 0
        self._order: tuple[Span, ...] = ()
        self._asked = Ranges()
        self._ordering = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="modelp2p-arrivals", daemon=True)

    def __repr__(self) -> str:
        return f"<Arrivals {self.release.ref}: {self._proven.total}/{self.release.pieces.total} pieces proven>"

    @property
    def proven(self) -> Ranges:
        """The pieces the daemon has called proven so far."""
        return self._proven

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def want(self, stretches: Iterable[tuple[str, int, int]]) -> None:
        """Declare the order of reading: path, begin and end in bytes of its file. Takes the place of the order before."""
        self._ask(joined(self._pieces(path, begin, end) for path, begin, end in stretches))

    def wait_for(self, path: str, begin: int, end: int) -> None:
        """Return when bytes `begin` up to `end` of a file may be read.

        Raises:
            TimedOutError: nothing new was proven for `timeout_s`.
            NotFoundError: they are not part of what is fetched.
            ModelP2PError: how the fetch, or the daemon, ended before that.
        """
        first, last = self._pieces(path, begin, end)
        if first >= last or self._proven.covers(first, last):
            return
        # Asking is waiting too.
        started, interrupts = time.monotonic(), self._interrupts
        if not self._asked.covers(first, last):
            self._ask(joined([(first, last), *self._order]))
        with self._changed:
            while not self._proven.covers(first, last):
                self._check(path, first, last)
                self._wait(path, started, interrupts)

    def includes(self, path: str) -> bool:
        """Whether a file is part of what is fetched, or is here; waits until the daemon has said what is."""
        first, last = self._pieces(path, 0, self.release.pieces.size(path))
        started, interrupts = time.monotonic(), self._interrupts
        with self._changed:
            while self._wanted is None and not self._is_over and not self._proven.covers(first, last):
                if self._error is not None:
                    raise copy.copy(self._error) from self._error
                self._wait(path, started, interrupts)
            return self._proven.covers(first, last) or (self._wanted is not None and self._wanted.covers(first, last))

    def open_file(self, path: str) -> int:
        """A read-only descriptor of a file; the caller closes it."""
        return self._follower.open_file(path)

    def interrupt(self) -> None:
        """End every wait that is under way; later ones wait as before."""
        with self._changed:
            self._interrupts += 1
            self._changed.notify_all()
        # Whoever is still asking does not wait yet.
        self._follower.interrupt()

    def close(self) -> None:
        """Stop listening; readers that wait are refused. Idempotent."""
        with self._changed:
            self._error = self._error or InterruptedFetchError("the release was closed while it was loaded")
            self._changed.notify_all()
        self._follower.close()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        error: ModelP2PError = DaemonError("the fetch cannot be followed any more: this is a bug of modelp2p")
        try:
            proven = self._follower.follow(self._hear)
        except ModelP2PError as exc:
            error = exc
        else:
            with self._changed:
                self._proven = self._proven.union(proven)
                self._is_over = True
                self._changed.notify_all()
            return
        finally:
            with self._changed:
                if not self._is_over:
                    self._error = self._error or error
                self._changed.notify_all()

    def _hear(self, event: Map) -> None:
        proven, lost = (Ranges.from_list(event.get(key, [])) for key in ("proven", "lost"))
        wanted = Ranges.from_list(event["wanted"]) if "wanted" in event else None
        note = event.get("note", "")
        with self._changed:
            now = self._proven.union(proven).minus(lost)
            if now != self._proven:
                self._progress_at = time.monotonic()
            self._proven = now
            self._wanted = self._wanted if wanted is None else wanted
            self._note = note if isinstance(note, str) else ""
            self._changed.notify_all()

    def _wait(self, path: str, started: float, interrupts: int) -> None:
        """Return when something has changed; raise where `started` was too long ago, or an interrupt came since."""
        if interrupts != self._interrupts:
            raise InterruptedFetchError("the load was stopped while it waited for the fetch")
        left = max(started, self._progress_at) + self._timeout_s - time.monotonic()
        if left <= 0:
            raise self._timed_out(path)
        self._changed.wait(min(left, threading.TIMEOUT_MAX))

    def _check(self, path: str, first: int, last: int) -> None:
        """Raise where these pieces will not come."""
        if self._error is not None:
            raise copy.copy(self._error) from self._error
        missing = Ranges.span(first, last).minus(self._proven)
        if self._is_over or (self._wanted is not None and missing.minus(self._wanted)):
            raise NotFoundError(
                f"'{path}' is not part of what is fetched of {self.release.ref}",
                hint=f"Fetch the rest: modelp2p fetch {self.release.ref}",
                path=path,
            )

    def _ask(self, order: tuple[Span, ...]) -> None:
        with self._ordering:
            self._order, self._asked = order, Ranges.of(order)
            with self._changed:
                if self._is_over or self._error is not None:
                    return
            try:
                self._follower.want(order)
            except DaemonError:
                # The thread that listens meets the same end, and tells the readers who need it.
                return

    def _pieces(self, path: str, begin: int, end: int) -> Span:
        pieces = self.release.pieces
        first, length = pieces.first(path), pieces.piece_length
        return (first + begin // length, first + -(-end // length)) if begin < end else (first, first)

    def _timed_out(self, path: str) -> TimedOutError:
        why = f" ({self._note})" if self._note else ""
        return TimedOutError(
            f"'{path}' has not arrived, and nothing new was proven for {self._timeout_s:g} s{why}",
            hint="'modelp2p status' shows whether the fetch has peers. A longer timeout= waits longer.",
            path=path,
        )


class ArrivingFile(SourceFile):
    """A file of a release under way: what `SourceFile` is, but opened when the first bytes are there, and never mapped.

    Its descriptor comes from the daemon; `path` is where the file will be visible, and is not opened. `stat` is there after
    the first read.
    """

    def __init__(self, arrivals: Arrivals, path: str, entry: FileEntry, hint: str = "") -> None:
        # Not what SourceFile does, which opens `path`.
        self.path = path
        self.entry = entry
        self._arrivals = arrivals
        self._hint = hint
        self._fd = -1
        self._opening = threading.Lock()
        self._is_closed = False

    def read_into(self, target: memoryview, offset: int) -> None:
        """As `SourceFile`, when the bytes are proven.

        Raises:
            IntegrityError: the file ends before that.
            StoreError: the disk refused.
            ModelP2PError: they do not come (see `Arrivals.wait_for`).
        """
        self._arrivals.wait_for(self.entry.path, offset, offset + len(target))
        self._open()
        super().read_into(target, offset)

    def mapping(self) -> memoryview:
        """Never: who reads a mapping does not wait for the bytes.

        Raises:
            StoreError: always.
        """
        raise StoreError(f"'{self.entry.path}' is still being fetched and cannot be mapped", path=self.entry.path)

    def open_direct(self) -> int:
        """Never, for the same reason.

        Raises:
            OSError: always.
        """
        raise OSError(errno.EOPNOTSUPP, "it is still being fetched")

    def check_size(self) -> None:
        self._open()
        super().check_size()

    def check_unchanged(self) -> None:
        """Return if it is as large as it was. Its times move while it is fetched, mode and links when it is done."""
        self.check_size()

    def reopen(self) -> None:
        """Ask for the file anew, as after a repair, which replaces the inode. Nobody may be reading."""
        with self._opening:
            super().close()
        self._open()

    def close(self) -> None:
        with self._opening:
            self._is_closed = True
            super().close()

    def _open(self) -> None:
        with self._opening:
            if self._is_closed:
                raise StoreError(f"'{self.entry.path}' was closed", path=self.entry.path)
            if self._fd >= 0:
                return
            fd = self._arrivals.open_file(self.entry.path)
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise IntegrityError(f"'{self.entry.path}' is not a regular file", hint=self._hint, path=self.entry.path)
                if found.st_size != self.entry.size:
                    raise self._wrong_size(found.st_size)
            except BaseException:
                os.close(fd)
                raise
            self._own(fd)
            self.stat = found
