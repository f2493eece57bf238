"""Pins: what is pinned stays, through `rm`, `gc`, a restart and damage, whichever statement it is named by."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from modelp2p.daemon.cleaning import collect_garbage, remove_release
from modelp2p.daemon.control import Answer, Call
from modelp2p.daemon.gate import PublicGate
from modelp2p.daemon.library import Library
from modelp2p.daemon.pins import MAGIC, Pins
from modelp2p.daemon.service import Service
from modelp2p.protocol import codec, layout
from modelp2p.protocol.errors import DeniedError, ModelP2PError, NotFoundError, StoreError
from modelp2p.protocol.job import Job
from modelp2p.protocol.statement import verify_statement
from tests.endtoend.site import weights
from tests.memory_node import World, world_of
from tests.releases import statement_of

if TYPE_CHECKING:
    from modelp2p.daemon.store import Store
    from modelp2p.protocol.codec import Map

pytestmark = pytest.mark.slow

FILES = {"a.safetensors": weights("a", 1000), "c.json": b"{}"}
REF = "lab/model"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with world_of(tmp_path, statement_of(FILES), FILES) as made:
        yield made


async def ask(world: World, verb: str, **args: str) -> Map:
    """The result of one verb, or its error."""
    failure: ModelP2PError | None = None
    answer = Answer({})
    async with trio.open_nursery() as nursery:
        service = Service(world.node, nursery, on_demand=False, stop=lambda: None)

        async def send(event: Map) -> None:
            raise AssertionError(event)

        try:
            answer = await service.handle(Call(verb, dict(args), (), lambda event: None, send=send))
        except ModelP2PError as exc:  # which the nursery would wrap
            failure = exc
        for fd in answer.fds:
            os.close(fd)
        service.close()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return answer.result


def check_here(world: World) -> None:
    assert {path: (world.tree / path).read_bytes() for path in FILES} == FILES
    assert world.journal().complete


async def test_what_is_pinned_is_not_removed_until_it_is_unpinned(world: World) -> None:
    pinned = await ask(world, "pin", ref=REF)
    assert (pinned["pinned"], pinned["changed"]) == (True, True)
    assert (await ask(world, "pin", ref=REF))["changed"] is False
    with pytest.raises(DeniedError, match="pinned") as caught:
        await ask(world, "rm", ref=REF)
    assert "modelp2p unpin lab/model@" in caught.value.hint
    check_here(world)
    assert world.node.of(world.release.info_hash).is_seeding
    unpinned = await ask(world, "unpin", ref=REF)
    assert (unpinned["pinned"], unpinned["changed"]) == (False, True)
    assert (await ask(world, "unpin", ref=REF))["changed"] is False
    await ask(world, "rm", ref=REF)
    assert not world.tree.exists()
    with pytest.raises(NotFoundError):
        await ask(world, "pin", ref=REF)


async def test_a_detached_fetch_of_it_goes_on_where_rm_is_refused(world: World) -> None:
    """`rm` ends jobs before it removes: it must be refused before that."""
    job = Job(world.release.info_hash, world.release.digest)
    world.node.store.save_job(job)
    await ask(world, "pin", ref=REF)
    with pytest.raises(DeniedError):
        await ask(world, "rm", ref=REF)
    assert list(world.node.store.jobs()) == [job]


async def test_every_statement_of_the_content_is_pinned(world: World) -> None:
    other = statement_of(FILES, name="lab/twin", sequence=7)
    world.node.library.add(other, verify_statement(other))
    await ask(world, "pin", ref="lab/twin")
    rows = {row["name"]: row["pinned"] for row in (await ask(world, "ls"))["releases"]}  # type: ignore[index,call-overload,union-attr]  # a list of maps
    assert rows == {"lab/model": True, "lab/twin": True}
    assert (await ask(world, "show", ref=REF))["pinned"] is True
    assert (await ask(world, "status"))["releases"][0]["pinned"] is True  # type: ignore[index,call-overload]  # a list of maps
    for ref in (REF, "lab/twin"):
        with pytest.raises(DeniedError):
            await ask(world, "rm", ref=ref)
    await ask(world, "unpin", ref=REF)
    assert (await ask(world, "show", ref="lab/twin"))["pinned"] is False


async def test_gc_leaves_what_is_pinned_also_where_its_statement_is_damaged(world: World) -> None:
    await ask(world, "pin", ref=REF)
    statement = world.node.store.path(layout.statement_of(world.entry.digest)) / "manifest"
    statement.chmod(0o644)
    statement.write_bytes(b"rotten")
    await world.node.unseed(world.release.info_hash)
    world.node.library = Library(world.node.store)
    world.node.library.load()
    assert world.node.library.damaged == 1
    hexed = world.release.info_hash.hex()
    assert (await ask(world, "pins"))["pins"] == [{"info_hash": hexed}]
    assert (await collect_garbage(world.node, dry_run=False))["removed"] == []
    check_here(world)
    # A link still says which content is meant; a name does not, nor does the link of something that is not pinned.
    link = str(world.release.link())
    for ref in (REF, link.replace(hexed, "0" * 64)):
        with pytest.raises(NotFoundError):
            await ask(world, "unpin", ref=ref)
    assert await ask(world, "unpin", ref=link) == {"info_hash": hexed, "pinned": False, "changed": True}
    held = [path.stat() for path in world.tree.rglob("*") if path.is_file()]
    assert {status.st_nlink for status in held} == {2}
    collected = await collect_garbage(world.node, dry_run=False)
    assert set(collected["removed"]) == {f"data/{hexed}", f"store/{hexed}", f"journal/{hexed}"}  # type: ignore[arg-type]  # a list of text
    record_bytes = 4096
    assert 0 <= collected["freed"] - sum(status.st_blocks * 512 for status in held) <= record_bytes  # type: ignore[operator]  # a number


async def test_gc_keeps_the_statement_of_what_is_pinned_and_not_fetched(world: World) -> None:
    other = statement_of({"b.json": b"[]"}, name="lab/other")
    entry = world.node.library.add(other, verify_statement(other))
    await ask(world, "pin", ref="lab/other")
    assert (await collect_garbage(world.node, dry_run=False))["removed"] == []
    await ask(world, "unpin", ref="lab/other")
    assert (await collect_garbage(world.node, dry_run=False))["removed"] == [layout.statement_of(entry.digest)]


async def test_a_pin_outlives_the_daemon_whatever_its_bytes_became(world: World) -> None:
    await ask(world, "pin", ref=REF)
    store, info_hash = world.node.store, world.release.info_hash
    path = store.path(layout.pin_of(info_hash))
    assert path.read_bytes() == MAGIC + codec.pack({"v": 1, "info_hash": info_hash})
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    path.write_bytes(b"rotten")
    (path.parent / f".{path.name}.0a1b2c3d.tmp").write_bytes(b"")
    (path.parent / "notes").write_bytes(b"")
    assert list(Pins(store)) == [info_hash]
    assert info_hash in Pins(store)
    assert b"x" * 32 not in Pins(store)


async def test_what_is_being_removed_cannot_be_pinned(world: World) -> None:
    entry, pins = world.entry, world.node.pins
    with pins.leaving(entry), pytest.raises(NotFoundError, match="being removed"):
        await pins.add(entry)
    assert entry.info_hash not in pins
    assert await pins.add(entry)
    with pytest.raises(DeniedError), pins.leaving(entry):
        raise AssertionError("it is pinned")


async def test_one_that_waits_to_remove_hears_of_a_pin_that_came_first(world: World) -> None:
    shared, entry = world.node.of(world.release.info_hash), world.entry
    with pytest.RaisesGroup(DeniedError):
        async with trio.open_nursery() as nursery:
            await shared.lock.acquire()
            nursery.start_soon(remove_release, world.node, entry)
            await trio.testing.wait_all_tasks_blocked()
            await world.node.pins.add(entry)
            shared.lock.release()
    check_here(world)


async def test_a_pin_that_cannot_be_written_does_not_hold(world: World) -> None:
    folder = world.node.store.path(layout.PINS)
    folder.rename(folder.with_name("aside"))
    with pytest.raises((StoreError, NotFoundError)):
        await world.node.pins.add(world.entry)
    assert world.entry.info_hash not in world.node.pins


class SlowPins(Pins):
    """Pins on a disk that writes when it is told to."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def _write(self, info_hash: bytes) -> None:
        self.begun.set()
        self.goes_on.wait()
        super()._write(info_hash)


async def test_two_that_pin_and_unpin_at_once_are_told_what_is_on_the_disk(world: World) -> None:
    entry, pins, said = world.entry, SlowPins(world.node.store), []
    path = world.node.store.path(layout.pin_of(entry.info_hash))

    async def pin_again() -> None:
        said.append((await pins.add(entry), path.exists()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pins.add, entry)
        await trio.to_thread.run_sync(pins.begun.wait)
        nursery.start_soon(pin_again)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(pins.remove, entry.info_hash)
        await trio.testing.wait_all_tasks_blocked(0.05)
        pins.goes_on.set()
    assert said == [(False, True)], "a client heard of a pin that was not on the disk"
    assert (entry.info_hash in pins, path.exists()) == (False, False)


def test_pins_are_for_the_owner_alone() -> None:
    for verb in ("pin", "unpin", "pins"):
        with pytest.raises(DeniedError):
            PublicGate(990, "modelp2p", 300.0).check_request(verb, {"ref": REF})
