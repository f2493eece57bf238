"""The listing of a release as the Hugging Face Hub would give it: files with their git ids, and the folders between them.

Invariants:
- a file whose etag is `sha256` is listed as the Hub lists what it keeps in LFS: `oid` is the git id of its pointer file;
- a file whose etag is `git` has its git blob id and no `lfs`;
- there is no `xetHash`: it would send clients to a store that this is not.

Folder ids are git tree ids over the listed files with mode 100644; a manifest knows no executable bits, so they equal those of a
repository without such. Clients only show them.
The ids are those of `gitids`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

from modelp2p.protocol.gitids import blob_id, lfs_pointer, object_id

if TYPE_CHECKING:
    from modelp2p.protocol.manifest import FileEntry, Manifest

Json: TypeAlias = "bool | int | str | list[Json] | dict[str, Json] | None"


class Listing:
    """The files and folders of one manifest, ready to be asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._folders: dict[str, dict[str, bytes]] = {"": {}}
        """The git ids of what lies in each folder, by name; a folder's own name ends with a slash, as git sorts it."""
        for entry in manifest.files:
            folder, _, name = entry.path.rpartition("/")
            self._folder(folder)[name] = git_id(entry)
        self._ids: dict[str, bytes] = {}
        # Deepest first: a folder's id is made of the ids of those below it.
        for folder in sorted(self._folders, key=lambda path: -path.count("/") - bool(path)):
            self._ids[folder] = _tree_id(self._folders[folder])
            if folder:
                above, _, name = folder.rpartition("/")
                self._folders[above][f"{name}/"] = self._ids[folder]

    def below(self, folder: str, *, recursive: bool) -> list[Json] | None:
        """The rows of a folder ("" is the root), files and folders by path; None where there is no such folder."""
        if folder not in self._folders:
            return None
        prefix = f"{folder}/" if folder else ""
        files = [entry for entry in self._manifest.files if entry.path.startswith(prefix)]
        folders = [path for path in self._folders if path and path.startswith(prefix)]
        if not recursive:
            files = [entry for entry in files if "/" not in entry.path[len(prefix) :]]
            folders = [path for path in folders if "/" not in path[len(prefix) :]]
        rows = {entry.path: file_row(entry) for entry in files} | {path: self._folder_row(path) for path in folders}
        return [rows[path] for path in sorted(rows)]

    def about(self, paths: Iterable[str]) -> list[Json]:
        """The rows of these paths, each once, without those that do not exist."""
        found: list[Json] = []
        for path in dict.fromkeys(paths):
            if path in self._manifest:
                found.append(file_row(self._manifest.file(path)))
            elif path and path in self._folders:
                found.append(self._folder_row(path))
        return found

    def _folder(self, path: str) -> dict[str, bytes]:
        if path not in self._folders:
            self._folders[path] = {}
            if "/" in path:
                self._folder(path.rpartition("/")[0])
        return self._folders[path]

    def _folder_row(self, path: str) -> Json:
        return {"type": "directory", "path": path, "oid": self._ids[path].hex(), "size": 0}


def file_row(entry: FileEntry) -> dict[str, Json]:
    """One file as `/tree` and `/paths-info` list it."""
    row: dict[str, Json] = {"type": "file", "path": entry.path, "size": entry.size, "oid": git_id(entry).hex()}
    if entry.git_sha1 is None:
        pointer_bytes = len(lfs_pointer(entry.sha256, entry.size))
        row["lfs"] = {"oid": entry.sha256.hex(), "size": entry.size, "pointerSize": pointer_bytes}
    return row


def git_id(entry: FileEntry) -> bytes:
    """The git blob id of what a repository on the Hub holds for this file: the file itself, or its LFS pointer."""
    return entry.git_sha1 if entry.git_sha1 is not None else blob_id(lfs_pointer(entry.sha256, entry.size))


def _tree_id(children: dict[str, bytes]) -> bytes:
    rows = []
    for name in sorted(children, key=lambda name: name.encode("utf-8")):
        mode = b"40000" if name.endswith("/") else b"100644"
        rows.append(b"%b %b\0%b" % (mode, name.rstrip("/").encode("utf-8"), children[name]))
    return object_id(b"tree", b"".join(rows))
