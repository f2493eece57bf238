"""The worker processes behind `hashing.py`: who gets which request, and what happens when one dies.

Two kinds of request: free ones, which any worker may answer, and those of a *key*, a running hash that lives in one worker.

Invariants:
- at most `queue_limit` requests exist at once; further callers wait;
- a request holds its own duplicate of the descriptor, so a caller may close its own as soon as it was cancelled;
- a worker that dies is replaced; a free request is tried once more, a key that lived there is gone;
- after the first such death files are read, not mapped, for as long as the pool lives: a file cut short under a mapping kills
  (SIGBUS), and only reading says what is wrong;
- every request ends: with a reply, an error, or "the pool is closed".
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

import trio

from modelp2p.daemon.diskerror import disk_error, on_disk
from modelp2p.daemon.hashworker import WorkerDied, WorkerProcess
from modelp2p.protocol.errors import CorruptError, ModelP2PError, StoreError
from modelp2p.protocol.hashwork import READY

if TYPE_CHECKING:
    from modelp2p.protocol import codec

# Keys at once; a release has at most 10,000 files.
MAX_KEYS = 16_384


class StateLostError(StoreError):
    """A running hash is gone with its worker, or stands elsewhere; it has to start over."""


@dataclass(eq=False, slots=True)
class _Job:
    request: codec.Map
    fd: int | None
    key: str | None = None
    done: trio.Event = field(default_factory=trio.Event)
    reply: codec.Map | ModelP2PError | None = None
    is_retried: bool = False

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


class WorkerPool:
    """Up to `workers` processes, started when first needed; use it as an async context manager.

    Resources: leaving the block, also by cancellation, ends all processes before it returns.
    """

    def __init__(self, *, workers: int | None = None, queue_limit: int | None = None) -> None:
        count = workers or len(os.sched_getaffinity(0))
        self._workers = [_Worker() for _ in range(count)]
        self._jobs: deque[_Job] = deque()
        self._slots = trio.Semaphore(queue_limit or 4 * count + 8)
        self._homes: dict[str, _Worker] = {}
        self._nursery: trio.Nursery | None = None
        self.requests = 0
        self.replaced = 0
        self.is_mapping = True

    @property
    def worker_limit(self) -> int:
        """How many processes there may be."""
        return len(self._workers)

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    @property
    def waiting(self) -> int:
        """How many requests no worker has taken yet."""
        return len(self._jobs) + sum(len(worker.jobs) for worker in self._workers)

    async def __aenter__(self) -> Self:
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        for worker in self._workers:
            self._nursery.start_soon(self._run, worker)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        nursery, self._nursery = self._nursery, None
        if nursery is not None:
            nursery.cancel_scope.cancel()
        for queue in (self._jobs, *(worker.jobs for worker in self._workers)):
            while queue:
                queue.popleft().finish(_closed())
        if isinstance(exc, trio.Cancelled | BaseExceptionGroup):
            return await self._manager.__aexit__(kind, exc, trace)
        # An error of the block is the caller's own: it passes as it is, not wrapped in this nursery's group.
        await self._manager.__aexit__(None, None, None)
        return None

    async def ask(self, request: codec.Map, fd: int | None = None, *, key: str | None = None) -> codec.Map:
        """The reply to `request`, from any worker or from the one where `key` was started.

        Cancellation: a request nobody took is withdrawn; one that runs is finished and its reply dropped.

        Raises:
            CorruptError: the file is shorter than the request says.
            StateLostError: `key` is not known any more.
            StoreError: reading failed, workers died twice, or the pool is closed.
        """
        async with self._slots:
            if self._nursery is None:
                raise _closed()
            worker = None if key is None else self._homes.get(key)
            if key is not None and worker is None:
                raise _lost()
            with on_disk("cannot hand a file to a hash worker"):
                job = _Job(request, None if fd is None else os.dup(fd), key)
            queue = self._jobs if worker is None else worker.jobs
            queue.append(job)
            self.requests += 1
            self._wake(worker)
            try:
                await job.done.wait()
            finally:
                if job in queue:
                    queue.remove(job)
                    job.finish({})
        return _checked(job.reply)

    def warm(self, count: int) -> None:
        """Starts up to `count` processes now: a tenth of a second that work about to come need not wait for."""
        for worker in self._workers[:count]:
            if worker.process is None and not worker.jobs and self._nursery is not None:
                worker.jobs.append(_Job(READY, None))
                worker.wake.set()

    def start_key(self, key: str) -> None:
        """Settles a new `key` in the worker with the fewest; an older hash of that name is dropped.

        Raises:
            StoreError: too many keys are unfinished.
        """
        self.drop_key(key)
        if len(self._homes) >= MAX_KEYS:
            raise StoreError(f"{MAX_KEYS} flat hashes are unfinished; no more can be started")
        worker = min(self._workers, key=lambda one: (len(one.keys), len(one.jobs)))
        worker.keys.add(key)
        self._homes[key] = worker

    def forget_key(self, key: str) -> _Worker | None:
        """Takes `key` off the books, for a hash that is finished in its worker; unknown keys are fine."""
        worker = self._homes.pop(key, None)
        if worker is not None:
            worker.keys.discard(key)
        return worker

    def drop_key(self, key: str) -> None:
        """Ends `key` here and in its worker; unknown keys are fine."""
        worker = self.forget_key(key)
        if worker is not None and worker.process is not None and self._nursery is not None:
            worker.jobs.append(_Job({"op": "flat_drop", "key": key}, None, key))
            worker.wake.set()

    def _wake(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.wake.set()
            return
        # Workers that run already come first, so that a single request starts a single process.
        idle = [one for one in self._workers if not one.wake.is_set()]
        for one in sorted(idle, key=lambda one: one.process is None)[:1]:
            one.wake.set()

    async def _run(self, worker: _Worker) -> None:
        try:
            while True:
                await worker.wake.wait()
                # A flat hash is the longest chain of a file, so it goes first; pieces fill what is left.
                queue = worker.jobs or self._jobs
                if not queue:
                    worker.wake = trio.Event()
                    continue
                job = queue.popleft()
                if self._jobs:
                    self._wake(None)
                await self._perform(worker, job)
        finally:
            process, worker.process = worker.process, None
            if process is not None:
                await process.aclose()

    async def _perform(self, worker: _Worker, job: _Job) -> None:
        try:
            if worker.process is None:
                worker.process = await WorkerProcess.start()
            job.finish(await worker.process.ask(job.request, job.fd, mapped=self.is_mapping))
        except WorkerDied:
            await self._bury(worker, job)
        except OSError as exc:
            job.finish(disk_error(exc, "cannot start a hash worker"))
        except trio.Cancelled:
            job.finish(_closed())
            raise

    async def _bury(self, worker: _Worker, job: _Job) -> None:
        """Ends every key of a dead worker, and gives its free request to the next one."""
        process, worker.process = worker.process, None
        self.replaced += 1
        self.is_mapping = False
        for key in list(worker.keys):
            self.forget_key(key)
        while worker.jobs:
            worker.jobs.popleft().finish(_lost())
        if job.key is not None:
            job.finish(_lost())
        elif job.is_retried:
            job.finish(StoreError("hash workers died twice over one request", hint="See the daemon's log."))
        else:
            job.is_retried = True
            self._jobs.appendleft(job)
        if process is not None:
            await process.aclose()


def _checked(reply: codec.Map | ModelP2PError | None) -> codec.Map:
    match reply:
        case ModelP2PError():
            raise reply
        case {"error": "short", "message": str(message)}:
            raise CorruptError(message)
        case {"error": "state", "message": str(message)}:
            raise StateLostError(message)
        case {"error": "disk", "message": str(message), "errno": int(code)}:
            raise disk_error(OSError(code, message), "cannot read a file to hash it")
        case None:
            raise AssertionError("a request ended without a reply")
        case _:
            return reply


def _lost() -> StateLostError:
    return StateLostError("a flat hash was lost with its worker; it has to start over")


def _closed() -> StoreError:
    return StoreError("the hash pool is closed")
