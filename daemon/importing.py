"""`import`: a release out of a folder that was carried here, with nothing asked of anybody.

It is an `adopt` whose patience is over when everything in the folder has been looked at: what is whole then is here, and what is
missing or bad is named instead of waited for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.fetch import fetch, verify, wanted_of
from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.protocol.errors import PartialError, TimedOutError, UnknownPublisherError, UsageError
from modelp2p.protocol.text import some_of

if TYPE_CHECKING:
    from modelp2p.daemon.adopting import Source
    from modelp2p.daemon.node import Node
    from modelp2p.daemon.requests import Emit, FetchRequest, Target
    from modelp2p.protocol.codec import Map
    from modelp2p.protocol.names import PublisherId
    from modelp2p.protocol.statement import Release


async def import_folder(node: Node, request: FetchRequest, emit: Emit, source: Source) -> Map:
    """Take in what `source` holds of the release that the request's bundle states; the result is `adopt`'s.

    Raises:
        PartialError: files that were asked for are missing there or bad; what is good is kept.
        ModelP2PError: as `fetch`.
    Cancellation: as `fetch`.
    """
    if request.target.statement is None:
        raise UsageError("an import needs a bundle")
    try:
        return await fetch(node, replace(request, timeout_s=0.0, peers_only=True), emit, source)
    except TimedOutError as exc:
        release = await _verified(node, request.target)
        wanted = await wanted_of(node, release, request)
        lacking = await _lacking(node, release, wanted)
        if lacking:
            error = _partial(wanted, lacking)
            node.of(release.info_hash).error = error.message
            raise error from exc
    # Somebody else brought the rest meanwhile.
    return await import_folder(node, request, emit, source)


async def consented(node: Node, target: Target, publisher: PublisherId) -> Target:
    """The target with its publisher authorised for this one request, as a link authorises.

    Raises:
        UnknownPublisherError: it is another one's.
    """
    release = await _verified(node, target)
    if release.publisher_id != publisher:
        raise UnknownPublisherError(
            f"{release.ref} is signed by {release.publisher_id}, not by {publisher}", publisher=release.publisher_id
        )
    # Beside the statement, not instead of it: nobody is asked for what lies here.
    return replace(target, link=release.link())


async def _verified(node: Node, target: Target) -> Release:
    if target.statement is None:
        raise UsageError("a publisher is named beside a bundle only")
    return await trio.to_thread.run_sync(verify, node, target.statement)


async def _lacking(node: Node, release: Release, wanted: tuple[str, ...]) -> list[str]:
    async with node.of(release.info_hash).lock:
        folder = await trio.to_thread.run_sync(ReleaseFolder.open, node.store, release)
        folder.close()
    return [path for path in wanted if path not in folder.state.files]


def _partial(wanted: tuple[str, ...], lacking: list[str]) -> PartialError:
    return PartialError(
        f"{len(lacking)} of {len(wanted)} files are missing or damaged in this folder: {some_of(lacking)}",
        hint="What is good is kept. Import again from a good copy, or get the rest from peers: modelp2p fetch BUNDLE",
        path=lacking[0],
        files=len(lacking),
    )
