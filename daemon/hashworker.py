"""One hash worker as the pool sees it: a child process and the socket to it.

Invariant: one request at a time; whoever was cancelled in the middle of one throws the worker away.
"""

from __future__ import annotations

import array
import socket
import subprocess
import sys
from typing import Self

import trio

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.framing import FrameDecoder
from modelp2p.protocol.hashwork import MAX_REPLY_BYTES, WORKER, encode_request


class WorkerDied(Exception):
    """The worker's process ended or spoke nonsense."""


class WorkerProcess:
    """A running worker; made by `start`, ended by `aclose`."""

    def __init__(self, process: trio.Process, channel: trio.socket.SocketType) -> None:
        self._process = process
        self._channel = channel
        self._decoder = FrameDecoder(MAX_REPLY_BYTES)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @classmethod
    async def start(cls) -> Self:
        """A new process that waits for requests; `OSError` when none can be made."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await trio.lowlevel.open_process(
                    [sys.executable, *WORKER, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                )
        except BaseException:
            ours.close()
            raise
        return cls(process, trio.socket.from_stdlib_socket(ours))

    async def ask(self, request: codec.Map, fd: int | None, *, mapped: bool) -> codec.Map:
        """The worker's reply to `request`, which takes a duplicate of `fd` with it.

        Raises:
            WorkerDied: instead of a reply.
        """
        data = encode_request(request, mapped=mapped)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        try:
            sent = await self._channel.sendmsg([data], rights)
            while sent < len(data):
                sent += await self._channel.send(data[sent:])
            while (frame := self._decoder.next_frame()) is None:
                received = await self._channel.recv(65536)
                if not received:
                    raise WorkerDied
                self._decoder.receive_data(received)
            return codec.unpack_map(frame, max_bytes=MAX_REPLY_BYTES)
        except (ConnectionError, FormatError) as exc:
            raise WorkerDied from exc

    async def aclose(self) -> None:
        """Ends the process, whatever it is doing, and waits until it is gone, also when cancelled."""
        self._channel.close()
        # A worker has nothing to save; waiting for its current 64 MiB would only delay the daemon's own end.
        self._process.kill()
        with trio.CancelScope(shield=True):
            await self._process.wait()
