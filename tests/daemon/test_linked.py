"""Files of the store that a cache of their owner's has a name for, too: their record, and what happens when a journal is lost."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from modelp2p.daemon.fetch import fetch
from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.daemon.requests import FetchRequest, Target
from modelp2p.protocol import layout
from tests.endtoend.site import MIB, flip_byte, weights
from tests.memory_node import World, world_of
from tests.releases import statement_of

pytestmark = pytest.mark.slow

PATH = "a.safetensors"
FILES = {PATH: weights("a", 2 * MIB + 8), "b/c.json": b"{}"}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with world_of(tmp_path, statement_of(FILES), FILES) as made:
        yield made


def recorded(world: World) -> dict[str, bool]:
    """Whether loaders may rely on the record of each file."""
    record = world.node.store.load_record(world.release.info_hash)
    assert record is not None
    return {path: known.matches((world.tree / path).stat()) for path, known in record.files.items()}


def note(world: World) -> int:
    folder = ReleaseFolder.open(world.node.store, world.release)
    try:
        return folder.note_links()
    finally:
        folder.close()


async def test_the_record_holds_again_after_a_link_was_made(world: World, tmp_path: Path) -> None:
    assert note(world) == 0
    (tmp_path / "blob").hardlink_to(world.tree / PATH)
    assert recorded(world) == {PATH: False, "b/c.json": True}
    assert note(world) == 1
    assert recorded(world) == dict.fromkeys(FILES, True)
    assert note(world) == 0


def _write(path: Path) -> None:
    flip_byte(path, MIB)
    os.utime(path, ns=(1, 1))


def _replace(path: Path) -> None:
    path.unlink()
    path.write_bytes(FILES[PATH])
    path.chmod(0o444)


CHANGES: dict[str, Callable[[Path], None]] = {
    "written to": _write,
    "made writable": lambda path: path.chmod(0o644),
    "replaced": _replace,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_file_that_changed_is_not_recorded_anew(world: World, change: Callable[[Path], None]) -> None:
    change(world.tree / PATH)
    assert note(world) == 0
    assert recorded(world)[PATH] is False


async def test_a_lost_journal_costs_neither_a_byte_nor_the_file_of_the_cache(world: World, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.hardlink_to(world.tree / PATH)
    await world.node.unseed(world.release.info_hash)
    world.node.store.path(layout.journal_of(world.release.info_hash)).unlink()
    result = await fetch(world.node, FetchRequest(Target(link=world.release.link())), lambda event: None)
    assert (result["state"], result["from_peers"]) == ("complete", 0)
    assert (world.tree / PATH).read_bytes() == blob.read_bytes() == FILES[PATH]
    assert blob.stat().st_ino != (world.tree / PATH).stat().st_ino
    assert blob.stat().st_nlink == 1
