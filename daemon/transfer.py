"""One release being fetched: performs what the fetch machine decides, and feeds it what happened.

The only place where swarm, hash workers and folder meet. It holds no policy: every decision is `protocol.fetching`'s.

Resources: while `run` runs, one descriptor per file it reads back, and the torrent in the swarm.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.diskerror import engine_disk_error
from modelp2p.daemon.hashpool import StateLostError
from modelp2p.protocol import engine_wire as wire
from modelp2p.protocol import fetch_steps as step
from modelp2p.protocol.errors import CorruptError, ModelP2PError, PolicyError, StoreError
from modelp2p.protocol.fetching import FetchMachine
from modelp2p.protocol.kinds import HEAD_BYTES, contradiction
from modelp2p.protocol.merkle import HASH_BYTES
from modelp2p.protocol.ranges import Ranges

if TYPE_CHECKING:
    from modelp2p.daemon.folder import ReleaseFolder
    from modelp2p.daemon.hashing import HashPool
    from modelp2p.daemon.swarm import Swarm
    from modelp2p.daemon.web_seeding import WebSeeding

log = logging.getLogger(__name__)

PROOF_BYTES = 16 << 20
"""Most bytes one hash request covers: fewer round trips, and still small against the window."""
FAREWELL_S = 2.0
_QUEUE = 4096
"""Machine events waiting; each is small, and the engine's own event channel is bounded before this one."""


@dataclass(slots=True)
class Traffic:
    """Bytes of payload moved for one torrent, summed over the lives of the engine."""

    down: int = 0
    up: int = 0
    wasted: int = 0
    _base: tuple[int, int, int] = (0, 0, 0)

    def update(self, status: wire.TorrentStatus | wire.Removed) -> None:
        """Take over the engine's counters, which start at zero with each `add`."""
        down, up, wasted = self._base
        self.down, self.up, self.wasted = down + status.payload_down, up + status.payload_up, wasted + status.wasted

    def restart(self) -> None:
        """The engine's counters will start at zero again."""
        self._base = (self.down, self.up, self.wasted)


@dataclass(slots=True)
class Transfer:
    """Fetch the `wanted` files of one release.

    Args:
        folder: where the bytes go; staged already.
        timeout_s: give up after this long without a newly proven byte; None never. With 0 nobody is asked for anything.
        make_spec: the torrent spec for the folder's current state.
        web: who else than peers delivers.
        on_progress: called after every step.
    """

    folder: ReleaseFolder
    swarm: Swarm
    pool: HashPool
    wanted: tuple[str, ...]
    timeout_s: float | None
    allow_code: bool
    make_spec: Callable[[], wire.TorrentSpec]
    on_progress: Callable[[], None]
    workers: int
    web: WebSeeding
    traffic: Traffic = field(default_factory=Traffic)
    status: wire.TorrentStatus | None = None
    reread: int = 0
    """Pieces that were looked at before their bytes were in the file."""
    lives: int = 0
    """How often the torrent was added to the swarm: each time anew, with ordinary priorities."""
    _machine: FetchMachine = field(init=False)
    _send: trio.MemorySendChannel[step.Event] = field(init=False)
    _receive: trio.MemoryReceiveChannel[step.Event] = field(init=False)
    _fds: dict[str, int] = field(default_factory=dict)
    _is_in_swarm: bool = False
    _gone: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[step.Event](_QUEUE)
        self._machine = FetchMachine(
            self.folder.release.pieces,
            self.wanted,
            self.folder.state.proven,
            {path for path in self.wanted if path in self.folder.state.files},
            self.timeout_s,
            trio.current_time(),
            max_proving=2 * self._pieces_at_once * self.workers,
        )

    def __repr__(self) -> str:
        return f"<Transfer {self.folder.release.ref} {self._machine!r}>"

    @property
    def info_hash(self) -> bytes:
        """Which torrent."""
        return self.folder.release.info_hash

    @property
    def proven_bytes(self) -> int:
        """Bytes of wanted files that are proven."""
        return self._machine.proven_bytes

    async def handle(self, event: wire.Event) -> None:
        """Take an event of the swarm about this torrent, or about the engine."""
        match event:
            case wire.PiecesFinished(pieces=pieces):
                total = self.folder.release.pieces.total
                await self._send.send(step.Received(tuple(piece for piece in pieces if 0 <= piece < total)))
            case wire.Flushed():
                await self._send.send(step.Flushed())
            case wire.FileFailed(path=path, message=message, no_space=no_space):
                await self._send.send(step.DiskFailed(engine_disk_error(path, message, no_space=no_space)))
            case wire.AddFailed(message=message):
                await self._send.send(step.DiskFailed(StoreError(f"the engine refused the torrent: {message}")))
            case wire.EngineDied():
                self.traffic.restart()
                self._is_in_swarm = False
                await self._send.send(step.EngineLost())
            case wire.EngineRestarted():
                if self._needs_swarm():
                    await self._add()
                # Whatever was told the dead engine, a hold for one, the new one has not heard.
                await self._send.send(step.EngineLost())
            case wire.TorrentStatus():
                self.status = event
                self._count(event)
                self.on_progress()
            case wire.Removed():
                self._count(event)
                self._gone.set()
            case wire.WebSeedFailed():
                self.web.failed(event)
            case wire.PeerBanned(address=address):
                log.warning("%s: peer %s sent wrong bytes and was banned", self.folder.release.ref, address)
            case _:
                pass

    async def run(self) -> None:
        """Fetch until everything wanted is finished and visible.

        Raises:
            ModelP2PError: why it cannot; everything proven is kept.
        Cancellation: the same; the torrent leaves the swarm.
        """
        try:
            async with trio.open_nursery() as nursery:
                effects = self._machine.start(trio.current_time())
                if not self._machine.is_over and self._needs_swarm():
                    await self._add()
                    nursery.start_soon(self.web.run)
                while True:
                    for path, pieces in self._batches(effects):
                        nursery.start_soon(self._prove, path, pieces)
                    for effect in effects:
                        if await self._perform(effect, nursery):
                            nursery.cancel_scope.cancel()
                            return
                    self.on_progress()
                    event = await self._next_event()
                    effects = self._machine.receive(event, trio.current_time())
        except* ModelP2PError as group:
            raise _first(group) from None
        finally:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()
            with trio.CancelScope(shield=True):
                for path in self.wanted:
                    self.pool.flat_drop(self._key(path))
                if self._is_in_swarm:
                    await self._leave()
                await self.web.aclose()

    def _needs_swarm(self) -> bool:
        return self.timeout_s != 0 and self._machine.proven_bytes < self._machine.wanted_bytes

    async def _next_event(self) -> step.Event:
        # What already happened comes before the clock: a deadline that has passed must not starve the queue.
        with contextlib.suppress(trio.WouldBlock):
            return self._receive.receive_nowait()
        deadline = self._machine.next_deadline()
        with trio.move_on_at(trio.current_time() + 3600 if deadline is None else deadline):
            return await self._receive.receive()
        return step.Tick()

    async def _perform(self, effect: step.Effect, nursery: trio.Nursery) -> bool:
        """Start or do one effect; True when the fetch is complete."""
        match effect:
            case step.Prove():
                pass  # started in batches
            case step.Sync(pieces):
                nursery.start_soon(self._sync, pieces)
            case step.Feed(path, begin, end):
                nursery.start_soon(self._feed, path, begin, end)
            case step.FinishFile(path):
                nursery.start_soon(self._finish, path)
            case step.Hold(on):
                log.debug("hold %s at %r", on, self._machine)
                self.web.hold(on)
                await self.swarm.throttle(self.info_hash, on)
            case step.Flush():
                await self.swarm.flush(self.info_hash)
            case step.Readd():
                log.warning("%s: pieces the engine had are not on the disk; adding it again", self.folder.release.ref)
                await self._leave()
                self.traffic.restart()
                # What the torrent said in its former life is still in the queue, and is not so any more.
                with contextlib.suppress(trio.WouldBlock):
                    self._send.send_nowait(step.EngineLost())
                await self._add()
            case step.Complete():
                return True
            case step.Fail(error):
                raise error
        return False

    async def _leave(self) -> None:
        """Leave the swarm, and wait a moment for the engine's last counts."""
        self._gone = trio.Event()
        await self.swarm.remove(self.info_hash)
        with trio.move_on_after(FAREWELL_S):
            await self._gone.wait()

    async def _add(self) -> None:
        self._is_in_swarm = True
        await self.swarm.add(self.make_spec())
        self.lives += 1
        self.web.added()

    def _count(self, status: wire.TorrentStatus | wire.Removed) -> None:
        self.traffic.update(status)
        self.web.count(self.traffic.down, self.traffic.wasted)

    @property
    def _pieces_at_once(self) -> int:
        return max(1, PROOF_BYTES // self.folder.release.pieces.piece_length)

    def _batches(self, effects: list[step.Effect]) -> list[tuple[str, list[int]]]:
        """The pieces to prove, a request to a hash worker each: of one file, and spread over all workers."""
        by_file: dict[str, list[int]] = {}
        for effect in effects:
            if isinstance(effect, step.Prove):
                by_file.setdefault(self.folder.release.pieces.locate(effect.piece).path, []).append(effect.piece)
        total = sum(map(len, by_file.values()))
        size = min(self._pieces_at_once, max(1, -(-total // self.workers)))
        batches = []
        for path, pieces in by_file.items():
            pieces.sort()
            batches += [(path, pieces[at : at + size]) for at in range(0, len(pieces), size)]
        return batches

    async def _prove(self, path: str, pieces: list[int]) -> None:
        release = self.folder.release
        start = release.pieces.first(path)
        hashes = await self.pool.hash_runs(
            self._fd(path),
            file_size=release.pieces.size(path),
            piece_length=release.pieces.piece_length,
            runs=[(begin - start, end - begin) for begin, end in Ranges.of_ints(pieces).spans],
        )
        found = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
        good = tuple(piece for piece, digest in zip(pieces, found, strict=True) if digest == release.piece_hash(piece))
        bad = tuple(sorted(set(pieces) - set(good)))
        self.reread += len(bad)
        await self._send.send(step.Proved(good, bad))

    async def _sync(self, pieces: Ranges) -> None:
        await trio.to_thread.run_sync(self.folder.sync_proven, pieces)
        await self._send.send(step.Synced(pieces))

    async def _feed(self, path: str, begin: int, end: int) -> None:
        try:
            await self.pool.flat_update(self._key(path), self._fd(path), begin, end)
        except StateLostError:
            end = 0  # a worker died with the running hash: start this file over
        await self._send.send(step.Fed(path, end))

    async def _finish(self, path: str) -> None:
        try:
            await self._check_file(path)
            await trio.to_thread.run_sync(self._link, path)
        except StateLostError:
            await self._send.send(step.Fed(path, 0))
            return
        except ModelP2PError as exc:
            await self._send.send(step.FileFinished(path, exc))
            return
        await self._send.send(step.FileFinished(path))

    async def _check_file(self, path: str) -> None:
        entry = self.folder.release.manifest.file(path)
        digest = await self.pool.flat_finish(self._key(path), entry.size) if entry.size else sha256().digest()
        if digest != entry.sha256:
            raise CorruptError(
                f"'{path}' matches its signed Merkle root, but not its signed SHA-256: the manifest contradicts itself",
                hint="Tell the publisher; this release cannot be used.",
                path=path,
            )
        why = contradiction(path, os.pread(self._fd(path), HEAD_BYTES, 0))
        if why and not self.allow_code:
            raise PolicyError(f"'{path}' is not what its name says: {why}", hint="Only --allow-code accepts it.", path=path)

    def _link(self, path: str) -> None:
        self.folder.finish(path, replace=True)
        # Releases of thousands of files must not hold a descriptor for each.
        os.close(self._fds.pop(path))

    def _fd(self, path: str) -> int:
        if path not in self._fds:
            self._fds[path] = self.folder.open_staged(path)
        return self._fds[path]

    def _key(self, path: str) -> str:
        return f"{self.info_hash.hex()}/{path}"


def _first(group: BaseExceptionGroup[ModelP2PError]) -> ModelP2PError:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, ModelP2PError)
    return found
