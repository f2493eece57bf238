"""Hashing files on all cores: pieces as BEP 52 counts them, and the flat SHA-256 that Hugging Face names files by.

A request covers at most 64 MiB of a file, so progress is smooth, a cancelled request costs a worker a blink, and no long
file keeps others waiting. A flat SHA-256 is one chain and cannot be split. While there are files enough for all workers, each
takes a whole file and computes both hashes in one reading; a file with workers to spare has its flat hash in one of them and
its pieces in the others, in the same region, so that a file larger than memory is read from the disk once, not twice.

It deliberately does not know what the hashes should be; `hashpool.py` has the processes, `hasher.py` is one of them.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count as counter
from typing import TypeAlias

import trio

from modelp2p.daemon.diskerror import on_disk
from modelp2p.daemon.hashpool import StateLostError, WorkerPool
from modelp2p.protocol import codec
from modelp2p.protocol.errors import ModelP2PError
from modelp2p.protocol.hashwork import pieces_request
from modelp2p.protocol.merkle import HASH_BYTES, pieces_in, root_of_layer

Progress: TypeAlias = Callable[[int], None]
"""Told how many more bytes of a file are hashed; over one file the numbers add up to its size."""

CHUNK_BYTES = 64 * 1024 * 1024
"""Most file bytes of one request: about 50 ms of one core."""

LEAD_BYTES = 512 * 1024 * 1024
"""How far the flat hash and the pieces of one file may be apart: it has to stay in the page cache in between."""


@dataclass(frozen=True, slots=True)
class FileHashes:
    """All hashes of one file: `layer` is its piece hashes, `root` their root (both empty for an empty file)."""

    layer: bytes
    root: bytes
    sha256: bytes
    git_sha1: bytes | None


@dataclass(frozen=True, slots=True)
class FileToHash:
    """A file for `hash_files`: `open` returns a fresh descriptor, which the pool closes, so that few are open at once."""

    open: Callable[[], int]
    size: int
    git: bool = False


@dataclass(frozen=True, slots=True)
class HashPoolStatistics:
    """Totals since the pool was made; `workers` is how many processes run now, `waiting` what none has taken yet."""

    workers: int
    bytes_read: int
    pieces: int
    requests: int
    waiting: int
    replaced: int


class HashPool(WorkerPool):
    """Hashes files by up to `workers` processes: `async with HashPool(workers=n) as pool`.

    Descriptors stay the caller's, need only be readable, and keep their position. All methods raise `CorruptError` for a
    file shorter than it was said to be, and `StoreError` where reading fails or workers die twice; results of cancelled
    calls are dropped and the workers go on.
    """

    def __init__(self, *, workers: int | None = None, queue_limit: int | None = None) -> None:
        super().__init__(workers=workers, queue_limit=queue_limit)
        self._names = counter()
        self._bytes_read = 0
        self._pieces = 0

    def __repr__(self) -> str:
        return f"<HashPool {self.statistics()}>"

    def statistics(self) -> HashPoolStatistics:
        return HashPoolStatistics(
            workers=len(self.pids),
            bytes_read=self._bytes_read,
            pieces=self._pieces,
            requests=self.requests,
            waiting=self.waiting,
            replaced=self.replaced,
        )

    async def hash_pieces(self, fd: int, *, file_size: int, piece_length: int, first: int, count: int) -> bytes:
        """The hashes of `count` pieces from `first`, 32 bytes each, as they stand in the layer of the file."""
        per_request = max(1, CHUNK_BYTES // piece_length)
        found = bytearray()
        for at in range(first, first + count, per_request):
            run = (at, min(per_request, first + count - at))
            found += await self.hash_runs(fd, file_size=file_size, piece_length=piece_length, runs=[run])
        return bytes(found)

    async def hash_runs(self, fd: int, *, file_size: int, piece_length: int, runs: Sequence[tuple[int, int]]) -> bytes:
        """The hashes of the pieces of `runs`, each `(first, count)`, one behind the other; one request, so keep it small."""
        total = pieces_in(file_size, piece_length)
        for first, count in runs:
            if not 0 <= first <= first + count <= total:
                raise ValueError(f"a file of {file_size} bytes has no pieces {first} to {first + count}")
        hashes = codec.take(await self.ask(pieces_request(file_size, piece_length, runs), fd), "hashes", bytes)
        self._pieces += len(hashes) // HASH_BYTES
        self._bytes_read += sum(min(file_size, (first + count) * piece_length) - first * piece_length for first, count in runs)
        return hashes

    async def flat(self, fd: int, size: int, git: bool = False, progress: Progress | None = None) -> tuple[bytes, bytes | None]:
        """The SHA-256 of the first `size` bytes and, with `git`, the git blob id (20 bytes) of those bytes.

        With `git` the file is read in one request, whatever its size: git ids are for small files.
        """
        return await self._flat(fd, size, git, progress or _silent, _at_once)

    async def flat_update(self, key: str, fd: int, offset: int, end: int) -> None:
        """Adds the bytes `offset` to `end` to the flat SHA-256 named `key`; offset 0 starts it, or starts it over.

        One task per key at a time. After an error or a cancellation drop the key or start over.

        Raises:
            StateLostError: the worker that held it died, or it stands elsewhere: start over from 0.
        """
        if offset == 0:
            self.start_key(key)
        for at in range(offset, end, CHUNK_BYTES):
            until = min(end, at + CHUNK_BYTES)
            await self.ask({"op": "flat_update", "key": key, "offset": at, "end": until}, fd, key=key)
            self._bytes_read += until - at

    async def flat_finish(self, key: str, size: int) -> bytes:
        """The SHA-256 of `key`, which must have been fed exactly `size` bytes; the key is gone then, also after an error.

        Raises:
            StateLostError: as for `flat_update`.
        """
        try:
            return codec.take(await self.ask({"op": "flat_finish", "key": key, "size": size}, key=key), "sha256", bytes)
        finally:
            self.forget_key(key)

    def flat_drop(self, key: str) -> None:
        """Forgets `key`; unknown keys are fine."""
        self.drop_key(key)

    async def hash_file(
        self, fd: int, size: int, piece_length: int, git: bool = False, progress: Progress | None = None, *, split: bool = True
    ) -> FileHashes:
        """All hashes of one file; `split` over several workers, or in one reading by one of them."""
        if split or git or size <= CHUNK_BYTES:
            return await self._hash_split(fd, size, piece_length, git, progress or _silent)
        mark = _Mark(progress or _silent)
        try:
            return await self._hash_whole(fd, size, piece_length, mark)
        except StateLostError:
            return await self._hash_whole(fd, size, piece_length, mark)

    async def hash_files(
        self, files: Sequence[FileToHash], piece_length: int, progress: Progress | None = None
    ) -> list[FileHashes]:
        """All hashes of many files, in the order of `files`; the longest are begun first, so that no core waits at the end."""
        found: dict[int, FileHashes] = {}
        left = sorted(range(len(files)), key=lambda index: files[index].size)
        # What is small goes through in one request anyway and cannot keep a worker busy.
        large = sum(file.size > CHUNK_BYTES for file in files)

        async def take_files() -> None:
            nonlocal large
            while left:
                index = left.pop()
                file = files[index]
                with on_disk("cannot open a file to hash it"):
                    fd = file.open()
                try:
                    split = large < self.worker_limit
                    found[index] = await self.hash_file(fd, file.size, piece_length, file.git, progress, split=split)
                finally:
                    os.close(fd)
                large -= file.size > CHUNK_BYTES

        await _all_of([take_files] * min(len(files), self.worker_limit))
        return [found[index] for index in range(len(files))]

    async def _hash_whole(self, fd: int, size: int, piece_length: int, mark: _Mark) -> FileHashes:
        layer = bytearray()
        async with self._fresh_key() as key:
            self.start_key(key)
            for at in range(0, size, CHUNK_BYTES):
                end = min(size, at + CHUNK_BYTES)
                where: codec.Map = {"key": key, "offset": at, "end": end, "size": size, "piece_length": piece_length}
                layer += codec.take(await self.ask({"op": "both_update", **where}, fd, key=key), "hashes", bytes)
                self._bytes_read += end - at
                mark.reach(end)
            sha256 = await self.flat_finish(key, size)
        self._pieces += pieces_in(size, piece_length)
        return FileHashes(bytes(layer), root_of_layer(bytes(layer), piece_length), sha256, None)

    async def _hash_split(self, fd: int, size: int, piece_length: int, git: bool, tell_more: Progress) -> FileHashes:
        apart = _Apart()
        ranges = list(_piece_ranges(size, piece_length))
        found: list[bytes] = [b""] * len(ranges)
        flats: list[tuple[bytes, bytes | None]] = []
        upcoming = iter(enumerate(ranges))

        async def take_flat() -> None:
            def tell(done: int) -> None:
                apart.flat += done
                apart.changed()
                tell_more(done)

            flats.append(await self._flat(fd, size, git, tell, apart.wait_flat))

        async def take_pieces() -> None:
            for index, (first, count) in upcoming:
                await apart.wait_pieces(first * piece_length)
                found[index] = await self.hash_pieces(fd, file_size=size, piece_length=piece_length, first=first, count=count)
                apart.pieces += count * piece_length
                apart.changed()

        hands = min(len(ranges), self.worker_limit, LEAD_BYTES // CHUNK_BYTES)
        await _all_of([take_flat, *[take_pieces] * hands])
        layer = b"".join(found)
        return FileHashes(layer, root_of_layer(layer, piece_length), *flats[0])

    async def _flat(
        self, fd: int, size: int, git: bool, tell: Progress, wait_turn: Callable[[int], Awaitable[None]]
    ) -> tuple[bytes, bytes | None]:
        if git or size <= CHUNK_BYTES:
            reply = await self.ask({"op": "flat", "size": size, "git": git}, fd)
            self._bytes_read += size
            tell(size)
            return codec.take(reply, "sha256", bytes), codec.take(reply, "git_sha1", bytes) if git else None
        mark = _Mark(tell)

        async def run() -> bytes:
            async with self._fresh_key() as key:
                for at in range(0, size, CHUNK_BYTES):
                    await wait_turn(at)
                    end = min(size, at + CHUNK_BYTES)
                    await self.flat_update(key, fd, at, end)
                    mark.reach(end)
                return await self.flat_finish(key, size)

        try:
            return await run(), None
        except StateLostError:
            return await run(), None

    @asynccontextmanager
    async def _fresh_key(self) -> AsyncIterator[str]:
        key = f"#{next(self._names)}"
        try:
            yield key
        finally:
            self.drop_key(key)


class _Mark:
    """How far one file is; what starts over after the death of a worker is not told twice."""

    def __init__(self, tell: Progress) -> None:
        self._tell = tell
        self._told = 0

    def reach(self, end: int) -> None:
        if end > self._told:
            self._tell(end - self._told)
            self._told = end


class _Apart:
    """Keeps the flat hash and the pieces of one file within `LEAD_BYTES` of each other."""

    def __init__(self) -> None:
        self.flat = 0
        self.pieces = 0
        self._lot = trio.lowlevel.ParkingLot()

    def changed(self) -> None:
        self._lot.unpark_all()

    async def wait_flat(self, at: int) -> None:
        while at >= self.pieces + LEAD_BYTES:
            await self._lot.park()

    async def wait_pieces(self, at: int) -> None:
        while at >= self.flat + LEAD_BYTES:
            await self._lot.park()


def _piece_ranges(size: int, piece_length: int) -> Iterator[tuple[int, int]]:
    total, step = pieces_in(size, piece_length), max(1, CHUNK_BYTES // piece_length)
    for first in range(0, total, step):
        yield first, min(step, total - first)


async def _all_of(tasks: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Runs all `tasks`; the first error of ours ends the rest and is raised as it is."""
    errors: list[ModelP2PError] = []

    async def run(task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except ModelP2PError as exc:
            errors.append(exc)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(run, task)
    if errors:
        raise errors[0]


def _silent(_: int) -> None:
    """Nobody asked for progress."""


async def _at_once(_: int) -> None:
    """Nothing to wait for."""
