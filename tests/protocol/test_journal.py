"""The journal's bytes: what a crash or a bad disk can do to them never adds a claim."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.protocol.errors import StoreError
from modelp2p.protocol.journal import (
    HEADER_BYTES,
    Completed,
    FileDone,
    FileGone,
    FileStamp,
    JournalState,
    Lost,
    Proven,
    Record,
    Selection,
    encode_header,
    encode_record,
    replay,
)
from modelp2p.protocol.ranges import Ranges

INFO_HASH = random.Random(1).randbytes(32)
STAMP = FileStamp(dev=2**40, ino=77, size=123_456, mtime_ns=1_700_000_000_123_456_789, ctime_ns=-5)
RECORDS: list[Record] = [
    Selection(include=("*.safetensors",), exclude=("*.bin",), wanted=("a.safetensors", "dir/ü.json")),
    Proven(Ranges.span(0, 4)),
    Proven(Ranges.of([(6, 9), (12, 13)])),
    FileDone("a.safetensors", STAMP),
    Lost(Ranges.span(2, 3)),
    Proven(Ranges.span(2, 3)),
    FileDone("dir/ü.json", STAMP, borrowed=True),
    FileGone("a.safetensors"),
    Completed(),
]


def journal(records: list[Record]) -> bytes:
    return encode_header(INFO_HASH) + b"".join(encode_record(record) for record in records)


def claims(state: JournalState) -> tuple[object, ...]:
    return state.proven, dict(state.files), state.complete, state.selection


def test_replay_says_what_was_appended() -> None:
    state = replay(journal(RECORDS), INFO_HASH)
    assert state.proven == Ranges.of([(0, 4), (6, 9), (12, 13)])
    assert dict(state.files) == {"dir/ü.json": RECORDS[6]}
    assert state.complete
    assert state.selection == RECORDS[0]
    assert state.good_bytes == len(journal(RECORDS))
    assert not state.is_damaged


@pytest.mark.parametrize("taking_back", [Lost(Ranges.span(0, 1)), FileGone("a"), Selection(include=("other",))])
def test_complete_is_taken_back(taking_back: Record) -> None:
    assert not replay(journal([*RECORDS, taking_back]), INFO_HASH).complete
    assert replay(journal([*RECORDS, RECORDS[0]]), INFO_HASH).complete  # the same selection changes nothing


def test_every_torn_end_keeps_the_records_before_it() -> None:
    data = journal(RECORDS)
    ends = [HEADER_BYTES]
    for record in RECORDS:
        ends.append(ends[-1] + len(encode_record(record)))
    for length in range(len(data) + 1):
        state = replay(data[:length], INFO_HASH)
        whole = sum(end <= length for end in ends) - 1
        assert state.good_bytes == (ends[whole] if whole >= 0 else 0)
        assert not state.is_damaged
        assert claims(state) == claims(JournalState().after(RECORDS[: max(whole, 0)]))


def test_a_flipped_bit_at_every_offset_adds_no_claim_and_is_noticed() -> None:
    data = journal(RECORDS)
    ends = [HEADER_BYTES]
    for record in RECORDS:
        ends.append(ends[-1] + len(encode_record(record)))
    for offset in range(HEADER_BYTES, len(data)):
        for bit in range(8):
            rotten = bytearray(data)
            rotten[offset] ^= 1 << bit
            state = replay(bytes(rotten), INFO_HASH)
            whole = sum(end <= offset for end in ends) - 1
            assert state.good_bytes == ends[whole]
            assert claims(state) == claims(JournalState().after(RECORDS[:whole]))
            assert state.is_damaged == (whole < len(RECORDS) - 1)


def test_a_flipped_bit_in_the_header_is_refused() -> None:
    data = journal(RECORDS)
    for offset in range(HEADER_BYTES):
        rotten = bytearray(data)
        rotten[offset] ^= 1
        with pytest.raises(StoreError):
            replay(bytes(rotten), INFO_HASH)


@pytest.mark.parametrize("tail", [bytes(8), bytes(4096), random.Random(2).randbytes(4096), encode_record(Completed())[:-1]])
def test_a_tail_of_zeros_or_noise_is_not_a_record(tail: bytes) -> None:
    state = replay(journal(RECORDS[:4]) + tail, INFO_HASH)
    assert state.good_bytes == len(journal(RECORDS[:4]))
    assert not state.complete
    assert not state.is_damaged


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"not a journal at all", "not a modelp2p journal", id="magic"),
        pytest.param(encode_header(bytes(31) + b"x"), "another release", id="foreign"),
        pytest.param(b"MP2PJRNL" + (2).to_bytes(4, "big") + INFO_HASH, "format version 2", id="newer"),
        pytest.param(b"MP2PJRNL" + (0).to_bytes(4, "big") + INFO_HASH, "another release", id="version zero"),
    ],
)
def test_other_files_are_refused_with_words(data: bytes, words: str) -> None:
    with pytest.raises(StoreError, match=words):
        replay(data, INFO_HASH)


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60))).map(Ranges.of)
names = st.sampled_from(["a", "b/c", "ü"])
stamps = st.builds(FileStamp, *[st.integers(-(2**63), 2**64 - 1)] * 5)
texts = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3).map(tuple)
some_records = st.lists(
    st.one_of(
        st.builds(Proven, spans),
        st.builds(Lost, spans),
        st.builds(FileDone, names, stamps, st.booleans()),
        st.builds(FileGone, names),
        st.just(Completed()),
        st.builds(Selection, texts, texts, texts),
    ),
    max_size=12,
)


@given(some_records)
def test_replay_equals_a_model_of_plain_sets(records: list[Record]) -> None:
    proven: set[int] = set()
    for record in records:
        if isinstance(record, Proven):
            proven |= set(record.pieces.ints())
        elif isinstance(record, Lost):
            proven -= set(record.pieces.ints())
    state = replay(journal(records), INFO_HASH)
    assert set(state.proven.ints()) == proven
    assert claims(state) == claims(JournalState().after(records))
    one_by_one = JournalState()
    for record in records:
        one_by_one = one_by_one.after([record])
    assert claims(one_by_one) == claims(state)


@given(some_records)
def test_the_short_form_says_the_same(records: list[Record]) -> None:
    state = JournalState().after(records)
    assert claims(replay(journal(state.records()), INFO_HASH)) == claims(state)


@given(st.binary(max_size=200))
def test_any_bytes_after_the_header_are_survived(noise: bytes) -> None:
    assert replay(encode_header(INFO_HASH) + noise, INFO_HASH).good_bytes <= HEADER_BYTES + len(noise)
