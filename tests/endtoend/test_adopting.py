"""`adopt`: bytes that are here already are proven, never trusted and never changed; only what is missing crosses the wire."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.endtoend.site import MIB, check_uploaded, flip_byte, inodes, model, size_of, snapshot
from tests.nodes import tree_bytes

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair

pytestmark = pytest.mark.swarm

SHARD = "model-00001-of-00002.safetensors"
DAMAGES = ("nothing", "half of a file is missing", "one flipped byte", "other names in a cache")


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_what_a_copy_lacks_is_fetched(pair: Pair, damage: str) -> None:
    name = f"lab/adopt{DAMAGES.index(damage)}"
    files = model(damage.replace(" ", "-"), 4 * MIB, MIB + 5)
    published = pair.seed.publish(pair.site.write(files), name)
    copy = pair.site.write(files)
    lacking = 0
    match damage:
        case "half of a file is missing":
            (copy / SHARD).write_bytes(files[SHARD][: 2 * MIB])
            lacking = 2 * MIB
        case "one flipped byte":
            flip_byte(copy / SHARD, 2 * MIB + 12345)
            lacking = MIB
        case "other names in a cache":
            shown = {item["path"]: item["etag"] for item in pair.seed.ok("show", name)["files"]}
            for path, etag in shown.items():
                (copy / path).rename(copy / etag)
        case _:
            pass
    before = snapshot(copy)
    result = pair.node.ok("adopt", published["link"], str(copy), "--peer", pair.seed.address, "--timeout", "20")
    assert (result["state"], result["from_peers"]) == ("complete", lacking)
    assert result["adopted"] == size_of(files) - lacking
    assert tree_bytes(Path(result["path"])) == files
    assert snapshot(copy) == before
    assert not set(inodes(copy).values()) & set(inodes(result["path"]).values())
    check_uploaded(pair.seed, name, lacking)


def test_a_single_file_can_be_adopted(pair: Pair) -> None:
    files = model("single", 2 * MIB, MIB)
    published = pair.seed.publish(pair.site.write(files), "lab/single")
    copy = pair.site.write({SHARD: files[SHARD]})
    result = pair.node.ok("adopt", published["link"], str(copy / SHARD), "--peer", pair.seed.address, "--timeout", "20")
    assert result["adopted"] == len(files[SHARD])
    assert result["from_peers"] == size_of(files) - len(files[SHARD])
    assert tree_bytes(Path(result["path"])) == files
