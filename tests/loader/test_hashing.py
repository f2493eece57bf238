"""Threads of a load: every run is done once, also where the system gives no further thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from modelp2p.loader.hashing import Workers

RUNS = [range(at, at + 1) for at in range(8)]


@pytest.fixture
def no_more_threads() -> Iterator[None]:
    # A stack that no address space holds: the error of a limit on processes, which would concern the whole test run.
    before = threading.stack_size(1 << 47)
    yield
    threading.stack_size(before)


def test_without_any_thread_the_caller_does_all(no_more_threads: None) -> None:
    done: list[range] = []
    told: list[range] = []
    with closing(Workers(4)) as workers:
        workers.run(done.append, RUNS, told.append)
    assert done == told == RUNS


def test_without_a_further_thread_nothing_is_lost_and_nothing_done_twice(request: pytest.FixtureRequest) -> None:
    done: list[range] = []
    held = threading.Event()

    def wait_held(run: range) -> None:
        held.wait()

    with closing(Workers(2)) as workers:
        before = workers.start(wait_held, RUNS[:1])
        request.getfixturevalue("no_more_threads")
        job = workers.start(done.append, RUNS)
        assert not job.is_done()
        told: list[range] = []
        job.wait(told.append)
        assert done == told == RUNS
        held.set()
        before.wait()
        # The only thread has gone through the queue, where the first of them still was.
        workers.run(lambda _: None, RUNS[:1], lambda _: None)
    assert done == RUNS


def test_the_error_of_what_the_caller_does_comes_out_and_the_rest_is_not_done(no_more_threads: None) -> None:
    done: list[range] = []

    def task(run: range) -> None:
        if run == RUNS[2]:
            raise ValueError(run)
        done.append(run)

    with closing(Workers(2)) as workers, pytest.raises(ValueError, match="2"):
        workers.run(task, RUNS, lambda _: None)
    assert done == RUNS[:2]


def test_a_job_that_cannot_be_built_leaves_nothing_at_work() -> None:
    at_work, abandoned = threading.Event(), threading.Event()
    done: list[range] = []

    def task(run: range) -> None:
        at_work.set()
        abandoned.wait()
        done.append(run)

    def runs() -> Iterator[range]:
        yield RUNS[0]
        at_work.wait()
        raise KeyboardInterrupt

    with closing(Workers(2, on_abandon=abandoned.set)) as workers:
        try:
            with pytest.raises(KeyboardInterrupt):
                workers.start(task, runs())
            # The first was at work when the list ended, and was waited for.
            assert done == RUNS[:1]
        finally:
            abandoned.set()
