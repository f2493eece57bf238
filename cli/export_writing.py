"""The writing half of `export`: files of the store, hashed on their way into a folder of the user's.

Invariants:
- a name below the folder of the revision means that its bytes had the signed SHA-256 when they were written;
- what is there is hashed before anything is written: equal is left alone, different is refused;
- the store's files are opened read-only and share no inode with the export;
- nothing is written outside the folder, whatever links it holds;
- one export at a time writes there, and one that was killed leaves at most two hidden files, which the next removes;
- the bundle comes last: where it is, everything is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from modelp2p.cli.local_dir import umask
from modelp2p.cli.units import size_text
from modelp2p.protocol import exported
from modelp2p.protocol.errors import CorruptError, DeniedError, FormatError, NoSpaceError, NotFoundError, StoreError
from modelp2p.protocol.statement import MAX_BUNDLE_BYTES, encode_bundle

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map
    from modelp2p.protocol.manifest import FileEntry
    from modelp2p.protocol.statement import Release, Statement

_STEP_BYTES = 4 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_ONLY = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@dataclass(frozen=True, slots=True)
class Exported:
    """Where an export lies; paths are absolute."""

    path: str
    """The folder of the files."""
    bundle: str
    torrent: str
    save_path: str
    """Where a BitTorrent client has to save so that it finds the files."""
    copied_bytes: int
    """Bytes that were not there before."""


@dataclass(slots=True)
class Export:
    """One run of an export of the visible tree that `tree` has open."""

    directory: str
    tree: int
    statement: Statement
    release: Release
    emit: Callable[[Map], None]
    _base: int = field(init=False, default=-1)
    """The folder of the model; bundle, torrent and sums lie in it, and what is not whole yet."""
    _folder: int = field(init=False, default=-1)
    """The folder of the revision."""
    _lock: int = field(init=False, default=-1)
    _can_reflink: bool = True
    _copied: int = 0
    _done: int = 0
    _total: int = 0
    _started: float = field(default_factory=time.monotonic)

    def write(self, wanted: Sequence[str]) -> Exported:
        """Write these files and what proves them.

        Raises:
            StoreError: other content has one of their names, and nothing was changed; or the disk refused.
            NoSpaceError: they do not fit; whole files that were written stay.
            DeniedError: this user may not write there.
            CorruptError: a file of the store is not what was signed.
        """
        manifest = self.release.manifest
        path = os.path.join(os.path.abspath(self.directory), exported.folder_of(manifest.name))
        with _writing(f"cannot use the folder '{path}'"):
            os.makedirs(path, exist_ok=True)
            self._base = os.open(path, _DIRECTORY)
        try:
            with self._alone(path):
                self._folder = self._open_folder(path)
                try:
                    self._write([manifest.file(name) for name in wanted])
                finally:
                    os.close(self._folder)
        finally:
            os.close(self._base)
        folder = os.path.join(path, manifest.revision)
        return Exported(
            folder,
            os.path.join(path, exported.bundle_of(manifest.revision)),
            os.path.join(path, exported.torrent_of(manifest.revision)),
            path if exported.has_own_folder(self.release) else folder,
            self._copied,
        )

    def _write(self, wanted: Sequence[FileEntry]) -> None:
        revision = self.release.manifest.revision
        fixed = {
            exported.torrent_of(revision): exported.torrent_file(self.release),
            exported.bundle_of(revision): encode_bundle(self.statement),
        }
        self._total = sum(entry.size for entry in wanted)
        documents = {name: data for name, data in fixed.items() if not self._holds(name, data)}
        known = self._known_sums()
        missing = [entry for entry in wanted if not self._is_there(entry)]
        self._check_room(missing)
        for entry in missing:
            self._place(entry)
        sums = known | {entry.path: entry.sha256 for entry in wanted}
        if sums != known:
            self._write_document(exported.sums_of(revision), exported.encode_sums(sums))
        for name, data in documents.items():
            self._write_document(name, data)

    @contextmanager
    def _alone(self, path: str) -> Iterator[None]:
        """Keep other exports of the revision out for the time of the block, and leave nothing unfinished behind."""
        from modelp2p.daemon.files import unlink_if_there

        name = f".{self.release.manifest.revision}.lock"
        with _writing(f"cannot write to '{path}'"):
            self._lock = os.open(name, (_CREATE | os.O_NONBLOCK) & ~os.O_EXCL, 0o666, dir_fd=self._base)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # One that ended meanwhile took the name of its lock along, and the next one locks another file.
                if not os.fstat(self._lock).st_nlink:
                    raise BlockingIOError
            except BlockingIOError as exc:
                raise StoreError(f"another export writes to '{path}' right now", hint="Wait until it has ended.") from exc
            except OSError as exc:
                # A file system without locks: there the user has to see to it.
                if exc.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
            try:
                unlink_if_there(self._base, self._part_name)
                yield
            finally:
                unlink_if_there(self._base, self._part_name)
                unlink_if_there(self._base, name)
        finally:
            os.close(self._lock)

    @property
    def _part_name(self) -> str:
        return f".{self.release.manifest.revision}.part"

    def _open_folder(self, path: str) -> int:
        revision = self.release.manifest.revision
        with _writing(f"cannot use the folder '{path}/{revision}'"):
            try:
                os.mkdir(revision, dir_fd=self._base)
                os.fsync(self._base)
            except FileExistsError:
                pass
            return os.open(revision, _DIRECTORY, dir_fd=self._base)

    # What is there

    def _holds(self, name: str, data: bytes) -> bool:
        """Whether a small file is there already.

        Raises:
            StoreError: with other content.
        """
        found = self._read(name, MAX_BUNDLE_BYTES)
        if found is not None and found != data:
            raise _in_the_way(name)
        return found is not None

    def _known_sums(self) -> dict[str, bytes]:
        """What earlier exports to this folder wrote."""
        name = exported.sums_of(self.release.manifest.revision)
        found = self._read(name, exported.MAX_SUMS_BYTES)
        try:
            known = {} if found is None else exported.decode_sums(found)
        except FormatError as exc:
            raise _in_the_way(name) from exc
        signed = {entry.path: entry.sha256 for entry in self.release.manifest.files}
        if known.items() - signed.items():
            raise _in_the_way(name)
        return known

    def _read(self, name: str, limit_bytes: int) -> bytes | None:
        from modelp2p.daemon.beneath import open_beneath
        from modelp2p.daemon.diskerror import on_disk

        try:
            fd = open_beneath(self._base, name, os.O_RDONLY)
        except NotFoundError:
            return None
        with on_disk(f"cannot read '{name}'"), os.fdopen(fd, "rb") as file:
            return file.read(limit_bytes + 1)

    def _is_there(self, entry: FileEntry) -> bool:
        """Whether a file is there, with the signed bytes.

        Raises:
            StoreError: with others.
        """
        from modelp2p.daemon.beneath import open_beneath

        try:
            fd = open_beneath(self._folder, entry.path, os.O_RDONLY)
        except NotFoundError:
            return False
        try:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_size == entry.size and self._digest(fd, entry) == entry.sha256:
                return True
        finally:
            os.close(fd)
        raise _in_the_way(entry.path)

    def _check_room(self, missing: Sequence[FileEntry]) -> None:
        from modelp2p.daemon.space import free_bytes

        for entry in missing:
            try:
                # Beyond the largest file it knows a file system does not even seek: told before an hour of copying, not after.
                os.lseek(self._lock, entry.size, os.SEEK_SET)
            except OSError as exc:
                raise _too_large(entry) from exc
        # On one file system the blocks may be shared, and then nothing is needed.
        if os.fstat(self.tree).st_dev == os.fstat(self._base).st_dev:
            return
        needed, free = sum(entry.size for entry in missing), free_bytes(self._base)
        if needed > free:
            raise NoSpaceError(
                f"{size_text(needed)} have to be copied, and {size_text(free)} are free there",
                hint="Free some space there, or choose files with --include. Nothing was written.",
                needed=needed,
                free=free,
            )

    # What is written

    def _place(self, entry: FileEntry) -> None:
        """Copy one file, and give it its name only if its bytes are the signed ones."""
        from modelp2p.daemon.beneath import open_beneath, parent_beneath

        source = open_beneath(self.tree, entry.path, os.O_RDONLY)
        try:
            if not self._reflink(source, entry):
                self._copy(source, entry)
        finally:
            os.close(source)
        with parent_beneath(self._folder, entry.path, make=0o777 & ~umask()) as (parent, name):
            self._give_name(parent, name, entry.path)
        self._copied += entry.size

    def _reflink(self, source: int, entry: FileEntry) -> bool:
        """Whether the file could be made sharing its blocks with the store."""
        from modelp2p.daemon.linking import place_copy

        if not self._can_reflink:
            return False
        try:
            place_copy(source, self._base, self._part_name, ("reflink",))
        except StoreError as exc:
            if type(exc) is not StoreError:
                raise
            self._can_reflink = False
            return False
        fd = os.open(self._part_name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._base)
        try:
            os.fchmod(fd, 0o666 & ~umask())
            self._check(entry, self._digest(fd, entry))
        finally:
            os.close(fd)
        return True

    def _copy(self, source: int, entry: FileEntry) -> None:
        from modelp2p.daemon.files import write_all

        with self._part(entry.path) as fd:

            def take(data: bytes) -> None:
                with _writing(f"cannot write '{entry.path}'", entry):
                    write_all(fd, data)

            self._check(entry, self._digest(source, entry, take))
            with _writing(f"cannot write '{entry.path}'", entry):
                os.fsync(fd)

    def _check(self, entry: FileEntry, digest: bytes) -> None:
        if digest != entry.sha256:
            raise CorruptError(
                f"'{entry.path}' is not what was signed", hint=f"modelp2p verify {self.release.ref} --repair", path=entry.path
            )

    def _digest(self, fd: int, entry: FileEntry, take: Callable[[bytes], None] = lambda data: None) -> bytes:
        """The SHA-256 of what `fd` holds, up to the size of `entry` and a byte more; `take` gets it step by step."""
        from modelp2p.daemon.diskerror import on_disk

        digest, at, base = sha256(), 0, self._done
        while at <= entry.size:
            with on_disk(f"cannot read '{entry.path}'"):
                data = os.pread(fd, min(_STEP_BYTES, entry.size + 1 - at), at)
            if not data:
                break
            digest.update(data)
            take(data)
            at += len(data)
            self._tell(base + min(at, entry.size))
        self._done = base + entry.size
        return digest.digest()

    def _tell(self, done: int) -> None:
        rate = int(done / max(time.monotonic() - self._started, 0.001))
        self.emit({"phase": "exporting", "done": done, "total": self._total, "rate_down": rate})

    def _write_document(self, name: str, data: bytes) -> None:
        from modelp2p.daemon.files import fsync_dir, write_all

        with self._part(name) as fd, _writing(f"cannot write '{name}'"):
            write_all(fd, data)
            os.fsync(fd)
        with _writing(f"cannot write '{name}'"):
            os.rename(self._part_name, name, src_dir_fd=self._base, dst_dir_fd=self._base)
        fsync_dir(self._base)

    @contextmanager
    def _part(self, what: str) -> Iterator[int]:
        """A new file that has no name of the export yet; its mode is what this user's new files get."""
        with _writing(f"cannot write '{what}'"):
            fd = os.open(self._part_name, _CREATE, 0o666, dir_fd=self._base)
        try:
            yield fd
        finally:
            os.close(fd)

    def _give_name(self, parent: int, name: str, path: str) -> None:
        from modelp2p.daemon.files import fsync_dir, is_name

        with _writing(f"cannot write '{path}'"):
            # Nobody but a program of the user's own could have put it there since it was looked for.
            if is_name(parent, name):
                raise _in_the_way(path)
            os.rename(self._part_name, name, src_dir_fd=self._base, dst_dir_fd=parent)
        fsync_dir(parent)


@contextmanager
def _writing(what: str, entry: FileEntry | None = None) -> Iterator[None]:
    """Translates what the user's own disk refuses; the hints of `on_disk` are about the store."""
    from modelp2p.daemon.diskerror import NO_SPACE

    try:
        yield
    except OSError as exc:
        message = f"{what}: {exc.strerror or exc}"
        if exc.errno in NO_SPACE:
            raise NoSpaceError(message, hint="Free some space there and run it again: whole files stay.") from exc
        if exc.errno in _READ_ONLY:
            raise DeniedError(message, hint="Choose a folder you may write to.") from exc
        if exc.errno == errno.EFBIG and entry is not None:
            raise _too_large(entry) from exc
        raise StoreError(message) from exc


def _too_large(entry: FileEntry) -> StoreError:
    return StoreError(
        f"'{entry.path}' has {size_text(entry.size)}, more than this file system takes in one file",
        hint="FAT ends at 4 GiB a file: use another file system (exFAT, ext4), or leave the file out with --exclude.",
        path=entry.path,
    )


def _in_the_way(path: str) -> StoreError:
    return StoreError(
        f"'{path}' exists there with other content",
        hint="Move it away, or choose another folder. Nothing was overwritten.",
        path=path,
    )
