"""The fetch machine, event by event: what it does next, and when it says it will look again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from modelp2p.protocol import fetching as m
from modelp2p.protocol.errors import CorruptError, NoSpaceError, TimedOutError
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
from modelp2p.protocol.fetching import FetchMachine
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.torrent import PieceMap

MIB = 1 << 20


@dataclass(frozen=True)
class File:
    path: str
    size: int


def machine(
    files: dict[str, int],
    *,
    wanted: tuple[str, ...] | None = None,
    proven: Ranges | None = None,
    finished: tuple[str, ...] = (),
    timeout_s: float | None = None,
    piece: int = MIB,
    max_proving: int = 4,
) -> FetchMachine:
    pieces = PieceMap([File(path, size) for path, size in files.items()], piece)
    chosen = tuple(files) if wanted is None else wanted
    return FetchMachine(pieces, chosen, proven or Ranges(), set(finished), timeout_s, 0.0, max_proving)


def feed(fetch: FetchMachine, *steps: tuple[float, Event]) -> list[Effect]:
    """The effects of all steps; after each, the machine must not ask to be woken in the past."""
    effects: list[Effect] = []
    for now, event in steps:
        effects += fetch.receive(event, now)
        deadline = fetch.next_deadline()
        assert deadline is None or deadline > now
    return effects


def prove(fetch: FetchMachine, pieces: tuple[int, ...], now: float) -> list[Effect]:
    """Let these pieces be received, flushed and proven."""
    effects = feed(fetch, (now, Received(pieces)), (now + 0.2, Tick()), (now + 0.2, Flushed()))
    return effects + feed(fetch, *((now + 0.3, Proved((piece,))) for piece in pieces))


def test_one_piece_walks_the_whole_way() -> None:
    fetch = machine({"a": MIB})
    assert fetch.start(0) == []
    assert feed(fetch, (1, Received((0,)))) == [Flush()]
    assert feed(fetch, (1.1, Flushed())) == [Prove(0)]
    assert feed(fetch, (1.2, Proved((0,)))) == [Sync(Ranges.span(0, 1))]
    assert fetch.proven_bytes == 0
    assert feed(fetch, (1.3, Synced(Ranges.span(0, 1)))) == [Feed("a", 0, MIB)]
    assert fetch.proven_bytes == fetch.wanted_bytes == MIB
    assert feed(fetch, (1.4, Fed("a", MIB))) == [FinishFile("a")]
    assert feed(fetch, (1.5, FileFinished("a"))) == [Complete()]
    assert fetch.is_over
    assert fetch.next_deadline() is None


def test_nothing_is_proven_before_it_is_synced() -> None:
    fetch = machine({"a": 2 * MIB})
    effects = prove(fetch, (0, 1), 1)
    assert not fetch.proven
    assert fetch.unsynced_bytes == 2 * MIB
    assert not [effect for effect in effects if isinstance(effect, Feed)]


def test_received_is_a_hint_and_may_come_any_number_of_times() -> None:
    fetch = machine({"a": 3 * MIB}, proven=Ranges.span(0, 1))
    fetch.start(0)
    effects = feed(fetch, (1, Received((0, 1, 1))), (1, Received((1,))), (1.1, Flushed()), (1.1, Received((1, 0))))
    assert [effect for effect in effects if isinstance(effect, Prove)] == [Prove(1)]
    assert feed(fetch, (1.2, Proved((1,)))) == [Sync(Ranges.span(1, 2))]
    assert feed(fetch, (1.3, Received((1,)))) == []
    assert feed(fetch, (1.4, Synced(Ranges.span(1, 2)))) == []
    assert feed(fetch, (1.5, Received((1,)))) == []
    assert fetch.proven == Ranges.span(0, 2)


def test_pieces_finished_together_share_a_flush() -> None:
    fetch = machine({"a": 9 * MIB})
    effects = feed(
        fetch, (1, Received((0,))), (1.01, Received((1,))), (1.02, Received((2,))), (1.03, Flushed()), (1.04, Received((3,)))
    )
    assert effects.count(Flush()) == 1
    deadline = fetch.next_deadline()
    assert deadline is not None
    assert deadline <= 1 + m.FLUSH_EVERY_S
    assert Flush() in feed(fetch, (deadline, Tick()))


def test_unanswered_flush_does_not_stop_the_look() -> None:
    fetch = machine({"a": MIB})
    feed(fetch, (1, Received((0,))))
    assert fetch.next_deadline() == 1 + m.FIRST_LOOK_S
    assert feed(fetch, (1 + m.FIRST_LOOK_S, Tick())) == [Prove(0)]


def test_at_most_max_proving_looks_at_once_and_none_is_forgotten() -> None:
    fetch = machine({"a": 10 * MIB}, max_proving=3)
    effects = feed(fetch, (1, Received(tuple(range(10)))), (1.1, Flushed()))
    assert [effect for effect in effects if isinstance(effect, Prove)] == [Prove(0), Prove(1), Prove(2)]
    assert fetch.next_deadline() is None
    # Slots are filled again once half of them are free, so that a hash worker is given several pieces at once.
    assert feed(fetch, (2, Proved((0,)))) == []
    assert feed(fetch, (2, Proved((1,)))) == [Prove(3), Prove(4)]
    looked, looking = {0, 1, 2, 3, 4}, {2, 3, 4}
    while looking:
        piece = min(looking)
        looking.remove(piece)
        for effect in feed(fetch, (2, Proved((piece,)))):
            if isinstance(effect, Prove):
                looking.add(effect.piece)
                looked.add(effect.piece)
        assert len(looking) <= 3
    assert looked == set(range(10))


def test_bytes_not_there_yet_are_looked_at_again() -> None:
    fetch = machine({"a": MIB})
    feed(fetch, (1, Received((0,))), (1.1, Flushed()))
    effects = feed(fetch, (1.2, Proved((), (0,))))
    assert Readd() not in effects
    assert fetch.next_deadline() is not None
    effects = feed(fetch, (1.3, Flushed()), (1.2 + m.LOOK_AGAIN_S, Tick()))
    assert effects.count(Prove(0)) == 1


def lose(fetch: FetchMachine, pieces: tuple[int, ...], now: float) -> list[Effect]:
    """Every look at these pieces finds nothing, until the machine gives up."""
    effects = feed(fetch, (now, Received(pieces)))
    todo = list(effects)
    while Readd() not in effects:
        now += 0.05
        assert now < 60
        step: list[Effect] = []
        for effect in todo:
            if isinstance(effect, Prove):
                step += feed(fetch, (now, Proved((), (effect.piece,))))
            elif isinstance(effect, Flush):
                step += feed(fetch, (now, Flushed()))
        step += feed(fetch, (now, Tick()))
        effects += step
        todo = step
    return effects


def test_piece_that_never_reaches_the_file_is_lost_after_patience_and_a_flush() -> None:
    fetch = machine({"a": 2 * MIB})
    effects = lose(fetch, (0, 1), 1)
    assert effects.count(Readd()) == 1
    assert Flush() in effects[: effects.index(Readd())]
    assert not fetch.is_over
    # It comes again, and counts.
    assert Sync(Ranges.span(0, 2)) in prove(fetch, (0, 1), 100)


def test_lost_batch_is_one_readd_not_one_for_each_look_under_way() -> None:
    fetch = machine({"a": 8 * MIB}, max_proving=8)
    feed(fetch, (1, Received(tuple(range(8)))), (1.1, Flushed()))
    effects = feed(fetch, *((9, Proved((), (piece,))) for piece in range(8)))
    assert effects.count(Readd()) == 1
    assert fetch.unproven_bytes == 0


def test_nothing_is_lost_while_its_flush_is_not_answered() -> None:
    """A disk that takes 20 s for the engine's cache is slow, not lying."""
    fetch = machine({"a": MIB})
    feed(fetch, (1, Received((0,))), (3.5, Tick()))
    for second in range(4, 20):
        effects = feed(fetch, (second, Proved((), (0,))), (second + 0.5, Tick()))
        assert Readd() not in effects
    assert Readd() not in feed(fetch, (20, Flushed()))
    assert Readd() not in feed(fetch, (20.1, Proved((), (0,))))  # began before the flush was done
    assert Sync(Ranges.span(0, 1)) in feed(fetch, (20.2, Proved((0,))))


def test_look_that_outlives_its_engine_counts_if_good_and_is_dropped_if_bad() -> None:
    fetch = machine({"a": 3 * MIB})
    feed(fetch, (1, Received((0, 1))), (1.1, Flushed()), (1.2, EngineLost()))
    assert feed(fetch, (1.3, Proved((0,))), (1.3, Proved((), (1,)))) == [Sync(Ranges.span(0, 1))]
    assert fetch.unproven_bytes == 0
    # Nothing more is expected of piece 1: it must not be declared lost while the new engine fetches it.
    assert Readd() not in feed(fetch, (20, Tick()))
    assert feed(fetch, (30, Received((1,)))) == [Flush()]


def test_piece_that_a_new_engine_has_while_the_old_look_is_under_way_is_not_forgotten() -> None:
    fetch = machine({"a": MIB})
    feed(fetch, (1, Received((0,))), (1.1, Flushed()), (1.2, EngineLost()), (1.3, Received((0,))))
    effects = feed(fetch, (1.4, Proved((), (0,))))
    assert Readd() not in effects
    assert fetch.unproven_bytes == MIB
    assert Prove(0) in effects + feed(fetch, (1.5, Flushed()), (4, Tick()))


def test_engine_lost_forgets_what_only_the_engine_had() -> None:
    fetch = machine({"a": 3 * MIB})
    feed(fetch, (1, Received((0, 1, 2))), (1.1, EngineLost()))
    assert fetch.unproven_bytes == 0
    assert fetch.next_deadline() is None
    assert Flush() in feed(fetch, (2, Received((0,))))  # a flush that died unanswered is not waited for


PIECE = 16 * MIB


def test_transfer_is_held_at_the_high_mark_and_released_at_the_low_mark_once_each() -> None:
    count = m.HIGH_MARK_BYTES // PIECE
    fetch = machine({"a": 40 * PIECE}, piece=PIECE, max_proving=100)
    assert Hold(True) not in feed(fetch, (1, Received(tuple(range(count - 1)))))
    assert feed(fetch, (1, Received((count - 1,)))).count(Hold(True)) == 1
    assert Hold(True) not in feed(fetch, (1, Received((count, count + 1))))
    feed(fetch, (1.2, Flushed()), (1.3, Tick()), (1.4, Flushed()))
    held = count + 2
    for piece in range(count + 2):
        effects = feed(fetch, (2, Proved((piece,))))
        held -= 1
        assert (Hold(False) in effects) == (held == m.LOW_MARK_BYTES // PIECE)
    assert fetch.unproven_bytes == 0


def test_disk_that_syncs_too_slowly_holds_the_transfer_too() -> None:
    count = m.UNSYNCED_HIGH_BYTES // PIECE
    fetch = machine({"a": 2 * count * PIECE}, piece=PIECE, max_proving=100)
    holds: list[Effect] = []
    for piece in range(count):
        holds += [effect for effect in prove(fetch, (piece,), 1 + piece) if isinstance(effect, Hold)]
    assert holds == [Hold(True)]
    first, rest = Ranges.span(0, 1), Ranges.span(1, count)
    assert Sync(rest) in feed(fetch, (100, Synced(first)))
    assert Hold(False) in feed(fetch, (101, Synced(rest)))


def test_held_engine_that_dies_comes_back_free_and_is_held_again_when_needed() -> None:
    count = m.HIGH_MARK_BYTES // PIECE
    fetch = machine({"a": 40 * PIECE}, piece=PIECE)
    assert Hold(True) in feed(fetch, (1, Received(tuple(range(count)))))
    # Said again: between the restart and this event the new engine may have been told to hold.
    assert Hold(False) in feed(fetch, (2, EngineLost()))
    assert Hold(True) in feed(fetch, (3, Received(tuple(range(count)))))


def test_torrent_added_again_is_not_believed_to_be_held_still() -> None:
    count = m.HIGH_MARK_BYTES // PIECE
    fetch = machine({"a": 40 * PIECE}, piece=PIECE, max_proving=1)
    assert Hold(True) in lose(fetch, tuple(range(count)), 1)
    assert Hold(True) in feed(fetch, (50, Received(tuple(range(count)))))


def test_batch_is_synced_at_its_size_or_age_or_when_nothing_else_comes() -> None:
    fetch = machine({"a": 200 * MIB}, max_proving=100)
    feed(fetch, (1, Received(tuple(range(100)))), (1.1, Flushed()))
    assert feed(fetch, (1.2, Proved((0,)))) == []
    assert fetch.next_deadline() == 1.2 + m.SYNC_S
    assert feed(fetch, (1.2 + m.SYNC_S, Tick())) == [Sync(Ranges.span(0, 1))]
    effects = feed(fetch, (2.3, Synced(Ranges.span(0, 1))), *((2.4, Proved((piece,))) for piece in range(1, 66)))
    assert [effect for effect in effects if isinstance(effect, Sync)] == [Sync(Ranges.span(1, 1 + m.SYNC_BYTES // MIB))]
    feed(fetch, *((2.5, Proved((piece,))) for piece in range(66, 100)))
    # One sync at a time; the rest goes at once, because no more is on its way.
    assert Sync(Ranges.span(65, 100)) in feed(fetch, (2.6, Synced(Ranges.span(1, 65))))


def test_flat_hash_is_fed_in_order_whatever_order_pieces_come_in() -> None:
    fetch = machine({"a": 3 * MIB - 5})
    fetch.start(0)
    feed(fetch, (1, Received((2,))), (1.1, Flushed()), (1.2, Proved((2,))))
    assert feed(fetch, (1.3, Synced(Ranges.span(2, 3)))) == []
    feed(fetch, (2, Received((0,))), (2.1, Flushed()), (2.2, Proved((0,))))
    assert feed(fetch, (2.3, Synced(Ranges.span(0, 1)))) == [Feed("a", 0, MIB)]
    feed(fetch, (3, Received((1,))), (3.1, Flushed()), (3.2, Proved((1,))))
    assert feed(fetch, (3.3, Synced(Ranges.span(1, 2)))) == []  # one feed of a file at a time
    assert feed(fetch, (3.4, Fed("a", MIB))) == [Feed("a", MIB, 3 * MIB - 5)]


def test_lost_running_hash_is_fed_from_the_start_wherever_it_is_noticed() -> None:
    fetch = machine({"a": 2 * MIB}, proven=Ranges.span(0, 2))
    assert fetch.start(0) == [Feed("a", 0, 2 * MIB)]
    assert feed(fetch, (1, Fed("a", 0))) == [Feed("a", 0, 2 * MIB)]
    assert feed(fetch, (2, Fed("a", 2 * MIB))) == [FinishFile("a")]
    # The worker died between the last byte and the digest.
    assert feed(fetch, (3, Fed("a", 0))) == [Feed("a", 0, 2 * MIB)]
    assert feed(fetch, (4, Fed("a", 2 * MIB))) == [FinishFile("a")]
    assert feed(fetch, (5, FileFinished("a"))) == [Complete()]


def test_empty_and_finished_files() -> None:
    fetch = machine({"a": MIB, "empty": 0, "z": MIB}, proven=Ranges.span(0, 1), finished=("a",))
    assert fetch.start(0) == [FinishFile("empty")]
    assert machine({"a": MIB}, proven=Ranges.span(0, 1), finished=("a",)).start(0) == [Complete()]


def test_only_wanted_files_are_fed_and_counted() -> None:
    fetch = machine({"a": MIB, "b": MIB}, wanted=("b",), proven=Ranges.span(0, 1))
    assert fetch.start(0) == []
    assert (fetch.proven_bytes, fetch.wanted_bytes) == (0, MIB)
    prove(fetch, (1,), 1)
    assert feed(fetch, (2, Synced(Ranges.span(1, 2))), (3, Fed("b", MIB)), (4, FileFinished("b"))) == [
        Feed("b", 0, MIB),
        FinishFile("b"),
        Complete(),
    ]


def test_restart_from_the_journal_proves_nothing_twice() -> None:
    fetch = machine({"a": 4 * MIB, "b": MIB}, proven=Ranges.of_ints([0, 1, 3]), finished=())
    assert fetch.start(0) == [Feed("a", 0, 2 * MIB)]
    effects = feed(fetch, (1, Received((0, 1, 2, 3))), (1.1, Flushed()))
    assert [effect for effect in effects if isinstance(effect, Prove)] == [Prove(2)]


ERRORS: dict[str, FileFinished | DiskFailed] = {
    "file that contradicts its flat hash": FileFinished("a", CorruptError("no")),
    "full disk": DiskFailed(NoSpaceError("full")),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_ends_the_fetch_at_once_and_for_good(name: str) -> None:
    event = ERRORS[name]
    fetch = machine({"a": 2 * MIB}, proven=Ranges.span(0, 1))
    fetch.start(0)
    assert event.error is not None
    assert feed(fetch, (1, event)) == [Fail(event.error)]
    assert fetch.is_over
    assert feed(fetch, (2, Received((1,))), (2, event), (9, Tick()), (9, Synced(Ranges.span(1, 2)))) == []


def test_timeout_counts_from_the_last_proven_byte() -> None:
    fetch = machine({"a": 2 * MIB}, timeout_s=10)
    assert fetch.start(0) == []
    assert fetch.next_deadline() == 10
    prove(fetch, (0,), 5)
    feed(fetch, (6, Synced(Ranges.span(0, 1))), (6.1, Fed("a", MIB)))
    assert fetch.next_deadline() == 16
    assert feed(fetch, (15.9, Tick())) == []
    (failure,) = feed(fetch, (16, Tick()))
    assert isinstance(failure, Fail)
    assert isinstance(failure.error, TimedOutError)
    assert failure.error.kind.exit_code == 5
    assert failure.error.facts == {"proven_bytes": MIB, "size_bytes": 2 * MIB}


BUSY: dict[str, tuple[tuple[float, Event], ...]] = {
    "a look": ((1, Received((0,))), (1.1, Flushed())),
    "a sync": ((1, Received((0,))), (1.1, Flushed()), (1.2, Proved((0,)))),
    "a feed": ((1, Received((0,))), (1.1, Flushed()), (1.2, Proved((0,))), (1.3, Synced(Ranges.span(0, 1)))),
}


@pytest.mark.parametrize("name", BUSY)
def test_no_timeout_while_this_machine_itself_is_at_work(name: str) -> None:
    fetch = machine({"a": 2 * MIB}, timeout_s=10)
    fetch.start(0)
    feed(fetch, *BUSY[name])
    assert feed(fetch, (1000, Tick())) == []
    assert not fetch.is_over


def test_no_timeout_while_a_file_is_being_finished() -> None:
    fetch = machine({"a": MIB}, proven=Ranges.span(0, 1), timeout_s=10)
    fetch.start(0)
    assert feed(fetch, (1, Fed("a", MIB)), (1000, Tick())) == [FinishFile("a")]


def test_without_timeout_an_idle_machine_sleeps() -> None:
    fetch = machine({"a": MIB})
    fetch.start(0)
    assert fetch.next_deadline() is None
    assert feed(fetch, (1e9, Tick())) == []


def test_repr_tells_where_it_stands() -> None:
    fetch = machine({"a": 2 * MIB}, proven=Ranges.span(0, 1))
    assert f"{MIB}/{2 * MIB} bytes proven" in repr(fetch)
    assert "0/1 files" in repr(fetch)


def test_short_last_piece_is_counted_at_its_length() -> None:
    fetch = machine({"a": MIB + 5, "b": 7}, proven=Ranges.span(1, 3))
    assert fetch.proven_bytes == 5 + 7
