"""The three readers under one suite, and the evidence by which one is chosen."""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from modelp2p.loader import readers
from modelp2p.loader.readers import DirectReader, Evidence, Reader, choose, evidence_of, reader_of
from modelp2p.loader.source import SourceFile
from modelp2p.protocol.errors import IntegrityError, StoreError
from modelp2p.protocol.kinds import kind_of
from modelp2p.protocol.manifest import FileEntry
from modelp2p.protocol.merkle import leaf_hashes, root_of

NAMES = ("preadv", "mmap", "direct")
DATA = bytes(n * 7 % 256 for n in range(100_003))


@pytest.fixture
def source(tmp_path: Path) -> SourceFile:
    place = tmp_path / "m.safetensors"
    place.write_bytes(DATA)
    entry = FileEntry(
        "m.safetensors", len(DATA), root_of(leaf_hashes(DATA)), sha256(DATA).digest(), "sha256", None, kind_of("m.safetensors")
    )
    return SourceFile(str(place), entry)


def made(source: SourceFile, name: str) -> Reader:
    reader, refusal = reader_of(source, name)
    if refusal:
        pytest.skip(refusal)
    return reader


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("begin", "end"), [(0, len(DATA)), (4096, 8192), (16384, 16384 + 5000), (98304, len(DATA)), (98304, 98305)]
)
def test_bytes_of_the_file(source: SourceFile, name: str, begin: int, end: int) -> None:
    reader = made(source, name)
    slot = memoryview(mmap.mmap(-1, 1 << 17))
    reader.read_into(slot[4096 : 4096 + end - begin], begin)
    assert slot[4096 : 4096 + end - begin] == DATA[begin:end]
    assert not any(slot[:4096])
    assert not any(slot[4096 + end - begin :]), "nothing behind what was asked"
    reader.close()
    reader.close()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 4096, 50_000, len(DATA) - 1])
def test_a_file_that_shrank(source: SourceFile, name: str, size: int) -> None:
    reader = made(source, name)
    os.truncate(source.path, size)
    with pytest.raises(IntegrityError, match=f"has {size} bytes"):
        reader.read_into(memoryview(mmap.mmap(-1, 1 << 17))[: len(DATA)], 0)


@pytest.mark.parametrize("name", ["preadv", "direct"])
def test_a_file_that_shrinks_at_any_time_never_kills_the_process(source: SourceFile, name: str) -> None:
    reader = made(source, name)
    ended = threading.Event()

    def writer() -> None:
        while not ended.is_set():
            os.truncate(source.path, 5000)
            Path(source.path).write_bytes(DATA)

    thread = threading.Thread(target=writer)
    thread.start()
    slot = memoryview(mmap.mmap(-1, 1 << 17))
    try:
        for _ in range(100):
            try:
                reader.read_into(slot[: len(DATA)], 0)
            except IntegrityError:
                continue
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("name", NAMES)
def test_many_threads_read_at_once(source: SourceFile, name: str) -> None:
    reader = made(source, name)
    slot = memoryview(mmap.mmap(-1, 1 << 17))
    threads = [
        threading.Thread(target=reader.read_into, args=(slot[at : min(at + 4096, len(DATA))], at))
        for at in range(0, len(DATA), 4096)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slot[: len(DATA)] == DATA


def test_a_file_system_without_direct_reads(source: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(source, "open_direct", refused)
    reader, reason = reader_of(source, "direct")
    assert (reader.name, reason) == ("preadv", "'m.safetensors' cannot be read past the page cache: Invalid argument")


def test_a_file_system_without_mappings(source: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> memoryview:
        raise StoreError("'m.safetensors' cannot be mapped: No such device")

    monkeypatch.setattr(source, "mapping", refused)
    reader, reason = reader_of(source, "mmap")
    assert (reader.name, reason) == ("preadv", "'m.safetensors' cannot be mapped: No such device")
    assert readers.cached_share(source) is None


def test_a_direct_reader_gives_its_descriptor_back(source: SourceFile) -> None:
    made(source, "direct").close()
    before = len(os.listdir("/proc/self/fd"))
    reader = DirectReader(source)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_source_goes_on_with_the_file_that_took_its_place(source: SourceFile) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fresh = Path(source.path).with_name("fresh")
    fresh.write_bytes(bytes(len(DATA)))
    fresh.replace(source.path)
    with pytest.raises(IntegrityError, match="replaced"):
        source.check_unchanged()
    source.reopen()
    source.check_unchanged()
    slot = memoryview(bytearray(4))
    source.read_into(slot, 0)
    assert bytes(slot) == bytes(4)
    assert len(os.listdir("/proc/self/fd")) == before


GIB = 1 << 30
COLD = Evidence(size=60 * GIB, is_own=True, file_system="ext4", cached=0.0, available_bytes=100 * GIB)
CHOICES = {
    "cold and large": (COLD, "auto", "direct"),
    "cold, large and pread asked for": (COLD, "pread", "direct"),
    "cold, but it fits beside everything": (replace(COLD, size=10 * GIB), "auto", "preadv"),
    "large and warm": (replace(COLD, cached=0.9), "auto", "preadv"),
    "nothing is known": (replace(COLD, cached=None, available_bytes=None), "auto", "preadv"),
    "the store's own, in memory": (replace(COLD, file_system="tmpfs"), "auto", "mmap"),
    "someone else's, in memory": (replace(COLD, file_system="tmpfs", is_own=False), "auto", "preadv"),
    "in memory, pread asked for": (replace(COLD, file_system="tmpfs"), "pread", "preadv"),
}


@pytest.mark.parametrize(("evidence", "mapping", "name"), CHOICES.values(), ids=CHOICES.keys())
def test_choice(evidence: Evidence, mapping: str, name: str) -> None:
    assert choose(evidence, mapping=mapping) == name


def test_evidence_of_a_file_that_was_just_written(source: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evidence_of(source, is_own=True).cached is None, "a small file is not worth the calls"
    monkeypatch.setattr(readers, "available_bytes", lambda: 1000)
    evidence = evidence_of(source, is_own=True)
    assert evidence == Evidence(len(DATA), True, evidence.file_system, 1.0, 1000)


def test_what_proc_says(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {
        "/proc/meminfo": ["MemTotal: 9 kB", "MemAvailable:   123 kB"],
        "/proc/self/mountinfo": [
            "1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw",
            "2 1 0:27 / /dev/shm rw - tmpfs tmpfs rw",
        ],
    }
    monkeypatch.setattr(readers, "_lines", lines.__getitem__)
    assert readers.available_bytes() == 123 * 1024
    assert readers.file_system_of(os.makedev(0, 27)) == "tmpfs"
    assert readers.file_system_of(os.makedev(8, 1)) == "ext4"
    assert readers.file_system_of(os.makedev(8, 2)) == ""
