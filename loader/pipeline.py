"""Tensors that are copies: spans of files through host slots onto a device, proven there, placed into what is handed out.

    read into a host slot ─► upload into a device slot ─► prove there ─► move into tensors ─► hand out

Several spans are under way at once, each in a lane of its own, each in its own one of these stages. Where this process's CPUs
prove, they do it in the host slot right after reading; the rest is the same. A file that goes by windows is not read at all: its
stretch of the mapping is page-locked and uploaded (`windows`).

Invariants:
- bytes that were not found good never leave their slot, so a tensor, new or already the caller's, holds proven bytes only;
- a tensor is handed out after all its spans were proven and its last move has ended; it shares no memory with any slot;
- where the way of a file says not hashed, none of its tensors is handed out before all of it was read and found unchanged;
- whatever ends the flow (an error, Ctrl-C, a caller who stops asking) waits for readers and device before memory is given back;
- spans are taken in the order of the plan, which may go from file to file, and what one completes is never handed out before it
  is waited for.

Who waits for what: an upload that can start is started; then what the device has done is used; then the device is waited for,
whose work takes milliseconds; and only then a reader, who may have to wait for a network. So nothing proven waits for bytes that
have not arrived. Price: with a single worker, which reads in this thread, reading and device take turns.

A bad span is read again, since a page cache or a copy may have failed; then `on_bad` may repair the file; then it is an error.

Memory beside the tensors: the lanes (`ring`), and a tensor as stored while it is cast.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelp2p.loader.gpu import Batch
from modelp2p.loader.reading import Readings
from modelp2p.loader.targets import Target, new_target
from modelp2p.loader.windows import Window, WindowError, Windows
from modelp2p.protocol.errors import IntegrityError
from modelp2p.protocol.merkle import HASH_BYTES

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.device import Device, Event, Verdict
    from modelp2p.loader.plan import Plan, Span, Want
    from modelp2p.loader.reading import Reading
    from modelp2p.loader.ring import Lane
    from modelp2p.loader.shard import Shard
    from modelp2p.loader.tools import Tools

REREADS = 2
"""How often a bad span is read again before anybody is asked; each costs one span."""
REPAIRS = 3
"""How often one span is repaired: an answer of "try again" must not be able to go on for ever."""


@dataclass(slots=True)
class _Flight:
    """A span on its way."""

    number: int
    """Its place in the plan."""
    span: Span
    lane: Lane
    reading: Reading
    window: Window | None = None
    """Where it is uploaded from; None: the lane's host slot."""
    uploaded: Event | None = None
    verdict: Verdict | None = None
    moved: Event | None = None
    made: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    kept: list[Target] = field(default_factory=list)
    """What the device still casts from."""


def flow(
    shards: Sequence[Shard],
    made: Plan,
    tools: Tools,
    on_span: Callable[[int, int], None],
    target_of: Callable[[Device, Want, int], Target] | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each want of a plan, by number, and its tensor, as soon as all of it is proven and placed.

    Args:
        shards: the files of the plan.
        made: the plan.
        tools: device, staging and helpers.
        on_span: told file number and bytes after each span.
        target_of: where the want of that number is to be made; new memory by default.

    Raises:
        IntegrityError: a piece is bad and stays so, or a file changed; no tensor over it is handed out.
    """
    target_of = target_of or _new
    for number in made.empty:
        yield number, target_of(tools.device, made.wants[number], number).result
    if not made.spans:
        return
    is_bare = all(tools.transfers.is_by_window(shards[file]) for file in {span.file for span in made.spans})
    # Windows last: they may go when the device has been drained.
    with Windows(tools.device) as windows, tools.ring.lanes(made.largest, is_bare=is_bare) as lanes:
        under_way = _Flow(shards, made, tools, on_span, target_of, lanes, windows)
        try:
            yield from under_way.run()
        finally:
            # Before the lanes go back: readers write into host slots.
            under_way.stop()


class _Flow:
    def __init__(
        self,
        shards: Sequence[Shard],
        made: Plan,
        tools: Tools,
        on_span: Callable[[int, int], None],
        target_of: Callable[[Device, Want, int], Target],
        lanes: Sequence[Lane],
        windows: Windows,
    ) -> None:
        self._shards, self._plan, self._tools = shards, made, tools
        self._on_span, self._target_of = on_span, target_of
        self._windows = windows
        self._readings = Readings(shards, tools, windows)
        self._todo = deque(enumerate(made.spans))
        self._free = list(lanes)
        self._reading: deque[_Flight] = deque()
        self._proving: deque[_Flight] = deque()
        self._moving: deque[_Flight] = deque()
        self._targets: dict[int, Target] = {}
        self._layers: dict[int, torch.Tensor] = {}
        self._left = {span.file: 0 for span in made.spans}
        for span in made.spans:
            self._left[span.file] += 1
        self._held: dict[int, list[tuple[int, torch.Tensor]]] = {file: [] for file in self._left}
        """Made, and waiting until all of their file, which nobody hashes, was found unchanged."""
        self._at: _Flight | None = None
        """What is being launched or judged, and is to blame if that fails."""

    def run(self) -> Iterator[tuple[int, torch.Tensor]]:
        try:
            yield from self._run()
        except IntegrityError:
            if self._at is not None:
                yield from self._before(self._at)
            raise

    def _run(self) -> Iterator[tuple[int, torch.Tensor]]:
        while True:
            self._at = None
            while self._todo and self._free:
                self._read(self._free.pop())
            if self._reading and self._reading[0].reading.is_done():
                # First: the next upload is worth more than an early hand-out.
                self._at = self._reading.popleft()
                self._launch(self._at)
            elif self._proving and _event_of(self._proving[0].verdict).is_done():
                self._at = self._proving.popleft()
                self._judge(self._at)
            elif self._moving and _event_of(self._moving[0].moved).is_done():
                yield from self._finished(self._moving.popleft())
            elif self._proving:
                self._at = self._proving.popleft()
                self._judge(self._at)
            elif self._moving:
                yield from self._finished(self._moving.popleft())
            elif self._reading:
                self._at = self._reading.popleft()
                self._launch(self._at)
            else:
                return

    def _before(self, bad: _Flight) -> Iterator[tuple[int, torch.Tensor]]:
        """Hand out what the spans before a bad one completed, so that how far a caller gets is no matter of timing."""
        self._todo.clear()
        # Never a later one: it may complete a tensor over the bad span.
        self._proving = deque(flight for flight in self._proving if flight.number < bad.number)
        while self._proving:
            self._judge(self._proving.popleft())
        while self._moving:
            yield from self._finished(self._moving.popleft())

    def stop(self) -> None:
        """Return when nobody reads into a host slot any more. Idempotent."""
        for flight in self._reading:
            flight.reading.abandon()

    def _read(self, lane: Lane) -> None:
        """Get the next span ready to be uploaded, in this lane."""
        number, span = self._todo.popleft()
        reading, window = self._readings.first(lane, span)
        self._reading.append(_Flight(number, span, lane, reading, window))

    def _launch(self, flight: _Flight) -> None:
        """What was read goes to the device, to be proven there or, proven already, to be placed."""
        bad = self._ended(flight)
        if not bad:
            self._upload(flight)
        else:
            self._recover(flight, bad)
        if flight.verdict is not None:
            self._proving.append(flight)
        else:
            self._place(flight)

    def _judge(self, flight: _Flight) -> None:
        bad = self._judged(flight)
        self._let_go(flight)
        if bad:
            self._recover(flight, bad)
        self._place(flight)

    def _ended(self, flight: _Flight) -> tuple[int, ...]:
        """Wait for the readers; the piece they found bad, if any."""
        try:
            flight.reading.wait()
        except WindowError as exc:
            self._tools.transfers.refuse(self._shards[flight.span.file], exc.message)
            self._let_go(flight)
            flight.reading = self._readings.again(flight.lane, flight.span)
            return self._ended(flight)
        except IntegrityError as exc:
            piece = exc.facts.get("piece")
            if not isinstance(piece, int):
                raise
            return (piece,)
        return ()

    def _upload(self, flight: _Flight) -> None:
        device, span, lane = self._tools.device, flight.span, flight.lane
        shard = self._shards[span.file]
        source = lane.host[: span.size] if flight.window is None else flight.window.memory
        flight.uploaded = device.upload(lane.slot[: span.size], source)
        self._tools.transfers.count(device.transfer if flight.window is None else "register")
        if shard.way.is_hashed and self._tools.verifier is not None:
            table = shard.table
            layer = self._layer(span.file)[span.pieces.start * HASH_BYTES : span.pieces.stop * HASH_BYTES]
            device.follow(flight.uploaded)
            batch = Batch(span.size, table.piece_length, table.count == 1, layer)
            flight.verdict = device.verify(self._tools.verifier, lane.slot, batch)

    def _judged(self, flight: _Flight) -> tuple[int, ...]:
        """Wait for the device's verdict; the pieces it found bad."""
        if flight.verdict is None:
            return ()
        flight.verdict.wait()
        return tuple(flight.span.pieces[number] for number in flight.verdict.bad())

    def _recover(self, flight: _Flight, bad: tuple[int, ...]) -> None:
        """Read a span again until it is good, with help in between; into a host slot, also where it came by a window.

        Raises:
            IntegrityError: it stays bad.
        """
        rereads = repairs = 0
        while bad:
            if rereads < REREADS:
                rereads += 1
                self._tools.on_reread()
            elif repairs < REPAIRS and self._is_repaired(flight, bad):
                repairs, rereads = repairs + 1, 0
                self._tools.on_repair(len(bad))
            else:
                self._refuse(flight, bad[0])
            flight.reading = self._readings.again(flight.lane, flight.span)
            bad = self._ended(flight)
            if not bad:
                self._upload(flight)
                bad = self._judged(flight)

    def _is_repaired(self, flight: _Flight, bad: tuple[int, ...]) -> bool:
        shard = self._shards[flight.span.file]
        if self._tools.on_bad is None or not all([self._tools.on_bad(shard.table.path, piece) for piece in bad]):
            return False
        for other in self._reading:
            other.reading.finish()
        self._windows.forget(shard.source)
        shard.reopen()
        return True

    def _refuse(self, flight: _Flight, piece: int) -> None:
        table, span = self._shards[flight.span.file].table, flight.span
        begin, end = table.span(range(piece, piece + 1))
        table.check(piece, flight.lane.view[begin - span.begin : end - span.begin])
        # What was read is right, and its copy on the device was not, each time.
        raise IntegrityError(
            f"'{table.path}': piece {piece} is good in this machine's memory and differs on {self._tools.device.device}",
            hint="The device or the way to it is broken, or another process writes to its memory: see dmesg and nvidia-smi.",
            path=table.path,
            piece=piece,
            begin=begin,
            end=end,
        )

    def _place(self, flight: _Flight) -> None:
        """Order the moves of a span that is good."""
        device, span = self._tools.device, flight.span
        device.follow(_event_of(flight.uploaded))
        for move in span.moves:
            target = self._targets.get(move.want)
            if target is None:
                target = self._targets[move.want] = self._target_of(device, self._plan.wants[move.want], move.want)
            device.move(target.memory, flight.lane.slot, move)
        for want in span.completes:
            target = self._targets.pop(want)
            if target.stored is not None:
                device.cast(target.result, target.stored)
            flight.made.append((want, target.result))
            flight.kept.append(target)
        flight.moved = device.mark()
        self._moving.append(flight)

    def _finished(self, flight: _Flight) -> Iterator[tuple[int, torch.Tensor]]:
        """Wait for the moves of a span, give its lane on, and hand out what it completed."""
        _event_of(flight.moved).wait()
        self._let_go(flight)
        span = flight.span
        self._free.append(flight.lane)
        if self._todo:
            # Before the caller gets the tensors and takes its time with them.
            self._read(self._free.pop())
        self._left[span.file] -= 1
        shard = self._shards[span.file]
        self._on_span(span.file, span.size)
        if not self._left[span.file]:
            self._layers.pop(span.file, None)
            self._windows.forget(shard.source)
        if shard.way.is_hashed:
            yield from flight.made
            return
        self._held[span.file] += flight.made
        if not self._left[span.file]:
            shard.source.check_unchanged()
            yield from self._held.pop(span.file)

    def _let_go(self, flight: _Flight) -> None:
        """Close the window of a span whose upload has ended, or never began."""
        window, flight.window = flight.window, None
        if window is not None:
            self._windows.close(window)

    def _layer(self, file: int) -> torch.Tensor:
        """The expected piece hashes of a file, on the device while spans of it are left."""
        if file not in self._layers:
            self._layers[file] = self._tools.device.constant(self._shards[file].table.layer)
        return self._layers[file]


def _event_of(event: Event | None) -> Event:
    assert event is not None, "a flight is only where the stage before put it"
    return event


def _new(device: Device, want: Want, number: int) -> Target:
    return new_target(device, want)
