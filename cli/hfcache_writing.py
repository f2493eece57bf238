"""A release as a model of the Hugging Face cache: blobs, then the listing, then the snapshot, then the ref.

Invariants:
- a blob is a file that the daemon has proven and that nobody touched since, under the digest it was proven to have;
- what is in the cache is never overwritten: a blob of the right size is left alone, anything else is refused before a byte is
  written;
- every step is one rename or link, so that it can stop anywhere, run twice, run twice at once, and beside huggingface_hub;
- nothing is written outside the model's folder, whatever links it holds, and no symlink of a snapshot leads into the store:
  clients that remove a snapshot would delete what it points to.

A blob is a hard link to the store's file, else a reflink. Where both cannot be, it is a symlink if the store is another user's
(whose files nobody else can delete), else a copy. A file that the store itself has only borrowed is never linked: its owner may
write to it.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from modelp2p.cli.local_dir import umask
from modelp2p.cli.units import size_text
from modelp2p.protocol import gitids, hfcache, layout
from modelp2p.protocol.errors import CorruptError, NoSpaceError, NotFoundError, StoreError
from modelp2p.protocol.hfcache import Listed

if TYPE_CHECKING:
    from modelp2p.daemon.linking import Way
    from modelp2p.protocol.manifest import FileEntry, Manifest
    from modelp2p.protocol.record import ReleaseRecord

How = Literal["there", "link", "reflink", "symlink", "copy"]


@dataclass(frozen=True, slots=True)
class Materialized:
    """What `materialize` made of a release."""

    snapshot: str
    """The folder that clients of the Hub will be given, absolute."""
    files: int
    """How many files of the release are in it."""
    missing: int
    """How many are not, because they are not in the store."""
    linked: int
    """How many blobs are new names of the store's own inodes."""
    copied_bytes: int


def materialize(tree: str, manifest: Manifest, cache: str, tell: Callable[[str], None], *, moves_main: bool) -> Materialized:
    """Put every file of the visible `tree` that is proven whole into `cache`; `tell` hears of it before a copy is made.

    `moves_main`: the name means this revision from now on; else it keeps the one it has, if it has one.

    Raises:
        NotFoundError: no file of the release is here.
        StoreError: the cache holds something else under one of its names; nothing was changed then. Or the disk refused.
        NoSpaceError: a copy was needed and does not fit.
        CorruptError: a file of the store is not what was proven.
    """
    from modelp2p.daemon.diskerror import on_disk

    real = os.path.realpath(tree)
    record = _record_of(real, manifest)
    # The folder of a model may be a link of the user's to a larger disk; below it none is followed.
    repo = os.path.realpath(os.path.join(cache, hfcache.repo_folder(manifest.name)))
    with on_disk(f"cannot use the Hugging Face cache '{cache}'"):
        os.makedirs(repo, exist_ok=True)
        fd = os.open(repo, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with on_disk(f"cannot read '{real}'"):
            source = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return _Writer(fd, repo, source, real, record, manifest, tell).run(moves_main=moves_main)
        finally:
            os.close(source)
    finally:
        os.close(fd)


def _record_of(tree: str, manifest: Manifest) -> ReleaseRecord:
    """What the daemon proved about the files of a visible tree.

    Raises:
        NotFoundError: nothing.
        StoreError: somebody else may have written it.
    """
    from modelp2p.daemon.diskerror import on_disk
    from modelp2p.protocol.record import MAX_RECORD_BYTES, decode_record

    path = os.path.join(os.path.dirname(tree), layout.RECORD)
    with on_disk(f"cannot read the record of {manifest.name}"):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        found, owner = os.fstat(fd), os.stat(tree).st_uid
        if found.st_uid not in (0, os.geteuid(), owner) or found.st_mode & 0o022:
            raise StoreError(f"'{path}' could have been written by somebody else", hint=f"modelp2p verify {manifest.name}")
        record = decode_record(file.read(MAX_RECORD_BYTES + 1))
    if (record.info_hash, record.revision) != (manifest.info_hash, manifest.revision):
        raise StoreError(f"'{path}' is the record of another release", path=path)
    return record


@dataclass(slots=True)
class _Writer:
    """One run, with the folders it reads and writes open."""

    repo: int
    repo_path: str
    source: int
    source_path: str
    record: ReleaseRecord
    manifest: Manifest
    tell: Callable[[str], None]
    mode: int = field(default_factory=lambda: 0o777 & ~umask())
    is_copying: bool = False

    def run(self, *, moves_main: bool) -> Materialized:
        manifest = self.manifest
        here = [entry for entry in manifest.files if self._is_whole(entry)]
        if not here:
            raise NotFoundError(f"no finished file of {manifest.name} is here", hint=f"modelp2p fetch {manifest.name}")
        tree = hfcache.tree_of(manifest.revision)
        is_listed = self._check(here, tree)
        ways = [self._place(entry) for entry in here]
        if not is_listed:
            self._write(tree, hfcache.encode_tree(map(Listed.of, manifest.files)), replace=True)
        for entry in here:
            self._point(Listed.of(entry))
        if self._ref() != manifest.revision:
            self._write(hfcache.MAIN, manifest.revision.encode(), replace=moves_main)
        return Materialized(
            os.path.join(self.repo_path, hfcache.snapshot_of(manifest.revision)),
            len(here),
            len(manifest.files) - len(here),
            ways.count("link"),
            sum(entry.size for entry, way in zip(here, ways, strict=True) if way == "copy"),
        )

    def _is_whole(self, entry: FileEntry) -> bool:
        from modelp2p.daemon.beneath import open_beneath

        known = self.record.files.get(entry.path)
        if known is None or known.root != entry.root:
            return False
        try:
            fd = open_beneath(self.source, entry.path, os.O_PATH)
        except NotFoundError:
            return False
        try:
            # Not ctime: a link made by anybody alters it.
            return known.matches(os.fstat(fd), ignore_ctime=True)
        finally:
            os.close(fd)

    def _check(self, here: Sequence[FileEntry], tree: str) -> bool:
        """Refuse what is in the way before anything is written; True where the listing exists."""
        manifest = self.manifest
        snapshot = hfcache.snapshot_of(manifest.revision)
        for folder in (hfcache.BLOBS, hfcache.TREES, hfcache.SNAPSHOTS, snapshot, hfcache.REFS):
            if os.path.islink(f"{self.repo_path}/{folder}"):
                raise StoreError(
                    f"'{self.repo_path}/{folder}' is a link, and nothing is written through it",
                    hint="Remove it. To keep a model on another disk, make its whole folder a link.",
                )
        known = self._read(tree, hfcache.MAX_TREE_BYTES)
        if known is not None and hfcache.decode_tree(known) != tuple(map(Listed.of, manifest.files)):
            raise StoreError(
                f"the cache knows {manifest.name}@{manifest.revision} with other files than were signed",
                hint=f"If you believe the publisher, remove '{self.repo_path}/{tree}'. Nothing was changed.",
            )
        for entry in here:
            item = Listed.of(entry)
            for path in (hfcache.blob_of(item), hfcache.snapshot_of(manifest.revision, item.path)):
                size = self._size(path)
                if size not in (None, item.size):
                    raise StoreError(
                        f"'{self.repo_path}/{path}' has {size} bytes instead of {item.size}",
                        hint="Remove it: it is not what its name says. Nothing was changed.",
                        path=path,
                    )
        return known is not None

    def _size(self, path: str) -> int | None:
        """Bytes of a file of the cache; None where it does not exist or is a symlink to nothing."""
        from modelp2p.daemon.diskerror import disk_error

        try:
            found = os.stat(path, dir_fd=self.repo)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise disk_error(exc, f"cannot look at '{self.repo_path}/{path}'") from exc
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"'{self.repo_path}/{path}' is not a file", hint="Remove it. Nothing was changed.", path=path)
        return found.st_size

    def _place(self, entry: FileEntry) -> How:
        """Make the blob of a file."""
        from modelp2p.daemon.beneath import open_beneath

        blob = hfcache.blob_of(Listed.of(entry))
        if self._size(blob) is not None:
            return "there"
        known = self.record.files[entry.path]
        fd = open_beneath(self.source, entry.path, os.O_RDONLY)
        try:
            # The daemon proves the SHA-256 of a file, and takes a git blob id as stated; here it becomes a name.
            is_right = entry.git_sha1 is None or gitids.blob_id(os.pread(fd, entry.size + 1, 0)) == entry.git_sha1
            if not is_right or not known.matches(os.fstat(fd), ignore_ctime=True):
                raise CorruptError(f"'{entry.path}' is not what was signed", hint=f"modelp2p verify {self.manifest.name}")
            self._drop_dangling(blob)
            return self._place_by(fd, entry, blob, ("reflink",) if known.borrowed else ("link", "reflink"))
        finally:
            os.close(fd)

    def _place_by(self, fd: int, entry: FileEntry, blob: str, ways: Sequence[Way]) -> How:
        from modelp2p.daemon.linking import place_copy

        try:
            way = place_copy(fd, self.repo, blob, ways, folder_mode=self.mode)
        except StoreError as exc:
            if self._size(blob) == entry.size:
                return "there"  # somebody else was faster
            if type(exc) is not StoreError or "copy" in ways:
                raise
            if os.fstat(self.source).st_uid != os.geteuid():
                return self._point_at_store(entry, blob)
            self._prepare_to_copy(entry)
            return self._place_by(fd, entry, blob, ("copy",))
        if way != "link":
            os.chmod(blob, self.mode & 0o666, dir_fd=self.repo)
        return way

    def _prepare_to_copy(self, entry: FileEntry) -> None:
        """Before the first copy: see that all that are needed fit, and say what is about to happen."""
        from modelp2p.daemon.space import KEEP_FREE_BYTES, free_bytes

        if self.is_copying:
            return
        is_elsewhere = os.fstat(self.source).st_dev != os.fstat(self.repo).st_dev
        copies = [
            item
            for item in self.manifest.files
            if item.path in self.record.files
            and (is_elsewhere or self.record.files[item.path].borrowed)
            and self._size(hfcache.blob_of(Listed.of(item))) is None
        ]
        needed = sum(item.size for item in copies) or entry.size
        free = max(0, free_bytes(self.repo) - KEEP_FREE_BYTES)
        if needed > free:
            raise NoSpaceError(
                f"{size_text(needed)} would have to be copied to '{self.repo_path}', and {size_text(free)} are free for it",
                hint="Keep the cache (HF_HOME) and the home (MODELP2P_HOME) on one file system: then nothing is copied.",
                needed=needed,
                free=free,
            )
        self.tell(f"Copying {size_text(needed)} into the Hugging Face cache: they cannot be linked there.")
        self.is_copying = True

    def _point_at_store(self, entry: FileEntry, blob: str) -> How:
        from modelp2p.daemon.diskerror import on_disk

        with on_disk(f"cannot make '{blob}'"):
            try:
                os.symlink(os.path.join(self.source_path, entry.path), blob, dir_fd=self.repo)
            except FileExistsError:
                return "there"
        return "symlink"

    def _drop_dangling(self, blob: str) -> None:
        """Remove a symlink whose file is gone, as a removed release of another user's store leaves it."""
        if os.path.islink(f"{self.repo_path}/{blob}"):
            os.unlink(blob, dir_fd=self.repo)

    def _point(self, item: Listed) -> None:
        """Make the symlink of a file in the snapshot; one that leads to nothing, or to another blob, is replaced."""
        from modelp2p.daemon.beneath import parent_beneath
        from modelp2p.daemon.diskerror import on_disk

        wanted = hfcache.link_of(item)
        path = hfcache.snapshot_of(self.manifest.revision, item.path)
        with parent_beneath(self.repo, path, make=self.mode) as (parent, name), on_disk(f"cannot link '{path}'"):
            try:
                os.symlink(wanted, name, dir_fd=parent)
                return
            except FileExistsError:
                pass
            is_link = stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
            if is_link and os.readlink(name, dir_fd=parent) != wanted:
                temporary = _temporary()
                os.symlink(wanted, temporary, dir_fd=self.repo)
                os.rename(temporary, name, src_dir_fd=self.repo, dst_dir_fd=parent)

    def _ref(self) -> str | None:
        data = self._read(hfcache.MAIN, 256)
        return None if data is None else data.decode("ascii", "replace").strip()

    def _read(self, path: str, limit_bytes: int) -> bytes | None:
        from modelp2p.daemon.beneath import open_beneath

        try:
            fd = open_beneath(self.repo, path, os.O_RDONLY)
        except NotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            return file.read(limit_bytes + 1)

    def _write(self, path: str, data: bytes, *, replace: bool) -> None:
        """Write a small file whole; without `replace` one that appeared meanwhile stays.

        It is prepared beside `refs` and `trees`, never in them: clients take whatever lies there for a ref or a listing.
        """
        from modelp2p.daemon.beneath import parent_beneath
        from modelp2p.daemon.diskerror import on_disk
        from modelp2p.daemon.files import fsync_dir, write_atomic

        temporary = _temporary()
        with parent_beneath(self.repo, path, make=self.mode) as (parent, name), on_disk(f"cannot write '{path}'"):
            write_atomic(self.repo, temporary, data, self.mode & 0o666)
            if replace or self._size(path) is None:
                os.rename(temporary, name, src_dir_fd=self.repo, dst_dir_fd=parent)
                fsync_dir(parent)
            else:
                os.unlink(temporary, dir_fd=self.repo)


def _temporary() -> str:
    return f".modelp2p-{secrets.token_hex(8)}"
