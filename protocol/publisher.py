"""Publishers: a TUF root chain, the id that pins it, and whether its release keys signed a payload (docs/DESIGN.md, 10).

Invariants of a `RootChain` that exists:
- root 1 is signed by its own threshold, root N+1 by the thresholds of N and of N+1, versions without gaps;
- every key is Ed25519, of large order, and present under one key id only (python-tuf 7.0 counts one public key under two
  key ids twice towards a threshold);
- no timestamp key serves root or targets: the online key can never install bytes.

Freshness (expiry, rollback of catalogs) is not judged here. Format: TUF 1.0.34, https://theupdateframework.github.io/specification/
The only module that imports tuf and securesystemslib.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from securesystemslib.signer import Key, Signature, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from modelp2p.protocol import codec
from modelp2p.protocol.envelope import Envelope, pae
from modelp2p.protocol.errors import FormatError, UntrustedError
from modelp2p.protocol.names import PublisherId, publisher_id_of
from modelp2p.protocol.signing import PrivateKey, PublicKey

MAX_ROOT_BYTES = 64 << 10
MAX_ROOTS = 256
MAX_CHAIN_BYTES = 4 << 20
RELEASE_ROLE = Targets.type
POINTER_ROLE = Timestamp.type


@dataclass(frozen=True, slots=True)
class RootChain:
    """The root documents 1..N of one publisher, verified; `documents` are their exact bytes."""

    documents: tuple[bytes, ...]
    publisher_id: PublisherId
    _newest: Metadata[Root]
    _signed: tuple[bytes, ...]

    @property
    def version(self) -> int:
        """Version of the newest root."""
        return self._newest.signed.version

    @property
    def expires(self) -> datetime.datetime:
        """When the newest root says it should have been renewed (UTC)."""
        return self._newest.signed.expires

    def release_keyids(self) -> tuple[str, ...]:
        """Key ids that may sign manifests."""
        return tuple(self._newest.signed.roles[RELEASE_ROLE].keyids)

    def verify_envelope(self, envelope: Envelope) -> None:
        """Return if the threshold of release keys signed the envelope's payload.

        Raises:
            UntrustedError: too few of them did.
        """
        role = self._newest.signed.roles[RELEASE_ROLE]
        message = pae(envelope.payload)
        by_keyid = {signature.keyid: signature.sig for signature in envelope.signatures}
        valid = 0
        for keyid in role.keyids:
            if keyid not in by_keyid:
                continue
            key = _public_key(self._newest.signed.keys[keyid])
            try:
                key.verify(by_keyid[keyid], message)
            except UntrustedError:
                # A bad signature beside a good threshold must not let a stranger spoil a statement.
                continue
            valid += 1
        if valid < role.threshold:
            raise UntrustedError(
                f"the manifest carries {valid} of {role.threshold} signatures that publisher {self.publisher_id} requires",
                hint="The statement was altered, or signed with a key this publisher does not use for releases.",
                publisher=self.publisher_id,
            )


def verify_chain(documents: Sequence[bytes]) -> RootChain:
    """The chain these exact root documents form.

    Raises:
        FormatError: malformed, over the caps, or unsafe keys.
        UntrustedError: a link of the chain is not signed by the thresholds it needs.
    """
    if not 1 <= len(documents) <= MAX_ROOTS:
        raise FormatError(f"a root chain has 1 to {MAX_ROOTS} documents, not {len(documents)}")
    previous: Metadata[Root] | None = None
    signed: list[bytes] = []
    for number, document in enumerate(documents, start=1):
        root = _parse_root(document)
        if root.signed.version != number:
            raise UntrustedError(f"root document {number} has version {root.signed.version}")
        try:
            if previous is not None:
                previous.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
            root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
        except (RepositoryError, ValueError) as exc:
            raise UntrustedError(f"root document {number} is not signed as its chain demands: {exc}") from exc
        previous = root
        signed.append(root.signed_bytes)
    assert previous is not None
    return RootChain(tuple(documents), publisher_id_of(documents[0]), previous, tuple(signed))


def encode_chain(documents: Sequence[bytes]) -> bytes:
    """The `publisher` file of a manifest torrent: a msgpack array of the documents."""
    return codec.pack(list(documents))


def decode_chain(data: bytes) -> RootChain:
    """Parse and verify a `publisher` file.

    Raises:
        FormatError, UntrustedError: see `verify_chain`.
    """
    return verify_chain(_documents(data))


def claimed_publisher(data: bytes) -> PublisherId:
    """Whose chain a `publisher` file would be if it held. Nothing is verified: it only says which chain to compare it with.

    Raises:
        FormatError: no array of documents.
    """
    return publisher_id_of(_documents(data)[0])


def newer_chain(first: RootChain, second: RootChain) -> RootChain:
    """The longer of two chains of one publisher.

    Raises:
        UntrustedError: they belong to different publishers or fork.
    """
    longer, shorter = (first, second) if first.version >= second.version else (second, first)
    # What was signed is compared, not the files: white space or a spare signature, which anyone may add, is no fork.
    if longer.publisher_id != shorter.publisher_id or longer._signed[: shorter.version] != shorter._signed:
        raise UntrustedError("two root chains of one publisher disagree", publisher=first.publisher_id)
    return longer


def make_solo_root(release: PrivateKey, pointer: PrivateKey, expires: datetime.datetime) -> bytes:
    """Exact bytes of a new publisher's `1.root.json`: `release` in root, targets and snapshot, `pointer` in timestamp."""
    main, online = tuf_key(release.public), tuf_key(pointer.public)
    root = Root(version=1, expires=expires, consistent_snapshot=True)
    for role in (Root.type, Targets.type, Snapshot.type):
        root.add_key(main, role)
    root.add_key(online, Timestamp.type)
    metadata = Metadata(root)
    metadata.signatures[main.keyid] = Signature(main.keyid, release.sign(metadata.signed_bytes).hex())
    return metadata.to_bytes()


def tuf_key(key: PublicKey) -> SSlibKey:
    """The TUF form of a key; its `keyid` is the SHA-256 TUF defines."""
    return SSlibKey.from_crypto(key.to_cryptography())


def keyid_of(key: PublicKey) -> str:
    """The 64-hex TUF key id of a public key."""
    return tuf_key(key).keyid


def _documents(data: bytes) -> list[bytes]:
    documents = codec.unpack(data, max_bytes=MAX_CHAIN_BYTES)
    if not isinstance(documents, list) or not documents:
        raise FormatError("publisher file: expected an array of root documents")
    found = [document for document in documents if isinstance(document, bytes)]
    if len(found) != len(documents):
        raise FormatError("publisher file: expected an array of root documents")
    return found


def _parse_root(document: bytes) -> Metadata[Root]:
    if len(document) > MAX_ROOT_BYTES:
        raise FormatError(f"root document of {len(document)} bytes exceeds the limit of {MAX_ROOT_BYTES}")
    try:
        root = Metadata[Root].from_bytes(document)
    except (DeserializationError, RecursionError) as exc:
        raise FormatError("root document is not TUF root metadata") from exc
    if root.signed.type != Root.type:
        raise FormatError(f"expected root metadata, got '{root.signed.type}'")
    _lint_keys(root.signed)
    return root


def _lint_keys(root: Root) -> None:
    material: dict[bytes, str] = {}
    for keyid, key in root.keys.items():
        raw = _public_key(key).raw
        if raw in material:
            raise FormatError("root document lists one key under two ids: it would count twice")
        material[raw] = keyid
    for name, role in root.roles.items():
        if not 1 <= role.threshold <= len(role.keyids) or any(keyid not in root.keys for keyid in role.keyids):
            raise FormatError(f"root document: role '{name}' can never reach its threshold")
    online = set(root.roles[POINTER_ROLE].keyids)
    for name in (Root.type, Targets.type):
        if online & set(root.roles[name].keyids):
            raise FormatError(f"root document: the timestamp key also serves '{name}'")


def _public_key(key: Key) -> PublicKey:
    if not isinstance(key, SSlibKey) or key.keytype != "ed25519" or key.scheme != "ed25519":
        raise FormatError(f"root document: key type '{key.keytype}' is not accepted, only ed25519")
    try:
        return PublicKey(bytes.fromhex(key.keyval["public"]))
    except (KeyError, ValueError, TypeError) as exc:
        raise FormatError("root document: malformed ed25519 key") from exc
