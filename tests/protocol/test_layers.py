"""Layers: exactly those the signed roots demand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modelp2p.protocol import codec
from modelp2p.protocol.envelope import decode_envelope
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.layers import Layers, decode_layers, encode_layers
from modelp2p.protocol.manifest import Manifest, content_revision, decode_manifest
from modelp2p.protocol.merkle import leaf_hashes, piece_hash
from tests.releases import statement_of
from tests.sizes import seeded_bytes

MIB = 1 << 20
FILES = {
    "big": seeded_bytes("big", 2 * MIB + 5),
    "empty": b"",
    "exact": seeded_bytes("exact", MIB),
    "other": seeded_bytes("other", MIB + 1),
    "small": b"small",
    "twin": seeded_bytes("big", 2 * MIB + 5),
}
STATEMENT = statement_of(FILES)
MANIFEST: Manifest = decode_manifest(decode_envelope(STATEMENT.envelope).payload)
ROWS = codec.unpack_table(STATEMENT.layers, max_bytes=1 << 20)
BIG, OTHER = MANIFEST.file("big").root, MANIFEST.file("other").root


def test_layers_hold_every_file_above_a_piece_once_and_no_other() -> None:
    layers = decode_layers(STATEMENT.layers, MANIFEST)
    assert [root for root, _ in layers.items()] == sorted([BIG, OTHER])
    assert encode_layers(layers) == STATEMENT.layers


@pytest.mark.parametrize("path", FILES)
def test_piece_hashes_are_those_of_the_bytes(path: str) -> None:
    layers = decode_layers(STATEMENT.layers, MANIFEST)
    entry, data = MANIFEST.file(path), FILES[path]
    pieces = [data[begin : begin + MIB] for begin in range(0, len(data), MIB)]
    expected = [piece_hash(piece, MIB, is_whole_file=len(pieces) == 1) for piece in pieces]
    assert layers.of(entry) == b"".join(expected)
    assert [layers.piece_hash(entry, number) for number in range(len(pieces))] == expected


def flipped(row: bytes) -> bytes:
    return bytes([row[0] ^ 1]) + row[1:]


BENT = {
    "none": {},
    "one missing": {BIG: ROWS[BIG]},
    "flipped bit": ROWS | {BIG: flipped(ROWS[BIG])},
    "one hash short": ROWS | {BIG: ROWS[BIG][:-32]},
    "one hash more": ROWS | {BIG: ROWS[BIG] + bytes(32)},
    "one byte short": ROWS | {BIG: ROWS[BIG][:-1]},
    "empty layer": ROWS | {BIG: b""},
    "pieces swapped": ROWS | {BIG: ROWS[BIG][32:64] + ROWS[BIG][:32] + ROWS[BIG][64:]},
    "layers of two files swapped": {BIG: ROWS[OTHER], OTHER: ROWS[BIG]},
    "layer of a foreign root": ROWS | {bytes(32): bytes(64)},
    "layer of a file of one piece": ROWS | {MANIFEST.file("exact").root: MANIFEST.file("exact").root},
    "layer of the empty root": ROWS | {b"": b""},
    "leaves in place of pieces": ROWS | {BIG: leaf_hashes(FILES["big"])},
}


@pytest.mark.parametrize("name", BENT)
def test_layers_that_are_not_the_manifests_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        decode_layers(codec.pack_table(BENT[name]), MANIFEST)


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\x90", STATEMENT.layers[:-1], STATEMENT.layers + b"\xc0"])
def test_malformed_layers_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_layers(data, MANIFEST)


def test_two_files_of_one_root_but_different_piece_counts_are_refused() -> None:
    """Whichever of them the layer fits, the other would be given hashes of pieces it does not have."""
    for size in (MIB + 1, 3 * MIB + 1):
        files = tuple(replace(entry, size=size) if entry.path == "twin" else entry for entry in MANIFEST.files)
        hostile = replace(MANIFEST, files=files, revision=content_revision(files))
        with pytest.raises(FormatError):
            decode_layers(STATEMENT.layers, hostile)


def test_small_release_has_an_empty_table() -> None:
    statement = statement_of({"a": b"a"})
    manifest = decode_manifest(decode_envelope(statement.envelope).payload)
    assert statement.layers == b"\x80"
    assert isinstance(decode_layers(statement.layers, manifest), Layers)
