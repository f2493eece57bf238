"""`adopt` with `offline`: what a folder holds comes in, what it lacks is named at once, and nobody is asked for it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from modelp2p.daemon.control import Answer, Call
from modelp2p.daemon.service import Service
from modelp2p.protocol import layout
from modelp2p.protocol.errors import ModelP2PError, PartialError, UnknownPublisherError, UsageError
from modelp2p.protocol.statement import encode_bundle, verify_statement
from tests.endtoend.site import MIB, flip_byte, snapshot, weights
from tests.memory_node import World, world_of
from tests.releases import publisher, statement_of, write_files

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

pytestmark = pytest.mark.slow

HELD = {"a.safetensors": weights("held", 1000)}
FILES = {
    "a.safetensors": weights("a", 2 * MIB + 8),
    "b.safetensors": weights("b", MIB),
    "sub/c.json": b"{}",
    "empty.txt": b"",
}
STATEMENT = statement_of(FILES, name="lab/carried")
RELEASE = verify_statement(STATEMENT)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with world_of(tmp_path, statement_of(HELD), HELD) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "stick", FILES)


async def import_(world: World, folder: Path, *, on_demand: bool = False, **args: Value) -> Map:
    """The result of one import, or its error."""
    failure: ModelP2PError | None = None
    answer = Answer({})
    bundle = os.memfd_create("bundle")
    os.write(bundle, encode_bundle(STATEMENT))
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    async with trio.open_nursery() as nursery:
        service = Service(world.node, nursery, on_demand=on_demand, stop=lambda: None)

        async def send(event: Map) -> None:
            raise AssertionError(event)

        asked: Map = {"ref": "", "bundle": True, "offline": True, **args}
        try:
            answer = await service.handle(Call("adopt", asked, (bundle, opened), lambda event: None, send=send))
        except ModelP2PError as exc:  # which the nursery would wrap
            failure = exc
        os.close(bundle)
        os.close(opened)
        service.close()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return answer.result


def tree_of(world: World) -> dict[str, bytes]:
    root = world.node.store.path(layout.tree_of(RELEASE.info_hash, RELEASE.manifest.revision))
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


async def test_a_whole_folder_comes_in_without_a_torrent(world: World, folder: Path) -> None:
    before, added = snapshot(folder), len(world.swarm.added)
    result = await import_(world, folder, seed=False)
    assert (result["state"], result["from_peers"], result["adopted"]) == ("complete", 0, RELEASE.manifest.total_bytes)
    assert tree_of(world) == FILES
    assert snapshot(folder) == before
    assert len(world.swarm.added) == added, "somebody was asked"
    assert not world.node.of(RELEASE.info_hash).is_seeding


async def test_it_is_served_afterwards_by_a_daemon_that_stays(world: World, folder: Path) -> None:
    await import_(world, folder)
    assert world.node.of(RELEASE.info_hash).is_seeding
    await world.node.unseed(RELEASE.info_hash)
    await import_(world, folder, on_demand=True)
    assert not world.node.of(RELEASE.info_hash).is_seeding


def _flip(folder: Path) -> None:
    flip_byte(folder / "a.safetensors", MIB + 5)


def _lose(folder: Path) -> None:
    (folder / "a.safetensors").unlink()


def _cut(folder: Path) -> None:
    os.truncate(folder / "a.safetensors", MIB)


def _link(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    (folder / "a.safetensors").rename(elsewhere)
    (folder / "a.safetensors").symlink_to(elsewhere)


def _fifo(folder: Path) -> None:
    _lose(folder)
    os.mkfifo(folder / "a.safetensors")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "one flipped byte": _flip,
    "a missing file": _lose,
    "half a file": _cut,
    "a link to the right file": _link,
    "a FIFO": _fifo,
}


@pytest.mark.parametrize("what", DAMAGE)
async def test_what_is_bad_is_named_at_once_and_the_rest_is_kept(world: World, folder: Path, what: str) -> None:
    DAMAGE[what](folder)
    started, added = trio.current_time(), len(world.swarm.added)
    with pytest.raises(PartialError, match=r"1 of 4 files .*: a\.safetensors$") as caught:
        await import_(world, folder)
    assert trio.current_time() - started < 30, "it waited for peers"
    assert len(world.swarm.added) == added, "somebody was asked"
    assert (caught.value.facts["path"], caught.value.facts["files"]) == ("a.safetensors", 1)
    shared = world.node.of(RELEASE.info_hash)
    assert (shared.state, shared.error) == ("error", caught.value.message)
    assert tree_of(world) == {path: data for path, data in FILES.items() if path != "a.safetensors"}
    # The good bytes are not needed again: a folder with the one file brings it to the end.
    rest = write_files(folder.parent / "rest", {"a.safetensors": FILES["a.safetensors"]})
    assert (await import_(world, rest))["state"] == "complete"
    assert tree_of(world) == FILES
    assert world.node.of(RELEASE.info_hash).state == "seeding"


async def test_nothing_at_all(world: World, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PartialError, match=r"3 of 4 files"):
        await import_(world, tmp_path / "empty")
    assert tree_of(world) == {"empty.txt": b""}


async def test_a_selection_is_partial_and_no_failure(world: World, folder: Path) -> None:
    _lose(folder)
    (folder / "stranger.bin").write_bytes(b"x" * 100)
    result = await import_(world, folder, exclude=["a.safetensors"])
    assert result["state"] == "partial"
    assert tree_of(world).keys() == FILES.keys() - {"a.safetensors"}


async def test_the_publisher_needs_trust_or_a_word_for_this_import(world: World, folder: Path) -> None:
    world.node.book = world.node.book.removed(publisher().id, None)
    with pytest.raises(UnknownPublisherError):
        await import_(world, folder)
    with pytest.raises(UnknownPublisherError, match="not by"):
        await import_(world, folder, publisher=publisher("other").id)
    assert not world.node.library.about(RELEASE.info_hash)
    result = await import_(world, folder, publisher=publisher().id)
    assert (result["state"], result["name_verified"]) == ("complete", False)
    assert "by-publisher" in str(result["path"])
    assert not world.node.book.is_trusted(publisher().id, RELEASE.manifest.name), "a word for one import became trust"


async def test_only_a_bundle_says_what_is_imported(world: World, folder: Path) -> None:
    with pytest.raises(UsageError, match="bundle"):
        await import_(world, folder, ref="lab/model", bundle=False)
    with pytest.raises(UsageError, match="bundle"):
        await import_(world, folder, ref="lab/model", bundle=False, offline=False, publisher=publisher().id)
