"""One whole release as literals: another implementation that agrees with `golden.json` agrees with this protocol.

The files are `seeded_bytes(path, size)`: SHA-256 over "path:counter", counter from 0, cut to size. Numbers in `golden.json`
change only with the protocol's version.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import libtorrent as lt
import pytest

from modelp2p.protocol import torrent
from modelp2p.protocol.envelope import Envelope, Signature, encode_envelope, pae
from modelp2p.protocol.kinds import FileKind
from modelp2p.protocol.layers import encode_layers, make_layers
from modelp2p.protocol.links import parse_link
from modelp2p.protocol.manifest import FileEntry, Lineage, Manifest, content_revision, encode_manifest
from modelp2p.protocol.merkle import leaf_hashes, piece_layer, root_of
from modelp2p.protocol.names import ModelName, Revision
from modelp2p.protocol.publisher import encode_chain, keyid_of, make_solo_root
from modelp2p.protocol.signing import PrivateKey
from modelp2p.protocol.statement import Statement, encode_bundle, payload_info, verify_statement
from tests.sizes import seeded_bytes

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden.json").read_text())
INPUT: dict[str, Any] = GOLDEN["input"]
EXPECTED: dict[str, str] = GOLDEN["expected"]


def git_blob_id(data: bytes) -> bytes:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).digest()


def entry(path: str, spec: dict[str, Any]) -> FileEntry:
    data = seeded_bytes(path, spec["size"])
    root = root_of(leaf_hashes(data))
    git = git_blob_id(data) if spec["etag"] == "git" else None
    return FileEntry(path, len(data), root, hashlib.sha256(data).digest(), spec["etag"], git, FileKind(spec["kind"]))


@cache
def computed() -> dict[str, str]:
    """Everything `golden.json` expects, made anew from its input."""
    release, pointer = (PrivateKey(bytes.fromhex(INPUT[name])) for name in ("release_key_seed", "pointer_key_seed"))
    first_root = make_solo_root(release, pointer, datetime.datetime.fromisoformat(INPUT["root_expires"]))
    files = tuple(entry(path, INPUT["files"][path]) for path in sorted(INPUT["files"], key=str.encode))
    piece_length = torrent.piece_length_for(sum(file.size for file in files))
    revision = content_revision(files)
    info = payload_info(revision, files, piece_length)
    parent = INPUT["lineage"]
    manifest = Manifest(
        ModelName.parse(INPUT["name"]),
        revision,
        INPUT["created"],
        INPUT["sequence"],
        torrent.info_hash(info),
        piece_length,
        files,
        license=INPUT["license"],
        license_file=INPUT["license_file"],
        lineage=(Lineage(parent["relation"], parent["name"], Revision(parent["revision"]), bytes.fromhex(parent["info_hash"])),),
        trackers=tuple(INPUT["trackers"]),
        notes=tuple(sorted(INPUT["notes"].items())),
    )
    payload = encode_manifest(manifest)
    signature = release.sign(pae(payload))
    envelope = encode_envelope(Envelope(payload, (Signature(keyid_of(release.public), signature),)))
    layers = {
        file.root: piece_layer(leaf_hashes(seeded_bytes(file.path, file.size)), piece_length)
        for file in files
        if file.size > piece_length
    }
    statement = Statement(envelope, encode_layers(make_layers(piece_length, layers)), encode_chain([first_root]))
    verified = verify_statement(statement)
    return {
        "first_root": first_root.decode("ascii"),
        "publisher": verified.publisher_id,
        "keyid": keyid_of(release.public),
        "content_revision": revision,
        "manifest": payload.hex(),
        "manifest_sha256": hashlib.sha256(payload).hexdigest(),
        "signature": signature.hex(),
        "envelope_sha256": hashlib.sha256(envelope).hexdigest(),
        "layers": statement.layers.hex(),
        "info": info.hex(),
        "info_hash": verified.info_hash.hex(),
        "torrent_sha256": hashlib.sha256(verified.torrent_bytes()).hexdigest(),
        "manifest_info": statement.manifest_torrent().info.hex(),
        "manifest_info_hash": verified.manifest_hash.hex(),
        "bundle_sha256": hashlib.sha256(encode_bundle(statement)).hexdigest(),
        "link": str(verified.link()),
    }


def test_golden_file_and_code_name_the_same_things() -> None:
    assert set(computed()) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_value(name: str) -> None:
    assert computed()[name] == EXPECTED[name]


def test_golden_link_parses() -> None:
    link = parse_link(EXPECTED["link"])
    assert link.info_hash.hex() == EXPECTED["info_hash"]
    assert link.manifest_hash.hex() == EXPECTED["manifest_info_hash"]
    assert link.publisher == EXPECTED["publisher"]


def test_libtorrent_agrees_with_the_golden_info_hash_and_link() -> None:
    for info, info_hash in (("info", "info_hash"), ("manifest_info", "manifest_info_hash")):
        assert hashlib.sha256(bytes.fromhex(EXPECTED[info])).hexdigest() == EXPECTED[info_hash]
        # Without its layers a torrent is still read far enough to be named.
        params = lt.parse_magnet_uri(f"magnet:?xt=urn:btmh:1220{EXPECTED[info_hash]}")
        assert params.info_hashes.v2.to_bytes().hex() == EXPECTED[info_hash]
    params = lt.parse_magnet_uri(EXPECTED["link"])
    assert params.info_hashes.v2.to_bytes().hex() == EXPECTED["info_hash"]
    assert params.name == INPUT["name"]
    assert params.trackers == INPUT["trackers"]


def test_libtorrent_makes_the_golden_torrent_from_the_files(tmp_path: Path) -> None:
    """Independent of our Merkle code, bencoder and file order: libtorrent hashes real files."""
    folder = tmp_path / EXPECTED["content_revision"]
    entries = []
    for path, spec in INPUT["files"].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(seeded_bytes(path, spec["size"]))
        entries.append(lt.create_file_entry(f"{folder.name}/{path}", spec["size"]))
    maker = lt.create_torrent(entries, 1 << 20, lt.create_torrent.v2_only)
    lt.set_piece_hashes(maker, str(tmp_path))
    info = lt.load_torrent_buffer(lt.bencode(maker.generate())).ti
    assert info is not None
    assert info.info_section().hex() == EXPECTED["info"]
    assert info.info_hashes().v2.to_bytes().hex() == EXPECTED["info_hash"]
