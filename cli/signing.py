"""What this process is willing to sign, and the signature.

Invariants:
- a manifest is signed only if it says exactly what the user asked for, and its info-hash follows from its files: the daemon
  that wrote it cannot make a publisher sign something else;
- the sequence is recorded beside the key before the signature exists;
- the same name, content, metadata and key again give the envelope that exists, not a second statement.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from typing import TYPE_CHECKING, cast

from modelp2p.protocol import torrent
from modelp2p.protocol.envelope import MAX_ENVELOPE_BYTES, Envelope, Signature, decode_envelope, encode_envelope, pae
from modelp2p.protocol.errors import DaemonError, UntrustedError
from modelp2p.protocol.manifest import Manifest, decode_manifest
from modelp2p.protocol.publisher import keyid_of
from modelp2p.protocol.statement import payload_info

if TYPE_CHECKING:
    from modelp2p.cli.connection import Reply
    from modelp2p.cli.keyring import KeyFolder
    from modelp2p.protocol.codec import Map, Value
    from modelp2p.protocol.publisher import RootChain
    from modelp2p.protocol.signing import PrivateKey


def read_prepared(prepared: Reply, asked: Map) -> tuple[Manifest, bytes, bytes | None]:
    """The manifest to sign, its exact bytes, and an envelope that may say the same already.

    Raises:
        DaemonError: the reply holds no manifest.
        UntrustedError: the manifest is not what was asked for.
    """
    contents = prepared.read_fds(MAX_ENVELOPE_BYTES)
    if not 1 <= len(contents) <= 2:
        raise DaemonError("the daemon returned no manifest to sign")
    manifest = decode_manifest(contents[0])
    if (said := _said(manifest)) != (wanted := _wanted(asked)):
        wrong = ", ".join(key for key in wanted if said[key] != wanted[key])
        raise UntrustedError(f"the daemon prepared a manifest that differs from what was asked: {wrong}. It was not signed.")
    if torrent.info_hash(payload_info(manifest.revision, manifest.files, manifest.piece_length)) != manifest.info_hash:
        raise UntrustedError("the daemon prepared a manifest whose info-hash is not its content's. It was not signed.")
    return manifest, contents[0], contents[1] if len(contents) == 2 else None


def existing_or_signed(
    manifest: Manifest, payload: bytes, existing: bytes | None, key: PrivateKey, chain: RootChain, folder: KeyFolder
) -> bytes:
    """The envelope to commit: `existing` where it says the same in our name, else a fresh signature over `payload`.

    Raises:
        UsageError: the sequence was used before.
        UntrustedError: the key may not sign for this publisher.
    """
    if existing is not None and _says_the_same(existing, manifest, key, chain):
        return existing
    folder.record_sequence(str(manifest.name), manifest.sequence)
    envelope = Envelope(payload, (Signature(keyid_of(key.public), key.sign(pae(payload))),))
    chain.verify_envelope(envelope)
    return encode_envelope(envelope)


def sealed_memory(name: str, data: bytes) -> int:
    """A descriptor of an anonymous file with `data` that nobody, this process included, can change any more."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def _says_the_same(existing: bytes, manifest: Manifest, key: PrivateKey, chain: RootChain) -> bool:
    envelope = decode_envelope(existing)
    if keyid_of(key.public) not in {signature.keyid for signature in envelope.signatures}:
        return False
    try:
        chain.verify_envelope(envelope)
    except UntrustedError:
        return False
    said = decode_manifest(envelope.payload)
    return dataclasses.replace(said, created=manifest.created, sequence=manifest.sequence) == manifest


def _said(manifest: Manifest) -> Map:
    origin = manifest.origin
    return {
        "name": str(manifest.name),
        "created": manifest.created,
        "sequence": manifest.sequence,
        "license": manifest.license,
        "license_file": manifest.license_file,
        "notes": cast("Map", dict(manifest.notes)),
        "lineage": [
            {"relation": item.relation, "name": item.name, "revision": item.revision, "info_hash": item.info_hash.hex()}
            for item in manifest.lineage
        ],
        "origin": None if origin is None else {"repo": origin.repo, "commit": origin.commit},
        "web_seeds": list(manifest.web_seeds),
        "trackers": list(manifest.trackers),
    }


def _wanted(asked: Map) -> Map:
    keys = ("name", "created", "sequence", "license", "license_file", "notes", "lineage", "origin", "web_seeds", "trackers")
    wanted: dict[str, Value] = {key: asked.get(key) for key in keys}
    return wanted
