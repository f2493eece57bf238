"""A few nodes of one test, and the models they exchange: small, seeded, never zeros."""

from __future__ import annotations

import contextlib
import json
import os
import random
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.nodes import Node, wait_until
from tests.releases import write_files

MIB = 1 << 20
PIECE = MIB
"""The piece length of every release below 64 GiB."""

PUBLISH_KEYS = ["v", "link", "name", "revision", "info_hash", "manifest", "publisher", "files", "bytes", "seconds"]
FETCH_KEYS = ["v", "path", "name", "revision", "info_hash", "publisher", "state", "bytes", "from_peers", "from_web", "seconds"]
NODE_KEYS = ["pid", "listen_port", "profile", "publisher_ids"]
ROW_KEYS = ["name", "revision", "info_hash", "state", "size", "proven", "rate_down", "rate_up", "peers", "uploaded"]
LOAD_KEYS = ["v", "name", "device", "tensors", "bytes", "verified_bytes", "seconds", "gb_per_s", "transfer"]
VERIFY_KEYS = ["v", "name", "ok", "bad"]


@dataclass
class Site:
    """Nodes below one folder; all are stopped at the end."""

    folder: Path
    stack: contextlib.ExitStack
    models: int = field(default=0)

    def node(self, name: str, network: Mapping[str, object] | None = None, *, start: bool = True) -> Node:
        """A new home, with its daemon unless `start` is false."""
        node = Node(self.folder / name, network or {}, {"store": {"reserve": 0}})
        self.stack.enter_context(node)
        return node.start() if start else node

    def write(self, files: Mapping[str, bytes]) -> Path:
        """A new folder with these files."""
        self.models += 1
        return write_files(self.folder / f"source-{self.models}", files)


@contextlib.contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    """A site whose nodes end with the block."""
    with contextlib.ExitStack() as stack:
        yield Site(folder, stack)


def some_bytes(seed: str, size: int) -> bytes:
    """Seeded random bytes."""
    return random.Random(seed).randbytes(size)


def weights(seed: str, size: int) -> bytes:
    """A safetensors file of exactly `size` bytes: a few integer tensors, whose bits are all valid values."""
    header_bytes = 512
    left = size - 8 - header_bytes
    first = left // 8 * 4
    tensors = {f"{seed}.a": ("I32", first // 4, 0, first), f"{seed}.b": ("U8", left - first, first, left)}
    header = {
        name: {"dtype": dtype, "shape": [count], "data_offsets": [begin, end]}
        for name, (dtype, count, begin, end) in tensors.items()
    }
    text = json.dumps(header).encode().ljust(header_bytes)
    return len(text).to_bytes(8, "little") + text + some_bytes(seed, left)


def model(seed: str, *sizes: int) -> dict[str, bytes]:
    """Shards of these sizes, a config and a card."""
    shards = {f"model-{n + 1:05}-of-{len(sizes):05}.safetensors": weights(f"{seed}{n}", size) for n, size in enumerate(sizes)}
    return shards | {"config.json": json.dumps({"seed": seed}).encode(), "README.md": f"# {seed}\n".encode()}


def size_of(files: Mapping[str, bytes]) -> int:
    return sum(map(len, files.values()))


@dataclass(frozen=True)
class Kept:
    """What must not change about a file."""

    mode: int
    inode: int
    size: int
    mtime_ns: int
    digest: str


def snapshot(folder: Path) -> dict[str, Kept | None]:
    """Everything below a folder but `run`, which lives: folders are None; links and sockets count by name alone."""
    found: dict[str, Kept | None] = {}
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).parts[0] == "run":
            continue
        status = path.lstat()
        is_file = stat.S_ISREG(status.st_mode)
        digest = sha256(path.read_bytes()).hexdigest() if is_file else ""
        kept = Kept(status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, digest)
        found[str(path.relative_to(folder))] = kept if is_file else None
    return found


def inodes(folder: str | Path) -> dict[str, int]:
    """Inode of every file below a folder, by relative path."""
    root = Path(folder).resolve()
    return {str(path.relative_to(root)): path.stat().st_ino for path in root.rglob("*") if path.is_file()}


def disk_bytes(folder: Path) -> int:
    """Bytes on the disk below a folder, each inode once."""
    found = {(s.st_dev, s.st_ino): s.st_blocks * 512 for path in folder.rglob("*") for s in [path.lstat()]}
    return sum(found.values())


def fetched(node: Node, published: Mapping[str, Any], *peers: Node, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Fetch what was published, from these nodes."""
    where = [part for peer in peers for part in ("--peer", peer.address)]
    return node.ok("fetch", published["link"], *where, "--timeout", "20", *more)


def check_uploaded(node: Node, name: str, size: int) -> None:
    """The node's own counter agrees that it sent no more than `size` bytes of this release, plus what protocols waste.

    It may have missed some: libtorrent does not count what it was sending to a peer that hung up in that moment, because it had
    all it wanted. How much arrived, to the byte, is said by whoever fetched it.
    """
    wait_until(lambda: node.release(name)["uploaded"] >= size // 4, 10, f"most of {size} bytes uploaded")
    assert node.release(name)["uploaded"] <= size * 1.02 + 64 * 1024


def processes_of(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        found.append(current := waiting.pop())
        waiting += children.get(current, [])
    return found


def bytes_read(pid: int) -> int:
    """What the kernel says that a process and its descendants read."""
    total = 0
    for process in processes_of(pid):
        fields = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
        total += int(fields["rchar"])
    return total


def flip_byte(path: Path, at: int) -> None:
    """Damage one byte in place, and leave length, mode and modification time as they are."""
    status = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 0x40]))
    path.chmod(stat.S_IMODE(status.st_mode))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
