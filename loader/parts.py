"""What is handed out: a named stretch of one file and the torch type it has.

Invariants: a part lies inside its file's data; its bytes are row-major and little-endian; `dtype` exists in this torch.

F4 packs two elements in a byte and torch has one dtype for the pair, so the last dimension is halved, as `safetensors` does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from modelp2p.protocol.errors import UsageError

if TYPE_CHECKING:
    from modelp2p.protocol.safetensors import Header, TensorInfo

# By name: a torch without one of them must still import, and say so only when a file needs it.
TORCH_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


PACKED = frozenset({getattr(torch, "float4_e2m1fn_x2", None)})
"""Floating point by torch's word, but two numbers to an element, which torch converts to nothing else."""


def is_number(dtype: torch.dtype) -> bool:
    """Whether `dtype=` casts it: floating point that torch can convert."""
    return dtype.is_floating_point and dtype not in PACKED


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor, or rows of one, at bytes `begin` up to `end` of its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.begin

    def shaped(self, data: torch.Tensor) -> torch.Tensor:
        """A one-dimensional uint8 tensor of `size` bytes, aligned for the dtype, seen as this part. Copies nothing."""
        return data.view(self.dtype).view(self.shape)


def part_of(info: TensorInfo, header: Header) -> Part:
    """The whole tensor as a part of its file.

    Raises:
        UsageError: torch, or this machine, has no such type.
    """
    dtype = torch_dtype(info.dtype, info.name)
    shape = info.shape
    if info.dtype == "F4":
        if not shape or shape[-1] % 2:
            raise UsageError(f"tensor '{info.name}' has F4 rows that end inside a byte, which torch cannot hold")
        shape = (*shape[:-1], shape[-1] // 2)
    return Part(info.name, dtype, shape, header.data_offset + info.begin, header.data_offset + info.end)


def torch_dtype(stored: str, name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype; `name` is the tensor's, for the message.

    Raises:
        UsageError: there is none.
    """
    if sys.byteorder != "little":
        raise UsageError("this machine is big-endian; the loader reads little-endian tensors as they are")
    dtype = getattr(torch, TORCH_NAMES.get(stored, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(
            f"tensor '{name}' has dtype {stored}, which torch {torch.__version__} does not have",
            hint="Update torch, or choose other tensors with include=.",
            tensor=name,
            dtype=stored,
        )
    return dtype
