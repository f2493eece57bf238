"""Who signed is checked before one byte of payload is asked for, and a name belongs to whom the user gave it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modelp2p.protocol.envelope import Envelope, decode_envelope, encode_envelope
from modelp2p.protocol.links import parse_link
from modelp2p.protocol.manifest import decode_manifest, encode_manifest
from modelp2p.protocol.statement import Statement, decode_bundle
from modelp2p.protocol.torrent import torrent_bytes
from tests.endtoend.site import MIB, Site, check_uploaded, fetched, model, size_of
from tests.nodes import Node, tree_bytes
from tests.releases import publisher, write_files

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair

pytestmark = pytest.mark.swarm


@contextmanager
def plain_seed(folder: Path, statement: Statement) -> Iterator[str]:
    """A peer that serves the three files of any statement, as only a dishonest one would; yields its address."""
    made = statement.manifest_torrent()
    write_files(folder / statement.digest.hex(), statement.files())
    torrent = folder / "manifest.torrent"
    torrent.write_bytes(torrent_bytes(made.info, made.piece_layers))
    command = [sys.executable, "-m", "tests.bench.plain_libtorrent", "seed", str(torrent), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()
        process.wait(20)


def tampered(statement: Statement) -> Statement:
    """The same statement, with one more word in the manifest than was signed."""
    envelope = decode_envelope(statement.envelope)
    manifest = replace(decode_manifest(envelope.payload), license="cc0-1.0")
    return replace(statement, envelope=encode_envelope(Envelope(encode_manifest(manifest), envelope.signatures)))


def statement_by(node: Node, name: str) -> Statement:
    bundle = node.folder / "release.modelp2p"
    node.ok("show", name, "--bundle", str(bundle))
    return decode_bundle(bundle.read_bytes())


def test_a_statement_that_does_not_hold_costs_no_byte_of_payload(site: Site) -> None:
    seed, node = site.node("seed"), site.node("node")
    files = model("signed", 2 * MIB)
    published = seed.publish(site.write(files), "lab/signed")
    link, bad = parse_link(published["link"]), tampered(statement_by(seed, "lab/signed"))
    before = set((node.home / "data").iterdir())
    with plain_seed(site.folder / "liar", bad) as liar:
        attacks = {
            "another publisher": (replace(link, publisher=publisher("stranger").id), seed.address),
            "another statement": (replace(link, manifest_hash=bad.manifest_torrent().info_hash), liar),
        }
        for attack, (lie, address) in attacks.items():
            done = node.run("fetch", str(lie), "--peer", address, "--peer", seed.address, "--timeout", "20", "--json")
            assert done.code == 4, f"{attack}: {done.out} {done.err}"
            assert done.json["error"]["code"] == 4
            assert done.json["error"]["hint"]
            assert set((node.home / "data").iterdir()) == before, attack
            assert not node.ok("ls")["releases"]
    # Had the attacks moved any payload, the seed would have sent more than the one honest fetch took.
    assert fetched(node, published, seed)["from_peers"] == size_of(files)
    check_uploaded(seed, "lab/signed", size_of(files))


def test_a_link_vouches_for_one_fetch_and_trust_for_a_name(pair: Pair) -> None:
    files = model("named", MIB)
    published = pair.seed.publish(pair.site.write(files), "lab/named")
    node, by, revision = pair.node, published["publisher"], published["revision"]
    assert node.run("fetch", "lab/named").code == 3

    result = fetched(node, published, pair.seed)
    unnamed = node.home / "models" / "by-publisher" / by / "lab" / "named" / revision
    named = node.home / "models" / "lab" / "named" / revision
    assert (result["path"], result["name_verified"]) == (str(unnamed), False)
    # Known, but from nobody who may speak for the name.
    assert node.run("fetch", f"lab/named@{revision}").code == 4

    added = node.ok("trust", "add", published["link"], "--name", "lab/named")
    assert (added["publisher"], added["name"]) == (by, "lab/named")
    again = node.ok("fetch", f"lab/named@{revision}")
    assert (again["path"], again["name_verified"], again["from_peers"]) == (str(named), True, 0)
    assert not unnamed.is_symlink()
    assert tree_bytes(named) == files
    assert node.ok("fetch", "lab/named")["path"] == str(named)
    assert node.ok("trust", "list")["entries"] == [{"name": "lab/named", "publisher": by}]

    # One pattern, one publisher: taking a name over has to be said aloud, and is refused before anybody is asked.
    rival = pair.site.node("rival")
    theirs = rival.publish(pair.site.write(model("rival", MIB)), "lab/other")
    refused = node.run("trust", "add", theirs["link"], "--name", "lab/named", "--json")
    assert refused.code == 4
    assert by in refused.json["error"]["message"]
    # Another pattern is free; the statement of a publisher that is not known here comes from the peer that is named.
    assert node.ok("trust", "add", theirs["link"], "--name", "lab/*", "--peer", rival.address)["publisher"] == theirs["publisher"]

    assert node.ok("trust", "remove", by)["removed"] == 1
    assert unnamed.is_symlink()
    assert not named.is_symlink()
    assert node.run("fetch", "lab/named").code == 4
    assert tree_bytes(unnamed) == files


def test_trust_gives_up_on_a_link_that_nobody_answers(pair: Pair) -> None:
    published = pair.seed.publish(pair.site.write(model("unanswered", MIB)), "lab/unanswered")
    unknown = replace(parse_link(published["link"]), manifest_hash=b"\x11" * 32)
    before = pair.node.ok("trust", "list")
    asked = ("trust", "add", str(unknown), "--name", "lab/x", "--peer", pair.seed.address, "--timeout", "1", "--json")
    done = pair.node.run(*asked, timeout_s=30)
    assert (done.code, done.json["error"]["kind"]) == (5, "TIMED_OUT"), done
    assert "within 1 s" in done.json["error"]["message"]
    assert pair.node.ok("trust", "list") == before


def test_other_bytes_under_a_known_name_and_revision_are_refused(pair: Pair) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    ours = pair.seed.publish(pair.site.write(model("real", MIB)), "lab/rival", "--origin", f"lab/rival@{commit}")
    fetched(pair.node, ours, pair.seed)
    rival = pair.site.node("forger")
    theirs = rival.publish(pair.site.write(model("forged", MIB)), "lab/rival", "--origin", f"lab/rival@{commit}")
    done = pair.node.run("fetch", theirs["link"], "--peer", rival.address, "--timeout", "20", "--json")
    assert done.code == 4
    for one in (ours["publisher"], theirs["publisher"]):
        assert one in done.json["error"]["message"]
    assert rival.release("lab/rival")["uploaded"] == 0
