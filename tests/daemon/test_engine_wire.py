"""Engine messages: every one survives the wire, and nothing else is taken for one."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.protocol import codec
from modelp2p.protocol import engine_wire as wire
from modelp2p.protocol.errors import DaemonError, FormatError
from modelp2p.protocol.framing import LENGTH_BYTES, FrameDecoder

HASH = bytes(range(32))
KINDS = get_args(wire.Message)


def values(hint: object, name: str) -> st.SearchStrategy[object]:
    """Anything a field may hold."""
    if name == "info_hash":
        hashes = st.binary(min_size=32, max_size=32)
        return st.none() | hashes if type(None) in get_args(hint) else hashes
    if type(None) in get_args(hint):
        return st.none() | values(next(part for part in get_args(hint) if part is not type(None)), name)
    if get_args(hint):
        return st.lists(values(get_args(hint)[0], name), max_size=3).map(tuple)
    if isinstance(hint, type) and is_dataclass(hint):
        return messages(hint)
    known: dict[object, st.SearchStrategy[object]] = {
        bool: st.booleans(),
        int: st.integers(0, 2**63 - 1),
        str: st.text(max_size=20),
        bytes: st.binary(max_size=20),
    }
    return known[hint]


def messages(kind: type) -> st.SearchStrategy[object]:
    hints = get_type_hints(kind)
    return st.builds(kind, **{spot.name: values(hints[spot.name], spot.name) for spot in fields(kind)})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_message_survives_the_wire(kind: type, data: st.DataObject) -> None:
    message: wire.Message = data.draw(messages(kind))  # type: ignore[assignment]  # built from the union's own members
    frame = wire.encode_message(message)
    decoder = FrameDecoder(wire.MAX_FRAME_BYTES)
    for byte in frame:
        decoder.receive_data(bytes([byte]))
    payload = decoder.next_frame()
    assert payload is not None
    assert wire.decode_message(payload) == message


def packed(name: str, body: object) -> bytes:
    return codec.pack({name: body})  # type: ignore[dict-item]  # wrong on purpose


WRONG = {
    "not msgpack": b"\xc1",
    "not a map": codec.pack([1]),
    "two messages": codec.pack({"Dropped": {}, "EngineRestarted": {}}),
    "no message": codec.pack({}),
    "unknown name": packed("Format", {}),
    "a class that is no message": packed("Peer", {"host": "::1", "port": 1}),
    "a field is missing": packed("EngineDied", {}),
    "a field too many": packed("Dropped", {"x": 1}),
    "bytes for text": packed("EngineDied", {"reason": b"x"}),
    "a flag that is a number": packed("Throttle", {"info_hash": HASH, "held": 1}),
    "a number that is a flag": packed("PieceFailed", {"info_hash": HASH, "piece": True}),
    "a number below zero": packed("PieceFailed", {"info_hash": HASH, "piece": -1}),
    "a short info-hash": packed("Remove", {"info_hash": HASH[:20]}),
    "no info-hash where one is needed": packed("Remove", {"info_hash": None}),
    "a list for a message": packed("Add", {"spec": []}),
    "a nested field is wrong": packed("Connect", {"info_hash": HASH, "peers": [{"host": "::1", "port": "1"}]}),
    "trailing bytes": packed("Dropped", {}) + b"\x00",
}


@pytest.mark.parametrize("frame", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_message_is_refused(frame: bytes) -> None:
    with pytest.raises(FormatError):
        wire.decode_message(frame)


@pytest.mark.parametrize("message", [wire.EngineDied("killed"), wire.PiecesFinished(HASH, (1, 2, 300))])
def test_a_message_cut_anywhere_is_refused(message: wire.Message) -> None:
    payload = wire.encode_message(message)[LENGTH_BYTES:]
    for end in range(len(payload)):
        with pytest.raises(FormatError):
            wire.decode_message(payload[:end])


def test_a_message_over_the_frame_limit_is_refused_before_it_is_sent() -> None:
    fits = wire.SetPiecePriorities(HASH, (), bytes(wire.MAX_FRAME_BYTES - 200))
    assert wire.encode_message(fits)
    with pytest.raises(FormatError):
        wire.encode_message(wire.SetPiecePriorities(HASH, (), bytes(wire.MAX_FRAME_BYTES)))


def test_greetings_need_a_version_in_common() -> None:
    ours = wire.Hello(wire.V_MIN, wire.V_MAX, "x")
    assert wire.check_hello(ours) is ours
    for stranger in (wire.Hello(wire.V_MAX + 1, wire.V_MAX + 2, "newer"), wire.Hello(0, wire.V_MIN - 1, "older"), wire.Dropped()):
        with pytest.raises(DaemonError):
            wire.check_hello(stranger)


@given(st.lists(st.booleans(), max_size=70))
def test_bitmaps_come_back(bits: list[bool]) -> None:
    assert wire.unpack_bits(wire.pack_bits(bits), len(bits)) == bits


def test_the_first_piece_is_the_highest_bit() -> None:
    assert wire.pack_bits([True] + [False] * 8) == b"\x80\x00"


@pytest.mark.parametrize(("bitmap", "count"), [(b"", 1), (b"\x80", 0), (b"\x80\x00", 8), (b"\x81", 7)])
def test_a_bitmap_of_another_length_is_refused(bitmap: bytes, count: int) -> None:
    with pytest.raises(FormatError):
        wire.unpack_bits(bitmap, count)
