"""Statements about large releases whose content nobody has: for benchmarks of metadata, memory and start-up."""

from __future__ import annotations

import datetime
import random
from pathlib import Path

from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.daemon.library import Library
from modelp2p.daemon.node import pieces_of
from modelp2p.daemon.store import Store
from modelp2p.protocol import torrent
from modelp2p.protocol.envelope import Envelope, Signature, encode_envelope, pae
from modelp2p.protocol.journal import Selection
from modelp2p.protocol.kinds import kind_of
from modelp2p.protocol.layers import encode_layers, make_layers
from modelp2p.protocol.manifest import FileEntry, Manifest, content_revision, encode_manifest
from modelp2p.protocol.merkle import pieces_in, root_of_layer
from modelp2p.protocol.names import ModelName
from modelp2p.protocol.publisher import encode_chain, keyid_of, make_solo_root
from modelp2p.protocol.signing import PrivateKey
from modelp2p.protocol.statement import Release, Statement, payload_info, verify_statement

SHARDS = 4


def sparse_statement(number: int, size: int) -> tuple[Statement, Release]:
    """A valid statement about `size` bytes in four shards with random piece layers, and its release."""
    generator = random.Random(number)
    release_key, pointer = PrivateKey(b"r" * 32), PrivateKey(b"p" * 32)
    length = torrent.piece_length_for(size)
    entries, layers = [], {}
    for shard in range(SHARDS):
        layer = generator.randbytes(32 * pieces_in(size // SHARDS, length))
        root = root_of_layer(layer, length)
        layers[root] = layer
        path = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        entries.append(FileEntry(path, size // SHARDS, root, generator.randbytes(32), "sha256", None, kind_of(path)))
    files = tuple(entries)
    revision = content_revision(files)
    info_hash = torrent.info_hash(payload_info(revision, files, length))
    manifest = Manifest(ModelName.parse(f"lab/sparse-{number}"), revision, 1_700_000_000, 1, info_hash, length, files)
    payload = encode_manifest(manifest)
    signature = Signature(keyid_of(release_key.public), release_key.sign(pae(payload)))
    root_document = make_solo_root(release_key, pointer, datetime.datetime(2040, 1, 1, tzinfo=datetime.UTC))
    statement = Statement(
        encode_envelope(Envelope(payload, (signature,))),
        encode_layers(make_layers(length, layers)),
        encode_chain([root_document]),
    )
    return statement, verify_statement(statement)


def hold_sparse(home: Path, number: int, size: int) -> Release:
    """Give a node that does not run a release of holes, recorded as complete.

    Holes are not the bytes that the statement is about, and nobody notices: a daemon relies on what it has recorded.
    """
    store = Store.open(home)
    statement, release = sparse_statement(number, size)
    Library(store).add(statement, release)
    folder = ReleaseFolder.open(store, release)
    for path in release.pieces.paths:
        folder.stage((path,), reserve=False, keep_free_bytes=0)
        folder.sync_proven(pieces_of(release, (path,)))
        folder.finish(path)
    folder.select(Selection((), (), release.pieces.paths))
    folder.complete()
    folder.close()
    store.close()
    return release
