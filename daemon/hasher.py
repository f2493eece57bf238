"""The process that reads files and hashes them (`protocol.hashwork`), for the daemon and for the loader.

Hashing 16 KiB leaves holds Python's lock between leaves, so threads do not add up; one process per core does. A worker
holds no secret, opens no path and writes nothing: every request brings its own descriptor (SCM_RIGHTS), and the answer is
digests. It imports only the standard library and a few modules of protocol/, because there is one worker per core.

A file is mapped, not read: a copy out of the page cache costs as much as a third of the hash. The price is that a file which
is cut short under a mapping, or a disk that fails, is no error but SIGBUS, and the end of this process; the pool tries once
more with `mapped: false`, and then it is an error with words.

Invariants:
- one request, then one reply, in order; a worker lives until its socket closes;
- a file that is shorter than it was said to be is an error, never a hash over what was there;
- memory is one window or buffer, the hashes of the current request and one SHA-256 state per unfinished flat hash.

It deliberately does not compare hashes and does not retry: the daemon does both.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from hashlib import sha1, sha256
from typing import TYPE_CHECKING

from modelp2p.protocol import codec
from modelp2p.protocol.errors import CorruptError, StoreError
from modelp2p.protocol.framing import FrameDecoder, encode_frame
from modelp2p.protocol.hashwork import MAX_REPLY_BYTES, MAX_REQUEST_BYTES
from modelp2p.protocol.merkle import HASH_BYTES, LEAF_BYTES, leaf_hashes, root_of

if TYPE_CHECKING:
    from hashlib import _Hash

# Large enough for a disk to stream, small enough to stay in a core's cache between the read and the hash.
BUFFER_BYTES = 1024 * 1024
# Large enough that mapping costs nothing beside hashing, small enough to count for nothing in the memory of a process.
WINDOW_BYTES = 4 * 1024 * 1024


class Hasher:
    """The operations of a worker, on descriptors; `OSError` passes through.

    `is_mapped` says whether files are mapped or read from now on.
    """

    def __init__(self, buffer_bytes: int = BUFFER_BYTES, window_bytes: int = WINDOW_BYTES) -> None:
        if buffer_bytes % LEAF_BYTES or window_bytes % LEAF_BYTES:
            raise ValueError("a buffer must hold whole leaves")
        self.is_mapped = False
        self._buffer = memoryview(bytearray(buffer_bytes))
        self._window_bytes = window_bytes
        self._flats: dict[str, tuple[_Hash, int]] = {}

    def pieces(self, fd: int, file_size: int, piece_length: int, first: int, count: int, origin: int = 0) -> bytes:
        """The hashes of `count` pieces from `first`, 32 bytes each, as they stand in the layer of the file.

        `fd` begins at byte `origin` of it.

        Raises:
            CorruptError: the file ends before the last of them.
        """
        pieces = _Pieces(file_size, piece_length)
        begin, end = first * piece_length, min(file_size, (first + count) * piece_length)
        self._read(fd, begin - origin, end - origin, pieces.take)
        return pieces.finish()

    def flat(self, fd: int, size: int, *, git: bool) -> tuple[bytes, bytes]:
        """The SHA-256 of the whole file, and its git blob id, empty unless asked for."""
        plain, blob = sha256(), sha1(b"blob %d\0" % size, usedforsecurity=False) if git else None

        def take(block: memoryview) -> None:
            plain.update(block)
            if blob is not None:
                blob.update(block)

        self._read(fd, 0, size, take)
        return plain.digest(), blob.digest() if blob is not None else b""

    def flat_update(self, key: str, fd: int, offset: int, end: int) -> None:
        """Adds the bytes from `offset` to `end` to the SHA-256 named `key`; offset 0 starts it over.

        Raises:
            StoreError: the state stands elsewhere; the caller starts over.
            CorruptError: the file is shorter than `end`; the state is gone.
        """
        state = self._take_state(key, offset)
        self._read(fd, offset, end, state.update)
        self._flats[key] = (state, end)

    def both_update(self, key: str, fd: int, offset: int, end: int, file_size: int, piece_length: int) -> bytes:
        """`flat_update`, and from the same reading the hashes of the pieces there; `offset` is where a piece begins.

        Raises:
            StoreError, CorruptError: as `flat_update`.
        """
        state, pieces = self._take_state(key, offset), _Pieces(file_size, piece_length)

        def take(block: memoryview) -> None:
            pieces.take(block)
            state.update(block)

        self._read(fd, offset, end, take)
        self._flats[key] = (state, end)
        return pieces.finish()

    def flat_finish(self, key: str, size: int) -> bytes:
        """The digest of `key`, which must have been fed exactly `size` bytes; its state is dropped."""
        state, at = self._flats.pop(key, (sha256(), 0))
        if at != size:
            raise StoreError(f"a flat hash stands at byte {at}, not {size}; it has to start over", at=at)
        return state.digest()

    def flat_drop(self, key: str) -> None:
        """Forgets `key`; unknown keys are fine."""
        self._flats.pop(key, None)

    def _take_state(self, key: str, offset: int) -> _Hash:
        state, at = (sha256(), 0) if offset == 0 else self._flats.get(key, (None, 0))
        if state is None or at != offset:
            raise StoreError(f"a flat hash stands at byte {at}, not {offset}; it has to start over", at=at)
        self._flats.pop(key, None)
        return state

    def _read(self, fd: int, begin: int, end: int, take: Callable[[memoryview], object]) -> None:
        while self.is_mapped and begin < end:
            length = min(self._window_bytes, end - begin)
            if os.fstat(fd).st_size < begin + length:
                break
            try:
                window = mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=begin)
            except OSError:
                # Some network file systems have no shared mappings; and whatever else is wrong, reading will name it.
                break
            with window, memoryview(window) as block:
                take(block)
            begin += length
        self._read_copy(fd, begin, end, take)

    def _read_copy(self, fd: int, begin: int, end: int, take: Callable[[memoryview], object]) -> None:
        while begin < end:
            block = self._buffer[: min(len(self._buffer), end - begin)]
            got = 0
            while got < len(block):
                step = os.preadv(fd, [block[got:]], begin + got)
                if step == 0:
                    at = begin + got
                    raise CorruptError(f"file shorter than expected: {at} bytes of at least {end}", expected=end, got=at)
                got += step
            take(block)
            begin += got


class _Pieces:
    """Leaf by leaf to piece hashes, over bytes that arrive in order from where a piece begins."""

    def __init__(self, file_size: int, piece_length: int) -> None:
        self._bytes_per_piece = piece_length // LEAF_BYTES * HASH_BYTES
        # BEP 52 pads the last piece of a larger file to a whole piece, but a file of one piece only to its own tree.
        self._is_padded = file_size > piece_length
        self._leaves, self._hashes = bytearray(), bytearray()

    def take(self, block: memoryview) -> None:
        leaves, size = self._leaves, self._bytes_per_piece
        leaves.extend(leaf_hashes(block))
        while len(leaves) >= size:
            self._hashes.extend(root_of(bytes(leaves[:size])))
            del leaves[:size]

    def finish(self) -> bytes:
        if self._leaves:
            padding = self._bytes_per_piece - len(self._leaves) if self._is_padded else 0
            self._hashes.extend(root_of(bytes(self._leaves) + bytes(padding)))
        return bytes(self._hashes)


def answer(hasher: Hasher, request: codec.Map, fd: int) -> codec.Map:
    """The reply to one request; errors about the file are replies too, anything else ends the worker."""
    where = "hash request"
    try:
        hasher.is_mapped = codec.take(request, "mapped", bool, where)
        match codec.take(request, "op", str, where):
            case "pieces":
                size, length = codec.take(request, "size", int, where), codec.take(request, "piece_length", int, where)
                origin = codec.take(request, "origin", int, where)
                runs = (_pair(run) for run in codec.take(request, "runs", list, where))
                return {"hashes": b"".join(hasher.pieces(fd, size, length, first, count, origin) for first, count in runs)}
            case "flat":
                plain, blob = hasher.flat(
                    fd, codec.take(request, "size", int, where), git=codec.take(request, "git", bool, where)
                )
                return {"sha256": plain, "git_sha1": blob}
            case "flat_update":
                offset, end = codec.take(request, "offset", int, where), codec.take(request, "end", int, where)
                hasher.flat_update(codec.take(request, "key", str, where), fd, offset, end)
                return {}
            case "both_update":
                offset, end = codec.take(request, "offset", int, where), codec.take(request, "end", int, where)
                size, length = codec.take(request, "size", int, where), codec.take(request, "piece_length", int, where)
                key = codec.take(request, "key", str, where)
                return {"hashes": hasher.both_update(key, fd, offset, end, size, length)}
            case "ready":
                return {}
            case "flat_finish":
                key = codec.take(request, "key", str, where)
                return {"sha256": hasher.flat_finish(key, codec.take(request, "size", int, where))}
            case "flat_drop":
                hasher.flat_drop(codec.take(request, "key", str, where))
                return {}
            case op:
                raise ValueError(f"unknown operation {op}")
    except CorruptError as exc:
        return {"error": "short", "message": exc.message}
    except StoreError as exc:
        return {"error": "state", "message": exc.message}
    except OSError as exc:
        return {"error": "disk", "message": exc.strerror or str(exc), "errno": exc.errno or 0}


def _pair(run: codec.Value) -> tuple[int, int]:
    match run:
        case [int(first), int(count)]:
            return first, count
        case _:
            raise ValueError(f"not a run of pieces: {run!r}")


def serve(channel: socket.socket) -> None:
    """Answers requests until the other side closes."""
    decoder = FrameDecoder(MAX_REQUEST_BYTES)
    hasher = Hasher()
    fds: list[int] = []
    while True:
        data, received, _, _ = socket.recv_fds(channel, 65536, 1, socket.MSG_CMSG_CLOEXEC)
        fds += received
        if not data:
            return
        decoder.receive_data(data)
        while (frame := decoder.next_frame()) is not None:
            try:
                reply = answer(hasher, codec.unpack_map(frame, max_bytes=MAX_REQUEST_BYTES), fds[0] if fds else -1)
            finally:
                for fd in fds:
                    os.close(fd)
                fds.clear()
            channel.sendall(encode_frame(codec.pack(reply), MAX_REPLY_BYTES))


def main() -> None:
    """Runs the worker on the inherited socket whose number is the only argument."""
    # Ctrl-C goes to the whole foreground group; who started the workers decides when they end, by closing their sockets.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SIGBUS under a mapping is part of the plan, not a bug to leave a dump of somebody's weights for.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        try:
            serve(channel)
        except (BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    main()
