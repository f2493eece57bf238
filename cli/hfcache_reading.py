"""What the Hugging Face cache of this user holds: a complete snapshot to publish, or parts of a model to adopt.

Nothing here writes to a blob. A snapshot is publishable only where the listing of its commit lies beside it and every file is
there: a revision names one content for everybody, and a cache that lacks a file would give it another.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelp2p.protocol import hfcache
from modelp2p.protocol.errors import FormatError, NotFoundError, PartialError, StoreError, UsageError
from modelp2p.protocol.names import ModelName

if TYPE_CHECKING:
    from modelp2p.protocol.hfcache import Listed

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_SHORT = re.compile(r"[0-9a-f]{7,39}", re.ASCII)
# Branches and tags as git allows them, as far as they can be names of files: `main`, `v1.0`, `refs/pr/4`.
_REF = re.compile(r"[\w.+-]+(/[\w.+-]+)*", re.ASCII)
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete commit of one model in the cache."""

    name: ModelName
    commit: str
    files: tuple[Listed, ...]
    repo: str
    """The folder of the model, absolute and without links."""


def find_snapshot(cache: str, text: str) -> Snapshot:
    """The snapshot that `org/model` or `org/model@revision` means; without a revision, what `main` was when it was downloaded.

    Raises:
        UsageError: not such a text.
        NotFoundError: it is not in the cache, or without its listing.
        PartialError: some of its files are missing.
    """
    written, at, revision = text.partition("@")
    try:
        name = ModelName.parse(written)
    except FormatError as exc:
        raise UsageError(f"--from-hf: {exc.message}", hint="Write org/model, or org/model@revision.") from exc
    repo = os.path.realpath(os.path.join(cache, hfcache.repo_folder(name)))
    if not os.path.isdir(repo):
        raise NotFoundError(f"{name} is not in the Hugging Face cache {cache}", hint=f"hf download {name}")
    commit = _commit_of(repo, name, revision if at else "main")
    command = f"hf download {name} --revision {commit}"
    try:
        with open(os.path.join(repo, hfcache.tree_of(commit)), "rb") as file:
            files = hfcache.decode_tree(file.read(hfcache.MAX_TREE_BYTES + 1))
    except FileNotFoundError as exc:
        raise NotFoundError(
            f"the cache does not say which files {name}@{commit} has, so nobody can tell whether they are all here",
            hint=f"A current huggingface_hub writes that down, and downloads nothing twice: {command}",
        ) from exc
    folder = os.path.join(repo, hfcache.snapshot_of(commit))
    missing = [item.path for item in files if not _is_there(folder, item)]
    if missing:
        named = ", ".join(missing[:_MAX_NAMED]) + (", ..." if len(missing) > _MAX_NAMED else "")
        raise PartialError(
            f"{len(missing)} of {len(files)} files of {name}@{commit} are not in the cache: {named}",
            hint=f"A revision is published whole or not at all. {command}",
        )
    return Snapshot(name, commit, files, repo)


@contextmanager
def linked(snapshot: Snapshot, home: str) -> Iterator[int]:
    """A folder of hard links to the files of a snapshot, open; it is gone after the block. A daemon follows no symlinks.

    It lies in the folder of the model, or below `home` where that cannot be written. Where links cannot be made it holds copies.
    """
    from modelp2p.daemon.linking import place_copy

    place = _private_folder(snapshot.repo, home)
    try:
        target = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            folder = os.path.join(snapshot.repo, hfcache.snapshot_of(snapshot.commit))
            for item in snapshot.files:
                fd = os.open(os.path.join(folder, item.path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    place_copy(fd, target, item.path, ("link", "reflink", "copy"))
                finally:
                    os.close(fd)
            yield target
        finally:
            os.close(target)
    finally:
        shutil.rmtree(place)


def adoptable(path: str) -> str:
    """Where the bytes behind `path` lie: for a snapshot, which is symlinks, the blobs of its model with what was interrupted."""
    real = os.path.realpath(path)
    parent, repo = os.path.dirname(real), os.path.dirname(os.path.dirname(real))
    blobs = os.path.join(repo, hfcache.BLOBS)
    is_snapshot = os.path.basename(parent) == hfcache.SNAPSHOTS and os.path.basename(repo).startswith("models--")
    return blobs if is_snapshot and os.path.isdir(blobs) else path


def blobs_of(cache: str, name: ModelName) -> str:
    """The folder with everything the cache has of a model.

    Raises:
        NotFoundError: there is none.
    """
    path = os.path.join(cache, hfcache.repo_folder(name), hfcache.BLOBS)
    if not os.path.isdir(path):
        raise NotFoundError(f"nothing of {name} is in the Hugging Face cache {cache}", hint="Use fetch, or give a folder.")
    return path


def _commit_of(repo: str, name: ModelName, revision: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    if not _REF.fullmatch(revision) or ".." in revision:
        raise UsageError(f"'{revision[:80]}' is neither a commit nor the name of a branch")
    try:
        with open(os.path.join(repo, hfcache.REFS, revision), encoding="ascii", errors="replace") as file:
            commit = file.read(64).strip()
        if _COMMIT.fullmatch(commit):
            return commit
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        pass
    if _SHORT.fullmatch(revision):
        try:
            found = [entry for entry in os.listdir(os.path.join(repo, hfcache.SNAPSHOTS)) if entry.startswith(revision)]
        except FileNotFoundError:
            found = []
        if len(found) == 1 and _COMMIT.fullmatch(found[0]):
            return found[0]
    raise NotFoundError(f"the Hugging Face cache has no '{revision}' of {name}", hint=f"hf download {name} --revision {revision}")


def _is_there(folder: str, item: Listed) -> bool:
    try:
        found = os.stat(os.path.join(folder, item.path))
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == item.size


def _private_folder(repo: str, home: str) -> str:
    name = f".modelp2p-{secrets.token_hex(8)}"
    try:
        os.mkdir(os.path.join(repo, name), 0o700)
        return os.path.join(repo, name)
    except OSError:
        pass  # a cache that somebody else keeps for all
    try:
        os.makedirs(home, exist_ok=True)
        os.mkdir(os.path.join(home, name), 0o700)
    except OSError as exc:
        raise StoreError(f"cannot make a folder in '{repo}' or '{home}': {exc.strerror}") from exc
    return os.path.join(home, name)
