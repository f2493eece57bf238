"""Key files: Ed25519 seeds at rest (docs/DESIGN.md).

Byte form: magic, then canonical msgpack {v, kdf, public, role, ...}. With a passphrase the seed is sealed by
ChaCha20-Poly1305 under Argon2id, with everything else in the file as associated data; PKCS#8's 2,048 rounds of PBKDF2 are
why that standard is not used. Without one (`kdf` "none") the file mode is the only guard, and the caller says so.

Pure: bytes in, bytes out. Reading, writing and permissions belong to the command that owns the key folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from modelp2p.protocol import codec
from modelp2p.protocol.errors import DeniedError, FormatError
from modelp2p.protocol.signing import KEY_BYTES, PrivateKey, PublicKey

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

MAGIC = b"MP2PKEY\n"
MAX_KEYFILE_BYTES = 4096
VERSION = 1
SALT_BYTES = 16
NONCE_BYTES = 12
TAG_BYTES = 16
ARGON2_MEMORY_KIB = 64 << 10
ARGON2_PASSES = 3
# A key file could ask this process for any amount of memory: bound it to 16 times our own choice.
MAX_MEMORY_KIB = 1 << 20
MAX_PASSES = 16


@dataclass(frozen=True, slots=True)
class SealedKey:
    """A parsed key file; the seed is not open yet."""

    public: PublicKey
    role: str
    is_encrypted: bool
    _fields: Map = field(repr=False)

    def open(self, passphrase: str | None) -> PrivateKey:
        """The private key.

        Raises:
            DeniedError: no or a wrong passphrase.
            FormatError: the seed does not belong to the stated public key.
        """
        seed = _unseal(self._fields, passphrase) if self.is_encrypted else codec.take_bytes(self._fields, "seed", 32, "key file")
        key = PrivateKey(seed)
        if key.public != self.public:
            raise FormatError("key file: seed and public key do not belong together")
        return key


def seal_key(key_seed: bytes, role: str, passphrase: str | None, salt: bytes, nonce: bytes) -> bytes:
    """The bytes of a key file; `salt` and `nonce` are fresh random bytes of the caller's."""
    public = PrivateKey(key_seed).public.raw
    fields: Map = {"v": VERSION, "role": role, "public": public}
    if passphrase is None:
        fields |= {"kdf": "none", "seed": key_seed}
        return MAGIC + codec.pack(fields)
    fields |= {
        "kdf": "argon2id",
        "memory_kib": ARGON2_MEMORY_KIB,
        "passes": ARGON2_PASSES,
        "salt": salt,
        "nonce": nonce,
    }
    sealed = _cipher(fields, passphrase).encrypt(nonce, key_seed, codec.pack(fields))
    return MAGIC + codec.pack({**fields, "sealed": sealed})


def parse_key(data: bytes) -> SealedKey:
    """The key file in `data`.

    Raises:
        FormatError: not a key file, truncated, or with parameters out of bounds.
    """
    if not data.startswith(MAGIC):
        raise FormatError("not a modelp2p key file")
    fields = codec.unpack_map(memoryview(data)[len(MAGIC) :], max_bytes=MAX_KEYFILE_BYTES)
    if codec.take_uint(fields, "v", maximum=2**32, where="key file") != VERSION:
        raise FormatError("this key file has a version that is not known here", hint="Update modelp2p.")
    kdf = codec.take(fields, "kdf", str, "key file")
    if kdf not in ("none", "argon2id"):
        raise FormatError(f"key file: key derivation '{kdf[:40]}' is not known")
    if kdf == "none":
        codec.take_bytes(fields, "seed", KEY_BYTES, "key file")
    else:
        _check_sealed(fields)
    return SealedKey(
        PublicKey(codec.take_bytes(fields, "public", 32, "key file")),
        codec.take(fields, "role", str, "key file"),
        kdf != "none",
        fields,
    )


def _check_sealed(fields: Map) -> None:
    memory = codec.take_uint(fields, "memory_kib", maximum=MAX_MEMORY_KIB, where="key file")
    passes = codec.take_uint(fields, "passes", maximum=MAX_PASSES, where="key file")
    if memory < 8 or passes < 1:
        raise FormatError("key file: key derivation parameters are out of bounds")
    codec.take_bytes(fields, "salt", SALT_BYTES, "key file")
    codec.take_bytes(fields, "nonce", NONCE_BYTES, "key file")
    codec.take_bytes(fields, "sealed", KEY_BYTES + TAG_BYTES, "key file")


def _unseal(fields: Map, passphrase: str | None) -> bytes:
    if passphrase is None:
        raise DeniedError("this key needs its passphrase", hint="Run in a terminal, or give --passphrase-file.")
    public = {key: value for key, value in fields.items() if key != "sealed"}
    nonce = codec.take_bytes(fields, "nonce", NONCE_BYTES, "key file")
    try:
        return _cipher(fields, passphrase).decrypt(nonce, codec.take(fields, "sealed", bytes), codec.pack(public))
    except InvalidTag as exc:
        raise DeniedError("wrong passphrase, or the key file was altered") from exc


def _cipher(fields: Map, passphrase: str) -> ChaCha20Poly1305:
    memory, passes = (codec.take(fields, key, int, "key file") for key in ("memory_kib", "passes"))
    salt = codec.take_bytes(fields, "salt", SALT_BYTES, "key file")
    kdf = Argon2id(salt=salt, length=32, iterations=passes, lanes=1, memory_cost=memory)
    return ChaCha20Poly1305(kdf.derive(passphrase.encode("utf-8")))
