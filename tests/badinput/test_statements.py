"""Statements that do not hold: every flipped byte, wrong key, stranger and foreign format is refused, and nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from modelp2p.protocol import codec
from modelp2p.protocol.errors import UntrustedError
from modelp2p.protocol.statement import (
    MAX_BUNDLE_BYTES,
    Statement,
    decode_bundle,
    encode_bundle,
    verify_statement,
)
from modelp2p.protocol.trust import TrustBook, TrustEntry, admit
from tests.badinput.cases import SMALL_STORE, Case, left_in, model, refused, run, write_bundle
from tests.nodes import Node
from tests.releases import publisher, statement_of

FILES = model(1, 3)
PARTS = ("envelope", "layers", "publisher")
FLIPS = 60


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.of(FILES)


@pytest.fixture(scope="module")
def node(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A running node that trusts the publisher of `case`, and has nothing."""
    folder = tmp_path_factory.mktemp("n")
    with Node(folder / "node", sections=SMALL_STORE).start() as running:
        case.trusted_by(running, folder)
        yield running


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def accept(bundle: bytes) -> None:
    """What every door does: verify, then ask whether this node has a reason to believe the publisher."""
    admit(verify_statement(decode_bundle(bundle)), TrustBook((TrustEntry("*", publisher().id),)), None)


@pytest.mark.parametrize("part", PARTS)
def test_no_flipped_bit_of_a_statement_is_accepted(case: Case, part: str) -> None:
    good = getattr(case.statement, part)
    accept(encode_bundle(case.statement))
    random = Random(part)
    for _ in range(FLIPS):
        bad = replace(case.statement, **{part: flipped(good, random.randrange(len(good)), random.randrange(8))})
        with pytest.raises(UntrustedError):
            accept(encode_bundle(bad))


def test_no_flipped_bit_of_a_bundle_file_is_accepted(case: Case) -> None:
    good = encode_bundle(case.statement)
    random = Random(5)
    for at in (*range(16), *(random.randrange(len(good)) for _ in range(FLIPS))):
        with pytest.raises(UntrustedError):
            accept(flipped(good, at, random.randrange(8)))


@pytest.mark.swarm
@pytest.mark.parametrize("part", PARTS)
def test_a_bundle_with_a_flipped_byte_is_refused_and_leaves_nothing(node: Node, case: Case, part: str, tmp_path: Path) -> None:
    good = getattr(case.statement, part)
    bad = replace(case.statement, **{part: flipped(good, len(good) * 2 // 3)})
    bundle = write_bundle(tmp_path / "bad.modelp2p", encode_bundle(bad))
    done = run(node, "fetch", bundle, "--json")
    assert done.code == 4
    assert done.json["error"]["kind"] in ("BAD_SIGNATURE", "UNKNOWN_PUBLISHER")
    refused(node, "fetch", bundle, code=4, kind=done.json["error"]["kind"])
    assert left_in(node.home) == set()


def signed_by_another(case: Case) -> Statement:
    """The envelope of somebody else under the publisher's root."""
    return replace(case.statement, envelope=statement_of(case.files, by="mallory").envelope)


def unsigned_layers(case: Case) -> Statement:
    return replace(case.statement, layers=codec.pack({"v": 1, "layers": []}))


def of_another_release(case: Case) -> Statement:
    return replace(case.statement, layers=statement_of(model(9, 3)).layers)


BROKEN = {"wrong key": signed_by_another, "no layers": unsigned_layers, "layers of another release": of_another_release}


@pytest.mark.swarm
@pytest.mark.parametrize("how", BROKEN)
def test_a_statement_put_together_from_parts_is_refused(node: Node, case: Case, how: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bad.modelp2p", encode_bundle(BROKEN[how](case)))
    refused(node, "fetch", bundle, code=4, kind="BAD_SIGNATURE")
    assert left_in(node.home) == set()


@pytest.mark.swarm
def test_a_valid_bundle_of_a_stranger_is_refused_with_the_way_to_trust_it(node: Node, tmp_path: Path) -> None:
    stranger = Case.of(FILES, by="stranger")
    answer = refused(node, "fetch", stranger.bundle(tmp_path), code=4, kind="UNKNOWN_PUBLISHER")
    assert "trust add" in answer.hint
    assert publisher("stranger").id in answer.message
    assert left_in(node.home) == set()


@pytest.mark.swarm
def test_a_publisher_trusted_for_one_name_may_not_use_another(node: Node, tmp_path: Path) -> None:
    other = Case.of(FILES, name="other/model")
    refused(node, "fetch", other.bundle(tmp_path), code=4, kind="UNKNOWN_PUBLISHER")
    assert left_in(node.home) == set()


def garbage(case: Case) -> bytes:
    return Random(3).randbytes(5000)


def nothing(case: Case) -> bytes:
    return b""


def oversize(case: Case) -> bytes:
    return bytes(MAX_BUNDLE_BYTES + 1)


def trailing(case: Case) -> bytes:
    return encode_bundle(case.statement) + b"\0"


def newer(case: Case) -> bytes:
    return codec.pack({**parts(case), "v": 2})


def extra(case: Case) -> bytes:
    return codec.pack({**parts(case), "command": "rm -rf /"})


def unsorted_keys(case: Case) -> bytes:
    packed = {key: codec.pack(key) + codec.pack(value) for key, value in parts(case).items()}
    return bytes([0x80 + len(packed)]) + b"".join(packed[key] for key in ("v", *PARTS))


def long_version(case: Case) -> bytes:
    """The version as a 64-bit integer: the same value, not its shortest form."""
    packed = {key: codec.pack(key) + codec.pack(value) for key, value in parts(case).items()}
    packed["v"] = codec.pack("v") + b"\xcf" + (1).to_bytes(8, "big")
    return bytes([0x80 + len(packed)]) + b"".join(packed[key] for key in sorted(packed))


def twice(case: Case) -> bytes:
    packed = [codec.pack(key) + codec.pack(value) for key, value in sorted(parts(case).items())]
    return bytes([0x80 + len(packed) + 1]) + packed[0] + b"".join(packed)


def bomb(case: Case) -> bytes:
    return b"\x91" * 100_000


def claims_4_gib(case: Case) -> bytes:
    return b"\x81\xa1v\xc6\xff\xff\xff\xff"


def parts(case: Case) -> dict[str, codec.Value]:
    statement = case.statement
    return {"v": 1, "envelope": statement.envelope, "layers": statement.layers, "publisher": statement.publisher}


NOT_BUNDLES = (garbage, nothing, oversize, trailing, newer, extra, unsorted_keys, long_version, twice, bomb, claims_4_gib)


@pytest.mark.swarm
@pytest.mark.parametrize("make", NOT_BUNDLES, ids=lambda make: make.__name__)
def test_a_file_that_is_no_canonical_bundle_is_refused(node: Node, case: Case, make: object, tmp_path: Path) -> None:
    assert callable(make)
    bundle = write_bundle(tmp_path / "bad.modelp2p", make(case))
    refused(node, "fetch", bundle, code=4, kind="BAD_SIGNATURE")
    assert left_in(node.home) == set()


@pytest.mark.swarm
def test_a_bare_magnet_or_torrent_is_refused_with_a_hint(node: Node, case: Case, tmp_path: Path) -> None:
    magnet = f"magnet:?xt=urn:btmh:1220{case.info_hash.hex()}&dn=lab/model"
    torrent = tmp_path / "model.torrent"
    torrent.write_bytes(case.release.torrent_bytes())
    for ref in (magnet, str(torrent)):
        refused(node, "fetch", ref, code=4, kind="BAD_SIGNATURE")
    assert left_in(node.home) == set()


@pytest.mark.swarm
def test_a_link_that_pins_something_else_than_the_statement_is_refused(node: Node, case: Case, tmp_path: Path) -> None:
    # Kept by another name first, so that the links below find the very statement they pin.
    other = Case.of(model(2, 1), name="lab/other")
    folder = tmp_path / "pinned"
    with Node(folder, sections=SMALL_STORE).start() as keeper:
        source = folder / "source"
        for path, data in other.files.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(data)
        link = keeper.publish(source, "lab/other")["link"]
        before = left_in(keeper.home)
        signer = link.partition("x.pub=")[2]
        content = link.partition("btmh:1220")[2][:64]
        for bad, kind in (
            (link.replace("dn=lab/other", "dn=lab/model"), "BAD_SIGNATURE"),
            (link.replace(signer, publisher("mallory").id), "UNKNOWN_PUBLISHER"),
            (link.replace(content, content[::-1]), "BAD_SIGNATURE"),
        ):
            assert bad != link
            refused(keeper, "fetch", bad, code=4, kind=kind)
        assert left_in(keeper.home) == before
