"""`verify`: read every visible byte of a release again; `--repair`: fetch exactly the pieces that are bad.

A damaged file is not repaired in place: its good pieces are copied into a new inode, the bad ones fetched, and the name is
moved over by rename, so a reader of the old inode keeps what it had and a borrowed inode stays untouched. Only where the disk has
no room for that copy is the file itself, out of sight by then, what the bad pieces are later written to.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.adopting import prove_staged, take_in
from modelp2p.daemon.beneath import open_beneath
from modelp2p.daemon.comparing import compare_pieces
from modelp2p.daemon.fetch import fetch
from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.daemon.node import Node, pieces_of
from modelp2p.daemon.requests import Emit, FetchRequest, Target
from modelp2p.protocol import layout
from modelp2p.protocol.errors import NotFoundError, StoreError

if TYPE_CHECKING:
    from modelp2p.daemon.library import Entry
    from modelp2p.daemon.node import Shared
    from modelp2p.protocol.codec import Map, Value
    from modelp2p.protocol.links import PeerAddress
    from modelp2p.protocol.statement import Release

log = logging.getLogger(__name__)

Bad = tuple[str, int]
"""Path and piece number within the file; -1 where the whole file is gone or has another length."""
MAX_ONLY = 800
"""Files one request may name; with paths of 1,024 bytes they still fit one control frame."""
MAX_BAD_TOLD = 800
"""Entries of an answer: with paths of 1,024 bytes they still fit one control frame."""


async def verify_release(
    node: Node,
    entry: Entry,
    emit: Emit,
    *,
    repair: bool,
    peers: tuple[PeerAddress, ...],
    timeout_s: float,
    only: tuple[str, ...] = (),
) -> Map:
    """Hash the finished files of a release, or `only` these, against its signed layers.

    Several at once on one release take turns. Where files were served before, what is good of them still is afterwards.

    Raises:
        NotFoundError: nothing of it is here, or `only` names what the release has not or nobody asked for.
        ModelP2PError: the repair could not be finished; what is proven is kept.
    Cancellation: the same.
    """
    shared = node.of(entry.info_hash)
    release = await trio.to_thread.run_sync(node.library.release, entry.digest)
    for path in only:
        if path not in release.manifest:
            raise NotFoundError(f"{entry.ref} has no file '{path[:200]}'", path=path[:200])
    if shared.lock.locked():
        emit({"phase": "waiting", "note": "another command works on this release"})
    async with shared.lock:
        was_seeding = shared.is_seeding
        try:
            paths, bad = await _look(node, shared, release, emit, only)
            if was_seeding and not shared.is_seeding:
                # One bad piece must not cost others the whole release, whether it can be repaired or not.
                trouble = shared.error
                await node.seed_locked(entry.info_hash)
                shared.error = trouble
        except BaseException:
            # Cancelled, often in a group with others: nurseries below wrap what they raise.
            if was_seeding and not shared.is_seeding:
                node.seed_soon(shared)
            raise
    if repair and bad:
        request = FetchRequest(
            Target(link=release.link()),  # by name it would depend on who is trusted for the name by now
            peers=peers,
            timeout_s=timeout_s,
            allow_code=True,  # these files were accepted when they were fetched
        )
        await fetch(node, request, emit, only=tuple(dict.fromkeys(path for path, _ in bad)))
        shared.error = ""
    pieces: list[Value] = [{"path": path, "piece": piece} for path, piece in bad[:MAX_BAD_TOLD]]
    return {
        "name": str(entry.name),
        "revision": entry.revision,
        "ok": repair or not bad,
        "bad": pieces,
        "repaired": len(bad) if repair else 0,
        "bytes": sum(release.manifest.file(path).size for path in paths),
    }


async def _look(
    node: Node, shared: Shared, release: Release, emit: Emit, only: tuple[str, ...]
) -> tuple[tuple[str, ...], list[Bad]]:
    """The files that were read, and what is bad of them or missing; damaged ones are out of sight and not served any more."""
    folder = await trio.to_thread.run_sync(ReleaseFolder.open, node.store, release)
    try:
        paths, missing = _asked_for(folder, only)
        bad = await _find_bad(node, folder, paths, emit)
        if not bad and len(paths) == len(folder.state.files) > 0:
            # Only times differ (a copy restored by a backup): what was read just now is what is recorded.
            await trio.to_thread.run_sync(_restamp, folder)
            shared.error = ""
        damaged = tuple(dict.fromkeys(path for path, _ in bad))
        if damaged:
            await node.unseed(release.info_hash)
            shared.error = f"{len(bad)} bad piece(s) in {len(damaged)} file(s), '{damaged[0]}' first"
            await _set_aside(node, folder, damaged, emit)
    finally:
        folder.close()
    # What an earlier look set aside, or an interrupted fetch never brought, is not here either.
    return paths, bad + [(path, -1) for path in missing]


def _asked_for(folder: ReleaseFolder, only: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The finished files to look at, and those that were selected and are not here.

    Raises:
        NotFoundError: there are none, or one of `only` is neither.
    """
    here, selection, release = folder.state.files, folder.state.selection, folder.release
    missing = [path for path in (selection.wanted if selection else ()) if path not in here]
    hint = f"modelp2p fetch {release.manifest.name}"
    if not here and not missing:
        raise NotFoundError(f"no finished file of {release.ref} is here", hint=hint)
    if not only:
        return tuple(here), tuple(missing)
    for path in only:
        if path not in here and path not in missing:
            raise NotFoundError(f"'{path}' of {release.ref} was never fetched", hint=hint, path=path)
    chosen = frozenset(only)
    return tuple(path for path in here if path in chosen), tuple(path for path in missing if path in chosen)


async def _find_bad(node: Node, folder: ReleaseFolder, paths: tuple[str, ...], emit: Emit) -> list[Bad]:
    release = folder.release
    total = sum(release.manifest.file(path).size for path in paths)
    tree = layout.tree_of(release.info_hash, release.manifest.revision)
    bad: list[Bad] = []
    done = 0
    for path in paths:
        entry = release.manifest.file(path)
        try:
            fd = open_beneath(node.store.fd, f"{tree}/{path}", os.O_RDONLY)
        except NotFoundError:
            bad.append((path, -1))
            continue
        try:
            size = os.fstat(fd).st_size
            if size != entry.size:
                bad.append((path, -1))
            else:
                async for batch in compare_pieces(node.pool, release, path, fd):
                    bad += [(path, piece) for piece in batch.bad]
                    emit({"phase": "checking", "done": done + batch.end, "total": total})
        finally:
            os.close(fd)
        done += entry.size
    return bad


async def _set_aside(node: Node, folder: ReleaseFolder, damaged: tuple[str, ...], emit: Emit) -> None:
    """Take damaged files out of sight, and put their good pieces into new inodes in the engine's folder."""
    for path in damaged:
        # One thread call for each file: a cancellation comes before or after it, never in between.
        if await trio.to_thread.run_sync(_replace_by_copy, node, folder, path):
            await prove_staged(node.pool, folder, path, emit, 0, folder.release.pieces.size(path))
    await trio.to_thread.run_sync(folder.save_record)


def _replace_by_copy(node: Node, folder: ReleaseFolder, path: str) -> bool:
    """Believe nothing about a file any more, and let a copy in a new inode take its place in the engine's folder.

    The old inode keeps a name until its copy is whole: on the last node that has it, one bad piece must not cost the others.
    """
    release = folder.release
    tree = f"{layout.tree_of(release.info_hash, release.manifest.revision)}/{path}"
    fd = _open_first(node, [f"{layout.data_of(release.info_hash)}/{path}", tree])
    is_borrowed = path in folder.state.files and folder.state.files[path].borrowed
    folder.lose(pieces_of(release, (path,)), (path,))
    if fd is None:
        folder.disown(path)
        return False
    try:
        take_in(folder, path, fd)
    except StoreError as exc:
        log.error("the good pieces of '%s' cannot be copied: %s", path, exc.message)
        if is_borrowed:
            # Never to be written to, not even if its owner has given up its other names.
            folder.disown(path)
        else:
            folder.hide(path)
        return False
    finally:
        os.close(fd)
    node.store.remove(tree)
    return True


def _open_first(node: Node, paths: list[str]) -> int | None:
    for path in paths:
        try:
            return open_beneath(node.store.fd, path, os.O_RDONLY)
        except NotFoundError:
            continue
    return None


def _restamp(folder: ReleaseFolder) -> None:
    folder.restamp()
    folder.save_record()
