"""What the loader reads of a home on disk: pins, root chains, statements and records. It writes nothing and asks no daemon.

Everything read here is judged elsewhere: statements by their signatures, names by the pins. A record alone is believed for
what it says, and therefore counts only if nobody could have written it who could not have changed the files as well.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from modelp2p.protocol import layout
from modelp2p.protocol.errors import FormatError, StoreError
from modelp2p.protocol.names import ModelName, PublisherId, check_revision
from modelp2p.protocol.publisher import MAX_CHAIN_BYTES, RootChain, decode_chain
from modelp2p.protocol.record import MAX_RECORD_BYTES, ReleaseRecord, decode_record
from modelp2p.protocol.statement import FILE_LIMITS, Statement
from modelp2p.protocol.trust import MAX_BOOK_BYTES, TrustBook, decode_book

_TREE = re.compile(rf"(?P<home>/.*|)/{layout.STORE}/(?P<info_hash>[0-9a-f]{{64}})/(?P<revision>[0-9a-f]{{40}})")


@dataclass(frozen=True, slots=True)
class Tree:
    """A visible tree: the folder with the files of one release in the store of some home."""

    home: str
    info_hash: bytes
    revision: str

    @property
    def path(self) -> str:
        """The folder."""
        return os.path.join(self.home, layout.tree_of(self.info_hash, self.revision))


def default_home() -> str:
    """`MODELP2P_HOME`, else `modelp2p` in the user's data folder (XDG base directories), as the command line has it."""
    if chosen := os.environ.get("MODELP2P_HOME"):
        return os.path.abspath(os.path.expanduser(chosen))
    data = os.environ.get("XDG_DATA_HOME", "")
    return os.path.join(data if os.path.isabs(data) else os.path.expanduser("~/.local/share"), "modelp2p")


def home_at(home: str | os.PathLike[str] | None) -> str:
    """The home a caller names, as an absolute path; the default one for None."""
    return default_home() if home is None else os.path.abspath(os.path.expanduser(os.fspath(home)))


def tree_at(path: str) -> Tree | None:
    """The visible tree that `path` is, links followed; None for any other place."""
    found = _TREE.fullmatch(os.path.realpath(path))
    return Tree(found["home"], bytes.fromhex(found["info_hash"]), found["revision"]) if found else None


def book_of(home: str) -> TrustBook:
    """The user's pins; an empty book where there are none."""
    data = read_file(os.path.join(home, layout.TRUST, "book"), MAX_BOOK_BYTES)
    return TrustBook() if data is None else decode_book(data)


def chain_of(home: str, publisher: PublisherId, *, unless: bytes = b"") -> RootChain | None:
    """This home's root chain of a publisher; None where there is none, or it is the one in `unless`, byte for byte.

    To parse and verify a chain costs 2 ms, most of what a load costs that hashes nothing.

    Raises:
        FormatError: the file holds another publisher's.
    """
    data = read_file(os.path.join(home, layout.TRUST, "publishers", publisher), MAX_CHAIN_BYTES)
    if data is None or data == unless:
        return None
    chain = decode_chain(data)
    if chain.publisher_id != publisher:
        raise FormatError(f"the root chain kept for {publisher} belongs to {chain.publisher_id}")
    return chain


def statements_of(home: str, digests: tuple[bytes, ...] | None) -> Iterator[Statement]:
    """The statements with these digests that are here; all there are for None."""
    folder = os.path.join(home, layout.MANIFESTS)
    names = names_in(folder) if digests is None else [digest.hex() for digest in digests]
    for name in names:
        parts = {part: read_file(os.path.join(folder, name, part), limit) for part, limit in FILE_LIMITS.items()}
        envelope, layers, publisher = parts["manifest"], parts["layers"], parts["publisher"]
        if envelope is not None and layers is not None and publisher is not None:
            yield Statement(envelope, layers, publisher)


def trees_named(home: str, name: ModelName, publisher: PublisherId | None) -> list[Tree]:
    """The trees this home shows under a name; with a publisher also those whose name is not verified."""
    shown = [layout.model_of(name, "")]
    if publisher is not None:
        shown.append(layout.unnamed_model_of(publisher, name, ""))
    found: dict[str, Tree] = {}
    for folder in (os.path.join(home, path) for path in shown):
        for revision in names_in(folder):
            tree = tree_at(os.path.join(folder, revision))
            if tree is not None and tree.revision == revision and os.path.realpath(home) == tree.home:
                found[tree.path] = tree
    return list(found.values())


def record_of(tree: Tree, own_home: str) -> ReleaseRecord | None:
    """What the store's record says about a tree, where it counts; None where it is absent, unsafe, foreign or unreadable.

    It counts if the record, its folder and the store belong to root or this user and no other may write to them. The owner
    of the store of `own_home`, the home the caller chose, is as good as this user: a service may run under its own.
    """
    path = os.path.join(tree.home, layout.record_of(tree.info_hash))
    try:
        places = [os.lstat(path), os.lstat(os.path.dirname(path)), os.lstat(os.path.join(tree.home, layout.STORE))]
    except OSError:
        return None
    if not counts(places[0], places[1], places[2], user=os.geteuid(), is_own_home=os.path.realpath(own_home) == tree.home):
        return None
    data = read_file(path, MAX_RECORD_BYTES)
    try:
        record = None if data is None else decode_record(data)
    except FormatError:
        # Damaged or of a newer version: it saves no work then, and that is all a record does.
        return None
    if record is None or record.info_hash != tree.info_hash or record.revision != check_revision(tree.revision):
        return None
    return record


def counts(record: os.stat_result, folder: os.stat_result, store: os.stat_result, *, user: int, is_own_home: bool) -> bool:
    """Whether a record with this `lstat`, in this folder of this store, may be believed by `user` (see `record_of`)."""
    owners = {0, user, *([store.st_uid] if is_own_home else [])}
    places = (record, folder, store)
    return stat.S_ISREG(record.st_mode) and not any(it.st_uid not in owners or it.st_mode & 0o022 for it in places)


def names_in(folder: str) -> list[str]:
    """What lies in a folder, sorted; nothing where there is no such folder.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise StoreError(f"{folder} cannot be read: {exc.strerror}") from exc


def read_file(path: str, max_bytes: int) -> bytes | None:
    """A whole small file; None where there is none.

    Raises:
        FormatError: larger than `max_bytes`.
        StoreError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise StoreError(f"{path} cannot be read: {exc.strerror}") from exc
    if len(data) > max_bytes:
        raise FormatError(f"{path} is larger than {max_bytes} bytes")
    return data
