"""Which files --include and --exclude select."""

from __future__ import annotations

import pytest

from modelp2p.protocol.selection import wanted_paths

SIZES = {"README.md": 1, "a/model.safetensors": 2, "a/b/model.bin": 3, "config.json": 4, "onnx/x.onnx": 5}
SELECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "everything": ((), (), tuple(SIZES)),
    "a suffix at any depth": (("*.json",), (), ("config.json",)),
    "a star crosses folders, as in hf download": (("a/*",), (), ("a/model.safetensors", "a/b/model.bin")),
    "a folder": (("a/",), (), ("a/model.safetensors", "a/b/model.bin")),
    "exclude wins": (("*",), ("*.bin", "onnx/"), ("README.md", "a/model.safetensors", "config.json")),
    "several": (("*.md", "*.json"), (), ("README.md", "config.json")),
    "case matters": (("readme*",), (), ()),
    "nothing": (("zzz",), (), ()),
    "exact": (("a/b/model.bin",), (), ("a/b/model.bin",)),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_patterns_select_as_hf_download_does(name: str) -> None:
    include, exclude, expected = SELECTIONS[name]
    assert wanted_paths(SIZES, include, exclude) == expected
