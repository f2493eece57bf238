"""The manifest: one value, one byte form, and no field that can be bent without a re-signature being refused on its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from modelp2p.protocol import codec
from modelp2p.protocol.envelope import decode_envelope
from modelp2p.protocol.errors import FormatError, ModelP2PError
from modelp2p.protocol.kinds import FileKind
from modelp2p.protocol.manifest import (
    MAX_LIST,
    MAX_MANIFEST_BYTES,
    MAX_TEXT_BYTES,
    MAX_UINT,
    FileEntry,
    Lineage,
    Manifest,
    Origin,
    content_revision,
    decode_manifest,
    encode_manifest,
)
from modelp2p.protocol.names import ModelName, Revision
from modelp2p.protocol.torrent import piece_length_for
from tests.releases import statement_of
from tests.sizes import seeded_bytes

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

FILES = {"a/b.txt": b"text", "a.json": b"{}", "empty": b"", "w.safetensors": seeded_bytes("w", 40_000)}
REVISION = Revision("0123456789abcdef0123456789abcdef01234567")
HASH = bytes(range(32))


def good() -> Manifest:
    return decode_manifest(decode_envelope(statement_of(FILES).envelope).payload)


def rich() -> Manifest:
    """A manifest with every optional field."""
    first, *others = good().files
    files = (replace(first, etag="git", git_sha1=bytes(20)), *others)
    return replace(
        good(),
        files=files,
        license="Apache-2.0",
        license_file="a/b.txt",
        lineage=(Lineage("finetune", "base/model", REVISION, HASH),),
        web_seeds=("https://example.org/",),
        trackers=("udp://example.org:1",),
        notes=(("compute", "8 GPU days"), ("use", "tests")),
    )


def source_of(manifest: Manifest) -> Map:
    return codec.unpack_map(encode_manifest(manifest), max_bytes=MAX_MANIFEST_BYTES)


def map_at(source: Map, *steps: str | int) -> Map:
    at: Value = source
    for step in steps:
        at = at[step]  # type: ignore[index]  # a test knows its own shape
    assert isinstance(at, dict)
    return at


@pytest.mark.parametrize("make", [good, rich], ids=["plain", "with every field"])
def test_round_trip_of_value_and_bytes(make: Callable[[], Manifest]) -> None:
    manifest = make()
    data = encode_manifest(manifest)
    assert decode_manifest(data) == manifest
    assert encode_manifest(decode_manifest(data)) == data


def test_files_are_found_by_path() -> None:
    manifest = good()
    assert "a.json" in manifest
    assert "b" not in manifest
    assert manifest.file("a.json").size == 2
    with pytest.raises(KeyError):
        manifest.file("b")
    assert manifest.total_bytes == sum(len(data) for data in FILES.values())


def test_content_revision_does_not_depend_on_order_but_on_path_size_and_root() -> None:
    files = good().files
    assert content_revision(reversed(files)) == content_revision(files) == good().revision
    for changed in (replace(files[0], path="c"), replace(files[0], size=3), replace(files[0], root=HASH)):
        assert content_revision((changed, *files[1:])) != good().revision
    # Metadata is not content.
    assert content_revision((replace(files[0], kind=FileKind.OTHER), *files[1:])) == good().revision


def test_files_are_sorted_by_bytes_of_the_full_path_not_in_torrent_order() -> None:
    assert [entry.path for entry in good().files] == ["a.json", "a/b.txt", "empty", "w.safetensors"]
    with pytest.raises(FormatError, match="sorted"):
        replace(good(), files=tuple(reversed(good().files)))


def test_with_origin_the_revision_is_the_commit() -> None:
    manifest = replace(good(), origin=Origin("lab/model", REVISION), revision=REVISION)
    assert decode_manifest(encode_manifest(manifest)).revision == REVISION
    with pytest.raises(FormatError, match="revision"):
        replace(good(), origin=Origin("lab/model", REVISION))


# (where, field, new value): every one leaves well-formed msgpack behind.
BENT: dict[str, tuple[tuple[str | int, ...], str, Value]] = {
    "version 0": ((), "v", 0),
    "version 2": ((), "v", 2),
    "version as text": ((), "v", "1"),
    "name as path": ((), "name", "../etc"),
    "revision of other content": ((), "revision", REVISION),
    "revision in capitals": ((), "revision", REVISION.upper()),
    "created before time": ((), "created", -1),
    "created above 2**53": ((), "created", MAX_UINT + 1),
    "created as text": ((), "created", "now"),
    "sequence 0": ((), "sequence", 0),
    "sequence above 2**53": ((), "sequence", MAX_UINT + 1),
    "sequence as bool": ((), "sequence", True),
    "info-hash of 20 bytes": ((), "info_hash", bytes(20)),
    "info-hash as hex": ((), "info_hash", "00" * 32),
    "piece length of another size": ((), "piece_length", 2 << 20),
    "piece length 0": ((), "piece_length", 0),
    "no files": ((), "files", []),
    "files as map": ((), "files", {}),
    "licence file that is not there": ((), "license_file", "LICENSE"),
    "licence with escape": ((), "license", "MIT\x1b[2J"),
    "unknown field": ((), "zzz", 1),
    "empty notes": ((), "notes", {}),
    "note with a number": ((), "notes", {"a": 1}),
    "note with bidi override": ((), "notes", {"a": "\u202e"}),
    "note key with newline": ((), "notes", {"a\nb": "c"}),
    "too many notes": ((), "notes", {f"k{number}": "v" for number in range(MAX_LIST + 1)}),
    "too many trackers": ((), "trackers", ["udp://a:1"] * (MAX_LIST + 1)),
    "too many web seeds": ((), "web_seeds", ["https://a/"] * (MAX_LIST + 1)),
    "tracker with newline": ((), "trackers", ["udp://a\n"]),
    "text one byte too long": ((), "license", "a" * (MAX_TEXT_BYTES + 1)),
    "unknown critical": ((), "critical", ["quantum-proof"]),
    "origin of other commit": ((), "origin", {"repo": "lab/model", "commit": REVISION}),
    "origin with more": ((), "origin", {"repo": "lab/model", "commit": REVISION, "x": 1}),
    "path that escapes": (("files", 0), "path", "../a.json"),
    "path that collides": (("files", 0), "path", "A/B.txt"),
    "path out of order": (("files", 0), "path", "zz"),
    "another size": (("files", 0), "size", 3),
    "negative size": (("files", 0), "size", -1),
    "empty size with a root": (("files", 0), "size", 0),
    "absurd size": (("files", 0), "size", 2**60),
    "another root": (("files", 0), "root", HASH),
    "root of 20 bytes": (("files", 0), "root", bytes(20)),
    "no root": (("files", 0), "root", b""),
    "root of an empty file": (("files", 2), "root", HASH),
    "sha256 of 31 bytes": (("files", 0), "sha256", bytes(31)),
    "etag of another kind": (("files", 0), "etag", "md5"),
    "git etag without id": (("files", 1), "etag", "git"),
    "git id without git etag": (("files", 1), "git_sha1", bytes(20)),
    "git id of 19 bytes": (("files", 0), "git_sha1", bytes(19)),
    "kind of another world": (("files", 0), "kind", "virus"),
    "file with more": (("files", 0), "executable", True),
    "lineage of unknown relation": (("lineage", 0), "relation", "stolen"),
    "lineage name": (("lineage", 0), "name", "a/b/c"),
    "lineage revision": (("lineage", 0), "revision", "main"),
    "lineage info-hash": (("lineage", 0), "info_hash", bytes(20)),
    "lineage with more": (("lineage", 0), "x", 1),
}


@pytest.mark.parametrize("name", BENT)
def test_bent_manifest_is_refused_by_its_own_rules(name: str) -> None:
    steps, key, value = BENT[name]
    source = source_of(rich())
    assert decode_manifest(codec.pack(source)) == rich()
    map_at(source, *steps)[key] = value
    with pytest.raises(FormatError):
        decode_manifest(codec.pack(source))


@pytest.mark.parametrize("key", sorted(set(source_of(good()))))
def test_missing_field_is_refused(key: str) -> None:
    source = source_of(good())
    del source[key]
    with pytest.raises(FormatError):
        decode_manifest(codec.pack(source))


@pytest.mark.parametrize("key", sorted(map_at(source_of(good()), "files", 0)))
def test_missing_field_of_a_file_is_refused(key: str) -> None:
    source = source_of(good())
    del map_at(source, "files", 0)[key]
    with pytest.raises(FormatError):
        decode_manifest(codec.pack(source))


def test_unknown_critical_says_to_update() -> None:
    with pytest.raises(FormatError, match="quantum-proof") as caught:
        replace(good(), critical=("quantum-proof",))
    assert "Update" in caught.value.hint


NOTES = tuple((f"k{number:02}", "v") for number in range(MAX_LIST + 1))
# (field, value at the limit, one more)
CAPS: dict[str, tuple[str, object, object]] = {
    "lineage": ("lineage", rich().lineage * MAX_LIST, rich().lineage * (MAX_LIST + 1)),
    "web seeds": ("web_seeds", ("https://a/",) * MAX_LIST, ("https://a/",) * (MAX_LIST + 1)),
    "trackers": ("trackers", ("udp://a:1",) * MAX_LIST, ("udp://a:1",) * (MAX_LIST + 1)),
    "notes": ("notes", NOTES[:MAX_LIST], NOTES),
    "licence": ("license", "l" * MAX_TEXT_BYTES, "l" * (MAX_TEXT_BYTES + 1)),
    "licence in two-byte letters": ("license", "\u00e9" * (MAX_TEXT_BYTES // 2), "\u00e9" * (MAX_TEXT_BYTES // 2) + "l"),
    "a web seed": ("web_seeds", ("w" * MAX_TEXT_BYTES,), ("w" * (MAX_TEXT_BYTES + 1),)),
    "a tracker": ("trackers", ("t" * MAX_TEXT_BYTES,), ("t" * (MAX_TEXT_BYTES + 1),)),
    "a note": ("notes", (("k", "v" * MAX_TEXT_BYTES),), (("k", "v" * (MAX_TEXT_BYTES + 1)),)),
    "a note's key": ("notes", (("k" * MAX_TEXT_BYTES, "v"),), (("k" * (MAX_TEXT_BYTES + 1), "v"),)),
}


@pytest.mark.parametrize("what", CAPS)
def test_a_manifest_beyond_a_cap_cannot_exist(what: str) -> None:
    field, full, over = CAPS[what]
    manifest = replace(good(), **{field: full})  # type: ignore[arg-type]  # the table pairs each field with its own type
    assert decode_manifest(encode_manifest(manifest)) == manifest
    with pytest.raises(FormatError, match=r"more than the limit|longer than"):
        replace(good(), **{field: over})  # type: ignore[arg-type]  # as above


ODD: dict[str, tuple[str, object]] = {
    "licence with escape": ("license", "MIT\x1b[2J"),
    "lone surrogate": ("license", "\udcff"),
    "tracker with newline": ("trackers", ("udp://a\n",)),
    "web seed with bidi override": ("web_seeds", ("https://\u202ea/",)),
    "note key with newline": ("notes", (("a\nb", "c"),)),
    "note with NUL": ("notes", (("a", "\0"),)),
    # One byte form keeps one of them, in order: the value would not come back.
    "note key twice": ("notes", (("a", "1"), ("a", "2"))),
    "notes out of order": ("notes", (("b", "1"), ("a", "2"))),
    "too many critical": ("critical", ("x",) * (MAX_LIST + 1)),
}


@pytest.mark.parametrize("what", ODD)
def test_a_manifest_that_would_not_decode_cannot_exist(what: str) -> None:
    field, value = ODD[what]
    with pytest.raises(FormatError):
        replace(good(), **{field: value})  # type: ignore[arg-type]  # as above


def test_every_list_may_be_full() -> None:
    full = replace(
        good(),
        notes=tuple((f"k{number:02}", "v" * MAX_TEXT_BYTES) for number in range(MAX_LIST)),
        trackers=("udp://a:1",) * MAX_LIST,
    )
    assert decode_manifest(encode_manifest(full)) == full


def entries(count: int, path_bytes: int) -> tuple[FileEntry, ...]:
    width = path_bytes - 5
    folders = "/".join("a" * min(199, width - at) for at in range(0, width, 200))
    return tuple(FileEntry(f"{folders}/{number:05}", 1, HASH, HASH, "sha256", None, FileKind.OTHER) for number in range(count))


def manifest_of(files: tuple[FileEntry, ...]) -> Manifest:
    return Manifest(ModelName.parse("a/b"), content_revision(files), 0, 1, HASH, piece_length_for(len(files)), files)


@pytest.mark.slow
def test_ten_thousand_files_fit_and_one_more_does_not() -> None:
    manifest = manifest_of(entries(10_000, 60))
    assert len(decode_manifest(encode_manifest(manifest)).files) == 10_000
    with pytest.raises(FormatError, match="more than"):
        manifest_of(entries(10_001, 60))


@pytest.mark.slow
def test_manifest_of_4_mib_passes_and_one_byte_more_does_not() -> None:
    base = manifest_of(entries(4_400, 800))
    room = MAX_MANIFEST_BYTES - len(encode_manifest(base))
    assert room > 2 * MAX_TEXT_BYTES
    texts, rest = divmod(room - 200, MAX_TEXT_BYTES + 3)
    assert texts < MAX_LIST * 2
    trackers = ["t" * MAX_TEXT_BYTES] * min(texts, MAX_LIST - 1)
    seeds = ["w" * MAX_TEXT_BYTES] * (texts - len(trackers))
    filled = replace(base, trackers=(*trackers,), web_seeds=(*seeds,), license="l" * (rest + 100))
    missing = MAX_MANIFEST_BYTES - len(encode_manifest(filled))
    exact = replace(filled, license=filled.license + "l" * missing)
    data = encode_manifest(exact)
    assert len(data) == MAX_MANIFEST_BYTES
    assert decode_manifest(data) == exact
    with pytest.raises(FormatError, match="limit"):
        encode_manifest(replace(exact, license=exact.license + "l"))
    with pytest.raises(FormatError, match="limit"):
        decode_manifest(data + b"\0")


def test_git_id_only_below_ten_mebibytes() -> None:
    entry = FileEntry("a", (10 << 20) - 1, HASH, HASH, "git", bytes(20), FileKind.TEXT)
    with pytest.raises(FormatError):
        replace(entry, size=10 << 20)


def test_single_bit_flips_never_leave_the_same_statement() -> None:
    data = encode_manifest(manifest_of(entries(1, 10)))
    survivors = 0
    for bit in range(len(data) * 8):
        bent = bytearray(data)
        bent[bit // 8] ^= 1 << bit % 8
        try:
            manifest = decode_manifest(bytes(bent))
        except ModelP2PError:
            continue
        survivors += 1
        assert encode_manifest(manifest) == bytes(bent) != data
        assert hashlib.sha256(bent).digest() != hashlib.sha256(data).digest()
    # Digests, times and texts cannot be told from others by form alone: those are the signature's to catch.
    assert survivors < len(data) * 8 * 3 // 4
