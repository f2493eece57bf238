"""What a way to the kernels of sha256.cu is, what it gives, and how it says that it is closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from modelp2p.protocol.errors import UsageError

if TYPE_CHECKING:
    import torch


class WayError(UsageError):
    """One way to the GPU kernels is closed on this machine.

    Facts: way; stage, one of `absent` (not in this torch), `library` (not found, or does not load), `compile`, `load` (the driver
    refuses the result), `answer` (it computes wrong).
    """


class Kernel(Protocol):
    """A kernel of sha256.cu, loaded on one device."""

    def __call__(self, grid: int, block: int, args: Sequence[torch.Tensor | int]) -> None:
        """Order one run on the current stream of the current device, which must be the one it was loaded on.

        Args:
            grid: thread blocks, at least 1.
            block: threads in each.
            args: tensors on the device (passed as pointers; must live until the run has ended) and integers of 32 bits.

        Raises:
            RuntimeError: the device refuses, as torch raises it.
        """


@dataclass(frozen=True, slots=True)
class Kernels:
    """All kernels, loaded on the device that was current when they were made."""

    name: str
    """The way: `LoadStats.verifier` shows it."""
    arch: str
    functions: Mapping[str, Kernel]
    notes: tuple[str, ...] = ()
    """In words: the ways before this one and why they are closed, and what is wrong with the cache. Empty when all is well."""


class Way(Protocol):
    """One way from source to kernels."""

    @property
    def name(self) -> str:
        """As `LoadStats.verifier` shows it."""

    def build(self, text: str, arch: str) -> tuple[Mapping[str, Kernel], Sequence[str]]:
        """Every kernel, on the current device, and what the user should know of how.

        Raises:
            WayError: this way is closed here.
        """
