"""The in-memory twin of the swarm: nodes in one process that copy pieces between their folders, for tests.

Invariants:
- it keeps the contract of `swarm.Swarm` and writes real bytes to the real `disk_path`s, so that proofs run over it;
- it is deterministic: pieces go by priority then number, from the peer with the lowest address, one at a time;
- it does only what it is told: faults are switched on by the test, each once.

It knows no rates and no web (limits and web seeds are only remembered) and no hashes: a piece is bad where the test said so.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import trio

from modelp2p.daemon.memory_torrent import MemoryTorrent, compare_layout, disk_path_of, info_of, read_piece, share_of, write_piece
from modelp2p.daemon.swarm import MAX_WAITING_EVENTS, SwarmStatistics
from modelp2p.protocol.engine_wire import (
    AddFailed,
    EngineDied,
    EngineRestarted,
    Event,
    FileFailed,
    Flushed,
    Listening,
    MagnetSpec,
    MetadataReceived,
    Peer,
    PeerBanned,
    PeerStatus,
    PeerUnresolved,
    PieceFailed,
    PiecesFinished,
    Removed,
    TorrentFile,
    TorrentSpec,
    TorrentStatus,
    TransferFinished,
    unpack_bits,
)
from modelp2p.protocol.errors import FormatError, UnavailableError
from modelp2p.protocol.torrent import PieceMap

BACKOFF_S = 1.0
STATUS_EVERY_S = 1.0


class MemoryNetwork:
    """Where nodes meet; `piece_s` is how long one piece takes on trio's clock."""

    def __init__(self, *, piece_s: float = 0.0) -> None:
        self.piece_s = piece_s
        self.nodes: dict[tuple[str, int], MemorySwarm] = {}

    def join(self, host: str = "127.0.0.1", port: int = 0) -> MemorySwarm:
        """A new node; port 0 takes the next free one from 20000. One on a taken port cannot listen."""
        port = port or next(port for port in range(20_000, 65_536) if (host, port) not in self.nodes)
        taken = (host, port) in self.nodes
        node = MemorySwarm(self, host, port, refused=taken)
        if not taken:
            self.nodes[host, port] = node
        return node

    def wake_all(self) -> None:
        """Something changed that another node may want."""
        for node in self.nodes.values():
            node.wake()


class MemorySwarm:
    """A `Swarm` made of memory; see `MemoryNetwork.join`. What is below `aclose` is for tests to say."""

    def __init__(self, network: MemoryNetwork, host: str, port: int, *, refused: bool) -> None:
        self.address = (host, port)
        self.limits: dict[bytes | None, tuple[int, int]] = {}
        self.web_seeds: dict[bytes, tuple[str, ...]] = {}
        self.connections = 0
        self._network = network
        self._refused = refused
        self._tell, self._events = trio.open_memory_channel[Event](MAX_WAITING_EVENTS)
        self._torrents: dict[bytes, MemoryTorrent] = {}
        self._pending: list[Event] = []
        self._activity = trio.Event()
        self._running: trio.CancelScope | None = None
        self._finished = trio.Event()
        self._started = False
        self._dead_because = ""
        self._restarts = 0
        self._faults: defaultdict[str, set[tuple[bytes, int]]] = defaultdict(set)
        self._disk_is_full = False

    def __repr__(self) -> str:
        return f"<MemorySwarm {self.address[0]}:{self.address[1]}, {len(self._torrents)} torrents>"

    @property
    def events(self) -> trio.MemoryReceiveChannel[Event]:
        return self._events

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            with trio.CancelScope() as self._running:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._report)
                    task_status.started()
                    while True:
                        await self._turn()
        finally:
            self._torrents.clear()
            self._network.nodes.pop(self.address, None)
            self._network.wake_all()
            self._finished.set()
            self._tell.close()

    async def wait_listening(self) -> Listening:
        await trio.lowlevel.checkpoint()
        if self._refused:
            raise UnavailableError(f"cannot listen on {self.address[0]}:{self.address[1]}: {os.strerror(errno.EADDRINUSE)}")
        return self._start()

    async def add(self, spec: TorrentSpec) -> None:
        if not self._accepts() or spec.info_hash in self._torrents:
            return
        try:
            torrent = MemoryTorrent(self._endpoints(spec.info_hash, spec.peers))
            self._begin(torrent, spec)
        except FormatError as error:
            self._say(AddFailed(spec.info_hash, error.message))
            return
        self._torrents[spec.info_hash] = torrent
        self._network.wake_all()

    async def add_magnet(self, spec: MagnetSpec) -> None:
        if self._accepts() and spec.info_hash not in self._torrents:
            self._torrents[spec.info_hash] = MemoryTorrent(self._endpoints(spec.info_hash, spec.peers), magnet=spec)
            self._network.wake_all()

    async def remove(self, info_hash: bytes) -> None:
        torrent = self._torrents.pop(info_hash, None)
        self.web_seeds.pop(info_hash, None)
        if torrent is not None:
            self._say(Removed(info_hash, torrent.down, torrent.up, torrent.wasted))

    async def connect(self, info_hash: bytes, peers: Iterable[Peer]) -> None:
        if info_hash in self._torrents:
            self._torrents[info_hash].peers |= self._endpoints(info_hash, tuple(peers))
            self._network.wake_all()

    async def set_wanted(self, info_hash: bytes, paths: Iterable[str]) -> None:
        if (torrent := self._torrents.get(info_hash)) is not None:
            torrent.wanted, torrent.priorities = set(paths) & set(torrent.pieces.paths), {}
            torrent.make_empty_files()
            torrent.finished = False
            self.wake()

    async def set_piece_priorities(self, info_hash: bytes, priorities: Mapping[int, int]) -> None:
        if (torrent := self._torrents.get(info_hash)) is not None:
            torrent.priorities |= priorities
            torrent.finished = False
            self.wake()

    async def set_web_seeds(self, info_hash: bytes, urls: Iterable[str]) -> None:
        if info_hash in self._torrents:
            self.web_seeds[info_hash] = tuple(urls)

    async def set_limits(self, info_hash: bytes | None, up: int, down: int) -> None:
        self.limits[info_hash] = (up, down)

    async def set_connections(self, limit: int) -> None:
        self.connections = limit

    async def throttle(self, info_hash: bytes, held: bool) -> None:
        if (torrent := self._torrents.get(info_hash)) is not None:
            torrent.held = held
            self.wake()

    async def flush(self, info_hash: bytes) -> None:
        if info_hash in self._torrents:
            self._say(Flushed(info_hash))

    def statistics(self) -> SwarmStatistics:
        waiting = self._events.statistics().current_buffer_used + len(self._pending)
        port = self.address[1] if self._started else 0
        return SwarmStatistics(engine_pid=0, listen_port=port, landlock=0, restarts=self._restarts, waiting_events=waiting)

    async def aclose(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await self._finished.wait()

    def poison(self, info_hash: bytes, *pieces: int) -> None:
        """As a seed, send bad bytes for these pieces: the receiver notices, bans this node and asks another."""
        self._faults["poison"] |= {(info_hash, piece) for piece in pieces}

    def lose(self, info_hash: bytes, *pieces: int) -> None:
        """Say that these pieces finished, and write nothing."""
        self._faults["lose"] |= {(info_hash, piece) for piece in pieces}

    def corrupt(self, info_hash: bytes, *pieces: int) -> None:
        """Say that these pieces finished, and write other bytes."""
        self._faults["corrupt"] |= {(info_hash, piece) for piece in pieces}

    def fill_disk(self, full: bool = True) -> None:
        """From now on every write fails for want of space, or works again."""
        self._disk_is_full = full

    def die(self, reason: str = "it was ended by SIGKILL") -> None:
        """The engine is gone now; another one comes after `BACKOFF_S`."""
        self._dead_because = reason
        self._torrents.clear()
        self.web_seeds.clear()
        self._pending.clear()
        self._network.wake_all()

    def wake(self) -> None:
        """Look again whether there is something to do."""
        self._activity.set()

    def _accepts(self) -> bool:
        if self._dead_because:
            return False
        self._start()
        return True

    def _start(self) -> Listening:
        listening = Listening(self.address[1], (f"{self.address[0]}:{self.address[1]}",), 0)
        if not self._started:
            self._started = True
            self._say(listening)
        return listening

    def _say(self, event: Event) -> None:
        self._pending.append(event)
        self.wake()

    def _begin(self, torrent: MemoryTorrent, spec: TorrentSpec) -> None:
        compare_layout(spec)
        torrent.pieces = PieceMap(spec.files, spec.piece_length)
        torrent.have = {piece for piece, has in enumerate(unpack_bits(spec.have, torrent.pieces.total)) if has}
        torrent.wanted = {file.path for file in spec.files if file.wanted}
        torrent.spec = spec
        torrent.make_empty_files()

    def _endpoints(self, info_hash: bytes, peers: tuple[Peer, ...]) -> set[tuple[str, int]]:
        for peer in peers:
            # A name reserved for never being found: RFC 6761 section 6.4.
            if peer.host.endswith(".invalid"):
                self._say(PeerUnresolved(info_hash, peer.host, "name not known"))
        return {(peer.host, peer.port) for peer in peers}

    def _sources(self, info_hash: bytes, torrent: MemoryTorrent) -> Iterator[tuple[MemorySwarm, MemoryTorrent]]:
        for address, node in sorted(self._network.nodes.items()):
            other = node._torrents.get(info_hash)
            if other is None or node is self or address in torrent.banned or self.address in other.banned:
                continue
            if address in torrent.peers or self.address in other.peers:
                yield node, other

    async def _turn(self) -> None:
        self._activity = trio.Event()
        if self._dead_because:
            await self._be_reborn()
        worked = any([self._advance(info_hash, torrent) for info_hash, torrent in list(self._torrents.items())])
        pending, self._pending = self._pending, []
        for event in pending:
            await self._tell.send(event)
        if worked:
            self._network.wake_all()
            await trio.sleep(self._network.piece_s)
        elif not self._pending:
            await self._activity.wait()

    async def _be_reborn(self) -> None:
        await self._tell.send(EngineDied(self._dead_because))
        await trio.sleep(BACKOFF_S)
        self._dead_because = ""
        self._restarts += 1
        await self._tell.send(EngineRestarted())
        await self._tell.send(self._start())

    def _advance(self, info_hash: bytes, torrent: MemoryTorrent) -> bool:
        """At most one step of one torrent; whether there was one."""
        if torrent.spec is None:
            return self._ask_metadata(info_hash, torrent)
        missing = list(torrent.missing())
        if not missing and not torrent.finished:
            torrent.finished = True
            self._say(TransferFinished(info_hash))
        if torrent.held or torrent.broken:
            return False
        sources = list(self._sources(info_hash, torrent))
        for piece in missing:
            for node, other in sources:
                if piece in other.have and other.spec is not None:
                    self._transfer(info_hash, torrent, piece, node, other)
                    return True
        return False

    def _ask_metadata(self, info_hash: bytes, torrent: MemoryTorrent) -> bool:
        for _, other in self._sources(info_hash, torrent):
            if other.spec is not None and torrent.magnet is not None and not torrent.metadata_sent:
                torrent.metadata_sent = True
                base = torrent.magnet.save_path
                files = tuple(TorrentFile(file.path, file.size, f"{base}/{file.path}", wanted=False) for file in other.spec.files)
                self._say(MetadataReceived(info_hash, info_of(other.spec.torrent), files))
        return False

    def _transfer(self, info_hash: bytes, torrent: MemoryTorrent, piece: int, node: MemorySwarm, other: MemoryTorrent) -> None:
        path, offset, length = torrent.pieces.locate(piece)
        data = read_piece(disk_path_of(other, path), offset, length)
        torrent.changed = other.changed = True
        if self._happens(node, "poison", info_hash, piece) or len(data) != length:
            torrent.wasted += length
            torrent.banned.add(node.address)
            self._say(PieceFailed(info_hash, piece))
            self._say(PeerBanned(info_hash, f"{node.address[0]}:{node.address[1]}"))
            return
        if self._disk_is_full:
            torrent.broken = True
            self._say(FileFailed(info_hash, path, os.strerror(errno.ENOSPC), no_space=True))
            return
        if self._happens(self, "corrupt", info_hash, piece):
            data = bytes(byte ^ 0xFF for byte in data)
        if not self._happens(self, "lose", info_hash, piece):
            write_piece(disk_path_of(torrent, path), offset, data)
        torrent.have.add(piece)
        torrent.down += length
        other.up += length
        self._say(PiecesFinished(info_hash, (piece,)))

    @staticmethod
    def _happens(node: MemorySwarm, fault: str, info_hash: bytes, piece: int) -> bool:
        told = node._faults[fault]
        if (info_hash, piece) in told:
            told.remove((info_hash, piece))
            return True
        return False

    async def _report(self) -> None:
        while True:
            await self._activity.wait()
            await trio.sleep(STATUS_EVERY_S)
            for info_hash, torrent in list(self._torrents.items()):
                if torrent.changed:
                    torrent.changed = False
                    await self._tell.send(self._status(info_hash, torrent))

    def _status(self, info_hash: bytes, torrent: MemoryTorrent) -> TorrentStatus:
        sources = [(node, other) for node, other in self._sources(info_hash, torrent)]
        listed = tuple(
            PeerStatus(f"{node.address[0]}:{node.address[1]}", "memory", 0, 0, share_of(other), "peer") for node, other in sources
        )
        seeds = sum(share_of(other) == 1000 for _, other in sources)
        return TorrentStatus(info_hash, 0, 0, len(sources), seeds, torrent.down, torrent.up, torrent.wasted, listed)
