"""Where a want is made: new memory, or a tensor the caller has already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from modelp2p.loader.device import Device
    from modelp2p.loader.plan import Want


@dataclass(frozen=True, slots=True)
class Target:
    """Memory for the bytes of one want as they are stored, and what becomes of them."""

    memory: torch.Tensor
    """(want.size,) uint8: what moves write to."""
    result: torch.Tensor
    """What is handed out."""
    stored: torch.Tensor | None = None
    """`memory` as the stored tensor, to be cast into `result` at the end; None: it is the result already."""


def new_target(device: Device, want: Want) -> Target:
    """New memory on the device, and a second piece of it where the want is cast."""
    memory = device.allocate(want.size)
    stored = as_stored(memory, want)
    if want.dtype is None:
        return Target(memory, stored)
    with torch.inference_mode(False):
        result = device.allocate(stored.numel() * want.dtype.itemsize).view(want.dtype).view(want.shape)
    return Target(memory, result, stored)


def existing_target(device: Device, want: Want, tensor: torch.Tensor) -> Target:
    """A tensor of the want's shape on this device: written in place where it lies as the want is stored, else copied into."""
    device.adopt()
    if tensor.dtype == want.part.dtype and tensor.is_contiguous():
        return Target(tensor.view(-1).view(torch.uint8), tensor)
    memory = device.allocate(want.size)
    return Target(memory, tensor, as_stored(memory, want))


def as_stored(memory: torch.Tensor, want: Want) -> torch.Tensor:
    """A row of `want.size` bytes, aligned for the dtype, seen as the want. Copies nothing."""
    with torch.inference_mode(False):
        return memory.view(want.part.dtype).view(want.shape)
