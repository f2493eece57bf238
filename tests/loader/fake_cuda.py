"""A CUDA device without hardware, as unkind as the model allows: work is done late, and out of order between streams.

It fails the test (AssertionError) when
- two pieces of work that touch the same bytes are not ordered by a stream or an event (a race);
- a host slot changes before its upload has ended;
- something else than a host slot or registered memory is uploaded, or memory is unregistered before its upload has ended;
- `check_let_go` finds memory that nobody unregisters, or that was unmapped before;
- a verdict is read that nobody waited for;
- with `proves`, anything is moved out of a slot whose latest content was not found good by this process;
- `check_handed_out` is given a tensor that work still writes to, or that lies in staging.

Fresh memory, and a slot that is about to be written again, hold `POISON`.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from modelp2p.loader.cudart import refused
from modelp2p.loader.gpu import Batch, HostVerifier, Verifier
from modelp2p.loader.staging import HostSlot, empty_bytes, page_aligned
from modelp2p.loader.strided import copy_strided
from modelp2p.protocol.errors import ModelP2PError

if TYPE_CHECKING:
    from modelp2p.loader.device import Event
    from modelp2p.loader.plan import Move

POISON = 0xA5
Extent = tuple[int, int]
"""Addresses of bytes, half-open."""


def extent_of(tensor: torch.Tensor) -> Extent:
    storage = tensor.untyped_storage()
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def overlap(left: Sequence[Extent], right: Sequence[Extent]) -> bool:
    return any(a < d and c < b for a, b in left for c, d in right)


@dataclass
class Work:
    """Something ordered on a stream."""

    number: int
    name: str
    reads: list[Extent]
    writes: list[Extent]
    after: list[FakeEvent]
    perform: Callable[[], None]


class FakeCuda:
    """The `Device` twin. `seed` decides who is late; `fails_at` is the number of a piece of work that breaks the device.

    `codes`: what cudaHostRegister answers, call by call; afterwards 0, which is success.
    """

    is_host = False
    transfer = "ring"

    def __init__(
        self,
        seed: int = 0,
        *,
        slot_bytes: int = 2 << 20,
        slots: int = 3,
        proves: bool = False,
        fails_at: int | None = None,
        codes: Sequence[int] = (),
    ) -> None:
        self.device = torch.device("cpu")
        self.slot_bytes, self.slots = slot_bytes, slots
        self.issued = self.most_pending = self.drained = 0
        self.locked: list[torch.Tensor] = []
        self.windows = self.most_windows = 0
        self._random = random.Random(seed)
        self._queues: dict[str, deque[Work]] = {"upload": deque(), "work": deque(), "register": deque()}
        self._performed = dict.fromkeys(self._queues, 0)
        self._after: list[FakeEvent] = []
        self._proves, self._fails_at = proves, fails_at
        self._staging: list[torch.Tensor] = []
        self._good: list[Extent] = []
        self._codes = deque(codes)
        self._is_broken = False
        self._held: dict[Extent, weakref.ref[torch.Tensor]] = {}
        self._asked_back: set[Extent] = set()

    @property
    def pending(self) -> list[Work]:
        return [work for queue in self._queues.values() for work in queue]

    def verifier(self) -> Verifier:
        return HostVerifier()

    def host_slot(self, size_bytes: int, *, is_locked: bool = True) -> HostSlot:
        memory = page_aligned(size_bytes)
        self.locked += [memory] if is_locked else []
        return HostSlot(self._staged(memory))

    def slot(self, host: torch.Tensor) -> torch.Tensor:
        return self._staged(empty_bytes(host.numel(), "cpu"))

    def bare_slot(self, size_bytes: int) -> torch.Tensor:
        return self._staged(empty_bytes(size_bytes, "cpu"))

    def register(self, memory: torch.Tensor) -> FakeRegistration:
        self.windows += 1
        code = self._codes.popleft() if self._codes else 0
        where, held = extent_of(memory), weakref.ref(memory)
        self._asked_back.discard(where)

        def perform() -> None:
            if not code:
                assert not overlap([where], list(self._held)), "the same memory was registered twice"
                self._held[where] = held
                self.most_windows = max(self.most_windows, len(self._held))

        self._order("register", "register", [], [], perform)
        return FakeRegistration(self, code)

    def unregister(self, memory: torch.Tensor) -> FakeEvent:
        where = extent_of(memory)
        is_used = any(work.name == "upload" and overlap(work.reads, [where]) for work in self.pending)
        assert not is_used, "unregistered before its upload had ended"
        self._asked_back.add(where)

        def perform() -> None:
            held = self._held.pop(where, None)
            assert held is None or held() is not None, "unmapped before it was unregistered"

        self._order("register", "unregister", [], [], perform)
        return FakeEvent(self, "register")

    def check_let_go(self) -> None:
        """No memory is registered any more; on a broken device, none that nobody asked back."""
        if not self._is_broken:
            while self._queues["register"]:
                self.step()
            assert not self._held, "memory is still registered"
        assert self._held.keys() <= self._asked_back, "memory was left registered"

    def allocate(self, size_bytes: int) -> torch.Tensor:
        return empty_bytes(size_bytes, "cpu").fill_(POISON)

    def adopt(self) -> None:
        return

    def constant(self, data: bytes) -> torch.Tensor:
        return torch.tensor(bytearray(data), dtype=torch.uint8)

    def upload(self, slot: torch.Tensor, host: torch.Tensor) -> FakeEvent:
        assert slot.shape == host.shape
        is_slot = any(overlap([extent_of(host)], [extent_of(memory)]) for memory in self._staging)
        assert is_slot or extent_of(host) in self._held, "uploaded from memory that is not page-locked"
        before = host.clone() if is_slot else torch.empty(0)

        def perform() -> None:
            assert not is_slot or torch.equal(before, host), "the host slot changed before its upload had ended"
            # Of a file whatever it holds now: somebody may write to it.
            slot.copy_(host)

        self._good = [good for good in self._good if not overlap([good], [extent_of(slot)])]
        self._order("upload", "poison", [], [slot], lambda: slot.fill_(POISON))
        self._order("upload", "upload", [host], [slot], perform)
        return FakeEvent(self, "upload")

    def follow(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        self._after.append(event)

    def verify(self, verifier: Verifier, slot: torch.Tensor, batch: Batch) -> FakeVerdict:
        bad = torch.zeros(batch.expected.numel() // 32, dtype=torch.int32)
        covered = slot[: batch.size]
        self._order("work", "verify", [covered, batch.expected], [bad], lambda: verifier.submit(slot, batch, bad))
        return FakeVerdict(self, bad, extent_of(covered))

    def move(self, target: torch.Tensor, source: torch.Tensor, move: Move) -> None:
        begin = source.data_ptr() + move.source
        read = (begin, begin + (move.count - 1) * move.source_stride + move.length)
        is_staged = any(overlap([read], [extent_of(memory)]) for memory in self._staging)
        if self._proves and is_staged:
            assert any(low <= read[0] and read[1] <= high for low, high in self._good), "moved what was not proven"
        self._order("work", "move", [source], [target], lambda: copy_strided(target, source, move))

    def cast(self, target: torch.Tensor, source: torch.Tensor) -> None:
        def perform() -> None:
            target.copy_(source)

        self._order("work", "cast", [source], [target], perform)

    def mark(self) -> FakeEvent:
        return FakeEvent(self, "work")

    def drain(self) -> None:
        self.drained += 1
        while self.pending:
            self.step()

    def check_handed_out(self, tensor: torch.Tensor) -> None:
        where = [extent_of(tensor)]
        assert not any(overlap(where, work.writes) for work in self.pending), "handed out before it was made"
        assert not any(overlap(where, [extent_of(memory)]) for memory in self._staging), "handed out a part of staging"

    def step(self) -> None:
        """Perform one piece of work that may be next."""
        ready = [name for name, queue in self._queues.items() if queue and all(event.has_passed for event in queue[0].after)]
        assert ready, "work waits for events that never come"
        name = self._random.choice(ready)
        work = self._queues[name].popleft()
        for other in self.pending:
            if other.number < work.number:
                clash = overlap(work.writes, other.reads + other.writes) or overlap(work.reads, other.writes)
                assert not clash, f"a race: {work.name} {work.number} ran before {other.name} {other.number}"
        self._performed[name] += 1
        if self._fails_at is not None and work.number >= self._fails_at:
            self._is_broken = True
            self._queues = {stream: deque() for stream in self._queues}
            self._performed = dict.fromkeys(self._performed, 1 << 60)
            raise ModelP2PError("the fake device failed")
        work.perform()

    def step_some(self) -> None:
        for _ in range(self._random.choice((0, 0, 1, 2))):
            if self.pending:
                self.step()

    def has_performed(self, stream: str, count: int) -> bool:
        return self._performed[stream] >= count

    def ordered(self, stream: str) -> int:
        return self._performed[stream] + len(self._queues[stream])

    def found_good(self, where: Extent) -> None:
        self._good.append(where)

    def _order(
        self,
        stream: str,
        name: str,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        perform: Callable[[], object],
    ) -> None:
        after: list[FakeEvent] = []
        if stream == "work":
            after, self._after = self._after, []
        extents = [extent_of(tensor) for tensor in reads], [extent_of(tensor) for tensor in writes]
        self._queues[stream].append(Work(self.issued, name, *extents, after, lambda: (perform(), None)[1]))
        self.issued += 1
        self.most_pending = max(self.most_pending, len(self.pending))

    def _staged(self, memory: torch.Tensor) -> torch.Tensor:
        self._staging.append(memory.fill_(POISON))
        return memory


class FakeEvent:
    def __init__(self, owner: FakeCuda, stream: str) -> None:
        self._owner, self._stream, self._count = owner, stream, owner.ordered(stream)

    @property
    def has_passed(self) -> bool:
        return self._owner.has_performed(self._stream, self._count)

    def is_done(self) -> bool:
        self._owner.step_some()
        return self.has_passed

    def wait(self) -> None:
        while not self.has_passed:
            self._owner.step()


class FakeRegistration(FakeEvent):
    def __init__(self, owner: FakeCuda, code: int) -> None:
        super().__init__(owner, "register")
        self._code = code

    def wait(self) -> None:
        super().wait()
        if self._code:
            raise refused(self._code)


class FakeVerdict(FakeEvent):
    def __init__(self, owner: FakeCuda, bad: torch.Tensor, where: Extent) -> None:
        super().__init__(owner, "work")
        self._bad, self._where = bad, where
        self._was_seen = False

    def is_done(self) -> bool:
        self._was_seen = super().is_done() or self._was_seen
        return self._was_seen

    def wait(self) -> None:
        super().wait()
        self._was_seen = True

    def bad(self) -> tuple[int, ...]:
        assert self._was_seen, "a verdict was read that nobody waited for"
        found = tuple(self._bad.nonzero().flatten().tolist())
        if not found:
            self._owner.found_good(self._where)
        return found
