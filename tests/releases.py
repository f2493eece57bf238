"""Real releases without a daemon: signed statements from fixed keys, and homes on disk laid out as the store lays them out."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from modelp2p.protocol import layout, torrent
from modelp2p.protocol.envelope import Envelope, Signature, encode_envelope, pae
from modelp2p.protocol.kinds import kind_of
from modelp2p.protocol.layers import encode_layers, make_layers
from modelp2p.protocol.manifest import FileEntry, Manifest, content_revision, encode_manifest
from modelp2p.protocol.merkle import leaf_hashes, piece_layer, root_of
from modelp2p.protocol.names import ModelName, PublisherId
from modelp2p.protocol.publisher import encode_chain, keyid_of, make_solo_root, verify_chain
from modelp2p.protocol.record import FileRecord, ReleaseRecord, encode_record
from modelp2p.protocol.signing import PrivateKey
from modelp2p.protocol.statement import Release, Statement, encode_bundle, payload_info, verify_statement
from modelp2p.protocol.trust import TrustBook, TrustEntry, decode_book, encode_book

NAME = "lab/model"


@dataclass(frozen=True)
class Publisher:
    """A solo publisher whose keys follow from a word."""

    key: PrivateKey
    document: bytes

    @property
    def id(self) -> PublisherId:
        return verify_chain([self.document]).publisher_id


@cache
def publisher(word: str = "lab") -> Publisher:
    release, pointer = (PrivateKey(hashlib.sha256(f"{word}:{role}".encode()).digest()) for role in ("release", "pointer"))
    expires = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)
    return Publisher(release, make_solo_root(release, pointer, expires))


def statement_of(
    files: Mapping[str, bytes], *, name: str = NAME, sequence: int = 1, by: str = "lab", web_seeds: tuple[str, ...] = ()
) -> Statement:
    """A signed statement that these files are the release `name`."""
    leaves = {path: leaf_hashes(data) for path, data in files.items()}
    entries = tuple(
        FileEntry(path, len(data), root_of(leaves[path]), hashlib.sha256(data).digest(), "sha256", None, kind_of(path))
        for path, data in sorted(files.items(), key=lambda item: item[0].encode())
    )
    piece_length = torrent.piece_length_for(sum(entry.size for entry in entries))
    revision = content_revision(entries)
    info_hash = torrent.info_hash(payload_info(revision, entries, piece_length))
    manifest = Manifest(
        ModelName.parse(name), revision, 1_700_000_000, sequence, info_hash, piece_length, entries, web_seeds=web_seeds
    )
    layers = {entry.root: piece_layer(leaves[entry.path], piece_length) for entry in entries if entry.size > piece_length}
    payload = encode_manifest(manifest)
    signer = publisher(by)
    signature = Signature(keyid_of(signer.key.public), signer.key.sign(pae(payload)))
    return Statement(
        encode_envelope(Envelope(payload, (signature,))),
        encode_layers(make_layers(piece_length, layers)),
        encode_chain([signer.document]),
    )


@dataclass(frozen=True)
class Home:
    """A modelp2p home at `path`."""

    path: Path

    def trust(self, by: str = "lab", pattern: str = "lab/*") -> None:
        """Pin a publisher as `trust add` does."""
        folder = self.path / layout.TRUST
        (folder / "publishers").mkdir(parents=True, exist_ok=True)
        (folder / "publishers" / publisher(by).id).write_bytes(encode_chain([publisher(by).document]))
        book = decode_book((folder / "book").read_bytes()) if (folder / "book").exists() else TrustBook()
        (folder / "book").write_bytes(encode_book(book.added(TrustEntry(pattern, publisher(by).id))))

    def add(
        self,
        statement: Statement,
        files: Mapping[str, bytes],
        *,
        is_named: bool = True,
        has_record: bool = True,
        borrowed: Collection[str] = (),
    ) -> Path:
        """Put a complete release into the store; returns its visible tree."""
        release = verify_statement(statement)
        tree = self.path / layout.tree_of(release.info_hash, release.manifest.revision)
        for path, data in files.items():
            place = tree / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            place.chmod(0o444)
        self.state(statement)
        if has_record:
            self.record(release, borrowed)
        name = release.manifest.name
        shown = (
            layout.model_of(name, release.manifest.revision)
            if is_named
            else layout.unnamed_model_of(release.publisher_id, name, release.manifest.revision)
        )
        link = self.path / shown
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(tree, link.parent))
        return tree

    def state(self, statement: Statement) -> Path:
        """Keep a statement as the store does; returns its folder."""
        folder = self.path / layout.statement_of(statement.digest)
        folder.mkdir(parents=True)
        for part, data in statement.files().items():
            (folder / part).write_bytes(data)
        return folder

    def record(self, release: Release, borrowed: Collection[str] = ()) -> Path:
        """Write the record of a release's files as they are now; returns its path."""
        tree = self.path / layout.tree_of(release.info_hash, release.manifest.revision)
        files = {
            entry.path: FileRecord.of(os.stat(tree / entry.path), entry.root, borrowed=entry.path in borrowed)
            for entry in release.manifest.files
            if (tree / entry.path).exists()
        }
        record = ReleaseRecord(release.info_hash, release.manifest.revision, (release.digest,), True, files)
        path = self.path / layout.record_of(release.info_hash)
        path.write_bytes(encode_record(record))
        path.chmod(0o644)
        return path


def bundle_of(files: Mapping[str, bytes], *, name: str = NAME, by: str = "lab") -> bytes:
    """A `.modelp2p` file about these files."""
    return encode_bundle(statement_of(files, name=name, by=by))


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The files in a plain folder."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder
