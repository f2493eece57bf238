"""The fetch machine against a world that misbehaves: random delays, lost pieces, dying engines, dying daemons.

Hypothesis chooses which faults the world has and its seed; the world below is then one deterministic run on a clock of its own.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, assert_never

from hypothesis import given, settings
from hypothesis import strategies as st

from modelp2p.protocol import fetch_steps as step
from modelp2p.protocol import fetching as m
from modelp2p.protocol.fetching import FetchMachine
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.torrent import PieceMap

if TYPE_CHECKING:
    from modelp2p.protocol.fetch_steps import Event

MIB = 1 << 20
MAX_STEPS = 20_000
PIECE = 16 * MIB
MAX_DEATHS = 12
"""Of engines, and of daemons: in a world where each dies before its first flush, nobody could finish."""


@dataclass(frozen=True)
class File:
    path: str
    size: int


@dataclass(frozen=True)
class Faults:
    """What goes wrong in one world; probabilities are per occasion."""

    lost: float = 0.0
    """A piece the engine calls finished is nowhere."""
    engine_dies: float = 0.0
    daemon_dies: float = 0.0
    hash_dies: float = 0.0
    """A running flat hash is lost."""
    repeats: float = 0.0
    """The engine says again what it said before."""
    slow_s: float = 0.01
    """Longest time one effect takes."""
    flush_s: float = 0.05


@dataclass
class World:
    """An engine, a disk and a journal around one machine."""

    pieces: PieceMap
    wanted: tuple[str, ...]
    faults: Faults
    dice: random.Random
    max_proving: int
    now: float = 0.0
    # What outlives the daemon.
    journal: set[int] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    in_file: set[int] = field(default_factory=set)
    # What does not.
    life: int = 0
    engine: int = 0
    dead: set[int] = field(default_factory=set)
    is_engine_up: bool = False
    is_held: bool = False
    received: set[int] = field(default_factory=set)
    cached: set[int] = field(default_factory=set)
    good: set[int] = field(default_factory=set)
    looking: set[int] = field(default_factory=set)
    fed: dict[str, int] = field(default_factory=dict)
    is_syncing: bool = False
    completions: int = 0
    proofs: int = 0
    queue: list[tuple[float, int, int, object]] = field(default_factory=list)
    counter: int = 0
    machine: FetchMachine = field(init=False)

    def run(self) -> None:
        self.boot()
        for _ in range(MAX_STEPS):
            if self.machine.is_over:
                break
            deadline = self.machine.next_deadline()
            if self.queue and (deadline is None or self.queue[0][0] <= deadline):
                self.now, _, life, happening = heapq.heappop(self.queue)
                if life == self.life:
                    self.happen(happening)
            else:
                assert deadline is not None, f"nothing will ever happen again: {self.machine}"
                assert deadline > self.now, f"busy loop: {self.machine}"
                self.now = deadline
                self.tell(step.Tick())
            if self.life < MAX_DEATHS and self.dice.random() < self.faults.daemon_dies:
                self.boot()
        assert self.machine.is_over, f"no end: {self.machine}"
        assert self.completions == 1
        assert self.finished == set(self.wanted)
        assert {piece for path in self.wanted for piece in self.pieces.pieces_of(path)} <= self.journal
        assert self.machine.receive(step.Received((0,)), self.now) == []
        assert self.machine.receive(step.Tick(), self.now + 1e6) == []

    def boot(self) -> None:
        """Start the daemon, for the first time or after kill -9: only the disk is remembered."""
        self.life += 1
        self.completions = 0
        self.received, self.cached, self.good, self.looking = set(), set(), set(), set()
        self.fed, self.is_syncing = {}, False
        self.machine = FetchMachine(
            self.pieces, self.wanted, Ranges.of_ints(self.journal), set(self.finished), None, self.now, self.max_proving
        )
        self.start_engine()
        self.perform(self.machine.start(self.now))

    def start_engine(self) -> None:
        """A fresh torrent: it has what is proven, and whatever it had besides is gone."""
        self.engine += 1
        self.is_engine_up = True
        self.is_held = False
        self.received = {piece for piece in range(self.pieces.total) if piece in self.machine.proven}
        self.cached = set()
        self.soon(("deliver", self.engine))

    def soon(self, happening: object, longest: float | None = None) -> None:
        self.counter += 1
        delay = self.dice.uniform(0.001, self.faults.slow_s if longest is None else longest)
        heapq.heappush(self.queue, (self.now + delay, self.counter, self.life, happening))

    def tell(self, event: Event) -> None:
        before = self.machine.proven
        effects = self.machine.receive(event, self.now)
        grown = self.machine.proven.minus(before)
        assert not grown or (isinstance(event, step.Synced) and grown == event.pieces.minus(before))
        self.perform(effects)

    def happen(self, happening: object) -> None:
        match happening:
            case ("deliver", engine):
                if engine == self.engine and self.is_engine_up:
                    self.deliver()
            case ("engine back", engine):
                if engine == self.engine:
                    self.start_engine()
                    # Said again once the torrent is back: whatever was told to the dead engine was told to nobody.
                    self.tell(step.EngineLost())
            case ("written", engine, piece):
                if engine == self.engine and piece in self.cached:
                    self.in_file.add(piece)
            case ("flushed", engine):
                if engine == self.engine and self.is_engine_up:
                    self.in_file |= self.cached
                    self.tell(step.Flushed())
            case ("look", piece):
                # The file is read at some moment of the look, not at its end.
                self.soon(("looked", piece, piece in self.in_file))
            case ("looked", int(piece), bool(ok)):
                self.looking.discard(piece)
                if ok:
                    self.good.add(piece)
                self.tell(step.Proved((piece,)) if ok else step.Proved((), (piece,)))
            case ("synced", Ranges() as pieces):
                self.is_syncing = False
                self.journal |= set(pieces.ints())
                self.tell(step.Synced(pieces))
            case ("fed", str(path), int(end)):
                self.fed[path] = end
                self.tell(step.Fed(path, end))
            case ("file", str(path)):
                self.finished.add(path)
                self.tell(step.FileFinished(path))
            case ("received", int(engine), step.Received() as event):
                # What an engine said before it died is heard before its death.
                if engine not in self.dead:
                    self.tell(event)
            case _:
                raise AssertionError(happening)

    def deliver(self) -> None:
        wanted = {piece for path in self.wanted for piece in self.pieces.pieces_of(path)}
        missing = sorted(wanted - self.received)
        if missing and not self.is_held:
            batch = tuple(self.dice.sample(missing, min(len(missing), self.dice.randint(1, 3))))
            self.received |= set(batch)
            for piece in batch:
                if self.dice.random() >= self.faults.lost:
                    self.cached.add(piece)
                    self.soon(("written", self.engine, piece), 0.5)
            self.soon(("received", self.engine, step.Received(batch)))
        if self.received and self.dice.random() < self.faults.repeats:
            self.soon(("received", self.engine, step.Received(tuple(self.received))))
        if len(self.dead) < MAX_DEATHS and self.dice.random() < self.faults.engine_dies:
            self.is_engine_up = False
            self.dead.add(self.engine)
            self.tell(step.EngineLost())
            self.soon(("engine back", self.engine), 2.0)
        elif missing or self.faults.lost:
            self.soon(("deliver", self.engine), 0.1)

    def perform(self, effects: list[step.Effect]) -> None:
        for effect in effects:
            match effect:
                case step.Prove(piece):
                    assert piece not in self.machine.proven, "a proven piece is proven again"
                    assert piece not in self.journal
                    assert piece not in self.looking, "one piece is looked at twice at once"
                    self.looking.add(piece)
                    self.proofs += 1
                    assert len(self.looking) <= self.max_proving
                    self.soon(("look", piece))
                case step.Sync(pieces):
                    assert not self.is_syncing, "two syncs at once"
                    assert set(pieces.ints()) <= self.good, "a piece is journaled without a good look"
                    assert not set(pieces.ints()) & self.journal
                    self.is_syncing = True
                    self.soon(("synced", pieces))
                case step.Feed(path, begin, end):
                    assert begin == self.fed.get(path, 0) < end
                    self.check_proven(path, end)
                    self.soon(("fed", path, 0 if self.dice.random() < self.faults.hash_dies else end))
                case step.FinishFile(path):
                    assert path not in self.finished, "a file is finished twice"
                    assert self.fed.get(path, 0) == self.pieces.size(path)
                    self.check_proven(path, self.pieces.size(path))
                    if self.pieces.size(path) and self.dice.random() < self.faults.hash_dies:
                        self.soon(("fed", path, 0))
                    else:
                        self.soon(("file", path))
                case step.Hold(on):
                    assert not self.is_engine_up or on != self.is_held, "the transfer is held twice, or released while it runs"
                    self.is_held = on and self.is_engine_up
                case step.Flush():
                    self.soon(("flushed", self.engine), self.faults.flush_s)
                case step.Readd():
                    assert self.faults.lost, "nothing was lost"
                    self.start_engine()
                case step.Complete():
                    self.completions += 1
                    assert effect == effects[-1]
                    assert self.finished == set(self.wanted)
                case step.Fail(error):
                    raise AssertionError(error)
                case _:
                    assert_never(effect)
        self.check_hold()

    def check_hold(self) -> None:
        """Held above a high mark, free below both low marks; between them it stays as it was."""
        if not self.is_engine_up or self.machine.is_over:
            return
        unproven, unsynced = self.machine.unproven_bytes, self.machine.unsynced_bytes
        if unproven >= m.HIGH_MARK_BYTES or unsynced >= m.UNSYNCED_HIGH_BYTES:
            assert self.is_held
        elif unproven <= m.LOW_MARK_BYTES and unsynced <= m.UNSYNCED_LOW_BYTES:
            assert not self.is_held

    def check_proven(self, path: str, end: int) -> None:
        first = self.pieces.first(path)
        last = first + -(-end // self.pieces.piece_length)
        assert self.machine.proven.covers(first, last)
        assert set(range(first, last)) <= self.journal


FAULTS = st.builds(
    Faults,
    lost=st.sampled_from([0.0, 0.0, 0.1, 0.4]),
    engine_dies=st.sampled_from([0.0, 0.0, 0.05, 0.15]),
    daemon_dies=st.sampled_from([0.0, 0.0, 0.01]),
    hash_dies=st.sampled_from([0.0, 0.3]),
    repeats=st.sampled_from([0.0, 0.5]),
    slow_s=st.sampled_from([0.01, 0.3, 3.0]),
    flush_s=st.sampled_from([0.05, 1.0, 12.0]),
)


@given(
    FAULTS,
    st.integers(0, 2**16),
    st.integers(1, 40),
    st.lists(st.integers(0, 6 * PIECE) | st.integers(0, 60 * PIECE), min_size=1, max_size=6),
    st.data(),
)
@settings(max_examples=250)
def test_every_fetch_ends_with_everything_proven_once(
    faults: Faults, seed: int, max_proving: int, sizes: list[int], data: st.DataObject
) -> None:
    files = [File(f"f{number}", size) for number, size in enumerate(sizes)]
    wanted = tuple(file.path for file in files if data.draw(st.booleans()) or file is files[0])
    World(PieceMap(files, PIECE), wanted, faults, random.Random(seed), max_proving).run()


def test_honest_world_looks_at_each_piece_once() -> None:
    """With flushes that say the truth no look is in vain."""
    files = [File("a", 40 * PIECE), File("b", 3), File("c", 0)]
    world = World(PieceMap(files, PIECE), ("a", "b", "c"), Faults(flush_s=0.05), random.Random(7), 4)
    world.run()
    assert world.proofs == 41
