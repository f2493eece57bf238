"""Detached fetches on the disk, which failures are worth another try, and jobs that have nothing to work on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from modelp2p.daemon.config import Config
from modelp2p.daemon.fetch import Resolved
from modelp2p.daemon.hashing import HashPool
from modelp2p.daemon.jobs import LAST_RETRY_S, Jobs, job_of, retry_after_s
from modelp2p.daemon.library import Library
from modelp2p.daemon.memory_swarm import MemoryNetwork
from modelp2p.daemon.node import Node, Shared
from modelp2p.daemon.requests import FetchRequest, Target
from modelp2p.daemon.store import Store
from modelp2p.protocol import layout
from modelp2p.protocol.errors import (
    CorruptError,
    DeniedError,
    EquivocationError,
    ModelP2PError,
    NoSpaceError,
    NotFoundError,
    PolicyError,
    StoreError,
    TimedOutError,
    UnavailableError,
    UnknownPublisherError,
    UntrustedError,
    UsageError,
)
from modelp2p.protocol.job import MAX_JOB_BYTES, Job, decode_job, encode_job
from modelp2p.protocol.statement import verify_statement
from tests.releases import statement_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JOB = Job(bytes(range(32)), b"s" * 32)
FULL_DISK = Config().replace({"store.reserve": 10**15})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "home")
    yield opened
    opened.close()


def node_of(store: Store) -> Node:
    return Node(store, Library(store), MemoryNetwork().join(), HashPool(workers=1), Config(), [])


def test_a_job_is_kept_once_and_for_its_owner_alone(store: Store) -> None:
    folder = store.home / layout.JOBS
    assert folder.stat().st_mode & 0o777 == 0o700
    for job in (JOB, JOB, replace(JOB, include=("*.json",))):
        store.save_job(job)
    assert {path.name for path in folder.iterdir()} == {job.id.hex() for job in store.jobs()}
    assert len(list(store.jobs())) == 2
    path = store.path(layout.job_of(JOB.id))
    assert path.stat().st_mode & 0o777 == 0o600
    assert decode_job(path.read_bytes()) == JOB
    assert store.remove_job(JOB.id)
    assert not store.remove_job(JOB.id)
    assert [job.include for job in store.jobs()] == [("*.json",)]


DAMAGE = {
    "empty": b"",
    "torn": encode_job(JOB)[:-1],
    "of a newer version": encode_job(JOB).replace(b"\xa1v\x01", b"\xa1v\x02"),
    "rotted": encode_job(JOB).replace(b"s" * 32, b"t" * 32),
    "too large": bytes(MAX_JOB_BYTES + 1),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_job_that_cannot_be_used_costs_only_itself(what: str, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    good = replace(JOB, seed=False)
    store.save_job(good)
    path = store.path(layout.job_of(JOB.id))
    path.write_bytes(DAMAGE[what])
    (path.parent / ".leftover.tmp").write_bytes(b"")
    assert list(store.jobs()) == [good]
    assert str(path) in caplog.text
    assert path.read_bytes() == DAMAGE[what], "it is left for whoever can read it"


RETRIES: dict[str, tuple[ModelP2PError, int, float | None]] = {
    "no space": (NoSpaceError("full"), 0, 30.0),
    "no space for long": (NoSpaceError("full"), 10**6, 30.0),
    "nobody delivered": (TimedOutError("silence"), 0, 30.0),
    "again": (TimedOutError("silence"), 1, 60.0),
    "no network": (UnavailableError("down"), 3, 240.0),
    "for days": (UnavailableError("down"), 10**6, LAST_RETRY_S),
    "not trusted": (UntrustedError("no"), 0, None),
    "trust taken away": (UnknownPublisherError("who"), 0, None),
    "two statements": (EquivocationError("two"), 0, None),
    "a manifest that contradicts itself": (CorruptError("bad"), 0, None),
    "code": (PolicyError("code"), 0, None),
    "no file matches": (UsageError("none"), 0, None),
    "removed": (NotFoundError("gone"), 0, None),
    "a broken disk": (StoreError("EIO"), 0, 30.0),
}


@pytest.mark.parametrize("name", RETRIES)
def test_only_what_may_pass_is_tried_again(name: str) -> None:
    error, failures, expected = RETRIES[name]
    assert retry_after_s(error, failures) == expected


def test_a_job_holds_the_whole_request() -> None:
    release = verify_statement(statement_of({"a": b"a"}))
    link = replace(release.link(), trackers=("udp://tracker.example:1",), web_seeds=("https://example.org/",))
    request = FetchRequest(
        Target(link=link), ("a*",), ("b*",), timeout_s=0.5, allow_code=True, seed=False, detach=True, max_up=1, max_down=2,
        peers_only=True,
    )  # fmt: skip
    job = job_of(Resolved(release, is_named=False, link=link), request, 300.0)
    assert (job.info_hash, job.statement) == (release.info_hash, release.digest)
    assert job.link == replace(link, trackers=(), web_seeds=())
    assert (job.include, job.exclude, job.timeout_s) == (("a*",), ("b*",), 1)
    assert (job.allow_code, job.seed, job.max_up, job.max_down, job.peers_only) == (True, False, 1, 2, True)
    assert decode_job(encode_job(job)) == job
    by_name = job_of(Resolved(release, is_named=True), replace(request, timeout_s=None), 300.0)
    assert (by_name.link, by_name.timeout_s) == (None, 300)


STATES = {
    "accepted": (Shared(b"", jobs=1), "queued", ""),
    "waits": (Shared(b"", jobs=1, waits_for="no space"), "paused", "no space"),
    "waits, with some files served": (Shared(b"", jobs=1, waits_for="why", is_partial=True, is_seeding=True), "paused", "why"),
    "whole meanwhile": (Shared(b"", jobs=1, waits_for="why", is_complete=True), "complete", ""),
    "ended by an error": (Shared(b"", error="why"), "error", "why"),
    "no job": (Shared(b""), "paused", ""),
}


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_a_release_with_a_job(name: str) -> None:
    shared, state, trouble = STATES[name]
    assert (shared.state, shared.trouble) == (state, trouble)


async def test_a_job_whose_release_is_gone_is_forgotten(store: Store) -> None:
    done = trio.Event()
    store.save_job(JOB)
    async with trio.open_nursery() as nursery:
        jobs = Jobs(node_of(store), nursery, done.set)
        jobs.take_up()
        jobs.take_up()
        assert jobs.running == 1
        await done.wait()
        assert jobs.running == 0
    assert not list(store.jobs())


def waiting(node: Node) -> tuple[Job, Job]:
    """Two jobs on one release whose lock the caller holds: they stay until they are stopped."""
    statement = statement_of({"a": b"a", "b": b"b"})
    release = verify_statement(statement)
    node.library.add(statement, release)
    node.of(release.info_hash).lock.acquire_nowait()
    job = Job(release.info_hash, release.digest, release.link())
    return job, replace(job, include=("a",))


async def test_a_stop_keeps_jobs_and_rm_forgets_them(store: Store) -> None:
    node = node_of(store)
    first, second = waiting(node)
    ids = {first.id, second.id}
    async with trio.open_nursery() as nursery:
        jobs = Jobs(node, nursery, lambda: None)
        for job in (first, second, first):
            await jobs.accept(job)
        await trio.testing.wait_all_tasks_blocked()
        assert jobs.running == node.of(first.info_hash).jobs == 2
        nursery.cancel_scope.cancel()
    assert {job.id for job in store.jobs()} == ids
    assert node.of(first.info_hash).jobs == 0
    store.save_job(JOB)
    async with trio.open_nursery() as nursery:
        jobs = Jobs(node, nursery, lambda: None)
        await jobs.accept(first)
        # The second is only on the disk: it goes as well, and what belongs to others stays.
        await jobs.cancel(first.info_hash)
        assert jobs.running == node.of(first.info_hash).jobs == 0
    assert [job.id for job in store.jobs()] == [JOB.id]


async def test_there_is_a_most_of_jobs(store: Store) -> None:
    node = node_of(store)
    first, second = waiting(node)
    async with trio.open_nursery() as nursery:
        jobs = Jobs(node, nursery, lambda: None, max_jobs=1)
        await jobs.accept(first)
        await jobs.accept(first)
        with pytest.raises(DeniedError):
            await jobs.accept(second)
        nursery.cancel_scope.cancel()
    assert [job.id for job in store.jobs()] == [first.id]


async def test_a_job_that_waits_says_why_and_is_tried_when_asked_for_again(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(store, Library(store), MemoryNetwork().join(), HashPool(workers=1), FULL_DISK, [])
    job, _ = waiting(node)
    shared = node.of(job.info_hash)
    shared.lock.release()

    async def wait_tries(count: int) -> None:
        # Far less than the 30 s after which it is tried by itself.
        with trio.fail_after(10):
            while caplog.text.count("tries again") < count:  # noqa: ASYNC110  # a job has nobody to tell
                await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        jobs = Jobs(node, nursery, lambda: None)
        await jobs.accept(job)
        await wait_tries(1)
        assert shared.state == "paused"
        assert shared.trouble.startswith("no space: ")
        await jobs.accept(job)
        await wait_tries(2)
        assert len(list(store.jobs())) == jobs.running == 1
        await jobs.cancel(job.info_hash)
    assert (shared.state, shared.trouble) == ("paused", "")


async def test_a_job_stands_aside_and_goes_on_afterwards(store: Store) -> None:
    node = node_of(store)
    first, second = waiting(node)
    lock = node.of(first.info_hash).lock

    async def wait_attempts(count: int) -> None:
        """Until that many wait for the lock that we hold."""
        with trio.fail_after(10):
            while lock.statistics().tasks_waiting != count:  # noqa: ASYNC110  # a job has nobody to tell
                await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        jobs = Jobs(node, nursery, lambda: None)
        await jobs.accept(first)
        await wait_attempts(1)
        with jobs.set_aside(bytes(32)):
            await wait_attempts(1)
        with jobs.set_aside(first.info_hash):
            await wait_attempts(0)
            # Asking for it again does not end that. One that is accepted meanwhile waits like anybody.
            await jobs.accept(first)
            await jobs.accept(second)
            await wait_attempts(1)
            with jobs.set_aside(first.info_hash):
                await wait_attempts(0)
            await wait_attempts(1)
        await wait_attempts(2)
        assert jobs.running == 2
        nursery.cancel_scope.cancel()
    assert {job.id for job in store.jobs()} == {first.id, second.id}
