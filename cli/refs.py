"""REF arguments: what the user typed becomes control arguments, with the bundle file opened here.

A path never crosses the control socket: a bundle is opened in this process, with the user's own rights, and travels as a
descriptor. What can be judged without a daemon is judged here, so that a typing error starts nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from modelp2p.protocol.errors import NotFoundError, UntrustedError, UsageError
from modelp2p.protocol.names import BundleRef, LinkRef, ModelName, NameRef, Ref, parse_ref

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

_PUBLISHER_ID = re.compile(r"mp1[a-z2-7]{52}", re.ASCII)


def typed_ref(text: str, revision: str | None = None) -> Ref:
    """The reference in `text`, with `--revision` applied to a name.

    Raises:
        UsageError: not a reference, or a revision for something that has one already.
        UntrustedError: a bare magnet or a `.torrent`: neither carries a signed manifest.
    """
    if text.endswith(".torrent"):
        raise UntrustedError(
            "a .torrent file carries no signed manifest, so nothing about it can be verified",
            hint="Ask the publisher for the modelp2p link, or for the .modelp2p bundle.",
        )
    if _PUBLISHER_ID.fullmatch(text):
        raise NotFoundError(
            f"{text} is a publisher id; the keys behind it are not known here",
            hint="Give a link or a .modelp2p bundle of that publisher: it carries them.",
        )
    ref = parse_ref(text)
    if isinstance(ref, LinkRef):
        from modelp2p.protocol.links import parse_link

        parse_link(ref.text)
    if revision is None:
        return ref
    if not isinstance(ref, NameRef) or ref.revision not in (None, revision):
        raise UsageError("--revision goes with a plain org/model", hint="A link, a bundle and org/model@revision name one.")
    return parse_ref(f"{ref.name}@{revision}")


@contextmanager
def ref_args(ref: Ref) -> Iterator[tuple[Map, list[int]]]:
    """Control arguments and descriptors for `ref`; the descriptors are closed after the block.

    Raises:
        NotFoundError: there is no such bundle file.
    """
    match ref:
        case NameRef():
            yield {"ref": str(ref)}, []
        case LinkRef(text):
            yield {"ref": text}, []
        case BundleRef(path):
            fd = open_user_path(path, "bundle")
            try:
                yield {"ref": "", "bundle": True}, [fd]
            finally:
                os.close(fd)


def text_of(ref: Ref) -> str:
    """A reference as it was typed."""
    match ref:
        case NameRef():
            return str(ref)
        case LinkRef(text):
            return text
        case BundleRef(path):
            return path


def name_of(ref: Ref) -> ModelName:
    """The model a reference is about.

    Raises:
        NotFoundError: there is no such bundle file.
        UntrustedError: it does not hold.
    """
    match ref:
        case NameRef(name):
            return name
        case LinkRef(text):
            from modelp2p.protocol.links import parse_link

            return parse_link(text).name
        case BundleRef(path):
            return ModelName.parse(local_release_of(path)[0])


def open_user_path(path: str, what: str, flags: int = 0) -> int:
    """A read-only descriptor of a path the user typed.

    Raises:
        NotFoundError: there is nothing of that kind.
    """
    try:
        # O_NONBLOCK: a FIFO must not stop the command before it has said a word.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise NotFoundError(f"there is no {what} '{path}'") from exc


def local_release_of(path: str) -> tuple[str, str, str, str]:
    """Name, revision, info-hash (hex) and link of the verified statement in a bundle file.

    Raises:
        NotFoundError: no such file.
        UntrustedError: it does not hold.
    """
    from modelp2p.protocol.statement import MAX_BUNDLE_BYTES, decode_bundle, verify_statement

    fd = open_user_path(path, "bundle")
    with os.fdopen(fd, "rb") as file:
        release = verify_statement(decode_bundle(file.read(MAX_BUNDLE_BYTES + 1)))
    return str(release.manifest.name), release.manifest.revision, release.info_hash.hex(), str(release.link())
