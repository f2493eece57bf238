"""The gateway: a Hugging Face endpoint on loopback, out of what this node holds and fetches.

    HF_ENDPOINT=http://127.0.0.1:16880/t/<token>  ──►  releases of names that this node trusts somebody for

Invariants:
- everything lies under the token of this home: who does not know it hears 404, whatever they ask;
- a name is answered only for publishers that the trust book gives it to; `main` is the newest release of it here;
- what a release consists of is answered from its signed manifest, so a file that is not here yet is never "not found";
- nothing is changed by a request, except that `unknown = "fetch"` begins the fetch of a release that is known and trusted.

It deliberately is no proxy: what is not here is denied, or the client is sent to the configured origin, where it goes itself with
its own token. The contract of every route, header and error: docs/GATEWAY.md.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
from collections import OrderedDict
from glob import escape
from typing import TYPE_CHECKING, assert_never

import trio

from modelp2p.daemon.fetch import Resolved
from modelp2p.daemon.files import write_atomic
from modelp2p.daemon.gateway_files import ArrivingFile, FinishedFile, FinishedFiles, is_expected
from modelp2p.daemon.http_connection import Request, Response
from modelp2p.daemon.jobs import job_of
from modelp2p.daemon.requests import FetchRequest, Target
from modelp2p.protocol import hfapi, layout
from modelp2p.protocol.errors import (
    DeniedError,
    FormatError,
    ModelP2PError,
    NotFoundError,
    PolicyError,
    UnknownPublisherError,
    UsageError,
)
from modelp2p.protocol.hfapi import Code, File, FileReply, Fixed, Reply
from modelp2p.protocol.job import MAX_PATTERNS
from modelp2p.protocol.kinds import kind_of
from modelp2p.protocol.names import ModelName, NameRef

if TYPE_CHECKING:
    from modelp2p.daemon.following import Streams
    from modelp2p.daemon.jobs import Jobs
    from modelp2p.daemon.library import Entry
    from modelp2p.daemon.node import Node
    from modelp2p.daemon.store import Store
    from modelp2p.protocol.statement import Release

log = logging.getLogger(__name__)

FIRST_BYTE_S = 7.0
"""How long an answer waits for its first byte: clients give up after 10 s without a head."""
RETRY_AFTER_S = 8
"""When a client that was told 429 comes again, one second later than told: so it hears of what the swarm got meanwhile in 10 s.
huggingface_hub does so five times."""
_RELEASES = 8
"""Verified releases kept in memory: a snapshot asks for one a hundred times."""
_TOKEN_BYTES = 16
_NOT_SERVED = "modelp2p gateway: not served here"
_READ_ONLY = "this endpoint is read-only: 'modelp2p publish' publishes a model"


class Gateway:
    """Answers HTTP requests about the releases of one node.

    Args:
        node: whose releases.
        streams: for files that are being fetched.
        jobs: for fetches it begins.
        token: what every path begins with.
    """

    def __init__(self, node: Node, streams: Streams, jobs: Jobs, token: str) -> None:
        self._node = node
        self._streams = streams
        self._jobs = jobs
        self._token = token
        self._finished = FinishedFiles(node.store)
        self._releases: OrderedDict[bytes, Release] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Gateway unknown={self._node.config.gateway.unknown}>"

    def endpoint(self, port: int) -> str:
        """The value of HF_ENDPOINT. A secret of this home's owner."""
        return f"http://127.0.0.1:{port}/t/{self._token}"

    async def handle(self, request: Request) -> Response:
        """Answer one request. Raises nothing on purpose."""
        target = self._behind_token(request.target)
        if target is None:
            return _response(hfapi.error(404, _NOT_SERVED))
        try:
            return await self._answer(request, target)
        except FormatError as exc:
            return _response(hfapi.error(400, exc.message))
        except PolicyError as exc:
            return _response(hfapi.error(403, _said(exc)))
        except ModelP2PError as exc:
            log.warning("the gateway could not answer: %s", exc.message)
            return _response(hfapi.error(503, _said(exc)))

    def _behind_token(self, target: str) -> str | None:
        """The path and query behind the token, where it is the right one."""
        prefix, _, rest = target.removeprefix("/").partition("/")
        token, slash, path = rest.partition("/")
        is_ours = hmac.compare_digest(token.encode("ascii"), self._token.encode("ascii"))
        return slash + path if prefix == "t" and is_ours else None

    async def _answer(self, request: Request, target: str) -> Response:
        question = hfapi.parse_route(request.method, target)
        match question:
            case Fixed.AGENTS:
                return _response(hfapi.error(404, _NOT_SERVED))
            case Fixed.WHOAMI:
                return _response(hfapi.error(401, "the modelp2p gateway knows no users"))
            case Fixed.UPLOAD:
                return _response(hfapi.error(403, _READ_ONLY))
            case Fixed.ELSEWHERE:
                return _response(self._elsewhere(target, hfapi.error(404, _NOT_SERVED)))
            case _:
                pass
        found = self._find(question.repo, question.revision if not isinstance(question, hfapi.Refs) else hfapi.MAIN)
        if isinstance(found, Reply):
            return _response(self._elsewhere(target, found))
        release = await self._release(found)
        match question:
            case File():
                return await self._file(request, question, release)
            case hfapi.PathsInfo():
                if request.body is None:
                    return _response(hfapi.error(413, "too many paths at once"))
                paths = hfapi.parse_paths(request.headers.get("content-type", ""), request.body)
            case hfapi.ModelInfo() | hfapi.Tree() | hfapi.Refs():
                paths = []
            case _:
                assert_never(question)
        # In a thread: ten thousand files are some milliseconds.
        made = await trio.to_thread.run_sync(hfapi.answer, question, release.manifest, release.publisher_id, paths)
        return _response(made)

    def _find(self, repo: str, revision: str) -> Entry | Reply:
        """The statement behind a name, or why there is none."""
        library, book = self._node.library, self._node.book
        try:
            name = ModelName.parse(repo)
            current = library.by_name(NameRef(name, None), book)
        except (FormatError, NotFoundError):
            return hfapi.not_found(Code.REPO, f"{repo} is not here. Fetch it first: modelp2p fetch LINK")
        except UnknownPublisherError as exc:
            return hfapi.not_found(Code.REPO, _said(exc))
        if revision == hfapi.MAIN:
            return current
        try:
            # Only what can be a revision: a branch by the name of "beef" is not one.
            return library.by_name(NameRef(name, _hex_revision(revision)), book)
        except (NotFoundError, UnknownPublisherError, UsageError) as exc:
            return hfapi.not_found(Code.REVISION, exc.message)

    def _elsewhere(self, target: str, otherwise: Reply) -> Reply:
        gateway = self._node.config.gateway
        return hfapi.redirect(gateway.origin, target) if gateway.unknown == "redirect" else otherwise

    async def _release(self, entry: Entry) -> Release:
        if (known := self._releases.get(entry.digest)) is not None:
            self._releases.move_to_end(entry.digest)
            return known
        release = await trio.to_thread.run_sync(self._node.library.release, entry.digest)
        self._releases[entry.digest] = release
        if len(self._releases) > _RELEASES:
            self._releases.popitem(last=False)
        return release

    async def _file(self, request: Request, question: File, release: Release) -> Response:
        manifest = release.manifest
        if question.path not in manifest:
            return _response(hfapi.not_found(Code.ENTRY, f"{release.ref} has no file '{question.path}'", manifest))
        reply = hfapi.file_reply(
            manifest,
            release.publisher_id,
            manifest.file(question.path),
            is_head=request.method == "HEAD",
            wanted=request.headers.get("range"),
            if_range=request.headers.get("if-range"),
        )
        if isinstance(reply, Reply):
            return _response(reply)
        if not len(reply.span):
            return Response(reply.status, reply.headers, None)
        if (finished := await self._finished_file(release, question.path, reply)) is not None:
            return finished
        shared = self._node.of(release.info_hash)
        if shared.waits_for or not is_expected(shared, question.path):
            match self._node.config.gateway.unknown:
                case "fetch":
                    await self._begin_fetch(release, question.path)
                case "redirect" if manifest.origin is not None:
                    # This very commit: what was said about the file's digest is about no other.
                    return _response(hfapi.redirect_file(self._node.config.gateway.origin, question, manifest))
                case _:
                    return _response(hfapi.error(503, self._why_not(release, question.path)))
        return await self._arriving_file(release, question.path, reply, request.headers.get("user-agent", ""))

    async def _finished_file(self, release: Release, path: str, reply: FileReply) -> Response | None:
        found = await trio.to_thread.run_sync(self._finished.open, release.info_hash, release.manifest.revision, path)
        return None if found is None else Response(reply.status, reply.headers, FinishedFile(found[0], reply.span, found[1]))

    async def _arriving_file(self, release: Release, path: str, reply: FileReply, agent: str) -> Response:
        shared = self._node.of(release.info_hash)
        deadline = trio.current_time() + FIRST_BYTE_S
        try:
            stream = self._streams.begin(release, shared, "gateway")
        except DeniedError as exc:
            return _response(hfapi.not_ready(exc.message, RETRY_AFTER_S, agent))
        body = ArrivingFile(self._streams, self._finished, stream, path, reply.span)
        is_begun = False
        try:
            await body.begin()
            is_begun = await body.wait_begun(deadline)
        finally:
            if not is_begun:
                body.close()
        if is_begun:
            return Response(reply.status, reply.headers, body)
        # It may have ended in the meantime, and well.
        if (finished := await self._finished_file(release, path, reply)) is not None:
            return finished
        if shared.waits_for or not is_expected(shared, path):
            return _response(hfapi.error(503, self._why_not(release, path)))
        message = f"'{path}' of {release.ref} is being fetched; nobody had its first bytes"
        return _response(hfapi.not_ready(message, RETRY_AFTER_S, agent))

    def _why_not(self, release: Release, path: str) -> str:
        shared = self._node.of(release.info_hash)
        if shared.trouble:
            return f"{release.ref}: {shared.trouble}"
        return f"'{path}' is not fetched, and nobody fetches it. Run: modelp2p fetch {release.ref}"

    async def _begin_fetch(self, release: Release, path: str) -> None:
        """Have the node fetch a release, all that its policy lets in, whoever waits for it or not.

        Raises:
            PolicyError: the file runs code, and this node takes none.
            ModelP2PError: the fetch could not be accepted.
        """
        node = self._node
        code = [entry.path for entry in release.manifest.files if kind_of(entry.path).executes_code or entry.kind.executes_code]
        exclude = () if node.config.policy.allow_code else tuple(map(escape, code))
        if not node.config.policy.allow_code and path in code:
            raise PolicyError(f"'{path}' runs code when it is opened, and this node takes none ([policy] allow_code)")
        if len(exclude) > MAX_PATTERNS:
            raise PolicyError(f"{release.ref} holds {len(exclude)} files that run code; fetch it with 'modelp2p fetch --exclude'")
        # The kept statement is all that the job needs of its target.
        request = FetchRequest(Target(), exclude=exclude)
        await self._jobs.accept(job_of(Resolved(release, is_named=True), request, node.config.fetch.timeout_s))


def load_token(store: Store) -> str:
    """The token of a home: 128 bits in hex, made on first use, in a file that only the owner reads. Blocks.

    Raises:
        StoreError: it cannot be read or written.
    """
    path = store.path(layout.GATEWAY_TOKEN)
    try:
        with open(path, encoding="ascii", errors="replace", opener=_no_link) as file:
            kept, mode = file.read(256).strip(), os.fstat(file.fileno()).st_mode
    except OSError:
        kept, mode = "", 0
    is_token = len(kept) == 2 * _TOKEN_BYTES and all(c in "0123456789abcdef" for c in kept)
    if is_token and not mode & 0o077:
        return kept
    token = secrets.token_hex(_TOKEN_BYTES)
    write_atomic(path.parent, path.name, f"{token}\n".encode("ascii"), 0o600)
    return token


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _hex_revision(text: str) -> str:
    if 7 <= len(text) <= 40 and all(c in "0123456789abcdef" for c in text):
        return text
    raise NotFoundError(f"there is no revision '{text[:80]}' here; there are 'main' and commits")


def _said(exc: ModelP2PError) -> str:
    return f"{exc.message}. {exc.hint}" if exc.hint else exc.message


def _response(reply: Reply) -> Response:
    return Response(reply.status, reply.headers, reply.body)
