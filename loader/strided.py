"""One planned move as one torch copy: strided runs of bytes, in the widest unit that fits them."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from modelp2p.loader.plan import Move

_UNITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def copy_strided(target: torch.Tensor, source: torch.Tensor, move: Move) -> None:
    """Copy what `move` says from `source` to `target`, rows of uint8 on one device, on its current stream; may return early."""
    if move.count == 1:
        taken = source[move.source : move.source + move.length]
        target[move.target : move.target + move.length].copy_(taken, non_blocking=True)
        return
    unit = unit_of(target.data_ptr() + move.target, source.data_ptr() + move.source, move)
    into = _runs(target, move.target, move.length, move.count, move.target_stride, unit)
    into.copy_(_runs(source, move.source, move.length, move.count, move.source_stride, unit), non_blocking=True)


def unit_of(target: int, source: int, move: Move) -> int:
    """The most bytes, of 8, 4, 2 and 1, that divide addresses, length and strides: as many are copied at once."""
    return gcd(8, target, source, move.length, move.source_stride, move.target_stride)


def _runs(row: torch.Tensor, begin: int, length: int, count: int, stride: int, unit: int) -> torch.Tensor:
    taken = row[begin : begin + (count - 1) * stride + length]
    return taken.view(_UNITS[unit]).as_strided((count, length // unit), (stride // unit, 1))
