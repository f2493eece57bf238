"""Root documents for tests: any roles, thresholds and signers, signed or left unsigned on purpose."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from securesystemslib.signer import Signature
from tuf.api.metadata import Metadata, Root

from modelp2p.protocol.publisher import tuf_key
from modelp2p.protocol.signing import PrivateKey

EXPIRES = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)
ROLES = ("root", "targets", "snapshot", "timestamp")


@cache
def key(word: str) -> PrivateKey:
    """A key that follows from a word."""
    return PrivateKey(hashlib.sha256(f"root key {word}".encode()).digest())


def keyid(word: str) -> str:
    """The TUF key id of `key(word)`."""
    return tuf_key(key(word).public).keyid


def root_of(
    version: int = 1,
    *,
    root: Iterable[str] = ("a",),
    targets: Iterable[str] = ("a",),
    timestamp: Iterable[str] = ("online",),
    thresholds: Mapping[str, int] | None = None,
    signers: Iterable[str] | None = None,
    bend: Callable[[dict[str, Any]], None] = lambda signed: None,
) -> bytes:
    """A root document; keys are named by words. `bend` may change the signed part before it is signed."""
    root = tuple(root)
    document = Root(version=version, expires=EXPIRES, consistent_snapshot=True)
    for role, words in {"root": root, "targets": targets, "snapshot": targets, "timestamp": timestamp}.items():
        for word in words:
            document.add_key(tuf_key(key(word).public), role)
    signed = document.to_dict()
    for role, threshold in (thresholds or {}).items():
        signed["roles"][role]["threshold"] = threshold
    bend(signed)
    return sign(signed, root if signers is None else signers)


def sign(signed: dict[str, Any], signers: Iterable[str]) -> bytes:
    """The document around `signed`, signed by these words' keys; not checked for sense."""
    # The canonical JSON of TUF: sorted keys, no spaces. All our values are ASCII.
    message = json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()
    signatures = [Signature(keyid(word), key(word).sign(message).hex()).to_dict() for word in signers]
    return json.dumps({"signatures": signatures, "signed": signed}).encode()


def reparsed(document: bytes) -> Metadata[Root]:
    """The document as python-tuf reads it."""
    return Metadata[Root].from_bytes(document)
