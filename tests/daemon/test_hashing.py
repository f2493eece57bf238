"""The hash pool against plain hashlib, over real files and real processes."""

from __future__ import annotations

import os
import random
import signal
from hashlib import sha1, sha256
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing

from modelp2p.daemon import hashing
from modelp2p.daemon.hasher import Hasher
from modelp2p.daemon.hashing import FileToHash, HashPool
from modelp2p.daemon.hashpool import StateLostError
from modelp2p.protocol.errors import CorruptError, ModelP2PError, StoreError
from modelp2p.protocol.merkle import LEAF_BYTES, piece_hash, pieces_in, root_of_layer

PIECE = 4 * LEAF_BYTES
# 0 and 1; around a leaf; around a piece (the padding rule changes there); two pieces and one byte; beyond one buffer.
INTERESTING_SIZES = [0, 1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 1, 1_500_000]


def make(folder: Path, size: int) -> tuple[Path, bytes]:
    data = random.Random(size).randbytes(size)
    path = folder / f"{size}.bin"
    path.write_bytes(data)
    return path, data


def layer_of(data: bytes, piece_length: int = PIECE) -> bytes:
    cuts = range(0, len(data), piece_length)
    return b"".join(piece_hash(data[at : at + piece_length], piece_length, len(data) <= piece_length) for at in cuts)


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("size", INTERESTING_SIZES)
@pytest.mark.parametrize("is_mapped", [False, True])
def test_the_worker_agrees_with_hashlib(tmp_path: Path, size: int, is_mapped: bool) -> None:
    path, data = make(tmp_path, size)
    # Three leaves do not divide a piece: pieces straddle reads.
    hasher = Hasher(buffer_bytes=3 * LEAF_BYTES, window_bytes=3 * LEAF_BYTES)
    hasher.is_mapped = is_mapped
    with path.open("rb") as file:
        fd, count = file.fileno(), pieces_in(size, PIECE)
        layer = layer_of(data)
        assert hasher.pieces(fd, size, PIECE, 0, count) == layer
        for first in range(count):
            assert hasher.pieces(fd, size, PIECE, first, 1) == layer[32 * first : 32 * first + 32]
        assert hasher.flat(fd, size, git=False) == (sha256(data).digest(), b"")
        assert hasher.flat(fd, size, git=True)[1] == sha1(b"blob %d\0" % size + data).digest()
        for at in range(0, size, 70_001):
            hasher.flat_update("k", fd, at, min(size, at + 70_001))
        assert hasher.flat_finish("k", size) == sha256(data).digest()
        ends = [min(size, at + 2 * PIECE) for at in range(0, size, 2 * PIECE)]
        both = b"".join(hasher.both_update("b", fd, at * 2 * PIECE, end, size, PIECE) for at, end in enumerate(ends))
        assert both == layer
        assert hasher.flat_finish("b", size) == sha256(data).digest()


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_shorter_file_is_an_error_and_never_a_hash(tmp_path: Path, is_mapped: bool) -> None:
    path, data = make(tmp_path, 2 * PIECE)
    hasher = Hasher()
    hasher.is_mapped = is_mapped
    with path.open("rb") as file:
        fd, size = file.fileno(), len(data) + 1
        with pytest.raises(CorruptError, match="shorter than expected"):
            hasher.pieces(fd, size, PIECE, 0, 3)
        with pytest.raises(CorruptError, match="shorter than expected"):
            hasher.flat(fd, size, git=True)
        with pytest.raises(CorruptError, match="shorter than expected"):
            hasher.flat_update("k", fd, 0, size)
        with pytest.raises(StoreError, match="start over"):
            hasher.flat_finish("k", size)


def test_a_flat_hash_goes_on_only_where_it_stands(tmp_path: Path) -> None:
    path, data = make(tmp_path, PIECE)
    hasher = Hasher()
    with path.open("rb") as file:
        hasher.flat_update("k", file.fileno(), 0, 100)
        with pytest.raises(StoreError, match="stands at byte 100, not 50"):
            hasher.flat_update("k", file.fileno(), 50, 100)
        hasher.flat_update("k", file.fileno(), 100, 200)
        assert hasher.flat_finish("k", 200) == sha256(data[:200]).digest()


@pytest.mark.slow
async def test_many_files_on_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 4 * PIECE)  # so that small files take the ways of large ones
    monkeypatch.setattr(hashing, "LEAD_BYTES", 8 * PIECE)
    made = [make(tmp_path, size) for size in [*INTERESTING_SIZES, 5_000_000]]
    files = [
        FileToHash(lambda path=path: os.open(path, os.O_RDONLY), len(data), git=len(data) < 70_000)  # type: ignore[misc]
        for path, data in made
    ]
    told: list[int] = []
    fds = len(os.listdir("/proc/self/fd"))
    async with HashPool(workers=2) as pool:
        assert pool.statistics().workers == 0
        found = await pool.hash_files(files, PIECE, told.append)
        pids = pool.pids
        assert len(pids) == 2
        total = sum(len(data) for _, data in made)
        statistics = pool.statistics()
        # Two large files for two workers: each is read once for both hashes.
        assert statistics.bytes_read == 2 * total - 6_500_000
        assert statistics.pieces == sum(pieces_in(len(data), PIECE) for _, data in made)
        assert statistics.waiting == statistics.replaced == 0
        # One alone is split over both.
        assert await pool.hash_files(files[-1:], PIECE) == found[-1:]
        assert pool.statistics().bytes_read == statistics.bytes_read + 2 * 5_000_000
    assert sum(told) == total
    for (_, data), hashes in zip(made, found, strict=True):
        assert hashes.layer == layer_of(data)
        assert hashes.root == root_of_layer(hashes.layer, PIECE)
        assert hashes.sha256 == sha256(data).digest()
        assert hashes.git_sha1 == (sha1(b"blob %d\0" % len(data) + data).digest() if len(data) < 70_000 else None)
    assert not any(is_running(pid) for pid in pids)
    assert len(os.listdir("/proc/self/fd")) <= fds + 3  # trio's own wake-up descriptors


@pytest.mark.slow
async def test_a_short_file_is_one_plain_error(tmp_path: Path) -> None:
    path, data = make(tmp_path, 2 * PIECE)
    async with HashPool(workers=2) as pool:
        with pytest.raises(CorruptError, match="shorter than expected"):
            await pool.hash_files([FileToHash(lambda: os.open(path, os.O_RDONLY), len(data) + 1)], PIECE)
        with pytest.raises(ModelP2PError, match="cannot open a file"):
            await pool.hash_files([FileToHash(lambda: os.open(tmp_path / "none", os.O_RDONLY), 5)], PIECE)
        with path.open("rb") as file:
            assert (await pool.flat(file.fileno(), len(data)))[0] == sha256(data).digest()
            with pytest.raises(ValueError, match="has no pieces"):
                await pool.hash_pieces(file.fileno(), file_size=len(data), piece_length=PIECE, first=1, count=2)
        folder = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(StoreError, match="cannot read a file to hash it"):
            await pool.flat(folder, 5)
        os.close(folder)


@pytest.mark.slow
async def test_a_dead_worker_is_replaced_and_its_flat_hash_starts_over(tmp_path: Path) -> None:
    path, data = make(tmp_path, 2 * PIECE)
    async with HashPool(workers=1) as pool:
        with path.open("rb") as file:
            fd = file.fileno()
            await pool.flat_update("k", fd, 0, 100)
            os.kill(pool.pids[0], signal.SIGKILL)
            layer = await pool.hash_pieces(fd, file_size=len(data), piece_length=PIECE, first=0, count=2)
            assert layer == layer_of(data)
            assert pool.statistics().replaced == 1
            assert not pool.is_mapping
            with pytest.raises(StateLostError):
                await pool.flat_update("k", fd, 100, 200)
            await pool.flat_update("k", fd, 0, 100)
            await pool.flat_update("k", fd, 100, len(data))
            assert await pool.flat_finish("k", len(data)) == sha256(data).digest()
            with pytest.raises(StateLostError):
                await pool.flat_finish("k", len(data))


@pytest.mark.slow
async def test_a_file_cut_short_while_it_is_hashed_is_an_error_with_words(tmp_path: Path) -> None:
    """Seen before it is mapped or felt after (SIGBUS), the answer is the same."""
    path, size = tmp_path / "cut.bin", 64 << 20
    async with HashPool(workers=1) as pool:
        answers: list[Exception] = []

        async def hash_it() -> None:
            with path.open("rb") as file:
                try:
                    await pool.hash_pieces(file.fileno(), file_size=size, piece_length=1 << 20, first=0, count=64)
                except ModelP2PError as exc:
                    answers.append(exc)

        for number in range(3):
            with path.open("wb") as file:
                file.truncate(size)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hash_it)
                while pool.requests == number or pool.waiting:
                    await trio.lowlevel.checkpoint()
                os.truncate(path, LEAF_BYTES)
        assert [type(answer) for answer in answers] == [CorruptError] * 3
        assert (await pool.flat(os.open(path, os.O_RDONLY), LEAF_BYTES))[0] == sha256(bytes(LEAF_BYTES)).digest()


@pytest.mark.slow
async def test_a_request_that_kills_two_workers_is_an_error(tmp_path: Path) -> None:
    path, data = make(tmp_path, PIECE)
    async with HashPool(workers=1) as pool:
        with path.open("rb") as file:
            with pytest.raises(StoreError, match="died twice"):
                await pool.ask({"op": "no such operation"}, file.fileno())
            assert (await pool.flat(file.fileno(), len(data)))[0] == sha256(data).digest()


@pytest.mark.slow
async def test_cancelled_requests_leave_the_pool_working(tmp_path: Path) -> None:
    path, data = make(tmp_path, 1_500_000)
    fds = 0
    async with HashPool(workers=1, queue_limit=3) as pool:
        with path.open("rb") as file:
            await pool.flat(file.fileno(), 1)
            fds = len(os.listdir("/proc/self/fd"))

            async def ask() -> None:
                await pool.hash_pieces(
                    file.fileno(), file_size=len(data), piece_length=PIECE, first=0, count=pieces_in(len(data), PIECE)
                )

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                assert pool.statistics().waiting <= 3
                nursery.cancel_scope.cancel()
            assert (await pool.flat(file.fileno(), len(data)))[0] == sha256(data).digest()
            assert len(os.listdir("/proc/self/fd")) == fds
            assert pool.statistics().replaced == 0


@pytest.mark.slow
async def test_leaving_the_pool_ends_waiting_callers_and_processes(tmp_path: Path) -> None:
    path, data = make(tmp_path, 1_500_000)
    errors: list[StoreError] = []

    async def ask(pool: HashPool, fd: int) -> None:
        try:
            while True:
                await pool.flat(fd, len(data))
        except StoreError as exc:
            errors.append(exc)

    pids: list[int] = []

    async def leave_by_error(fd: int) -> None:
        async with HashPool(workers=1) as pool:
            await pool.flat(fd, 1)
            pids.extend(pool.pids)
            for _ in range(30):
                nursery.start_soon(ask, pool, fd)
            await trio.testing.wait_all_tasks_blocked()
            raise KeyError("the caller's own error passes as it is")

    with path.open("rb") as file:
        async with trio.open_nursery() as nursery:
            with pytest.raises(KeyError):
                await leave_by_error(file.fileno())
    assert len(errors) == 30
    assert not any(is_running(pid) for pid in pids)
