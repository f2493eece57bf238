"""What this node knows: every kept statement, by content, name and link.

Invariants:
- an entry exists only for a statement that verified when it was loaded or added;
- entries are small; layers and torrents are read again from the store when a release is worked on, so hundreds of releases fit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelp2p.protocol.errors import EquivocationError, ModelP2PError, NotFoundError, UnknownPublisherError, UsageError
from modelp2p.protocol.statement import Release, Statement, verify_statement

if TYPE_CHECKING:
    from modelp2p.daemon.store import Store
    from modelp2p.protocol.links import Link
    from modelp2p.protocol.names import ModelName, NameRef, PublisherId, Revision
    from modelp2p.protocol.trust import TrustBook

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One kept statement, in short."""

    digest: bytes
    name: ModelName
    revision: Revision
    info_hash: bytes
    manifest_hash: bytes
    publisher: PublisherId
    sequence: int
    created: int
    size: int
    files: int

    @property
    def ref(self) -> str:
        """`org/model@revision`."""
        return f"{self.name}@{self.revision}"


class Library:
    """All entries of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._entries: dict[bytes, Entry] = {}
        self.damaged = 0
        """Kept statements that did not verify at start; they are left where they are and not used."""

    def __repr__(self) -> str:
        return f"<Library {len(self._entries)} statements, {self.damaged} damaged>"

    def load(self) -> None:
        """Read and verify every kept statement."""
        for digest in self._store.statement_digests():
            try:
                self._entries[digest] = _entry_of(self.release(digest))
            except ModelP2PError as exc:
                self.damaged += 1
                log.error("the statement %s is not used: %s", digest.hex()[:16], exc.message)

    def add(self, statement: Statement, release: Release) -> Entry:
        """Keep a verified statement and its publisher's root chain.

        Raises:
            EquivocationError: its publisher already signed another manifest under the same name and sequence.
        """
        for known in self._entries.values():
            same = (known.publisher, known.name, known.sequence) == _claim(release)
            if same and known.digest != release.digest and known.info_hash != release.info_hash:
                raise EquivocationError(
                    f"publisher {release.publisher_id} signed two different releases of {release.manifest.name} "
                    f"with sequence {release.manifest.sequence}",
                    hint="Both statements are evidence; ask the publisher which one is meant.",
                    known=known.digest.hex(),
                    other=release.digest.hex(),
                )
        self._store.save_statement(statement)
        self._store.save_chain(release.chain)
        entry = _entry_of(release)
        self._entries[release.digest] = entry
        return entry

    def release(self, digest: bytes) -> Release:
        """The release of a kept statement, verified again from its bytes."""
        statement = self._store.load_statement(digest)
        if statement.digest != digest:
            raise NotFoundError(f"the kept statement {digest.hex()[:16]} was altered")
        return verify_statement(statement)

    def remove(self, info_hash: bytes) -> list[Entry]:
        """Forget every statement about a content; returns what was forgotten."""
        gone = self.about(info_hash)
        for entry in gone:
            self._store.remove_statement(entry.digest)
            del self._entries[entry.digest]
        return gone

    def entries(self) -> Iterable[Entry]:
        """Every entry, newest statement of a name first."""
        return sorted(self._entries.values(), key=lambda e: (str(e.name), -e.sequence, e.digest))

    def about(self, info_hash: bytes) -> list[Entry]:
        """Every statement about one content, highest sequence first."""
        return sorted((e for e in self._entries.values() if e.info_hash == info_hash), key=lambda e: (-e.sequence, e.digest))

    def highest_sequence(self, publisher: PublisherId, name: ModelName) -> int:
        """The highest sequence this publisher used for a name, as far as this node knows; 0 for none."""
        return max((e.sequence for e in self._entries.values() if (e.publisher, e.name) == (publisher, name)), default=0)

    def by_link(self, link: Link) -> Entry | None:
        """The very statement a link pins, if it is here."""
        return next((e for e in self._entries.values() if e.manifest_hash == link.manifest_hash), None)

    def by_name(self, ref: NameRef, book: TrustBook) -> Entry:
        """The current release of a name, by a publisher this node trusts for it.

        Raises:
            NotFoundError: no such release is known here.
            UnknownPublisherError: it is, but only from publishers not trusted for the name.
            UsageError: a shortened revision fits several.
        """
        found = self._named(ref)
        trusted = [e for e in found if book.is_trusted(e.publisher, e.name)]
        if not found:
            raise NotFoundError(f"{ref} is not known here", hint="Fetch it by its link, which says who signed it.")
        if not trusted:
            raise UnknownPublisherError(
                f"{ref} is known here only from {found[0].publisher}, whom this node does not trust for that name",
                hint=f"If you trust them: modelp2p trust add LINK --name {ref.name}",
                publisher=found[0].publisher,
            )
        return _newest(ref, trusted)

    def by_publisher(self, ref: NameRef, publisher: PublisherId) -> Entry:
        """The current release of a name by this publisher, whoever is trusted for it."""
        found = [e for e in self._named(ref) if e.publisher == publisher]
        if not found:
            raise NotFoundError(f"{ref} by {publisher} is not known here", hint="'modelp2p ls' shows what is.")
        return _newest(ref, found)

    def any_by_name(self, ref: NameRef, book: TrustBook) -> Entry:
        """Like `by_name`, for looking after what is here: where nobody is trusted for the name, any publisher will do."""
        found = self._named(ref)
        # A stranger's statement, known by a link, must not take the place of the one the user means.
        found = [e for e in found if book.is_trusted(e.publisher, e.name)] or found
        if not found:
            raise NotFoundError(f"{ref} is not known here", hint="'modelp2p ls' shows what is.")
        return _newest(ref, found)

    def _named(self, ref: NameRef) -> list[Entry]:
        return [
            e
            for e in self._entries.values()
            if e.name == ref.name and (ref.revision is None or e.revision.startswith(ref.revision))
        ]


def _newest(ref: NameRef, entries: list[Entry]) -> Entry:
    if ref.revision is not None and len({e.revision for e in entries}) > 1:
        raise UsageError(f"{ref} fits several revisions", hint="Give more digits of the revision.")
    return max(entries, key=lambda e: (e.sequence, e.created, e.digest))


def _claim(release: Release) -> tuple[PublisherId, ModelName, int]:
    return release.publisher_id, release.manifest.name, release.manifest.sequence


def _entry_of(release: Release) -> Entry:
    manifest = release.manifest
    return Entry(
        release.digest,
        manifest.name,
        manifest.revision,
        release.info_hash,
        release.manifest_hash,
        release.publisher_id,
        manifest.sequence,
        manifest.created,
        manifest.total_bytes,
        len(manifest.files),
    )
