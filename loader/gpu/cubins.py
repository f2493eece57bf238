"""Compiled kernels on the disk, so that only the first load of a user on a machine compiles.

Invariants:
- the name says what went in: source, options, architecture, compiler; what does not match is never found;
- a file is its SHA-256 and the machine code: half a file or a flipped bit counts as absent;
- believed only if this user or root made it and no other can write it: who writes here decides what counts as proven;
- written under another name and renamed: many processes may fill it at once, and a reader sees all or nothing.

It deliberately never fails a load: what is wrong with the folder is told to the caller, who compiles instead.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from hashlib import sha256

from modelp2p.loader.gpu.nvrtc import options_for

MAX_CUBIN_BYTES = 4 << 20
"""Twenty times what ours take."""

_DIGEST_BYTES = 32


def default_folder() -> str:
    """`modelp2p/kernels` in the user's cache folder (XDG base directories)."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"), "modelp2p", "kernels")


def name_of(source: bytes, arch: str, version: tuple[int, int]) -> str:
    """The file name of what this compiler makes of the source: same name, same machine code."""
    parts = [source, " ".join(options_for(arch)).encode(), f"nvrtc {version[0]}.{version[1]}".encode()]
    # Digests of the parts, so that no two lists of parts run together to the same bytes.
    return f"{arch}-{sha256(b''.join(sha256(part).digest() for part in parts)).hexdigest()}.cubin"


def read(folder: str, name: str) -> bytes | str:
    """The machine code, or why there is none, in words."""
    path = os.path.join(folder, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                return f"{path}: not a file"
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
                return f"{path}: others can write it"
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(_DIGEST_BYTES + MAX_CUBIN_BYTES)
        finally:
            os.close(descriptor)
    except OSError as exc:
        return f"{path}: {exc.strerror}"
    image = data[_DIGEST_BYTES:]
    if not image or sha256(image).digest() != data[:_DIGEST_BYTES]:
        return f"{path}: damaged"
    return image


def write(folder: str, name: str, image: bytes) -> str:
    """Keep it for the next process; "" or why that was not possible, in words. Atomic; replaces what is there."""
    temporary = ""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".", dir=folder)  # 0600
        with open(descriptor, "wb") as file:
            file.write(sha256(image).digest() + image)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, os.path.join(folder, name))
    except OSError as exc:
        with contextlib.suppress(OSError):  # there is none, or the disk that refused refuses this as well
            os.unlink(temporary)
        return f"{folder}: {exc.strerror}"
    return ""
