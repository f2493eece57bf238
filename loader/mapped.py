"""Read-only memory of a mapped file as a tensor: nothing is copied, and a write to it ends the process (SIGSEGV)."""

from __future__ import annotations

import warnings

import torch


def mapped_bytes(mapping: memoryview, begin: int, size: int) -> torch.Tensor:
    """`size` bytes of a mapping from `begin` on, which the tensor keeps alive: (size,) uint8; `size` is above 0."""
    with warnings.catch_warnings():
        # "The given buffer is not writable": that is the point.
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        return torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=begin)
