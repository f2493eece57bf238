"""The derived torrent against libtorrent's own reading and, as literals, libtorrent's own making of one fixed release."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import libtorrent as lt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.merkle import leaf_hashes, piece_layer, root_of
from modelp2p.protocol.torrent import (
    Bencodable,
    PieceMap,
    PieceSpan,
    bencode,
    info_dict,
    info_hash,
    manifest_torrent,
    piece_length_for,
    torrent_bytes,
)
from tests.sizes import INTERESTING_SIZES, LEAF, PIECE, seeded_bytes

MIB = 1 << 20
REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class File:
    path: str
    size: int


def load(torrent: bytes) -> lt.torrent_info:
    info = lt.load_torrent_buffer(torrent).ti
    assert info is not None
    return info


# --- golden release: made once by libtorrent 2.1.1 (create_torrent with v2_only, set_piece_hashes) from these bytes ---
GOLDEN = {"config.json": 300, "empty.txt": 0, "weights/model.safetensors": 2 * MIB + 16385}
GOLDEN_ROOTS = {
    "config.json": "97a976b60f18eb773a3052360ccde173bab6f78e573cc63f00cce1dd4aad309b",
    "empty.txt": "",
    "weights/model.safetensors": "ecdead5b54fba808a13fd4214c60c7bd5816162a0ff56bab604aff9e865bff5d",
}
GOLDEN_LAYER = (
    "d78aa87a0805b1b2f64c6506c925b5705bac2857ddfbd00bfbe2c67e8450efa4"
    "84de22e55aa11cfab73a38556c56b36f33244b65a0bd64857c9403e116457948"
    "e901e65fe93fd76ca22eb8fd083f28be81d9b87bfc9dd9dd89c5dbddb87a2090"
)
GOLDEN_INFO = (
    "64393a66696c6520747265656431313a636f6e6669672e6a736f6e64303a64363a6c656e677468693330306531313a70"
    "696563657320726f6f7433323a97a976b60f18eb773a3052360ccde173bab6f78e573cc63f00cce1dd4aad309b656539"
    "3a656d7074792e74787464303a64363a6c656e6774686930656565373a776569676874736431373a6d6f64656c2e7361"
    "666574656e736f727364303a64363a6c656e67746869323131333533376531313a70696563657320726f6f7433323aec"
    "dead5b54fba808a13fd4214c60c7bd5816162a0ff56bab604aff9e865bff5d6565656531323a6d657461207665727369"
    "6f6e693265343a6e616d6534303a30313233343536373839616263646566303132333435363738396162636465663031"
    "32333435363731323a7069656365206c656e67746869313034383537366565"
)
GOLDEN_INFO_HASH = "fefc446bdd21c94fd8fb272777f266b36feff1b03df9f1c1cbc1f90e0545b901"
GOLDEN_TORRENT_SHA256 = "67175e78aeada47ddb1466af98ffdd8b55c0a4d2cd7749c841c7d17e52edf47a"


def test_golden_release_is_what_libtorrent_made_of_it() -> None:
    leaves = {path: leaf_hashes(seeded_bytes(path, size)) for path, size in GOLDEN.items()}
    roots = {path: root_of(of) for path, of in leaves.items()}
    assert {path: root.hex() for path, root in roots.items()} == GOLDEN_ROOTS
    layers = {roots[path]: piece_layer(of, MIB) for path, of in leaves.items() if of}
    assert layers[roots["weights/model.safetensors"]].hex() == GOLDEN_LAYER
    assert piece_length_for(sum(GOLDEN.values())) == MIB

    info = info_dict(REVISION, [(path, size, roots[path]) for path, size in GOLDEN.items()], MIB)
    assert info.hex() == GOLDEN_INFO
    assert info_hash(info).hex() == GOLDEN_INFO_HASH
    assert sha256(torrent_bytes(info, layers)).hexdigest() == GOLDEN_TORRENT_SHA256


def test_golden_manifest_torrent_is_what_libtorrent_made_of_it() -> None:
    layers, envelope, publisher = (
        seeded_bytes(name, size) for name, size in (("layers", 40000), ("manifest", 700), ("publisher", LEAF))
    )
    made = manifest_torrent(envelope, layers, publisher)
    assert made.info_hash.hex() == "7be45b620fac2220079a7f588861a17da711d77de248a8f6fc481aa1ff7f9bbc"
    assert {root.hex(): len(layer) for root, layer in made.piece_layers.items()} == {
        "f073f58177a749bac8417cfe861b2584703d6dc3ff5c639c3af2633d28b21590": 96
    }
    info = load(torrent_bytes(made.info, made.piece_layers))
    assert info.name() == sha256(envelope).hexdigest()
    assert info.info_hashes().v2.to_bytes() == made.info_hash


# --- libtorrent reads what we derive -----------------------------------------------------------------------------
def assert_libtorrent_agrees(contents: dict[str, bytes], piece_length: int) -> None:
    files = [(path, len(data), root_of(leaf_hashes(data))) for path, data in contents.items()]
    layers = {root: piece_layer(leaf_hashes(contents[path]), piece_length) for path, size, root in files if size}
    info = info_dict(REVISION, files, piece_length)
    pieces = PieceMap([File(path, size) for path, size, _ in files], piece_length)

    loaded = load(torrent_bytes(info, layers))
    layout = loaded.layout()
    shown = [index for index in range(layout.num_files()) if not layout.file_flags(index) & lt.file_storage.flag_pad_file]
    # A tree of one top-level file loses the torrent's name in libtorrent: the path stands alone.
    prefix = "" if len(contents) == 1 and "/" not in next(iter(contents)) else f"{REVISION}/"
    assert [layout.file_path(index) for index in shown] == [prefix + path for path in pieces.paths]
    assert loaded.info_hashes().v2.to_bytes() == info_hash(info)
    assert loaded.num_pieces() == pieces.total
    for index, path in zip(shown, pieces.paths, strict=True):
        assert layout.file_size(index) == pieces.size(path) == len(contents[path])
        if contents[path]:
            assert layout.piece_index_at_file(index) == pieces.first(path)
    assert_map_tiles_the_release(pieces, contents)


def assert_map_tiles_the_release(pieces: PieceMap, contents: dict[str, bytes]) -> None:
    covered = dict.fromkeys(contents, 0)
    for piece in range(pieces.total):
        path, offset, length = pieces.locate(piece)
        assert offset == covered[path]
        assert 0 < length <= pieces.piece_length
        assert piece in pieces.pieces_of(path)
        covered[path] += length
    assert covered == {path: len(data) for path, data in contents.items()}
    assert sum(pieces.count(path) for path in pieces.paths) == pieces.total


NAMES = st.sampled_from(["a", "a.txt", "a-b", "B", "aa", "b", "é", "日本", "model-00001-of-00002.safetensors", "z z", "0"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
TREES = st.dictionaries(PATHS, st.sampled_from(sorted(INTERESTING_SIZES)), min_size=1, max_size=8)


def is_plantable(tree: dict[str, int]) -> bool:
    folders = {path[:at] for path in tree for at, character in enumerate(path) if character == "/"}
    return any(tree.values()) and not folders & tree.keys()


@settings(max_examples=60, deadline=None)
@given(tree=TREES.filter(is_plantable), identical=st.booleans())
def test_libtorrent_agrees_on_random_trees(tree: dict[str, int], identical: bool) -> None:
    contents = {path: seeded_bytes("same" if identical else path, size) for path, size in tree.items()}
    assert_libtorrent_agrees(contents, PIECE)


@pytest.mark.parametrize("size", [size for size in INTERESTING_SIZES if size])
@pytest.mark.parametrize("path", ["model.safetensors", "folder/model.safetensors"])
def test_libtorrent_agrees_on_a_release_of_one_file(path: str, size: int) -> None:
    assert_libtorrent_agrees({path: seeded_bytes(path, size)}, PIECE)


def test_libtorrent_agrees_where_tree_order_differs_from_path_order() -> None:
    tree = {"a.txt": 1, "a/b": PIECE + 1, "a/b.c": 0, "a-/x": LEAF, "A": 5, "a/c/d": 2 * PIECE + 1}
    contents = {path: seeded_bytes(path, size) for path, size in tree.items()}
    assert_libtorrent_agrees(contents, PIECE)
    pieces = PieceMap([File(path, size) for path, size in tree.items()], PIECE)
    assert pieces.paths == ("A", "a/b", "a/b.c", "a/c/d", "a-/x", "a.txt")
    assert pieces.paths != tuple(sorted(tree))
    assert (pieces.first("a/b"), pieces.first("a/b.c"), pieces.first("a/c/d")) == (1, 3, 3)


# --- PieceMap ----------------------------------------------------------------------------------------------------
def test_pieces_are_found_around_empty_files() -> None:
    files = [File("a", 0), File("b", PIECE + 3), File("c", 0), File("d", 1), File("e", 0)]
    pieces = PieceMap(files, PIECE)
    assert [pieces.locate(piece) for piece in range(3)] == [
        PieceSpan("b", 0, PIECE),
        PieceSpan("b", PIECE, 3),
        PieceSpan("d", 0, 1),
    ]
    assert [pieces.pieces_of(path) for path in "abcde"] == [range(0), range(2), range(2, 2), range(2, 3), range(3, 3)]
    assert repr(pieces) == f"<PieceMap 3 pieces of {PIECE} bytes, 5 files>"


@pytest.mark.parametrize("piece", [-1, 3, 2**40])
def test_a_piece_outside_the_release_is_an_error(piece: int) -> None:
    with pytest.raises(IndexError):
        PieceMap([File("b", 3 * PIECE)], PIECE).locate(piece)


def test_a_path_listed_twice_has_no_map() -> None:
    with pytest.raises(FormatError):
        PieceMap([File("a", 1), File("a", 2)], PIECE)


def test_a_map_of_a_huge_release_is_arithmetic() -> None:
    pieces = PieceMap([File("big", 2**50), File("small", 1)], 16 * MIB)
    assert pieces.total == 2**26 + 1
    assert pieces.locate(2**26) == PieceSpan("small", 0, 1)


# --- identity ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("total", "piece_length"),
    [
        (0, MIB),
        (1, MIB),
        (65_536 * MIB, MIB),
        (65_536 * MIB + 1, 2 * MIB),
        (65_536 * 2 * MIB, 2 * MIB),
        (65_536 * 2 * MIB + 1, 4 * MIB),
        (65_536 * 8 * MIB + 1, 16 * MIB),
        (65_536 * 16 * MIB + 1, 16 * MIB),
        (2**60, 16 * MIB),
    ],
)
def test_piece_length_is_the_smallest_with_65536_pieces(total: int, piece_length: int) -> None:
    assert piece_length_for(total) == piece_length


def test_info_dict_does_not_depend_on_the_order_of_files() -> None:
    files = [("b", 1, bytes(32)), ("a/x", 2, bytes(32)), ("a.txt", 0, b"")]
    assert info_dict("n", files, PIECE) == info_dict("n", reversed(files), PIECE)


@pytest.mark.parametrize(
    "files",
    [
        pytest.param([], id="no file"),
        pytest.param([("a", 0, b"")], id="no byte: libtorrent refuses a torrent of length 0"),
        pytest.param([("a", 1, b"")], id="content without root"),
        pytest.param([("a", 1, bytes(20))], id="short root"),
        pytest.param([("a", 0, bytes(32)), ("b", 1, bytes(32))], id="empty with root"),
        pytest.param([("a", -1, bytes(32))], id="negative size"),
        pytest.param([("a", 1, bytes(32)), ("a", 1, bytes(32))], id="twice"),
        pytest.param([("a", 1, bytes(32)), ("a/b", 1, bytes(32))], id="file, then folder"),
        pytest.param([("a/b", 1, bytes(32)), ("a", 1, bytes(32))], id="folder, then file"),
        pytest.param([("a", 1, bytes(32)), ("a/b/c", 1, bytes(32))], id="file as a far parent"),
        pytest.param([("", 1, bytes(32))], id="empty path"),
        pytest.param([("a//b", 1, bytes(32))], id="empty component"),
        pytest.param([("/a", 1, bytes(32))], id="absolute"),
        pytest.param([("a/", 1, bytes(32))], id="trailing slash"),
    ],
)
def test_a_tree_that_is_no_tree_is_refused(files: list[tuple[str, int, bytes]]) -> None:
    with pytest.raises(FormatError):
        info_dict("n", files, PIECE)


def test_no_piece_length_is_refused() -> None:
    for piece_length in (0, LEAF - 1, 3 * LEAF):
        with pytest.raises(FormatError):
            info_dict("n", [("a", 1, bytes(32))], piece_length)


# --- bencode -----------------------------------------------------------------------------------------------------
BENCODABLE = st.recursive(
    # libtorrent writes -2**63 and reads it as 0.
    st.integers(-(2**63) + 1, 2**63 - 1) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(value=BENCODABLE)
def test_bencode_is_libtorrents(value: Any) -> None:  # noqa: ANN401 - the two encoders name their recursive type differently
    assert bencode(value) == lt.bencode(value)
    assert lt.bdecode(bencode(value)) == value


def test_text_keys_sort_by_their_bytes() -> None:
    assert bencode({"é": 1, "z": 2, "Z": "é"}) == b"d1:Z2:\xc3\xa91:zi2e2:\xc3\xa9i1ee"


@pytest.mark.parametrize("value", [True, 1.5, None, {"a": True}, [None], bytearray(b"x")])
def test_values_without_a_bencoding_are_refused(value: Bencodable) -> None:
    with pytest.raises(FormatError):
        bencode(value)
