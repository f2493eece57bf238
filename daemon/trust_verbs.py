"""The control verbs of the trust book: which publisher may speak for which name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.control import Answer, Call
from modelp2p.daemon.fetch import stated, verify
from modelp2p.daemon.requests import FetchRequest, Target, peers, text, timeout_s
from modelp2p.protocol.errors import NotFoundError, UsageError
from modelp2p.protocol.names import check_publisher_id
from modelp2p.protocol.trust import TrustEntry, admit

if TYPE_CHECKING:
    from modelp2p.daemon.node import Node
    from modelp2p.protocol.codec import Value


async def add(node: Node, target: Target, call: Call) -> Answer:
    """Give a name, or a pattern of names, to the publisher of a link or bundle."""
    pattern = text(call.args, "name")
    if target.name is not None:
        raise UsageError("trust needs a link or a bundle: a name does not say who speaks for it")
    if target.link is not None:
        # A pattern that is taken is refused before anybody is asked for anything.
        node.book.added(TrustEntry(pattern, target.link.publisher))
    patience_s = timeout_s(call.args, node.config.fetch.timeout_s)
    request = FetchRequest(target, peers=peers(call.args), dry_run=True, timeout_s=patience_s)
    async with stated(node, target, request) as statement:
        release = await trio.to_thread.run_sync(verify, node, statement)
    if target.link is not None:
        admit(release, node.book, target.link)
    book = node.book.added(TrustEntry(pattern, release.publisher_id))
    node.store.save_chain(release.chain)
    node.store.save_book(book)
    node.book = book
    _rename(node, release.publisher_id)
    keyids: list[Value] = list(release.chain.release_keyids())
    return Answer({"publisher": release.publisher_id, "name": pattern, "keyids": keyids})


async def list_entries(node: Node) -> Answer:
    """All that is in the book."""
    await trio.lowlevel.checkpoint()
    entries: list[Value] = [{"name": e.pattern, "publisher": e.publisher} for e in node.book.entries]
    return Answer({"entries": entries})


async def remove(node: Node, call: Call) -> Answer:
    """Take a name, or all names, from a publisher."""
    await trio.lowlevel.checkpoint()
    publisher = check_publisher_id(text(call.args, "publisher"))
    name = call.args.get("name")
    book = node.book.removed(publisher, name if isinstance(name, str) else None)
    removed = len(node.book.entries) - len(book.entries)
    if not removed:
        raise NotFoundError(f"{publisher} is not trusted for {name if isinstance(name, str) else 'any name'}")
    node.store.save_book(book)
    node.book = book
    _rename(node, publisher)
    return Answer({"removed": removed})


def _rename(node: Node, publisher: str) -> None:
    """Move visible paths to where the trust book now puts them."""
    for entry in node.library.entries():
        if entry.publisher != publisher:
            continue
        named = node.is_named(entry)
        old = node.store.model_path(entry.name, entry.publisher, entry.revision, named=not named)
        if old.is_symlink():
            node.store.hide_model(old)
            node.store.show_model(entry.name, entry.publisher, entry.info_hash, entry.revision, named=named)
