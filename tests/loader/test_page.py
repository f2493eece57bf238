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
from modelp2p.loader.hashers import MAX_PROCESSES
from modelp2p.loader.release import MAPPING, VERIFY
from modelp2p.loader.transformers import QUANTIZED_WITHOUT_A_HUB
from modelp2p.loader.vllm import OPTIONS
from tests.loader.models import file_of
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


def test_what_the_three_calls_take_is_said() -> None:
    assert signature(load).parameters.keys() == signature(stream).parameters.keys()
    only_load = signature(load).parameters.keys() - signature(open_release).parameters.keys()
    only_open = signature(open_release).parameters.keys() - signature(load).parameters.keys()
    said = re.search(r"These two take the same keywords\.\s(.*?), which go to(.*?)The second argument", PAGE, re.DOTALL)
    assert said is not None
    assert {*re.findall(r"`(\w+)`", said[1])} == only_load | {"open_release"}
    assert {*re.findall(r"`(\w+)`", said[2])} == only_open


def test_the_most_hashing_processes_are_said() -> None:
    assert f"one fewer than threads, at most {MAX_PROCESSES} |" in PAGE


def test_every_way_of_quantization_is_said() -> None:
    said = re.search(r"needs no kernels of a hub for them: (.*?)\. ", PAGE, re.DOTALL)
    assert said is not None
    assert {*re.findall(r"`([^`]+)`", said[1])} == QUANTIZED_WITHOUT_A_HUB


def test_the_default_is_said_to_believe_the_record(own_home: Path) -> None:
    files = {"model.safetensors": file_of(a=4096)}
    home = Home(own_home / "modelp2p")
    home.trust()
    home.add(statement_of(files), files)
    with open_release("lab/model") as release:
        release.load()
    assert (release.stats.verified_bytes, release.stats.recorded_bytes) == (0, 4096)
    assert "**The default on the CPU believes\nthe record of the home's daemon**" in PAGE


def test_every_choice_is_in_its_table() -> None:
    assert rows("What is promised") == set(VERIFY)
    assert rows("Views and copies") == set(MAPPING)


def test_every_statistic_is_in_the_table() -> None:
    assert rows("What was done") == {field.name for field in fields(LoadStats)} - {"device", "verify"}


def test_every_key_for_vllm_is_in_the_table() -> None:
    assert rows("vLLM") == set(OPTIONS)
