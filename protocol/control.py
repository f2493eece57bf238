"""Control-socket messages: what a client asks the daemon, and what it hears back. Sans-I/O.

Each frame (see `framing`) holds one canonical msgpack map. A connection opens with a `Hello` from each side; then the client
sends `Request`s, and each is answered by any number of `Event`s and exactly one `Result` or `Failure` with its id.

No message contains a path to be opened: files and folders cross as descriptors (SCM_RIGHTS), sent with the first byte of the
frame whose `fds` counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, assert_never, cast

from modelp2p.protocol import codec
from modelp2p.protocol.errors import Fact, FormatError, ModelP2PError, error_of
from modelp2p.protocol.framing import encode_frame
from modelp2p.protocol.hello import Hello as Hello
from modelp2p.protocol.hello import check_versions

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

MAX_FRAME_BYTES = 1 << 20
MAX_FDS = 64
MAX_CLIENTS = 64
REQUEST_TIMEOUT_S = 10
"""A client has this long from a frame's first byte to its last."""
V_MIN = 1
V_MAX = 1
_MAX_ID = 2**53


@dataclass(frozen=True, slots=True)
class Request:
    """The client asks `verb`; `fds` descriptors come with it."""

    id: int
    verb: str
    args: Map = field(default_factory=dict)
    fds: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Progress of a request."""

    id: int
    body: Map


@dataclass(frozen=True, slots=True)
class Result:
    """The request is done; `fds` descriptors come with it."""

    id: int
    body: Map
    fds: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """The request failed with an error of our tree."""

    id: int
    kind: str
    message: str
    hint: str = ""
    facts: Map = field(default_factory=dict)

    @classmethod
    def of(cls, request_id: int, error: ModelP2PError) -> Failure:
        """The wire form of `error`."""
        return cls(request_id, error.kind.name, error.message, error.hint, dict(error.facts))

    def error(self) -> ModelP2PError:
        """The error value again."""
        facts = {key: value for key, value in self.facts.items() if isinstance(value, (str, int, bool))}
        return error_of(self.kind, self.message, self.hint, cast("dict[str, Fact]", facts))


Message: TypeAlias = Hello | Request | Event | Result | Failure


def encode_message(message: Message) -> bytes:
    """The frame of `message`, length included.

    Raises:
        FormatError: larger than a frame may be.
    """
    match message:
        case Hello():
            body: Map = {"hello": {"v_min": message.v_min, "v_max": message.v_max, "build": message.build}}
        case Request():
            body = {"id": message.id, "verb": message.verb, "args": message.args, "fds": message.fds}
        case Event():
            body = {"id": message.id, "event": message.body}
        case Result():
            body = {"id": message.id, "result": message.body, "fds": message.fds}
        case Failure():
            error: Map = {"kind": message.kind, "message": message.message, "hint": message.hint, "facts": message.facts}
            body = {"id": message.id, "error": error}
        case _:
            assert_never(message)
    return encode_frame(codec.pack(body), MAX_FRAME_BYTES)


def decode_message(frame: bytes) -> Message:
    """The message in a frame's payload.

    Raises:
        FormatError: not one of the five shapes.
    """
    source = codec.unpack_map(frame, max_bytes=MAX_FRAME_BYTES)
    if "hello" in source:
        hello = cast("Map", codec.take(source, "hello", dict))
        return Hello(
            codec.take_uint(hello, "v_min", maximum=2**31, where="hello"),
            codec.take_uint(hello, "v_max", maximum=2**31, where="hello"),
            codec.take(hello, "build", str, "hello"),
        )
    number = codec.take_uint(source, "id", maximum=_MAX_ID)
    if "verb" in source:
        args = cast("Map", codec.take(source, "args", dict))
        return Request(number, codec.take(source, "verb", str), args, codec.take_uint(source, "fds", maximum=MAX_FDS))
    if "event" in source:
        return Event(number, cast("Map", codec.take(source, "event", dict)))
    if "result" in source:
        body = cast("Map", codec.take(source, "result", dict))
        return Result(number, body, codec.take_uint(source, "fds", maximum=MAX_FDS))
    if "error" in source:
        error = cast("Map", codec.take(source, "error", dict))
        kind, message, hint = (codec.take(error, key, str, "error") for key in ("kind", "message", "hint"))
        return Failure(number, kind, message, hint, cast("Map", codec.take(error, "facts", dict, "error")))
    raise FormatError("not a control message")


def check_hello(hello: Message) -> Hello:
    """The other side's greeting, if we have a version in common.

    Raises:
        DaemonError: it is no greeting, or speaks only versions this build does not.
    """
    hint = "Install the same release of modelp2p on both sides and restart the daemon."
    return check_versions(hello, V_MIN, V_MAX, sides="client and daemon", hint=hint)
