"""The hash pool: SHA-256 over files on all cores, asked for by the daemon's tasks.

Workers are processes (`hasher.py`), started when first needed. A request is small (at most 64 MiB of a file): so progress
is smooth, a cancelled request costs a worker at most a blink, and no long file keeps others waiting.

Invariants:
- at most `queue_limit` requests exist at once; further callers wait;
- a request holds its own duplicate of the descriptor, so a caller may close its own as soon as it was cancelled;
- a worker that dies is replaced; its request is tried once more elsewhere, then it is a `StoreError`;
- a running flat hash lives in one worker; if that dies the hash starts over, it never continues from a guess.

It deliberately does not know what the hashes should be.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count as counter
from types import TracebackType
from typing import Self, TypeAlias

import trio

from modelp2p.daemon.diskerror import disk_error, on_disk
from modelp2p.daemon.hashworker import WorkerDied, WorkerProcess
from modelp2p.protocol import codec
from modelp2p.protocol.errors import CorruptError, ModelP2PError, StoreError
from modelp2p.protocol.merkle import pieces_in

Progress: TypeAlias = Callable[[int], None]
"""Told how many more bytes of a file are hashed; over one file the numbers add up to its size."""

CHUNK_BYTES = 64 * 1024 * 1024
"""Most file bytes of one request: about 50 ms of one core."""

# Unfinished flat hashes; a release has at most 10,000 files.
MAX_KEYS = 16_384


@dataclass(frozen=True, slots=True)
class HashPoolStatistics:
    """Totals since the pool was made; `workers` is how many processes run now, `waiting` how many requests no worker has."""

    workers: int
    bytes_read: int
    pieces: int
    requests: int
    waiting: int
    replaced: int


@dataclass(eq=False, slots=True)
class _Job:
    request: codec.Map
    fd: int | None
    done: trio.Event = field(default_factory=trio.Event)
    reply: codec.Map | ModelP2PError | None = None
    tries: int = 0

    def finish(self, reply: codec.Map | ModelP2PError) -> None:
        self.reply = reply
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self.done.set()


@dataclass(eq=False, slots=True)
class _Worker:
    wake: trio.Event = field(default_factory=trio.Event)
    jobs: deque[_Job] = field(default_factory=deque)
    keys: set[str] = field(default_factory=set)
    process: WorkerProcess | None = None


class HashPool:
    """Up to `workers` hashing processes; use it as `async with HashPool(workers=n) as pool`.

    Resources: leaving the block, also by cancellation, ends all processes before it returns.
    """

    def __init__(self, *, workers: int | None = None, queue_limit: int | None = None) -> None:
        count = workers or len(os.sched_getaffinity(0))
        self._workers = [_Worker() for _ in range(count)]
        self._jobs: deque[_Job] = deque()
        self._slots = trio.Semaphore(queue_limit or 4 * count + 8)
        self._home: dict[str, _Worker] = {}
        self._names = counter()
        self._bytes_read = self._pieces = self._requests = self._replaced = 0
        self._nursery: trio.Nursery | None = None

    @property
    def worker_limit(self) -> int:
        """How many processes there may be."""
        return len(self._workers)

    def __repr__(self) -> str:
        return f"<HashPool {self.statistics()}>"

    def statistics(self) -> HashPoolStatistics:
        running = sum(worker.process is not None for worker in self._workers)
        waiting = len(self._jobs) + sum(len(worker.jobs) for worker in self._workers)
        return HashPoolStatistics(running, self._bytes_read, self._pieces, self._requests, waiting, self._replaced)

    async def __aenter__(self) -> Self:
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        for worker in self._workers:
            self._nursery.start_soon(self._run_worker, worker)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> bool | None:
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()
        self._nursery = None
        if isinstance(exc, trio.Cancelled | BaseExceptionGroup):
            return await self._manager.__aexit__(kind, exc, trace)
        # An error of the block is the caller's own: it passes as it is, not wrapped in this nursery's group.
        await self._manager.__aexit__(None, None, None)
        return None

    async def hash_pieces(self, fd: int, *, file_size: int, piece_length: int, first: int, count: int) -> bytes:
        """The hashes of `count` pieces from `first` of the file `fd`, 32 bytes each, as they stand in its layer.

        Cancellation: the result is dropped.

        Raises:
            CorruptError: the file is shorter than `file_size` says.
            StoreError: reading failed, or workers died twice.
        """
        if not 0 <= first <= first + count <= pieces_in(file_size, piece_length):
            raise ValueError(f"a file of {file_size} bytes has no pieces {first} to {first + count}")
        per_request = max(1, CHUNK_BYTES // piece_length)
        found = bytearray()
        for at in range(first, first + count, per_request):
            some = min(per_request, first + count - at)
            request: codec.Map = {"op": "pieces", "size": file_size, "piece_length": piece_length, "first": at, "count": some}
            found += codec.take(await self._ask(request, fd), "hashes", bytes)
            self._pieces += some
            self._bytes_read += min(file_size, (at + some) * piece_length) - at * piece_length
        return bytes(found)

    async def flat(self, fd: int, size: int, *, git: bool = False, progress: Progress | None = None) -> tuple[bytes, bytes | None]:
        """The SHA-256 of the first `size` bytes of `fd`, and with `git` the git blob id (20 bytes) of those bytes.

        With `git` the file is read in one request: git ids are for small files.

        Raises:
            CorruptError: the file is shorter.
            StoreError: reading failed, or workers died twice.
        """
        tell = progress or _silent
        if git or size <= CHUNK_BYTES:
            reply = await self._ask({"op": "flat", "size": size, "git": git}, fd)
            self._bytes_read += size
            tell(size)
            return codec.take(reply, "sha256", bytes), codec.take(reply, "git_sha1", bytes) if git else None
        # A second run after a death tells only what the first had not told.
        told = 0
        for is_last in (False, True):
            try:
                async with self.flat_key() as key:
                    for at in range(0, size, CHUNK_BYTES):
                        end = min(size, at + CHUNK_BYTES)
                        await self.flat_update(key, fd, at, end)
                        tell(max(0, end - max(at, told)))
                        told = max(told, end)
                    return await self.flat_finish(key, size), None
            except _StateLostError:
                if is_last:
                    raise
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def flat_key(self) -> AsyncIterator[str]:
        """A fresh key for `flat_update`, forgotten at the end of the block."""
        key = f"#{next(self._names)}"
        try:
            yield key
        finally:
            self._drop_nowait(key)

    async def flat_update(self, key: str, fd: int, offset: int, end: int) -> None:
        """Adds the bytes `offset` to `end` of `fd` to the flat SHA-256 named `key`; offset 0 starts it (over).

        One task per key at a time. Cancellation: whether the bytes were added is not known; drop the key.

        Raises:
            CorruptError: the file is shorter; the key is gone.
            StoreError: reading failed, or the worker that held the state died: start over from 0.
        """
        if offset == 0:
            self._drop_nowait(key)
        worker = self._home.get(key) or self._settle(key, offset)
        for at in range(offset, end, CHUNK_BYTES):
            until = min(end, at + CHUNK_BYTES)
            await self._ask({"op": "flat_update", "key": key, "offset": at, "end": until}, fd, worker)
            self._bytes_read += until - at

    async def flat_finish(self, key: str, size: int) -> bytes:
        """The SHA-256 of `key`, which must have been fed exactly `size` bytes; the key is gone then.

        Raises:
            StoreError: it stands elsewhere, or its state is lost: start over from 0.
        """
        worker = self._home.get(key) or self._settle(key, size)
        try:
            return codec.take(await self._ask({"op": "flat_finish", "key": key, "size": size}, None, worker), "sha256", bytes)
        finally:
            self._leave(key)

    async def flat_drop(self, key: str) -> None:
        """Forgets `key`; unknown keys are fine."""
        self._drop_nowait(key)
        await trio.lowlevel.checkpoint()

    def _settle(self, key: str, offset: int) -> _Worker:
        if offset != 0:
            raise _StateLostError("a flat hash was lost with its worker; it has to start over")
        if len(self._home) >= MAX_KEYS:
            raise StoreError(f"{MAX_KEYS} flat hashes are unfinished; no more can be started")
        worker = min(self._workers, key=lambda candidate: (len(candidate.keys), len(candidate.jobs)))
        worker.keys.add(key)
        self._home[key] = worker
        return worker

    def _leave(self, key: str) -> _Worker | None:
        worker = self._home.pop(key, None)
        if worker is not None:
            worker.keys.discard(key)
        return worker

    def _drop_nowait(self, key: str) -> None:
        worker = self._leave(key)
        if worker is not None and worker.process is not None:
            worker.jobs.append(_Job({"op": "flat_drop", "key": key}, None))
            worker.wake.set()

    async def _ask(self, request: codec.Map, fd: int | None, worker: _Worker | None = None) -> codec.Map:
        if self._nursery is None:
            raise StoreError("the hash pool is closed")
        async with self._slots:
            with on_disk("cannot hand a file to a hash worker"):
                job = _Job(request, None if fd is None else os.dup(fd))
            queue = self._jobs if worker is None else worker.jobs
            queue.append(job)
            self._requests += 1
            self._wake(worker)
            try:
                await job.done.wait()
            finally:
                if job in queue:
                    queue.remove(job)
                    job.finish({})
        return _checked(job.reply)

    def _wake(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.wake.set()
            return
        # Workers that run already come first, so that a single request starts a single process.
        for candidate in sorted(self._workers, key=lambda one: one.process is None):
            if not candidate.wake.is_set():
                candidate.wake.set()
                return

    async def _run_worker(self, worker: _Worker) -> None:
        try:
            while True:
                await worker.wake.wait()
                # A flat hash is the longest chain of a file: it goes first, pieces fill what is left.
                queue = worker.jobs or self._jobs
                if not queue:
                    worker.wake = trio.Event()
                    continue
                await self._perform(worker, queue.popleft())
        finally:
            process, worker.process = worker.process, None
            if process is not None:
                await process.aclose()

    async def _perform(self, worker: _Worker, job: _Job) -> None:
        try:
            if worker.process is None:
                worker.process = await WorkerProcess.start()
            reply = await worker.process.ask(job.request, job.fd)
        except WorkerDied:
            await self._bury(worker, job)
        except OSError as exc:
            job.finish(disk_error(exc, "cannot start a hash worker"))
        except trio.Cancelled:
            job.finish(StoreError("the hash pool is closed"))
            raise
        else:
            job.finish(reply)

    async def _bury(self, worker: _Worker, job: _Job) -> None:
        process, worker.process = worker.process, None
        self._replaced += 1
        for key in list(worker.keys):
            self._leave(key)
        lost, worker.jobs = worker.jobs, deque()
        if "key" in job.request:
            lost.append(job)
        elif job.tries:
            job.finish(StoreError("hash workers died twice over one request", hint="See the daemon's log; the disk may be failing."))
        else:
            job.tries += 1
            self._jobs.appendleft(job)
        for one in lost:
            one.finish(_StateLostError("a flat hash was lost with its worker; it has to start over"))
        if process is not None:
            await process.aclose()


class _StateLostError(StoreError):
    """A running flat hash is gone with its worker."""


def _checked(reply: codec.Map | ModelP2PError | None) -> codec.Map:
    match reply:
        case ModelP2PError():
            raise reply
        case {"error": "short", "message": str(message)}:
            raise CorruptError(message)
        case {"error": "state", "message": str(message)}:
            raise _StateLostError(message)
        case {"error": "disk", "message": str(message), "errno": int(code)}:
            raise disk_error(OSError(code, message), "cannot read a file to hash it")
        case None:
            raise AssertionError("a request ended without a reply")
        case _:
            return reply


def _silent(_: int) -> None:
    """Nobody asked for progress."""
