"""Control messages: five shapes, one byte form each, versions compared before anything is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelp2p.protocol import codec
from modelp2p.protocol.control import (
    MAX_FDS,
    MAX_FRAME_BYTES,
    Event,
    Failure,
    Hello,
    Message,
    Request,
    Result,
    check_hello,
    decode_message,
    encode_message,
)
from modelp2p.protocol.errors import DaemonError, FormatError, NoSpaceError, UntrustedError
from tests.protocol.test_codec import VALUES

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

MESSAGES: dict[str, Message] = {
    "hello": Hello(1, 1, "modelp2p 0.1"),
    "request": Request(1, "fetch", {"ref": "a/b", "include": ["*.json"], "timeout_s": None}, 2),
    "event": Event(2**53, {"phase": "fetching", "done": 1}),
    "result": Result(0, {"path": "/x"}, MAX_FDS),
    "failure": Failure(3, "NO_SPACE", "full", "make room", {"path": "a", "size": 5}),
}


def payload(message: Message) -> bytes:
    return encode_message(message)[4:]


@pytest.mark.parametrize("name", MESSAGES)
def test_round_trip(name: str) -> None:
    frame = encode_message(MESSAGES[name])
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert decode_message(frame[4:]) == MESSAGES[name]


@pytest.mark.parametrize("name", MESSAGES)
def test_truncated_or_padded_message_is_refused(name: str) -> None:
    data = payload(MESSAGES[name])
    for end in range(len(data)):
        with pytest.raises(FormatError):
            decode_message(data[:end])
    with pytest.raises(FormatError):
        decode_message(data + b"\xc0")


ODD: dict[str, Map] = {
    "empty": {},
    "only an id": {"id": 1},
    "verb without id": {"verb": "ls", "args": {}, "fds": 0},
    "negative id": {"id": -1, "verb": "ls", "args": {}, "fds": 0},
    "absurd id": {"id": 2**60, "verb": "ls", "args": {}, "fds": 0},
    "id as bool": {"id": True, "verb": "ls", "args": {}, "fds": 0},
    "verb as bytes": {"id": 1, "verb": b"ls", "args": {}, "fds": 0},
    "arguments as list": {"id": 1, "verb": "ls", "args": [], "fds": 0},
    "too many descriptors": {"id": 1, "verb": "ls", "args": {}, "fds": MAX_FDS + 1},
    "descriptors missing": {"id": 1, "verb": "ls", "args": {}},
    "event as text": {"id": 1, "event": "x"},
    "result as list": {"id": 1, "result": [], "fds": 0},
    "error without kind": {"id": 1, "error": {"message": "", "hint": "", "facts": {}}},
    "error as text": {"id": 1, "error": "no"},
    "hello as list": {"hello": []},
    "hello without build": {"hello": {"v_min": 1, "v_max": 1}},
    "hello of negative version": {"hello": {"v_min": -1, "v_max": 1, "build": ""}},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_message_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        decode_message(codec.pack(ODD[name]))


@given(st.dictionaries(st.sampled_from(["id", "verb", "args", "event", "result", "error", "hello", "fds"]), VALUES, max_size=5))
@settings(max_examples=80)
def test_any_map_is_a_message_or_a_format_error(source: Map) -> None:
    try:
        message = decode_message(codec.pack(source))
    except FormatError:
        return
    assert decode_message(payload(message)) == message


def test_frame_limit() -> None:
    room = MAX_FRAME_BYTES - len(payload(Event(1, {"x": b"x" * 70_000}))) + 70_000
    encode_message(Event(1, {"x": b"x" * room}))
    with pytest.raises(FormatError):
        encode_message(Event(1, {"x": b"x" * (room + 1)}))
    with pytest.raises(FormatError):
        decode_message(bytes(MAX_FRAME_BYTES + 1))


def test_an_error_crosses_the_socket_as_itself() -> None:
    error = NoSpaceError("disk \x1b[2J full", hint="make room", path="a", size_bytes=5, ok=False)
    message = decode_message(payload(Failure.of(7, error)))
    assert isinstance(message, Failure)
    again = message.error()
    assert type(again) is NoSpaceError
    assert (again.message, again.hint, again.facts) == (error.message, error.hint, error.facts)
    assert again.message == "disk \\x1b[2J full"


def test_hostile_facts_in_a_failure_do_no_harm() -> None:
    failure = Failure(1, "BAD_SIGNATURE", "m", "h", {"hint": "x", "self": 1, "list": [1], "none": None, "ok": 1})
    again = failure.error()
    assert type(again) is UntrustedError
    assert again.hint == "h"
    assert again.facts == {"ok": 1}


GREETINGS = {
    (1, 1): True,
    (0, 1): True,
    (1, 9): True,
    (2, 9): False,
    (0, 0): False,
}


@pytest.mark.parametrize("versions", GREETINGS)
def test_versions_must_overlap(versions: tuple[int, int]) -> None:
    hello = Hello(*versions, "other build")
    if GREETINGS[versions]:
        assert check_hello(hello) is hello
        return
    with pytest.raises(DaemonError) as caught:
        check_hello(hello)
    assert caught.value.kind.exit_code == 8
    assert "other build" in caught.value.message
    assert caught.value.hint


def test_first_message_must_be_a_greeting() -> None:
    with pytest.raises(DaemonError):
        check_hello(MESSAGES["request"])
