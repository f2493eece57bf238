"""Tensors that stand in for others: of their shapes and dtypes, next to no memory, and known again wherever they end up.

Somebody else's code puts them into a model; where each is found says which place in the model is whose. Rules:
- each has a storage of its own, in which its elements overlap, so whatever was made from it without a copy points to it;
- no two dimensions have one stride, so a transposed one is another one, also where it is square;
- one that was found twice, or changed in any way, is not found. Whoever asks has to load what it stood for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


class StandIns:
    """A stand-in for each name.

    Args:
        wanted: shape and dtype by name.
    """

    def __init__(self, wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.tensors = {name: _stand_in(shape, dtype) for name, (shape, dtype) in wanted.items()}
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in self.tensors.items()}

    def found_in(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The parameters and buffers that are a stand-in as it was given and that nothing else came from, by its name."""
        found: dict[str, torch.Tensor] = {}
        broken: set[str] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            name = self._names.get(tensor.untyped_storage().data_ptr())
            if name is None:
                continue
            if name in found or _layout(tensor) != _layout(self.tensors[name]):
                broken.add(name)
            found[name] = tensor
        return {name: tensor for name, tensor in found.items() if name not in broken}


def _stand_in(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    strides = tuple(range(1, len(shape) + 1))
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
    return torch.zeros(extent * dtype.itemsize, dtype=torch.uint8, device="cpu").view(dtype).as_strided(shape, strides)


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
