"""Files that lie about themselves: a release of hostile safetensors files is fetched like any other, and no loader opens them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from tests.badinput.cases import SMALL_STORE, Case, Witness, check_told, safetensors, tensors
from tests.nodes import Node

BODY = Random(8).randbytes(4096)


def entry(begin: int, end: int, shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": "U8", "shape": shape or [end - begin], "data_offsets": [begin, end]}


def header(**entries: object) -> bytes:
    return json.dumps(entries).encode()


TWICE = b'{"w":' + json.dumps(entry(0, 2048)).encode() + b',"w":' + json.dumps(entry(2048, 4096)).encode() + b"}"
DEEP = b'{"w":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
HOSTILE = {
    "twice.safetensors": safetensors(TWICE, BODY),
    "deep.safetensors": safetensors(DEEP, BODY),
    "huge-header.safetensors": (100 << 20).to_bytes(8, "little") + b'{"w":' + BODY,
    "absurd-header.safetensors": (2**63).to_bytes(8, "little") + b'{"w":' + BODY,
    "overlap.safetensors": safetensors(header(a=entry(0, 4096), b=entry(2048, 4096)), BODY),
    "hole.safetensors": safetensors(header(a=entry(0, 1024), b=entry(2048, 4096)), BODY),
    "beyond.safetensors": safetensors(header(a=entry(0, 1 << 40)), BODY),
    "overflow.safetensors": safetensors(header(a=entry(0, 4096, [2**33, 2**33])), BODY),
    "negative.safetensors": safetensors(header(a=entry(0, 4096, [-1, -4096])), BODY),
    "short.safetensors": b"\x08\0\0",
}
FILES = {**HOSTILE, "good.safetensors": tensors(1, 100_000)}


@pytest.mark.swarm
def test_hostile_safetensors_are_fetched_and_never_loaded(tmp_path: Path) -> None:
    loader = pytest.importorskip("modelp2p.loader")
    case = Case.of(FILES)
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    bundle = case.trusted_by(node, tmp_path)
    with Witness(case, tmp_path / "seed") as seed:
        # Some of them are no safetensors at all by their first bytes: that is policy, and can be waived.
        refusal = node.run("fetch", bundle, "--peer", seed.address, "--timeout", "20", "--json")
        assert (refusal.code, refusal.json["error"]["kind"]) == (24, "POLICY")
        node.ok("fetch", bundle, "--peer", seed.address, "--timeout", "20", "--allow-code")
    case.check_whole(node)
    with loader.open_release("lab/model", "cpu", home=str(node.home), files=["good.safetensors"]) as release:
        assert len(release.load()) == 2


@pytest.mark.parametrize("path", HOSTILE)
def test_no_tensor_of_a_release_with_a_hostile_header_is_handed_out(path: str, tmp_path: Path) -> None:
    loader = pytest.importorskip("modelp2p.loader")
    from modelp2p.protocol.errors import FormatError
    from tests.releases import Home, publisher

    files = {path: HOSTILE[path], "good.safetensors": FILES["good.safetensors"]}
    case = Case.of(files)
    home = Home(tmp_path)
    home.trust()
    home.add(case.statement, files)
    with (
        pytest.raises(FormatError) as caught,
        loader.open_release("lab/model", "cpu", home=str(tmp_path), publisher=publisher().id) as release,
    ):
        release.load()
    assert caught.value.message.startswith(f"'{path}': ")
    assert caught.value.facts["path"] == path


@pytest.mark.swarm
def test_load_of_a_hostile_header_exits_4(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.releases import Home

    files = {"twice.safetensors": HOSTILE["twice.safetensors"]}
    node = Node(tmp_path / "node")
    home = Home(node.home)
    home.trust()
    home.add(Case.of(files).statement, files)
    assert "twice.safetensors" in check_told(node.run("load", "lab/model"), 4)
