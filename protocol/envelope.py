"""The envelope: a manifest's exact bytes with the signatures over them.

DSSE (https://github.com/secure-systems-lab/dsse, v1.0.2) in canonical msgpack instead of JSON. What is signed is the
pre-authentication encoding of type and payload, so a signature over bytes of another type can never count here, and the
payload is decoded only after its signature was checked.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.manifest import MAX_MANIFEST_BYTES

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

PAYLOAD_TYPE = "application/vnd.modelp2p.manifest+msgpack;v=1"
MAX_SIGNATURES = 16
MAX_ENVELOPE_BYTES = MAX_MANIFEST_BYTES + (16 << 10)
SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Signature:
    """One Ed25519 signature and the TUF key id (64 hex) of the key that made it."""

    keyid: str
    sig: bytes

    def __post_init__(self) -> None:
        if len(self.keyid) != 64 or any(c not in "0123456789abcdef" for c in self.keyid):
            raise FormatError("a signature's keyid must be 64 hex digits")
        if len(self.sig) != SIGNATURE_BYTES:
            raise FormatError(f"a signature must have {SIGNATURE_BYTES} bytes, not {len(self.sig)}")


@dataclass(frozen=True, slots=True)
class Envelope:
    """Payload bytes and signatures; nothing about them is believed yet."""

    payload: bytes
    signatures: tuple[Signature, ...]

    def __post_init__(self) -> None:
        keyids = [signature.keyid for signature in self.signatures]
        if len(keyids) > MAX_SIGNATURES or len(set(keyids)) != len(keyids):
            raise FormatError("an envelope holds each key's signature once, and at most 16")


def pae(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """DSSE pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def encode_envelope(envelope: Envelope) -> bytes:
    """Canonical bytes; their SHA-256 names the statement everywhere."""
    signatures: list[codec.Value] = [{"keyid": s.keyid, "sig": s.sig} for s in envelope.signatures]
    return codec.pack({"payloadType": PAYLOAD_TYPE, "payload": envelope.payload, "signatures": signatures})


def decode_envelope(data: bytes) -> Envelope:
    """The envelope in `data`.

    Raises:
        FormatError: malformed, over the caps, or of another payload type.
    """
    source = codec.unpack_map(data, max_bytes=MAX_ENVELOPE_BYTES)
    codec.only_fields(source, frozenset({"payloadType", "payload", "signatures"}), "envelope")
    kind = codec.take(source, "payloadType", str, "envelope")
    if kind != PAYLOAD_TYPE:
        raise FormatError(f"envelope holds '{kind[:100]}', not a manifest this version knows")
    signatures = []
    for item in codec.take_list(source, "signatures", dict, maximum=MAX_SIGNATURES, where="envelope"):
        entry = cast("Map", item)
        codec.only_fields(entry, frozenset({"keyid", "sig"}), "signature")
        signatures.append(Signature(codec.take(entry, "keyid", str), codec.take(entry, "sig", bytes)))
    return Envelope(codec.take(source, "payload", bytes, "envelope"), tuple(signatures))


def envelope_digest(data: bytes) -> bytes:
    """SHA-256 of an envelope's exact bytes: the statement's id."""
    return hashlib.sha256(data).digest()
