"""Releases to share and nodes to share them, in memory or over real libtorrent on loopback, for every test of swarms."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Container, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import trio

from modelp2p.daemon.memory_swarm import MemoryNetwork
from modelp2p.daemon.supervisor import EngineFolders, EngineSwarm
from modelp2p.protocol.engine_wire import EngineSettings, Event, Peer, PiecesFinished, TorrentFile, TorrentSpec, pack_bits
from modelp2p.protocol.merkle import leaf_hashes, piece_layer, root_of
from modelp2p.protocol.torrent import PieceMap, info_dict, info_hash, torrent_bytes

if TYPE_CHECKING:
    from modelp2p.daemon.swarm import Swarm

PIECE = 64 * 1024
NAME = "ab" * 20
PATIENCE_S = 30
"""How long a test waits for what must happen; a shared machine is slow at random."""
E = TypeVar("E", bound=Event)


class _Everything:
    """Contains any path."""

    def __contains__(self, path: object) -> bool:
        return True


EVERYTHING: Container[str] = _Everything()


class Shared:
    """A release: its files in memory, and the torrent over them."""

    def __init__(self, contents: Mapping[str, bytes], piece_length: int = PIECE) -> None:
        self.contents = dict(contents)
        self.piece_length = piece_length
        leaves = {path: leaf_hashes(memoryview(data)) for path, data in contents.items() if data}
        roots = {path: root_of(found) for path, found in leaves.items()}
        info = info_dict(NAME, [(path, len(data), roots.get(path, b"")) for path, data in contents.items()], piece_length)
        layers = {roots[path]: piece_layer(found, piece_length) for path, found in leaves.items()}
        self.info = info
        self.torrent = torrent_bytes(info, layers)
        self.info_hash = info_hash(info)
        self.files = tuple(TorrentFile(path, len(data), "") for path, data in contents.items())
        self.pieces = PieceMap(self.files, piece_length)

    def write(self, folder: Path) -> None:
        for path, data in self.contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)

    def spec(self, folder: Path, *, have: bool, wanted: Container[str] = EVERYTHING, peers: tuple[Peer, ...] = ()) -> TorrentSpec:
        files = tuple(TorrentFile(file.path, file.size, str(folder / file.path), file.path in wanted) for file in self.files)
        bits = pack_bits([have] * self.pieces.total)
        return TorrentSpec(self.info_hash, self.torrent, str(folder), self.piece_length, files, bits, peers)


@dataclass
class Node:
    """A swarm with a folder, and everything it has said so far."""

    swarm: Swarm
    folder: Path
    said: list[Event]
    _heard: trio.Condition

    async def peer(self) -> Peer:
        return Peer("127.0.0.1", (await self.swarm.wait_listening()).port)

    async def listen(self) -> None:
        async for event in self.swarm.events:
            async with self._heard:
                self.said.append(event)
                self._heard.notify_all()

    async def wait_for(self, kind: type[E], fits: Callable[[E], bool] = lambda _: True) -> E:
        """The first event of a kind (from the beginning) that fits."""
        with trio.fail_after(PATIENCE_S):
            async with self._heard:
                while True:
                    for event in self.said:
                        if isinstance(event, kind) and fits(event):
                            return event
                    await self._heard.wait()

    async def wait_pieces(self, wanted: set[int]) -> None:
        with trio.fail_after(PATIENCE_S):
            async with self._heard:
                while not wanted <= self.announced():
                    await self._heard.wait()

    def announced(self) -> set[int]:
        return {piece for event in self.said if isinstance(event, PiecesFinished) for piece in event.pieces}

    def heard(self, kind: type[E]) -> list[E]:
        return [event for event in self.said if isinstance(event, kind)]

    async def wait_files(self, contents: Mapping[str, bytes]) -> None:
        """Until the files hold these bytes: some time after the swarm says so."""
        with trio.fail_after(PATIENCE_S):
            while not self.holds(contents):  # noqa: ASYNC110  # files have no event to wait for
                await trio.sleep(0.02)

    def holds(self, contents: Mapping[str, bytes]) -> bool:
        found = {path: self.folder / path for path in contents}
        return all(file.exists() and file.read_bytes() == contents[path] for path, file in found.items())


class World(Protocol):
    """Makes nodes that can reach each other."""

    def make(self, folder: Path, port: int = 0) -> Swarm:
        """A swarm that writes below `folder`."""


class MemoryWorld:
    """Nodes of one `MemoryNetwork`."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()

    def make(self, folder: Path, port: int = 0) -> Swarm:
        return self.network.join(port=port)


class RealWorld:
    """Engines on loopback that find each other only when told."""

    def make(self, folder: Path, port: int = 0) -> EngineSwarm:
        return EngineSwarm(quiet_settings(port), EngineFolders(str(folder)), first_backoff_s=0.05)


def quiet_settings(port: int = 0, *, host: str = "127.0.0.1", max_up: int = 0, max_down: int = 0) -> EngineSettings:
    """Everything that talks to strangers is off."""
    return EngineSettings(
        profile="lan",
        listen=(f"{host}:{port}",),
        dht=False,
        lsd=False,
        pex=False,
        utp=False,
        max_up=max_up,
        max_down=max_down,
        many_per_address=True,
    )


@asynccontextmanager
async def running(swarm: Swarm, folder: Path) -> AsyncIterator[Node]:
    """A node that runs, and whose events are read, for as long as the block."""
    folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  # before anything runs
    node = Node(swarm, folder, [], trio.Condition())
    async with trio.open_nursery() as nursery:
        await nursery.start(swarm.run)
        nursery.start_soon(node.listen)
        try:
            yield node
        finally:
            with trio.CancelScope(shield=True):
                await swarm.aclose()
