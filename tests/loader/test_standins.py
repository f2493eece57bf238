"""Stand-ins are known again as they were given, and as nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from modelp2p.loader.standins import StandIns

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "scalar": ((), torch.float32),
    "empty": ((0, 3), torch.float32),
    "vector": ((5,), torch.bfloat16),
    "square": ((64, 64), torch.float16),
    "cube": ((4, 4, 4), torch.float32),
    "counter": ((1,), torch.int64),
    "codes": ((8, 8), torch.float8_e4m3fn),
}


def holding(*tensors: torch.Tensor) -> torch.nn.Module:
    model = torch.nn.Module()
    for number, tensor in enumerate(tensors):
        if tensor.is_floating_point() and tensor.itemsize > 1:
            model.register_parameter(f"p{number}", torch.nn.Parameter(tensor))
        else:
            model.register_buffer(f"b{number}", tensor)
    return model


def test_all_are_found_where_they_are() -> None:
    standing = StandIns(SHAPES)
    assert {name: (tuple(t.shape), t.dtype) for name, t in standing.tensors.items()} == SHAPES
    found = standing.found_in(holding(torch.ones(3), *standing.tensors.values()))
    assert found.keys() == SHAPES.keys()
    assert all(found[name].data_ptr() == tensor.data_ptr() for name, tensor in standing.tensors.items())


def test_a_large_one_takes_next_to_no_memory() -> None:
    standing = StandIns({"embedding": ((250_000, 16_384), torch.bfloat16)})
    assert standing.tensors["embedding"].untyped_storage().nbytes() < 1 << 20


CHANGES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "transposed square": ("square", lambda t: t.t()),
    "permuted cube": ("cube", lambda t: t.permute(1, 0, 2)),
    "half of it": ("square", lambda t: t[:32]),
    "the end of it": ("vector", lambda t: t[1:]),
    "another shape": ("vector", lambda t: t.view(1, 5)),
    "cast": ("square", lambda t: t.float()),
    "other bits": ("square", lambda t: t.view(torch.bfloat16)),
    "a copy": ("square", lambda t: t.clone()),
    "scaled": ("vector", lambda t: t * 2),
    "left out": ("vector", lambda t: torch.ones(5)),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_what_was_changed_is_not_found(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    standing = StandIns(SHAPES)
    placed = [change(tensor) if key == name else tensor for key, tensor in standing.tensors.items()]
    assert standing.found_in(holding(*placed)).keys() == SHAPES.keys() - {name}


def test_what_is_in_two_places_is_not_found() -> None:
    standing = StandIns(SHAPES)
    vector = standing.tensors["vector"]
    assert standing.found_in(holding(*standing.tensors.values(), vector[:3])).keys() == SHAPES.keys() - {"vector"}
    assert standing.found_in(holding(*standing.tensors.values(), vector.view(5))).keys() == SHAPES.keys() - {"vector"}


def test_one_parameter_in_two_places_is_one() -> None:
    standing = StandIns(SHAPES)
    model = holding(*standing.tensors.values())
    model.register_parameter("tied", next(iter(model.parameters())))
    assert standing.found_in(model).keys() == SHAPES.keys()
