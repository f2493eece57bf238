"""The Hugging Face cache as values: where things lie in one model's folder, and what a commit's listing says.

    models--org--name/blobs/<etag>               the content, named by the digest the Hub calls it by
    models--org--name/trees/<commit>.json        every file of a commit, also those that were not fetched
    models--org--name/snapshots/<commit>/<path>  a relative symlink to its blob
    models--org--name/refs/<ref>                 the commit a branch means

The same for all versions of huggingface_hub; 0.x knows no `trees` and ignores them. Pure: what touches the disk
is in `cli/`. Formats: huggingface_hub `file_download.py` and `_tree_cache.py`.

A `Listed` is one file of a commit as such a listing states it. Lists of them cross the control socket, too: `encode_listing`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.gitids import blob_id, lfs_pointer
from modelp2p.protocol.manifest import GIT_MAX_BYTES, MAX_UINT
from modelp2p.protocol.paths import MAX_FILES, check_paths

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value
    from modelp2p.protocol.manifest import FileEntry
    from modelp2p.protocol.names import ModelName

BLOBS, TREES, SNAPSHOTS, REFS = "blobs", "trees", "snapshots", "refs"
MAIN = f"{REFS}/main"
"""What a name without a revision means to every client of the Hub."""
TREE_VERSION = 1
MAX_TREE_BYTES = 16 << 20
"""10,000 paths of 1,024 bytes, with digests and JSON's own characters."""
_SHA256_BYTES, _GIT_BYTES = 32, 20


@dataclass(frozen=True, slots=True)
class Listed:
    """One file of a commit: its bytes, and the digest its blob is named by."""

    path: str
    size: int
    digest: bytes
    """SHA-256 of the content (32 bytes), or its git blob id (20 bytes)."""

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_UINT:
            raise FormatError(f"listing: the size of '{self.path[:200]}' is out of range")
        if len(self.digest) not in (_SHA256_BYTES, _GIT_BYTES):
            raise FormatError(f"listing: '{self.path[:200]}' has neither a SHA-256 nor a git blob id")
        if self.is_git and self.size >= GIT_MAX_BYTES:
            raise FormatError(f"listing: '{self.path[:200]}' is too large for a git blob id")

    @classmethod
    def of(cls, entry: FileEntry) -> Listed:
        """How the Hub would list a file of a release."""
        return cls(entry.path, entry.size, entry.git_sha1 or entry.sha256)

    @property
    def blob(self) -> str:
        """The name of its blob."""
        return self.digest.hex()

    @property
    def is_git(self) -> bool:
        """Whether the Hub keeps it in git itself; large and binary files are in LFS."""
        return len(self.digest) == _GIT_BYTES


def repo_folder(name: ModelName) -> str:
    """The folder of one model, below the cache."""
    return "--".join(("models", *str(name).split("/")))


def blob_of(item: Listed) -> str:
    """Where the content of a file lies, below the folder of its model."""
    return f"{BLOBS}/{item.blob}"


def tree_of(commit: str) -> str:
    """Where the listing of a commit lies."""
    return f"{TREES}/{commit}.json"


def snapshot_of(commit: str, path: str = "") -> str:
    """Where the files of a commit, or one of them, can be read."""
    return f"{SNAPSHOTS}/{commit}/{path}".rstrip("/")


def link_of(item: Listed) -> str:
    """What the symlink of a file in a snapshot says."""
    return f"{'../' * (item.path.count('/') + 2)}{blob_of(item)}"


def encode_tree(files: Iterable[Listed]) -> bytes:
    """The listing of a commit as huggingface_hub writes it: sorted, indented by one."""
    rows: dict[str, dict[str, str | int]] = {}
    for item in sorted(files, key=lambda item: item.path):
        if item.is_git:
            rows[item.path] = {"size": item.size, "blob_id": item.blob}
        else:
            pointer_id = blob_id(lfs_pointer(item.digest, item.size)).hex()
            rows[item.path] = {"size": item.size, "blob_id": pointer_id, "lfs_sha256": item.blob, "lfs_size": item.size}
    return json.dumps({"format_version": TREE_VERSION, "files": rows}, indent=1).encode()


def decode_tree(data: bytes) -> tuple[Listed, ...]:
    """What a listing of a commit says, sorted as a manifest is.

    Raises:
        FormatError: another format, or a path or size that no release may have.
    """
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise FormatError("the listing is not JSON") from exc
    if not isinstance(tree, dict) or tree.get("format_version") != TREE_VERSION or not isinstance(tree.get("files"), dict):
        raise FormatError(f"the listing has another format than version {TREE_VERSION}", hint="Update modelp2p.")
    return _checked([_listed(path, row) for path, row in tree["files"].items()])


def encode_listing(files: Sequence[Listed]) -> bytes:
    """A listing for the daemon, which gives each file's digest its meaning by hashing the file."""
    rows: Map = {item.path: [item.size, item.digest] for item in files}
    return codec.pack(rows)


def decode_listing(data: bytes) -> tuple[Listed, ...]:
    """What `encode_listing` packed.

    Raises:
        FormatError: anything else.
    """
    found = []
    for path, row in codec.unpack_map(data, max_bytes=MAX_TREE_BYTES).items():
        match row:
            case [int(size), bytes(digest)] if not isinstance(size, bool):
                found.append(Listed(path, size, digest))
            case _:
                raise FormatError("listing: expected a size and a digest for each file")
    return _checked(found)


def _checked(files: list[Listed]) -> tuple[Listed, ...]:
    if not 1 <= len(files) <= MAX_FILES:
        raise FormatError(f"the listing has {len(files)} files; a release has 1 to {MAX_FILES}")
    # Before they are sorted: a name that is not UTF-8 has no place in any order.
    check_paths(item.path for item in files)
    return tuple(sorted(files, key=lambda item: item.path.encode("utf-8")))


def _listed(path: str, row: Value) -> Listed:
    if not isinstance(row, dict):
        raise FormatError("listing: expected a map for each file")
    # For a file in LFS `blob_id` is the pointer's, which is no name of its content.
    name, size = (row.get("lfs_sha256") or row.get("blob_id")), row.get("size")
    if not isinstance(name, str) or not isinstance(size, int) or isinstance(size, bool):
        raise FormatError(f"listing: '{path[:200]}' has no digest or no size")
    try:
        return Listed(path, size, bytes.fromhex(name))
    except ValueError as exc:
        raise FormatError(f"listing: the digest of '{path[:200]}' is not hexadecimal") from exc
