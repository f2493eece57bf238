"""Which publisher this node believes for which name: pure rules over a small book of entries (docs/DESIGN.md, 10).

A link authorises its publisher for one fetch, not for the name. Only an entry made by the user (`trust add`) gives a
publisher a name, and with it look-up by name and the path `models/<org>/...`. There is no trust on first use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError, UnknownPublisherError, UntrustedError, UsageError
from modelp2p.protocol.names import ModelName, PublisherId, check_publisher_id

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value
    from modelp2p.protocol.links import Link
    from modelp2p.protocol.statement import Release

BOOK_VERSION = 1
MAX_ENTRIES = 10_000
MAX_BOOK_BYTES = 4 << 20
_PATTERN = re.compile(r"\*|[A-Za-z0-9._-]{1,96}(/(\*|[A-Za-z0-9._-]{1,96}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class TrustEntry:
    """The user's word that `publisher` speaks for every name `pattern` matches.

    A pattern is a name (`org/model`), all of an organisation (`org/*`) or everything (`*`).
    """

    pattern: str
    publisher: PublisherId

    def __post_init__(self) -> None:
        if not _PATTERN.fullmatch(self.pattern):
            raise UsageError(f"'{self.pattern[:120]}' is not a name pattern", hint="Use org/model, org/* or *.")
        check_publisher_id(self.publisher)

    def matches(self, name: ModelName) -> bool:
        """Whether the pattern covers `name`."""
        if self.pattern == "*":
            return True
        if self.pattern.endswith("/*"):
            return name.org == self.pattern[:-2]
        return str(name) == self.pattern


@dataclass(frozen=True, slots=True)
class TrustBook:
    """All entries; at most one publisher may hold an exact pattern."""

    entries: tuple[TrustEntry, ...] = ()

    def __post_init__(self) -> None:
        if len({entry.pattern for entry in self.entries}) != len(self.entries):
            raise FormatError("the trust book gives one pattern twice")

    def added(self, entry: TrustEntry) -> TrustBook:
        """The book with `entry`.

        Raises:
            UntrustedError: another publisher holds exactly this pattern; taking a name over must be said aloud, by removing.
        """
        for held in self.entries:
            if held.pattern == entry.pattern and held.publisher != entry.publisher:
                raise UntrustedError(
                    f"'{entry.pattern}' is already given to publisher {held.publisher}, not {entry.publisher}",
                    hint=f"If that is meant, first run: modelp2p trust remove {held.publisher} --name '{held.pattern}'",
                )
        return self if entry in self.entries else TrustBook((*self.entries, entry))

    def removed(self, publisher: PublisherId, pattern: str | None) -> TrustBook:
        """The book without that publisher's entries (all, or the one for `pattern`)."""
        return TrustBook(
            tuple(e for e in self.entries if e.publisher != publisher or (pattern is not None and e.pattern != pattern))
        )

    def is_trusted(self, publisher: PublisherId, name: ModelName) -> bool:
        """Whether the user gave `name` to `publisher`."""
        return any(entry.publisher == publisher and entry.matches(name) for entry in self.entries)

    def publishers(self) -> frozenset[PublisherId]:
        """Every publisher some name is given to."""
        return frozenset(entry.publisher for entry in self.entries)


def admit(release: Release, book: TrustBook, link: Link | None) -> bool:
    """Decide whether a verified release may be fetched; True where its name is verified too.

    Raises:
        UntrustedError: the statement is not the one the link pins.
        UnknownPublisherError: nothing here vouches for its publisher.
    """
    if link is not None:
        _check_link(release, link)
    named = book.is_trusted(release.publisher_id, release.manifest.name)
    if link is None and not named:
        raise UnknownPublisherError(
            f"{release.ref} is signed by {release.publisher_id}, whom this node does not trust for that name",
            hint=f"If you trust them: modelp2p trust add BUNDLE --name {release.manifest.name}. Or fetch by a link you trust.",
            publisher=release.publisher_id,
        )
    return named


def check_no_rival(release: Release, others: Iterable[tuple[str, PublisherId, bytes]]) -> None:
    """Refuse a second content under one name@revision.

    Args:
        release: the newcomer.
        others: (ref, publisher, info-hash) of every release here.

    Raises:
        UntrustedError: one of them has this ref with another info-hash; names both publishers.
    """
    for ref, publisher, info_hash in others:
        if ref == release.ref and info_hash != release.info_hash:
            raise UntrustedError(
                f"{ref} from {release.publisher_id} has other content than the one here from {publisher}",
                hint="Find out which publisher is right. 'modelp2p rm' the wrong one.",
            )


def encode_book(book: TrustBook) -> bytes:
    """Canonical bytes of the trust file."""
    entries: list[Value] = [{"pattern": entry.pattern, "publisher": entry.publisher} for entry in book.entries]
    return codec.pack({"v": BOOK_VERSION, "entries": entries})


def decode_book(data: bytes) -> TrustBook:
    """The book in a trust file.

    Raises:
        FormatError: malformed or of a newer version.
    """
    source = codec.unpack_map(data, max_bytes=MAX_BOOK_BYTES)
    if codec.take_uint(source, "v", maximum=2**32, where="trust") != BOOK_VERSION:
        raise FormatError("the trust file has a version that is not known here", hint="Update modelp2p.")
    entries = codec.take_list(source, "entries", dict, maximum=MAX_ENTRIES, where="trust")
    return TrustBook(tuple(_decode_entry(cast("Map", entry)) for entry in entries))


def _decode_entry(source: Map) -> TrustEntry:
    codec.only_fields(source, frozenset({"pattern", "publisher"}), "trust")
    return TrustEntry(codec.take(source, "pattern", str), check_publisher_id(codec.take(source, "publisher", str)))


def _check_link(release: Release, link: Link) -> None:
    if release.info_hash != link.info_hash:
        raise UntrustedError("the manifest describes other content than the link pins", expected=link.info_hash.hex())
    if release.manifest_hash != link.manifest_hash:
        raise UntrustedError("the statement is not the one the link pins", expected=link.manifest_hash.hex())
    if release.publisher_id != link.publisher:
        raise UnknownPublisherError(
            f"the link names publisher {link.publisher}, but the statement is signed by {release.publisher_id}",
            hint="The link or the swarm is not honest. Ask the publisher for the link again.",
            publisher=release.publisher_id,
        )
    if release.manifest.name != link.name:
        raise UntrustedError(f"the link names {link.name}, but the statement is about {release.manifest.name}")
