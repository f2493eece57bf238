"""Files that arrive while they are read: in any order, late, never, from a daemon that dies, and with bytes that are wrong."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING

import pytest

from modelp2p.loader.arriving import Arrivals, ArrivingFile
from modelp2p.loader.device import HostDevice
from modelp2p.loader.locate import Located
from modelp2p.loader.pieces import PieceTable
from modelp2p.loader.release import OpenRelease
from modelp2p.loader.shard import Way, open_shard
from modelp2p.protocol.errors import (
    DaemonError,
    FormatError,
    IntegrityError,
    InterruptedFetchError,
    ModelP2PError,
    NotFoundError,
    StoreError,
    TimedOutError,
    UnavailableError,
    UsageError,
)
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.statement import Release, verify_statement
from tests.loader.models import MIB, file_of
from tests.releases import statement_of, write_files

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

SHARD, CARD = "model.safetensors", "README.md"
FILES = {SHARD: file_of(1, a=2 * MIB, b=3 * MIB + 16), CARD: b"# card\n"}
PATIENCE_S = 20


@dataclass
class FakeFollower:
    """A fetch as a test tells it: `say` events, `end` it or `fail` it."""

    folder: Path
    wished: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    news: Queue[Map | Ranges | ModelP2PError] = field(default_factory=Queue)
    is_dead: bool = False

    def say(self, **event: object) -> None:
        self.news.put({"phase": "streaming", **event})  # type: ignore[dict-item]  # what a test says is what the codec gives

    def arrive(self, *pieces: int) -> None:
        self.say(proven=Ranges.of_ints(pieces).to_list())

    def follow(self, on_event: Callable[[Map], None]) -> Ranges:
        while True:
            match self.news.get():
                case Ranges() as proven:
                    return proven
                case ModelP2PError() as error:
                    self.is_dead = True
                    raise error
                case event:
                    on_event(event)

    def want(self, pieces: Sequence[tuple[int, int]]) -> None:
        if self.is_dead:
            raise DaemonError("gone")
        self.wished.append(tuple(pieces))

    def open_file(self, path: str) -> int:
        self.opened.append(path)
        return os.open(self.folder / path, os.O_RDONLY)

    def interrupt(self) -> None:
        """No call of a test waits for anything."""

    def close(self) -> None:
        self.news.put(DaemonError("hung up"))


@pytest.fixture(scope="module")
def release() -> Release:
    return verify_statement(statement_of(FILES))


@pytest.fixture
def follower(tmp_path: Path) -> FakeFollower:
    return FakeFollower(write_files(tmp_path / "staged", FILES))


@pytest.fixture
def arrivals(release: Release, follower: FakeFollower) -> Iterator[Arrivals]:
    opened = Arrivals(release, follower, PATIENCE_S)
    opened.start()
    yield opened
    opened.close()


@pytest.fixture
def file(arrivals: Arrivals) -> Iterator[ArrivingFile]:
    opened = ArrivingFile(arrivals, SHARD, arrivals.release.manifest.file(SHARD))
    yield opened
    opened.close()


def piece(release: Release, number: int) -> int:
    """The global number of a piece of the shard."""
    return release.pieces.first(SHARD) + number


class Reading:
    """A read in a thread of its own."""

    def __init__(self, file: ArrivingFile, begin: int, end: int) -> None:
        self.data = bytearray(end - begin)
        self.error: ModelP2PError | None = None
        self._thread = threading.Thread(target=self._read, args=(file, begin))
        self._thread.start()

    def _read(self, file: ArrivingFile, begin: int) -> None:
        try:
            file.read_into(memoryview(self.data), begin)
        except ModelP2PError as exc:
            self.error = exc

    @property
    def is_waiting(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> bytes:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return bytes(self.data)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_read_waits_for_exactly_its_pieces(release: Release, follower: FakeFollower, file: ArrivingFile) -> None:
    late = Reading(file, MIB, 3 * MIB)
    wait_until(lambda: bool(follower.wished))
    follower.arrive(piece(release, 4), piece(release, 2))
    early = Reading(file, 4 * MIB, 4 * MIB + 7)
    assert early.result() == FILES[SHARD][4 * MIB : 4 * MIB + 7]
    assert late.is_waiting
    follower.arrive(piece(release, 1))
    assert late.result() == FILES[SHARD][MIB : 3 * MIB]
    assert follower.opened == [SHARD]


def test_what_is_waited_for_goes_to_the_front_of_the_order(
    release: Release, follower: FakeFollower, arrivals: Arrivals, file: ArrivingFile
) -> None:
    first = release.pieces.first(SHARD)
    arrivals.want([(SHARD, 0, 10), (SHARD, 3 * MIB, 4 * MIB)])
    assert follower.wished == [((first, first + 1), (first + 3, first + 4))]
    declared = Reading(file, 0, 100)
    undeclared = Reading(file, 5 * MIB, 5 * MIB + 1)
    wait_until(lambda: len(follower.wished) > 1)
    assert follower.wished[1:] == [((first + 5, first + 6), (first, first + 1), (first + 3, first + 4))]
    follower.arrive(first, first + 5)
    assert declared.result() + undeclared.result() == FILES[SHARD][:100] + FILES[SHARD][5 * MIB : 5 * MIB + 1]


def test_the_header_is_read_as_soon_as_its_piece_is_there(release: Release, follower: FakeFollower, file: ArrivingFile) -> None:
    entry = release.manifest.file(SHARD)
    table = PieceTable.of(entry, release.manifest.piece_length, release.layers.of(entry))
    follower.arrive(piece(release, 0))
    shard = open_shard(file, table, lambda _: Way(False, True), 1 << 20)
    assert {info.name for info in shard.header.tensors} == {"a", "b"}


def test_a_bad_piece_is_bad_however_often_it_is_read(release: Release, follower: FakeFollower, file: ArrivingFile) -> None:
    entry = release.manifest.file(SHARD)
    table = PieceTable.of(entry, release.manifest.piece_length, release.layers.of(entry))
    damaged = bytearray(FILES[SHARD])
    damaged[MIB + 5] ^= 1
    (follower.folder / SHARD).write_bytes(damaged)
    follower.arrive(piece(release, 1))
    for _ in range(3):
        data = memoryview(bytearray(MIB))
        file.read_into(data, MIB)
        with pytest.raises(IntegrityError):
            table.check(1, data)
    # A repair replaces the inode; the daemon is asked for the new one.
    (follower.folder / SHARD).unlink()
    (follower.folder / SHARD).write_bytes(FILES[SHARD])
    file.reopen()
    file.read_into(data, MIB)
    table.check(1, data)


def test_lost_pieces_are_waited_for_again(
    release: Release, follower: FakeFollower, arrivals: Arrivals, file: ArrivingFile
) -> None:
    one = piece(release, 1)
    follower.arrive(one)
    assert Reading(file, MIB, MIB + 1).result()
    follower.say(lost=[[one, one + 1]])
    wait_until(lambda: one not in arrivals.proven)
    again = Reading(file, MIB, MIB + 1)
    assert again.is_waiting
    follower.arrive(one)
    assert again.result()


ENDS: dict[str, ModelP2PError] = {
    "the daemon dies": DaemonError("the daemon closed the connection", hint="Its log says why."),
    "the fetch fails": TimedOutError("no new proven byte for 300 s", hint="No reachable peer", proven_bytes=7),
    "the fetch is stopped": InterruptedFetchError("stopped"),
    "nobody fetches any more": UnavailableError("nobody", hint="Start a fetch"),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_reader_hears_how_the_fetch_ended(how: str, release: Release, follower: FakeFollower, file: ArrivingFile) -> None:
    follower.arrive(piece(release, 0))
    waiting = Reading(file, MIB, MIB + 1)
    expected = ENDS[how]
    follower.news.put(expected)
    with pytest.raises(type(expected)) as caught:
        waiting.result()
    assert (caught.value.message, caught.value.hint, caught.value.facts) == (expected.message, expected.hint, expected.facts)
    # What had arrived before is as good as it was.
    assert Reading(file, 0, MIB).result() == FILES[SHARD][:MIB]
    with pytest.raises(type(expected)):
        Reading(file, 2 * MIB, 3 * MIB).result()


def test_a_daemon_that_says_nonsense_is_an_error(follower: FakeFollower, file: ArrivingFile) -> None:
    follower.say(proven=[[3, 1]])
    with pytest.raises(FormatError):
        Reading(file, 0, 1).result()


def test_silence_ends_after_the_timeout_and_says_what_the_daemon_said(release: Release, follower: FakeFollower) -> None:
    arrivals = Arrivals(release, follower, 0.05)
    arrivals.start()
    follower.say(note="no space: the disk is full")
    file = ArrivingFile(arrivals, SHARD, release.manifest.file(SHARD))
    try:
        with pytest.raises(TimedOutError) as caught:
            file.read_into(memoryview(bytearray(1)), 0)
        assert "0.05 s (no space: the disk is full)" in caught.value.message
        assert "timeout=" in caught.value.hint
    finally:
        file.close()
        arrivals.close()


def test_what_is_not_fetched_is_not_waited_for(release: Release, follower: FakeFollower, arrivals: Arrivals) -> None:
    card = ArrivingFile(arrivals, CARD, release.manifest.file(CARD))
    shard = ArrivingFile(arrivals, SHARD, release.manifest.file(SHARD))
    owned = release.pieces.pieces_of(SHARD)
    waiting = Reading(card, 0, 1)
    follower.say(wanted=[[owned.start, owned.stop]])
    with pytest.raises(NotFoundError, match="not part of what is fetched"):
        waiting.result()
    assert arrivals.includes(SHARD)
    assert not arrivals.includes(CARD)
    follower.news.put(Ranges.span(owned.start, owned.stop))
    assert Reading(shard, 0, len(FILES[SHARD])).result() == FILES[SHARD]
    with pytest.raises(NotFoundError):
        Reading(card, 0, 1).result()
    shard.close()


def test_interrupting_ends_the_waits_under_way_only(
    release: Release, follower: FakeFollower, arrivals: Arrivals, file: ArrivingFile
) -> None:
    waiting = Reading(file, 0, 1)
    wait_until(lambda: bool(follower.wished))
    while waiting.is_waiting:
        arrivals.interrupt()
    with pytest.raises(InterruptedFetchError):
        waiting.result()
    follower.arrive(piece(release, 0))
    assert Reading(file, 0, 1).result() == FILES[SHARD][:1]


@pytest.mark.parametrize("timeout_s", [float("nan"), -1, float("-inf")])
def test_a_timeout_that_is_none_is_refused(release: Release, follower: FakeFollower, timeout_s: float) -> None:
    with pytest.raises(UsageError, match="timeout"):
        Arrivals(release, follower, timeout_s)


def test_an_infinite_timeout_waits_for_ever(release: Release, follower: FakeFollower) -> None:
    arrivals = Arrivals(release, follower, float("inf"))
    arrivals.start()
    file = ArrivingFile(arrivals, SHARD, release.manifest.file(SHARD))
    waiting = Reading(file, 0, 1)
    wait_until(lambda: bool(follower.wished))
    follower.arrive(piece(release, 0))
    assert waiting.result() == FILES[SHARD][:1]
    owned = release.pieces.pieces_of(SHARD)
    wanted = threading.Timer(0, follower.say, kwargs={"wanted": [[owned.start, owned.stop]]})
    wanted.start()
    assert arrivals.includes(SHARD)
    wanted.join()
    file.close()
    arrivals.close()


def test_an_interrupt_counts_for_who_is_still_asking(release: Release, tmp_path: Path) -> None:
    class Slow(FakeFollower):
        def want(self, pieces: Sequence[tuple[int, int]]) -> None:
            super().want(pieces)
            followed.interrupt()

    followed = Arrivals(release, Slow(tmp_path), PATIENCE_S)
    followed.start()
    with pytest.raises(InterruptedFetchError):
        Reading(ArrivingFile(followed, SHARD, release.manifest.file(SHARD)), 0, 1).result()
    followed.close()


def test_a_dropped_file_gives_its_descriptor_back(release: Release, follower: FakeFollower, arrivals: Arrivals) -> None:
    follower.arrive(piece(release, 0))
    file = ArrivingFile(arrivals, SHARD, release.manifest.file(SHARD))
    file.read_into(memoryview(bytearray(1)), 0)
    place = f"/proc/self/fd/{file.fileno()}"
    assert os.path.samefile(place, follower.folder / SHARD)
    del file
    assert not os.path.exists(place) or not os.path.samefile(place, follower.folder / SHARD)


def test_closing_ends_every_wait(release: Release, follower: FakeFollower) -> None:
    arrivals = Arrivals(release, follower, PATIENCE_S)
    arrivals.start()
    waiting = Reading(ArrivingFile(arrivals, SHARD, release.manifest.file(SHARD)), 0, 1)
    arrivals.close()
    arrivals.close()
    with pytest.raises(InterruptedFetchError):
        waiting.result()
    assert not [thread for thread in threading.enumerate() if thread.name == "modelp2p-arrivals"]


def test_the_daemons_finishing_touches_are_no_change_and_another_size_is(follower: FakeFollower, file: ArrivingFile) -> None:
    place = follower.folder / SHARD
    file.check_unchanged()
    assert file.stat.st_size == len(FILES[SHARD])
    place.chmod(0o444)
    os.link(place, follower.folder / "visible")
    os.utime(place)
    file.check_unchanged()
    place.chmod(0o600)
    os.truncate(place, 100)
    with pytest.raises(IntegrityError):
        file.check_unchanged()


def test_a_file_of_another_size_is_refused(release: Release, follower: FakeFollower, file: ArrivingFile) -> None:
    os.truncate(follower.folder / SHARD, 5)
    follower.arrive(piece(release, 0))
    with pytest.raises(IntegrityError, match="has 5 bytes"):
        Reading(file, 0, 1).result()


def test_it_is_never_mapped_and_never_read_past_the_wait(file: ArrivingFile) -> None:
    with pytest.raises(StoreError):
        file.mapping()
    with pytest.raises(OSError, match="still being fetched"):
        file.open_direct()


def test_a_small_file_is_waited_for_and_proven(release: Release, arrivals: Arrivals, follower: FakeFollower) -> None:
    card = release.pieces.first(CARD)
    follower.arrive(piece(release, 0))
    located = Located(release, str(follower.folder / "not yet visible"), None, True)
    with OpenRelease(located, HostDevice(), arrivals=arrivals) as opened:
        assert opened.document("no-such-file") is None
        later = threading.Thread(target=follower.arrive, args=(card,))
        later.start()
        assert opened.document(CARD) == FILES[CARD]
        later.join()
        (follower.folder / CARD).write_bytes(b"# cart\n")
        with pytest.raises(IntegrityError):
            opened.document(CARD)
