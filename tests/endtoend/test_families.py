"""Models of four families, from `save_pretrained` over a swarm to `from_pretrained` by name, with an endpoint nobody asks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.clients.programs import NEWEST, Program, environment_of
from tests.endtoend.hub import Hub
from tests.nodes import tree_bytes

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair

pytestmark = pytest.mark.swarm

FAMILIES = ("gpt2", "bert", "xlnet", "resnet")
"""Of 2018 to 2020: each has other names, other types of numbers, and another layout of its tensors."""


def test_families_load_by_name_from_the_swarm_and_ask_nobody(pair: Pair, tmp_path: Path) -> None:
    hub = Hub("lab/nothing", "0" * 40, {}, frozenset())
    peer = ("--peer", pair.seed.address, "--timeout", "20")
    with hub.serve() as endpoint:
        environment = environment_of(endpoint, Path(os.environ["HF_HOME"]), {"HF_HUB_OFFLINE": "1"})
        with Program(NEWEST, environment) as program:
            made = {family: program.ask("make", family, str(tmp_path / family)) for family in FAMILIES}
            numbers = {dtype for item in made.values() for dtype in item["dtypes"].values()}
            assert numbers == {"torch.float32", "torch.bfloat16", "torch.float16", "torch.int64"}
            for family in FAMILIES:
                name, folder = f"families/{family}", tmp_path / family
                link = pair.seed.publish(folder, name)["link"]
                if family == FAMILIES[0]:
                    pair.node.ok("trust", "add", link, "--name", "families/*", *peer)
                # The link brings what was signed; from then on the name is enough.
                pair.node.ok("fetch", link, "--include", "config.json", *peer)
                fetched = pair.node.ok("fetch", name, *peer)
                assert tree_bytes(Path(fetched["hf_cache"])) == tree_bytes(folder)
                assert program.ask("compare", str(folder), name) == made[family]
    assert hub.requests == []
