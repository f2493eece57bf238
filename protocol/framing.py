"""Frames on a byte stream: a 4-byte big-endian length, then that many bytes.

Both the control socket and the engine socket speak this. Sans-I/O, in the manner of h11: bytes in, frames out.

Invariants:
- a frame holds 1 to `max_bytes` bytes; another announcement is an error as soon as its four bytes are there, before
  anything of its body is kept;
- frames come out the same however the stream was cut;
- after an error the decoder stays in error: a stream that lost its frame boundary cannot find it again.

It deliberately does not know what a frame means, and does not time out a slow sender.
"""

from __future__ import annotations

from modelp2p.protocol.errors import FormatError

LENGTH_BYTES = 4


def encode_frame(payload: bytes, max_bytes: int) -> bytes:
    """`payload` with its length in front.

    Raises:
        FormatError: `payload` is empty or over `max_bytes`; the other side would refuse it.
    """
    _check_length(len(payload), max_bytes)
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


class FrameDecoder:
    """Cuts a byte stream into frames of at most `max_bytes` bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._error: FormatError | None = None

    def __repr__(self) -> str:
        state = "failed" if self._error else f"{len(self._buffer)} bytes buffered"
        return f"<FrameDecoder max {self._max_bytes} bytes, {state}>"

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Takes bytes from the stream; call `next_frame` until it returns None before taking more."""
        if self._error is None:
            self._buffer += data

    def next_frame(self) -> bytes | None:
        """The next complete frame, or None when more bytes are needed.

        Raises:
            FormatError: the stream announces a frame that is empty or over the limit; so does every later call.
        """
        if self._error is not None:
            raise self._error
        if len(self._buffer) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
        try:
            _check_length(length, self._max_bytes)
        except FormatError as error:
            self._error = error
            self._buffer.clear()
            raise
        end = LENGTH_BYTES + length
        if len(self._buffer) < end:
            return None
        frame = bytes(memoryview(self._buffer)[LENGTH_BYTES:end])
        del self._buffer[:end]
        return frame

    @property
    def is_between_frames(self) -> bool:
        """Whether the stream may end here without cutting a frame."""
        return self._error is None and not self._buffer


def _check_length(length: int, max_bytes: int) -> None:
    if not 0 < length <= max_bytes:
        raise FormatError(f"a frame of {length} bytes; allowed are 1 to {max_bytes}", length=length, max_bytes=max_bytes)
