"""Worker processes that hash beside this one: SHA-256 of 16 KiB leaves in threads of one Python does not add up.

Between two leaves a thread needs the interpreter's lock; two threads hash 1.2 to 1.5 times as fast as one, one thread and one
worker process twice as fast. So there is one process less than there are cores, and this process hashes as well, from the
first byte on, while the others start. They are the daemon's (`protocol.hashwork`): separate programs, no forks of this one.

Invariants:
- a worker gets descriptors and returns digests; what they should be is compared here;
- "hash it yourself" (None) is always a possible answer: no worker is free, could be started, or lives any more;
- whoever waits for a worker ends: with its answer, when it has been silent for too long, or by `interrupt`;
- after `close` no process is left.
"""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.framing import FrameDecoder
from modelp2p.protocol.hashwork import MAX_REPLY_BYTES, READY, WORKER, encode_request, pieces_request

if TYPE_CHECKING:
    from modelp2p.loader.pieces import PieceTable

WORTH_BYTES = 128 << 20
"""To hash so much keeps one process busy for about as long as it takes to start: 0.1 s of one core."""
MAX_PROCESSES = 31
"""Each costs 9.4 MB of its own memory: 0.3 GB for all, and 1.8 GB on a machine of 192 cores were there no limit."""
PATIENCE_S = 60.0
"""How long one answer may take. 8 MiB are hashed in a few milliseconds; who waits this long hashes them itself."""
HURRY_S = 0.25
"""How long one may take that an interrupted load waits for: a worker that is well ends in it, and lives on."""


class Hashers:
    """Up to `limit` worker processes. Thread-safe; each serves one thread at a time.

    Args:
        limit: how many at most; never more than `MAX_PROCESSES`.
        worth_bytes: how much there must be to hash for each.
        patience_s: how long one answer may take.
    """

    def __init__(self, limit: int, worth_bytes: int = WORTH_BYTES, patience_s: float = PATIENCE_S) -> None:
        self.limit = min(limit, MAX_PROCESSES)
        self._worth = worth_bytes
        self.patience_s = patience_s
        self._lock = threading.Lock()
        self._all: list[_Process] = []
        self._free: list[_Process] = []
        self._interrupts = 0
        self._is_hurried = False
        self._is_closed = False
        self.trouble = ""
        """Why there are fewer workers than there could be; empty while all is well."""

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [process.pid for process in self._all]

    @property
    def busy(self) -> int:
        """How many of them somebody waits for."""
        return len(self._all) - len(self._free)

    def warm(self, size_bytes: int) -> None:
        """Start as many processes as hashing `size_bytes` is worth, and wait for none. Those of a closed one stay away."""
        with self._lock:
            self._is_hurried = self._is_closed
            while not self._is_closed and not self.trouble and len(self._all) < min(self.limit, size_bytes // self._worth):
                if missing := _missing_interpreter():
                    self.trouble = f"no process could be started to hash with: {missing}"
                    return
                try:
                    process = _Process()
                except OSError as exc:
                    self.trouble = f"no process could be started to hash with: {exc.strerror}"
                    return
                self._all.append(process)
                self._free.append(process)

    def hashes(self, fd: int, file_size: int, piece_length: int, pieces: range, origin: int = 0) -> bytes | None:
        """The hashes of consecutive pieces, 32 bytes each, or None: the caller has to hash them.

        Args:
            fd: the file, or a stretch of it in memory.
            file_size: of the file.
            piece_length: bytes.
            pieces: which of the file.
            origin: the byte of the file that `fd` begins with.
        """
        with self._lock:
            process = next((process for process in self._free if process.is_ready()), None)
            if process is None:
                return None
            self._free.remove(process)
            interrupts = self._interrupts
        request = pieces_request(file_size, piece_length, [(pieces.start, len(pieces))], origin)
        trouble = "a process that hashed ended, or could not read; this one hashes in its place"
        try:
            reply = process.ask(
                request, fd, lambda: HURRY_S if self._is_hurried or self._interrupts != interrupts else self.patience_s
            )
        except TimeoutError:
            # Whoever was interrupted does not know what was wrong, if anything.
            is_silent = not self._is_hurried and self._interrupts == interrupts
            reply, trouble = {}, f"a process that hashes said nothing for {self.patience_s:g} s" if is_silent else ""
        except (OSError, EOFError, FormatError):
            # Also where a mapping ended in SIGBUS: whoever hashes in its place finds out what is wrong with the file.
            reply = {}
        except BaseException:
            self._bury(process, "")
            raise
        hashes = reply.get("hashes")
        if not isinstance(hashes, bytes):
            self._bury(process, trouble)
            return None
        with self._lock:
            self._free.append(process)
        return hashes

    def prove(self, table: PieceTable, pieces: range, data: memoryview, fd: int, origin: int = 0) -> None:
        """Return if consecutive pieces are what the publisher signed, by whoever has time to hash them.

        Args:
            table: of their file.
            pieces: which.
            data: their bytes, for this process.
            fd: the same memory, for others, or the file that `data` is a mapping of; -1: there is none.
            origin: the byte of the file that `fd` begins with.

        Raises:
            IntegrityError: they are not.
        """
        hashes = self.hashes(fd, table.size, table.piece_length, pieces, origin) if fd >= 0 else None
        if hashes is None:
            table.check_run(pieces, data)
        else:
            table.compare_run(pieces, hashes)

    def interrupt(self) -> None:
        """Let nobody wait for a stuck process: until the next `warm`, one that does not answer in `HURRY_S` is ended.

        Whoever waited for it hashes instead. Takes no lock, so that a signal may come in the middle of anything. Idempotent.
        """
        self._is_hurried = True
        # For whoever waits while another load warms.
        self._interrupts += 1

    def close(self) -> None:
        """End all processes, and start no more. Nobody may be waiting for one. Idempotent."""
        with self._lock:
            self._is_closed = True
            ended, self._all, self._free = self._all, [], []
        for process in ended:
            process.close()

    def _bury(self, process: _Process, trouble: str) -> None:
        with self._lock:
            self.trouble = self.trouble or trouble
            if process in self._all:
                self._all.remove(process)
        process.close()


class _Process:
    """One worker: one request, one answer.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._decoder = FrameDecoder(MAX_REPLY_BYTES)
        try:
            with theirs:
                self._popen = subprocess.Popen(
                    [sys.executable, *WORKER, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            self._channel.sendall(encode_request(READY, mapped=True))
        except BaseException:
            self._channel.close()
            raise
        self._has_answered = False

    @property
    def pid(self) -> int:
        return self._popen.pid

    def is_ready(self) -> bool:
        """Whether it runs, or has failed to: either way a request will be answered at once."""
        # Not `select`, which knows no descriptors above 1,023.
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        if not self._has_answered and poll.poll(0):
            self._has_answered = True
            with contextlib.suppress(OSError, EOFError, FormatError):
                self._answer(lambda: HURRY_S)
        return self._has_answered

    def ask(self, request: codec.Map, fd: int, patience_s: Callable[[], float]) -> codec.Map:
        """The worker's answer.

        Args:
            request: what to do.
            fd: with what.
            patience_s: how long it may take, asked again and again.

        Raises:
            TimeoutError: it took longer.
            OSError, EOFError, FormatError: it is gone, or speaks nonsense.
        """
        data = encode_request(request, mapped=True)
        sent = socket.send_fds(self._channel, [data], [fd])
        self._channel.sendall(data[sent:])
        return self._answer(patience_s)

    def close(self) -> None:
        self._channel.close()
        # It has nothing to save.
        self._popen.kill()
        self._popen.wait()

    def _answer(self, patience_s: Callable[[], float]) -> codec.Map:
        # Not a timeout of the socket: how long we wait may change while we do.
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        begun = time.monotonic()
        while (frame := self._decoder.next_frame()) is None:
            while not poll.poll(1000 * min(HURRY_S, patience_s())):
                if time.monotonic() - begun >= patience_s():
                    raise TimeoutError
            received = self._channel.recv(65536)
            if not received:
                raise EOFError
            self._decoder.receive_data(received)
        return codec.unpack_map(frame, max_bytes=MAX_REPLY_BYTES)


def _missing_interpreter() -> str:
    """Why there is none to start; empty where there is one."""
    if getattr(sys, "frozen", False):
        # `sys.executable` is the application: it would be started once more, and load once more.
        return "this application is frozen, and brings no interpreter"
    return "" if sys.executable else "this application does not say where its interpreter is"
