"""A daemon in this process: real store, verbs and control socket over the in-memory swarm, beside a seed of the same kind."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import trio

from modelp2p.daemon.adopting import Source
from modelp2p.daemon.checking import MAX_ONLY
from modelp2p.daemon.config import Config
from modelp2p.daemon.control import ControlServer
from modelp2p.daemon.fetch import fetch
from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.daemon.gate import OwnerGate
from modelp2p.daemon.hashing import HashPool
from modelp2p.daemon.library import Library
from modelp2p.daemon.lock import HomeLock, this_daemon
from modelp2p.daemon.memory_swarm import MemoryNetwork, MemorySwarm
from modelp2p.daemon.node import Node
from modelp2p.daemon.requests import FetchRequest, Target, texts
from modelp2p.daemon.service import Service
from modelp2p.daemon.store import Store
from modelp2p.protocol import layout
from modelp2p.protocol.links import PeerAddress
from modelp2p.protocol.statement import Release, Statement, verify_statement
from modelp2p.protocol.trust import TrustEntry
from tests.releases import publisher, write_files

if TYPE_CHECKING:
    from modelp2p.daemon.control import Answer, Call
    from modelp2p.daemon.library import Entry
    from modelp2p.protocol.engine_wire import TorrentSpec
    from modelp2p.protocol.journal import JournalState

SEED = PeerAddress("127.0.0.1", 20_000)


class Swarm(MemorySwarm):
    """A swarm that remembers what it was told to share, and says so."""

    def __init__(self, network: MemoryNetwork, address: PeerAddress) -> None:
        super().__init__(network, address.host, address.port, refused=False)
        network.nodes[self.address] = self
        self.added: list[TorrentSpec] = []
        self.on_add: Callable[[], None] = lambda: None

    async def add(self, spec: TorrentSpec) -> None:
        self.added.append(spec)
        self.on_add()
        await super().add(spec)


@dataclass
class World:
    """A node that serves a whole release, and a seed of it."""

    node: Node
    swarm: Swarm
    seed: Node
    release: Release

    @property
    def entry(self) -> Entry:
        """The node's statement."""
        return self.node.library.about(self.release.info_hash)[0]

    @property
    def tree(self) -> Path:
        """The node's visible files."""
        return self.node.store.path(layout.tree_of(self.release.info_hash, self.release.manifest.revision))

    def journal(self) -> JournalState:
        """What the node's journal says now."""
        folder = ReleaseFolder.open(self.node.store, self.release)
        folder.close()
        return folder.state

    async def leave_alone(self) -> None:
        """The seed serves nothing any more."""
        await self.seed.unseed(self.release.info_hash)


@asynccontextmanager
async def world_of(folder: Path, statement: Statement, files: Mapping[str, bytes]) -> AsyncIterator[World]:
    """Such a world below `folder`; the node's home is `folder/home`."""
    network, release, book = MemoryNetwork(), verify_statement(statement), TrustEntry("lab/*", publisher().id)
    source = os.open(write_files(folder / "source", files), os.O_RDONLY | os.O_DIRECTORY)
    stores: list[Store] = []
    try:
        async with HashPool(workers=1) as pool, trio.open_nursery() as nursery:

            async def started(name: str, swarm: Swarm, peers: list[PeerAddress]) -> Node:
                stores.append(store := Store.open(folder / name))
                node = Node(store, Library(store), swarm, pool, Config(), peers)
                node.book = node.book.added(book)
                store.save_book(node.book)
                await nursery.start(swarm.run)
                await nursery.start(node.run)
                await fetch(node, FetchRequest(Target(statement=statement)), lambda event: None, Source(source, ""))
                return node

            swarm = Swarm(network, PeerAddress("127.0.0.1", 20_001))
            seed = await started("seed", Swarm(network, SEED), [])
            yield World(await started("home", swarm, [SEED]), swarm, seed, release)
            nursery.cancel_scope.cancel()
    finally:
        os.close(source)
        for store in stores:
            store.close()


class MemoryDaemon:
    """A world's node as the daemon of its home, in a thread; for programs that talk to it by its socket."""

    def __init__(self, folder: Path, statement: Statement, files: Mapping[str, bytes]) -> None:
        self.home = folder / "home"
        self._run = partial(self._serve, folder, statement, files)
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="memory-daemon")
        self.verified: list[tuple[str, ...]] = []
        """What each `verify` was asked about, in order."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        if self._error is not None:
            raise self._error

    @property
    def tree(self) -> Path:
        """The visible files."""
        return self._world.tree

    def lose_seed(self) -> None:
        """From now on nobody serves the release."""
        trio.from_thread.run(self._world.leave_alone, trio_token=self._token)

    def die_on_add(self) -> None:
        """End in the middle of the next repair, when it goes to the swarm."""
        self._world.swarm.on_add = self._stop.cancel

    def stop(self) -> None:
        """End; whoever is connected hears no more. Idempotent."""
        # It may have ended already.
        with suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(self._stop.cancel, trio_token=self._token)
        self._thread.join()

    def _main(self) -> None:
        try:
            trio.run(self._run)
        except BaseException as exc:
            self._error = exc
        finally:
            self._ready.set()

    async def _serve(self, folder: Path, statement: Statement, files: Mapping[str, bytes]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._stop:
            async with world_of(folder, statement, files) as self._world, trio.open_nursery() as nursery:
                service = Service(self._world.node, nursery, on_demand=False, stop=self._stop.cancel)
                address = self.home / layout.RUN / "control.sock"

                async def handle(call: Call) -> Answer:
                    if call.verb == "verify":
                        self.verified.append(texts(call.args, "only", MAX_ONLY))
                    return await service.handle(call)

                server = ControlServer(address, handle, OwnerGate(os.getuid()))
                with HomeLock.acquire(self.home / layout.LOCK, this_daemon(str(address), pid=os.getpid(), host="here")):
                    await nursery.start(server.serve)
                    self._ready.set()
                    await trio.sleep_forever()
