"""Another user of the machine loads, over the public socket, what the service is still fetching."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.endtoend.test_public_socket import NOBODY, service
from tests.endtoend.test_streaming import LAYERS, SLOWLY, layered
from tests.nodes import Node
from tests.releases import write_files

pytestmark = pytest.mark.swarm

# Imported before this process becomes somebody else, as there.
_LOAD_AS = """
import json, os, sys
from importlib import import_module
from pathlib import Path
import torch, _strptime
import modelp2p.loader
for file in Path(modelp2p.loader.__file__).parent.glob("*.py"):
    if file.stem not in ("__init__", "vllm", "transformers"):
        import_module(f"modelp2p.loader.{file.stem}")
modelp2p.daemon.client.build()
uid, ref, home = int(sys.argv[1]), *sys.argv[2:]
os.setgroups([]); os.setgid(uid); os.setuid(uid)
for name, tensor in modelp2p.loader.stream(ref, home=home, timeout=30):
    print(json.dumps([name, int(tensor.sum())]), flush=True)
"""


def load_as(uid: int, ref: str, home: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _LOAD_AS, str(uid), ref, str(home)]
    return subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_others_load_what_is_still_being_fetched(tmp_path: Path) -> None:
    with service() as node, Node(tmp_path / "seed") as seed:
        seed.start()
        files = layered("lab/shared")
        published = seed.publish(write_files(tmp_path / "source", files), "lab/shared")
        bundle = str(node.folder / "r.modelp2p")
        seed.ok("show", "lab/shared", "--bundle", bundle)
        node.ok("trust", "add", bundle, "--name", "lab/shared")
        node.ok("fetch", published["link"], "--peer", seed.address, "--detach", *SLOWLY)
        loading = load_as(NOBODY, "lab/shared", node.home)
        assert loading.stdout is not None
        first = loading.stdout.readline()
        at = node.release("lab/shared")["proven"]
        node.hurry("lab/shared")
        rest, errors = loading.communicate(timeout=60)
        assert loading.returncode == 0, errors
        expected = load_file(tmp_path / "source" / "model.safetensors")
        assert [json.loads(line) for line in [first, *rest.splitlines()]] == [
            [f"layer.{n}", int(expected[f"layer.{n}"].sum())] for n in range(LAYERS)
        ]
        assert at < sum(map(len, files.values())), "it was complete before the first tensor came"
