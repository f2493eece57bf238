"""The tensors a model has already, and whether a release fits them: decided whole before the first byte is read.

What is called filled is filled: a tensor counts only if it is the module's own memory, if nothing else that is wanted lies there,
and if it can be written to. A write into a read-only view of the store would end the process (SIGSEGV), so the system is asked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelp2p.loader.parts import is_number
from modelp2p.protocol.errors import UsageError
from modelp2p.protocol.text import some_of

if TYPE_CHECKING:
    from modelp2p.loader.plan import Want

Model = torch.nn.Module | Mapping[str, torch.Tensor]
"""A module, or its tensors by name."""


@dataclass(frozen=True, slots=True)
class Scattered:
    """What `into` did."""

    filled: tuple[str, ...]
    missing: tuple[str, ...]
    """Tensors of the model the release has nothing for; they hold what they held."""
    unexpected: tuple[str, ...]
    """Tensors of the release the model has no place for; they were not read."""


def tensors_of(model: Model) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones under each of their names, detached: writing needs no gradient.

    Of a module they go by the names of its `state_dict`, which may rename them or show parts of them, as long as what it shows
    is the module's own memory. What else it shows, as extra state does, is left out: nobody would see what is written there.

    Raises:
        UsageError: `state_dict` shows something else under a parameter's name than the parameter.
    """
    held: Mapping[str, object] = model.state_dict(keep_vars=True) if isinstance(model, torch.nn.Module) else model
    said = {name: found for name, found in held.items() if isinstance(found, torch.Tensor)}
    if not isinstance(model, torch.nn.Module):
        return {name: tensor.detach() for name, tensor in said.items()}
    own = _own_tensors(model)
    copies = [name for name, tensor in own.items() if name in said and not _is_whole(said[name], tensor)]
    _refuse(
        "state_dict() of the model does not show its own memory:",
        copies,
        "Give the tensors by name: dict(model.named_parameters()).",
    )
    storages = {_storage_of(tensor) for tensor in own.values()}
    shown = {name: tensor for name, tensor in said.items() if name in own or _storage_of(tensor) in storages}
    hidden = {name: tensor for name, tensor in own.items() if name not in said and not _is_shown(tensor, shown)}
    return {name: tensor.detach() for name, tensor in (shown | hidden).items()}


def fitted(tensors: Mapping[str, torch.Tensor], wants: Mapping[str, Want], device: torch.device, *, is_strict: bool) -> Scattered:
    """What will be filled.

    Args:
        tensors: the model's.
        wants: the release's, by name.
        device: where tensors are made.
        is_strict: every tensor of either side must have its twin; a tied one of the model counts under any of its names.

    Raises:
        UsageError: a name, shape, dtype or device does not fit, or a tensor cannot be written to; all of a kind are counted, the
            first ones named.
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
    odd = [name for name in filled if not _has_a_place_for_each(tensors[name])]
    _refuse("elements share memory, or are kept conjugated, negated or sparse:", odd, "Make it a tensor of its own: clone it.")
    shared = _shared({name: tensors[name] for name in filled if tensors[name].numel()})
    _refuse("two stored tensors for one place in the model:", shared, "Choose one of them with include=, or untie them.")
    locked = _read_only({name: tensors[name] for name in filled}) if device.type == "cpu" else []
    _refuse("read-only memory, as views of a release are:", locked, "Load it with mapping='pread', or clone it first.")
    lossy = [name for name in filled if not _is_castable(wants[name].part.dtype, tensors[name].dtype)]
    _refuse(
        "of another kind than in the model (only floating point is cast, and to floating point):",
        lossy,
        "Convert the model first.",
    )
    return Scattered(filled, missing, unexpected)


def place_of(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    """What tied tensors have in common."""
    if tensor.layout is not torch.strided:
        return id(tensor), 0, ()
    return tensor.data_ptr(), tensor.numel(), tuple(tensor.stride())


def _own_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    own: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        stored = {name: found for name, found in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in (*module._parameters.items(), *stored.items()):
            if tensor is not None:
                own[f"{prefix}.{name}" if prefix else name] = tensor
    return own


def _storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _is_whole(said: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether filling the one fills the other."""
    if said is own:
        return True
    is_there = said.device == own.device and place_of(said)[0] == place_of(own)[0]
    return is_there and said.nbytes == own.nbytes


def _is_shown(tensor: torch.Tensor, shown: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor goes by other names: as a whole, or in parts that make up all of it."""
    if tensor.layout is not torch.strided:
        return False
    begin, end = _span_of(tensor)
    spans = {place: part.nbytes for part in shown.values() if begin <= (place := place_of(part))[0] < end}
    return sum(spans.values()) >= tensor.nbytes


def _span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first to behind the last element."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size() if tensor.numel() else tensor.data_ptr()


def _has_a_place_for_each(tensor: torch.Tensor) -> bool:
    """Whether each element lies, as it is, where no other does."""
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _shared(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Pairs of tensors with an element in common. None of them has one in common with itself."""
    pairs: list[str] = []
    open_: list[tuple[int, str]] = []
    for begin, end, name in sorted((*_span_of(tensor), name) for name, tensor in tensors.items()):
        open_ = [(other_end, other) for other_end, other in open_ if other_end > begin]
        pairs += [f"{other} and {name}" for _, other in open_ if _meet(tensors[other], tensors[name])]
        open_.append((end, name))
    return pairs


def _meet(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of overlapping spans have an element in common; where that is hard to tell, they have."""
    width = first.element_size()
    distance, rest = divmod(second.data_ptr() - first.data_ptr(), width)
    if rest or second.element_size() != width or first.stride() != second.stride():
        return True
    # Columns of one matrix lie between each other without meeting.
    return _reaches(distance, sorted(zip(first.stride(), first.shape, second.shape, strict=True), reverse=True))


def _reaches(distance: int, dims: Sequence[tuple[int, int, int]]) -> bool:
    """Whether some element of one tensor lies `distance` elements from some of the other; dims by falling stride."""
    if not dims:
        return distance == 0
    (stride, size, other), rest = dims[0], dims[1:]
    if size == other == 1:
        return _reaches(distance, rest)
    # The dimensions that are left reach less far than one step of this one.
    near = distance // stride
    return any(-other < step < size and _reaches(distance - step * stride, rest) for step in (near, near + 1))


def _read_only(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Tensors of the host that lie in a mapping nobody may write to; where the system does not tell, none."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    # "address perms offset dev inode pathname" (proc_pid_maps(5)), in rising order.
    fields = [line.split(None, 2)[:2] for line in lines]
    ends = [int(addresses.partition("-")[2], 16) for addresses, _ in fields]
    locked: list[str] = []
    for name, tensor in tensors.items():
        begin, end = _span_of(tensor)
        first, last = bisect_right(ends, begin), bisect_right(ends, end - 1)
        if begin < end and any("w" not in perms for _, perms in fields[first : last + 1]):
            locked.append(name)
    return locked


def _is_castable(stored: torch.dtype, has: torch.dtype) -> bool:
    return stored == has or (is_number(stored) and is_number(has))


def _refuse(what: str, names: Sequence[str], hint: str) -> None:
    if names:
        raise UsageError(f"{what} {some_of(names)}", hint=hint)
