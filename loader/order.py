"""The order in which a model uses its tensors, guessed from their names: what is fetched while it is loaded comes in this order.

Embeddings first, then the numbered layers by their numbers, then the rest (the last norm, the head). Files are no help: they hold
tensors by alphabet, `layers.10` before `layers.2`.

A wrong guess costs waiting, never a wrong tensor.
"""

from __future__ import annotations

import re

_EMBEDDING = re.compile(r"emb|wte|wpe")

Place = tuple[int, tuple[tuple[int, int, str], ...]]


def place_of(name: str) -> Place:
    """A key to sort tensor names by."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    before = parts[: numbers[0]] if numbers else parts
    group = 0 if any(_EMBEDDING.search(part.lower()) for part in before) else 1 if numbers else 2
    # Numbers before words, so that keys compare whatever stands in the same place.
    return group, tuple(_number(part) if part.isdecimal() else (1, 0, part) for part in parts)


def _number(digits: str) -> tuple[int, int, str]:
    """By length and then by digit. Not `int`, which refuses thousands of them; a name may hold as many as it likes."""
    significant = digits.lstrip("0")
    return 0, len(significant), significant
