"""What a request to the public listener is about, and the head of an answer with bytes of a file. Pure.

    /{name}/resolve/{revision}/{file}                  a file, where a BEP 19 web seed with the base /{name}/resolve/ has it
    /{name}/{revision}.modelp2p                        the bundle of a release
    /{name}/main.modelp2p                              that of the newest one
    /.well-known/modelp2p/publishers/{publisher}       the root documents of a publisher

Invariants:
- a name has one or two segments and a revision all of its 40 digits, so no path has two meanings;
- anything else is nothing: no path lists what there is;
- the path of a file is text to look up; no spelling of it leads anywhere else.

Spec: BEP 19, https://www.bittorrent.org/beps/bep_0019.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import unquote

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.httprange import Span, UnsatisfiableError, parse_range
from modelp2p.protocol.names import ModelName, check_publisher_id, check_revision

if TYPE_CHECKING:
    from modelp2p.protocol.names import PublisherId, Revision

BUNDLE_SUFFIX = ".modelp2p"
NEWEST = "main"
# Whatever a publisher put into a file, no browser shall take it for a page of this host.
_UNREADABLE = (("Content-Type", "application/octet-stream"), ("X-Content-Type-Options", "nosniff"))
# One name and revision has one content here (`trust.check_no_rival`): caches on the way may keep it.
_FOR_EVER = ("Cache-Control", "public, max-age=31536000, immutable")
Headers: TypeAlias = tuple[tuple[str, str], ...]
STATEMENT_HEADERS: Headers = (*_UNREADABLE, ("Cache-Control", "no-cache"))
"""Of a bundle or a root chain, of which there may be a newer one at any time."""


@dataclass(frozen=True, slots=True)
class FileOf:
    """A file of a release."""

    name: ModelName
    revision: Revision
    path: str


@dataclass(frozen=True, slots=True)
class BundleOf:
    """The bundle of a release; without a revision, of the newest one of the name."""

    name: ModelName
    revision: Revision | None


@dataclass(frozen=True, slots=True)
class ChainOf:
    """The root documents of a publisher."""

    publisher: PublisherId


Question: TypeAlias = FileOf | BundleOf | ChainOf


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers of an answer, and which bytes of the file follow; of a 416, none."""

    status: int
    headers: Headers
    span: Span


def parse_target(target: str) -> Question | None:
    """What a request target asks for; None where it is nothing that is ever served. A query is not looked at."""
    try:
        parts = [unquote(part, errors="strict") for part in target.partition("?")[0].split("/")[1:]]
        match parts:
            case [".well-known", "modelp2p", "publishers", publisher]:
                return ChainOf(check_publisher_id(publisher))
            case [*name, file] if len(name) <= 2 and file.endswith(BUNDLE_SUFFIX):
                revision = file.removesuffix(BUNDLE_SUFFIX)
                return BundleOf(ModelName.parse("/".join(name)), None if revision == NEWEST else check_revision(revision))
            case [model, "resolve", revision, *path] if revision != "resolve" and any(path):
                return FileOf(ModelName.parse(model), check_revision(revision), "/".join(path))
            case [org, model, "resolve", revision, *path] if any(path):
                return FileOf(ModelName.parse(f"{org}/{model}"), check_revision(revision), "/".join(path))
            case _:
                return None
    except (UnicodeDecodeError, FormatError):
        return None


def head_of_file(size: int, root: bytes, *, is_head: bool, wanted: str | None, if_range: str | None) -> Head:
    """The head of the answer to a request for one file.

    Args:
        size: of the file, in bytes.
        root: its Merkle root, which says what its bytes are; empty for no bytes.
        is_head: whether only the head is wanted; a range means nothing then (RFC 9110 14.2).
        wanted: the `Range` header.
        if_range: the `If-Range` header: without it being our ETag, the whole file is sent.
    """
    etag = f'"{root.hex() or "empty"}"'
    headers = (*_UNREADABLE, ("ETag", etag), ("Accept-Ranges", "bytes"))
    try:
        span = parse_range(wanted, size) if not is_head and if_range in (None, etag) else None
    except UnsatisfiableError:
        return Head(416, (*headers, ("Content-Range", f"bytes */{size}"), ("Content-Length", "0")), Span(0, 0))
    if span is None:
        return Head(200, (*headers, _FOR_EVER, ("Content-Length", str(size))), Span(0, size))
    part = (("Content-Range", f"bytes {span.begin}-{span.end - 1}/{size}"), ("Content-Length", str(len(span))))
    return Head(206, (*headers, _FOR_EVER, *part), span)
