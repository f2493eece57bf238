"""Memory files that cross the control socket: sealed, and the same memory for the same content."""

from __future__ import annotations

import os

import pytest

from modelp2p.daemon.sealed import SealedCache, read_sealed, sealed
from modelp2p.protocol.errors import FormatError


def test_what_was_sent_cannot_be_changed() -> None:
    fd = sealed("x", b"content")
    try:
        assert read_sealed(fd, 7) == b"content"
        with pytest.raises(FormatError):
            read_sealed(fd, 6)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"C", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def test_who_asks_again_gets_the_same_memory_and_old_ones_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    made: list[bytes] = []

    def get(cache: SealedCache, key: bytes) -> int:
        def make() -> bytes:
            made.append(key)
            return key * 3

        fd = cache.get(key, "x", make)
        inode = os.fstat(fd).st_ino
        assert read_sealed(fd, 100) == key * 3
        os.close(fd)
        return inode

    cache = SealedCache(capacity=2)
    first = get(cache, b"a")
    assert get(cache, b"a") == first
    get(cache, b"b")
    assert get(cache, b"a") == first  # used a moment ago: what goes next is "b"
    get(cache, b"c")
    assert get(cache, b"a") == first
    assert made == [b"a", b"b", b"c"]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    cache.close()
    assert len(os.listdir("/proc/self/fd")) == before
