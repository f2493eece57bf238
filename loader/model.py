"""The tensors a model has already, and whether a release fits them: decided whole before the first byte is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from modelp2p.loader.parts import is_number
from modelp2p.protocol.errors import UsageError

if TYPE_CHECKING:
    from modelp2p.loader.plan import Want

Model = torch.nn.Module | Mapping[str, torch.Tensor]
"""A module, or its tensors by name."""

SHOWN = 5
"""Names in a message; a model has thousands."""


@dataclass(frozen=True, slots=True)
class Scattered:
    """What `into` did."""

    filled: tuple[str, ...]
    missing: tuple[str, ...]
    """Tensors of the model the release has nothing for; they hold what they held."""
    unexpected: tuple[str, ...]
    """Tensors of the release the model has no place for; they were not read."""


def tensors_of(model: Model) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones under each of their names, detached: writing needs no gradient."""
    tensors = model.state_dict(keep_vars=True) if isinstance(model, torch.nn.Module) else model
    return {name: tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def fitted(tensors: Mapping[str, torch.Tensor], wants: Mapping[str, Want], device: torch.device, *, is_strict: bool) -> Scattered:
    """What will be filled.

    Args:
        tensors: the model's.
        wants: the release's, by name.
        device: where tensors are made.
        is_strict: every tensor of either side must have its twin; a tied one of the model counts under any of its names.

    Raises:
        UsageError: a name, shape or device does not fit; all of a kind are counted, the first ones named.
    """
    filled = tuple(name for name in wants if name in tensors)
    held = {place_of(tensors[name]) for name in filled}
    missing = tuple(name for name, tensor in tensors.items() if name not in wants and place_of(tensor) not in held)
    unexpected = tuple(name for name in wants if name not in tensors)
    if is_strict:
        _refuse("the release has no tensor for", missing, "Load the rest otherwise, with strict=False.")
        _refuse("the model has no place for", unexpected, "Choose with include=, or load with strict=False.")
    elsewhere = [name for name in filled if tensors[name].device != device]
    _refuse(f"not on {device}:", elsewhere, "Move the model first: model.to(device), or to_empty(device=...) from meta.")
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, stored {wants[name].shape}"
        for name in filled
        if tuple(tensors[name].shape) != wants[name].shape
    ]
    _refuse("shapes differ:", shapes, "Cut tensors with plan=.")
    lossy = [name for name in filled if not _is_castable(wants[name].part.dtype, tensors[name].dtype)]
    _refuse(
        "of another kind than in the model (only floating point is cast, and to floating point):",
        lossy,
        "Convert the model first.",
    )
    return Scattered(filled, missing, unexpected)


def place_of(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    """What tied tensors have in common."""
    return tensor.data_ptr(), tensor.numel(), tuple(tensor.stride())


def _is_castable(stored: torch.dtype, has: torch.dtype) -> bool:
    return stored == has or (is_number(stored) and is_number(has))


def _refuse(what: str, names: Sequence[str], hint: str) -> None:
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UsageError(f"{what} {', '.join(names[:SHOWN])}{more}", hint=hint)
