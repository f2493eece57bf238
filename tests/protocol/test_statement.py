"""Whole statements: what verifies, and every way of tampering that must not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import libtorrent as lt
import pytest

from modelp2p.protocol import codec
from modelp2p.protocol.envelope import Envelope, Signature, decode_envelope, encode_envelope, pae
from modelp2p.protocol.errors import FormatError, UntrustedError
from modelp2p.protocol.links import PeerAddress, parse_link
from modelp2p.protocol.manifest import MAX_MANIFEST_BYTES, Manifest, content_revision, decode_manifest, encode_manifest
from modelp2p.protocol.publisher import encode_chain, keyid_of, make_solo_root, verify_chain
from modelp2p.protocol.signing import PrivateKey
from modelp2p.protocol.statement import FILE_NAMES, Statement, decode_bundle, encode_bundle, verify_statement
from tests.protocol.roots import EXPIRES, key, keyid, root_of
from tests.protocol.test_manifest import BENT as BENT_MANIFESTS
from tests.protocol.test_manifest import map_at, source_of
from tests.releases import publisher, statement_of
from tests.sizes import seeded_bytes

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Value

MIB = 1 << 20
FILES = {"a/b.txt": b"text", "a.json": b"{}", "empty": b"", "w.safetensors": seeded_bytes("w", MIB + 40_000)}
GOOD = statement_of(FILES)


def manifest_of(statement: Statement) -> Manifest:
    return decode_manifest(decode_envelope(statement.envelope).payload)


def signed(payload: bytes, by: PrivateKey | None = None, like: Statement = GOOD) -> Statement:
    by = by or publisher().key
    envelope = Envelope(payload, (Signature(keyid_of(by.public), by.sign(pae(payload))),))
    return replace(like, envelope=encode_envelope(envelope))


def resealed(payload: bytes) -> Statement:
    """Another payload under the signatures of the good one."""
    return replace(GOOD, envelope=encode_envelope(Envelope(payload, decode_envelope(GOOD.envelope).signatures)))


def test_good_statement_is_a_release() -> None:
    release = verify_statement(GOOD)
    assert release.publisher_id == publisher().id
    assert release.info_hash == release.manifest.info_hash
    assert release.digest == GOOD.digest
    assert release.ref == f"lab/model@{release.manifest.revision}"
    assert release.pieces.total == 4
    assert len({release.piece_hash(piece) for piece in range(4)}) == 4
    assert parse_link(str(release.link())) == release.link()
    assert release.link((PeerAddress("h", 1),)).peers == (PeerAddress("h", 1),)


def load(data: bytes) -> lt.torrent_info:
    info = lt.load_torrent_buffer(data).ti
    assert info is not None
    return info


def test_libtorrent_reads_the_same_info_hashes() -> None:
    release = verify_statement(GOOD)
    info = load(release.torrent_bytes())
    assert info.info_hashes().v2.to_bytes() == release.info_hash
    assert not info.info_hashes().has_v1()
    assert info.name() == release.manifest.revision
    manifest_swarm = GOOD.manifest_torrent()
    buffer = b"d4:info" + manifest_swarm.info + b"12:piece layers" + _layers(manifest_swarm.piece_layers) + b"e"
    info = load(buffer)
    assert info.info_hashes().v2.to_bytes() == release.manifest_hash
    layout = info.layout()
    pads = lt.file_flags_t.flag_pad_file
    names = [layout.file_path(n).split("/")[-1] for n in range(layout.num_files()) if not layout.file_flags(n) & pads]
    assert names == list(FILE_NAMES)


def _layers(layers: dict[bytes, bytes]) -> bytes:
    return b"d" + b"".join(b"32:%b%d:%b" % (root, len(row), row) for root, row in sorted(layers.items())) + b"e"


@pytest.mark.parametrize("name", BENT_MANIFESTS)
def test_every_bent_field_without_a_new_signature_is_refused(name: str) -> None:
    steps, field, value = BENT_MANIFESTS[name]
    source = source_of(manifest_of(GOOD))
    if steps and steps[0] == "lineage":
        entry: dict[str, Value] = {"relation": "merged", "name": "a/b", "revision": "0" * 40, "info_hash": bytes(32)}
        source["lineage"] = [entry]
    map_at(source, *steps)[field] = value
    with pytest.raises(UntrustedError):
        verify_statement(resealed(codec.pack(source)))


def test_harmless_looking_changes_without_a_new_signature_are_refused() -> None:
    manifest = manifest_of(GOOD)
    for changed in (
        replace(manifest, sequence=2),
        replace(manifest, created=manifest.created + 1),
        replace(manifest, license="MIT"),
        replace(manifest, trackers=("udp://evil:1",)),
        replace(manifest, notes=(("a", "b"),)),
    ):
        with pytest.raises(UntrustedError, match="signature"):
            verify_statement(resealed(encode_manifest(changed)))


def test_every_flipped_bit_of_a_small_envelope_is_refused() -> None:
    """Whatever still verifies must be another statement; with one signature, nothing does."""
    small = statement_of({"a": b"a"})
    chain = verify_chain([publisher().document])
    for bit in range(len(small.envelope) * 8):
        bent = bytearray(small.envelope)
        bent[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UntrustedError):
            chain.verify_envelope(decode_envelope(bytes(bent)))


def test_flipped_bits_all_over_a_statement_are_refused() -> None:
    for part in ("envelope", "layers", "publisher"):
        data = getattr(GOOD, part)
        for position in range(0, len(data), max(1, len(data) // 25)):
            bent = bytearray(data)
            bent[position] ^= 0x10
            try:
                release = verify_statement(replace(GOOD, **{part: bytes(bent)}))
            except UntrustedError:
                continue
            # A document with other white space is another publisher, which `trust` does not know.
            assert part == "publisher"
            assert release.publisher_id != publisher().id


OTHER = statement_of({"other": seeded_bytes("o", 2 * MIB)}, by="other")
MIXED = {
    "layers of another release": replace(GOOD, layers=OTHER.layers),
    "layers of a small release": replace(GOOD, layers=b"\x80"),
    "publisher of another release": replace(GOOD, publisher=OTHER.publisher),
    "envelope of another release": replace(GOOD, envelope=OTHER.envelope),
    "everything empty": Statement(b"", b"", b""),
    "signed by a stranger": signed(decode_envelope(GOOD.envelope).payload, by=PrivateKey(b"\x05" * 32)),
    "signed by another publisher": signed(decode_envelope(GOOD.envelope).payload, by=publisher("other").key),
    "payload that is no manifest, rightly signed": signed(b"\x80"),
    "payload that is not canonical, rightly signed": signed(b"\xde\x00\x00"),
    "empty payload, rightly signed": signed(b""),
    "payload over the cap, rightly signed": signed(bytes(MAX_MANIFEST_BYTES + 1)),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_up_statement_is_refused(name: str) -> None:
    with pytest.raises(UntrustedError):
        verify_statement(MIXED[name])


def test_rightly_signed_manifest_with_a_foreign_info_hash_is_refused() -> None:
    lying = replace(manifest_of(GOOD), info_hash=bytes(32))
    with pytest.raises(UntrustedError, match="info-hash"):
        verify_statement(signed(encode_manifest(lying)))


def test_rightly_signed_manifest_with_other_sizes_is_refused() -> None:
    manifest = manifest_of(GOOD)
    files = tuple(replace(entry, size=entry.size + 1) if entry.path == "a.json" else entry for entry in manifest.files)
    lying = replace(manifest, files=files, revision=content_revision(files))
    with pytest.raises(UntrustedError, match="info-hash"):
        verify_statement(signed(encode_manifest(lying)))


def test_release_of_empty_files_only_is_refused() -> None:
    manifest = manifest_of(GOOD)
    files = tuple(entry for entry in manifest.files if not entry.size)
    lying = replace(manifest, files=files, revision=content_revision(files))
    with pytest.raises(UntrustedError):
        verify_statement(signed(encode_manifest(lying)))


def test_newer_root_known_here_decides_about_keys() -> None:
    first = root_of()
    dropped = verify_chain([first, root_of(2, targets=("r",))])
    old = signed(decode_envelope(GOOD.envelope).payload, key("a"), replace(GOOD, publisher=encode_chain([first])))
    assert verify_statement(old).chain.version == 1
    with pytest.raises(UntrustedError, match="signature"):
        verify_statement(old, dropped)
    new = signed(decode_envelope(GOOD.envelope).payload, key("r"), replace(GOOD, publisher=encode_chain([first])))
    assert verify_statement(new, dropped).chain is dropped


def test_known_root_of_another_publisher_changes_nothing() -> None:
    assert verify_statement(GOOD, verify_chain([root_of()])).publisher_id == publisher().id


def test_forked_publisher_is_refused() -> None:
    first = root_of()
    known = verify_chain([first, root_of(2, targets=("r",))])
    forked = encode_chain([first, root_of(2, targets=("s",))])
    with pytest.raises(UntrustedError, match="disagree"):
        verify_statement(signed(decode_envelope(GOOD.envelope).payload, key("s"), replace(GOOD, publisher=forked)), known)


def test_timestamp_key_alone_installs_nothing() -> None:
    document = make_solo_root(key("a"), key("online"), EXPIRES)
    assert keyid("online") not in verify_chain([document]).release_keyids()
    with pytest.raises(UntrustedError):
        verify_statement(
            signed(decode_envelope(GOOD.envelope).payload, key("online"), replace(GOOD, publisher=encode_chain([document])))
        )


def test_bundle_round_trip() -> None:
    data = encode_bundle(GOOD)
    assert decode_bundle(data) == GOOD
    assert verify_statement(decode_bundle(data)).digest == GOOD.digest


def test_other_bundle_versions_and_shapes_are_refused() -> None:
    source = codec.unpack_map(encode_bundle(GOOD), max_bytes=1 << 20)
    cases: dict[str, dict[str, Value]] = {
        "version 0": source | {"v": 0},
        "version 2": source | {"v": 2},
        "version as text": source | {"v": "1"},
        "one more": source | {"comment": "x"},
        "layers as text": source | {"layers": "x"},
    }
    for field in source:
        cases[f"without {field}"] = {name: value for name, value in source.items() if name != field}
    for case in cases.values():
        with pytest.raises(FormatError):
            decode_bundle(codec.pack(case))
    with pytest.raises(FormatError) as caught:
        decode_bundle(codec.pack(cases["version 2"]))
    assert "Update" in caught.value.hint


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"{}", b"d8:announce", encode_bundle(GOOD)[:-1], encode_bundle(GOOD) + b"\0"]
)
def test_what_is_no_bundle_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_bundle(data)
