"""From a reference to a verified statement and the folder its files lie in.

A reference is one of:
- `org/model`, `org/model@revision`: what the home shows under that name. Without a revision the highest sequence wins among the
  statements that are believed; a revision may be shortened to 7 digits;
- a link: the release it pins, from the home's store;
- a path: text starting with `/`, `./` or `../`, or ending in `.modelp2p`, or any `os.PathLike`.
  A visible tree (or a link to one, as below `models/`) brings its statements and record along. Any other folder needs one
  bundle: `*.modelp2p` inside it, else `<folder>.modelp2p` beside it. A bundle file means the folder it lies in, else the
  folder beside it with its name, else the home's store, whichever first has a file of the release.

Whom to believe: `publisher=` if given, the link's publisher, else the pins of `home`. A path never brings its own pins: who
made up the folder would have made up those as well. Signatures are checked here, whatever a daemon has said about them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelp2p.loader import home as homes
from modelp2p.loader.home import Tree
from modelp2p.protocol import layout
from modelp2p.protocol.errors import FormatError, NotFoundError, UnknownPublisherError, UntrustedError, UsageError
from modelp2p.protocol.links import Link, parse_link
from modelp2p.protocol.names import BundleRef, LinkRef, ModelName, NameRef, PublisherId, check_publisher_id, parse_ref
from modelp2p.protocol.publisher import claimed_publisher
from modelp2p.protocol.statement import MAX_BUNDLE_BYTES, Release, Statement, decode_bundle, verify_statement
from modelp2p.protocol.trust import TrustBook, admit

if TYPE_CHECKING:
    from modelp2p.protocol.record import ReleaseRecord

BUNDLE_SUFFIX = ".modelp2p"


@dataclass(frozen=True, slots=True)
class Located:
    """A verified and believed release, and where its files should be."""

    release: Release
    directory: str
    record: ReleaseRecord | None
    """What the store proved about the files; None outside a store, or where it does not count."""
    is_name_verified: bool


@dataclass(slots=True)
class Believer:
    """Whose statements count for this load."""

    home: str
    publisher: PublisherId | None
    link: Link | None = None
    _book: TrustBook | None = field(default=None)

    def proven(self, statement: Statement) -> Release:
        """The release a statement proves, by the newest keys of its publisher known here.

        Raises:
            FormatError, UntrustedError: it proves nothing.
        """
        publisher = claimed_publisher(statement.publisher)
        return verify_statement(statement, homes.chain_of(self.home, publisher, unless=statement.publisher))

    def believes(self, release: Release) -> bool:
        """Return whether the pins give its name to its publisher, if the release may be loaded at all.

        Raises:
            UntrustedError: it is not what the link pins.
            UnknownPublisherError: nobody vouched for its publisher.
        """
        if self._book is None:
            self._book = homes.book_of(self.home)
        if self.publisher is not None and release.publisher_id != self.publisher:
            raise UnknownPublisherError(
                f"{release.ref} is signed by {release.publisher_id}, not by {self.publisher}", publisher=release.publisher_id
            )
        if self.publisher is None or self.link is not None:
            return admit(release, self._book, self.link)
        return self._book.is_trusted(release.publisher_id, release.manifest.name)


def locate(ref: str | os.PathLike[str], *, publisher: str | None, home: str) -> Located:
    """The release `ref` means. Nothing about its files is checked yet.

    Raises:
        UsageError: not a reference.
        NotFoundError: no such release here.
        UntrustedError: its statement does not hold (FormatError), or nobody vouches for its publisher (UnknownPublisherError).
    """
    believer = Believer(home, _publisher(publisher))
    parsed = BundleRef(os.fspath(ref)) if isinstance(ref, os.PathLike) else parse_ref(ref)
    match parsed:
        case NameRef():
            return _by_name(parsed, believer)
        case LinkRef(text):
            return _by_link(parse_link(text), believer)
        case BundleRef(path):
            path = os.path.expanduser(path)
            if os.path.isdir(path):
                return _by_folder(path, believer)
            return _by_bundle(path, believer)


def _by_name(ref: NameRef, believer: Believer) -> Located:
    trees = homes.trees_named(believer.home, ref.name, believer.publisher)
    if ref.revision is not None:
        trees = [tree for tree in trees if tree.revision.startswith(ref.revision)]
        if len({tree.revision for tree in trees}) > 1:
            raise UsageError(f"'{ref}' is short for several revisions here", hint="Give more digits of the revision.")
    if not trees:
        hint = f"Fetch it first: modelp2p fetch {ref}. In another home? Set MODELP2P_HOME or pass home=."
        raise NotFoundError(f"{ref} is not here", hint=hint)
    believed: list[Located] = []
    refused: list[UntrustedError | NotFoundError] = []
    for tree in trees:
        try:
            believed.append(_by_tree(tree, believer, ref.name))
        except (UntrustedError, NotFoundError) as exc:
            refused.append(exc)
    if not believed:
        raise refused[0]
    return max(believed, key=lambda located: located.release.manifest.sequence)


def _by_link(link: Link, believer: Believer) -> Located:
    believer.link = link
    folder = os.path.dirname(os.path.join(believer.home, layout.record_of(link.info_hash)))
    for revision in homes.names_in(folder):
        tree = homes.tree_at(os.path.join(folder, revision))
        if tree is not None:
            return _by_tree(tree, believer, link.name)
    raise NotFoundError(f"the release of this link ({link.name}) is not here", hint="Fetch it first: modelp2p fetch LINK.")


def _by_folder(path: str, believer: Believer) -> Located:
    tree = homes.tree_at(path)
    if tree is not None:
        return _by_tree(tree, believer, None)
    path = os.path.realpath(path)
    inside = [name for name in homes.names_in(path) if name.endswith(BUNDLE_SUFFIX)]
    if len(inside) > 1:
        raise UsageError(f"several bundles lie in '{path}'", hint=f"Name the one you mean: {os.path.join(path, inside[0])}")
    bundle = os.path.join(path, inside[0]) if inside else path + BUNDLE_SUFFIX
    release = believer.proven(_bundle(bundle, f"'{path}' has no bundle inside or beside it"))
    return Located(release, path, None, believer.believes(release))


def _by_bundle(path: str, believer: Believer) -> Located:
    release = believer.proven(_bundle(path, f"there is no '{path}'"))
    is_named = believer.believes(release)
    path = os.path.realpath(path)
    for folder in (os.path.dirname(path), path.removesuffix(BUNDLE_SUFFIX)):
        if any(os.path.isfile(os.path.join(folder, entry.path)) for entry in release.manifest.files):
            return Located(release, folder, None, is_named)
    tree = Tree(os.path.realpath(believer.home), release.info_hash, release.manifest.revision)
    if os.path.isdir(tree.path):
        return Located(release, tree.path, homes.record_of(tree, believer.home), is_named)
    raise NotFoundError(f"the files of {release.ref} are not here", hint=f"Fetch them first: modelp2p fetch {path}")


def _by_tree(tree: Tree, believer: Believer, name: ModelName | None) -> Located:
    record = homes.record_of(tree, believer.home)
    refused: list[UntrustedError] = []
    found = _believed(homes.statements_of(tree.home, record.statements if record else None), tree, believer, name, refused)
    if not found and record is not None:
        # The record names the statements of its time; one that is believed may have come later.
        found = _believed(homes.statements_of(tree.home, None), tree, believer, name, refused)
    if not found and refused:
        raise refused[0]
    if not found:
        ref = f"{name}@{tree.revision}" if name else tree.path
        raise NotFoundError(f"no signed statement about {ref} is here", hint=f"Fetch it again: modelp2p fetch {name or 'REF'}")
    release, is_named = max(found, key=lambda it: it[0].manifest.sequence)
    return Located(release, tree.path, record, is_named)


def _believed(
    statements: Iterable[Statement],
    tree: Tree,
    believer: Believer,
    name: ModelName | None,
    refused: list[UntrustedError],
) -> list[tuple[Release, bool]]:
    """The statements about this tree that hold and are believed; why others are not is added to `refused`."""
    found: list[tuple[Release, bool]] = []
    for statement in statements:
        try:
            release = believer.proven(statement)
            if (release.info_hash, release.manifest.revision) != (tree.info_hash, tree.revision):
                continue
            if name is None or release.manifest.name == name:
                found.append((release, believer.believes(release)))
        except UntrustedError as exc:
            refused.append(exc)
    return found


def _bundle(path: str, absence: str) -> Statement:
    data = homes.read_file(path, MAX_BUNDLE_BYTES)
    if data is None:
        raise NotFoundError(absence, hint="A folder is loaded with the .modelp2p bundle its publisher gave out.")
    return decode_bundle(data)


def _publisher(text: str | None) -> PublisherId | None:
    if text is None:
        return None
    try:
        return check_publisher_id(text)
    except FormatError as exc:
        raise UsageError(exc.message, hint=exc.hint) from exc
