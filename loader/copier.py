"""The seam to a device: who allocates final tensors and fills them from verified bytes.

`copying` reads a stretch of a file into staging memory, verifies it there, and hands slices of it to a `Copier`. What reaches
the device is therefore the very copy that was hashed. A faster way to the device replaces a `Copier` and nothing else.
"""

from __future__ import annotations

from typing import Protocol

import torch

from modelp2p.protocol.errors import UsageError


class Fence(Protocol):
    """A point in a copier's work."""

    def wait(self) -> None:
        """Return when all writes issued before this fence have ended. Idempotent."""


class Copier(Protocol):
    """Places bytes on one device. Used by one thread at a time."""

    @property
    def device(self) -> torch.device:
        """Where tensors end up."""

    @property
    def is_host(self) -> bool:
        """Whether that is this process's own memory, so that a view of a file would do as well."""

    @property
    def transfer(self) -> str:
        """The name of this way in `LoadStats.transfer`."""

    def staging(self, size_bytes: int) -> torch.Tensor:
        """Host memory the device reads well: (size_bytes,) uint8, contiguous, contents undefined. The caller owns it."""

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Memory on the device, aligned for every dtype: (size_bytes,) uint8, contents undefined. The caller owns it."""

    def write(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy `source` (a slice of staging) to `target` (an equally long slice of what `allocate` gave).

        May return early: until a later fence was waited for, `source` must not change and `target` must not be read.
        """

    def fence(self) -> Fence:
        """A fence behind every write so far."""


class CpuCopier:
    """Copies within the host; every write has ended when it returns."""

    device = torch.device("cpu")
    is_host = True
    transfer = "copy"

    def staging(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def write(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def fence(self) -> Fence:
        return _Passed()


class CudaCopier:
    """Page-locked staging and the device's current stream: allocation, copy and later use are in one order by construction."""

    is_host = False
    transfer = "cuda"

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            hint = "Use device='cpu', or install a torch with CUDA and check the driver with nvidia-smi."
            raise UsageError("this torch finds no CUDA device", hint=hint)
        index = torch.cuda.current_device() if str(device) == "cuda" else device.index
        if index >= torch.cuda.device_count():
            raise UsageError(f"there is no CUDA device {index}; this process sees {torch.cuda.device_count()}")
        self.device = torch.device("cuda", index)

    def staging(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def write(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def fence(self) -> Fence:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives its class no types
        event.record(torch.cuda.current_stream(self.device))
        return _CudaFence(event)


def copier_for(device: str | torch.device) -> Copier:
    """The copier of a device.

    Raises:
        UsageError: not a device, not one this loader serves, or not here.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as exc:
        raise UsageError(f"'{device}' is not a torch device", hint="Use cpu, cuda or cuda:N.") from exc
    if wanted.type == "cpu":
        return CpuCopier()
    if wanted.type == "cuda":
        return CudaCopier(wanted)
    raise UsageError(f"device '{wanted}' is not served", hint="Load to the cpu and move the tensors with .to().")


class _Passed:
    def wait(self) -> None:
        return


class _CudaFence:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()
