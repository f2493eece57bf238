"""Bytes too large for a control frame travel as sealed memory files: nobody can change them after they were sent."""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from collections.abc import Callable

from modelp2p.daemon.diskerror import on_disk
from modelp2p.protocol.errors import FormatError

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def sealed(name: str, data: bytes) -> int:
    """A read-only memory file with `data`; the caller closes it."""
    with on_disk("cannot make a memory file"):
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


class SealedCache:
    """The last few memory files that were sent, by what is in them: who asks again gets the same memory, not more of it.

    A client that never reads, or never closes, keeps what it was sent; without this a loop of requests would fill the machine.
    Resources: one descriptor for each; `close` gives them back.
    """

    def __init__(self, capacity: int = 16) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[tuple[bytes, str], int] = OrderedDict()

    def get(self, digest: bytes, name: str, make: Callable[[], bytes]) -> int:
        """A descriptor of the file `name` of a statement, made by `make` where it is not kept; the caller closes it."""
        key = (digest, name)
        if key not in self._kept:
            self._kept[key] = sealed(name, make())
            if len(self._kept) > self._capacity:
                os.close(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(key)
        with on_disk("cannot hand out a memory file"):
            return os.dup(self._kept[key])

    def close(self) -> None:
        """Forget all of them."""
        while self._kept:
            os.close(self._kept.popitem()[1])


def read_sealed(fd: int, limit_bytes: int) -> bytes:
    """The whole content of a descriptor a client sent: a memory file, or a plain file it opened for us.

    Raises:
        FormatError: longer than `limit_bytes`.
    """
    with on_disk("cannot read what the client sent"):
        data = bytearray()
        while chunk := os.pread(fd, min(1 << 20, limit_bytes + 1 - len(data)), len(data)):
            data += chunk
            if len(data) > limit_bytes:
                raise FormatError(f"what was sent has more than the limit of {limit_bytes} bytes")
    return bytes(data)
