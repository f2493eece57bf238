"""Processes that hash for a load: the same digests as hashlib, and no load that depends on them."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as oracle

from modelp2p.loader import open_release
from modelp2p.loader.hashers import MAX_PROCESSES, Hashers
from modelp2p.loader.hashing import Workers
from modelp2p.loader.parts import part_of
from modelp2p.loader.pieces import PieceTable
from modelp2p.loader.shard import Way, open_shard
from modelp2p.loader.source import SourceFile
from modelp2p.loader.views import view_parts
from modelp2p.protocol.errors import IntegrityError
from modelp2p.protocol.merkle import LEAF_BYTES, piece_hash, pieces_in
from modelp2p.protocol.statement import verify_statement
from tests.loader.models import MIB, file_of
from tests.loader.test_pipeline import with_tools
from tests.releases import Home, statement_of

PIECE = 2 * LEAF_BYTES
SIZE = 7 * PIECE + 5
PATIENCE_S = 20


@pytest.fixture
def data() -> bytes:
    return random.Random(3).randbytes(SIZE)


@pytest.fixture
def fd(tmp_path: Path, data: bytes) -> Iterator[int]:
    (tmp_path / "file").write_bytes(data)
    opened = os.open(tmp_path / "file", os.O_RDONLY)
    yield opened
    os.close(opened)


@pytest.fixture
def hashers() -> Iterator[Hashers]:
    found = Hashers(2, worth_bytes=1)
    yield found
    found.close()


def layer_of(data: bytes) -> bytes:
    return b"".join(piece_hash(data[at : at + PIECE], PIECE, len(data) <= PIECE) for at in range(0, len(data), PIECE))


def ready(hashers: Hashers, fd: int) -> bytes:
    """Wait until a process answers; the hashes of all pieces."""
    while (found := hashers.hashes(fd, SIZE, PIECE, range(pieces_in(SIZE, PIECE)))) is None:
        assert hashers.pids, hashers.trouble
    return found


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_process_gives_the_hashes_of_the_layer(hashers: Hashers, fd: int, data: bytes) -> None:
    hashers.warm(1)
    assert ready(hashers, fd) == layer_of(data)
    assert hashers.hashes(fd, SIZE, PIECE, range(6, 8)) == layer_of(data)[6 * 32 :]
    assert not hashers.trouble


@pytest.mark.slow
def test_a_stretch_of_a_file_in_memory_is_hashed_as_that_stretch(hashers: Hashers, fd: int, data: bytes) -> None:
    hashers.warm(1)
    ready(hashers, fd)
    staging = os.memfd_create("staging")
    with os.fdopen(staging, "wb") as file:
        file.write(data[6 * PIECE :])
        file.flush()
        assert hashers.hashes(staging, SIZE, PIECE, range(6, 8), 6 * PIECE) == layer_of(data)[6 * 32 :]


def test_little_work_starts_no_process(fd: int) -> None:
    hashers = Hashers(4)
    hashers.warm(100 << 20)
    assert hashers.pids == []
    assert hashers.hashes(fd, SIZE, PIECE, range(1)) is None


@pytest.mark.slow
def test_no_more_processes_are_started_than_allowed_and_none_is_left(hashers: Hashers) -> None:
    hashers.warm(1)
    hashers.warm(1 << 30)
    pids = hashers.pids
    assert len(pids) == 2
    hashers.close()
    assert hashers.pids == []
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.slow
def test_the_work_of_a_killed_process_is_given_back(hashers: Hashers, fd: int) -> None:
    hashers.warm(1)
    ready(hashers, fd)
    (pid,) = hashers.pids
    os.kill(pid, signal.SIGKILL)
    assert hashers.hashes(fd, SIZE, PIECE, range(1)) is None
    assert "ended" in hashers.trouble
    hashers.warm(1 << 30)
    assert hashers.pids == [], "no second one is started where the first one died"


def stop(pid: int) -> None:
    """Return when the process is stopped, and answers nobody."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


@pytest.mark.slow
def test_whoever_waits_for_a_stuck_process_is_let_go_by_an_interrupt(hashers: Hashers, fd: int, data: bytes) -> None:
    hashers.warm(1)
    ready(hashers, fd)
    stop(hashers.pids[0])
    found: list[bytes | None] = []
    waiting = threading.Thread(target=lambda: found.append(hashers.hashes(fd, SIZE, PIECE, range(8))), daemon=True)
    waiting.start()
    while not hashers.busy:
        assert waiting.is_alive()
    hashers.warm(2)
    ready(hashers, fd)
    stop(hashers.pids[1])
    hashers.interrupt()
    hashers.interrupt()
    waiting.join(PATIENCE_S)
    assert found == [None]
    # Who comes later does not wait long for the other one either.
    assert hashers.hashes(fd, SIZE, PIECE, range(8)) is None
    assert hashers.pids == []
    # Nobody knows what was wrong with them, if anything: the next load may start others.
    assert hashers.trouble == ""
    hashers.warm(1)
    assert ready(hashers, fd) == layer_of(data)


@pytest.mark.slow
def test_an_interrupt_leaves_processes_alone_that_are_well(hashers: Hashers, fd: int, data: bytes) -> None:
    hashers.warm(1)
    ready(hashers, fd)
    pids = hashers.pids
    hashers.interrupt()
    assert hashers.hashes(fd, SIZE, PIECE, range(8)) == layer_of(data)
    assert hashers.pids == pids


@pytest.mark.slow
def test_a_process_that_falls_silent_is_waited_for_no_longer_than_its_time(fd: int, data: bytes) -> None:
    hashers = Hashers(1, worth_bytes=1, patience_s=PATIENCE_S)
    hashers.warm(1)
    assert ready(hashers, fd) == layer_of(data)
    (pid,) = hashers.pids
    stop(pid)
    hashers.patience_s = 0.01
    assert hashers.hashes(fd, SIZE, PIECE, range(8)) is None
    assert "said nothing for 0.01 s" in hashers.trouble
    assert hashers.pids == []
    assert not is_running(pid)
    hashers.close()


@pytest.mark.slow
def test_a_closed_one_starts_nothing_any_more(hashers: Hashers, fd: int) -> None:
    hashers.interrupt()
    hashers.close()
    hashers.warm(1 << 30)
    assert hashers.pids == []
    assert hashers.hashes(fd, SIZE, PIECE, range(1)) is None


def test_there_are_never_more_than_pay() -> None:
    assert Hashers(191).limit == MAX_PROCESSES == 31
    assert Hashers(3).limit == 3


@pytest.mark.parametrize("executable", [None, ""])
def test_without_a_known_interpreter_the_caller_hashes(fd: int, monkeypatch: pytest.MonkeyPatch, executable: str | None) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    hashers = Hashers(2, worth_bytes=1)
    hashers.warm(1 << 30)
    assert "interpreter" in hashers.trouble
    assert hashers.hashes(fd, SIZE, PIECE, range(1)) is None


def test_a_frozen_application_is_not_started_again(fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    application = tmp_path / "application"
    application.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    application.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(application))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    hashers = Hashers(2, worth_bytes=1)
    hashers.warm(1 << 30)
    assert hashers.pids == []
    assert "frozen" in hashers.trouble
    assert hashers.hashes(fd, SIZE, PIECE, range(1)) is None
    hashers.close()


@pytest.mark.slow
def test_a_file_cut_short_is_no_hash(hashers: Hashers, fd: int, tmp_path: Path) -> None:
    hashers.warm(1)
    ready(hashers, fd)
    os.truncate(tmp_path / "file", 6 * PIECE)
    assert hashers.hashes(fd, SIZE, PIECE, range(5, 8)) is None


def test_where_no_process_can_be_started_the_caller_hashes(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    hashers = Hashers(2, worth_bytes=1)
    hashers.warm(1 << 30)
    assert "could be started" in hashers.trouble
    assert hashers.hashes(fd, SIZE, PIECE, range(1)) is None


@pytest.mark.slow
@pytest.mark.parametrize("is_bad", [False, True])
def test_views_are_proven_by_processes(hashers: Hashers, tmp_path: Path, is_bad: bool) -> None:
    signed = file_of(a=3_000_000)
    release = verify_statement(statement_of({"m.safetensors": signed}))
    (entry,) = release.manifest.files
    table = PieceTable.of(entry, release.manifest.piece_length, release.layers.of(entry))
    path = tmp_path / "m.safetensors"
    path.write_bytes(signed[:-1] + bytes([signed[-1] ^ is_bad]))
    shard = open_shard(SourceFile(str(path), entry), table, lambda _: Way(is_view=True, is_hashed=True), 1 << 20)
    hashers.warm(1)
    while hashers.hashes(shard.source.fileno(), table.size, table.piece_length, range(1)) is None:
        assert hashers.pids, hashers.trouble
    parts = [part_of(info, shard.header) for info in shard.header.tensors]
    counted: list[int] = []
    # One worker, the caller itself, so that every run goes to the process that is ready.
    workers = Workers(1)
    if is_bad:
        with pytest.raises(IntegrityError) as caught:
            view_parts(shard, parts, workers, hashers, counted.append)
        assert caught.value.facts["piece"] == table.count - 1
    else:
        ((part, tensor, is_view),) = view_parts(shard, parts, workers, hashers, counted.append)
        assert (part.name, is_view) == ("a", True)
        assert torch.equal(tensor, oracle(signed)["a"])
        assert sum(counted) == table.size
    shard.close()


class Counting(Hashers):
    """Counts the pieces that processes hashed."""

    pieces = 0

    def hashes(self, fd: int, file_size: int, piece_length: int, pieces: range, origin: int = 0) -> bytes | None:
        found = super().hashes(fd, file_size, piece_length, pieces, origin)
        self.pieces += len(pieces) if found is not None else 0
        return found


@pytest.mark.slow
@pytest.mark.parametrize("is_bad", [False, True])
def test_copies_are_proven_by_processes_where_they_were_read_to(home: Home, tree: Path, is_bad: bool) -> None:
    path = tree / "model-2.safetensors"
    signed = path.read_bytes()
    if is_bad:
        path.chmod(0o644)
        path.write_bytes(signed[:-1] + bytes([signed[-1] ^ 1]))
    with open_release("lab/model", home=home.path, mapping="pread", verify="cpu", workers=1, on_bad=lambda *_: False) as release:
        hashers = Counting(1, worth_bytes=1)
        with_tools(release, hashers=hashers)
        hashers.warm(1)
        with path.open("rb") as file:
            while hashers.hashes(file.fileno(), len(signed), MIB, range(1)) is None:
                assert hashers.pids, hashers.trouble
        if is_bad:
            with pytest.raises(IntegrityError) as caught:
                release.load("d")
            assert (caught.value.facts["path"], caught.value.facts["piece"]) == ("model-2.safetensors", 3)
        else:
            assert torch.equal(release.tensor("d"), oracle(signed)["d"])
            assert hashers.pieces == 1 + pieces_in(len(signed), MIB)
        hashers.close()
