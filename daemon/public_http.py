"""What this node gives to everybody over HTTP: files of complete releases, bundles, and publishers.

Invariants:
- a release is spoken of only while it is complete here, open to everybody, and its name is given to its publisher by the trust
  book; a publisher only while the book gives it some name. Of everything else nobody learns whether it is here;
- nothing is changed by a request, and no part of one becomes a path of a file system that the release's record does not list;
- nothing depends on who asks: there is no token, cookie or session, and so nothing that a foreign web page could misuse. Requests
  of pages are answered like any, without a header that would let the page read the answer: whoever builds a page of this carries
  the bytes themselves, not their visitors.

Whom it lets in, and for how many connections, is `public_door`'s. The contract of every path: docs/PUBLIC_HTTP.md.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, assert_never

import trio

from modelp2p.daemon.gateway_files import FinishedFile, FinishedFiles
from modelp2p.daemon.http_connection import PLAIN, Request, Response
from modelp2p.daemon.sealed import SealedCache
from modelp2p.protocol.errors import ModelP2PError, NotFoundError
from modelp2p.protocol.publichttp import STATEMENT_HEADERS, BundleOf, ChainOf, FileOf, head_of_file, parse_target
from modelp2p.protocol.publisher import encode_chain
from modelp2p.protocol.statement import encode_bundle

if TYPE_CHECKING:
    from modelp2p.daemon.http_connection import Sink
    from modelp2p.daemon.library import Entry
    from modelp2p.daemon.node import Node
    from modelp2p.protocol.names import ModelName, Revision

log = logging.getLogger(__name__)

_OPENERS = 8
"""Threads that read statements and open files for everybody: not those that the node's own work waits for."""
_NOT_HERE = Response(404, PLAIN, b"not here\n")


class PublicHttp:
    """Answers everybody's requests about the releases of one node.

    Resources: the bundles it sent last, as memory files; `close` gives them back.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._finished = FinishedFiles(node.store)
        self._bundles = SealedCache()
        self._bundling = trio.Lock()
        self._openers = trio.CapacityLimiter(_OPENERS)

    async def handle(self, request: Request) -> Response:
        """Answer one request. Raises nothing on purpose."""
        if request.method not in ("GET", "HEAD"):
            return Response(405, (("Allow", "GET, HEAD"), *PLAIN), b"this server gives, and takes nothing\n")
        try:
            match question := parse_target(request.target):
                case FileOf():
                    return await self._file(request, question)
                case BundleOf():
                    return await self._bundle(request, question)
                case ChainOf():
                    return await self._chain(question)
                case None:
                    return _NOT_HERE
                case _:
                    assert_never(question)
        except NotFoundError:
            return _NOT_HERE
        except ModelP2PError as exc:
            log.warning("a public request could not be answered: %s", exc.message)
            return Response(503, PLAIN, b"not now\n")

    def close(self) -> None:
        """No request comes any more."""
        self._bundles.close()

    async def _file(self, request: Request, question: FileOf) -> Response:
        entry = self._find(question.name, question.revision)
        key = (entry.info_hash, entry.revision, question.path)
        found = await trio.to_thread.run_sync(self._finished.open, *key, limiter=self._openers)
        if found is None:
            return _NOT_HERE
        fd, record = found
        head = head_of_file(
            record.size,
            record.root,
            is_head=request.method == "HEAD",
            wanted=request.headers.get("range"),
            if_range=request.headers.get("if-range"),
        )
        if request.method == "HEAD" or not len(head.span):
            os.close(fd)
            return Response(head.status, head.headers, None)
        return Response(head.status, head.headers, FinishedFile(fd, head.span, record))

    async def _bundle(self, request: Request, question: BundleOf) -> Response:
        digest = self._find(question.name, question.revision).digest
        # One at a time: a bundle is some MiB, and who waited finds it made.
        async with self._bundling:
            make = partial(self._bundle_of, digest)
            fd = await trio.to_thread.run_sync(self._bundles.get, digest, "bundle", make, limiter=self._openers)
        body = _Memory(fd)
        headers = (*STATEMENT_HEADERS, ("Content-Length", str(body.size)))
        if request.method == "HEAD":
            body.close()
            return Response(200, headers, None)
        return Response(200, headers, body)

    def _bundle_of(self, digest: bytes) -> bytes:
        return encode_bundle(self._node.store.load_statement(digest))

    async def _chain(self, question: ChainOf) -> Response:
        if question.publisher not in self._node.book.publishers():
            return _NOT_HERE
        chain = await trio.to_thread.run_sync(self._node.store.load_chain, question.publisher, limiter=self._openers)
        return _NOT_HERE if chain is None else Response(200, STATEMENT_HEADERS, encode_chain(chain.documents))

    def _find(self, name: ModelName, revision: Revision | None) -> Entry:
        """The newest statement about a release that everybody may have.

        Raises:
            NotFoundError: there is none.
        """
        for entry in self._node.library.entries():
            if entry.name == name and revision in (None, entry.revision) and self._is_for_everybody(entry):
                return entry
        raise NotFoundError(f"{name} is not here for everybody")

    def _is_for_everybody(self, entry: Entry) -> bool:
        # XX: manifests cannot say yet that a release is gated. When they can, one that is gated is not for everybody.
        return self._node.is_named(entry) and self._node.of(entry.info_hash).is_complete


class _Memory:
    """A whole memory file; owns its descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    async def send(self, sink: Sink) -> None:
        await sink.send_file(self._fd, 0, self.size)

    def close(self) -> None:
        os.close(self._fd)
