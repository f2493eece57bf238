"""Detached fetches: work the daemon goes on with when nobody waits for it, also after it was restarted.

    accept ─► jobs/<id> on the disk ─► fetch ─► done ─────────────────────► file removed
                                        │ ▲
                                        │ └── no space, or nobody delivers: paused, and tried again
                                        └──► anything a retry cannot mend ─► logged, file removed

Invariants:
- a job is on the disk, synced, before the client hears that it was accepted;
- its file is removed only when it is done, cannot be done, or its release is removed; a stop, a crash and a bug leave it;
- one request is one job, however often it is made; jobs on one content take turns (`Shared.lock`).

A job carries no proof and no trust: each attempt verifies and admits the kept statement again, and the journal says what is
proven. A job whose statement is not here any more ends: nothing that was removed comes back by itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.fetch import Resolved, fetch
from modelp2p.daemon.requests import FetchRequest, Target
from modelp2p.protocol.errors import DeniedError, ModelP2PError, NoSpaceError, NotFoundError, StoreError, UnavailableError
from modelp2p.protocol.job import MAX_TIMEOUT_S, Job

if TYPE_CHECKING:
    from modelp2p.daemon.node import Node

log = logging.getLogger(__name__)

MAX_JOBS = 1000
"""Each is a file and a task; nobody detaches more, and a loop that does is told."""
NO_SPACE_RETRY_S = 30.0
FIRST_RETRY_S = 30.0
LAST_RETRY_S = 900.0
"""A publisher who comes back is found within a quarter of an hour; an attempt itself already waited for the timeout."""


def job_of(resolved: Resolved, request: FetchRequest, default_timeout_s: float) -> Job:
    """The job that does `request` without its client."""
    release = resolved.release
    timeout_s = default_timeout_s if request.timeout_s is None else request.timeout_s
    return Job(
        release.info_hash,
        release.digest,
        None if resolved.link is None else replace(resolved.link, trackers=(), web_seeds=()),
        request.include,
        request.exclude,
        request.peers,
        min(MAX_TIMEOUT_S, max(1, math.ceil(timeout_s))),
        request.allow_code,
        request.seed,
        request.max_up,
        request.max_down,
        request.peers_only,
    )


def retry_after_s(error: ModelP2PError, failures: int) -> float | None:
    """Seconds until a job that failed is tried again, `failures` times in vain before; None where that cannot help."""
    match error:
        case NoSpaceError():
            return NO_SPACE_RETRY_S
        case UnavailableError() | StoreError():
            # Nobody is there, or this machine is in trouble (a disk, too few descriptors): both may pass. Beyond 10 doublings
            # only the cap counts, and a float has an end.
            return min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(failures, 10))
        case _:
            return None


@dataclass(slots=True)
class _Running:
    """A job with the task that works on it."""

    job: Job
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    wake: trio.Event = field(default_factory=trio.Event)
    """Set when somebody asks for the same again: then the pause is over."""
    attempt: trio.CancelScope = field(default_factory=trio.CancelScope)
    aside: int = 0
    """How many with a client want the content for themselves; no attempt is made meanwhile."""
    ended: trio.Event = field(default_factory=trio.Event)


class Jobs:
    """The detached fetches of one node; their tasks live in `nursery`.

    Args:
        on_idle: called when the last job has ended.
    """

    def __init__(self, node: Node, nursery: trio.Nursery, on_idle: Callable[[], None], *, max_jobs: int = MAX_JOBS) -> None:
        self._node = node
        self._nursery = nursery
        self._on_idle = on_idle
        self._max_jobs = max_jobs
        self._running: dict[bytes, _Running] = {}

    def __repr__(self) -> str:
        return f"<Jobs {len(self._running)} running>"

    @property
    def running(self) -> int:
        """Jobs that are not done."""
        return len(self._running)

    async def accept(self, job: Job) -> None:
        """Keep a job and begin it; one that is there already is tried again at once.

        Raises:
            DeniedError: there are too many.
            StoreError: it could not be kept, and was not begun.
        """
        known = self._running.get(job.id)
        if known is not None:
            known.wake.set()
            return
        if len(self._running) >= self._max_jobs:
            raise DeniedError(f"{self._max_jobs} detached fetches are waiting already", hint="'modelp2p status' shows them.")
        await trio.to_thread.run_sync(self._node.store.save_job, job)
        self._start(job)

    def take_up(self) -> None:
        """Begin every kept job that is not running."""
        for job in self._node.store.jobs():
            log.info("a detached fetch of %s goes on", job.info_hash.hex()[:16])
            self._start(job)

    async def cancel(self, info_hash: bytes) -> None:
        """End and forget every job about a content, running or only kept; returns when none works on it any more.

        Cancellation: they are forgotten, and ending.
        """
        # The files first: what is interrupted from here on must not come back at the next start.
        await trio.to_thread.run_sync(self._forget, info_hash)
        ending = [running for running in self._running.values() if running.job.info_hash == info_hash]
        for running in ending:
            running.scope.cancel()
        for running in ending:
            await running.ended.wait()
        if ending:
            # One that was being accepted at that moment may have left its file after the first time.
            await trio.to_thread.run_sync(self._forget, info_hash)

    @contextmanager
    def set_aside(self, info_hash: bytes) -> Iterator[None]:
        """For the time of the block no job works on a content: who has the files at hand does not wait for peers of a job."""
        jobs = [running for running in self._running.values() if running.job.info_hash == info_hash]
        for running in jobs:
            running.aside += 1
            running.attempt.cancel()
        try:
            yield
        finally:
            for running in jobs:
                running.aside -= 1
                running.wake.set()

    def _forget(self, info_hash: bytes) -> None:
        for job in self._node.store.jobs():
            if job.info_hash == info_hash:
                self._node.store.remove_job(job.id)

    def _start(self, job: Job) -> None:
        if job.id in self._running:
            return
        running = self._running[job.id] = _Running(job)
        self._node.of(job.info_hash).jobs += 1
        self._nursery.start_soon(self._run, running)

    async def _run(self, running: _Running) -> None:
        job, shared = running.job, self._node.of(running.job.info_hash)
        try:
            with running.scope:
                await self._attempts(running)
                await trio.to_thread.run_sync(self._node.store.remove_job, job.id)
        except ModelP2PError as exc:
            log.error("a detached fetch cannot be forgotten: %s", exc.message)
        except Exception:
            # Its file stays: a bug is not the job's fault, and the next version may know better.
            log.exception("internal error in a detached fetch")
            shared.error = "internal error in a detached fetch; the daemon's log has the details"
        finally:
            del self._running[job.id]
            shared.jobs -= 1
            shared.waits_for = ""
            shared.watch.ring()
            running.ended.set()
        if not self._running:
            self._on_idle()

    async def _attempts(self, running: _Running) -> None:
        """Fetch until it is done or cannot be done."""
        job, shared = running.job, self._node.of(running.job.info_hash)
        failures, proven = 0, shared.proven
        while True:
            # Made before the attempt: asking for the same again meanwhile shortens the pause after it, too.
            running.wake = trio.Event()
            if running.aside:
                await running.wake.wait()
                continue
            running.attempt = trio.CancelScope()
            try:
                with running.attempt:
                    await fetch(self._node, await self._request(job), lambda _: None)
                    return
                continue
            except ModelP2PError as exc:
                if shared.proven > proven:
                    failures, proven = 0, shared.proven
                delay = retry_after_s(exc, failures)
                if delay is None:
                    log.error("a detached fetch of %s ended: %s", job.info_hash.hex()[:16], exc.message)
                    if self._node.library.about(job.info_hash):
                        shared.error = exc.message
                    return
                failures += 1
                shared.error = ""
                shared.waits_for = f"no space: {exc.message}" if isinstance(exc, NoSpaceError) else exc.message
                shared.watch.ring()
                log.warning("a detached fetch of %s tries again in %d s: %s", job.info_hash.hex()[:16], delay, exc.message)
            with trio.move_on_after(delay):
                await running.wake.wait()
            shared.waits_for = ""

    async def _request(self, job: Job) -> FetchRequest:
        node = self._node
        if all(entry.digest != job.statement for entry in node.library.about(job.info_hash)):
            raise NotFoundError(f"the release {job.info_hash.hex()[:16]} of a detached fetch is not here any more")
        if job.link is not None:
            target = Target(link=job.link)
        else:
            target = Target(statement=await trio.to_thread.run_sync(node.store.load_statement, job.statement))
        return FetchRequest(
            target,
            job.include,
            job.exclude,
            job.peers,
            float(job.timeout_s),
            allow_code=job.allow_code,
            seed=job.seed,
            max_up=job.max_up,
            max_down=job.max_down,
            peers_only=job.peers_only,
        )
