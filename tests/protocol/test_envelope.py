"""Envelopes: exact bytes, exact type, each key once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from modelp2p.protocol import codec
from modelp2p.protocol.envelope import (
    MAX_ENVELOPE_BYTES,
    MAX_SIGNATURES,
    PAYLOAD_TYPE,
    Envelope,
    Signature,
    decode_envelope,
    encode_envelope,
    envelope_digest,
    pae,
)
from modelp2p.protocol.errors import FormatError

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value


def signature(number: int = 0) -> Signature:
    return Signature(f"{number:064x}", bytes([number]) * 64)


def test_pae_is_the_vector_of_the_dsse_specification() -> None:
    # https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
    assert pae(b"hello world", "http://example.com/HelloWorld") == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_pae_cannot_be_shifted_between_type_and_payload() -> None:
    assert pae(b"b 1 c", "a") != pae(b"c", "a 5 b")
    assert pae(b"", PAYLOAD_TYPE) != pae(b" ", PAYLOAD_TYPE)


@pytest.mark.parametrize("count", [0, 1, 2, MAX_SIGNATURES])
def test_round_trip(count: int) -> None:
    envelope = Envelope(b"payload", tuple(signature(number) for number in range(count)))
    assert decode_envelope(encode_envelope(envelope)) == envelope


def test_one_key_signs_once_and_at_most_sixteen_do() -> None:
    with pytest.raises(FormatError):
        Envelope(b"", (signature(1), Signature(signature(1).keyid, bytes(64))))
    with pytest.raises(FormatError):
        Envelope(b"", tuple(signature(number) for number in range(MAX_SIGNATURES + 1)))


def body(**changes: Value) -> Map:
    entry: Map = {"keyid": "0" * 64, "sig": bytes(64)}
    good: Map = {"payloadType": PAYLOAD_TYPE, "payload": b"x", "signatures": [entry]}
    return good | changes


BENT: dict[str, Map] = {
    "type of in-toto": body(payloadType="application/vnd.in-toto+json"),
    "type of a later version": body(payloadType=PAYLOAD_TYPE[:-1] + "2"),
    "type with a space": body(payloadType=PAYLOAD_TYPE + " "),
    "payload as text": body(payload="x"),
    "unknown field": body(extra=1),
    "signatures as map": body(signatures={}),
    "signature as bytes": body(signatures=[b"x"]),
    "signature with more": body(signatures=[{"keyid": "0" * 64, "sig": bytes(64), "cert": b""}]),
    "signature without key": body(signatures=[{"sig": bytes(64)}]),
    "signature of 63 bytes": body(signatures=[{"keyid": "0" * 64, "sig": bytes(63)}]),
    "key id in capitals": body(signatures=[{"keyid": "A" * 64, "sig": bytes(64)}]),
    "key id of 63 digits": body(signatures=[{"keyid": "0" * 63, "sig": bytes(64)}]),
    "key id as bytes": body(signatures=[{"keyid": bytes(32), "sig": bytes(64)}]),
    "one key twice": body(signatures=[{"keyid": "0" * 64, "sig": bytes(64)}] * 2),
    "seventeen signatures": body(signatures=[{"keyid": f"{n:064x}", "sig": bytes(64)} for n in range(17)]),
    "no payload": {key: value for key, value in body().items() if key != "payload"},
}


@pytest.mark.parametrize("name", BENT)
def test_bent_envelope_is_refused(name: str) -> None:
    assert decode_envelope(codec.pack(body())).payload == b"x"
    with pytest.raises(FormatError):
        decode_envelope(codec.pack(BENT[name]))


def test_size_is_capped_before_anything_else() -> None:
    with pytest.raises(FormatError, match="limit"):
        decode_envelope(bytes(MAX_ENVELOPE_BYTES + 1))


def test_every_single_bit_flip_is_refused_or_another_statement() -> None:
    data = encode_envelope(Envelope(b"small payload", (signature(7),)))
    for bit in range(len(data) * 8):
        bent = bytearray(data)
        bent[bit // 8] ^= 1 << bit % 8
        assert envelope_digest(bytes(bent)) != envelope_digest(data)
        try:
            envelope = decode_envelope(bytes(bent))
        except FormatError:
            continue
        assert envelope != decode_envelope(data)


def test_truncated_and_padded_envelopes_are_refused() -> None:
    data = encode_envelope(Envelope(b"x", (signature(),)))
    for end in range(len(data)):
        with pytest.raises(FormatError):
            decode_envelope(data[:end])
    with pytest.raises(FormatError):
        decode_envelope(data + b"\xc0")
