"""Small checkpoints as bytes; `safetensors` writes them, so that what we read is what everybody writes."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

MIB = 1 << 20


def tensors_of(seed: int, **sizes: int) -> dict[str, torch.Tensor]:
    """Random float32 vectors by name; sizes in bytes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size // 4, generator=generator) for name, size in sizes.items()}


def file_of(seed: int = 0, **sizes: int) -> bytes:
    """A safetensors file of such tensors."""
    return save(tensors_of(seed, **sizes))


def three_shards() -> dict[str, bytes]:
    """Two files larger than a piece, one smaller, an index and a file that holds no tensors."""
    files = {
        "model-1.safetensors": file_of(1, a=MIB + 400, b=2 * MIB, c=64),
        "model-2.safetensors": file_of(2, d=3 * MIB),
        "model-3.safetensors": file_of(3, e=4096, f=0),
        "config.json": b"{}",
    }
    weight_map = {"a": 1, "b": 1, "c": 1, "d": 2, "e": 3, "f": 3}
    index = {"metadata": {}, "weight_map": {name: f"model-{n}.safetensors" for name, n in weight_map.items()}}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def raw_file(header: bytes, data: bytes = b"") -> bytes:
    """A file with exactly this header text."""
    return len(header).to_bytes(8, "little") + header + data


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bits (NaN included)."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(bits(left), bits(right))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
