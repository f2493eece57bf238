"""The fetch machine: what to do next for one release, decided from events and time alone.

    engine says "piece finished"  ->  Flush  ->  Prove: read back and hash  ->  Sync: fdatasync, journal  ->  proven
                                     (batched)      ^    | not in the file       (batched)                     |
                                                    +----+                                                     v
                                              after 5 s: Readd as missing                    Feed the flat hash, FinishFile

The engine keeps finished pieces in a write-back cache for as long as nothing presses, so a batch is flushed before it is looked
at: without that, half of all proofs would hash bytes that are not there yet (docs/BENCHMARKS.md).

Invariants:
- a piece is proven only after `Synced` named it: read back from the file, equal to the signed layer, data on the disk, journaled;
- `Received` is a hint: it starts a proof and counts for nothing else (libtorrent says "finished" on a full disk);
- at most `WINDOW_BYTES` are received but unproven: above the high mark the transfer is held, below the low mark released;
- a file is finished once, after all its pieces are proven and its flat hash was fed in order;
- `Complete` is emitted once, when every wanted file is finished.

Pure and synchronous: `receive(event, now)` returns effects; `next_deadline()` says when to send `Tick`. Times are seconds of any
monotonic clock. Who performs the effects, and how, is the daemon's business.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, assert_never

from modelp2p.protocol.errors import ModelP2PError, TimedOutError
from modelp2p.protocol.fetch_steps import (
    Complete,
    DiskFailed,
    Effect,
    EngineLost,
    Event,
    Fail,
    Fed,
    Feed,
    FileFinished,
    FinishFile,
    Flush,
    Flushed,
    Hold,
    Prove,
    Proved,
    Readd,
    Received,
    Sync,
    Synced,
    Tick,
)
from modelp2p.protocol.ranges import Ranges

if TYPE_CHECKING:
    from modelp2p.protocol.torrent import PieceMap

WINDOW_BYTES = 128 << 20
"""Most bytes received whose hash is not checked yet (docs/DESIGN.md)."""
HIGH_MARK_BYTES = 96 << 20
LOW_MARK_BYTES = 48 << 20
"""The gap below the window is what requests under way may still bring after the transfer is held."""
FLUSH_EVERY_S = 0.05
"""Pieces finished within this time share one flush."""
FIRST_LOOK_S = 2.0
"""A piece is looked at this long after "finished" even if no flush was answered."""
LOOK_AGAIN_S = 0.5
GIVE_UP_S = 5.0
"""A piece whose bytes are still not in the file this long after "finished", and after a flush, is lost."""
UNSYNCED_HIGH_BYTES = 384 << 20
UNSYNCED_LOW_BYTES = 128 << 20
"""A disk slower than the network holds the transfer too; what waits here is checked, but a power cut would lose it."""
SYNC_BYTES = 64 << 20
SYNC_S = 1.0
"""A batch is synced and journaled at this size or age."""


@dataclass(slots=True)
class _Candidate:
    """A piece on its way from "finished" to proven."""

    received: float
    look_at: float
    is_looking: bool = False
    is_flushing: bool = False
    """Its bytes are part of the flush under way."""
    is_orphan: bool = False
    """The engine that had it is gone: the look under way decides."""


@dataclass(slots=True)
class FetchMachine:
    """One release being fetched.

    Args:
        pieces: the release's piece map.
        wanted: the paths to finish.
        proven: pieces the journal already holds.
        finished: wanted paths already finished.
        timeout_s: give up after this long without a newly proven byte; None never.
        now: current time.
    """

    pieces: PieceMap
    wanted: tuple[str, ...]
    proven: Ranges
    finished: set[str]
    timeout_s: float | None
    now: float
    max_proving: int = 4
    """Proofs under way at once; more would only queue at the hash workers."""
    _candidates: dict[int, _Candidate] = field(default_factory=dict)
    _unsynced: set[int] = field(default_factory=set)
    _unsynced_size: int = 0
    """Its exact size in bytes; asked at every event, so it is kept."""
    _syncing: Ranges = field(default_factory=Ranges)
    _oldest_unsynced: float = 0.0
    _fed: dict[str, int] = field(default_factory=dict)
    _feeding: set[str] = field(default_factory=set)
    _finishing: set[str] = field(default_factory=set)
    _unfinished: set[str] = field(init=False)
    _due: dict[str, None] = field(init=False)
    """Files whose next step may have become possible: asking all of 10,000 at every event would cost 20 ms."""
    _is_held: bool = False
    _is_flushing: bool = False
    _is_flush_due: bool = False
    _flush_at: float = 0.0
    _is_over: bool = False
    _last_progress: float = field(init=False)
    _wanted_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self._last_progress = self.now
        self._wanted_bytes = sum(self.pieces.size(path) for path in self.wanted)
        self._unfinished = set(self.wanted) - self.finished
        self._due = dict.fromkeys(self.wanted)

    def __repr__(self) -> str:
        return (
            f"<FetchMachine {self.proven_bytes}/{self._wanted_bytes} bytes proven, {len(self._candidates)} unproven, "
            f"{len(self._unsynced)} unsynced, {len(self.finished)}/{len(self.wanted)} files{', held' if self._is_held else ''}>"
        )

    @property
    def wanted_bytes(self) -> int:
        """Size of everything wanted."""
        return self._wanted_bytes

    @property
    def proven_bytes(self) -> int:
        """Bytes of wanted files that are proven."""
        return sum(self._proven_bytes_of(path) for path in self.wanted)

    @property
    def unproven_bytes(self) -> int:
        """Bytes received whose hash is not checked yet."""
        return len(self._candidates) * self.pieces.piece_length

    @property
    def unsynced_bytes(self) -> int:
        """Bytes whose hash is checked and whose journal record is still to come."""
        return (len(self._unsynced) + self._syncing.total) * self.pieces.piece_length

    @property
    def is_over(self) -> bool:
        """Whether `Complete` or `Fail` was emitted."""
        return self._is_over

    def next_deadline(self) -> float | None:
        """When to send `Tick` if nothing else happens."""
        # With the proof slots taken only `Proved` can free them; a deadline in the past would spin.
        times = [c.look_at for c in self._candidates.values() if not c.is_looking] if self._free_slots() else []
        if self._is_flush_due:
            times.append(self._flush_at)
        if self._unsynced and not self._syncing:
            times.append(self._oldest_unsynced + SYNC_S)
        if self.timeout_s is not None and not self._is_busy():
            times.append(self._last_progress + self.timeout_s)
        return min(times, default=None) if not self._is_over else None

    def start(self, now: float) -> list[Effect]:
        """The first effects: files whose pieces are all here may only need finishing."""
        return self._advance(now)

    def receive(self, event: Event, now: float) -> list[Effect]:
        """What to do about `event`."""
        if self._is_over:
            return []
        effects: list[Effect] = []
        match event:
            case Received(pieces):
                for piece in pieces:
                    self._received(piece, now)
            case Proved(good, bad):
                for piece in good:
                    self._found(piece, now)
                for piece in bad:
                    effects += self._missed(piece, now)
            case Synced(pieces):
                self.proven = self.proven.union(pieces)
                self._due |= {self.pieces.locate(piece).path: None for piece in pieces.ints()}
                self._syncing = Ranges()
                self._oldest_unsynced = now
                self._last_progress = now
            case Fed(path, end):
                self._feeding.discard(path)
                self._finishing.discard(path)  # an answer to `FinishFile` too: the running hash was lost, feed it again
                self._fed[path] = end
                self._due[path] = None
            case FileFinished(path, error):
                self._finishing.discard(path)
                if error is not None:
                    return self._fail(error)
                self.finished.add(path)
                self._unfinished.discard(path)
                self._last_progress = now
            case Flushed():
                self._is_flushing = False
                for candidate in self._candidates.values():
                    if candidate.is_flushing and not candidate.is_looking:
                        candidate.is_flushing = False
                        candidate.look_at = now
            case EngineLost():
                if self._is_held:
                    # It may have been told to the new one already; what comes twice does no harm.
                    effects.append(Hold(False))
                self._forget_engine()
            case DiskFailed(error):
                return self._fail(error)
            case Tick():
                pass
            case _:
                assert_never(event)
        return effects + self._advance(now)

    def _received(self, piece: int, now: float) -> None:
        if piece in self.proven or piece in self._unsynced or piece in self._syncing:
            return
        candidate = self._candidates.setdefault(piece, _Candidate(now, now + FIRST_LOOK_S))
        if candidate.is_orphan:
            # A new engine has it again before the old look came back: a bad answer is "not yet" once more.
            self._candidates[piece] = _Candidate(now, now + FIRST_LOOK_S, is_looking=True)

    def _forget_engine(self) -> None:
        # Proofs under way read the file, not the engine: their answers still count if they are good.
        self._candidates = {piece: candidate for piece, candidate in self._candidates.items() if candidate.is_looking}
        for candidate in self._candidates.values():
            candidate.is_orphan = True
        self._is_flushing = False
        self._is_held = False  # a torrent that is added anew runs free

    def _found(self, piece: int, now: float) -> None:
        self._candidates.pop(piece, None)
        if piece in self._unsynced or piece in self._syncing or piece in self.proven:
            return
        if not self._unsynced:
            self._oldest_unsynced = now
        self._unsynced.add(piece)
        self._unsynced_size += self.pieces.locate(piece).length

    def _missed(self, piece: int, now: float) -> list[Effect]:
        candidate = self._candidates.get(piece)
        if candidate is None:
            return []
        candidate.is_looking = False
        if candidate.is_orphan:
            del self._candidates[piece]
            return []
        candidate.look_at = now + LOOK_AGAIN_S
        if candidate.is_flushing:
            # A slow disk may take longer than any patience: nothing is lost before a flush of it is answered. One answered
            # during this look came too late for it.
            if not self._is_flushing:
                candidate.is_flushing = False
                candidate.look_at = now
            return []
        if now - candidate.received < GIVE_UP_S:
            return []
        # The engine has it nowhere. Everything else it holds unproven goes the same way.
        self._forget_engine()
        return [Readd()]

    def _advance(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        effects += self._start_flush(now)
        effects += self._start_proofs(now)
        effects += self._start_sync(now)
        effects += self._start_files()
        if not self._is_held and (self.unproven_bytes >= HIGH_MARK_BYTES or self.unsynced_bytes >= UNSYNCED_HIGH_BYTES):
            self._is_held = True
            effects.append(Hold(True))
        elif self._is_held and self.unproven_bytes <= LOW_MARK_BYTES and self.unsynced_bytes <= UNSYNCED_LOW_BYTES:
            self._is_held = False
            effects.append(Hold(False))
        if not self._unfinished:
            self._is_over = True
            effects.append(Complete())
        elif self.timeout_s is not None and now >= self._last_progress + self.timeout_s and not self._is_busy():
            effects += self._fail(
                TimedOutError(
                    f"no new proven byte for {self.timeout_s:g} s",
                    hint="No reachable peer has the missing pieces. Check --peer and the network, then run it again.",
                    proven_bytes=self.proven_bytes,
                    size_bytes=self._wanted_bytes,
                )
            )
        return effects

    def _is_busy(self) -> bool:
        """Whether work on this machine, not the network, is what is being waited for."""
        return bool(
            self._syncing
            or self._unsynced
            or self._feeding
            or self._finishing
            or any(candidate.is_looking for candidate in self._candidates.values())
        )

    def _start_flush(self, now: float) -> list[Effect]:
        fresh = [c for c in self._candidates.values() if not c.is_flushing and not c.is_looking and c.look_at > now]
        self._is_flush_due = bool(fresh) and not self._is_flushing and now < self._flush_at
        if self._is_flushing or not fresh or self._is_flush_due:
            return []
        self._is_flushing = True
        self._flush_at = now + FLUSH_EVERY_S
        for candidate in fresh:
            candidate.is_flushing = True
        return [Flush()]

    def _start_proofs(self, now: float) -> list[Effect]:
        free = self._free_slots()
        due = [piece for piece, c in self._candidates.items() if not c.is_looking and c.look_at <= now][:free] if free else []
        for piece in due:
            self._candidates[piece].is_looking = True
        return [Prove(piece) for piece in due]

    def _free_slots(self) -> int:
        """How many proofs may start; none before half of the slots are free, so that they start in batches."""
        free = self.max_proving - sum(candidate.is_looking for candidate in self._candidates.values())
        return free if 2 * free >= self.max_proving else 0

    def _start_sync(self, now: float) -> list[Effect]:
        if not self._unsynced or self._syncing:
            return []
        if self._unsynced_size < SYNC_BYTES and now < self._oldest_unsynced + SYNC_S and self._candidates:
            return []
        self._syncing = Ranges.of_ints(self._unsynced)
        self._unsynced, self._unsynced_size = set(), 0
        return [Sync(self._syncing)]

    def _start_files(self) -> list[Effect]:
        effects: list[Effect] = []
        due, self._due = self._due, {}
        for path in due:
            if path not in self._unfinished or path in self._feeding or path in self._finishing:
                continue
            fed, ready = self._fed.get(path, 0), self._proven_prefix(path)
            if fed == self.pieces.size(path):
                self._finishing.add(path)
                effects.append(FinishFile(path))
            elif ready > fed:
                self._feeding.add(path)
                effects.append(Feed(path, fed, ready))
        return effects

    def _proven_prefix(self, path: str) -> int:
        """How many leading bytes of a file are proven."""
        owned = self.pieces.pieces_of(path)
        # Rarest-first leaves thousands of runs: bisected, not walked.
        at = bisect_right(self.proven.spans, owned.start, key=_begin_of) - 1
        if at < 0:
            return 0
        covered = min(self.proven.spans[at][1], owned.stop) - owned.start
        return min(max(covered, 0) * self.pieces.piece_length, self.pieces.size(path))

    def _proven_bytes_of(self, path: str) -> int:
        owned = self.pieces.pieces_of(path)
        held = self.proven.intersect(Ranges.span(owned.start, owned.stop)) if owned else Ranges()
        size = held.total * self.pieces.piece_length
        # Only a file's last piece may be short.
        if owned and owned.stop - 1 in held:
            size -= self.pieces.piece_length - self.pieces.locate(owned.stop - 1).length
        return size

    def _fail(self, error: ModelP2PError) -> list[Effect]:
        self._is_over = True
        return [Fail(error)]


def _begin_of(span: tuple[int, int]) -> int:
    return span[0]
