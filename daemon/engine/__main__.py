"""`python -m modelp2p.daemon.engine --fd N --parent PID`: started by `daemon.supervisor` and by nobody else.

Invariants:
- the process locks itself in before it opens a session, and never without having been told its folders;
- it ends when its control socket closes, on SIGTERM, or with its parent; within `EXIT_TIMEOUT_S` whatever libtorrent does;
- when the daemon does not read, it stops reading alerts: nothing here grows without bound.
"""

from __future__ import annotations

import argparse
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from modelp2p.daemon.engine import sandbox
from modelp2p.daemon.engine.session import Session
from modelp2p.protocol.engine_wire import (
    MAX_FRAME_BYTES,
    V_MAX,
    V_MIN,
    Command,
    Configure,
    Hello,
    Message,
    check_hello,
    decode_message,
    encode_message,
)
from modelp2p.protocol.errors import DaemonError
from modelp2p.protocol.framing import FrameDecoder

EXIT_TIMEOUT_S = 4
TICK_S = 1.0
MAX_UNSENT_BYTES = 4 << 20
"""Beyond this the daemon is not reading, and alerts stay with libtorrent, which drops and says so."""
READ_SPACING_S = 0.02
"""Least time between two looks at libtorrent's alerts: nothing that is decided with them is decided faster."""
_RECEIVE_BYTES = 256 << 10
# Where distributions keep the certificates that the wheel's own OpenSSL does not find.
_CERTIFICATES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


class Control:
    """The socket to the daemon, non-blocking, with what could not be sent yet."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._decoder = FrameDecoder(MAX_FRAME_BYTES)
        self._unsent = bytearray()
        self.is_open = True
        connection.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent_bytes(self) -> int:
        """What waits for the daemon to read."""
        return len(self._unsent)

    def send(self, messages: Iterable[Message]) -> None:
        """Queues messages and sends what fits."""
        for message in messages:
            self._unsent += encode_message(message)
        self.flush()

    def flush(self) -> None:
        """Sends what fits."""
        try:
            while self._unsent:
                # A slice keeps the copy small: send takes what the socket's buffer holds.
                del self._unsent[: self._socket.send(self._unsent[:_RECEIVE_BYTES])]
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False

    def receive(self) -> list[Message]:
        """The messages that have arrived; clears `is_open` at the end of the stream."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.is_open = False
        self._decoder.receive_data(data)
        messages = []
        while (frame := self._decoder.next_frame()) is not None:
            messages.append(decode_message(frame))
        return messages


def main(arguments: list[str]) -> None:
    """Runs an engine until its daemon leaves."""
    parser = argparse.ArgumentParser(prog="modelp2p-engine", description="Internal: started by the modelp2p daemon.")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    # Ctrl-C goes to the whole terminal group; the daemon decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopping, stopped_by = socket.socketpair()
    stopping.setblocking(False)
    stopped_by.setblocking(False)
    signal.set_wakeup_fd(stopped_by.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    sandbox.die_with(options.parent)
    os.umask(0o077)
    for path in _CERTIFICATES:
        if Path(path).exists():
            os.environ.setdefault("SSL_CERT_FILE", path)
    control = Control(socket.socket(fileno=options.fd))
    control.send([Hello(V_MIN, V_MAX, "engine")])
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(stopping, selectors.EVENT_READ)
        configure, early = _wait_configured(selector, control)
        if configure is None:
            return
        landlock = sandbox.enter([configure.data], configure.readable)
        session = Session(configure.settings)
        selector.register(session, selectors.EVENT_READ)
        control.send(session.listening(landlock))
        _perform(session, control, early)
        _serve(selector, control, session)
    # libtorrent may wait for its threads holding every lock Python has; the kernel's alarm ends that.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(EXIT_TIMEOUT_S)
    session.close()


def _wait_configured(selector: selectors.BaseSelector, control: Control) -> tuple[Configure | None, list[Message]]:
    messages: list[Message] = []
    while len(messages) < 2:
        if any(key.fileobj is not control for key, _ in selector.select()):
            return None, []
        messages += control.receive()
        if not control.is_open:
            return None, []
    check_hello(messages[0])
    if not isinstance(messages[1], Configure):
        raise DaemonError("an engine has to be configured first")
    return messages[1], messages[2:]


def _serve(selector: selectors.BaseSelector, control: Control, session: Session) -> None:
    next_tick = time.monotonic() + TICK_S
    # Alerts wait here until then. A wake-up for each of a thousand pieces a second, in two processes, is a tenth of a transfer.
    next_read = 0.0
    is_listening = True
    while control.is_open:
        now = time.monotonic()
        may_read = now >= next_read and control.unsent_bytes <= MAX_UNSENT_BYTES
        if may_read != is_listening:
            # The wake-up socket stays readable: a session that is not to be read must not be waited for either.
            if may_read:
                selector.register(session, selectors.EVENT_READ)
            else:
                selector.unregister(session)
            is_listening = may_read
        selector.modify(control, selectors.EVENT_READ | (selectors.EVENT_WRITE if control.unsent_bytes else 0))
        until = next_tick if may_read else min(next_tick, max(next_read, now + READ_SPACING_S))
        for key, _ in selector.select(max(0.0, until - now)):
            if key.fileobj is control:
                control.flush()
                _perform(session, control, control.receive())
            elif key.fileobj is session:
                next_read = time.monotonic() + READ_SPACING_S
                control.send(session.read_events())
            else:
                return
        if time.monotonic() >= next_tick:
            next_tick = time.monotonic() + TICK_S
            if control.unsent_bytes <= MAX_UNSENT_BYTES:
                session.tick()
                # A backstop, should a wake-up ever be lost.
                control.send(session.read_events())


def _perform(session: Session, control: Control, messages: Iterable[Message]) -> None:
    for message in messages:
        if not isinstance(message, Command):
            raise DaemonError("the daemon sent something that is no command")
        control.send(session.handle(message))


if __name__ == "__main__":
    main(sys.argv[1:])
