"""How a verb reaches the daemon: the one place that connects, and that starts a daemon where none runs.

Invariants:
- a verb gets a connected client or a typed error, and the connection is closed whatever happens;
- a daemon is started only for verbs that may, and starting one is always said on stderr;
- the machine's service is asked only by verbs it serves, for a user who named no home and keeps nothing in an own one;
- what the daemon sends is data: nothing here interprets a result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from modelp2p.cli.output import say
from modelp2p.protocol.errors import DaemonError, DeniedError
from modelp2p.protocol.layout import MANIFESTS

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

    def connect_service(self) -> Client:
        """A client of the machine's service. Raises DaemonError where there is none, DeniedError where it refuses this user."""

    def start(self, home: str, config_toml: str) -> Client:
        """A client of a new daemon that leaves when its work is done. Raises DaemonError where it does not come up."""


class SocketConnector:
    """The real one, over the control socket."""

    def connect(self, home: str) -> Client:
        from modelp2p.daemon.client import Client as SocketClient

        return SocketClient.connect(home)

    def connect_service(self) -> Client:
        from modelp2p.daemon.client import Client as SocketClient

        return SocketClient.connect_public()

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
def daemon(app: App, *, start: bool = True, service: bool = False) -> Iterator[Client]:
    """A connected client for the time of the block; with `start`, of a new on-demand daemon where none runs.

    With `service` the verb is one that the machine's service answers to everybody: a user who has nothing here asks that one.

    Raises:
        DaemonError: none runs and none may or could be started.
        DeniedError: the daemon is another user's and not for this one.
        UsageError: the configuration for a new daemon is wrong.
    """
    client = _connect(app, start=start, service=service)
    try:
        yield client
    finally:
        client.close()


def _connect(app: App, *, start: bool, service: bool) -> Client:
    try:
        client = app.connector.connect(app.home)
    except DaemonError:
        if service and (client_of_service := _service(app)) is not None:
            return client_of_service
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


def _service(app: App) -> Client | None:
    """The machine's service, for a user without releases of an own; None where there is none for them."""
    if app.is_home_named or _keeps_releases(app.home):
        return None
    try:
        client = app.connector.connect_service()
    except (DaemonError, DeniedError):
        return None
    say(app, "You run no daemon and keep no releases: the service of this machine answers.")
    return client


def _keeps_releases(home: str) -> bool:
    try:
        return bool(os.listdir(os.path.join(home, MANIFESTS)))
    except OSError:
        return False
