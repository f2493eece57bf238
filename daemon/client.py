"""The blocking client of the control socket: standard library and `protocol` only, so that any process may use it cheaply.

Invariants:
- it talks only to a socket whose peer process belongs to this user, to root or to the service's user: whoever owns the folder
  (the service's below /run, or the home that was named) in which the socket was found;
- descriptors received in a `Reply` belong to the caller; those sent stay the caller's;
- closing the connection during a call cancels the call (a fetch pauses when its last client leaves).

A call waits for ever unless it is told how much silence is too much: progress and giving up are the daemon's to judge, and a dead
daemon is end of file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Self

from modelp2p.daemon.lock import read_lock
from modelp2p.protocol import control
from modelp2p.protocol.control import Event, Failure, Hello, Message, Request, Result
from modelp2p.protocol.errors import DaemonError, DeniedError, FormatError, ModelP2PError, error_of
from modelp2p.protocol.framing import FrameDecoder
from modelp2p.protocol.layout import LOCK, PUBLIC_SOCKET

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

SERVICE_SOCKET = f"/run/modelp2p/{PUBLIC_SOCKET}"
"""Where `configs/modelp2p.service` opens itself to the users of the machine."""
CONNECT_TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0
LEAVE_TIMEOUT_S = 15.0
_READ_BYTES = 1 << 16
_ROOT_UID = 0
_NO_SERVICE_HINT = "Its administrator starts it, and opens it to other users with 'public = true' below [control]."
_NO_DAEMON_HINT = "Start one with 'modelp2p daemon', or check that MODELP2P_HOME names the home it uses."


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of a call, and descriptors that came with it (the caller closes them)."""

    result: Map
    fds: tuple[int, ...]

    def read_fds(self, limit_bytes: int) -> list[bytes]:
        """The whole content of each descriptor (sealed memory files), which this closes.

        Raises:
            FormatError: one holds more than `limit_bytes`.
        """
        contents = []
        try:
            for fd in self.fds:
                size = os.fstat(fd).st_size
                if size > limit_bytes:
                    raise FormatError(f"the daemon sent {size} bytes where at most {limit_bytes} are allowed")
                contents.append(os.pread(fd, size, 0))
        finally:
            for fd in self.fds:
                os.close(fd)
        return contents


class Client:
    """One connection; calls are made one after another."""

    def __init__(self, connection: socket.socket, started: subprocess.Popen[bytes] | None = None) -> None:
        self._socket = connection
        self._started = started
        self._decoder = FrameDecoder(control.MAX_FRAME_BYTES)
        self._fds: list[int] = []
        self._next_id = 1

    @classmethod
    def connect(cls, home: str, *, service_uid: int | None = None) -> Client:
        """A connection to the daemon of `home`: where it is another user's, by the public socket if there is one.

        Raises:
            DaemonError: none runs there, it is not ours, or it speaks another version.
            DeniedError: it refuses this user.
        """
        public = os.path.join(home, PUBLIC_SOCKET)
        if not _may_enter(os.path.join(home, os.path.dirname(LOCK))) and os.path.lexists(public):
            return cls.connect_public(public)
        holder = read_lock(os.path.join(home, LOCK))
        if holder is None:
            raise DaemonError(f"no daemon is running for {home}", hint=_NO_DAEMON_HINT)
        return cls._open(holder.socket, home, f"the daemon (pid {holder.pid})", service_uid, _NO_DAEMON_HINT)

    @classmethod
    def connect_public(cls, path: str = SERVICE_SOCKET) -> Client:
        """A connection to a service that other users may ask as well; it answers less than its owner hears.

        Raises:
            DaemonError: there is no such service, or its socket is not its own.
            DeniedError: it refuses this user.
        """
        folder = os.path.dirname(path)
        try:
            service_uid = os.stat(folder).st_uid
        except OSError as exc:
            raise DaemonError(f"no service answers at {path}: {exc.strerror}", hint=_NO_SERVICE_HINT) from exc
        return cls._open(path, folder, "the service", service_uid, _NO_SERVICE_HINT)

    @classmethod
    def _open(cls, path: str, home: str, who: str, service_uid: int | None, hint: str) -> Client:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Not `settimeout` yet: a socket that does not block is told EAGAIN at once where others are waiting, too.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(CONNECT_TIMEOUT_S))
            with _short_path(path) as address:
                connection.connect(address)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(0))
            connection.settimeout(CONNECT_TIMEOUT_S)
            _check_peer(connection, home, service_uid)
            client = cls(connection)
            client._send(Hello(control.V_MIN, control.V_MAX, build()), ())
            answer = client._receive()
            if isinstance(answer, Failure):
                raise answer.error()
            control.check_hello(answer)
        except (TimeoutError, BlockingIOError) as exc:
            connection.close()
            raise DaemonError(f"{who} does not answer", hint="It may be stopped or stuck.") from exc
        except OSError as exc:
            connection.close()
            raise DaemonError(f"no daemon answers for {home}: {exc.strerror or exc}", hint=hint) from exc
        except ModelP2PError:
            connection.close()
            raise
        connection.settimeout(None)
        return client

    @classmethod
    def start_on_demand(cls, home: str, config_toml: str = "", environment: dict[str, str] | None = None) -> Client:
        """Start a daemon that leaves when its last client and job are gone, and connect to it.

        Args:
            home: the home it shall use.
            config_toml: its whole configuration; empty means all defaults.
            environment: of the new process; default: this one's.

        Raises:
            DaemonError: it did not come up; the message is its own last line.
        """
        ready, told = os.pipe()
        config = os.memfd_create("config")
        try:
            os.write(config, config_toml.encode("utf-8"))
            os.lseek(config, 0, os.SEEK_SET)
            command = [sys.executable, "-m", "modelp2p.daemon", "--home", home, "--on-demand"]
            command += ["--ready-fd", str(told), "--config-fd", str(config)]
            # Its own session: Ctrl-C in the terminal is for the client, which then closes the connection.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(told, config),
                start_new_session=True,
                env=environment,
            )
        finally:
            os.close(told)
            os.close(config)
        with os.fdopen(ready, "rb") as pipe:
            word = pipe.read(4096)
        if word != b"READY\n":
            process.wait(START_TIMEOUT_S)
            with contextlib.suppress(DaemonError):
                return cls.connect(home)  # somebody else's daemon took the lock first
            kind, _, rest = word.decode("utf-8", "replace").partition("\t")
            message, _, hint = rest.rstrip("\n").partition("\t")
            raise error_of(kind, message, hint) if message else DaemonError("the on-demand daemon did not start")
        client = cls.connect(home)
        client._started = process
        return client

    @property
    def started_pid(self) -> int | None:
        """Pid of the daemon this client brought, or None."""
        return self._started.pid if self._started else None

    def call(
        self,
        verb: str,
        args: Map,
        fds: Sequence[int] = (),
        on_event: Callable[[Map], None] | None = None,
        *,
        silence_s: float | None = None,
    ) -> Reply:
        """Ask `verb` and wait for its result, handing each event to `on_event` as it comes.

        Args:
            verb: what to do.
            args: of the verb.
            fds: descriptors to send along.
            on_event: told the progress.
            silence_s: how long neither event nor result may come; then nothing more can be called, and what is left is to close.

        Raises:
            ModelP2PError: whatever the daemon answered.
            DaemonError: the connection broke, or the daemon was silent for too long.
        """
        number = self._next_id
        self._next_id += 1
        try:
            self._socket.settimeout(silence_s)
            self._send(Request(number, verb, args, len(fds)), fds)
            while True:
                message = self._receive()
                match message:
                    case Event(id, body) if id == number:
                        if on_event is not None:
                            on_event(body)
                    case Result(id, body, count) if id == number:
                        return Reply(body, self._take_fds(count))
                    case Failure(id) if id in (number, 0):
                        raise message.error()
                    case _:
                        continue  # the tail of an earlier, abandoned call
        except TimeoutError as exc:
            raise DaemonError(f"the daemon said nothing for {silence_s:g} s", hint="It may be stopped or stuck.") from exc
        except OSError as exc:
            raise DaemonError(f"the connection to the daemon broke: {exc.strerror or exc}") from exc

    def hang_up(self) -> None:
        """End a call in which another thread waits: it raises DaemonError there, and nothing more can be called."""
        # One that was closed, or that the daemon left, cannot be shut down again.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up, and wait for a daemon this client brought to leave."""
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        if self._started is not None:
            try:
                self._started.wait(LEAVE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._started.send_signal(signal.SIGTERM)
            self._started = None

    def detach(self) -> None:
        """Leave a daemon this client brought to finish its job alone."""
        if self._started is not None:
            # Popen would warn about the child it still knows; the daemon is in its own session and outlives us.
            self._started.returncode = 0
            self._started = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _send(self, message: Message, fds: Sequence[int]) -> None:
        data = control.encode_message(message)
        # A daemon that refuses a client says so and hangs up, unasked: its words are waiting to be read.
        with contextlib.suppress(BrokenPipeError):
            if fds:
                try:
                    sent = socket.send_fds(self._socket, [data], list(fds))
                except PermissionError as exc:
                    # A public socket takes none, and the kernel says so here.
                    raise DeniedError(
                        "files and folders are taken from the owner of this daemon only",
                        hint="Run it as the daemon's user or root, or with a daemon of your own (MODELP2P_HOME).",
                    ) from exc
                data = data[sent:]
            self._socket.sendall(data)

    def _receive(self) -> Message:
        while (frame := self._decoder.next_frame()) is None:
            data, fds, _, _ = socket.recv_fds(self._socket, _READ_BYTES, control.MAX_FDS)
            self._fds.extend(fds)
            if not data:
                raise DaemonError("the daemon closed the connection", hint="Its log says why.")
            self._decoder.receive_data(data)
        return control.decode_message(frame)

    def _take_fds(self, count: int) -> tuple[int, ...]:
        if count > len(self._fds):
            raise DaemonError("the daemon announced descriptors that did not come")
        taken, self._fds = tuple(self._fds[:count]), self._fds[count:]
        return taken


def _may_enter(folder: str) -> bool:
    """Whether this user may; also where there is no such folder yet."""
    return os.access(folder, os.X_OK) or not os.path.exists(folder)


def build() -> str:
    """This build, for humans: shown in version errors."""
    return f"modelp2p {version('modelp2p')}"


@contextlib.contextmanager
def _short_path(path: str) -> Iterator[str]:
    """`path` in a form that fits the 107 bytes of a socket address."""
    if len(os.fsencode(path)) <= 107:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def _timeval(seconds: float) -> bytes:
    """A `struct timeval` (two longs on every 64-bit Linux)."""
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))


def _check_peer(connection: socket.socket, home: str, service_uid: int | None) -> None:
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    allowed = {os.getuid(), _ROOT_UID, service_uid}
    if os.getuid() == _ROOT_UID:
        # Root commands a service's daemon; whoever owns the home could have changed it all anyway.
        allowed.add(os.stat(home).st_uid)
    if uid not in allowed:
        raise DaemonError(
            f"the control socket belongs to user {uid}, who is neither you, root nor the service user",
            hint="Somebody may have put it there to deceive you. Nothing was sent.",
        )
