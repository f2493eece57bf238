"""The composition root: builds one daemon from a home and a configuration, and takes it down in order.

Start: lock, store, library, hash workers, swarm, control socket, HTTP, detached fetches, `READY`. End (SIGTERM, SIGINT,
`stop`, or idle on demand): clients are cut off, transfers leave the swarm, the engine gets up to 5 s, and the process exits 0.
All resume state is in the journals before that, so `kill -9` at any moment loses nothing that was proven.
"""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.accounts import public_gate
from modelp2p.daemon.cleaning import remove_abandoned_publishes
from modelp2p.daemon.client import build
from modelp2p.daemon.control import ControlServer
from modelp2p.daemon.diskerror import on_disk
from modelp2p.daemon.files import atomic_symlink
from modelp2p.daemon.gate import OwnerGate
from modelp2p.daemon.gateway import load_token
from modelp2p.daemon.hashing import HashPool
from modelp2p.daemon.httpd import HttpServer
from modelp2p.daemon.library import Library
from modelp2p.daemon.lock import HomeLock, this_daemon
from modelp2p.daemon.node import Node
from modelp2p.daemon.notify import Notifier
from modelp2p.daemon.public_door import PublicDoor
from modelp2p.daemon.reloading import configured_peers, reload_on_signal
from modelp2p.daemon.requests import Target
from modelp2p.daemon.service import Service, entry_of
from modelp2p.daemon.store import Store
from modelp2p.daemon.supervisor import EngineFolders, EngineSwarm
from modelp2p.protocol import layout
from modelp2p.protocol.engine_wire import EngineSettings
from modelp2p.protocol.errors import ModelP2PError

if TYPE_CHECKING:
    from modelp2p.daemon.config import Config

log = logging.getLogger(__name__)

DEFAULT_PORT_TRIES = 100
"""How far the built-in default port may move when it is busy; a port somebody named never moves."""
FIRST_CLIENT_S = 60.0
"""An on-demand daemon nobody connects to leaves after this long."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the process was given by whoever started it; read from the environment by the command line only."""

    runtime_dir: str | None = None
    """`$XDG_RUNTIME_DIR`, or `/run` for a service: where the socket goes."""
    service_dir: str | None = None
    """systemd's `$RUNTIME_DIRECTORY`, which makes this daemon a service: where its public socket goes."""
    notify_socket: str | None = None
    """systemd's `$NOTIFY_SOCKET`."""
    on_demand: bool = False
    ready_fd: int | None = None
    """Told `READY`, or one line that says why not."""
    seed_refs: tuple[str, ...] | None = None
    """Serve only these; None serves everything complete."""
    read_config: Callable[[], Config] | None = None
    """Reads the configuration again, as it was read for the start; None where there is nothing to read."""


def run_daemon(home: str, config: Config, surroundings: Surroundings | None = None) -> int:
    """Run until told to stop. Returns the exit code 0.

    Raises:
        ModelP2PError: it could not start.
    """
    given = surroundings or Surroundings()
    try:
        return trio.run(_run, Path(home).absolute(), config, given)
    except ModelP2PError as exc:
        if given.ready_fd is not None:
            _tell(given.ready_fd, f"{exc.kind.name}\t{exc.message}\t{exc.hint}\n")
        raise
    except BaseExceptionGroup as group:
        _, rest = group.split(ModelP2PError)
        if rest is not None:
            raise
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if given.ready_fd is not None and isinstance(first, ModelP2PError):
            _tell(given.ready_fd, f"{first.kind.name}\t{first.message}\t{first.hint}\n")
        raise first from None


async def _run(home: Path, config: Config, given: Surroundings) -> int:
    _set_up_logging(config)
    _raise_descriptor_limit()
    os.umask(0o022)  # modes are set one by one; this is for what libraries create
    with on_disk(f"cannot make the home {home}"):
        (home / layout.RUN).mkdir(mode=0o700, parents=True, exist_ok=True)
    address = _socket_path(home, given)
    lock = HomeLock.acquire(home / layout.LOCK, this_daemon(str(address), pid=os.getpid(), host=socket.gethostname()))
    with lock:
        store = Store.open(home)
        try:
            library = Library(store)
            library.load()
            swarm = EngineSwarm(_engine_settings(config), _engine_folders(home))
            workers = config.hashing.workers or len(os.sched_getaffinity(0))
            async with HashPool(workers=workers) as pool, trio.open_nursery() as nursery:
                node = Node(store, library, swarm, pool, config, configured_peers(config))
                node.restore()
                remove_abandoned_publishes(node)
                try:
                    await _serve(node, nursery, address, given)
                finally:
                    with trio.CancelScope(shield=True):
                        await swarm.aclose()
                nursery.cancel_scope.cancel()
        finally:
            store.close()
    log.info("stopped; everything proven is on the disk")
    return 0


async def _serve(node: Node, nursery: trio.Nursery, address: Path, given: Surroundings) -> None:
    """Run everything until somebody says stop."""
    stop = trio.Event()
    ready = trio.Event()
    notifier = Notifier(given.notify_socket)
    await nursery.start(node.swarm.run)
    async with trio.open_nursery() as inner:
        await inner.start(node.run)
        service = Service(node, inner, on_demand=given.on_demand, stop=stop.set)
        server = ControlServer(address, service.handle, OwnerGate(os.getuid()))
        server.on_close = service.forget
        if given.on_demand:
            server.on_idle = lambda: None if service.is_busy else stop.set()
            service.on_idle = lambda: None if server.clients else stop.set()
            inner.start_soon(_leave_if_alone, server, service, stop)
        await inner.start(_stop_on_signal, stop)
        if given.read_config is not None:
            await inner.start(reload_on_signal, node, given.read_config, notifier, ready, stop.set)
        await inner.start(server.serve)
        if given.service_dir and node.config.control.public:
            await _serve_public(node, inner, service, Path(given.service_dir))
        if node.config.gateway.enabled and not given.on_demand:
            await _serve_gateway(node, inner, service)
        if node.config.public_http.enabled and not given.on_demand:
            await _serve_public_http(node, inner, service)
        port = 0
        if not given.on_demand:
            port = (await node.swarm.wait_listening()).port
            await _seed_all(node, given.seed_refs)
            # After serving what is here already: a fetch holds its release until it ends, and READY would wait for it.
            service.take_up_jobs()
        _say_ready(given, node, port)
        notifier.tell(f"READY=1\nSTATUS=port {port}, {len(node.shared)} releases")
        ready.set()
        inner.start_soon(notifier.keep_alive)
        await stop.wait()
        notifier.tell("STOPPING=1")
        inner.cancel_scope.cancel()
    service.close()


async def _serve_public(node: Node, nursery: trio.Nursery, service: Service, folder: Path) -> None:
    """Open the service to other users of the machine.

    Only where systemd made a folder for it: every user's own daemon reads the machine's configuration too, and shall not
    open a home to others because the service's does.
    """
    server = ControlServer(folder / layout.PUBLIC_SOCKET, service.handle, public_gate(node.config))
    server.on_close = service.forget
    await nursery.start(server.serve)
    # For those who name the home instead of the service.
    await trio.to_thread.run_sync(atomic_symlink, server.path, node.store.path(layout.PUBLIC_SOCKET))


async def _serve_gateway(node: Node, nursery: trio.Nursery, service: Service) -> None:
    """Open the Hugging Face endpoint. Not for a daemon that leaves with its last command: nobody could rely on it."""
    gateway = service.gateway(await trio.to_thread.run_sync(load_token, node.store))
    port = await nursery.start(HttpServer(gateway.handle, node.config.gateway.port).serve)
    service.endpoint = gateway.endpoint(port)
    log.info("the gateway listens on 127.0.0.1:%d; 'modelp2p env' prints its address", port)


async def _serve_public_http(node: Node, nursery: trio.Nursery, service: Service) -> None:
    """Open the web seed for everybody. Not for a daemon that leaves with its last command."""
    door = PublicDoor(node.config.public_http)
    await nursery.start(HttpServer(service.public_http.handle, door=door).serve)
    service.public_addresses = door.addresses
    log.info("everybody is served at %s", ", ".join(door.addresses))


async def _seed_all(node: Node, refs: tuple[str, ...] | None) -> None:
    chosen = list(node.shared) if refs is None else [entry_of(node, Target.of(ref)).info_hash for ref in refs]
    for info_hash in chosen:
        try:
            await node.seed(info_hash)
        except ModelP2PError as exc:
            node.of(info_hash).error = exc.message
            log.error("%s is not served: %s", info_hash.hex()[:16], exc.message)


async def _leave_if_alone(server: ControlServer, service: Service, stop: trio.Event) -> None:
    await trio.sleep(FIRST_CLIENT_S)
    if not server.clients and not service.is_busy:
        stop.set()


async def _stop_on_signal(stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            stop.set()


def _say_ready(given: Surroundings, node: Node, port: int) -> None:
    if given.ready_fd is not None:
        _tell(given.ready_fd, "READY\n")
    else:
        print(f"READY port {port} home {node.store.home}", file=sys.stderr, flush=True)


def _tell(fd: int, line: str) -> None:
    os.write(fd, line.encode("utf-8"))
    os.close(fd)


def _socket_path(home: Path, given: Surroundings) -> Path:
    """Where the control socket goes: a runtime folder of this user where there is one, else the home."""
    if given.runtime_dir and os.path.isdir(given.runtime_dir) and os.access(given.runtime_dir, os.W_OK):
        name = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
        return Path(given.runtime_dir) / "modelp2p" / f"{name}.sock"
    return home / layout.RUN / "control.sock"


def _engine_settings(config: Config) -> EngineSettings:
    network = config.network
    return EngineSettings(
        profile=network.profile,
        listen=network.listen_on,
        port_tries=DEFAULT_PORT_TRIES if network.port_may_move else 0,
        dht=network.dht,
        lsd=network.lsd,
        pex=network.pex,
        utp=network.utp,
        max_up=network.max_up,
        max_down=network.max_down,
        connections=network.connections,
        # A cluster behind one NAT address, the nodes of one site, and a test's swarm on one host are all different peers.
        many_per_address=True,
    )


def _engine_folders(home: Path) -> EngineFolders:
    return EngineFolders(str(home / layout.DATA), (str(home / layout.STORE), str(home / layout.MANIFESTS)))


def _raise_descriptor_limit() -> None:
    """Up to what the administrator allows: every file being fetched and every client holds one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _set_up_logging(config: Config) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=config.log.level.upper(), format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    log.info("%s, python %s", build(), sys.version.split()[0])
