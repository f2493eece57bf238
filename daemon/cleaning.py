"""`rm` and `gc`: what leaves the disk, and what nothing refers to any more."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.daemon.publishing import STAGING_PREFIX
from modelp2p.protocol import layout

if TYPE_CHECKING:
    from modelp2p.daemon.library import Entry
    from modelp2p.daemon.node import Node
    from modelp2p.protocol.codec import Map, Value


async def remove_release(node: Node, entry: Entry) -> Map:
    """Stop serving a content and delete its files, statements and visible paths.

    Files that another release shares, or that were borrowed from the user, lose only our names for them.

    Raises:
        DeniedError: it is pinned.
    """
    shared = node.of(entry.info_hash)
    async with shared.lock:
        with node.pins.leaving(entry):
            return await _remove_locked(node, entry)


async def _remove_locked(node: Node, entry: Entry) -> Map:
    await node.unseed(entry.info_hash)
    freed = await trio.to_thread.run_sync(_remove, node, entry)
    node.forget(entry.info_hash)
    return {"name": str(entry.name), "revision": entry.revision, "freed": freed}


async def collect_garbage(node: Node, *, dry_run: bool) -> Map:
    """Remove leftovers: abandoned staging folders, data without a statement, statements without data, dangling names."""
    removed, freed = await trio.to_thread.run_sync(_collect, node, dry_run)
    paths: list[Value] = list(removed)
    return {"removed": paths, "freed": freed, "dry_run": dry_run}


def remove_abandoned_publishes(node: Node) -> int:
    """At start, when no client can be publishing: staging folders a killed daemon left."""
    left = [name for name in node.store.names(layout.DATA) if name.startswith((STAGING_PREFIX, f".{STAGING_PREFIX}"))]
    for name in left:
        node.store.remove(f"{layout.DATA}/{name}")
    return len(left)


def _remove(node: Node, entry: Entry) -> int:
    store = node.store
    release = node.library.release(entry.digest)
    freed = ReleaseFolder.open(store, release).remove()
    for gone in node.library.remove(entry.info_hash):
        for named in (True, False):
            path = store.model_path(gone.name, gone.publisher, gone.revision, named=named)
            if path.is_symlink() and entry.info_hash.hex() in os.readlink(path):
                store.hide_model(path)
    return freed


def _collect(node: Node, dry_run: bool) -> tuple[list[str], int]:
    store = node.store
    known = {entry.info_hash.hex() for entry in node.library.entries()}
    # Also where its statement was damaged, and nothing but the pin speaks for it.
    known |= {info_hash.hex() for info_hash in node.pins}
    in_use = {shared.info_hash.hex() for shared in node.shared.values() if shared.lock.locked()}
    in_use |= {info_hash.hex() for info_hash in node.routed()}
    # A detached fetch that has not begun holds a statement and no journal.
    in_use |= {job.info_hash.hex() for job in store.jobs()}
    orphans = [f"{layout.DATA}/{name}" for name in store.names(layout.DATA) if _is_orphan(name, known | in_use)]
    orphans += [f"{layout.STORE}/{name}" for name in store.names(layout.STORE) if name not in known | in_use]
    orphans += [f"{layout.JOURNAL}/{name}" for name in store.names(layout.JOURNAL) if name not in known | in_use]
    freed = _bytes_of(node, orphans)
    unused = [
        entry for entry in node.library.entries()
        if not store.path(layout.journal_of(entry.info_hash)).exists()
        and entry.info_hash.hex() not in in_use
        and entry.info_hash not in node.pins
    ]  # fmt: skip
    if not dry_run:
        for path in orphans:
            store.remove(path)
        for entry in unused:
            node.library.remove(entry.info_hash)
    return [*orphans, *(layout.statement_of(entry.digest) for entry in unused)], freed


def _is_orphan(name: str, known: set[str]) -> bool:
    # Folders of manifest swarms being fetched count as known: they have a route, and their own task removes them.
    return name not in known and not name.startswith((STAGING_PREFIX, f".{STAGING_PREFIX}"))


def _bytes_of(node: Node, paths: list[str]) -> int:
    """What removing these frees: the files that have no other name. One that is finished has two here, by itself."""
    names: Counter[tuple[int, int, int, int]] = Counter()
    for path in paths:
        for folder, _, files in os.walk(node.store.path(path)):
            for name in files:
                try:
                    stat = os.lstat(os.path.join(folder, name))
                except OSError:
                    continue
                names[stat.st_dev, stat.st_ino, stat.st_nlink, stat.st_blocks] += 1
    return sum(blocks * 512 for (_, _, links, blocks), found in names.items() if found == links)
