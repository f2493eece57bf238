"""`fetch` and `adopt`: from a reference to proven files under a visible path.

    resolve  ->  verify  ->  (dry run ends)  ->  share, adopt  ->  reserve  ->  transfer  ->  link

Invariants:
- the manifest is verified and admitted before the payload torrent exists, so before one payload byte is asked for;
- space for the whole selection is checked, and reserved, before the first byte;
- cancelled at any point, everything proven stays journaled and the next fetch goes on from there.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import partial
from glob import escape
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.adopting import Source, adopt_files, prove_left_over
from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.daemon.manifest_swarm import fetch_statement
from modelp2p.daemon.space import free_bytes
from modelp2p.daemon.transfer import Transfer
from modelp2p.daemon.watching import turn
from modelp2p.daemon.web_seeding import web_seeding_of
from modelp2p.protocol import codec, layout
from modelp2p.protocol import engine_wire as wire
from modelp2p.protocol.errors import ModelP2PError, NotFoundError, PolicyError, TimedOutError, UsageError
from modelp2p.protocol.journal import Selection
from modelp2p.protocol.kinds import kind_of
from modelp2p.protocol.publisher import decode_chain
from modelp2p.protocol.selection import wanted_paths
from modelp2p.protocol.statement import Release, Statement, verify_statement
from modelp2p.protocol.trust import admit, check_no_rival

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from modelp2p.daemon.library import Entry
    from modelp2p.daemon.node import Node, Shared
    from modelp2p.daemon.requests import Emit, FetchRequest, Target
    from modelp2p.protocol.codec import Map, Value
    from modelp2p.protocol.links import Link
    from modelp2p.protocol.names import PublisherId

log = logging.getLogger(__name__)

EVENT_S = 0.2
"""Least time between two progress events."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A verified, admitted release; `is_named` where its publisher is trusted for its name."""

    release: Release
    is_named: bool
    link: Link | None = None


async def resolve(node: Node, target: Target, request: FetchRequest, emit: Emit) -> Resolved:
    """The release a target means, from the library, a bundle or the manifest swarm; verified, admitted and kept.

    Raises:
        ModelP2PError: not found, not verified, not trusted, or not delivered.
    """
    emit({"phase": "resolving"})
    if target.name is not None:
        entry = node.library.by_name(target.name, node.book)
        return Resolved(await trio.to_thread.run_sync(node.library.release, entry.digest), is_named=True)
    async with stated(node, target, request) as statement:
        emit({"phase": "verifying"})
        release = await trio.to_thread.run_sync(verify, node, statement)
        named = admit(release, node.book, target.link)
        check_no_rival(release, _refs(node))
        if not request.dry_run:
            await trio.to_thread.run_sync(node.library.add, statement, release)
    return Resolved(release, named, target.link)


@contextlib.asynccontextmanager
async def stated(node: Node, target: Target, request: FetchRequest) -> AsyncIterator[Statement]:
    """The statement a link or bundle means, not verified yet.

    Of several commands on one new link one asks the swarm at a time, until the end of the block: the next finds the answer in the
    library, and nobody serves the manifest swarm while another still fetches from it.
    """
    if target.statement is not None:
        yield target.statement
        return
    assert target.link is not None
    known = node.library.by_link(target.link)
    if known is None:
        async with node.resolving.setdefault(target.link.manifest_hash, trio.Lock()):
            known = node.library.by_link(target.link)
            if known is None:
                yield await _from_swarm(node, target.link, request)
                return
    yield await trio.to_thread.run_sync(node.store.load_statement, known.digest)


def verify(node: Node, statement: Statement) -> Release:
    """Verify a statement with the newest root chain of its publisher: the one it carries, or the one this node has."""
    return verify_statement(statement, node.store.load_chain(decode_chain(statement.publisher).publisher_id))


async def _from_swarm(node: Node, link: Link, request: FetchRequest) -> Statement:
    send, receive = trio.open_memory_channel[wire.Event](256)

    async def route(event: wire.Event) -> None:
        # Never waits: the one task that routes for all must not hang on a reader that has gone.
        with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
            send.send_nowait(event)

    node.route(link.manifest_hash, route)
    try:
        return await fetch_statement(
            link,
            (*node.peers, *request.peers, *node.usable_peers(link.peers)),
            node.trackers_of(link.trackers),
            node.store,
            node.swarm,
            receive,
            request.timeout_s or node.config.fetch.timeout_s,
        )
    finally:
        node.unroute(link.manifest_hash)


def _refs(node: Node) -> list[tuple[str, PublisherId, bytes]]:
    return [(entry.ref, entry.publisher, entry.info_hash) for entry in node.library.entries()]


def select(release: Release, request: FetchRequest, *, allow_code: bool) -> tuple[str, ...]:
    """The paths a request selects, in manifest order.

    Raises:
        UsageError: none.
        PolicyError: some of them run code, and that was not allowed.
    """
    sizes = {entry.path: entry.size for entry in release.manifest.files}
    wanted = wanted_paths(sizes, request.include, request.exclude)
    if not wanted:
        raise UsageError(f"no file of {release.ref} matches", hint="'modelp2p show' lists its files.")
    code = [path for path in wanted if kind_of(path).executes_code or release.manifest.file(path).kind.executes_code]
    if code and not allow_code:
        raise PolicyError(
            f"{release.ref} holds {len(code)} file(s) that run code when they are opened, such as '{code[0]}'",
            hint="Leave them out with --exclude, or accept them with --allow-code.",
            path=code[0],
        )
    return wanted


def _allows_code(node: Node, request: FetchRequest) -> bool:
    return request.allow_code or node.config.policy.allow_code


async def wanted_of(node: Node, release: Release, request: FetchRequest) -> tuple[str, ...]:
    """`select` under this node's policy, in a thread: a thousand globs over ten thousand paths are seconds.

    Raises:
        UsageError, PolicyError: as `select`.
    """
    return await trio.to_thread.run_sync(partial(select, release, request, allow_code=_allows_code(node, request)))


async def fetch(
    node: Node, request: FetchRequest, emit: Emit, source: Source | None = None, *, only: tuple[str, ...] = ()
) -> Map:
    """Fetch a release; see the module. Returns the result of docs/DESIGN.md.

    Args:
        node: whose store it goes to.
        request: what is asked for.
        emit: told the progress.
        source: bytes to adopt.
        only: these files, whatever the request selects, as a repair needs; what the journal calls asked for stays that.

    Raises:
        ModelP2PError: with everything proven kept.
    Cancellation: the same.
    """
    started = trio.current_time()
    resolved = await resolve(node, request.target, request, emit)
    release = resolved.release
    wanted = only or await wanted_of(node, release, request)
    shared = node.of(release.info_hash)
    link_peers = node.usable_peers(resolved.link.peers) if resolved.link else ()
    shared.peers = tuple(dict.fromkeys((*shared.peers, *request.peers, *link_peers)))
    if shared.lock.locked():
        emit({"phase": "waiting", "note": "another command works on this release"})
    async with turn(shared):
        if not node.library.about(release.info_hash):
            raise NotFoundError(f"{release.ref} was removed while this command waited", hint="Run it again to fetch it anew.")
        was_seeding = shared.is_seeding
        folder = await trio.to_thread.run_sync(ReleaseFolder.open, node.store, release)
        # What the owner fetched without serving it is not for others to serve.
        seed = request.seed and (was_seeding or not (request.is_strangers and folder.state.files))
        try:
            work = _Work(node, shared, folder, request, wanted, _allows_code(node, request), emit, keeps_selection=bool(only))
            adopted = await work.run(source)
            path = node.store.show_model(
                release.manifest.name, release.publisher_id, release.info_hash, release.manifest.revision, named=resolved.is_named
            )
            node.note(folder)
        except ModelP2PError as exc:
            folder.close()
            if was_seeding:
                # What was served before is as good as it was.
                await node.seed_locked(release.info_hash)
                shared.error = exc.message
            raise
        except BaseException:
            # Cancelled, often in a group with others: nurseries below wrap what they raise.
            if was_seeding:
                node.seed_soon(shared)
            raise
        finally:
            folder.close()
        if seed:
            await node.seed_locked(release.info_hash)
    result: Map = {
        "path": str(path),
        "name": str(release.manifest.name),
        "revision": release.manifest.revision,
        "info_hash": release.info_hash.hex(),
        "publisher": release.publisher_id,
        "name_verified": resolved.is_named,
        "state": "complete" if shared.is_complete else "partial",
        "bytes": sum(release.manifest.file(path).size for path in wanted),
        "from_peers": work.from_peers,
        "from_web": work.from_web,
        "reused": work.reused,
        "milliseconds": int((trio.current_time() - started) * 1000),
    }
    return result | ({"adopted": adopted} if source is not None else {})


async def plan(node: Node, request: FetchRequest, emit: Emit) -> tuple[Map, bytes]:
    """What a fetch would do, and its files as a msgpack map of their own: 10,000 do not fit a control frame.

    Writes nothing, so a release that was never begun gets no folder.

    Raises:
        ModelP2PError: as the fetch would.
    """
    resolved = await resolve(node, request.target, request, emit)
    release = resolved.release
    wanted = await wanted_of(node, release, request)
    have = dict.fromkeys(wanted, 0)
    if node.store.path(layout.journal_of(release.info_hash)).exists():
        # Under the lock: a journal is opened by one task at a time.
        async with node.of(release.info_hash).lock:
            folder = await trio.to_thread.run_sync(ReleaseFolder.open, node.store, release)
            try:
                have = {path: folder.proven_bytes((path,)) for path in wanted}
            finally:
                folder.close()
    sizes = {path: release.manifest.file(path).size for path in wanted}
    files: list[Value] = [{"path": path, "size": sizes[path], "have": have[path]} for path in wanted]
    told: Map = {
        "name": str(release.manifest.name),
        "revision": release.manifest.revision,
        "info_hash": release.info_hash.hex(),
        "publisher": release.publisher_id,
        "name_verified": resolved.is_named,
        "bytes": sum(sizes.values()),
        "needed_bytes": sum(sizes.values()) - sum(have.values()),
        "free_bytes": free_bytes(node.store.fd),
    }
    return told, codec.pack({"files": files})


class _Work:
    """One run of one fetch."""

    def __init__(
        self,
        node: Node,
        shared: Shared,
        folder: ReleaseFolder,
        request: FetchRequest,
        wanted: tuple[str, ...],
        allow_code: bool,
        emit: Emit,
        *,
        keeps_selection: bool,
    ) -> None:
        self.node = node
        self.shared = shared
        self.folder = folder
        self.request = request
        self.wanted = wanted
        self.allow_code = allow_code
        self.emit = emit
        self.keeps_selection = keeps_selection
        self.from_peers = 0
        self.from_web = 0
        self.reused = 0
        self._told = 0.0

    async def run(self, source: Source | None) -> int:
        """Make every wanted file proven and visible. Returns bytes found good in `source`."""
        folder, store = self.folder, self.node.config.store
        await trio.to_thread.run_sync(self._drop_changed)
        before = set(folder.state.files)
        adopted = 0
        if any(path not in folder.state.files for path in self.wanted):
            # One for pieces, one for flat hashes; a fast network wakes more.
            self.node.pool.warm(2)
            await self.node.unseed(self.shared.info_hash, statements=False)
            await self._share()
            self.emit({"phase": "reserving"})
            await trio.to_thread.run_sync(folder.check_space, self.wanted, store.reserve if store.reservation else 0)
            if source is not None:
                adopted = await adopt_files(self.node.pool, folder, self.wanted, source, self.emit)
            await trio.to_thread.run_sync(self._stage)
            await prove_left_over(self.node.pool, folder, self.wanted, self.emit)
            self._select()
            self.shared.is_partial = False
            await self._transfer()
        else:
            self._select()
        if set(folder.state.files) != before or not folder.state.complete:
            self.emit({"phase": "linking"})
            await trio.to_thread.run_sync(self._finish)
        return adopted

    def _finish(self) -> None:
        """Journal that all is here, where it is: a repair may leave out what an interrupted fetch still misses."""
        known = self.folder.state.selection
        if self.keeps_selection and known is not None and not set(known.wanted) <= set(self.folder.state.files):
            self.folder.save_record()
        else:
            self.folder.complete()

    def _select(self) -> None:
        """Journal what is wanted; what others fetch is added to what the owner asked for, and does not replace it."""
        known, request = self.folder.state.selection, self.request
        if self.keeps_selection:
            return
        if known is None or not request.is_strangers:
            self.folder.select(Selection(request.include, request.exclude, self.wanted))
        elif not set(self.wanted) <= set(known.wanted):
            both = set(known.wanted) | set(self.wanted)
            paths = tuple(entry.path for entry in self.folder.release.manifest.files if entry.path in both)
            self.folder.select(Selection(tuple(map(escape, paths)), (), paths))

    async def _transfer(self) -> None:
        shared = self.shared
        # 0 is no wish: a limit that was set for this release stays.
        shared.max_up, shared.max_down = self.request.max_up or shared.max_up, self.request.max_down or shared.max_down
        shared.error = ""
        node, release = self.node, self.folder.release
        web = web_seeding_of(node.swarm, node.relay, release, node.config, peers_only=self.request.peers_only)
        transfer = Transfer(
            self.folder,
            self.node.swarm,
            self.node.pool,
            self.wanted,
            self.request.timeout_s,
            self.allow_code,
            lambda: self.node.spec_of(self.folder, self.wanted),
            self._progress,
            self.node.pool.worker_limit,
            web,
        )
        shared.transfer = transfer
        self.node.route(shared.info_hash, transfer.handle)
        try:
            await transfer.run()
        except ModelP2PError as exc:
            if isinstance(exc, TimedOutError) and (reason := web.reason):
                exc.hint = f"{exc.hint} Web seeds: {reason}."
            shared.error = exc.message
            log.warning("%s: %s", self.folder.release.ref, exc.message)
            raise
        finally:
            shared.transfer = None
            self.node.unroute(shared.info_hash)
            self.node.note(self.folder)
            traffic = transfer.traffic
            self.from_web, self.from_peers = web.from_web, web.from_peers
            log.info(
                "%s: %d bytes proven, %d from peers, %d from web seeds, %d wasted, %d looks too early",
                release.ref, transfer.proven_bytes, self.from_peers, self.from_web, traffic.wasted, transfer.reread,
            )  # fmt: skip

    def _progress(self) -> None:
        self.shared.watch.ring()
        transfer = self.shared.transfer
        now = trio.current_time()
        if transfer is None or now - self._told < EVENT_S:
            return
        self._told = now
        self.shared.proven = transfer.proven_bytes
        status = transfer.status
        total = sum(self.folder.release.pieces.size(path) for path in self.wanted)
        received = transfer.traffic.down > 0 and transfer.proven_bytes < total
        self.emit(
            {
                "phase": "fetching" if received or transfer.proven_bytes < total else "proving",
                "done": transfer.proven_bytes,
                "total": total,
                "rate_down": status.rate_down if status else 0,
                "rate_up": status.rate_up if status else 0,
                "peers": status.peers if status else 0,
                "web": transfer.web.from_web,
                "origin": transfer.web.reason,
            }
        )

    def _drop_changed(self) -> None:
        """Files that somebody changed since they were proven are fetched again, into new inodes."""
        changed = [path for path in self.folder.changed_files() if path in self.wanted]
        for path in changed:
            if not self.folder.mend(path):
                self.folder.disown(path)

    async def _share(self) -> None:
        """Take files that another release here holds whole: equal root, equal bytes."""
        missing = {
            self.folder.release.manifest.file(path).root: path
            for path in self.wanted
            if path not in self.folder.state.files and self.folder.release.manifest.file(path).size
        }
        for entry in self.node.library.entries():
            if not missing:
                return
            lock = self.node.of(entry.info_hash).lock
            if entry.info_hash == self.shared.info_hash or lock.locked():
                continue
            async with lock:  # its journal gets a line, and two writers on one journal are one too many
                await trio.to_thread.run_sync(self._share_from, entry, missing)

    def _share_from(self, entry: Entry, missing: dict[bytes, str]) -> None:
        record = self.node.store.load_record(entry.info_hash)
        if record is None or not any(item.root in missing for item in record.files.values()):
            return
        other = ReleaseFolder.open(self.node.store, self.node.library.release(entry.digest))
        try:
            self._share_whole_files(other, missing)
        finally:
            other.close()

    def _share_whole_files(self, other: ReleaseFolder, missing: dict[bytes, str]) -> None:
        changed = set(other.changed_files())
        for other_path in list(other.state.files):
            theirs = other.release.manifest.file(other_path)
            path = missing.get(theirs.root)
            if path is None or other_path in changed:
                continue
            ours = self.folder.release.manifest.file(path)
            if theirs.sha256 != ours.sha256:
                continue
            self.folder.share(path, other, other_path)
            self.reused += ours.size
            del missing[theirs.root]

    def _stage(self) -> None:
        store = self.node.config.store
        self.folder.stage(self.wanted, reserve=store.reservation, keep_free_bytes=store.reserve if store.reservation else 0)
