"""`adopt` with `offline`: what a folder holds comes in, what it lacks is named at once, and nobody is asked for it."""

from __future__ import annotations

import os
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from modelp2p.daemon.adopting import Candidate, Candidates
from modelp2p.daemon.control import Answer, Call
from modelp2p.daemon.service import Service
from modelp2p.protocol import layout
from modelp2p.protocol.errors import ModelP2PError, PartialError, UnknownPublisherError, UsageError
from modelp2p.protocol.statement import encode_bundle, verify_statement
from tests.endtoend.site import MIB, Kept, flip_byte, snapshot, weights
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


async def import_(
    world: World,
    folder: Path,
    *,
    on_demand: bool = False,
    is_awaited: bool = False,
    emit: Callable[[Map], None] = lambda event: None,
    **args: Value,
) -> Map:
    """The result of one import, or its error; `is_awaited`: a detached fetch waits for peers that have it."""
    failure: ModelP2PError | None = None
    answer = Answer({})
    bundle = os.memfd_create("bundle")
    os.write(bundle, encode_bundle(STATEMENT))
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    async with trio.open_nursery() as nursery:
        service = Service(world.node, nursery, on_demand=on_demand, stop=lambda: None)

        async def send(event: Map) -> None:
            raise AssertionError(event)

        if is_awaited:
            detached: Map = {"ref": "", "bundle": True, "detach": True, "timeout_s": 3600}
            await service.handle(Call("fetch", detached, (bundle,), emit, send=send))
            # By then it holds the lock of the release.
            while not world.node.of(RELEASE.info_hash).lock.locked():  # noqa: ASYNC110  # a job has nobody to tell
                await trio.sleep(0.01)
        asked: Map = {"ref": "", "bundle": True, "offline": True, **args}
        try:
            answer = await service.handle(Call("adopt", asked, (bundle, opened), emit, send=send))
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


def snapshot_but(folder: Path, name: str) -> dict[str, Kept | None]:
    """Of the others: this one is too long to be read."""
    (hidden := folder.parent / "hidden").mkdir(exist_ok=True)
    (folder / name).rename(hidden / name)
    try:
        return snapshot(folder)
    finally:
        (hidden / name).rename(folder / name)


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


async def test_a_detached_fetch_that_waits_for_peers_is_not_waited_for(world: World, folder: Path) -> None:
    with trio.fail_after(60):
        result = await import_(world, folder, is_awaited=True)
    assert result["state"] == "complete"
    assert tree_of(world) == FILES


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


async def test_of_a_file_that_is_too_long_no_more_is_read_than_was_signed(world: World, folder: Path) -> None:
    os.truncate(folder / "b.safetensors", 1 << 40)
    before, limits = snapshot_but(folder, "b.safetensors"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * MIB, limits[1]))
    try:
        result = await import_(world, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (result["state"], result["adopted"]) == ("complete", RELEASE.manifest.total_bytes)
    assert tree_of(world) == FILES
    assert snapshot_but(folder, "b.safetensors") == before
    assert (folder / "b.safetensors").stat().st_size == 1 << 40


async def test_a_file_that_cannot_be_opened_does_not_keep_the_others_out(
    world: World, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def swap(event: Map) -> None:
        if event.get("phase") == "checking" and not (folder / "b.safetensors").is_symlink():
            (folder / "b.safetensors").rename(folder.parent / "elsewhere")
            (folder / "b.safetensors").symlink_to(folder.parent / "elsewhere")

    with pytest.raises(PartialError, match=r"1 of 4 files .*: b\.safetensors$"):
        await import_(world, folder, emit=swap)
    assert tree_of(world) == {path: data for path, data in FILES.items() if path != "b.safetensors"}
    assert "b.safetensors is not taken in: cannot open 'b.safetensors'" in caplog.text


@pytest.fixture
def deep(folder: Path) -> Iterator[Path]:
    """A folder in a folder, and so on, far beyond what a path may hold."""
    above = os.open(folder, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("x", dir_fd=above)
        below = os.open("x", os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    os.close(above)
    yield folder
    # What tidies up after tests would follow them to the end, too.
    while (inner := folder / "x" / "x").exists():
        inner.rename(folder.parent / "x")
        inner.parent.rmdir()
        (folder.parent / "x").rename(inner.parent)


async def test_folders_without_end_are_not_followed_to_it(world: World, deep: Path) -> None:
    assert (await import_(world, deep))["state"] == "complete"


ENTRY = RELEASE.manifest.file("b.safetensors")
SHA256 = ENTRY.sha256.hex()
LIKELIEST: dict[str, tuple[list[tuple[str, int]], str | None]] = {
    "its path": ([("x/b.safetensors", MIB), ("b.safetensors", 3), (SHA256, MIB)], "b.safetensors"),
    "its name elsewhere": ([("other", MIB), ("x/b.safetensors", 5)], "x/b.safetensors"),
    "of one name the nearest size": ([("x/b.safetensors", 5), ("y/b.safetensors", MIB - 1)], "y/b.safetensors"),
    "a blob of the Hugging Face cache": ([("other", MIB), (f"blobs/{SHA256}", 7)], f"blobs/{SHA256}"),
    "an interrupted download": ([("other", MIB), (f"blobs/{SHA256}.0a1b.incomplete", 7)], f"blobs/{SHA256}.0a1b.incomplete"),
    "the whole one before it": ([("b.safetensors.part", MIB), ("x/b.safetensors", 7)], "x/b.safetensors"),
    "its size": ([("small", 7), ("x/other", MIB)], "x/other"),
    "nothing like it": ([("small", 7), ("b.safetensors.txt", 8)], None),
}


@pytest.mark.parametrize("case", LIKELIEST)
def test_the_likeliest_file_is(case: str) -> None:
    found, expected = LIKELIEST[case]
    likeliest = Candidates(Candidate(path, size) for path, size in found).likeliest(ENTRY)
    assert (likeliest.path if likeliest else None) == expected


def test_the_files_of_a_release_are_not_compared_with_each_file_of_the_folder() -> None:
    looked_at = 0

    class Counted(Candidate):
        __slots__ = ()

        @property
        def name(self) -> str:
            nonlocal looked_at
            looked_at += 1
            return super().name

    candidates = Candidates(Counted(f"{n}.json", n) for n in range(100))
    once = looked_at
    assert candidates.likeliest(ENTRY) is None
    assert looked_at == once


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
