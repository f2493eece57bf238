"""A synthetic sharded checkpoint: random bfloat16 weights in the layout of a real one, for the demo and for benchmarks.

The bytes are seeded, so two runs publish the same content; they are never zeros, which disks and networks treat kindly.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

SHARD_BYTES = 512 << 20
_TENSOR_BYTES = 16 << 20
_CHUNK_BYTES = 4 << 20
# Clearing the top exponent bit of a bfloat16 (the high byte of each little-endian pair) leaves no infinity and no NaN.
_FINITE = bytes(byte & 0xBF for byte in range(256))


def write_checkpoint(folder: Path, size_bytes: int, progress: Callable[[int], None] = lambda _: None) -> None:
    """Write shards of at most `SHARD_BYTES` with about `size_bytes` of weights, an index and a config into a new folder."""
    folder.mkdir(parents=True)
    count = max(1, -(-size_bytes // SHARD_BYTES))
    index: dict[str, str] = {}
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        share = size_bytes * (shard + 1) // count - size_bytes * shard // count
        tensors = _tensors(shard, share)
        index |= dict.fromkeys(tensors, name)
        _write_shard(folder / name, tensors, random.Random(shard), progress)
    total = sum(2 * elements for shard in range(count) for elements in _tensors(shard, size_bytes // count).values())
    weight_map = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map, indent=1))
    (folder / "config.json").write_text(json.dumps({"model_type": "synthetic", "torch_dtype": "bfloat16"}))


def _tensors(shard: int, size_bytes: int) -> dict[str, int]:
    """Names and numbers of elements of one shard."""
    names: dict[str, int] = {}
    left = max(size_bytes, 64) // 2
    while left > 0:
        elements = min(left, _TENSOR_BYTES // 2)
        names[f"layers.{shard}.{len(names)}.weight"] = elements
        left -= elements
    return names


def _write_shard(path: Path, tensors: dict[str, int], generator: random.Random, progress: Callable[[int], None]) -> None:
    header: dict[str, object] = {}
    at = 0
    for name, elements in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [elements], "data_offsets": [at, at + 2 * elements]}
        at += 2 * elements
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while at:
            chunk = bytearray(generator.randbytes(min(at, _CHUNK_BYTES)))
            chunk[1::2] = chunk[1::2].translate(_FINITE)
            file.write(chunk)
            at -= len(chunk)
            progress(len(chunk))
