"""Kinds by name, and first bytes that belie a name."""

from __future__ import annotations

import pytest

from modelp2p.protocol.kinds import HEAD_BYTES, FileKind, contradiction, kind_of

KINDS = {
    "model.safetensors": FileKind.WEIGHTS,
    "sub/MODEL.SAFETENSORS": FileKind.WEIGHTS,
    "model.Q4.gguf": FileKind.WEIGHTS,
    "pytorch_model.bin": FileKind.PICKLE,
    "a.pt": FileKind.PICKLE,
    "a.ckpt": FileKind.PICKLE,
    "a.PKL": FileKind.PICKLE,
    "array.npy": FileKind.PICKLE,
    "modeling_x.py": FileKind.CODE,
    "run.sh": FileKind.CODE,
    "lib.so": FileKind.CODE,
    "config.json": FileKind.CONFIG,
    "chat_template.jinja": FileKind.CONFIG,
    "tokenizer.json": FileKind.TOKENIZER,
    "tokenizer.model": FileKind.TOKENIZER,
    "tokenizer_config.json": FileKind.TOKENIZER,
    "vocab.json": FileKind.TOKENIZER,
    "README.md": FileKind.TEXT,
    "LICENSE": FileKind.TEXT,
    "strange.xyz": FileKind.OTHER,
    "no_suffix": FileKind.OTHER,
    "tokenizer.py": FileKind.CODE,
    "tokenizer.pkl": FileKind.PICKLE,
    "tokenizer.bin": FileKind.PICKLE,
    "tokenizer.so": FileKind.CODE,
    "tokenizer_remote.sh": FileKind.CODE,
    "tokenizer.pt": FileKind.PICKLE,
    "tokenizer.joblib": FileKind.PICKLE,
}


@pytest.mark.parametrize("path", KINDS)
def test_kind_by_name(path: str) -> None:
    assert kind_of(path) is KINDS[path]


def test_only_pickles_and_programs_execute_code() -> None:
    assert {kind for kind in FileKind if kind.executes_code} == {FileKind.PICKLE, FileKind.CODE}


PICKLE = b"\x80\x04\x95\x10\0\0\0\0"
LIES = {
    "pickle named as text": ("notes.txt", PICKLE),
    "pickle of protocol 2 named as config": ("config.json", b"\x80\x02}q\0."),
    "pickle named as something": ("weights.xyz", PICKLE),
    "pickle named as tokenizer": ("tokenizer.model", PICKLE),
    "zip named as safetensors": ("a.safetensors", b"PK\x03\x04\x14\0\0\0"),
    "program named as text": ("README.md", b"\x7fELF\x02\x01\x01\0"),
    "HDF5 named as weights": ("a.safetensors", b"\x89HDF\r\n\x1a\n"),
    "no GGUF": ("a.gguf", b"GGML\0\0\0\0"),
    "header longer than any": ("a.safetensors", (200 << 20).to_bytes(HEAD_BYTES, "little")),
    "pickle named as safetensors": ("a.safetensors", b"\x80\x04\x95\x10\0\0\0\x01"),
}


@pytest.mark.parametrize("name", LIES)
def test_first_bytes_that_belie_the_name_are_told(name: str) -> None:
    assert contradiction(*LIES[name])


HONEST = {
    "safetensors": ("a.safetensors", (0x480).to_bytes(8, "little")),
    "safetensors whose length looks like a pickle": ("a.safetensors", (0x0480).to_bytes(8, "little")),
    "GGUF": ("a.gguf", b"GGUF\x03\0\0\0"),
    "empty GGUF": ("a.gguf", b""),
    "text": ("README.md", b"# Title\n"),
    "pickle under its own name": ("a.bin", PICKLE),
    "zip under the name of a pickle": ("a.pt", b"PK\x03\x04\x14\0\0\0"),
    "empty": ("a.json", b""),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_bytes_pass(name: str) -> None:
    assert contradiction(*HONEST[name]) == ""
