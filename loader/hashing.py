"""Work over pieces on all cores: the threads of a load.

They read, copy, and wait for the processes that hash with them (`hashers`); hashing itself hardly adds up in threads, since each
needs the interpreter's lock between two leaves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait

RUN_BYTES = 8 << 20
"""About what one task hashes: a few milliseconds, so that the slowest thread at the end costs no more than that."""


class Workers:
    """A fixed number of threads, started when first needed. Close it."""

    def __init__(self, count: int | None = None, on_abandon: Callable[[], None] | None = None) -> None:
        self.count = count or len(os.sched_getaffinity(0))
        self._on_abandon = on_abandon
        """Ends whatever a task may be waiting for, when its job is abandoned."""
        self._pool: ThreadPoolExecutor | None = None

    def run(self, task: Callable[[range], None], runs: Iterable[range], on_done: Callable[[range], None]) -> None:
        """Call `task` for every run, in any order and thread; `on_done` afterwards here, in order.

        When one fails, the rest is not started, the ones at work are waited for (they use the caller's buffers), and the
        error of the earliest failed run is raised.
        """
        self.start(task, runs).wait(on_done)

    def start(self, task: Callable[[range], None], runs: Iterable[range]) -> Job:
        """As `run`, to be waited for later; what was started before is done first."""
        if self.count == 1:
            return Job(task, runs, None, self._on_abandon)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="modelp2p-loader")
        return Job(task, runs, self._pool, self._on_abandon)

    def close(self) -> None:
        """End the threads. Idempotent."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


class Job:
    """Runs under way. Whoever started it either waits for its end or abandons it: its tasks use the caller's buffers."""

    def __init__(
        self,
        task: Callable[[range], None],
        runs: Iterable[range],
        pool: Executor | None,
        on_abandon: Callable[[], None] | None = None,
    ) -> None:
        self._task = task
        self._on_abandon = on_abandon
        # One worker is the caller itself, when it waits.
        self._left = [] if pool is not None else list(runs)
        self._futures: list[tuple[range, Future[None]]] = []
        if pool is not None:
            try:
                self._submit(pool, runs)
            except BaseException:
                # Nobody will get to know this job. What could be cancelled may be in no queue, where nothing ends it.
                self._futures = [(run, future) for run, future in self._futures if not future.cancel()]
                self.abandon()
                raise

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return not self._left and all(future.done() for _, future in self._futures)

    def wait(self, on_done: Callable[[range], None] | None = None) -> None:
        """Return when all runs are done; `on_done` for each, in order. Raises the error of the earliest failed one."""
        left, self._left = self._left, []
        try:
            for run, future in self._futures:
                future.result()
                if on_done is not None:
                    on_done(run)
            # After what threads do, of which these are the rest.
            for run in left:
                self._task(run)
                if on_done is not None:
                    on_done(run)
        finally:
            # All are done already unless something failed, or the user pressed Ctrl-C.
            self.abandon()

    def abandon(self) -> None:
        """Start nothing more and return when nothing is at work. Idempotent; raises nothing."""
        self._left = []
        for _, future in self._futures:
            future.cancel()
        if self._on_abandon is not None and not all(future.done() for _, future in self._futures):
            self._on_abandon()
        wait([future for _, future in self._futures])

    def is_idle(self) -> bool:
        """Whether no task is at work, or will be unless `wait` is called."""
        return all(future.done() for _, future in self._futures)

    def finish(self) -> None:
        """Return when all runs have ended, well or not; `wait` says which."""
        wait([future for _, future in self._futures])

    def _submit(self, pool: Executor, runs: Iterable[range]) -> None:
        for run in runs:
            if self._left:
                self._left.append(run)
                continue
            # Not the pool's own future, which is lost where `submit` queues the work and then fails to start a thread for it.
            future: Future[None] = Future()
            self._futures.append((run, future))
            try:
                pool.submit(_perform, future, self._task, run)
            except RuntimeError:
                # "can't start new thread": the caller does this one, unless an older thread has begun it, and the rest.
                if future.cancel():
                    self._futures.pop()
                    self._left.append(run)


def _perform(future: Future[None], task: Callable[[range], None], run: range) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        task(run)
    except BaseException as exc:
        future.set_exception(exc)
        # The error holds this frame, which shall not hold the error.
        del future
    else:
        future.set_result(None)


def pieces_per_run(piece_length: int) -> int:
    """How many consecutive pieces one task takes."""
    return max(1, RUN_BYTES // piece_length)
