"""Publishing a folder: take its files in without copying where possible, hash them once, and state what they are.

Two steps, because this process holds no key: `prepare` places and hashes the files and returns the unsigned manifest; the client
signs; `commit` verifies the envelope like any foreign one and makes the release complete and visible.

Invariants:
- a source file is never changed: a hard link to it is marked `borrowed`, and no mode, byte or length of it is touched;
- a file that changed while it was read fails the publish;
- links and hidden files in the folder are not published; links are an error, hidden files are named in the answer;
- with a listing exactly its files are published, hidden ones too, and only if each is the content that the listing names.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.beneath import make_dirs_beneath, open_beneath, remove_tree_beneath
from modelp2p.daemon.diskerror import disk_error, on_disk
from modelp2p.daemon.files import temporary_name
from modelp2p.daemon.hashing import CHUNK_BYTES, FileToHash, HashPool
from modelp2p.daemon.linking import place_copy
from modelp2p.protocol import layout, torrent
from modelp2p.protocol.errors import CorruptError, FormatError, UsageError
from modelp2p.protocol.hfcache import Listed
from modelp2p.protocol.journal import FileStamp
from modelp2p.protocol.kinds import FileKind, kind_of
from modelp2p.protocol.layers import Layers, make_layers
from modelp2p.protocol.manifest import GIT_MAX_BYTES, FileEntry, Manifest, Origin, content_revision
from modelp2p.protocol.paths import MAX_FILES, check_path, check_paths
from modelp2p.protocol.selection import wanted_paths
from modelp2p.protocol.statement import payload_info
from modelp2p.protocol.text import printable

if TYPE_CHECKING:
    from modelp2p.daemon.store import Store

STAGING_PREFIX = ".publish-"
_BINARY_PROBE_BYTES = 8000
"""git's own rule: a NUL among the first 8,000 bytes makes a file binary."""

Progress = Callable[[str, int, int], None]
"""Phase, bytes done, bytes in all."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A hashed folder, waiting for a signature. `staging` is its folder below the home."""

    manifest: Manifest
    layers: Layers
    staging: str
    stamps: dict[str, FileStamp]
    borrowed: frozenset[str]
    """Files whose inode is the user's own: never chmod-ed, written or truncated."""
    way: str
    """How the files were taken in: `reflink`, `link` or `copy` (the costliest that was needed)."""
    skipped: tuple[str, ...]


async def prepare(
    store: Store,
    pool: HashPool,
    source: int,
    template: Callable[[tuple[FileEntry, ...], int, bytes, str], Manifest],
    origin: Origin | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    progress: Progress,
    listing: tuple[Listed, ...] = (),
) -> Prepared:
    """Take in and hash every regular file below the directory descriptor `source`, or exactly those of `listing`.

    `template` builds the manifest from (files, piece length, info-hash, revision).

    Raises:
        UsageError: nothing to publish, too many files, or a link in the folder.
        FormatError: a path or size that no release may have.
        CorruptError: a file changed while it was read, or is not what the listing says.
        NoSpaceError: copying was needed and does not fit.
    Cancellation: the staging folder is removed.
    """
    skipped: tuple[str, ...] = ()
    if listing:
        sizes = {item.path: item.size for item in listing}
    else:
        sizes, skipped = await trio.to_thread.run_sync(_list, source)
    chosen = chosen_paths(sizes, include, exclude)
    pool.warm(1 + sum(sizes[path] for path in chosen) // CHUNK_BYTES)
    staging = f"{layout.DATA}/{temporary_name(STAGING_PREFIX)}"
    make_dirs_beneath(store.fd, staging, mode=0o700)
    try:
        listed = {item.path: item for item in listing}
        return await _prepare(store, pool, source, template, origin, chosen, skipped, staging, progress, listed)
    except BaseException:
        remove_tree_beneath(store.fd, staging)
        raise


def chosen_paths(sizes: Mapping[str, int], include: tuple[str, ...], exclude: tuple[str, ...]) -> list[str]:
    """The paths of a folder that become a release, in manifest order; `sizes` has each regular file's bytes.

    Raises:
        UsageError: none has content, or there are more than a release may have.
        FormatError: a path that no release may have.
    """
    wanted = wanted_paths(sizes, include, exclude)
    if len(wanted) > MAX_FILES:
        raise UsageError(
            f"there are {len(wanted)} files to publish, and a release has at most {MAX_FILES}",
            hint="Leave some out with --include or --exclude, or publish the folder in parts.",
        )
    # Checked before they are sorted: a name that is not UTF-8 has no place in any order.
    chosen = sorted((check_path(path) for path in wanted), key=lambda path: path.encode("utf-8"))
    if not any(sizes[path] for path in chosen):
        raise UsageError(
            "there is nothing to publish: no file with content was found", hint="Give the folder that holds the model files."
        )
    check_paths(chosen)
    return chosen


async def _prepare(
    store: Store,
    pool: HashPool,
    source: int,
    template: Callable[[tuple[FileEntry, ...], int, bytes, str], Manifest],
    origin: Origin | None,
    paths: list[str],
    skipped: tuple[str, ...],
    staging: str,
    progress: Progress,
    listed: Mapping[str, Listed],
) -> Prepared:
    ways = {path: await trio.to_thread.run_sync(_take_in, source, store, staging, path) for path in paths}
    stamps = {path: FileStamp.of(_stat(store, staging, path)) for path in paths}
    total = sum(stamp.size for stamp in stamps.values())
    piece_length = torrent.piece_length_for(total)
    done = 0

    def hashed(count: int) -> None:
        nonlocal done
        done += count
        progress("hashing", done, total)

    def opener(path: str) -> Callable[[], int]:
        return lambda: open_beneath(store.fd, f"{staging}/{path}", os.O_RDONLY)

    use_git = {path: listed[path].is_git if listed else _is_text(store, staging, path, stamps[path].size) for path in paths}
    jobs = [FileToHash(opener(path), stamps[path].size, use_git[path]) for path in paths]
    hashes = await pool.hash_files(jobs, piece_length, hashed)
    for path in paths:
        if not stamps[path].matches(_stat(store, staging, path), ignore_ctime=True):
            raise CorruptError(f"'{path}' changed while it was read", hint="Publish again when nothing writes to it.", path=path)
    by_root = {}
    entries = []
    for path, found in zip(paths, hashes, strict=True):
        size = stamps[path].size
        root = found.root if size else b""
        if size > piece_length:
            by_root[root] = found.layer
        digest = found.sha256 if size else sha256().digest()
        etag = "git" if use_git[path] else "sha256"
        entries.append(FileEntry(path, size, root, digest, etag, found.git_sha1 if use_git[path] else None, kind_of(path)))
        if listed and Listed.of(entries[-1]) != listed[path]:
            raise CorruptError(
                f"'{path}' is not what its listing says",
                hint="It is damaged: remove it from the cache and download it again.",
                path=path,
            )
    files = tuple(entries)
    revision = origin.commit if origin else content_revision(files)
    info_hash = torrent.info_hash(payload_info(revision, files, piece_length))
    manifest = template(files, piece_length, info_hash, revision)
    way = next(way for way in ("copy", "link", "reflink") if way in ways.values())
    borrowed = frozenset(path for path, how in ways.items() if how == "link")
    return Prepared(manifest, make_layers(piece_length, by_root), staging, stamps, borrowed, way, skipped)


def _list(source: int) -> tuple[dict[str, int], tuple[str, ...]]:
    sizes: dict[str, int] = {}
    skipped: list[str] = []
    for folder, folders, names, fd in os.fwalk(".", dir_fd=source, follow_symlinks=False, onerror=_unreadable):
        prefix = folder[2:] + "/" if folder != "." else ""
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        skipped += [printable(prefix + name) for name in hidden]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *names):
            if name.startswith("."):
                continue
            with on_disk(f"cannot look at '{prefix}{name}'"):
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                raise UsageError(
                    f"'{prefix}{name}' is a symbolic link, and links are not published",
                    hint="Publish a copy with real files: cp -rL FOLDER COPY",
                    path=printable(prefix + name),
                )
            if stat.S_ISREG(found.st_mode):
                sizes[prefix + name] = found.st_size
            elif not stat.S_ISDIR(found.st_mode):
                raise FormatError(f"'{prefix}{name}' is neither a file nor a folder", path=printable(prefix + name))
    return sizes, tuple(skipped)


def _unreadable(exc: OSError) -> None:
    # Skipping a folder that cannot be read would sign an incomplete release.
    raise disk_error(exc, f"cannot read '{exc.filename}'") from exc


def _take_in(source: int, store: Store, staging: str, path: str) -> str:
    fd = open_beneath(source, path, os.O_RDONLY)
    try:
        return place_copy(fd, store.fd, f"{staging}/{path}")
    finally:
        os.close(fd)


def _stat(store: Store, staging: str, path: str) -> os.stat_result:
    with on_disk(f"cannot look at '{path}'"):
        return os.stat(store.path(f"{staging}/{path}"), follow_symlinks=False)


def _is_text(store: Store, staging: str, path: str, size: int) -> bool:
    """Whether the Hub would keep this file in git rather than LFS."""
    if size >= GIT_MAX_BYTES or kind_of(path) in (FileKind.WEIGHTS, FileKind.PICKLE):
        return False
    fd = open_beneath(store.fd, f"{staging}/{path}", os.O_RDONLY)
    try:
        return b"\0" not in os.pread(fd, _BINARY_PROBE_BYTES, 0)
    finally:
        os.close(fd)
