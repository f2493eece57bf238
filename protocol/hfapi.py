"""The Hugging Face Hub's HTTP interface, as far as model clients read it: requests parsed, answers as values. Pure.

    GET  /api/models/{id}[/revision/{rev}]           what a release is
    GET  /api/models/{id}/tree/{rev}[/{folder}]      its files
    POST /api/models/{id}/paths-info/{rev}           some of them
    GET  /api/models/{id}/refs                       `main`
    GET  /{id}/resolve/{rev}/{file}, HEAD            a file

Invariants:
- every answer comes from a manifest: what is not on the disk yet is never "does not exist", which clients would remember;
- a path is only ever looked up in a manifest, so no spelling of it leads anywhere else;
- no Xet header or field: clients would turn to a store that this is not;
- nothing here has a place for a credential.

`{id}` has one or two segments, so routes are found by their marker (`resolve`, `tree`), not by counting. What clients need of
each answer: docs/GATEWAY.md. Spec: https://huggingface.co/docs/hub/api
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import parse_qs, quote, unquote

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.hftree import Json, Listing, file_row
from modelp2p.protocol.httprange import Span, UnsatisfiableError, parse_range

if TYPE_CHECKING:
    from modelp2p.protocol.manifest import FileEntry, Manifest
    from modelp2p.protocol.names import PublisherId

LARGE_BYTES = 50_000_000_000
"""Clients refuse to download a file over plain HTTP whose HEAD says more (huggingface_hub `MAX_HTTP_DOWNLOAD_SIZE`)."""
MAX_PATHS = 10_000
"""Paths one `paths-info` may ask about: as many as a release has."""
MAIN = "main"
_MAX_MESSAGE = 500
_LAST_SECOND = 253_402_300_799
"""The end of the year 9999."""
Headers: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is this release?"""

    repo: str
    revision: str = MAIN
    blobs: bool = False


@dataclass(frozen=True, slots=True)
class Tree:
    """Which files and folders lie in a folder of it?"""

    repo: str
    revision: str
    folder: str
    recursive: bool


@dataclass(frozen=True, slots=True)
class PathsInfo:
    """What is known about these paths? They come in the body."""

    repo: str
    revision: str


@dataclass(frozen=True, slots=True)
class Refs:
    """Which branches are there?"""

    repo: str


@dataclass(frozen=True, slots=True)
class File:
    """A file, or with HEAD what is known about it."""

    repo: str
    revision: str
    path: str


class Fixed(Enum):
    """Requests that are about no release."""

    WHOAMI = "who is the owner of this token?"
    AGENTS = "a list that clients ask for at start and wait 3 s for"
    UPLOAD = "anything that would change something"
    ELSEWHERE = "anything that is not served here"


Question: TypeAlias = ModelInfo | Tree | PathsInfo | Refs | File
Route: TypeAlias = Question | Fixed


class Code(Enum):
    """`X-Error-Code`: what clients turn into an exception of their own."""

    REPO = "RepoNotFound"
    REVISION = "RevisionNotFound"
    ENTRY = "EntryNotFound"


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. `Content-Length` is the server's to add."""

    status: int
    headers: Headers = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class FileReply:
    """The head of an answer with bytes of a file, and which ones; of a HEAD, none."""

    status: int
    headers: Headers
    span: Span


def parse_route(method: str, target: str) -> Route:
    """What a request asks for.

    Args:
        method: as sent, such as `GET`.
        target: path and query behind the endpoint, beginning with a slash.

    Raises:
        FormatError: the path is not UTF-8.
    """
    path, _, query = target.partition("?")
    try:
        parts = [unquote(part, errors="strict") for part in path.split("/")[1:]]
    except UnicodeDecodeError as exc:
        raise FormatError("the path of this request is not UTF-8") from exc
    is_read = method in ("GET", "HEAD")
    match parts:
        case ["api", "models", *rest]:
            route = _api_route(rest, parse_qs(query[:4096]))
        case ["api", "whoami-v2"]:
            route = Fixed.WHOAMI
        case ["api", "agent-harnesses"]:
            route = Fixed.AGENTS
        case ["api", *_]:
            route = Fixed.ELSEWHERE
        case [org, model, "resolve", revision, *file] if file:
            route = File(f"{org}/{model}", revision, "/".join(file))
        case [model, "resolve", revision, *file] if file:
            route = File(model, revision, "/".join(file))
        case _:
            route = Fixed.ELSEWHERE
    if is_read:
        return Fixed.ELSEWHERE if isinstance(route, PathsInfo) else route
    return route if method == "POST" and isinstance(route, PathsInfo) else Fixed.UPLOAD


def parse_paths(content_type: str, body: bytes) -> list[str]:
    """The paths that the body of a `paths-info` asks about: a form (huggingface_hub) or JSON (others).

    Raises:
        FormatError: neither, or too many.
    """
    try:
        if content_type.partition(";")[0].strip().lower() == "application/json":
            value = json.loads(body)
            paths = value.get("paths") if isinstance(value, dict) else None
        else:
            paths = parse_qs(body.decode("utf-8"), max_num_fields=MAX_PATHS + 1).get("paths", [])
    except (ValueError, RecursionError) as exc:
        raise FormatError("the body is neither a form nor JSON with 'paths'") from exc
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths) or len(paths) > MAX_PATHS:
        raise FormatError(f"'paths' must be a list of at most {MAX_PATHS} paths")
    return paths


def answer(
    question: ModelInfo | Tree | PathsInfo | Refs, manifest: Manifest, publisher: PublisherId, paths: Sequence[str] = ()
) -> Reply:
    """What a release has to say to a question that is not about the bytes of a file; `paths` is for `PathsInfo`."""
    body: Json
    match question:
        case ModelInfo(blobs=blobs):
            body = _model_info(manifest, blobs=blobs)
        case Tree(folder=folder, recursive=recursive):
            found = Listing(manifest).below(folder, recursive=recursive)
            if found is None:
                return not_found(Code.ENTRY, f"{manifest.name} has no folder '{folder}'", manifest)
            body = found
        case PathsInfo():
            body = Listing(manifest).about(paths)
        case Refs():
            main: Json = {"name": MAIN, "ref": f"refs/heads/{MAIN}", "targetCommit": manifest.revision}
            body = {"branches": [main], "converts": [], "tags": [], "pullRequests": []}
    headers = (("X-Repo-Commit", manifest.revision), _warning(publisher))
    return _json(200, body, headers)


def file_reply(
    manifest: Manifest, publisher: PublisherId, entry: FileEntry, *, is_head: bool, wanted: str | None, if_range: str | None
) -> FileReply | Reply:
    """The head of the answer to a request for one file, and the bytes that follow; 416 where none of those asked for exist.

    Args:
        manifest: of the release.
        publisher: who signed it.
        entry: the file.
        is_head: whether only the head is wanted; a range means nothing then (RFC 9110 14.2).
        wanted: the `Range` header.
        if_range: the `If-Range` header: without it being our ETag, the whole file is sent.
    """
    etag = f'"{(entry.git_sha1 or entry.sha256).hex()}"'
    headers: list[tuple[str, str]] = [
        ("X-Repo-Commit", manifest.revision),
        ("ETag", etag),
        ("Accept-Ranges", "bytes"),
        ("Content-Type", "application/octet-stream"),
        _warning(publisher),
    ]
    if is_head:
        if entry.size <= LARGE_BYTES:
            headers.append(("Content-Length", str(entry.size)))
        return FileReply(200, tuple(headers), Span(0, 0))
    try:
        span = parse_range(wanted, entry.size) if if_range in (None, etag) else None
    except UnsatisfiableError:
        return Reply(416, (*headers, ("Content-Range", f"bytes */{entry.size}")))
    whole = Span(0, entry.size)
    if span is not None:
        headers.append(("Content-Range", f"bytes {span.begin}-{span.end - 1}/{entry.size}"))
    headers.append(("Content-Length", str(len(span or whole))))
    return FileReply(206 if span else 200, tuple(headers), span or whole)


def not_found(code: Code, message: str, manifest: Manifest | None = None) -> Reply:
    """404 as clients understand it; with the manifest of a known release they remember a missing file as missing."""
    commit = () if manifest is None else (("X-Repo-Commit", manifest.revision),)
    return error(404, message, ("X-Error-Code", code.value), *commit)


def error(status: int, message: str, *headers: tuple[str, str]) -> Reply:
    """An error whose words clients show to their users."""
    return _json(status, {"error": message}, (*headers, ("X-Error-Message", _header_text(message))))


def redirect(origin: str, target: str) -> Reply:
    """307 to the same place at `origin`: the client goes there itself, with its own token where it trusts that origin."""
    return Reply(307, (("Location", origin + target),))


def redirect_file(origin: str, question: File, manifest: Manifest) -> Reply:
    """`redirect` for a file of a known release, to its commit whatever revision was asked for."""
    return redirect(origin, f"/{question.repo}/resolve/{manifest.revision}/{quote(question.path)}")


def not_ready(message: str, seconds: int, agent: str = "") -> Reply:
    """The one answer to a client with this `User-Agent` after which it waits and asks again: 429, of huggingface_hub 0.x 503."""
    return error(503 if "hf_hub/0." in agent else 429, message, ("Retry-After", str(seconds)))


def _api_route(parts: Sequence[str], query: dict[str, list[str]]) -> Route:
    for at in (1, 2):
        repo = "/".join(parts[:at])
        match parts[at:]:
            case ["revision", revision]:
                return ModelInfo(repo, revision, _flag(query, "blobs"))
            case ["tree", revision, *folder]:
                return Tree(repo, revision, "/".join(folder).strip("/"), _flag(query, "recursive"))
            case ["paths-info", revision]:
                return PathsInfo(repo, revision)
            case ["refs"]:
                return Refs(repo)
            case _:
                pass
    return ModelInfo("/".join(parts), MAIN, _flag(query, "blobs")) if 1 <= len(parts) <= 2 else Fixed.ELSEWHERE


def _model_info(manifest: Manifest, *, blobs: bool) -> Json:
    # A manifest may state any time, and a calendar has an end.
    stated = datetime.fromtimestamp(min(manifest.created, _LAST_SECOND), UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    siblings: list[Json] = [_sibling(entry, blobs=blobs) for entry in manifest.files]
    tags: list[Json] = [f"license:{manifest.license.lower()}"] if manifest.license else []
    return {
        "_id": manifest.revision[:24],
        "id": str(manifest.name),
        "modelId": str(manifest.name),
        "sha": manifest.revision,
        "createdAt": stated,
        "lastModified": stated,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "siblings": siblings,
    }


def _sibling(entry: FileEntry, *, blobs: bool) -> Json:
    row: dict[str, Json] = {"rfilename": entry.path}
    if blobs:
        listed = file_row(entry)
        row |= {"size": entry.size, "blobId": listed["oid"]}
        if isinstance(lfs := listed.get("lfs"), dict):
            row["lfs"] = {"sha256": lfs["oid"], "size": entry.size, "pointerSize": lfs["pointerSize"]}
    return row


def _warning(publisher: PublisherId) -> tuple[str, str]:
    # Clients print what follows the semicolon, once a process.
    return "X-HF-Warning", f"modelp2p; served from swarm, signed by {publisher}"


def _flag(query: dict[str, list[str]], key: str) -> bool:
    return query.get(key, [""])[-1].lower() in ("1", "true")


def _json(status: int, body: Json, headers: Iterable[tuple[str, str]] = ()) -> Reply:
    return Reply(status, (("Content-Type", "application/json; charset=utf-8"), *headers), json.dumps(body).encode("ascii"))


def _header_text(message: str) -> str:
    # What came from a request is in it: nothing of it may end the header.
    text = message.encode("ascii", "backslashreplace").decode("ascii")[:_MAX_MESSAGE]
    return "".join(c if " " <= c <= "~" else " " for c in text)
