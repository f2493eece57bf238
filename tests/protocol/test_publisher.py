"""Root chains: thresholds, gaps, forks and key tricks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from modelp2p.protocol import codec
from modelp2p.protocol.envelope import PAYLOAD_TYPE, Envelope, Signature, pae
from modelp2p.protocol.errors import FormatError, ModelP2PError, UntrustedError
from modelp2p.protocol.names import publisher_id_of
from modelp2p.protocol.publisher import (
    MAX_CHAIN_BYTES,
    MAX_ROOT_BYTES,
    MAX_ROOTS,
    decode_chain,
    encode_chain,
    keyid_of,
    make_solo_root,
    newer_chain,
    verify_chain,
)
from tests.protocol.roots import EXPIRES, key, keyid, reparsed, root_of
from tests.protocol.test_signing import SMALL_ORDER

PAYLOAD = b"the manifest"


def envelope(*words: str, payload: bytes = PAYLOAD, kind: str = PAYLOAD_TYPE) -> Envelope:
    return Envelope(payload, tuple(Signature(keyid(word), key(word).sign(pae(payload, kind))) for word in words))


def test_solo_root_is_a_chain_of_one() -> None:
    document = make_solo_root(key("a"), key("online"), EXPIRES)
    chain = verify_chain([document])
    assert chain.version == 1
    assert chain.expires == EXPIRES
    assert chain.publisher_id == publisher_id_of(document)
    assert chain.release_keyids() == (keyid_of(key("a").public),)
    chain.verify_envelope(envelope("a"))
    assert decode_chain(encode_chain([document])) == chain
    reparsed(document).verify_delegate("root", reparsed(document))


THREE, TWO = ("a", "b", "c"), {"root": 2}
CHAINS: dict[str, list[bytes]] = {
    "solo": [root_of()],
    "two of three": [root_of(root=THREE, thresholds=TWO, signers=("a", "c"))],
    "release key replaced": [root_of(), root_of(2, targets=("r",))],
    "root key replaced, signed by old and new": [root_of(), root_of(2, root=("b",), signers=("a", "b"))],
    "grown to two of three": [root_of(), root_of(2, root=THREE, thresholds=TWO, signers=("a", "b"))],
    "three steps": [root_of(), root_of(2), root_of(3, targets=("r",))],
    "a spare bad signature": [root_of(signers=("a", "z"))],
}


@pytest.mark.parametrize("name", CHAINS)
def test_honest_chain_is_accepted(name: str) -> None:
    chain = verify_chain(CHAINS[name])
    assert chain.version == len(CHAINS[name])
    assert chain.publisher_id == publisher_id_of(CHAINS[name][0])


def at(*steps: str, to: object) -> Callable[[dict[str, Any]], None]:
    def bend(signed: dict[str, Any]) -> None:
        for step in steps[:-1]:
            signed = signed[step]
        signed[steps[-1]] = to

    return bend


def second_id(signed: dict[str, Any]) -> None:
    """The one key of role `targets` once more, under a made-up id: python-tuf would count it twice."""
    signed["keys"]["f" * 64] = dict(signed["keys"][keyid("a")])
    signed["roles"]["targets"] = {"keyids": [keyid("a"), "f" * 64], "threshold": 2}


def second_spelling(signed: dict[str, Any]) -> None:
    copy = json.loads(json.dumps(signed["keys"][keyid("a")]))
    copy["keyval"]["public"] = copy["keyval"]["public"].upper()
    signed["keys"]["f" * 64] = copy
    signed["roles"]["targets"] = {"keyids": [keyid("a"), "f" * 64], "threshold": 2}


def weak_key(raw: bytes) -> Callable[[dict[str, Any]], None]:
    def bend(signed: dict[str, Any]) -> None:
        signed["keys"]["f" * 64] = {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": raw.hex()}}
        signed["roles"]["targets"]["keyids"].append("f" * 64)

    return bend


def foreign_key(**fields: object) -> Callable[[dict[str, Any]], None]:
    def bend(signed: dict[str, Any]) -> None:
        signed["keys"][keyid("a")] = signed["keys"][keyid("a")] | fields

    return bend


BAD_DOCUMENTS: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"\x80",
    "nested 100,000 deep": b"[" * 60_000,
    "a list": b"[]",
    "no signatures": root_of(signers=()),
    "signed by a stranger": root_of(signers=("z",)),
    "one of two signatures": root_of(root=("a", "b"), thresholds={"root": 2}, signers=("a",)),
    "one signature twice": root_of(root=("a", "b"), thresholds={"root": 2}, signers=("a", "a")),
    "threshold 0": root_of(thresholds={"root": 0}),
    "threshold -1": root_of(thresholds={"targets": -1}),
    "threshold of targets 0": root_of(thresholds={"targets": 0}),
    "threshold above its keys": root_of(thresholds={"targets": 2}),
    "threshold of timestamp above its keys": root_of(thresholds={"timestamp": 9}),
    "role without keys": root_of(bend=at("roles", "targets", "keyids", to=[])),
    "role with a key nobody has": root_of(bend=at("roles", "targets", "keyids", to=["e" * 64])),
    "no timestamp role": root_of(bend=lambda signed: signed["roles"].pop("timestamp")),
    "one key under two ids": root_of(bend=second_id),
    "one key in two spellings": root_of(bend=second_spelling),
    "timestamp key in targets": root_of(timestamp=("a",), root=("b",)),
    "timestamp key in root": root_of(timestamp=("a",), targets=("b",)),
    "timestamp key among root's": root_of(root=("a", "online")),
    "other type": root_of(bend=at("_type", to="targets")),
    "other specification": root_of(bend=at("spec_version", to="9.0.0")),
    "no expiry": root_of(bend=lambda signed: signed.pop("expires")),
    "RSA key": root_of(bend=foreign_key(keytype="rsa", scheme="rsassa-pss-sha256")),
    "ECDSA key": root_of(bend=foreign_key(keytype="ecdsa", scheme="ecdsa-sha2-nistp256")),
    "ed25519 of another scheme": root_of(bend=foreign_key(scheme="ed25519ph")),
    "key of 31 bytes": root_of(bend=weak_key(bytes(31))),
    "key that is not hex": root_of(bend=foreign_key(keyval={"public": "zz" * 32})),
    "key without value": root_of(bend=foreign_key(keyval={})),
    "version 2 as first": root_of(2),
    "version 0": root_of(bend=at("version", to=0)),
    "one byte over the cap": root_of() + b" " * (MAX_ROOT_BYTES + 1 - len(root_of())),
    **{f"small order, {name}": root_of(bend=weak_key(raw)) for name, raw in SMALL_ORDER.items()},
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_first_root_is_refused(name: str) -> None:
    with pytest.raises(UntrustedError):
        verify_chain([BAD_DOCUMENTS[name]])


def test_root_of_exactly_the_cap_passes() -> None:
    assert verify_chain([root_of() + b" " * (MAX_ROOT_BYTES - len(root_of()))]).version == 1


BAD_CHAINS: dict[str, list[bytes]] = {
    "none": [],
    "gap": [root_of(), root_of(3)],
    "same version twice": [root_of(), root_of()],
    "backwards": [root_of(2), root_of(1)],
    "not signed by the previous": [root_of(), root_of(2, root=("b",), signers=("b",))],
    "not signed by itself": [root_of(), root_of(2, root=("b",), signers=("a",))],
    "signed by one of two previous": [
        root_of(root=("a", "b"), thresholds={"root": 2}, signers=("a", "b")),
        root_of(2, root=("a",), signers=("a",)),
    ],
    "signed by the previous but one": [
        root_of(),
        root_of(2, root=("b",), signers=("a", "b")),
        root_of(3, root=("a",), signers=("a",)),
    ],
    "second root of a stranger": [root_of(), root_of(2, root=("z",), signers=("z",))],
    "257 documents": [root_of()] * (MAX_ROOTS + 1),
}


@pytest.mark.parametrize("name", BAD_CHAINS)
def test_broken_chain_is_refused(name: str) -> None:
    with pytest.raises(UntrustedError):
        verify_chain(BAD_CHAINS[name])


def test_one_changed_byte_in_a_root_is_refused_or_another_publisher() -> None:
    document = root_of()
    for position in range(0, len(document), 3):
        bent = bytearray(document)
        bent[position] ^= 1
        try:
            chain = verify_chain([bytes(bent)])
        except UntrustedError:
            continue
        assert chain.publisher_id != publisher_id_of(document)


BAD_CHAIN_BYTES = {
    "text documents": codec.pack(["{}"]),
    "a map": codec.pack({"roots": []}),
    "nested": codec.pack([[root_of()]]),
    "empty array": codec.pack([]),
    "trailing": encode_chain([root_of()]) + b"\0",
    "too long": bytes(MAX_CHAIN_BYTES + 1),
}


@pytest.mark.parametrize("name", BAD_CHAIN_BYTES)
def test_malformed_publisher_file_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        decode_chain(BAD_CHAIN_BYTES[name])


TWO_OF_THREE = [root_of(targets=("r", "s", "t"), thresholds={"targets": 2})]
SIGNED = {
    "one of one": ([root_of()], envelope("a")),
    "two of three": (TWO_OF_THREE, envelope("r", "t")),
    "three of three": (TWO_OF_THREE, envelope("r", "s", "t")),
    "a stranger's beside": (TWO_OF_THREE, envelope("r", "z", "t")),
    "new key after rotation": (CHAINS["release key replaced"], envelope("r")),
}


@pytest.mark.parametrize("name", SIGNED)
def test_threshold_of_release_keys_is_enough(name: str) -> None:
    documents, signed = SIGNED[name]
    verify_chain(documents).verify_envelope(signed)


def test_one_bad_signature_beside_a_good_threshold_is_no_obstacle() -> None:
    bad = Signature(keyid("s"), bytes(64))
    verify_chain(TWO_OF_THREE).verify_envelope(Envelope(PAYLOAD, (bad, *envelope("r", "t").signatures)))


FORGED = {
    "no signature": ([root_of()], Envelope(PAYLOAD, ())),
    "signature of zeros": ([root_of()], Envelope(PAYLOAD, (Signature(keyid("a"), bytes(64)),))),
    "wrong key": ([root_of()], envelope("z")),
    "wrong key under the right id": ([root_of()], Envelope(PAYLOAD, (Signature(keyid("a"), key("z").sign(pae(PAYLOAD))),))),
    "the timestamp key": ([root_of()], envelope("online")),
    "the root key where another releases": ([root_of(targets=("r",))], envelope("a")),
    "one of two": (TWO_OF_THREE, envelope("r")),
    "one good and one bad of two": (
        TWO_OF_THREE,
        Envelope(PAYLOAD, (*envelope("r").signatures, Signature(keyid("s"), bytes(64)))),
    ),
    "other payload": ([root_of()], Envelope(PAYLOAD + b" ", envelope("a").signatures)),
    "payload signed without its type": ([root_of()], Envelope(PAYLOAD, (Signature(keyid("a"), key("a").sign(PAYLOAD)),))),
    "payload signed under another type": ([root_of()], envelope("a", kind="application/vnd.in-toto+json")),
    "a release key that was dropped": (CHAINS["release key replaced"], envelope("a")),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_envelope_is_refused_with_exit_code_4(name: str) -> None:
    documents, forged = FORGED[name]
    with pytest.raises(UntrustedError) as caught:
        verify_chain(documents).verify_envelope(forged)
    assert caught.value.kind.exit_code == 4


def test_newer_chain_of_one_publisher_wins_from_either_side() -> None:
    old, new = verify_chain([root_of()]), verify_chain([root_of(), root_of(2, targets=("r",))])
    assert newer_chain(old, new) is new
    assert newer_chain(new, old) is new
    assert newer_chain(old, old) is old


FORKS = {
    "second root": ([root_of(), root_of(2, targets=("r",))], [root_of(), root_of(2, targets=("s",))]),
    "second root, one chain longer": (
        [root_of(), root_of(2, targets=("r",))],
        [root_of(), root_of(2, targets=("s",)), root_of(3, targets=("s",))],
    ),
    "other publisher": ([root_of()], [root_of(targets=("r",)), root_of(2)]),
}


@pytest.mark.parametrize("name", FORKS)
def test_forked_chains_are_refused_from_either_side(name: str) -> None:
    one, other = (verify_chain(documents) for documents in FORKS[name])
    for first, second in ((one, other), (other, one)):
        with pytest.raises(UntrustedError):
            newer_chain(first, second)


SECOND = root_of(2, root=("a", "b"), signers=("a", "b"))
DECORATED = {
    "white space": SECOND.replace(b", ", b",  "),
    "a spare signature": root_of(2, root=("a", "b"), signers=("a", "b", "z")),
    "a signature less than were made": root_of(2, root=("a", "b"), signers=("a",)),
}


@pytest.mark.parametrize("name", DECORATED)
def test_what_anyone_may_add_to_a_root_makes_no_fork(name: str) -> None:
    """Else a mirror could plant such a copy first, and the publisher's own chain would be refused for ever after."""
    plain, decorated = verify_chain([root_of(), SECOND]), verify_chain([root_of(), DECORATED[name]])
    assert plain.documents != decorated.documents
    assert newer_chain(decorated, plain) is decorated
    third = verify_chain([root_of(), SECOND, root_of(3, root=("a", "b"), signers=("a",))])
    assert newer_chain(decorated, third) is third


def test_chain_errors_never_escape_the_tree() -> None:
    for junk in (b"{}", b'{"signed":{}}', b'{"signed":{"_type":"root"},"signatures":[]}', b"null", b"1e999", b'"\\ud800"'):
        with pytest.raises(ModelP2PError):
            verify_chain([junk])
