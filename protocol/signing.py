"""Ed25519 keys, signatures and the refusal of keys that verify anything.

`cryptography` accepts public keys of small order; under one of them the signature `R=identity, S=0` verifies every message.
A `PublicKey` that exists is therefore canonical and of large order. Takes key bytes, never paths: key files are `keyfile`.
RFC 8032; small-order points: https://eprint.iacr.org/2020/1244 (table 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from modelp2p.protocol.errors import FormatError, UntrustedError

KEY_BYTES = 32
_P = 2**255 - 19
# y of one point of order 8; the other pair has -y. Order 4 has y = 0, order 2 has y = -1, the identity y = 1.
_ORDER_8_Y = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER_Y = frozenset({0, 1, _P - 1, _ORDER_8_Y, _P - _ORDER_8_Y})


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An Ed25519 public key of large order, 32 bytes."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise FormatError(f"an Ed25519 public key has {KEY_BYTES} bytes, not {len(self.raw)}")
        y = int.from_bytes(self.raw, "little") & ((1 << 255) - 1)
        if y >= _P:
            raise FormatError("public key is not canonically encoded")
        if y in _SMALL_ORDER_Y:
            raise FormatError("public key is of small order: it would verify any message")

    def verify(self, signature: bytes, message: bytes) -> None:
        """Return if `signature` over `message` is this key's.

        Raises:
            UntrustedError: it is not.
        """
        try:
            self.to_cryptography().verify(signature, message)
        except (InvalidSignature, ValueError) as exc:
            raise UntrustedError("signature does not match") from exc

    def to_cryptography(self) -> Ed25519PublicKey:
        """The same key as a `cryptography` object."""
        return Ed25519PublicKey.from_public_bytes(self.raw)


class PrivateKey:
    """An Ed25519 private key in memory; its repr never shows it."""

    __slots__ = ("_key", "public")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != KEY_BYTES:
            raise FormatError(f"an Ed25519 seed has {KEY_BYTES} bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = PublicKey(self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    def sign(self, message: bytes) -> bytes:
        """The 64-byte deterministic signature over `message`."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"PrivateKey(public={self.public.raw.hex()})"
