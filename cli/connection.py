"""How a verb reaches the daemon: the one place that connects, and that starts a daemon where none runs.

Invariants:
- a verb gets a connected client or a typed error, and the connection is closed whatever happens;
- a daemon is started only for verbs that may, and starting one is always said on stderr;
- what the daemon sends is data: nothing here interprets a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from modelp2p.cli.output import say
from modelp2p.protocol.errors import DaemonError

if TYPE_CHECKING:
    from modelp2p.cli.app import App
    from modelp2p.protocol.codec import Map


class Reply(Protocol):
    """A result map, and descriptors the caller owns."""

    @property
    def result(self) -> Map:
        """The result."""

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors that came with it."""

    def read_fds(self, limit_bytes: int) -> list[bytes]:
        """The whole content of each descriptor, which this closes; FormatError where one holds more than the limit."""


class Client(Protocol):
    """What verbs need of `modelp2p.daemon.client.Client`."""

    @property
    def started_pid(self) -> int | None:
        """Pid of the daemon this client brought, or None."""

    def call(self, verb: str, args: Map, fds: Sequence[int] = (), on_event: Callable[[Map], None] | None = None) -> Reply:
        """Ask and wait. Raises whatever `ModelP2PError` the daemon answered; closing the client cancels the call."""

    def detach(self) -> None:
        """Leave a daemon this client brought to finish its job alone."""

    def close(self) -> None:
        """Hang up."""


class Connector(Protocol):
    """Makes clients; tests bring their own."""

    def connect(self, home: str) -> Client:
        """A client of the daemon that serves `home`. Raises DaemonError where none does."""

    def start(self, home: str, config_toml: str) -> Client:
        """A client of a new daemon that leaves when its work is done. Raises DaemonError where it does not come up."""


class SocketConnector:
    """The real one, over the control socket."""

    def connect(self, home: str) -> Client:
        from modelp2p.daemon.client import Client as SocketClient

        return SocketClient.connect(home)

    def start(self, home: str, config_toml: str) -> Client:
        from modelp2p.daemon.client import Client as SocketClient

        return SocketClient.start_on_demand(home, config_toml)


@contextmanager
def running_daemon(app: App) -> Iterator[Client | None]:
    """A client of the daemon that runs already, for the time of the block, or None where none does."""
    try:
        client = app.connector.connect(app.home)
    except DaemonError:
        yield None
        return
    try:
        yield client
    finally:
        client.close()


@contextmanager
def daemon(app: App, *, start: bool = True) -> Iterator[Client]:
    """A connected client for the time of the block; with `start`, of a new on-demand daemon where none runs.

    Raises:
        DaemonError: none runs and none may or could be started.
        UsageError: the configuration for a new daemon is wrong.
    """
    client = _connect(app, start=start)
    try:
        yield client
    finally:
        client.close()


def _connect(app: App, *, start: bool) -> Client:
    try:
        client = app.connector.connect(app.home)
    except DaemonError:
        if not start:
            raise
    else:
        if ignored := sorted(app.flags):
            say(app, f"A daemon runs already: {', '.join(ignored)} of this command line does not change it.")
        return client
    from modelp2p.cli.configuring import effective_config
    from modelp2p.daemon.config import config_to_toml

    client = app.connector.start(app.home, config_to_toml(effective_config(app).config))
    say(app, f"No daemon was running: started one for this command (pid {client.started_pid}).")
    return client
