"""A CUDA device: two streams of its own, page-locked host slots, memory for tensors from the caller's stream.

Who may touch what, and when:
- tensors are allocated on the caller's current stream, so torch's allocator reuses their memory in the order of that stream
  once the caller drops them; our work waits for that stream before it writes to them (`allocate`, `adopt`);
- they are handed out after this process saw the end of the work on them, so any stream may use them at once;
- page-locked slots come from torch's caching allocator: they are locked once a process, not once a load. Windows of mapped files
  are locked one by one, in a thread of their own (`cudart`).

Both streams have the lowest priority (torch: 0): on a GPU that serves, loading takes what serving leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from modelp2p.loader.cudart import HostRegistrar, Runtime
from modelp2p.loader.staging import HostSlot, empty_bytes, page_aligned
from modelp2p.loader.strided import copy_strided
from modelp2p.protocol.errors import ModelP2PError, UsageError
from modelp2p.protocol.merkle import HASH_BYTES

if TYPE_CHECKING:
    from modelp2p.loader.device import Event, Verdict
    from modelp2p.loader.gpu import Batch, Verifier
    from modelp2p.loader.plan import Move

LOWEST_PRIORITY = 0


class CudaDevice:
    """Device number N of this process.

    Raises:
        UsageError: it is not here.
    """

    is_host = False
    transfer = "ring"
    # 64 MiB take 1.2 ms over PCIe 5, three times the proof's shortest time, so proofs hide behind uploads (research/loader.md 2).
    slot_bytes = 64 << 20
    # One filled, one uploaded, one proven, one in hand: 256 MiB.
    slots = 4

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            hint = "Use device='cpu', or install a torch with CUDA and check the driver with nvidia-smi."
            raise UsageError("this torch finds no CUDA device", hint=hint)
        index = torch.cuda.current_device() if str(device) == "cuda" else device.index
        if index >= torch.cuda.device_count():
            raise UsageError(f"there is no CUDA device {index}; this process sees {torch.cuda.device_count()}")
        self.device = torch.device("cuda", index)
        self._uploads, self._work = _stream(self.device), _stream(self.device)
        self._verifier: Verifier | None = None
        self._registrar: HostRegistrar | None = None

    def verifier(self) -> Verifier:
        if self._verifier is None:
            from modelp2p.loader.gpu import verifier_for

            self._verifier = verifier_for(self.device)
        return self._verifier

    def host_slot(self, size_bytes: int, *, is_locked: bool = True) -> HostSlot:
        # Both begin at a page: cudaHostAlloc gives whole pages, and so does mmap.
        if is_locked:
            return HostSlot(empty_bytes(size_bytes, "cpu", pin_memory=True))
        return HostSlot(page_aligned(size_bytes))

    def slot(self, host: torch.Tensor) -> torch.Tensor:
        return self.bare_slot(host.numel())

    def bare_slot(self, size_bytes: int) -> torch.Tensor:
        memory = empty_bytes(size_bytes, self.device)
        # The allocator may give memory that work of the caller's stream still reads.
        self._uploads.wait_stream(torch.cuda.current_stream(self.device))
        return memory

    def register(self, memory: torch.Tensor) -> Event:
        return self._by_registrar().register(memory)

    def unregister(self, memory: torch.Tensor) -> Event:
        return self._by_registrar().unregister(memory)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        memory = empty_bytes(size_bytes, self.device)
        self.adopt()
        return memory

    def adopt(self) -> None:
        self._work.wait_stream(torch.cuda.current_stream(self.device))

    def constant(self, data: bytes) -> torch.Tensor:
        # A blocking copy: it has ended before anything of ours can be ordered.
        return torch.tensor(bytearray(data), dtype=torch.uint8, device="cpu").to(self.device)

    def upload(self, slot: torch.Tensor, host: torch.Tensor) -> Event:
        with torch.cuda.stream(self._uploads):
            slot.copy_(host, non_blocking=True)
        return self._event(self._uploads)

    def follow(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        self._work.wait_event(event.event)

    def verify(self, verifier: Verifier, slot: torch.Tensor, batch: Batch) -> Verdict:
        pieces = batch.expected.numel() // HASH_BYTES
        answer = torch.empty(pieces, dtype=torch.int32, device="cpu", pin_memory=True)
        with torch.cuda.stream(self._work):
            bad = torch.zeros(pieces, dtype=torch.int32, device=self.device)
            verifier.submit(slot, batch, bad)
            answer.copy_(bad, non_blocking=True)
        return _CudaVerdict(self._event(self._work), answer, batch)

    def move(self, target: torch.Tensor, source: torch.Tensor, move: Move) -> None:
        with torch.cuda.stream(self._work):
            copy_strided(target, source, move)

    def cast(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._work):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Event:
        return self._event(self._work)

    def drain(self) -> None:
        with _translated():
            self._uploads.synchronize()
            self._work.synchronize()

    def _by_registrar(self) -> HostRegistrar:
        if self._registrar is None:
            self._registrar = HostRegistrar(_runtime(), lambda: torch.cuda.device(self.device))
        return self._registrar

    def _event(self, stream: torch.cuda.Stream) -> _CudaEvent:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives its class no types
        event.record(stream)
        return _CudaEvent(event)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=LOWEST_PRIORITY)  # type: ignore[no-untyped-call]  # as its events


def _runtime() -> Runtime:
    runtime: Runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # as its events
    return runtime


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def is_done(self) -> bool:
        with _translated():
            return bool(self.event.query())  # type: ignore[no-untyped-call]  # as above

    def wait(self) -> None:
        with _translated():
            self.event.synchronize()


class _CudaVerdict:
    def __init__(self, event: _CudaEvent, answer: torch.Tensor, batch: Batch) -> None:
        self._event = event
        self._answer = answer
        # Kept until the device is through with what it expects.
        self._batch = batch

    def is_done(self) -> bool:
        return self._event.is_done()

    def wait(self) -> None:
        self._event.wait()

    def bad(self) -> tuple[int, ...]:
        self._event.wait()
        return tuple(self._answer.nonzero().flatten().tolist())


@contextmanager
def _translated() -> Iterator[None]:
    """A failure of the device shows where it is waited for, whatever caused it."""
    try:
        yield
    except RuntimeError as exc:
        reason = str(exc).partition("\n")[0][:300]
        hint = "Later use of this device in this process will fail as well; see dmesg for Xid errors."
        raise ModelP2PError(f"the CUDA device failed while tensors were loaded: {reason}", hint=hint) from exc
