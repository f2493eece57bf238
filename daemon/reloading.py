"""What a running daemon takes over when its configuration is read again, which SIGHUP asks for.

Invariants:
- a configuration that cannot be read, or is wrong, changes nothing and is one line in the log;
- what was taken over is what `config show --running` shows; a value that needs a restart keeps the old one there, too;
- a value that the files did not change is not set anew, so that limits given meanwhile over the control socket stay.

It does not know where a configuration comes from: files, variables and flags are the business of whoever started the daemon
(`Surroundings.read_config`).
"""

from __future__ import annotations

import logging
import os
import signal
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import trio

from modelp2p.daemon.config import KEYS, MAX_CONFIG_BYTES, Config, parse_peers_file
from modelp2p.daemon.diskerror import on_disk
from modelp2p.protocol.engine_wire import Peer
from modelp2p.protocol.errors import ModelP2PError, UsageError
from modelp2p.protocol.links import PeerAddress

if TYPE_CHECKING:
    from modelp2p.daemon.node import Node
    from modelp2p.daemon.notify import Notifier

log = logging.getLogger(__name__)

# Whole sections and single keys that are looked up at each use, or that `_apply` carries to where they are used.
_LIVE = frozenset(
    {
        *("fetch", "log", "policy", "store", "web_seeds"),
        *("gateway.origin", "gateway.unknown"),
        *("network.connections", "network.max_down", "network.max_up", "network.peers", "network.peers_file"),
    }
)


class Change(NamedTuple):
    """What becomes of a new configuration: the one that holds from now on, the keys it took over and those it could not."""

    config: Config
    taken: tuple[str, ...]
    left: tuple[str, ...]


def change(running: Config, wanted: Config) -> Change:
    """Decide what of `wanted` a daemon that runs with `running` takes over."""
    changed = [key for key in KEYS if running.get(key) != wanted.get(key)]
    taken = tuple(key for key in changed if _LIVE & {key, key.partition(".")[0]})
    left = tuple(key for key in changed if key not in taken)
    return Change(running.replace({key: wanted.get(key) for key in taken}), taken, left)


def configured_peers(config: Config) -> tuple[PeerAddress, ...]:
    """The peers of `[network]`, those of the peers file included.

    Raises:
        StoreError: the file cannot be read.
        UsageError: a line of it is not `host:port`.
    """
    lines = list(config.network.peers)
    if config.network.peers_file:
        lines += parse_peers_file(_read_peers_file(config.network.peers_file))
    return tuple(PeerAddress.parse(line) for line in lines)


async def reload(node: Node, read_config: Callable[[], Config]) -> None:
    """Read the configuration again and take over what can change while the node runs. Raises nothing on purpose."""
    try:
        # In a thread: files may lie on a disk that hangs.
        wanted = await trio.to_thread.run_sync(read_config, abandon_on_cancel=True)
        decided = change(node.config, wanted)
        peers = await trio.to_thread.run_sync(configured_peers, decided.config, abandon_on_cancel=True)
    except ModelP2PError as exc:
        log.error("the configuration stays as it is: %s", f"{exc.message}. {exc.hint}".strip())
        return
    except OSError as exc:
        # Without a path where it is a descriptor that could not be read.
        place = exc.filename if isinstance(exc.filename, str) else "one of its files"
        log.error("the configuration stays as it is: %s: %s", place, exc.strerror)
        return
    newcomers = [peer for peer in peers if peer not in node.peers]
    await _apply(node, decided, peers, newcomers)
    said = [*decided.taken, *([f"{len(newcomers)} new peers"] if newcomers else [])]
    log.info("the configuration was read again: %s", ", ".join(said) or "nothing that can change has changed")
    if decided.left:
        log.warning("changed in the configuration, but not before the daemon starts again: %s", ", ".join(decided.left))


async def _apply(node: Node, decided: Change, peers: tuple[PeerAddress, ...], newcomers: list[PeerAddress]) -> None:
    node.config, node.peers = decided.config, peers
    network = decided.config.network
    if {"network.max_down", "network.max_up"} & set(decided.taken):
        await node.swarm.set_limits(None, network.max_up, network.max_down)
    if "network.connections" in decided.taken:
        await node.swarm.set_connections(network.connections)
    if newcomers:
        for info_hash in node.routed():
            await node.swarm.connect(info_hash, [Peer(peer.host, peer.port) for peer in newcomers])
    if "log.level" in decided.taken:
        logging.getLogger().setLevel(decided.config.log.level.upper())


async def reload_on_signal(
    node: Node,
    read_config: Callable[[], Config],
    notifier: Notifier,
    ready: trio.Event,
    hung_up: Callable[[], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Reload at each SIGHUP until cancelled, the first time not before `ready`.

    A terminal that closes sends the same signal: then `hung_up` is called instead, unless whoever started the daemon had it
    ignore that (nohup) or gave it no terminal (a service).
    """
    lives_with_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_DFL and _has_terminal()
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            if lives_with_terminal and not _has_terminal():
                log.info("the terminal is gone: stopping")
                hung_up()
                return
            await ready.wait()
            notifier.reloading()
            await reload(node, read_config)
            notifier.tell("READY=1")


def _read_peers_file(path: str) -> str:
    with on_disk(f"cannot read the peers file {path}"):
        # O_NONBLOCK: a FIFO must not keep this daemon from starting, nor from hearing the next signal.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{path}: not a file", key="network.peers_file")
            data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise UsageError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes", key="network.peers_file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path}: not UTF-8 text", key="network.peers_file") from exc


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal; after a hang-up it has none any more."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
