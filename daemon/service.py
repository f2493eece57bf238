"""The verbs of the control socket: arguments in, results out. What they do lives in the modules they call."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon import publish_verbs, trust_verbs
from modelp2p.daemon.adopting import Source
from modelp2p.daemon.checking import MAX_ONLY, verify_release
from modelp2p.daemon.cleaning import collect_garbage, remove_release
from modelp2p.daemon.client import build
from modelp2p.daemon.config import config_to_toml
from modelp2p.daemon.control import Answer, Call
from modelp2p.daemon.describing import live, shown_path, summary
from modelp2p.daemon.fetch import fetch, plan, resolve, wanted_of
from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.daemon.following import Streams
from modelp2p.daemon.gateway import Gateway
from modelp2p.daemon.importing import consented, import_folder
from modelp2p.daemon.jobs import Jobs, job_of
from modelp2p.daemon.public_http import PublicHttp
from modelp2p.daemon.requests import FetchRequest, Target, flag, peers, rate, text, texts, timeout_s
from modelp2p.daemon.sealed import SealedCache, read_sealed, sealed
from modelp2p.protocol.errors import ModelP2PError, NotFoundError, UsageError
from modelp2p.protocol.manifest import encode_manifest
from modelp2p.protocol.names import check_publisher_id
from modelp2p.protocol.statement import MAX_BUNDLE_BYTES, decode_bundle, encode_bundle

if TYPE_CHECKING:
    from modelp2p.daemon.library import Entry
    from modelp2p.daemon.node import Node
    from modelp2p.protocol.codec import Map, Value

log = logging.getLogger(__name__)

_ADOPT_ARGUMENTS = frozenset({"file_name", "offline", "publisher"})
"""What `adopt` takes beside what `fetch` does."""


class Service:
    """Dispatches calls to verbs.

    Resources: the memory files it sends; `close` gives them back.
    """

    def __init__(self, node: Node, nursery: trio.Nursery, *, on_demand: bool, stop: Callable[[], None]) -> None:
        self._node = node
        self._on_demand = on_demand
        self._stop = stop
        self._started = trio.current_time()
        self._jobs = Jobs(node, nursery, lambda: self.on_idle())
        self._sealed = SealedCache()
        self._streams = Streams(node, nursery, self._sealed)
        self.endpoint = ""
        """Of the gateway; empty where this daemon has none."""
        self.public_http = PublicHttp(node)
        self.public_addresses: tuple[str, ...] = ()
        """Where `public_http` is served; empty where it is not."""
        self.on_idle: Callable[[], None] = lambda: None
        """Called when the last job without a client has ended."""
        self._verbs: dict[str, Callable[[Call], Awaitable[Answer]]] = {
            "adopt": self._adopt,
            "config": self._config,
            "fetch": self._fetch,
            "gateway": self._gateway,
            "gc": self._gc,
            "limits": self._limits,
            "linked": self._linked,
            "ls": self._ls,
            "pin": self._pin,
            "pins": self._pins,
            "publish": lambda call: publish_verbs.publish(self._node, call),
            "publish_commit": lambda call: publish_verbs.publish_commit(self._node, call, on_demand=self._on_demand),
            "resolve": self._resolve,
            "rm": self._rm,
            "seed": self._seed,
            "show": self._show,
            "status": self._status,
            "stop": self._stop_verb,
            "stream_file": self._streams.file,
            "stream_follow": self._streams.follow,
            "stream_open": self._streams.open,
            "stream_want": self._streams.want,
            "trust_add": lambda call: trust_verbs.add(self._node, self._target(call), call),
            "trust_list": lambda call: trust_verbs.list_entries(self._node),
            "trust_remove": lambda call: trust_verbs.remove(self._node, call),
            "unpin": self._unpin,
            "verify": self._verify,
        }

    @property
    def is_busy(self) -> bool:
        """Whether jobs without a client are running."""
        return self._jobs.running > 0

    def gateway(self, token: str) -> Gateway:
        """The HTTP door to what the verbs work on."""
        return Gateway(self._node, self._streams, self._jobs, token)

    def close(self) -> None:
        """No call comes any more."""
        self._sealed.close()
        self.public_http.close()

    def take_up_jobs(self) -> None:
        """Go on with the detached fetches that an earlier daemon accepted."""
        self._jobs.take_up()

    def forget(self, session: dict[str, object]) -> None:
        """A connection has ended; this is the state it had."""
        publish_verbs.abandon(self._node, session)
        self._streams.end(session)

    async def handle(self, call: Call) -> Answer:
        """Serve one call.

        Raises:
            ModelP2PError: what the client will hear.
        """
        verb = self._verbs.get(call.verb)
        if verb is None:
            raise UsageError(
                f"the daemon does not know the verb '{call.verb[:60]}'", hint="Client and daemon may differ in version."
            )
        return await verb(call)

    async def _fetch(self, call: Call) -> Answer:
        request = FetchRequest.decode(call.args, self._target(call), self._node.config.fetch.timeout_s)
        request = replace(request, is_strangers=call.is_strangers)
        if request.dry_run:
            told, files = await plan(self._node, request, call.emit)
            return Answer(told, (sealed("plan", files),))
        if not request.detach:
            return Answer(await fetch(self._node, self._own(request), call.emit))
        # Everything that can be refused is refused while somebody listens.
        resolved = await resolve(self._node, request.target, request, call.emit)
        release = resolved.release
        await wanted_of(self._node, release, request)
        await self._jobs.accept(job_of(resolved, request, self._node.config.fetch.timeout_s))
        path = self._node.store.model_path(
            release.manifest.name, release.publisher_id, release.manifest.revision, named=resolved.is_named
        )
        return Answer(
            {
                "path": str(path),
                "name": str(release.manifest.name),
                "revision": release.manifest.revision,
                "info_hash": release.info_hash.hex(),
                "publisher": release.publisher_id,
                "name_verified": resolved.is_named,
                "state": "queued",
                "bytes": release.manifest.total_bytes,
                "from_peers": 0,
                "from_web": 0,
                "reused": 0,
                "milliseconds": 0,
            }
        )

    def _own(self, request: FetchRequest) -> FetchRequest:
        """A daemon that leaves with its client need not start serving what was just fetched."""
        if not self._on_demand:
            return request
        return replace(request, seed=False)

    async def _adopt(self, call: Call) -> Answer:
        if not call.fds:
            raise UsageError("adopt needs the folder or file as a descriptor")
        target = self._target(call)
        args = {key: value for key, value in call.args.items() if key not in _ADOPT_ARGUMENTS}
        if publisher := text(call.args, "publisher", ""):
            target = await consented(self._node, target, check_publisher_id(publisher))
        request = FetchRequest.decode(args, target, self._node.config.fetch.timeout_s)
        source = Source(call.fds[-1], text(call.args, "file_name", ""))
        take = import_folder if flag(call.args, "offline") else fetch
        with self._without_jobs(target):
            return Answer(await take(self._node, self._own(request), call.emit, source))

    def _without_jobs(self, target: Target) -> AbstractContextManager[None]:
        try:
            return self._jobs.set_aside(self._entry_of(target).info_hash)
        except ModelP2PError:
            return nullcontext()  # not known yet, so nothing works on it

    async def _verify(self, call: Call) -> Answer:
        return Answer(
            await verify_release(
                self._node,
                self._entry(call),
                call.emit,
                repair=flag(call.args, "repair"),
                peers=peers(call.args),
                timeout_s=timeout_s(call.args, self._node.config.fetch.timeout_s),
                only=texts(call.args, "only", MAX_ONLY),
            )
        )

    async def _rm(self, call: Call) -> Answer:
        entry = self._entry(call)
        self._node.pins.check_free(entry)
        await self._jobs.cancel(entry.info_hash)
        return Answer(await remove_release(self._node, entry))

    async def _pin(self, call: Call) -> Answer:
        entry = self._entry(call)
        is_new = await self._node.pins.add(entry)
        return Answer(summary(self._node, entry) | {"changed": is_new})

    async def _unpin(self, call: Call) -> Answer:
        target = self._target(call)
        try:
            entry = self._entry_of(target)
        except NotFoundError:
            # Where its statement was damaged, a link still says which content is meant.
            if target.link is None or not await self._node.pins.remove(target.link.info_hash):
                raise
            return Answer({"info_hash": target.link.info_hash.hex(), "pinned": False, "changed": True})
        was_pinned = await self._node.pins.remove(entry.info_hash)
        return Answer(summary(self._node, entry) | {"changed": was_pinned})

    async def _pins(self, call: Call) -> Answer:
        rows: list[Value] = []
        for info_hash in self._node.pins:
            known = self._node.library.about(info_hash)
            rows.append(summary(self._node, known[0]) if known else {"info_hash": info_hash.hex()})
        return Answer({"pins": rows})

    async def _gateway(self, call: Call) -> Answer:
        if not self.endpoint:
            raise NotFoundError(
                "this daemon has no gateway",
                hint="Set enabled = true below [gateway], and run 'modelp2p daemon': one that a command started has none.",
            )
        return Answer({"endpoint": self.endpoint, "unknown": self._node.config.gateway.unknown})

    async def _gc(self, call: Call) -> Answer:
        return Answer(await collect_garbage(self._node, dry_run=flag(call.args, "dry_run")))

    async def _seed(self, call: Call) -> Answer:
        refs = texts(call.args, "refs", 1000)
        entries = [self._entry_of(Target.of(ref)) for ref in refs] if refs else list(self._node.library.entries())
        extra = peers(call.args)
        served: list[Value] = []
        for info_hash in dict.fromkeys(entry.info_hash for entry in entries):
            shared = self._node.of(info_hash)
            shared.peers = tuple(dict.fromkeys((*shared.peers, *extra)))
            shared.max_up = rate(call.args, "max_up") or shared.max_up
            if shared.lock.locked():
                # Its journal, route and torrent belong to the job under way; a fetch seeds when it is done.
                continue
            await self._node.seed(info_hash)
            if shared.is_seeding:
                # A torrent that was in the swarm before is left as it is by `seed`: tell it what is new.
                await self._node.swarm.set_limits(info_hash, shared.max_up, shared.max_down)
                await self._node.swarm.connect(info_hash, self._node.wire_peers(extra))
                served.append(self._node.library.about(info_hash)[0].ref)
        listening = await self._node.swarm.wait_listening()
        return Answer({"releases": served, "listen_port": listening.port})

    async def _limits(self, call: Call) -> Answer:
        up, down = rate(call.args, "max_up"), rate(call.args, "max_down")
        if call.args.get("ref"):
            shared = self._node.of(self._entry(call).info_hash)
            shared.max_up, shared.max_down = up, down
            await self._node.swarm.set_limits(shared.info_hash, up, down)
        else:
            await self._node.swarm.set_limits(None, up, down)
        return Answer({})

    async def _linked(self, call: Call) -> Answer:
        entry = self._entry(call)
        shared, library, store = self._node.of(entry.info_hash), self._node.library, self._node.store
        if shared.lock.locked():
            # Its journal belongs to the job under way; that loaders hash these files once more harms nobody.
            return Answer({"files": 0})
        async with shared.lock:
            release = await trio.to_thread.run_sync(library.release, entry.digest)
            folder = await trio.to_thread.run_sync(ReleaseFolder.open, store, release)
            try:
                return Answer({"files": await trio.to_thread.run_sync(folder.note_links)})
            finally:
                folder.close()

    async def _resolve(self, call: Call) -> Answer:
        target = self._target(call)
        entry = self._node.library.by_name(target.name, self._node.book) if target.name else self._entry_of(target)
        return Answer(summary(self._node, entry) | {"path": shown_path(self._node, entry)})

    async def _ls(self, call: Call) -> Answer:
        rows: list[Value] = [
            summary(self._node, entry) | {"path": shown_path(self._node, entry), "files": entry.files, "created": entry.created}
            for entry in self._node.library.entries()
        ]
        return Answer({"releases": rows})

    async def _status(self, call: Call) -> Answer:
        node, engine = self._node, self._node.swarm.statistics()
        contents = dict.fromkeys(entry.info_hash for entry in node.library.entries())
        releases: list[Value] = [live(node, node.library.about(info_hash)[0]) for info_hash in contents]
        publishers: list[Value] = list(sorted({entry.publisher for entry in node.library.entries()}))
        return Answer(
            {
                "node": {
                    "pid": os.getpid(),
                    "build": build(),
                    "listen_port": engine.listen_port,
                    "listen_addresses": list(node.listening.addresses) if node.listening else [],
                    "dht_nodes": node.dht_nodes,
                    "profile": node.config.network.profile,
                    "publisher_ids": publishers,
                    "uptime_s": int(trio.current_time() - self._started),
                    "home": str(node.store.home),
                    "engine_pid": engine.engine_pid,
                    "engine_restarts": engine.restarts,
                    "landlock": engine.landlock,
                    "on_demand": self._on_demand,
                    "bytes_hashed": node.pool.statistics().bytes_read,
                    "damaged_statements": node.library.damaged,
                    "public_http": list(self.public_addresses),
                },
                "releases": releases,
            }
        )

    async def _show(self, call: Call) -> Answer:
        entry = self._entry(call)
        release = await trio.to_thread.run_sync(self._node.library.release, entry.digest)
        result: Map = summary(self._node, entry) | {
            "manifest_hash": release.manifest_hash.hex(),
            "path": shown_path(self._node, entry),
            "statements": len(self._node.library.about(entry.info_hash)),
        }
        # What was signed travels as it was signed: 10,000 files do not fit a frame.
        fds = [self._sealed.get(entry.digest, "unsigned manifest", partial(encode_manifest, release.manifest))]
        if flag(call.args, "bundle_out"):
            fds.append(sealed("bundle", encode_bundle(self._node.store.load_statement(entry.digest))))
        return Answer(result, tuple(fds))

    async def _config(self, call: Call) -> Answer:
        return Answer({"text": config_to_toml(self._node.config)})

    async def _stop_verb(self, call: Call) -> Answer:
        self._stop()
        return Answer({})

    def _target(self, call: Call) -> Target:
        if flag(call.args, "bundle"):
            if not call.fds:
                raise UsageError("a bundle has to be sent as a file descriptor")
            return Target(statement=decode_bundle(read_sealed(call.fds[0], MAX_BUNDLE_BYTES)))
        return Target.of(text(call.args, "ref"))

    def _entry(self, call: Call) -> Entry:
        return self._entry_of(self._target(call))

    def _entry_of(self, target: Target) -> Entry:
        return entry_of(self._node, target)


def entry_of(node: Node, target: Target) -> Entry:
    """The kept statement a target names; nothing is fetched.

    Raises:
        NotFoundError: it is not here.
    """
    if target.name is not None:
        return node.library.any_by_name(target.name, node.book)
    if target.link is not None:
        entry = node.library.by_link(target.link)
    else:
        assert target.statement is not None
        digest = target.statement.digest
        entry = next((e for e in node.library.entries() if e.digest == digest), None)
    if entry is None:
        raise NotFoundError("this release is not known here", hint="Fetch it first.")
    return entry
