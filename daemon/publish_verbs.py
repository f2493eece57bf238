"""`publish` and `publish_commit`: the two control verbs around the client's signature (see `publishing`)."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import trio

from modelp2p.daemon.beneath import make_dirs_beneath, remove_tree_beneath
from modelp2p.daemon.control import Answer, Call
from modelp2p.daemon.diskerror import on_disk
from modelp2p.daemon.fetch import verify
from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.daemon.node import Node, pieces_of
from modelp2p.daemon.publishing import Prepared, prepare
from modelp2p.daemon.requests import flag, text, texts
from modelp2p.daemon.sealed import read_sealed, sealed
from modelp2p.protocol import codec, layout
from modelp2p.protocol.envelope import MAX_ENVELOPE_BYTES
from modelp2p.protocol.errors import CorruptError, FormatError, ModelP2PError, RollbackError, UntrustedError, UsageError
from modelp2p.protocol.hfcache import MAX_TREE_BYTES, decode_listing
from modelp2p.protocol.journal import Selection
from modelp2p.protocol.layers import encode_layers
from modelp2p.protocol.manifest import MAX_LIST, MAX_UINT, FileEntry, Lineage, Manifest, Origin, check_stated, encode_manifest
from modelp2p.protocol.names import ModelName, PublisherId, Revision, check_publisher_id, check_revision
from modelp2p.protocol.publisher import MAX_CHAIN_BYTES
from modelp2p.protocol.statement import Release, Statement
from modelp2p.protocol.trust import TrustEntry, check_no_rival

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

_SESSION_KEY = "publish"


@dataclass(slots=True)
class _Pending:
    """What `publish` left for `publish_commit` on the same connection."""

    token: str
    prepared: Prepared
    started: float


@dataclass(frozen=True, slots=True)
class _Statement:
    """The parts of a manifest that the publisher states rather than the files."""

    name: ModelName
    created: int
    sequence: int
    publisher: PublisherId
    license: str
    license_file: str | None
    lineage: tuple[Lineage, ...]
    origin: Origin | None
    web_seeds: tuple[str, ...]
    trackers: tuple[str, ...]
    notes: tuple[tuple[str, str], ...]

    @classmethod
    def decode(cls, args: Map) -> _Statement:
        try:
            notes = cast("Map", codec.take(args, "notes", dict)) if args.get("notes") else {}
            origin = cast("Map", codec.take(args, "origin", dict)) if args.get("origin") else None
            rows = codec.take_list(args, "lineage", dict, maximum=MAX_LIST) if args.get("lineage") else []
            stated = cls(
                ModelName.parse(text(args, "name")),
                codec.take_uint(args, "created", maximum=MAX_UINT),
                codec.take_uint(args, "sequence", maximum=MAX_UINT),
                check_publisher_id(text(args, "publisher")),
                text(args, "license", ""),
                text(args, "license_file", "") or None if args.get("license_file") is not None else None,
                tuple(_lineage(cast("Map", row)) for row in rows),
                Origin(text(origin, "repo"), check_revision(text(origin, "commit"))) if origin else None,
                texts(args, "web_seeds", MAX_LIST),
                texts(args, "trackers", MAX_LIST),
                tuple((key, text(notes, key)) for key in sorted(notes)),
            )
            check_stated(stated.license, stated.lineage, stated.web_seeds, stated.trackers, stated.notes)
            return stated
        except FormatError as exc:
            raise UsageError(exc.message, hint=exc.hint) from exc

    def manifest(self, files: tuple[FileEntry, ...], piece_length: int, info_hash: bytes, revision: str) -> Manifest:
        return Manifest(
            name=self.name,
            revision=Revision(revision),
            created=self.created,
            sequence=self.sequence,
            info_hash=info_hash,
            piece_length=piece_length,
            files=files,
            license=self.license,
            license_file=self.license_file,
            lineage=self.lineage,
            origin=self.origin,
            web_seeds=self.web_seeds,
            trackers=self.trackers,
            notes=self.notes,
        )


async def publish(node: Node, call: Call) -> Answer:
    """Hash the folder in descriptor 0; answers the unsigned manifest, and an envelope that already states the same.

    Descriptor 1, where there is one, is the listing of the commit: exactly these files, with exactly these digests.

    Raises:
        UsageError: bad arguments or nothing to publish.
        RollbackError: this node knows a statement of this publisher with that sequence or a higher one.
    """
    if len(call.fds) not in (1, 2):
        raise UsageError("publish needs exactly one folder as a descriptor, and at most a listing beside it")
    stated = _Statement.decode(call.args)
    listing = decode_listing(read_sealed(call.fds[1], MAX_TREE_BYTES)) if len(call.fds) == 2 else ()
    abandon(node, call.session)
    started = trio.current_time()

    def progress(phase: str, done: int, total: int) -> None:
        call.emit({"phase": phase, "done": done, "total": total})

    prepared = await prepare(
        node.store,
        node.pool,
        call.fds[0],
        stated.manifest,
        stated.origin,
        texts(call.args, "include", 1000),
        texts(call.args, "exclude", 1000),
        progress,
        listing,
    )
    token = secrets.token_hex(8)
    call.session[_SESSION_KEY] = _Pending(token, prepared, started)
    same = await trio.to_thread.run_sync(_same_statement, node, prepared.manifest, stated.publisher)
    known = node.library.highest_sequence(stated.publisher, stated.name)
    if same is None and stated.sequence <= known:
        abandon(node, call.session)
        raise RollbackError(
            f"sequence {stated.sequence} of {stated.name} is not above {known}, which this publisher already used",
            hint="The key was used elsewhere too: copy its newest 'sequences' file here, or give a higher --sequence.",
        )
    fds = (sealed("manifest", encode_manifest(prepared.manifest)),)
    skipped: list[Value] = list(prepared.skipped[:100])
    result: Map = {"token": token, "mode": prepared.way, "skipped": skipped}
    return Answer(result, fds if same is None else (*fds, sealed("envelope", same.envelope)))


async def publish_commit(node: Node, call: Call, *, on_demand: bool) -> Answer:
    """Accept the signed envelope (descriptor 0) and the publisher's root chain (descriptor 1); make the release visible.

    Raises:
        UntrustedError: the envelope does not verify, or states other files than were prepared.
    """
    pending = call.session.get(_SESSION_KEY)
    if not isinstance(pending, _Pending) or pending.token != text(call.args, "token") or len(call.fds) != 2:
        raise UsageError("publish_commit must follow publish on one connection, with envelope and publisher as descriptors")
    prepared = pending.prepared
    statement = Statement(
        read_sealed(call.fds[0], MAX_ENVELOPE_BYTES), encode_layers(prepared.layers), read_sealed(call.fds[1], MAX_CHAIN_BYTES)
    )
    release = await trio.to_thread.run_sync(verify, node, statement)
    if (release.info_hash, release.manifest.files) != (prepared.manifest.info_hash, prepared.manifest.files):
        raise UntrustedError("the envelope states other files than the ones that were read")
    check_no_rival(release, [(e.ref, e.publisher, e.info_hash) for e in node.library.entries()])
    shared = node.of(release.info_hash)
    async with shared.lock:
        call.emit({"phase": "linking"})
        await node.unseed(release.info_hash)
        await trio.to_thread.run_sync(node.library.add, statement, release)
        await trio.to_thread.run_sync(_move_in, node, release, prepared)
        named = _own_name(node, release)
        node.store.show_model(
            release.manifest.name, release.publisher_id, release.info_hash, release.manifest.revision, named=named
        )
        shared.error = ""
        folder = await trio.to_thread.run_sync(ReleaseFolder.open, node.store, release)
        node.note(folder)
        folder.close()
    abandon(node, call.session)
    seeding = flag(call.args, "seed", default=True) and not on_demand
    if seeding:
        await node.seed(release.info_hash)
    return Answer(
        {
            "link": str(release.link()),
            "name": str(release.manifest.name),
            "revision": release.manifest.revision,
            "info_hash": release.info_hash.hex(),
            "manifest": release.digest.hex(),
            "publisher": release.publisher_id,
            "files": len(release.manifest.files),
            "bytes": release.manifest.total_bytes,
            "milliseconds": int((trio.current_time() - pending.started) * 1000),
            "seeding": seeding,
            "path": str(
                node.store.model_path(release.manifest.name, release.publisher_id, release.manifest.revision, named=named)
            ),
        }
    )


def abandon(node: Node, session: dict[str, object]) -> None:
    """Forget what a `publish` left that was never committed."""
    pending = session.pop(_SESSION_KEY, None)
    if isinstance(pending, _Pending):
        remove_tree_beneath(node.store.fd, pending.prepared.staging)


def _same_statement(node: Node, manifest: Manifest, publisher: PublisherId) -> Statement | None:
    """A kept statement of this publisher that differs only in sequence and time."""
    for entry in node.library.about(manifest.info_hash):
        if (entry.publisher, entry.name) != (publisher, manifest.name):
            continue
        kept = node.library.release(entry.digest).manifest
        if replace(kept, sequence=manifest.sequence, created=manifest.created) == manifest:
            return node.store.load_statement(entry.digest)
    return None


def _move_in(node: Node, release: Release, prepared: Prepared) -> None:
    """Put the prepared files in the engine's folder, where the release does not hold its own already."""
    folder = ReleaseFolder.open(node.store, release)
    try:
        for path in folder.changed_files():
            folder.disown(path)
        for path in release.pieces.paths:
            if path in folder.state.files:
                continue
            target = f"{layout.data_of(release.info_hash)}/{path}"
            if "/" in target:
                make_dirs_beneath(node.store.fd, target.rsplit("/", 1)[0], mode=0o700)
            with on_disk(f"cannot take in '{path}'"):
                os.rename(node.store.path(f"{prepared.staging}/{path}"), node.store.path(target))
            pieces = pieces_of(release, (path,))
            if pieces:
                folder.sync_proven(pieces)
            folder.finish(path, borrowed=path in prepared.borrowed, replace=True)
            if not prepared.stamps[path].matches_stamp(folder.state.files[path].stamp):
                # A borrowed file may be written to at any time, also between hashing and signing.
                folder.disown(path)
                raise CorruptError(
                    f"'{path}' changed after it was hashed", hint="Publish again when nothing writes to it.", path=path
                )
        folder.select(Selection((), (), tuple(entry.path for entry in release.manifest.files)))
        folder.complete()
    finally:
        folder.close()


def _own_name(node: Node, release: Release) -> bool:
    """Give the publisher the name on this node, unless the user gave it to somebody else."""
    try:
        book = node.book.added(TrustEntry(str(release.manifest.name), release.publisher_id))
    except ModelP2PError:
        return False
    if book != node.book:
        node.store.save_book(book)
        node.book = book
    return True


def _lineage(row: Map) -> Lineage:
    return Lineage(
        text(row, "relation"), text(row, "name"), check_revision(text(row, "revision")), bytes.fromhex(text(row, "info_hash"))
    )
