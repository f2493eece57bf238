"""Page-locking of memory that a file is mapped to: `cudaHostRegister` by torch's binding of the CUDA runtime.

Invariants:
- one thread of its own makes all calls, in order. They block, and one that fails leaves its error in the thread that made it,
  where torch would take it for that of the next kernel it starts;
- memory is held from the call on, and with it its mapping, until it is not page-locked any more. Unmapped before that, its
  addresses could be mapped to something else, and uploads from there would still read the old pages;
- read-only: the kernel refuses long-lived writable pins of files on most file systems (EFAULT), and of memory that is mapped
  read-only.

Spec: https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__MEMORY.html
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, SupportsInt

from modelp2p.loader.windows import WindowError
from modelp2p.protocol.errors import ModelP2PError

if TYPE_CHECKING:
    import torch

READ_ONLY = 8
"""cudaHostRegisterReadOnly."""

REASONS = {
    1: "the driver cannot page-lock pages of this file system (invalid value)",
    2: "there is no memory for it",
    304: "the kernel refused to page-lock it",
    712: "it is page-locked already",
    801: "this machine cannot page-lock memory that is mapped read-only",
}
"""What those codes of cudaError_t that are seen in the wild mean here; any other is given as its number."""

_NEVER_UNMAPPED: list[torch.Tensor] = []
"""Memory that could not be unlocked: kept as long as the process, for the reason above. Only a broken device adds to it."""


class Runtime(Protocol):
    """What is used of `torch.cuda.cudart()`; both return a cudaError_t."""

    def cudaHostRegister(self, ptr: int, size: int, flags: int, /) -> SupportsInt:
        """Page-lock `size` bytes."""

    def cudaHostUnregister(self, ptr: int, /) -> SupportsInt:
        """Undo it."""


class HostRegistrar:
    """Page-locks and unlocks memory in the background, one call after another.

    Args:
        runtime: who does it.
        enter: makes the right device the current one of a thread.
        flags: of cudaHostRegister.
    """

    def __init__(
        self, runtime: Runtime, enter: Callable[[], AbstractContextManager[object]] = nullcontext, flags: int = READ_ONLY
    ) -> None:
        self._runtime = runtime
        self._enter = enter
        self._flags = flags
        # Ends with this object; nobody has to close it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="modelp2p-register")
        self._held: dict[int, torch.Tensor] = {}

    @property
    def held_bytes(self) -> int:
        """How much is page-locked now; exact when nothing is under way."""
        return sum(_pages(memory)[1] for memory in self._held.values())

    def register(self, memory: torch.Tensor) -> Ended:
        """As `Device.register`."""
        return Ended(self._thread.submit(self._register, memory))

    def unregister(self, memory: torch.Tensor) -> Ended:
        """As `Device.unregister`."""
        return Ended(self._thread.submit(self._unregister, memory))

    def _register(self, memory: torch.Tensor) -> None:
        begin, size = _pages(memory)
        with self._enter():
            code = int(self._runtime.cudaHostRegister(begin, size, self._flags))
        if code:
            raise refused(code)
        self._held[begin] = memory

    def _unregister(self, memory: torch.Tensor) -> None:
        begin, _ = _pages(memory)
        if self._held.get(begin) is not memory:
            return
        with self._enter():
            code = int(self._runtime.cudaHostUnregister(begin))
        del self._held[begin]
        if code:
            _NEVER_UNMAPPED.append(memory)
            raise ModelP2PError(f"the CUDA device does not let go of memory it uploaded from (error {code})", code=code)


class Ended:
    """The event behind one call."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def is_done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        self._future.result()


def refused(code: int) -> WindowError:
    """The error for what cudaHostRegister answered."""
    return WindowError(f"a mapped file cannot be uploaded in place: {REASONS.get(code, f'CUDA error {code}')}", code=code)


def _pages(memory: torch.Tensor) -> tuple[int, int]:
    """Begin and length of the pages under it: the last page of a file is mapped whole."""
    begin = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    return begin, -(-(memory.data_ptr() + memory.nbytes - begin) // mmap.PAGESIZE) * mmap.PAGESIZE
