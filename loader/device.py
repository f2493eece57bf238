"""The seam to a device: memory to stage in, and work that is ordered now and done later.

`pipeline` decides what is copied, proven and placed, and when; a `Device` performs it. Its work runs on two streams: uploads, and
everything else. Work on one stream is done in order; between the two, and between a device and this process, only an `Event` is.

Memory has one owner at a time. What `host_slot` and `slot` give is staging and never leaves the loader; what `allocate` gives
is handed out. Both may hold anything until they are written to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from modelp2p.loader.cuda import CudaDevice
from modelp2p.loader.gpu import HostVerifier
from modelp2p.loader.staging import HostSlot, empty_bytes, page_aligned
from modelp2p.loader.strided import copy_strided
from modelp2p.loader.windows import WindowError
from modelp2p.protocol.errors import UsageError

if TYPE_CHECKING:
    from modelp2p.loader.gpu import Batch, Verifier
    from modelp2p.loader.plan import Move


class Event(Protocol):
    """A point in the work of a device."""

    def is_done(self) -> bool:
        """Whether all work before it has ended; never blocks."""

    def wait(self) -> None:
        """Return when all work before it has ended. Idempotent.

        Raises:
            ModelP2PError: the device failed; nothing it was to do can be relied on.
        """


class Verdict(Event, Protocol):
    """An event behind a proof, and what it found."""

    def bad(self) -> tuple[int, ...]:
        """The pieces of the batch that differ, counted from its first. Only after `wait`, or after `is_done` said so."""


class Device(Protocol):
    """One place tensors are made on. Used by one thread at a time."""

    @property
    def device(self) -> torch.device:
        """Where tensors end up."""

    @property
    def is_host(self) -> bool:
        """Whether that is this process's own memory, so that a view of a file would do as well."""

    @property
    def transfer(self) -> str:
        """The name of this way in `LoadStats.transfer`."""

    @property
    def slot_bytes(self) -> int:
        """How long a span should be at most."""

    @property
    def slots(self) -> int:
        """How many spans are under way at once."""

    def verifier(self) -> Verifier:
        """Who proves pieces in this device's memory; made at the first call, which may compile.

        Raises:
            UsageError: nobody can, with the reasons.
        """

    def host_slot(self, size_bytes: int, *, is_locked: bool = True) -> HostSlot:
        """New host memory of that size. `is_locked`: page-locked, if that makes uploads faster here."""

    def slot(self, host: torch.Tensor) -> torch.Tensor:
        """Staging on the device for what is in a host slot, of its size, 16-byte aligned; on the host that slot itself."""

    def bare_slot(self, size_bytes: int) -> torch.Tensor:
        """As `slot`, without a host slot of its own, for uploads from registered memory: (size_bytes,) uint8."""

    def register(self, memory: torch.Tensor) -> Event:
        """Begin to page-lock the pages under `memory`, which a file is mapped to, so that `upload` reads it where it lies.

        `wait` of the event raises WindowError where that is refused. However it ends, `unregister` it.
        """

    def unregister(self, memory: torch.Tensor) -> Event:
        """Begin to undo `register`, behind it in order; nothing where it was refused. Uploads from there have ended. Idempotent.

        The mapping is kept until then.
        """

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Memory that may be handed out, aligned for every dtype: (size_bytes,) uint8. Work ordered later may write to it."""

    def adopt(self) -> None:
        """Work ordered later comes after what the caller has ordered so far: before it touches tensors that are the caller's."""

    def constant(self, data: bytes) -> torch.Tensor:
        """A copy of `data` on the device that is there when this returns: (len(data),) uint8."""

    def upload(self, slot: torch.Tensor, host: torch.Tensor) -> Event:
        """Copy `host`, a host slot or registered memory, to the equally long `slot`, whose earlier uses were waited for.

        Until the event is done a host slot must not change, registered memory must stay so, and nothing may read `slot` that
        does not follow the event. Of a file that changes meanwhile any mixture may arrive.
        """

    def follow(self, event: Event) -> None:
        """Proofs, moves and casts ordered later start after this event."""

    def verify(self, verifier: Verifier, slot: torch.Tensor, batch: Batch) -> Verdict:
        """Prove what is in a slot."""

    def move(self, target: torch.Tensor, source: torch.Tensor, move: Move) -> None:
        """Copy what `move` says from `source` to `target`, both rows of uint8."""

    def cast(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy values between tensors of one shape and any dtypes, as `Tensor.copy_` converts them."""

    def mark(self) -> Event:
        """An event behind every proof, move and cast so far."""

    def drain(self) -> None:
        """Return when no work is left; then all memory may be given back.

        Raises:
            ModelP2PError: the device failed.
        """


class HostDevice:
    """This process's memory. A slot is the host slot itself, but for bare ones, and all work has ended when it was ordered."""

    device = torch.device("cpu")
    is_host = True
    transfer = "copy"
    slot_bytes = 32 << 20
    slots = 3

    def verifier(self) -> Verifier:
        return HostVerifier()

    def host_slot(self, size_bytes: int, *, is_locked: bool = True) -> HostSlot:
        return HostSlot.shared(size_bytes)

    def slot(self, host: torch.Tensor) -> torch.Tensor:
        return host

    def bare_slot(self, size_bytes: int) -> torch.Tensor:
        return page_aligned(size_bytes)

    def register(self, memory: torch.Tensor) -> Event:
        return _Refused()

    def unregister(self, memory: torch.Tensor) -> Event:
        return _Passed()

    def allocate(self, size_bytes: int) -> torch.Tensor:
        return empty_bytes(size_bytes, "cpu")

    def adopt(self) -> None:
        return

    def constant(self, data: bytes) -> torch.Tensor:
        return torch.tensor(bytearray(data), dtype=torch.uint8, device="cpu")

    def upload(self, slot: torch.Tensor, host: torch.Tensor) -> Event:
        if slot.data_ptr() != host.data_ptr():
            slot.copy_(host)
        return _Passed()

    def follow(self, event: Event) -> None:
        return

    def verify(self, verifier: Verifier, slot: torch.Tensor, batch: Batch) -> Verdict:
        bad = torch.zeros(batch.expected.numel() // 32, dtype=torch.int32, device="cpu")
        verifier.submit(slot, batch, bad)
        return _Passed(tuple(bad.nonzero().flatten().tolist()))

    def move(self, target: torch.Tensor, source: torch.Tensor, move: Move) -> None:
        copy_strided(target, source, move)

    def cast(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def mark(self) -> Event:
        return _Passed()

    def drain(self) -> None:
        return


def device_for(device: str | torch.device) -> Device:
    """The device of a name.

    Raises:
        UsageError: not a device, not one this loader serves, or not here.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as exc:
        raise UsageError(f"'{device}' is not a torch device", hint="Use cpu, cuda or cuda:N.") from exc
    if wanted.type == "cpu":
        return HostDevice()
    if wanted.type == "cuda":
        return CudaDevice(wanted)
    raise UsageError(f"device '{wanted}' is not served", hint="Load to the cpu and move the tensors with .to().")


class _Passed:
    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self._bad = bad

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def bad(self) -> tuple[int, ...]:
        return self._bad


class _Refused(_Passed):
    def wait(self) -> None:
        raise WindowError("a mapped file is not uploaded to the memory it is mapped to")
