"""One node: its store, library and swarm, what is going on with each release, and where swarm events go.

Invariants:
- one task works on a content at a time (`Shared.lock`); others wait and then find the work done;
- a torrent is in the swarm only with `have` taken from the journal, and only while its files are as they were proven;
- after the engine restarts, everything that was in the swarm is added again.

The verbs are `fetching`, `publishing`, `checking` and `service`; they work on a `Node`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.daemon.pins import Pins
from modelp2p.daemon.relay import Relay
from modelp2p.daemon.transfer import Traffic, Transfer
from modelp2p.daemon.watching import Watch
from modelp2p.protocol import engine_wire as wire
from modelp2p.protocol import layout
from modelp2p.protocol.errors import ModelP2PError
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.statement import FILE_NAMES, Release
from modelp2p.protocol.torrent import MANIFEST_PIECE_BYTES, PieceMap, torrent_bytes

if TYPE_CHECKING:
    from modelp2p.daemon.config import Config
    from modelp2p.daemon.hashing import HashPool
    from modelp2p.daemon.library import Entry, Library
    from modelp2p.daemon.store import Store
    from modelp2p.daemon.swarm import Swarm
    from modelp2p.protocol.links import PeerAddress
    from modelp2p.protocol.trust import TrustBook

log = logging.getLogger(__name__)

Route = Callable[[wire.Event], Awaitable[None]]
WATCH_S = 5.0
"""How often the files being served are compared with how they were proven."""
_TRACKER_SCHEMES = ("https://", "http://", "udp://")


@dataclass(slots=True)
class Shared:
    """One content and what this node is doing with it."""

    info_hash: bytes
    lock: trio.Lock = field(default_factory=trio.Lock)
    is_complete: bool = False
    is_partial: bool = False
    is_seeding: bool = False
    proven: int = 0
    error: str = ""
    jobs: int = 0
    """Detached fetches of it that are not done (`jobs.Jobs`)."""
    waits_for: str = ""
    """Why the last of them to fail waits; empty while it is tried."""
    transfer: Transfer | None = None
    watch: Watch = field(default_factory=Watch)
    traffic: Traffic = field(default_factory=Traffic)
    status: wire.TorrentStatus | None = None
    max_up: int = 0
    max_down: int = 0
    peers: tuple[PeerAddress, ...] = ()

    @property
    def state(self) -> str:
        """The state of docs/DESIGN.md: what `status` and `ls` show."""
        if self.transfer is not None:
            return "fetching"
        if self.jobs and not self.is_complete:
            return "paused" if self.waits_for else "queued"
        if self.error:
            return "error"
        if self.is_seeding and self.is_complete:
            return "seeding"
        if self.is_complete:
            return "complete"
        return "partial" if self.is_partial else "paused"

    @property
    def trouble(self) -> str:
        """What a user should know about that state; empty for nothing."""
        return self.waits_for if self.state == "paused" and self.waits_for else self.error


class Node:
    """Everything the verbs share."""

    def __init__(
        self, store: Store, library: Library, swarm: Swarm, pool: HashPool, config: Config, peers: Iterable[PeerAddress]
    ) -> None:
        self.store = store
        self.library = library
        self.swarm = swarm
        self.pool = pool
        self.config = config
        self.book: TrustBook = store.load_book()
        self.pins = Pins(store)
        self.relay = Relay()
        self.peers = tuple(peers)
        """From configuration: offered to every swarm."""
        self.shared: dict[bytes, Shared] = {}
        self.listening: wire.Listening | None = None
        self.dht_nodes = 0
        """In the engine's routing tables."""
        self.engine_deaths = 0
        self.resolving: dict[bytes, trio.Lock] = {}
        """One lock for each statement being looked for."""
        self._routes: dict[bytes, Route] = {}
        self._nursery: trio.Nursery | None = None

    def __repr__(self) -> str:
        return f"<Node {self.store.home}: {len(self.shared)} releases, {len(self._routes)} in the swarm>"

    # What is known

    def of(self, info_hash: bytes) -> Shared:
        """The state of a content, made on first use."""
        return self.shared.setdefault(info_hash, Shared(info_hash))

    def forget(self, info_hash: bytes) -> None:
        """A content is gone. Its lock stays the same one: somebody may be waiting for it."""
        shared = self.of(info_hash)
        shared.is_complete = shared.is_partial = shared.is_seeding = False
        shared.proven, shared.error, shared.peers = 0, "", ()
        shared.traffic = Traffic()

    def restore(self) -> None:
        """Take over what the journals say; reads no payload byte."""
        for entry in self.library.entries():
            if entry.info_hash in self.shared:
                continue
            if not self.store.path(layout.journal_of(entry.info_hash)).exists():
                continue
            try:
                folder = ReleaseFolder.open(self.store, self.library.release(entry.digest))
            except ModelP2PError as exc:
                # One release that cannot be read costs that release, not the node.
                self.of(entry.info_hash).error = exc.message
                log.error("%s is not usable: %s", entry.ref, exc.message)
                continue
            try:
                self.note(folder)
            finally:
                folder.close()

    def note(self, folder: ReleaseFolder) -> Shared:
        """Remember what a folder's journal says now."""
        shared = self.of(folder.release.info_hash)
        manifest = folder.release.manifest
        shared.proven = folder.proven_bytes(entry.path for entry in manifest.files)
        shared.is_complete = all(entry.path in folder.state.files for entry in manifest.files)
        shared.is_partial = bool(folder.state.complete) and not shared.is_complete
        return shared

    def is_named(self, entry: Entry) -> bool:
        """Whether the entry's publisher is trusted for its name."""
        return self.book.is_trusted(entry.publisher, entry.name)

    # The swarm

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Route swarm events and watch served files, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._watch)
                await nursery.start(self.relay.run)
                task_status.started()
                async for event in self.swarm.events:
                    await self._route(event)
        finally:
            self._nursery = None

    def route(self, info_hash: bytes, route: Route) -> None:
        """Send events about a torrent, and about the engine, to `route`."""
        self._routes[info_hash] = route

    def routed(self) -> tuple[bytes, ...]:
        """Every torrent whose events somebody waits for, of statements and contents."""
        return tuple(self._routes)

    def unroute(self, info_hash: bytes) -> None:
        """Stop sending events."""
        self._routes.pop(info_hash, None)

    async def seed(self, info_hash: bytes) -> None:
        """Serve a content and every statement about it, as far as it is proven and unchanged.

        Raises:
            ModelP2PError: the folder cannot be read.
        """
        shared = self.of(info_hash)
        async with shared.lock:
            if shared.transfer is None:
                await self.seed_locked(info_hash)

    def seed_soon(self, shared: Shared) -> None:
        """`seed` in a task of the node: for those who cannot wait for the lock, whose holder may be waiting for them.

        Nothing where the node is at its end, as it is when what it did is cancelled with it.
        """
        if self._nursery is not None and not self._nursery.cancel_scope.cancel_called:
            self._nursery.start_soon(self._seed_again, shared)

    async def seed_locked(self, info_hash: bytes) -> None:
        """`seed`, for those who hold the content's lock."""
        entries = self.library.about(info_hash)
        if not entries:
            return
        release = await trio.to_thread.run_sync(self.library.release, entries[0].digest)
        folder = await trio.to_thread.run_sync(ReleaseFolder.open, self.store, release)
        try:
            shared = self.note(folder)
            changed = await trio.to_thread.run_sync(folder.changed_files)
            if changed:
                self._disown(shared, changed)
                return
            if not folder.state.files:
                return
            spec = self.spec_of(folder, wanted=())
        finally:
            folder.close()
        shared.error = ""
        shared.is_seeding = True
        self.route(info_hash, self._seed_route(shared))
        await self.swarm.add(spec)
        for entry in entries:
            await self.seed_statement(entry)

    async def seed_statement(self, entry: Entry) -> None:
        """Serve the three files of one statement."""
        statement = await trio.to_thread.run_sync(self.store.load_statement, entry.digest)
        made = statement.manifest_torrent()
        folder = layout.statement_of(entry.digest)
        contents = statement.files()
        files = tuple(
            wire.TorrentFile(name, len(contents[name]), str(self.store.path(f"{folder}/{name}")), wanted=False)
            for name in FILE_NAMES
        )
        pieces = PieceMap(files, MANIFEST_PIECE_BYTES)
        spec = wire.TorrentSpec(
            info_hash=made.info_hash,
            torrent=torrent_bytes(made.info, made.piece_layers),
            save_path=str(self.store.path(folder)),
            piece_length=MANIFEST_PIECE_BYTES,
            files=files,
            have=wire.pack_bits([True] * pieces.total),
            peers=self.wire_peers(self.of(entry.info_hash).peers),
        )

        async def readd(event: wire.Event) -> None:
            if isinstance(event, wire.EngineRestarted):
                await self.swarm.add(spec)

        self.route(made.info_hash, readd)
        await self.swarm.add(spec)

    async def unseed(self, info_hash: bytes, *, statements: bool = True) -> None:
        """Stop serving a content (and its statements)."""
        self.unroute(info_hash)
        await self.swarm.remove(info_hash)
        shared = self.of(info_hash)
        shared.is_seeding = False
        shared.status = None
        shared.traffic.restart()
        if statements:
            for entry in self.library.about(info_hash):
                self.unroute(entry.manifest_hash)
                await self.swarm.remove(entry.manifest_hash)

    def spec_of(self, folder: ReleaseFolder, wanted: Iterable[str]) -> wire.TorrentSpec:
        """The torrent of a folder as it is now, asking for `wanted`."""
        release = folder.release
        shared = self.of(release.info_hash)
        asked = frozenset(wanted)
        proven = folder.state.proven
        return wire.TorrentSpec(
            info_hash=release.info_hash,
            torrent=release.torrent_bytes(),
            save_path=folder.save_path,
            piece_length=release.manifest.piece_length,
            files=tuple(
                wire.TorrentFile(path, release.pieces.size(path), folder.disk_path(path), path in asked)
                for path in release.pieces.paths
            ),
            have=wire.pack_bits([piece in proven for piece in range(release.pieces.total)]),
            peers=self.wire_peers(shared.peers),
            trackers=self.trackers_of(release.manifest.trackers),
            max_up=shared.max_up,
            max_down=shared.max_down,
        )

    def wire_peers(self, extra: Iterable[PeerAddress] = ()) -> tuple[wire.Peer, ...]:
        """Configured peers and these, each once."""
        return tuple(wire.Peer(peer.host, peer.port) for peer in dict.fromkeys((*self.peers, *extra)))

    def trackers_of(self, urls: Iterable[str]) -> tuple[str, ...]:
        """The trackers of a signed manifest that the configuration lets us ask."""
        if not self.config.network.discovery.trackers:
            return ()
        return tuple(url for url in urls if url.startswith(_TRACKER_SCHEMES))

    def usable_peers(self, peers: Iterable[PeerAddress]) -> tuple[PeerAddress, ...]:
        """Peers a link names: private addresses count only inside a site (docs/DESIGN.md)."""
        # A host name could resolve to anything, also to this machine: outside a site only public literals are called.
        is_lan = self.config.network.profile == "lan"
        return tuple(peer for peer in peers if is_lan or peer.is_public)

    async def _route(self, event: wire.Event) -> None:
        match event:
            case wire.Listening():
                self.listening = event
            case wire.ListenFailed(address=address, message=message):
                log.error("cannot listen on %s: %s", address, message)
            case wire.SessionStatus(dht_nodes=nodes):
                self.dht_nodes = nodes
            case wire.EngineDied(reason=reason):
                self.engine_deaths += 1
                self.dht_nodes = 0
                log.error("the engine died: %s; a new one is started", reason)
                await self._tell_all(event)
            case wire.EngineRestarted():
                await self._tell_all(event)
            case wire.PeerUnresolved(host=host, message=message):
                log.warning("peer %s cannot be resolved: %s", host, message)
            case wire.Dropped():
                log.info("the engine's event queue overflowed; it is announcing everything again")
            case _:
                route = self._routes.get(event.info_hash)
                if route is not None:
                    await route(event)

    async def _tell_all(self, event: wire.Event) -> None:
        for route in list(self._routes.values()):
            await route(event)

    def _seed_route(self, shared: Shared) -> Route:
        async def route(event: wire.Event) -> None:
            match event:
                case wire.TorrentStatus():
                    shared.status = event
                    shared.traffic.update(event)
                case wire.EngineDied():
                    shared.traffic.restart()
                    shared.status = None
                case wire.EngineRestarted():
                    self.seed_soon(shared)
                case wire.FileFailed(path=path, message=message):
                    assert self._nursery is not None
                    self._nursery.start_soon(self._look_after, shared, f"'{path}' cannot be read: {message}")
                case wire.AddFailed(message=message):
                    shared.error = f"the engine refused the torrent: {message}"
                    log.error("%s", shared.error)
                case _:
                    pass

        return route

    async def _seed_again(self, shared: Shared) -> None:
        try:
            await self.seed(shared.info_hash)
        except ModelP2PError as exc:
            shared.error = exc.message
            log.error("cannot serve %s again: %s", shared.info_hash.hex()[:16], exc.message)

    async def _watch(self) -> None:
        """Stop serving files that somebody changed: peers would ban this node for bytes that are not the release's."""
        while True:
            await trio.sleep(WATCH_S)
            for shared in list(self.shared.values()):
                if shared.is_seeding and not shared.lock.locked():
                    await self._look_after(shared)

    async def _look_after(self, shared: Shared, trouble: str = "") -> None:
        """Stop serving what changed; `trouble` is what the engine met, where it is not that."""
        try:
            async with shared.lock:
                if shared.is_seeding:
                    await self._check_unchanged(shared)
                if shared.is_seeding and trouble:
                    shared.error = trouble
                    log.error("%s", trouble)
        except ModelP2PError as exc:
            log.error("cannot look after %s: %s", shared.info_hash.hex()[:16], exc.message)

    async def _check_unchanged(self, shared: Shared) -> None:
        record = await trio.to_thread.run_sync(self.store.load_record, shared.info_hash)
        if record is None:
            return
        tree = self.store.path(layout.tree_of(shared.info_hash, record.revision))

        def changed() -> list[str]:
            found = []
            for path, item in record.files.items():
                try:
                    same = item.matches((tree / path).lstat(), ignore_ctime=True)
                except OSError:
                    same = False
                if not same:
                    found.append(path)
            return found

        paths = await trio.to_thread.run_sync(changed)
        if paths:
            await self.unseed(shared.info_hash)
            self._disown(shared, paths)

    def _disown(self, shared: Shared, paths: list[str]) -> None:
        shared.is_seeding = False
        shared.error = f"{len(paths)} file(s) changed after they were proven, '{paths[0]}' first; not served any more"
        log.error("%s: %s", shared.info_hash.hex()[:16], shared.error)


def pieces_of(release: Release, paths: Iterable[str]) -> Ranges:
    """All pieces of these files."""
    return Ranges.of((owned.start, owned.stop) for owned in (release.pieces.pieces_of(path) for path in paths) if owned)
