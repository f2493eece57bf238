"""One release on this disk: staging, proof records and the visible tree, from first reservation to removal.

    data/<info-hash>/<path>      what the engine writes and reads; never moves
    store/<info-hash>/<rev>/     hard links, file by file, once a file is proven whole
    journal/<info-hash>          what is proven

Invariants:
- nothing the engine may write has a second name, a foreign owner, or a link in its path;
- an inode that we did not create (`borrowed`) is never chmod-ed, written or truncated;
- a file is linked into the visible tree only after it was synced and made read-only, and is journaled after that.

All methods block; the service calls them from threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from modelp2p.daemon.beneath import make_dirs_beneath, open_beneath, parent_beneath
from modelp2p.daemon.diskerror import on_disk
from modelp2p.daemon.files import check_staging, create_staging, finish_file, fsync_dir, written_ranges
from modelp2p.daemon.journal import Journal
from modelp2p.daemon.linking import OWN_INODE_WAYS, link_visible, place_copy
from modelp2p.daemon.space import free_bytes
from modelp2p.protocol import layout
from modelp2p.protocol.errors import CorruptError, NoSpaceError, NotFoundError
from modelp2p.protocol.journal import Completed, FileDone, FileGone, FileStamp, JournalState, Lost, Proven, Selection
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.record import FileRecord, ReleaseRecord

if TYPE_CHECKING:
    from modelp2p.daemon.store import Store
    from modelp2p.protocol.statement import Release


class ReleaseFolder:
    """The files of one release; owns its journal while open."""

    def __init__(self, store: Store, release: Release, journal: Journal) -> None:
        self.store = store
        self.release = release
        self._journal = journal
        self._data = layout.data_of(release.info_hash)
        self._tree = layout.tree_of(release.info_hash, release.manifest.revision)

    @classmethod
    def open(cls, store: Store, release: Release) -> Self:
        """The folder of `release`, with whatever an earlier run left there.

        Raises:
            StoreError: the journal is of another format or release.
        """
        journal = Journal.open(store.path(layout.journal_of(release.info_hash)), release.info_hash)
        folder = cls(store, release, journal)
        if journal.state.is_damaged:
            # What rotted may have been a `Lost`: prove everything again.
            journal.append(Lost(Ranges.span(0, release.pieces.total)), *map(FileGone, journal.state.files))
        make_dirs_beneath(store.fd, folder._data, mode=0o700)
        return folder

    def __repr__(self) -> str:
        return f"<ReleaseFolder {self.release.ref}: {self.state.proven.total}/{self.release.pieces.total} pieces proven>"

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    @property
    def state(self) -> JournalState:
        """What is proven, by the journal."""
        return self._journal.state

    @property
    def save_path(self) -> str:
        """The engine's folder, absolute."""
        return str(self.store.path(self._data))

    def disk_path(self, path: str) -> str:
        """Where the engine finds a file, absolute: its own folder, or the visible tree for a file shared with a release."""
        if path in self.state.files and not self._is_staged(path):
            return str(self.store.path(f"{self._tree}/{path}"))
        return str(self.store.path(f"{self._data}/{path}"))

    def proven_bytes(self, paths: Iterable[str]) -> int:
        """Bytes of these files whose pieces are journaled."""
        pieces = self.release.pieces
        total = 0
        for path in paths:
            owned = pieces.pieces_of(path)
            held = self.state.proven.intersect(Ranges.span(owned.start, owned.stop)) if owned else Ranges()
            total += sum(pieces.locate(piece).length for piece in held.ints())
        return total

    # Staging

    def missing_bytes(self, wanted: Iterable[str]) -> int:
        """How much space fetching these files would newly take."""
        needed = 0
        for path in wanted:
            if path not in self.state.files:
                stat = self._stat(path)
                needed += max(0, self.release.manifest.file(path).size - (stat.st_blocks * 512 if stat else 0))
        return needed

    def check_space(self, wanted: Iterable[str], keep_free_bytes: int) -> None:
        """Refuse before the first byte where the whole selection will not fit.

        Raises:
            NoSpaceError: with `needed` and `free` in bytes.
        """
        needed, free = self.missing_bytes(wanted), free_bytes(self.store.fd)
        if needed > 0 and needed > free - keep_free_bytes:
            short = needed - (free - keep_free_bytes)
            raise NoSpaceError(
                f"{self.release.ref} needs {needed} more bytes, and {max(0, free - keep_free_bytes)} are free for it",
                hint=f"Free {short} bytes more ('modelp2p gc', 'modelp2p rm'), or set MODELP2P_HOME to a larger disk.",
                needed=needed,
                free=free,
            )

    def stage(self, wanted: Iterable[str], *, reserve: bool, keep_free_bytes: int) -> None:
        """Make or check the files the engine will write, space reserved.

        Raises:
            NoSpaceError: the disk filled up meanwhile.
            StoreError: something else was planted there.
        """
        for path in wanted:
            if path in self.state.files:
                continue
            self._reclaim(path)
            size = self.release.manifest.file(path).size
            try:
                found = check_staging(self.store.fd, f"{self._data}/{path}")
            except NotFoundError:
                self._forget(path)
                self._create(path, size, reserve, keep_free_bytes)
                continue
            if found.st_size != size:
                self._forget(path)
                self._discard(path)
                self._create(path, size, reserve, keep_free_bytes)

    def left_over(self, path: str) -> Ranges:
        """Pieces, by number within the file, that have data in the engine's folder and no record in the journal."""
        pieces = self.release.pieces
        owned, length = pieces.pieces_of(path), pieces.piece_length
        if not owned:
            return Ranges()
        fd = self.open_staged(path)
        try:
            written = Ranges.of((begin // length, -(-end // length)) for begin, end in written_ranges(fd, pieces.size(path)))
        finally:
            os.close(fd)
        held = self.state.proven.intersect(Ranges.span(owned.start, owned.stop))
        return written.minus(Ranges.of((begin - owned.start, end - owned.start) for begin, end in held))

    def open_staged(self, path: str) -> int:
        """A read-only descriptor of a file in the engine's folder; the caller closes it."""
        return open_beneath(self.store.fd, f"{self._data}/{path}", os.O_RDONLY)

    def data_dirfd(self) -> int:
        """A descriptor of the engine's folder; the caller closes it."""
        return open_beneath(self.store.fd, self._data, os.O_RDONLY | os.O_DIRECTORY)

    # Proof

    def sync_proven(self, pieces: Ranges) -> None:
        """Put the data of these proven pieces on the disk, then the journal record that says so.

        Raises:
            StoreError: either failed; nothing is recorded.
        """
        for path in {self.release.pieces.locate(piece).path for piece in pieces.ints()}:
            fd = self.open_staged(path)
            try:
                with on_disk(f"cannot sync '{path}'"):
                    os.fdatasync(fd)
            finally:
                os.close(fd)
        self._journal.append(Proven(pieces))

    def lose(self, pieces: Ranges, paths: Iterable[str] = ()) -> None:
        """Journal that these pieces, and what was said about these files, do not hold any more."""
        records = [FileGone(path) for path in paths if path in self.state.files]
        self._journal.append(*([Lost(pieces)] if pieces else []), *records)

    def finish(self, path: str, *, borrowed: bool = False, replace: bool = False) -> None:
        """Make a file that is proven whole durable, read-only and visible, and journal it.

        Raises:
            StoreError: syncing or linking failed.
        """
        fd = self.open_staged(path)
        try:
            size = self.release.manifest.file(path).size
            if os.fstat(fd).st_size != size:
                raise CorruptError(f"'{path}' has {os.fstat(fd).st_size} bytes instead of {size}", path=path)
            finish_file(fd, borrowed=borrowed)
        finally:
            os.close(fd)
        with parent_beneath(self.store.fd, f"{self._data}/{path}") as (parent, _):
            fsync_dir(parent)
        stamp = link_visible(self.store.fd, f"{self._data}/{path}", self.store.fd, f"{self._tree}/{path}", replace=replace)
        self._journal.append(FileDone(path, stamp, borrowed))

    def share(self, path: str, other: ReleaseFolder, other_path: str) -> None:
        """Take a file that another release here holds whole: one more name for its inode, in the visible tree only."""
        source = other.state.files[other_path]
        stamp = link_visible(self.store.fd, f"{other._tree}/{other_path}", self.store.fd, f"{self._tree}/{path}", replace=True)
        # A leftover of an interrupted fetch would be served in its place.
        self._discard(path)
        owned = self.release.pieces.pieces_of(path)
        proven = [Proven(Ranges.span(owned.start, owned.stop))] if owned else []
        self._journal.append(*proven, FileDone(path, stamp, source.borrowed))
        # The new name changed the inode's ctime: renew the other's stamp, or its loaders would hash once more.
        other._journal.append(FileDone(other_path, stamp, source.borrowed))
        other.save_record()

    def disown(self, path: str) -> None:
        """Give up a finished file that somebody changed: its names go, its inode is left as it is."""
        self.lose(Ranges(), (path,))
        self._forget(path)
        self._discard(path)
        self.store.remove(f"{self._tree}/{path}")

    def hide(self, path: str) -> None:
        """Take a file that is not proven any more out of sight, without losing what is still good in it.

        Its inode keeps a name in the engine's folder, where the next fetch looks for good pieces; one that has further names, a
        user's own file or another release's, lives on under those.
        """
        with on_disk(f"cannot hide '{path}'"):
            if self._is_staged(path):
                self.store.remove(f"{self._tree}/{path}")
            else:
                with parent_beneath(self.store.fd, f"{self._data}/{path}", make=0o700) as (parent, name):
                    os.rename(self.store.path(f"{self._tree}/{path}"), name, dst_dir_fd=parent)
        left = self._stat(path)
        if left is not None and left.st_nlink > 1:
            self._discard(path)

    def restamp(self) -> None:
        """Journal the stats of the finished files as they are now; only after their bytes were hashed again."""
        for path, done in list(self.state.files.items()):
            stamp = FileStamp.of(os.stat(self.store.path(f"{self._tree}/{path}"), follow_symlinks=False))
            if stamp != done.stamp:
                self._journal.append(FileDone(path, stamp, done.borrowed))

    def note_links(self) -> int:
        """Journal the new ctime of finished files that only got another name, such as one in a cache of their owner's.

        What nobody but the owner may write, and what has kept inode, length and mode, was not written to. Returns how many.
        """
        records = []
        for path, done in self.state.files.items():
            with on_disk(f"cannot look at '{path}'"):
                seen = os.stat(self.store.path(f"{self._tree}/{path}"), follow_symlinks=False)
            is_ours = seen.st_uid == os.geteuid() and seen.st_mode & 0o777 == 0o444 and not done.borrowed
            if is_ours and done.stamp.matches(seen, ignore_ctime=True) and not done.stamp.matches(seen):
                records.append(FileDone(path, FileStamp.of(seen), borrowed=False))
        if records:
            self._journal.append(*records)
            self.save_record()
        return len(records)

    def select(self, selection: Selection) -> None:
        """Journal what was asked for."""
        if self.state.selection != selection:
            self._journal.append(selection)

    def complete(self) -> None:
        """Journal that everything selected is present, and write the record loaders read."""
        if not self.state.complete:
            self._journal.append(Completed())
        self.save_record()

    def save_record(self) -> None:
        """Write the record of every finished file."""
        release = self.release
        known = self.store.load_record(release.info_hash)
        digests = dict.fromkeys([*(known.statements if known else ()), release.digest])
        files = {
            path: FileRecord(
                done.stamp.dev,
                done.stamp.ino,
                done.stamp.size,
                done.stamp.mtime_ns,
                done.stamp.ctime_ns,
                release.manifest.file(path).root,
                done.borrowed,
            )
            for path, done in self.state.files.items()
            if path in release.manifest
        }
        everything = len(files) == len(release.manifest.files)
        self.store.save_record(ReleaseRecord(release.info_hash, release.manifest.revision, tuple(digests), everything, files))

    # Watching what was finished

    def changed_files(self) -> list[str]:
        """Finished files that are not as they were proven: gone, replaced, resized or rewritten."""
        changed = []
        for path, done in self.state.files.items():
            seen = self._stat(path)
            is_served = seen is None or done.stamp.matches(seen, ignore_ctime=True)
            if not is_served or not self._is_visible(path, done.stamp):
                changed.append(path)
        return changed

    def mend(self, path: str) -> bool:
        """Give a finished file its visible name back where only that was removed or replaced; False where more is wrong."""
        done, seen = self.state.files[path], self._stat(path)
        if seen is None or not done.stamp.matches(seen, ignore_ctime=True):
            return False
        stamp = link_visible(self.store.fd, f"{self._data}/{path}", self.store.fd, f"{self._tree}/{path}", replace=True)
        self._journal.append(FileDone(path, stamp, done.borrowed))
        return True

    def _is_visible(self, path: str, stamp: FileStamp) -> bool:
        try:
            seen = os.stat(self.store.path(f"{self._tree}/{path}"), follow_symlinks=False)
        except OSError:
            return False
        return stamp.matches(seen, ignore_ctime=True)

    def remove(self) -> int:
        """Delete everything of this release from the disk. Returns the bytes freed (names shared elsewhere free nothing)."""
        freed = 0
        for path in self.release.pieces.paths:
            try:
                stat = os.stat(self.disk_path(path), follow_symlinks=False)
            except OSError:
                continue
            names = 1 + (path in self.state.files and self._is_staged(path))
            freed += stat.st_blocks * 512 if stat.st_nlink <= names else 0
        self.close()
        self.store.remove(f"{layout.STORE}/{self.release.info_hash.hex()}")
        self.store.remove(self._data)
        self.store.remove(layout.journal_of(self.release.info_hash))
        return freed

    def _reclaim(self, path: str) -> None:
        """Take back a file that is visible, or was about to be, and that the journal does not vouch for.

        A crash between link and record leaves that, and a journal that was damaged. What is not proven must not be visible, and
        the engine may only write to an inode without other names.
        """
        staged = self._stat(path)
        folder, _, name = f"{self._tree}/{path}".rpartition("/")
        for other in self.store.names(folder):
            is_temporary = other.startswith(f".{name[:20]}") and other.endswith(".tmp")
            if other == name or (is_temporary and self._is_inode(f"{folder}/{other}", staged)):
                self.store.remove(f"{folder}/{other}")
        if staged is None or self._stat(path) is None:
            return
        known = self._recorded(path)
        is_borrowed = known is not None and known.borrowed and (known.dev, known.ino) == (staged.st_dev, staged.st_ino)
        is_shared = staged.st_mode & 0o777 == 0o444 and staged.st_uid == os.geteuid() and self._names_of(path) > 1
        if is_borrowed or is_shared:
            # The user's own file, or one that a cache of theirs has too: our name for it goes, its content is taken in as a copy.
            fd = self.open_staged(path)
            try:
                place_copy(fd, self.store.fd, f"{self._data}/{path}", OWN_INODE_WAYS, replace=True)
            finally:
                os.close(fd)
        elif staged.st_mode & 0o777 == 0o444:
            fd = self.open_staged(path)
            try:
                now = os.fstat(fd)
                if now.st_nlink == 1 and now.st_uid == os.geteuid():
                    os.fchmod(fd, 0o600)
            finally:
                os.close(fd)

    def _recorded(self, path: str) -> FileRecord | None:
        record = self.store.load_record(self.release.info_hash)
        return record.files.get(path) if record else None

    def _is_inode(self, relative: str, expected: os.stat_result | None) -> bool:
        try:
            found = os.stat(self.store.path(relative), follow_symlinks=False)
        except OSError:
            return False
        return expected is not None and (found.st_dev, found.st_ino) == (expected.st_dev, expected.st_ino)

    def _create(self, path: str, size: int, reserve: bool, keep_free_bytes: int) -> None:
        if reserve:
            self._create_reserved(path, size, keep_free_bytes)
        else:
            self._create_sparse(path, size)

    def _create_reserved(self, path: str, size: int, keep_free_bytes: int) -> None:
        os.close(create_staging(self.store.fd, f"{self._data}/{path}", size, keep_free_bytes=keep_free_bytes))

    def _is_staged(self, path: str) -> bool:
        return self._stat(path) is not None

    def _stat(self, path: str) -> os.stat_result | None:
        try:
            return os.stat(self.store.path(f"{self._data}/{path}"), follow_symlinks=False)
        except OSError:
            return None

    def _names_of(self, path: str) -> int:
        now = self._stat(path)
        return now.st_nlink if now else 0

    def _forget(self, path: str) -> None:
        owned = self.release.pieces.pieces_of(path)
        held = self.state.proven.intersect(Ranges.span(owned.start, owned.stop)) if owned else Ranges()
        if held:
            self._journal.append(Lost(held))

    def _discard(self, path: str) -> None:
        self.store.remove(f"{self._data}/{path}")

    def _create_sparse(self, path: str, size: int) -> None:
        with (
            parent_beneath(self.store.fd, f"{self._data}/{path}", make=0o700) as (parent, name),
            on_disk(f"cannot create '{path}'"),
        ):
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
            try:
                os.ftruncate(fd, size)
            finally:
                os.close(fd)
