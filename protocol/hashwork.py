"""What is said to a hash worker, and how one is started: the daemon and the loader both have such processes.

A worker is `python -P -m modelp2p.daemon.hasher FD`. Over the socket with that number it gets frames of msgpack maps, each with
the descriptor it is about (SCM_RIGHTS), and answers each with one frame: `hashes`, or `error` and `message`.

It deliberately knows nothing of processes and sockets.
"""

from __future__ import annotations

from collections.abc import Sequence

from modelp2p.protocol import codec
from modelp2p.protocol.framing import encode_frame

WORKER = ("-P", "-m", "modelp2p.daemon.hasher")
"""Arguments of the interpreter, before the number of the socket. `-P`: no module comes out of the current folder."""
MAX_REQUEST_BYTES = 4096
# The layer of 64 MiB in 16 KiB pieces is 128 KiB; no request covers more.
MAX_REPLY_BYTES = 1024 * 1024


READY: codec.Map = {"op": "ready"}
"""Asks for an empty answer, given as soon as the worker runs."""


def pieces_request(file_size: int, piece_length: int, runs: Sequence[tuple[int, int]], origin: int = 0) -> codec.Map:
    """Asks for the hashes of these pieces, 32 bytes each, in this order, as they stand in the layer of the file.

    Args:
        file_size: of the whole file, which decides how its last piece is padded.
        piece_length: bytes.
        runs: first piece and number of pieces of each.
        origin: which byte of the file the descriptor's first one is; above 0 where it is a stretch of the file in memory.
    """
    pairs: list[codec.Value] = [[first, count] for first, count in runs]
    return {"op": "pieces", "size": file_size, "piece_length": piece_length, "origin": origin, "runs": pairs}


def encode_request(request: codec.Map, *, mapped: bool) -> bytes:
    """The frame of a request; `mapped`: whether the worker maps what it hashes, or reads it."""
    return encode_frame(codec.pack({**request, "mapped": mapped}), MAX_REQUEST_BYTES)
