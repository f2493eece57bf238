"""Engine messages: the dataclasses are the format, and nothing incomplete or odd gets in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelp2p.protocol import codec
from modelp2p.protocol import engine_wire as wire
from modelp2p.protocol.bitmap import pack_bits, unpack_bits
from modelp2p.protocol.errors import DaemonError, FormatError
from tests.protocol.test_codec import VALUES

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Value

HASH = bytes(range(32))
PEER = wire.Peer("2001:db8::1", 16881)
FILE = wire.TorrentFile("a/b", 5, "/data/x")

MESSAGES: tuple[wire.Message, ...] = (
    wire.Hello(1, 1, "build"),
    wire.Configure(wire.EngineSettings(dht=False, dht_bootstrap=("a:1",)), "/data", ("/store",)),
    wire.Add(wire.TorrentSpec(HASH, b"d", "/data/x", 1 << 20, (FILE,), b"\x80", (PEER,), ("udp://t",), 1, 2, True)),
    wire.AddMagnet(wire.MagnetSpec(HASH, "/data/x", (PEER,))),
    wire.Remove(HASH),
    wire.Connect(HASH, (PEER, PEER)),
    wire.SetWanted(HASH, ("a", "b")),
    wire.SetPiecePriorities(HASH, (0, 7), b"\x01\x07"),
    wire.SetWebSeeds(HASH, ("http://127.0.0.1:1/a/",)),
    wire.SetLimits(None, 0, 5),
    wire.SetLimits(HASH, 0, 5),
    wire.SetConnections(500),
    wire.Throttle(HASH, True),
    wire.Flush(HASH),
    wire.Listening(1, ("0.0.0.0:1",), 4),
    wire.ListenFailed("[::]:1", "in use", 98),
    wire.AddFailed(HASH, "no"),
    wire.PiecesFinished(HASH, (0, 2**31)),
    wire.PieceFailed(HASH, 3),
    wire.PeerBanned(HASH, "1.2.3.4:5"),
    wire.WebSeedFailed(HASH, "http://127.0.0.1:1/a/", "no", True),
    wire.PeerUnresolved(HASH, "host", "no address"),
    wire.MetadataReceived(HASH, b"d", (FILE,)),
    wire.FileFailed(HASH, "a", "full", True),
    wire.Flushed(HASH),
    wire.TransferFinished(HASH),
    wire.TorrentStatus(HASH, 1, 2, 3, 4, 5, 6, 7, (wire.PeerStatus("a:1", "x/1", 1, 2, 1000, "peer"),), 9),
    wire.SessionStatus(200),
    wire.Removed(HASH, 1, 2, 3),
    wire.Dropped(),
    wire.EngineDied("signal 9"),
    wire.EngineRestarted(),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: wire.Message) -> None:
    frame = wire.encode_message(message)
    assert wire.decode_message(frame[4:]) == message
    for end in range(0, len(frame) - 4, 7):
        with pytest.raises(FormatError):
            wire.decode_message(frame[4 : 4 + end])


def test_every_message_is_covered_here() -> None:
    assert {type(message).__name__ for message in MESSAGES} == set(wire._MESSAGES)


ODD: dict[str, Value] = {
    "no name": {},
    "two names": {"Flush": {"info_hash": HASH}, "Flushed": {"info_hash": HASH}},
    "unknown name": {"Reboot": {}},
    "name of a part": {"Peer": {"host": "a", "port": 1}},
    "missing field": {"Throttle": {"info_hash": HASH}},
    "unknown field": {"Flush": {"info_hash": HASH, "path": "/etc"}},
    "body as list": {"Flush": [HASH]},
    "digest of 20 bytes": {"Flush": {"info_hash": bytes(20)}},
    "digest as text": {"Flush": {"info_hash": "00" * 32}},
    "no digest": {"Flush": {"info_hash": None}},
    "number as bool": {"Throttle": {"info_hash": HASH, "held": 1}},
    "bool as number": {"PieceFailed": {"info_hash": HASH, "piece": True}},
    "negative piece": {"PieceFailed": {"info_hash": HASH, "piece": -1}},
    "piece beyond 63 bits": {"PieceFailed": {"info_hash": HASH, "piece": 2**63}},
    "mixed list": {"PiecesFinished": {"info_hash": HASH, "pieces": [1, "2"]}},
    "peer as text": {"Connect": {"info_hash": HASH, "peers": ["a:1"]}},
    "digest inside": {"AddMagnet": {"spec": {"info_hash": b"", "save_path": "", "peers": [], "trackers": []}}},
    "not a map": [1],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_message_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        wire.decode_message(codec.pack(ODD[name]))


@given(st.sampled_from(sorted(wire._MESSAGES)), VALUES)
@settings(max_examples=150)
def test_any_body_is_a_message_or_a_format_error(name: str, body: Value) -> None:
    try:
        message = wire.decode_message(codec.pack({name: body}))
    except FormatError:
        return
    assert wire.decode_message(wire.encode_message(message)[4:]) == message


def test_versions_must_overlap() -> None:
    assert wire.check_hello(wire.Hello(0, 3, "b")).build == "b"
    for message in (wire.Hello(2, 3, "newer"), wire.Dropped()):
        with pytest.raises(DaemonError):
            wire.check_hello(message)


@given(st.lists(st.booleans(), max_size=70))
@settings(max_examples=60)
def test_bitmap_round_trip(bits: list[bool]) -> None:
    assert unpack_bits(pack_bits(bits), len(bits)) == bits
    with pytest.raises(FormatError):
        unpack_bits(pack_bits(bits) + b"\0", len(bits))


def test_bitmap_is_bep_3s_and_has_no_spare_bits() -> None:
    assert pack_bits([True, False, False, False, False, False, False, False, True]) == b"\x80\x80"
    with pytest.raises(FormatError):
        unpack_bits(b"\x81", 7)
