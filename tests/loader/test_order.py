"""The order of use, by the names that models in the wild have."""

from __future__ import annotations

import random

import pytest

from modelp2p.loader.order import place_of

FAMILIES = {
    "llama": [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.10.mlp.down_proj.weight",
        "lm_head.weight",
        "model.norm.weight",
    ],
    "gpt2": ["wpe.weight", "wte.weight", "h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight", "h.11.ln_1.bias", "ln_f.weight"],
    "bert": [
        "embeddings.LayerNorm.weight",
        "embeddings.word_embeddings.weight",
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.5.output.dense.bias",
        "pooler.dense.weight",
    ],
    "an embedding inside a layer belongs to its layer": [
        "tok_embeddings.weight",
        "layers.0.attention.weight",
        "layers.0.rotary_emb.inv_freq",
        "layers.1.attention.weight",
        "output.weight",
    ],
    "experts": ["model.layers.3.mlp.experts.9.w", "model.layers.3.mlp.experts.10.w", "model.layers.4.mlp.experts.0.w"],
    "zeros in front": ["layers.0.w", "layers.007.w", "layers.10.w", "layers.0011.w"],
    "more digits than an int may have": [
        "layers.9.w",
        f"layers.{'1' * 4999}.w",
        f"layers.{'1' * 5000}.w",
        f"layers.{'2' * 5000}.w",
    ],
    "numbers and words in one place": ["a.0.w", "a.b.0.w", "", "w"],
}


@pytest.mark.parametrize("names", FAMILIES.values(), ids=FAMILIES.keys())
def test_names_sort_in_the_order_of_use(names: list[str]) -> None:
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=place_of) == names
