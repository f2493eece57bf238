"""`show --lineage`: what a release was made from, and what that was made from, as far as statements on this node tell.

Invariants:
- a base counts as here only if the statement here is about the very content that was pinned; another one under its name is said;
- what a publisher states about a base stays their word: a row's standing is that of the base's own publisher for the base's name;
- no content is followed twice, because two statements can name each other, and at most `MAX_ROWS` and `MAX_LEVELS` are told.

It deliberately asks nobody else: what is not on this node is told as it was stated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

from modelp2p.cli.output import out, table
from modelp2p.cli.shown import shown
from modelp2p.protocol.errors import NotFoundError
from modelp2p.protocol.manifest import MAX_MANIFEST_BYTES

if TYPE_CHECKING:
    from modelp2p.cli.connection import Client
    from modelp2p.cli.results import Row

MAX_LEVELS = 32
"""Bases of bases that are followed; families of real models are some four levels deep."""
MAX_ROWS = 256
"""Rows in all: a statement may name 64 bases, each of which may do so again."""
Look: TypeAlias = Callable[[str], "Row | None"]
"""What `show` tells of `org/model@revision`; None where no statement about it is here."""


class Standing(Enum):
    """Who vouches for a release on this node."""

    TRUSTED = "trusted"
    UNTRUSTED = "untrusted"
    NOT_HERE = "not_here"
    OTHER_CONTENT = "other_content"


class End(Enum):
    """Why the bases of a row do not follow it."""

    CIRCLE = "circle"
    AGAIN = "again"
    LIMIT = "limit"


_WORDS = {
    Standing.TRUSTED: "trusted for the name",
    Standing.UNTRUSTED: "not trusted for the name",
    Standing.NOT_HERE: "statement not here",
    Standing.OTHER_CONTENT: "the statement here is about other content",
    End.AGAIN: "as above",
    End.LIMIT: "its bases are not followed",
}


@dataclass(frozen=True, slots=True)
class Link:
    """One row of a lineage: the release itself first, at depth 0, each base below what was made from it."""

    depth: int
    relation: str
    """What the release above was made by; empty for the first."""
    name: str
    revision: str
    info_hash: str
    standing: Standing
    publisher: str
    """Who signed the statement here; empty where none is."""
    end: End | None = None
    circle: tuple[str, ...] = ()
    """All that name each other, from this release down to the one that names it again."""

    def as_map(self) -> dict[str, object]:
        """As `--json` tells it."""
        return {
            "depth": self.depth,
            "relation": self.relation or None,
            "name": self.name,
            "revision": self.revision,
            "info_hash": self.info_hash,
            "standing": self.standing.value,
            "publisher": self.publisher or None,
            "end": self.end.value if self.end else None,
            "circle": list(self.circle),
        }


def lineage_of(release: Row, look: Look) -> list[Link]:
    """The lineage of what `show` told about a release; asks `look` once for each base."""
    return _Walk(look).follow(release, _Known.of(release), "", ())


def looking_at(client: Client) -> Look:
    """`show` of a daemon."""

    def look(ref: str) -> Row | None:
        try:
            reply = client.call("show", {"ref": ref})
        except NotFoundError:
            return None
        return shown(reply.result, reply.read_fds(MAX_MANIFEST_BYTES))

    return look


def show_lineage(links: list[Link]) -> None:
    """Print it, each base indented below what was made from it."""
    rows = [(_release_text(link), link.publisher, _standing_text(link)) for link in links]
    for line in table(("RELEASE", "PUBLISHER", "STANDING"), rows):
        out(line)


@dataclass(frozen=True, slots=True)
class _Known:
    """What is kept of a statement that was looked at: files are left behind, of which it may name 10,000."""

    standing: Standing
    publisher: str = ""
    bases: tuple[Row, ...] = ()

    @classmethod
    def of(cls, found: Row) -> _Known:
        standing = Standing.TRUSTED if found.flag("name_verified") else Standing.UNTRUSTED
        return cls(standing, found.text("publisher"), tuple(found.rows("lineage")))


@dataclass(slots=True)
class _Walk:
    look: Look
    seen: dict[tuple[str, str], _Known] = field(default_factory=dict)
    followed: set[tuple[str, str]] = field(default_factory=set)
    """Those whose bases are in a row already."""
    rows: int = 1

    def follow(self, pinned: Row, known: _Known, relation: str, path: tuple[tuple[str, str], ...]) -> list[Link]:
        key = (pinned.ref, pinned.text("info_hash"))
        end: End | None = None
        circle: tuple[str, ...] = ()
        if key in path:
            end, circle = End.CIRCLE, tuple(ref for ref, _ in path[path.index(key) :])
        elif key in self.followed:
            end = End.AGAIN
        elif known.bases and (len(path) == MAX_LEVELS or self.rows + len(known.bases) > MAX_ROWS):
            end = End.LIMIT
        self.seen[key] = known
        name, revision = pinned.text("name"), pinned.text("revision")
        link = Link(len(path), relation, name, revision, key[1], known.standing, known.publisher, end, circle)
        if end is not None:
            return [link]
        if known.bases:
            self.followed.add(key)
        self.rows += len(known.bases)
        below = [self.follow(base, self._known(base), base.text("relation"), (*path, key)) for base in known.bases]
        return [link, *(item for links in below for item in links)]

    def _known(self, pinned: Row) -> _Known:
        info_hash = pinned.text("info_hash")
        if (seen := self.seen.get((pinned.ref, info_hash))) is not None:
            return seen
        found = self.look(pinned.ref)
        if found is None:
            return _Known(Standing.NOT_HERE)
        return _Known.of(found) if found.text("info_hash") == info_hash else _Known(Standing.OTHER_CONTENT)


def _release_text(link: Link) -> str:
    what = f"{link.relation} of " if link.relation else ""
    return f"{'  ' * link.depth}{what}{_short(f'{link.name}@{link.revision}')}"


def _standing_text(link: Link) -> str:
    words = _WORDS[link.standing]
    if link.end is End.CIRCLE:
        return f"{words}; in a circle: {' from '.join(map(_short, (*link.circle, link.circle[0])))}"
    return words if link.end is None else f"{words}; {_WORDS[link.end]}"


def _short(ref: str) -> str:
    name, _, revision = ref.partition("@")
    return f"{name}@{revision[:12]}"
