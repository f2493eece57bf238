"""A statement as it travels (envelope, layers, publisher), and the one function that turns it into a `Release`.

Invariants of a `Release` that exists: the root chain verified, the release keys' threshold signed the exact manifest bytes,
the payload info-hash and the revision follow from the files, and every piece layer hashes to its signed root.
Whether this node *believes* that publisher for that name is a question of `trust`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelp2p.protocol import codec, torrent
from modelp2p.protocol.envelope import MAX_ENVELOPE_BYTES, decode_envelope, envelope_digest
from modelp2p.protocol.errors import FormatError, UntrustedError
from modelp2p.protocol.layers import MAX_LAYERS_BYTES, Layers, decode_layers
from modelp2p.protocol.links import Link, PeerAddress
from modelp2p.protocol.manifest import FileEntry, Manifest, decode_manifest
from modelp2p.protocol.publisher import MAX_CHAIN_BYTES, RootChain, decode_chain, newer_chain
from modelp2p.protocol.torrent import PieceMap

if TYPE_CHECKING:
    from modelp2p.protocol.names import PublisherId

BUNDLE_VERSION = 1
MAX_BUNDLE_BYTES = MAX_ENVELOPE_BYTES + MAX_LAYERS_BYTES + MAX_CHAIN_BYTES + 1024
FILE_NAMES = ("layers", "manifest", "publisher")
"""The three files of a manifest torrent, in torrent order."""
FILE_LIMITS = {"layers": MAX_LAYERS_BYTES, "manifest": MAX_ENVELOPE_BYTES, "publisher": MAX_CHAIN_BYTES}


@dataclass(frozen=True, slots=True)
class Statement:
    """The bytes of one statement; nothing about them is believed yet."""

    envelope: bytes
    layers: bytes
    publisher: bytes

    @property
    def digest(self) -> bytes:
        """SHA-256 of the envelope: the statement's id."""
        return envelope_digest(self.envelope)

    def manifest_torrent(self) -> torrent.ManifestTorrent:
        """The torrent of the manifest swarm that carries exactly these bytes."""
        return torrent.manifest_torrent(self.envelope, self.layers, self.publisher)

    def files(self) -> dict[str, bytes]:
        """The three files of the manifest swarm by name."""
        return {"layers": self.layers, "manifest": self.envelope, "publisher": self.publisher}


@dataclass(frozen=True, slots=True)
class Release:
    """One verified statement about one release."""

    manifest: Manifest
    layers: Layers
    chain: RootChain
    digest: bytes
    """SHA-256 of the envelope."""
    manifest_hash: bytes
    """Info-hash of the manifest swarm, 32 bytes (`x.mp`)."""
    info: bytes
    """The derived info dict of the payload swarm."""
    pieces: PieceMap

    @property
    def info_hash(self) -> bytes:
        """Info-hash of the payload swarm, 32 bytes."""
        return self.manifest.info_hash

    @property
    def publisher_id(self) -> PublisherId:
        """Who signed."""
        return self.chain.publisher_id

    @property
    def ref(self) -> str:
        """`org/model@revision`."""
        return f"{self.manifest.name}@{self.manifest.revision}"

    def link(self, peers: tuple[PeerAddress, ...] = ()) -> Link:
        """The link that finds and pins this statement."""
        manifest = self.manifest
        return Link(
            self.info_hash, manifest.name, self.manifest_hash, self.publisher_id, manifest.trackers, manifest.web_seeds, peers
        )

    def piece_hash(self, piece: int) -> bytes:
        """Expected hash of a piece by its global number (torrent order)."""
        path, _, _ = self.pieces.locate(piece)
        return self.layers.piece_hash(self.manifest.file(path), piece - self.pieces.first(path))

    def torrent_bytes(self) -> bytes:
        """The complete torrent with layers, as an engine wants it."""
        return torrent.torrent_bytes(self.info, dict(self.layers.items()))


def verify_statement(statement: Statement, known: RootChain | None = None) -> Release:
    """The release this statement proves.

    Args:
        statement: bytes from anywhere.
        known: this node's own root chain of the expected publisher; the newer of the two decides about keys.

    Raises:
        FormatError: any part is malformed.
        UntrustedError: signatures, chain, info-hash or layers do not hold.
    """
    chain = decode_chain(statement.publisher)
    if known is not None and known.publisher_id == chain.publisher_id:
        chain = newer_chain(known, chain)
    envelope = decode_envelope(statement.envelope)
    chain.verify_envelope(envelope)
    manifest = decode_manifest(envelope.payload)
    info = payload_info(manifest.revision, manifest.files, manifest.piece_length)
    derived = torrent.info_hash(info)
    if derived != manifest.info_hash:
        raise UntrustedError("the manifest names an info-hash that its own files do not have", expected=derived.hex())
    layers = decode_layers(statement.layers, manifest)
    return Release(
        manifest,
        layers,
        chain,
        statement.digest,
        statement.manifest_torrent().info_hash,
        info,
        PieceMap(manifest.files, manifest.piece_length),
    )


def payload_info(revision: str, files: tuple[FileEntry, ...], piece_length: int) -> bytes:
    """The info dict that these files have, whoever publishes them."""
    return torrent.info_dict(revision, [(entry.path, entry.size, entry.root) for entry in files], piece_length)


def encode_bundle(statement: Statement) -> bytes:
    """A `.modelp2p` file: the whole statement in one."""
    return codec.pack(
        {
            "v": BUNDLE_VERSION,
            "envelope": statement.envelope,
            "layers": statement.layers,
            "publisher": statement.publisher,
        }
    )


def decode_bundle(data: bytes) -> Statement:
    """The statement in a `.modelp2p` file.

    Raises:
        FormatError: malformed, over the caps, or of a newer version.
    """
    source = codec.unpack_map(data, max_bytes=MAX_BUNDLE_BYTES)
    if codec.take_uint(source, "v", maximum=2**32, where="bundle") != BUNDLE_VERSION:
        raise FormatError("this bundle has a version that is not known here", hint="Update modelp2p.")
    codec.only_fields(source, frozenset({"v", "envelope", "layers", "publisher"}), "bundle")
    return Statement(*(codec.take(source, key, bytes, "bundle") for key in ("envelope", "layers", "publisher")))
