"""Host memory that files are read into.

XX: asking for 2 MiB pages under new tensors made copies four times faster in memory that was used before, and twice slower where
a virtual machine touches its memory for the first time; a machine of metal settles it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import torch


class HostSlot:
    """Host memory at a page boundary, as the device, as readers and as other processes take it.

    Args:
        memory: (size_bytes,) uint8.
        fd: a descriptor of the same memory, which the slot takes over; -1: there is none.
    """

    def __init__(self, memory: torch.Tensor, fd: int = -1) -> None:
        self.memory = memory
        self.view = bytes_of(memory)
        self._fd = fd
        self._closing = weakref.finalize(self, os.close, fd) if fd >= 0 else None

    @classmethod
    def shared(cls, size_bytes: int) -> HostSlot:
        """A slot in new memory that has a descriptor, where the system gives one (memfd_create, /proc)."""
        try:
            fd = os.memfd_create("modelp2p-staging", os.MFD_CLOEXEC)
        except OSError:
            return cls(page_aligned(size_bytes))
        try:
            os.ftruncate(fd, size_bytes)
            # By torch, which keeps no second descriptor, as Python's mmap would.
            with torch.inference_mode(False):
                return cls(torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=size_bytes, dtype=torch.uint8), fd)
        except (OSError, RuntimeError):
            os.close(fd)
            return cls(page_aligned(size_bytes))

    @property
    def fd(self) -> int:
        """The descriptor, for processes that hash what is in the slot; -1: there is none, or none any more."""
        return self._fd if self._closing is not None and self._closing.alive else -1

    def close(self) -> None:
        """Give the descriptor back; the memory goes with the slot. Idempotent."""
        if self._closing is not None:
            self._closing()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, which must outlive them. Not through NumPy, which torch does not need."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def page_aligned(size_bytes: int) -> torch.Tensor:
    """Host memory at a page boundary, as reads past the page cache need it: (size_bytes,) uint8, zeros."""
    memory = mmap.mmap(-1, max(1, size_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8, count=size_bytes)


def empty_bytes(size_bytes: int, device: torch.device | str, *, pin_memory: bool = False) -> torch.Tensor:
    """New memory that holds anything: (size_bytes,) uint8.

    On that device and an ordinary tensor, whatever the caller has set for its own: torch's default device would make one
    without data under `torch.device("meta")`, and one made in inference mode cannot be written to outside of it.
    """
    with torch.inference_mode(False):
        return torch.empty(size_bytes, dtype=torch.uint8, device=device, pin_memory=pin_memory)
