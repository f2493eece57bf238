"""docs/LOADER.md: its examples run, and its tables name what there is."""

from __future__ import annotations

import re
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch
import transformers

from modelp2p.loader import LoadStats, load, open_release, stream
from modelp2p.loader.release import MAPPING, VERIFY
from modelp2p.loader.vllm import OPTIONS
from tests.loader.test_transformers import LLAMA, saved
from tests.releases import Home, statement_of

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "LOADER.md").read_text(encoding="utf-8")


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def rows(heading: str) -> set[str]:
    """What the first column of a section's tables names."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    section = re.sub(r"^.*\n\|---", "", section, flags=re.MULTILINE)  # the tables' heads
    return {name for cell in re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.slow
def test_the_examples_run(own_home: Path, tmp_path: Path) -> None:
    files = saved(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), tmp_path / "saved")
    home = Home(own_home / "modelp2p")
    home.trust(pattern="org/*")
    home.add(statement_of(files, name="org/model"), files)
    names: dict[str, object] = {}
    ran = 0
    for text in examples():
        code = compile(text, "docs/LOADER.md", "exec")
        if "cuda" not in text:
            exec(code, names)
            ran += 1
    assert ran >= 6
    mine = names["mine"]
    assert isinstance(mine, dict)
    part = mine["model.layers.0.self_attn.q_proj.weight"]
    assert (tuple(part.shape), part.dtype) == ((16, 32), torch.bfloat16)


def test_every_keyword_is_in_the_table() -> None:
    keywords = {*signature(load).parameters, *signature(stream).parameters} - {"ref", "device", "publisher", "home"}
    assert rows("Which tensors, and how") == keywords
    assert {"verify", "mapping", "timeout"} <= {*signature(open_release).parameters}


def test_every_choice_is_in_its_table() -> None:
    assert rows("What is promised") == set(VERIFY)
    assert rows("Views and copies") == set(MAPPING)


def test_every_statistic_is_in_the_table() -> None:
    assert rows("What was done") == {field.name for field in fields(LoadStats)} - {"device", "verify"}


def test_every_key_for_vllm_is_in_the_table() -> None:
    assert rows("vLLM") == set(OPTIONS)
