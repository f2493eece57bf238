"""The journal file: opened after crashes, kept short, and never trusted after a failed write."""

from __future__ import annotations

import os
import random
import resource
import signal
from pathlib import Path

import pytest

from modelp2p.daemon.journal import Journal
from modelp2p.protocol.errors import StoreError
from modelp2p.protocol.journal import Completed, FileDone, FileStamp, Lost, Proven, Record, encode_header, encode_record
from modelp2p.protocol.ranges import Ranges

INFO_HASH = random.Random(3).randbytes(32)


def test_appended_records_are_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal.open(path, INFO_HASH) as journal:
        journal.append(Proven(Ranges.span(0, 3)), FileDone("a", FileStamp(1, 2, 3, 4, 5)))
        journal.append(Proven(Ranges.span(5, 6)))
        journal.append()
        seen = journal.state
    assert path.stat().st_mode & 0o777 == 0o600
    with Journal.open(path, INFO_HASH) as journal:
        assert journal.state == seen
        assert journal.size_bytes == path.stat().st_size
        assert "4 pieces, 1 files" in repr(journal)


def test_a_record_after_a_torn_tail_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "j"
    first, second = encode_record(Proven(Ranges.span(0, 1))), encode_record(Proven(Ranges.span(1, 2)))
    for cut in range(len(second)):
        path.write_bytes(encode_header(INFO_HASH) + first + second[:cut])
        with Journal.open(path, INFO_HASH) as journal:
            assert journal.state.proven == Ranges.span(0, 1)
            journal.append(Proven(Ranges.span(7, 8)))
        with Journal.open(path, INFO_HASH) as journal:
            assert journal.state.proven == Ranges.of([(0, 1), (7, 8)])


def test_a_torn_header_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "j"
    header = encode_header(INFO_HASH)
    for cut in range(len(header)):
        path.write_bytes(header[:cut])
        with Journal.open(path, INFO_HASH) as journal:
            journal.append(Completed())
        with Journal.open(path, INFO_HASH) as journal:
            assert journal.state.complete


def test_a_large_journal_is_rewritten_and_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal.open(path, INFO_HASH, compact_bytes=512) as journal:
        for piece in range(100):
            journal.append(Proven(Ranges.span(piece, piece + 1)))
            assert journal.size_bytes == path.stat().st_size < 600
        journal.append(Lost(Ranges.span(50, 51)))
        seen = journal.state
    assert [one.name for one in tmp_path.iterdir()] == ["j"]
    with Journal.open(path, INFO_HASH) as journal:
        assert journal.state == seen
        assert journal.state.proven.total == 99


def test_a_failed_write_leaves_no_half_record(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal.open(path, INFO_HASH) as journal:
        journal.append(Proven(Ranges.span(0, 1)))
        size = path.stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        try:
            with pytest.raises(StoreError, match="cannot write the journal"):
                journal.append(Completed())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        assert path.stat().st_size == size
        assert not journal.state.complete
        journal.append(Completed())
    with Journal.open(path, INFO_HASH) as journal:
        assert journal.state.complete


def test_after_a_failed_sync_nothing_more_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, os.strerror(5))

    with Journal.open(tmp_path / "j", INFO_HASH) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(StoreError, match="cannot sync"):
                journal.append(Completed())
        with pytest.raises(StoreError, match="cannot be used"):
            journal.append(Completed())
        assert not journal.state.complete


@pytest.mark.parametrize("plant", ["symlink", "hard link", "fifo", "folder"])
def test_a_planted_journal_is_refused(tmp_path: Path, plant: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "j"
    victim.write_bytes(b"precious")
    match plant:
        case "symlink":
            path.symlink_to(victim)
        case "hard link":
            path.hardlink_to(victim)
        case "fifo":
            os.mkfifo(path)
        case _:
            path.mkdir()
    with pytest.raises(StoreError):
        Journal.open(path, INFO_HASH)
    assert victim.read_bytes() == b"precious"


def test_the_journal_of_another_release_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    records: list[Record] = [Completed()]
    data = encode_header(bytes(32)) + b"".join(encode_record(record) for record in records)
    path.write_bytes(data)
    with pytest.raises(StoreError, match="another release"):
        Journal.open(path, INFO_HASH)
    assert path.read_bytes() == data
