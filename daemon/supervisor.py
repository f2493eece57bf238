"""`EngineSwarm`: the swarm interface over an engine process, which may crash and is started again.

Invariants:
- no process before the first use: short commands never pay for libtorrent;
- a new engine knows nothing: `EngineDied` and `EngineRestarted` bracket the gap, and commands given within it are
  dropped, because whoever hears `EngineRestarted` adds everything again;
- every queue is bounded: a reader that does not read holds the engine back, and libtorrent behind it;
- when `run` has returned there is no engine.

The engine is told nothing but the two folders it may see and what to share; names of hosts are resolved here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from errno import EACCES, EADDRINUSE
from ipaddress import ip_address

import trio

from modelp2p.daemon.swarm import MAX_WAITING_EVENTS, SwarmStatistics
from modelp2p.protocol.engine_wire import (
    MAX_FRAME_BYTES,
    V_MAX,
    V_MIN,
    Add,
    AddMagnet,
    Command,
    Configure,
    Connect,
    EngineDied,
    EngineRestarted,
    EngineSettings,
    Event,
    Flush,
    Hello,
    ListenFailed,
    Listening,
    MagnetSpec,
    Message,
    Peer,
    PeerUnresolved,
    Remove,
    SetConnections,
    SetLimits,
    SetPiecePriorities,
    SetWanted,
    SetWebSeeds,
    Throttle,
    TorrentSpec,
    check_hello,
    decode_message,
    encode_message,
)
from modelp2p.protocol.errors import FormatError, UnavailableError
from modelp2p.protocol.framing import FrameDecoder

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
STABLE_AFTER_S = 60.0
"""An engine that lived this long starts the back-off anew."""
CLOSE_TIMEOUT_S = 4.5
MAX_WAITING_COMMANDS = 64
PORT_TRIES = 20
_RECEIVE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class EngineFolders:
    """What an engine may touch: it writes below `data` and reads below `readable`."""

    data: str
    readable: tuple[str, ...] = ()


class EngineSwarm:
    """A `Swarm` whose work is done by a child process."""

    def __init__(self, settings: EngineSettings, folders: EngineFolders, *, first_backoff_s: float = FIRST_BACKOFF_S) -> None:
        self._settings = settings
        self._folders = folders
        self._first_backoff_s = first_backoff_s
        self._tell, self._events = trio.open_memory_channel[Event](MAX_WAITING_EVENTS)
        self._commands, self._queued = trio.open_memory_channel[bytes](MAX_WAITING_COMMANDS)
        self._lookups, self._to_resolve = trio.open_memory_channel[Connect](MAX_WAITING_COMMANDS)
        self._wanted = trio.Event()
        self._settled = trio.Event()
        self._finished = trio.Event()
        self._running: trio.CancelScope | None = None
        self._listening: Listening | None = None
        self._refused: list[ListenFailed] = []
        self._stream: trio.SocketStream | None = None
        """Where commands go; None before the first engine and between two."""
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = 0

    def __repr__(self) -> str:
        pid = self._process.pid if self._process else None
        return f"<EngineSwarm pid {pid}, {self._restarts} restarts, {self._settings.profile}>"

    @property
    def events(self) -> trio.MemoryReceiveChannel[Event]:
        return self._events

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            with trio.CancelScope() as self._running:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._resolve_all)
                    nursery.start_soon(self._forward_commands)
                    task_status.started()
                    await self._wanted.wait()
                    await self._keep_running()
        finally:
            self._settled.set()
            self._finished.set()
            self._tell.close()

    async def wait_listening(self) -> Listening:
        self._wanted.set()
        await self._settled.wait()
        taken = [failure for failure in self._refused if failure.errno in (EADDRINUSE, EACCES)]
        if taken and not self._settings.port_tries:
            raise UnavailableError(f"cannot listen on {taken[0].address}: {taken[0].message}", hint="Choose another port.")
        if self._listening is None or not self._listening.addresses:
            why = f"{self._refused[0].address}: {self._refused[0].message}" if self._refused else "the engine did not start"
            raise UnavailableError(f"cannot listen: {why}")
        return self._listening

    async def add(self, spec: TorrentSpec) -> None:
        known, named = _split(spec.peers)
        await self._send(Add(replace(spec, peers=known)))
        await self._look_up(spec.info_hash, named)

    async def add_magnet(self, spec: MagnetSpec) -> None:
        known, named = _split(spec.peers)
        await self._send(AddMagnet(replace(spec, peers=known)))
        await self._look_up(spec.info_hash, named)

    async def remove(self, info_hash: bytes) -> None:
        await self._send(Remove(info_hash))

    async def connect(self, info_hash: bytes, peers: Iterable[Peer]) -> None:
        known, named = _split(tuple(peers))
        if known:
            await self._send(Connect(info_hash, known))
        await self._look_up(info_hash, named)

    async def set_wanted(self, info_hash: bytes, paths: Iterable[str]) -> None:
        await self._send(SetWanted(info_hash, tuple(paths)))

    async def set_piece_priorities(self, info_hash: bytes, priorities: Mapping[int, int]) -> None:
        await self._send(SetPiecePriorities(info_hash, tuple(priorities), bytes(priorities.values())))

    async def set_web_seeds(self, info_hash: bytes, urls: Iterable[str]) -> None:
        await self._send(SetWebSeeds(info_hash, tuple(urls)))

    async def set_limits(self, info_hash: bytes | None, up: int, down: int) -> None:
        if info_hash is None:
            # The next engine starts with them.
            self._settings = replace(self._settings, max_up=up, max_down=down)
            if not self._wanted.is_set():
                return
        await self._send(SetLimits(info_hash, up, down))

    async def set_connections(self, limit: int) -> None:
        # The next engine starts with it.
        self._settings = replace(self._settings, connections=limit)
        if self._wanted.is_set():
            await self._send(SetConnections(limit))

    async def throttle(self, info_hash: bytes, held: bool) -> None:
        await self._send(Throttle(info_hash, held))

    async def flush(self, info_hash: bytes) -> None:
        await self._send(Flush(info_hash))

    def statistics(self) -> SwarmStatistics:
        listening = self._listening
        return SwarmStatistics(
            engine_pid=self._process.pid if self._process else 0,
            listen_port=listening.port if listening else 0,
            landlock=listening.landlock if listening else 0,
            restarts=self._restarts,
            waiting_events=self._events.statistics().current_buffer_used,
        )

    async def aclose(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await self._finished.wait()

    async def _send(self, command: Command) -> None:
        frame = encode_message(command)
        self._wanted.set()
        await self._commands.send(frame)

    async def _keep_running(self) -> None:
        backoff_s = self._first_backoff_s
        while True:
            began = trio.current_time()
            reason = await self._run_engine()
            self._settled.set()
            if trio.current_time() - began >= STABLE_AFTER_S:
                backoff_s = self._first_backoff_s
            await self._tell.send(EngineDied(reason))
            await trio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            self._restarts += 1

    async def _forward_commands(self) -> None:
        # Apart from everything else, and always reading: the reader of events may be the one who waits to send a command.
        await self._settled.wait()
        async for frame in self._queued:
            if self._stream is not None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    # A broken stream is seen, and told, where it is read.
                    await self._stream.send_all(frame)

    async def _run_engine(self) -> str:
        """One engine from start to end; returns why it ended."""
        ours, process = _spawn()
        self._process = process
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        outcome = "the engine closed its connection"
        try:
            outcome = await self._talk(stream) or outcome
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            outcome = "the connection to the engine broke"
        except FormatError as error:
            outcome = f"the engine sent nonsense: {error.message}"
        finally:
            self._stream = None
            with trio.CancelScope(shield=True):
                await stream.aclose()
                code = await _wait_exit(process)
                self._process = None
        return f"{outcome}; {_exit_reason(code)}"

    def _settings_now(self) -> EngineSettings:
        """As given, but a new engine asks for the port the old one had: links and peers know that one."""
        known, settings = self._listening, self._settings
        if known is None:
            return settings
        hosts = [(host, port) for host, _, port in (text.rpartition(":") for text in settings.listen)]
        if not settings.port_tries and all(port != "0" for _, port in hosts):
            return settings
        listen = tuple(f"{host}:{known.port}" for host, _ in hosts)
        # Somebody may have taken it meanwhile, and nobody insisted on it.
        return replace(settings, listen=listen, port_tries=settings.port_tries or PORT_TRIES)

    async def _talk(self, stream: trio.SocketStream) -> str:
        folders = self._folders
        await stream.send_all(encode_message(Hello(V_MIN, V_MAX, "daemon")))
        await stream.send_all(encode_message(Configure(self._settings_now(), folders.data, folders.readable)))
        receiver = _Receiver(stream)
        hello = await receiver.next_message()
        if hello is None:
            return "the engine did not start"
        check_hello(hello)
        self._refused = []
        while not isinstance(message := await receiver.next_message(), Listening):
            if message is None:
                return "the engine did not come up"
            await self._hear(message)
        self._listening = message
        self._stream = stream
        self._settled.set()
        if self._restarts:
            await self._tell.send(EngineRestarted())
        await self._hear(message)
        while (later := await receiver.next_message()) is not None:
            await self._hear(later)
        return ""

    async def _hear(self, message: Message) -> None:
        if isinstance(message, ListenFailed):
            self._refused.append(message)
        if isinstance(message, Hello | Command):
            raise FormatError("the engine sent a command")
        await self._tell.send(message)

    async def _look_up(self, info_hash: bytes, named: tuple[Peer, ...]) -> None:
        if named:
            await self._lookups.send(Connect(info_hash, named))

    async def _resolve_all(self) -> None:
        async with trio.open_nursery() as nursery:
            async for request in self._to_resolve:
                for peer in request.peers:
                    nursery.start_soon(self._resolve, request.info_hash, peer)

    async def _resolve(self, info_hash: bytes, peer: Peer) -> None:
        try:
            found = await trio.socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:
            await self._tell.send(PeerUnresolved(info_hash, peer.host, str(exc)))
            return
        hosts = dict.fromkeys(str(address[4][0]) for address in found)
        await self._send(Connect(info_hash, tuple(Peer(host, peer.port) for host in hosts)))


class _Receiver:
    """Messages off a stream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._decoder = FrameDecoder(MAX_FRAME_BYTES)

    async def next_message(self) -> Message | None:
        """The next one, or None at the end of the stream."""
        while (frame := self._decoder.next_frame()) is None:
            data = await self._stream.receive_some(_RECEIVE_BYTES)
            if not data:
                return None
            self._decoder.receive_data(data)
        return decode_message(frame)


def _spawn() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [
            sys.executable,
            "-P",
            "-m",
            "modelp2p.daemon.engine",
            "--fd",
            str(theirs.fileno()),
            "--parent",
            str(os.getpid()),
        ]
        # glibc gives each of libtorrent's dozen threads a heap of its own, which keeps what was freed: a fetch of 4 GiB peaked at
        # 350 MB so; with two heaps it is 265 to 320 MB, and as fast.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
        # On this thread on purpose: the kernel ends the engine with the *thread* that started it, so a worker's won't do.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            cwd="/",
            env=environment,
        )
    return ours, process


async def _wait_exit(process: subprocess.Popen[bytes]) -> int:
    """Waits for the process to end by itself (its socket is closed), then makes it."""
    watch = os.pidfd_open(process.pid)
    try:
        with trio.move_on_after(CLOSE_TIMEOUT_S):
            await trio.lowlevel.wait_readable(watch)
        if process.poll() is None:
            process.kill()
            await trio.lowlevel.wait_readable(watch)
    finally:
        os.close(watch)
    return process.wait()


def _exit_reason(code: int) -> str:
    return f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it left with code {code}"


def _split(peers: tuple[Peer, ...]) -> tuple[tuple[Peer, ...], tuple[Peer, ...]]:
    """Peers given by address, and those given by name."""
    known = tuple(peer for peer in peers if _is_literal(peer.host))
    return known, tuple(peer for peer in peers if peer not in known)


def _is_literal(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
