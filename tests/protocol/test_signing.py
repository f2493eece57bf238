"""Keys: vectors of RFC 8032, and every encoding of a point of small order, derived here from the curve itself."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from modelp2p.protocol.errors import FormatError, UntrustedError
from modelp2p.protocol.signing import PrivateKey, PublicKey

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
SQRT_M1 = pow(2, (P - 1) // 4, P)
Point = tuple[int, int]
IDENTITY: Point = (0, 1)


def add(a: Point, b: Point) -> Point:
    """Addition on -x^2 + y^2 = 1 + d x^2 y^2 (RFC 8032, 5.1)."""
    cross = D * a[0] * b[0] * a[1] * b[1] % P
    x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + cross, -1, P) % P
    y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - cross, -1, P) % P
    return x, y


def multiply(point: Point, factor: int) -> Point:
    result = IDENTITY
    while factor:
        if factor & 1:
            result = add(result, point)
        point, factor = add(point, point), factor >> 1
    return result


def x_of(y: int) -> int | None:
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    for root in (x, x * SQRT_M1 % P):
        if root * root % P == square:
            return root
    return None


def small_order_points() -> set[Point]:
    """The eight points of order 1, 2, 4 and 8: L times any point of full order generates them."""
    for y in range(2, 1000):
        x = x_of(y)
        if x is None:
            continue
        torsion = multiply((x, y), L)
        points = {multiply(torsion, factor) for factor in range(8)}
        if len(points) == 8:
            return points
    raise AssertionError("no generator of the torsion group")


def encodings() -> dict[str, bytes]:
    """Every 32 bytes that some decoder takes for a point of small order: non-canonical y, and either sign bit."""
    found = {}
    for y in {y for _, y in small_order_points()}:
        for value in (y, y + P):
            for sign in (0, 1):
                if value < 2**255:
                    found[f"sign={sign} y={value:x}"] = (value | sign << 255).to_bytes(32, "little")
    return found


SMALL_ORDER = encodings()


def test_there_are_fourteen_encodings() -> None:
    assert len(SMALL_ORDER) == len(set(SMALL_ORDER.values())) == 14


@pytest.mark.parametrize("name", SMALL_ORDER)
def test_key_of_small_order_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        PublicKey(SMALL_ORDER[name])


def test_why_such_keys_must_be_refused() -> None:
    # R = identity, S = 0 verifies under the identity key, whatever the message: the library does not object.
    identity = (1).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(identity).verify(identity + bytes(32), b"any message")


@pytest.mark.parametrize("y", [P, P + 1, P + 2, P + 18, 2**255 - 1])
@pytest.mark.parametrize("sign", [0, 1])
def test_key_that_is_not_canonical_is_refused(y: int, sign: int) -> None:
    with pytest.raises(FormatError):
        PublicKey((y | sign << 255).to_bytes(32, "little"))


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(FormatError):
        PublicKey(b"\x09" * length)
    with pytest.raises(FormatError):
        PrivateKey(b"\x09" * length)


# RFC 8032, 7.1: (seed, public key, message, signature).
VECTORS = {
    "TEST 1": (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    "TEST 2": (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_rfc_8032(name: str) -> None:
    seed, public, message, signature = (bytes.fromhex(part) for part in VECTORS[name])
    key = PrivateKey(seed)
    assert key.public == PublicKey(public)
    assert key.sign(message) == signature
    key.public.verify(signature, message)


def forgeries(signature: bytes) -> dict[str, bytes]:
    r, s = signature[:32], int.from_bytes(signature[32:], "little")
    return {
        "empty": b"",
        "truncated": signature[:-1],
        "padded": signature + b"\0",
        "zero": bytes(64),
        "first bit": bytes([signature[0] ^ 1]) + signature[1:],
        "last bit": signature[:-1] + bytes([signature[-1] ^ 0x80]),
        "S plus the group order": r + (s + L).to_bytes(32, "little"),
    }


@pytest.mark.parametrize("name", forgeries(bytes(64)))
def test_forged_signature_is_refused(name: str) -> None:
    key = PrivateKey(b"\x07" * 32)
    with pytest.raises(UntrustedError):
        key.public.verify(forgeries(key.sign(b"m"))[name], b"m")


def test_signature_of_other_key_or_message_is_refused() -> None:
    one, other = PrivateKey(b"\x01" * 32), PrivateKey(b"\x02" * 32)
    for key, message in ((other, b"m"), (one, b"n")):
        with pytest.raises(UntrustedError):
            one.public.verify(key.sign(message), b"m")


def test_no_repr_shows_the_seed() -> None:
    seed = b"\x5a" * 32
    shown = repr(PrivateKey(seed)) + str(PrivateKey(seed))
    assert seed.hex() not in shown
    assert repr(seed)[2:-1] not in shown
