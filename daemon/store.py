"""The home folder: what lies where, made safe once, and the small files in it (statements, records, jobs, trust, links).

Invariants:
- every path is resolved below one open descriptor of the home, without following links (`beneath`);
- a name that is visible (in `store`, `models`, `manifests`) means complete, verified and synced: each appears by rename;
- the folders of docs/DESIGN.md have their modes; a home of a newer version is refused, never touched.

The bytes of a release in transit are `folder.ReleaseFolder`; what is known about releases is `library.Library`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from modelp2p.daemon.beneath import make_dirs_beneath, open_beneath, remove_tree_beneath
from modelp2p.daemon.diskerror import on_disk
from modelp2p.daemon.files import atomic_symlink, fsync_dir, temporary_name, write_atomic
from modelp2p.protocol import layout
from modelp2p.protocol.errors import FormatError, ModelP2PError, NotFoundError, StoreError
from modelp2p.protocol.job import MAX_JOB_BYTES, Job, decode_job, encode_job, job_id
from modelp2p.protocol.publisher import MAX_CHAIN_BYTES, RootChain, decode_chain, encode_chain
from modelp2p.protocol.record import MAX_RECORD_BYTES, ReleaseRecord, decode_record, encode_record
from modelp2p.protocol.statement import FILE_LIMITS, Statement
from modelp2p.protocol.trust import MAX_BOOK_BYTES, TrustBook, decode_book, encode_book

if TYPE_CHECKING:
    from modelp2p.protocol.names import ModelName, PublisherId

log = logging.getLogger(__name__)

_VISIBLE = (layout.STORE, layout.MANIFESTS, layout.MODELS, layout.TRUST)
_BOOK = "book"
_CHAINS = f"{layout.TRUST}/publishers"
_VERSION_FILE = "version"


class Store:
    """One home. All methods block on the disk; call them from a thread where that matters."""

    def __init__(self, home: Path, fd: int) -> None:
        self.home = home
        self.fd = fd

    @classmethod
    def open(cls, home: Path) -> Self:
        """The home at `home`, made where it is missing.

        Raises:
            StoreError: it belongs to a newer version, or a private folder is open to others.
        """
        with on_disk(f"cannot open the home {home}"):
            home.mkdir(mode=0o755, parents=True, exist_ok=True)
            fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        store = cls(home, fd)
        try:
            store._check_version()
            for name in layout.PRIVATE:
                store._make_private(name)
            for name in _VISIBLE:
                make_dirs_beneath(fd, name, mode=0o755)
        except BaseException:
            os.close(fd)
            raise
        return store

    def __repr__(self) -> str:
        return f"<Store {self.home}>"

    def close(self) -> None:
        """Close the home's descriptor."""
        os.close(self.fd)

    def path(self, relative: str) -> Path:
        """The absolute path of a layout path, for messages and for the engine."""
        return self.home / relative

    # Statements

    def save_statement(self, statement: Statement) -> None:
        """Keep a verified statement; doing it again changes nothing."""
        target = layout.statement_of(statement.digest)
        if self._exists(target):
            return
        temporary = f"{layout.MANIFESTS}/{temporary_name(statement.digest.hex())}"
        make_dirs_beneath(self.fd, temporary, mode=0o755)
        with on_disk("cannot keep a statement"):
            folder = open_beneath(self.fd, temporary, os.O_RDONLY | os.O_DIRECTORY)
            try:
                for name, data in statement.files().items():
                    write_atomic(folder, name, data, 0o444)
            finally:
                os.close(folder)
            os.rename(self.path(temporary), self.path(target))
            fsync_dir(self.path(layout.MANIFESTS))

    def load_statement(self, digest: bytes) -> Statement:
        """The bytes of a kept statement; verified again by whoever uses them.

        Raises:
            NotFoundError: there is no such statement.
        """
        parts = {name: self._read(f"{layout.statement_of(digest)}/{name}", FILE_LIMITS[name]) for name in FILE_LIMITS}
        return Statement(parts["manifest"], parts["layers"], parts["publisher"])

    def statement_digests(self) -> Iterator[bytes]:
        """The ids of every kept statement."""
        for name in self._names(layout.MANIFESTS):
            if _is_digest(name):
                yield bytes.fromhex(name)

    def remove_statement(self, digest: bytes) -> None:
        """Forget a statement."""
        remove_tree_beneath(self.fd, layout.statement_of(digest))

    # Records and visible names

    def save_record(self, record: ReleaseRecord) -> None:
        """Write the record beside a visible tree."""
        folder = f"{layout.STORE}/{record.info_hash.hex()}"
        make_dirs_beneath(self.fd, folder, mode=0o755)
        write_atomic(self.path(folder), layout.RECORD, encode_record(record), 0o644)

    def load_record(self, info_hash: bytes) -> ReleaseRecord | None:
        """The record of a release, or None where it has none."""
        try:
            return decode_record(self._read(layout.record_of(info_hash), MAX_RECORD_BYTES))
        except NotFoundError:
            return None
        except FormatError as exc:
            # A convenience, rebuilt from the journal: a rotten one counts as none.
            log.warning("the record of %s is not used: %s", info_hash.hex()[:16], exc.message)
            return None

    def show_model(self, name: ModelName, publisher: PublisherId, info_hash: bytes, revision: str, *, named: bool) -> Path:
        """Give a release its visible path: a relative symlink into the store, made atomically.

        Returns the path. `named`: this node trusts the publisher for the name.
        """
        link = self.model_path(name, publisher, revision, named=named)
        target = os.path.relpath(self.path(layout.tree_of(info_hash, revision)), link.parent)
        atomic_symlink(target, link)
        return link

    def model_path(self, name: ModelName, publisher: PublisherId, revision: str, *, named: bool) -> Path:
        """Where a release is or would be visible."""
        return self.path(layout.model_of(name, revision) if named else layout.unnamed_model_of(publisher, name, revision))

    def hide_model(self, path: Path) -> None:
        """Remove a visible path and the folders it leaves empty."""
        with on_disk(f"cannot remove {path}"):
            if path.is_symlink():
                path.unlink()
            for folder in path.parents:
                if folder == self.path(layout.MODELS) or not folder.exists() or any(folder.iterdir()):
                    break
                folder.rmdir()

    # Detached fetches

    def save_job(self, job: Job) -> None:
        """Keep a detached fetch; doing it again changes nothing."""
        data = encode_job(job)
        write_atomic(self.path(layout.JOBS), job_id(data).hex(), data, 0o600)

    def jobs(self) -> Iterator[Job]:
        """Every kept detached fetch; one that cannot be used is logged and left where it is."""
        for name in self._names(layout.JOBS):
            if not _is_digest(name):
                continue
            try:
                yield self._load_job(name)
            except NotFoundError:
                continue  # it was done meanwhile
            except ModelP2PError as exc:
                # One that cannot be read costs that job, not the node.
                log.error("the detached fetch %s is not used: %s", self.path(f"{layout.JOBS}/{name}"), exc.message)

    def remove_job(self, job_id: bytes) -> bool:
        """Forget a detached fetch; False where there was none."""
        return remove_tree_beneath(self.fd, layout.job_of(job_id))

    # Trust

    def load_book(self) -> TrustBook:
        """Which publisher may use which name."""
        try:
            return decode_book(self._read(f"{layout.TRUST}/{_BOOK}", MAX_BOOK_BYTES))
        except NotFoundError:
            return TrustBook()

    def save_book(self, book: TrustBook) -> None:
        """Write the trust book."""
        write_atomic(self.path(layout.TRUST), _BOOK, encode_book(book), 0o644)

    def load_chain(self, publisher: PublisherId) -> RootChain | None:
        """The newest root chain known of a publisher, verified again."""
        try:
            chain = decode_chain(self._read(f"{_CHAINS}/{publisher}", MAX_CHAIN_BYTES))
        except NotFoundError:
            return None
        if chain.publisher_id != publisher:
            raise StoreError(f"the stored root chain of {publisher} belongs to {chain.publisher_id}")
        return chain

    def save_chain(self, chain: RootChain) -> None:
        """Keep a publisher's root chain, if it is longer than the one here."""
        known = self.load_chain(chain.publisher_id)
        if known is not None and len(known.documents) >= len(chain.documents):
            return
        make_dirs_beneath(self.fd, _CHAINS, mode=0o755)
        write_atomic(self.path(_CHAINS), chain.publisher_id, encode_chain(chain.documents), 0o644)

    # Plain pieces

    def names(self, relative: str) -> list[str]:
        """The names in a folder of the layout; empty where it does not exist."""
        return self._names(relative)

    def remove(self, relative: str) -> bool:
        """Remove a file or tree below the home; False where there was none."""
        return remove_tree_beneath(self.fd, relative)

    def _check_version(self) -> None:
        try:
            text = self._read(_VERSION_FILE, 32).decode("ascii", "replace").strip()
        except NotFoundError:
            write_atomic(self.home, _VERSION_FILE, f"{layout.HOME_VERSION}\n".encode(), 0o644)
            return
        if not text.isdigit() or int(text) > layout.HOME_VERSION:
            raise StoreError(
                f"the home {self.home} has version '{text}', and this modelp2p knows up to {layout.HOME_VERSION}",
                hint="Update modelp2p, or choose another home with MODELP2P_HOME.",
            )

    def _load_job(self, name: str) -> Job:
        data = self._read(f"{layout.JOBS}/{name}", MAX_JOB_BYTES)
        job = decode_job(data)
        if job_id(data).hex() != name:
            raise FormatError("its bytes are not those it is named after")
        return job

    def _make_private(self, name: str) -> None:
        make_dirs_beneath(self.fd, name, mode=0o700)
        with on_disk(f"cannot check {name}"):
            folder = open_beneath(self.fd, name, os.O_RDONLY | os.O_DIRECTORY)
            try:
                stat = os.fstat(folder)
            finally:
                os.close(folder)
        if stat.st_uid != os.geteuid() or stat.st_mode & 0o077:
            raise StoreError(
                f"{self.path(name)} must belong to you alone (mode 0700), not {stat.st_mode & 0o777:04o}",
                hint=f"chmod 700 '{self.path(name)}'",
            )

    def _names(self, relative: str) -> list[str]:
        try:
            fd = open_beneath(self.fd, relative, os.O_RDONLY | os.O_DIRECTORY)
        except NotFoundError:
            return []
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def _exists(self, relative: str) -> bool:
        try:
            os.close(open_beneath(self.fd, relative, os.O_PATH))
        except NotFoundError:
            return False
        return True

    def _read(self, relative: str, limit_bytes: int) -> bytes:
        fd = open_beneath(self.fd, relative, os.O_RDONLY)
        try:
            with on_disk(f"cannot read {relative}"):
                size = os.fstat(fd).st_size
                if size > limit_bytes:
                    raise StoreError(f"{self.path(relative)} has {size} bytes, more than the limit of {limit_bytes}")
                data = bytearray()
                while len(data) < size and (chunk := os.pread(fd, size - len(data), len(data))):
                    data += chunk
                return bytes(data)
        finally:
            os.close(fd)


def _is_digest(name: str) -> bool:
    return len(name) == 64 and all(c in "0123456789abcdef" for c in name)
