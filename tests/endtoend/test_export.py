"""A release carried by hand: exported, found complete by a client of others, imported where no peer is, loaded, served again."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from modelp2p.loader import load
from tests.endtoend.foreign_libtorrent import NO_PEER
from tests.endtoend.site import MIB, Site, fetched, flip_byte, inodes, model, size_of, snapshot
from tests.endtoend.test_foreign_clients import SCRIPT, SYSTEM_PYTHON
from tests.loader.models import same
from tests.nodes import tree_bytes

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.swarm

SHARD = "model-00001-of-00002.safetensors"


def test_from_one_island_to_another(site: Site) -> None:
    files = model("carried", 2 * MIB + 5, MIB)
    seed, stick = site.node("seed"), site.folder / "stick"
    source = site.write(files)
    published = seed.publish(source, "lab/carried")
    assert seed.ok("pin", "lab/carried")["changed"] is True
    made = seed.ok("export", "lab/carried", str(stick))
    seed.stop()
    assert (made["state"], made["copied_bytes"]) == ("complete", size_of(files))
    assert tree_bytes(Path(made["path"])) == files
    carried = snapshot(stick)

    # A client that knows no bundle: the torrent, the folder, and nobody to ask.
    command = [SYSTEM_PYTHON, str(SCRIPT), made["save_path"], NO_PEER, made["torrent"]]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[1] == "done"
    assert snapshot(stick) == carried

    expected = {name: tensor for shard in sorted(source.glob("*.safetensors")) for name, tensor in load_file(shard).items()}
    check_loads(made["path"], published["publisher"], expected)

    far = site.node("far")
    refused = far.run("import", str(stick), "--json")
    assert (refused.code, refused.json["error"]["kind"]) == (4, "UNKNOWN_PUBLISHER")
    imported = far.ok("import", str(stick), "--publisher", published["publisher"])
    assert (imported["state"], imported["from_peers"], imported["adopted"]) == ("complete", 0, size_of(files))
    assert imported["name_verified"] is False
    assert tree_bytes(Path(imported["path"])) == files
    assert not set(inodes(stick).values()) & set(inodes(imported["path"]).values())
    assert snapshot(stick) == carried
    check_loads(imported["path"], published["publisher"], expected)

    third = site.node("third")
    result = fetched(third, published, far)
    assert (result["state"], result["from_peers"]) == ("complete", size_of(files))
    assert tree_bytes(Path(result["path"])) == files

    # The seed is down: the command starts a daemon of its own, which knows of the pin.
    refused = seed.run("rm", "lab/carried", "--yes", "--json")
    assert (refused.code, refused.json["error"]["kind"]) == (10, "DENIED")


def check_loads(folder: str, publisher: str, expected: dict[str, torch.Tensor]) -> None:
    tensors = load(folder, "cpu", verify="cpu", publisher=publisher)
    assert tensors.keys() == expected.keys()
    assert all(same(tensors[name], tensor) for name, tensor in expected.items())


def test_a_bad_stick_is_named_at_once_and_a_part_is_a_part(site: Site) -> None:
    files = model("bad", 2 * MIB + 5, MIB)
    seed, node, stick = site.node("seed"), site.node("node"), site.folder / "stick"
    published = seed.publish(site.write(files), "lab/bad")
    made = seed.ok("export", "lab/bad", str(stick), "--exclude", "*.md")
    assert made["state"] == "partial"
    node.ok("trust", "add", made["bundle"], "--name", "lab/*")
    shard = Path(made["path"]) / SHARD
    flip_byte(shard, MIB + 12345)
    # What nobody signed: a file more, and a link out of the folder.
    (Path(made["path"]) / "stranger.safetensors").write_bytes(files[SHARD])
    (Path(made["path"]) / "README.md").symlink_to("/etc/hostname")
    carried = snapshot(stick)
    refused = node.run("import", str(stick), "--json")
    assert (refused.code, refused.json["error"]["kind"]) == (11, "PARTIAL")
    assert refused.json["error"]["facts"]["path"] == SHARD
    assert snapshot(stick) == carried
    flip_byte(shard, MIB + 12345)
    imported = node.ok("import", str(stick))
    assert (imported["state"], imported["from_peers"]) == ("partial", 0)
    assert imported["adopted"] == len(files[SHARD]), "what was good the first time was not kept"
    assert tree_bytes(Path(imported["path"])) == {path: data for path, data in files.items() if path != "README.md"}
    # With a network the rest comes by itself.
    result = fetched(node, published, seed)
    assert (result["state"], result["from_peers"]) == ("complete", len(files["README.md"]))
    assert tree_bytes(Path(result["path"])) == files
