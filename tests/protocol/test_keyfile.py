"""Keys at rest: nothing opens without the passphrase, nothing in the file can be bent, nothing shows the seed."""

from __future__ import annotations

import time
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from modelp2p.protocol import codec
from modelp2p.protocol.errors import DeniedError, FormatError, ModelP2PError
from modelp2p.protocol.keyfile import MAGIC, MAX_MEMORY_KIB, MAX_PASSES, parse_key, seal_key
from modelp2p.protocol.signing import PrivateKey

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

SEED = bytes(range(100, 132))
SALT, NONCE = b"s" * 16, b"n" * 12
OPEN = seal_key(SEED, "release", None, SALT, NONCE)
SEALED = seal_key(SEED, "release", "correct horse", SALT, NONCE)


def bent(data: bytes, **changes: Value) -> bytes:
    fields = codec.unpack_map(data[len(MAGIC) :], max_bytes=4096)
    return MAGIC + codec.pack({**fields, **changes})


def test_sealed_key_opens_with_its_passphrase_only() -> None:
    sealed = parse_key(SEALED)
    assert sealed.is_encrypted
    assert sealed.role == "release"
    assert sealed.public == PrivateKey(SEED).public
    assert sealed.open("correct horse").sign(b"m") == PrivateKey(SEED).sign(b"m")
    for wrong in ("", "correct horse ", "Correct horse", None):
        with pytest.raises(DeniedError) as caught:
            sealed.open(wrong)
        assert caught.value.kind.exit_code == 10


def test_key_without_passphrase_says_so() -> None:
    key = parse_key(OPEN)
    assert not key.is_encrypted
    assert key.open(None).public == PrivateKey(SEED).public


def test_the_seed_is_not_in_a_sealed_file_nor_in_any_repr() -> None:
    assert SEED not in SEALED
    assert SEED in OPEN
    for key in (parse_key(SEALED), parse_key(OPEN)):
        assert repr(SEED)[2:-1] not in repr(key)
        assert SEED.hex() not in repr(key)
        assert "seed" not in repr(key)


@pytest.mark.parametrize("data", [OPEN, SEALED], ids=["open", "sealed"])
def test_truncated_at_every_byte_is_a_format_error(data: bytes) -> None:
    for end in range(len(data)):
        with pytest.raises(FormatError):
            parse_key(data[:end])
    with pytest.raises(FormatError):
        parse_key(data + b"\0")


MALFORMED: dict[str, tuple[bytes, Map]] = {
    "version 0": (OPEN, {"v": 0}),
    "version 2": (OPEN, {"v": 2}),
    "unknown derivation": (SEALED, {"kdf": "rot13"}),
    "derivation taken away": (SEALED, {"kdf": "none"}),
    "memory above the cap": (SEALED, {"memory_kib": MAX_MEMORY_KIB + 1}),
    "memory of 4 TiB": (SEALED, {"memory_kib": 2**32}),
    "no memory": (SEALED, {"memory_kib": 0}),
    "passes above the cap": (SEALED, {"passes": MAX_PASSES + 1}),
    "passes absurd": (SEALED, {"passes": 2**63}),
    "no pass": (SEALED, {"passes": 0}),
    "negative passes": (SEALED, {"passes": -1}),
    "short salt": (SEALED, {"salt": b"s"}),
    "short nonce": (SEALED, {"nonce": b"n"}),
    "short seal": (SEALED, {"sealed": bytes(47)}),
    "empty seal": (SEALED, {"sealed": b""}),
    "short seed": (OPEN, {"seed": bytes(31)}),
    "public key of small order": (OPEN, {"public": (1).to_bytes(32, "little")}),
    "public key of 31 bytes": (OPEN, {"public": bytes(31)}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_key_file_is_refused_at_once(name: str) -> None:
    data, changes = MALFORMED[name]
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(FormatError):
        parse_key(bent(data, **changes))
    assert time.perf_counter() - started < 0.25
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


OTHER = PrivateKey(b"\x01" * 32).public.raw
ALTERED: dict[str, Map] = {
    "role": {"role": "pointer"},
    "public key": {"public": OTHER},
    "less memory": {"memory_kib": 64},
    "other salt": {"salt": b"t" * 16},
    "other nonce": {"nonce": b"m" * 12},
    "other seal": {"sealed": bytes(48)},
    "one field more": {"comment": "x"},
}


@pytest.mark.parametrize("name", ALTERED)
def test_altered_sealed_file_does_not_open(name: str) -> None:
    with pytest.raises(ModelP2PError):
        parse_key(bent(SEALED, **ALTERED[name])).open("correct horse")


def test_open_seed_of_another_public_key_is_refused() -> None:
    with pytest.raises(FormatError, match="belong"):
        parse_key(bent(OPEN, public=OTHER)).open(None)


@pytest.mark.parametrize("data", [b"", b"MP2PKEY", b"-----BEGIN PRIVATE KEY-----", MAGIC, MAGIC + bytes(5000)])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_key(data)
