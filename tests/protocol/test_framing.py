from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.framing import FrameDecoder, encode_frame


def drain(decoder: FrameDecoder) -> list[bytes]:
    frames = []
    while (frame := decoder.next_frame()) is not None:
        frames.append(frame)
    return frames


@given(
    payloads=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    cuts=st.lists(st.integers(0, 300), max_size=8),
)
def test_frames_come_out_the_same_however_the_stream_is_cut(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(payload, 40) for payload in payloads)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    decoder = FrameDecoder(40)
    frames = []
    for begin, end in pairwise(edges):
        decoder.receive_data(stream[begin:end])
        frames += drain(decoder)
    assert frames == payloads
    assert decoder.is_between_frames


def test_length_is_four_bytes_big_endian() -> None:
    assert encode_frame(b"abc", 3) == b"\x00\x00\x00\x03abc"


def test_a_truncated_stream_is_inside_a_frame() -> None:
    stream = encode_frame(b"abc", 10)
    for end in range(1, len(stream)):
        decoder = FrameDecoder(10)
        decoder.receive_data(stream[:end])
        assert decoder.next_frame() is None
        assert not decoder.is_between_frames


def test_a_frame_at_the_limit_passes() -> None:
    decoder = FrameDecoder(1000)
    decoder.receive_data(encode_frame(bytes(1000), 1000))
    assert drain(decoder) == [bytes(1000)]


@pytest.mark.parametrize("length", [0, 11, 2**31, 2**32 - 1])
def test_a_bad_announcement_is_refused_before_its_body_and_forever(length: int) -> None:
    decoder = FrameDecoder(10)
    decoder.receive_data(encode_frame(b"good", 10) + length.to_bytes(4, "big"))
    assert decoder.next_frame() == b"good"
    for _ in range(2):
        with pytest.raises(FormatError):
            decoder.next_frame()
        decoder.receive_data(encode_frame(b"good", 10))
    assert not decoder.is_between_frames
    assert repr(decoder) == "<FrameDecoder max 10 bytes, failed>"


@pytest.mark.parametrize("size", [0, 11])
def test_a_frame_the_other_side_would_refuse_is_not_written(size: int) -> None:
    with pytest.raises(FormatError):
        encode_frame(bytes(size), 10)
