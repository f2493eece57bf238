"""The swarm interface: what the daemon asks of BitTorrent, and what it hears back.

Two implementations stand behind it under one test suite: `supervisor.EngineSwarm` (a child process with libtorrent) and
`memory_swarm.MemorySwarm` (a twin for tests). Values are those of `protocol.engine_wire`.

Invariants of every implementation:
- a command returns once it is accepted, not once it is done; what came of it is an event, in order per torrent;
- every command may be repeated, and a command for a torrent that is not there does nothing;
- events are hints about the network, never proof about the disk: the daemon reads back what it is told;
- the swarm writes only to the `disk_path`s and `save_path`s it is given, and never deletes a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    from modelp2p.protocol.engine_wire import Event, Listening, MagnetSpec, Peer, TorrentSpec

MAX_WAITING_EVENTS = 256
"""Events between swarm and daemon; beyond them the swarm waits, and the engine behind it slows down."""


@dataclass(frozen=True, slots=True)
class SwarmStatistics:
    """What `status` shows of a swarm; zeros before its first use."""

    engine_pid: int
    listen_port: int
    landlock: int
    restarts: int
    waiting_events: int


class Swarm(Protocol):
    """One node's place in all swarms."""

    @property
    def events(self) -> trio.MemoryReceiveChannel[Event]:
        """Everything the swarm has to say. One reader, who keeps reading: a full channel holds the swarm back."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled or closed. Nothing is started before the first command or `wait_listening`.

        Cancellation: ends as `aclose` does.
        Resources: owns the engine process; when this returns there is none.
        """

    async def wait_listening(self) -> Listening:
        """Where the node can be reached, starting it if need be.

        Raises:
            UnavailableError: an address that was asked for is taken or not allowed, or none could be opened.
        """

    async def add(self, spec: TorrentSpec) -> None:
        """Share a torrent, trusting `spec.have`; `AddFailed` follows where it is refused.

        It is refused where its info-hash, piece length or layout differ from the spec. A torrent that is there already
        stays as it is: to correct `have`, remove it first.
        """

    async def add_magnet(self, spec: MagnetSpec) -> None:
        """Ask for the metadata of an info-hash; `MetadataReceived` follows, and nothing else is fetched."""

    async def remove(self, info_hash: bytes) -> None:
        """Stop sharing. Its files stay; `Removed` is the last event about it, and after it none of them is written."""

    async def connect(self, info_hash: bytes, peers: Iterable[Peer]) -> None:
        """Try these peers; host names are resolved meanwhile, `PeerUnresolved` names those that cannot be."""

    async def set_wanted(self, info_hash: bytes, paths: Iterable[str]) -> None:
        """Exactly these paths are wanted from now on; what is there is still shared."""

    async def set_piece_priorities(self, info_hash: bytes, priorities: Mapping[int, int]) -> None:
        """The priority, 0 (never) to 7 (first), of some pieces; the others keep theirs. `set_wanted` resets all."""

    async def set_web_seeds(self, info_hash: bytes, urls: Iterable[str]) -> None:
        """Exactly these web seeds (BEP 19) from now on; the same again gives each of them another chance.

        `WebSeedFailed` names one that did not deliver, or is banned for bytes that are not those of the torrent.
        """

    async def set_limits(self, info_hash: bytes | None, up: int, down: int) -> None:
        """Rates in bytes per second, 0 for none, of a torrent or (None) of the node; local peers count like others."""

    async def set_connections(self, limit: int) -> None:
        """Most peer connections at once, over all torrents; where there are more, some are closed."""

    async def throttle(self, info_hash: bytes, held: bool) -> None:
        """Hold a torrent's download nearly still, or let it go on; its upload is left alone."""

    async def flush(self, info_hash: bytes) -> None:
        """Write out what was received; `Flushed` follows. Written is not synced."""

    def statistics(self) -> SwarmStatistics:
        """Facts for people; cheap."""

    async def aclose(self) -> None:
        """Leave all swarms, within 5 seconds. Idempotent; `run` returns."""
