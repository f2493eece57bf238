"""Jobs: one request is one sequence of bytes, and nothing else is a job."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError, UntrustedError
from modelp2p.protocol.job import (
    MAGIC,
    MAX_JOB_BYTES,
    MAX_PATTERNS,
    MAX_PEERS,
    MAX_RATE,
    MAX_TIMEOUT_S,
    Job,
    decode_job,
    encode_job,
)
from modelp2p.protocol.links import Link, PeerAddress
from modelp2p.protocol.names import ModelName, PublisherId

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

HASH, STATEMENT = bytes(range(32)), b"s" * 32
PEERS = (PeerAddress("127.0.0.1", 16881), PeerAddress("::1", 1), PeerAddress("seed.example", 65535))
LINK = Link(HASH, ModelName.parse("lab/model"), b"m" * 32, PublisherId("mp1" + "a" * 52), peers=PEERS)
PLAIN = Job(HASH, STATEMENT)
FULL = Job(HASH, STATEMENT, LINK, ("*.safetensors", "ä/"), ("*.bin",), PEERS, MAX_TIMEOUT_S, True, False, MAX_RATE, 1, True)

jobs = st.builds(
    Job,
    info_hash=st.just(HASH),
    statement=st.binary(min_size=32, max_size=32),
    link=st.sampled_from([None, LINK, replace(LINK, peers=())]),
    include=st.lists(st.text(max_size=20), max_size=4).map(tuple),
    exclude=st.lists(st.text(max_size=20), max_size=4).map(tuple),
    peers=st.lists(st.sampled_from(PEERS), max_size=4).map(tuple),
    timeout_s=st.integers(1, MAX_TIMEOUT_S),
    allow_code=st.booleans(),
    seed=st.booleans(),
    max_up=st.integers(0, MAX_RATE),
    max_down=st.integers(0, MAX_RATE),
    peers_only=st.booleans(),
)


@given(jobs)
def test_round_trip(job: Job) -> None:
    data = encode_job(job)
    assert decode_job(data) == job
    assert encode_job(decode_job(data)) == data


def test_the_id_is_the_request() -> None:
    assert replace(PLAIN).id == PLAIN.id
    others = (FULL, replace(PLAIN, seed=False), replace(PLAIN, include=("a",)), replace(PLAIN, exclude=("a",)))
    assert len({PLAIN.id, *(job.id for job in others)}) == 1 + len(others)


def body(job: Job = FULL) -> Map:
    return codec.unpack_map(encode_job(job)[len(MAGIC) :], max_bytes=MAX_JOB_BYTES)


def many(item: Value, count: int) -> list[Value]:
    return [item] * count


BENT: dict[str, Map] = {
    "version 2": {"v": 2},
    "version 0": {"v": 0},
    "version as text": {"v": "1"},
    "unknown field": {"priority": 1},
    "short info-hash": {"info_hash": bytes(20)},
    "another content than the link's": {"info_hash": bytes(32)},
    "short statement": {"statement": bytes(31)},
    "link as bytes": {"link": b""},
    "no link": {"link": "lab/model"},
    "link with a tracker": {"link": f"{LINK}&tr=udp%3A%2F%2Ftracker.example%3A1"},
    "link in another spelling": {"link": str(LINK).replace("x.pub", "x%2Epub")},
    "too many patterns": {"include": many("a", MAX_PATTERNS + 1)},
    "absurdly many patterns": {"exclude": many("", 1 << 20)},
    "pattern as bytes": {"include": [b"a"]},
    "too many peers": {"peers": many("a:1", MAX_PEERS + 1)},
    "peer without a port": {"peers": ["a"]},
    "peer in another spelling": {"peers": ["a:01"]},
    "no timeout": {"timeout_s": 0},
    "timeout beyond the cap": {"timeout_s": MAX_TIMEOUT_S + 1},
    "negative timeout": {"timeout_s": -1},
    "flag as number": {"allow_code": 1},
    "rate beyond the cap": {"max_up": MAX_RATE + 1},
    "negative rate": {"max_down": -1},
    "said though it is not so": {"peers_only": False},
    "peers only, as a number": {"peers_only": 1},
}


@pytest.mark.parametrize("name", BENT)
def test_bent_job_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        decode_job(MAGIC + codec.pack(body() | BENT[name]))


def test_a_job_of_a_version_that_knew_no_web_seeds_is_still_one() -> None:
    old = {key: value for key, value in body().items() if key != "peers_only"}
    assert not decode_job(MAGIC + codec.pack(old)).peers_only
    assert encode_job(replace(FULL, peers_only=False)) == MAGIC + codec.pack(old)


@pytest.mark.parametrize("key", sorted(body().keys() - {"peers_only"}))
def test_every_field_is_needed(key: str) -> None:
    with pytest.raises(FormatError):
        decode_job(MAGIC + codec.pack({name: value for name, value in body().items() if name != key}))


def test_a_bare_magnet_is_refused() -> None:
    with pytest.raises(UntrustedError):
        decode_job(MAGIC + codec.pack(body() | {"link": f"magnet:?xt=urn:btmh:1220{HASH.hex()}"}))


def test_a_newer_version_is_refused_with_words() -> None:
    with pytest.raises(FormatError, match="version") as caught:
        decode_job(MAGIC + codec.pack({"v": 2, "what": "comes next"}))
    assert "Update" in caught.value.hint


def test_caps_are_exact() -> None:
    whole = replace(PLAIN, include=("a",) * MAX_PATTERNS, exclude=("b",) * MAX_PATTERNS, peers=PEERS[:1] * MAX_PEERS)
    assert decode_job(encode_job(whole)) == whole
    with pytest.raises(FormatError, match="include"):
        replace(PLAIN, include=("a",) * (MAX_PATTERNS + 1))
    with pytest.raises(FormatError, match="exclude"):
        replace(PLAIN, exclude=("a",) * (MAX_PATTERNS + 1))
    with pytest.raises(FormatError, match="peers"):
        replace(PLAIN, peers=PEERS[:1] * (MAX_PEERS + 1))
    with pytest.raises(FormatError, match="limit"):
        decode_job(encode_job(replace(PLAIN, include=("a" * MAX_JOB_BYTES,))))


@pytest.mark.parametrize("job", [PLAIN, FULL], ids=["plain", "full"])
def test_truncated_padded_and_foreign_jobs_are_refused(job: Job) -> None:
    data = encode_job(job)
    for end in range(len(data)):
        with pytest.raises(FormatError):
            decode_job(data[:end])
    for other in (data + b"\0", b"X" + data[1:], MAGIC, data + data):
        with pytest.raises(FormatError):
            decode_job(other)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    for data in (noise, MAGIC + noise):
        with pytest.raises(FormatError):
            decode_job(data)
