"""Records: what a loader may skip, and everything that must make it hash again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.names import Revision
from modelp2p.protocol.record import MAGIC, FileRecord, ReleaseRecord, decode_record, encode_record

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map


@dataclass(frozen=True)
class Stat:
    st_dev: int = 1
    st_ino: int = 2
    st_size: int = 3
    st_mtime_ns: int = 4
    st_ctime_ns: int = 5


FILE = FileRecord.of(Stat(), bytes(32), borrowed=False)
RECORD = ReleaseRecord(
    bytes(range(32)),
    Revision("a" * 40),
    (b"s" * 32,),
    True,
    {"a/b": FILE, "empty": replace(FILE, root=b"", mtime_ns=-1, borrowed=True)},
)


def test_round_trip() -> None:
    assert decode_record(encode_record(RECORD)) == RECORD


def test_file_matches_only_its_own_stat() -> None:
    assert FILE.matches(Stat())
    for changed in (Stat(st_dev=9), Stat(st_ino=9), Stat(st_size=9), Stat(st_mtime_ns=9), Stat(st_ctime_ns=9)):
        assert not FILE.matches(changed)


def test_a_new_link_may_be_forgiven_but_no_other_change() -> None:
    assert FILE.matches(Stat(st_ctime_ns=9), ignore_ctime=True)
    for changed in (Stat(st_dev=9), Stat(st_ino=9), Stat(st_size=9), Stat(st_mtime_ns=9)):
        assert not FILE.matches(changed, ignore_ctime=True)


def body() -> Map:
    return codec.unpack_map(encode_record(RECORD)[len(MAGIC) :], max_bytes=1 << 20)


def file_body() -> Map:
    files = body()["files"]
    assert isinstance(files, dict)
    entry = files["a/b"]
    assert isinstance(entry, dict)
    return entry


BENT: dict[str, Map] = {
    "version 2": {"v": 2},
    "version 0": {"v": 0},
    "short info-hash": {"info_hash": bytes(20)},
    "revision": {"revision": "main"},
    "complete as number": {"complete": 1},
    "statement as text": {"statements": ["x"]},
    "path that escapes": {"files": {"../a": file_body()}},
    "absolute path": {"files": {"/a": file_body()}},
    "file as list": {"files": {"a": []}},
    "negative size": {"files": {"a": file_body() | {"size": -1}}},
    "missing inode": {"files": {"a": {key: value for key, value in file_body().items() if key != "ino"}}},
    "borrowed as number": {"files": {"a": file_body() | {"borrowed": 0}}},
}


@pytest.mark.parametrize("name", BENT)
def test_bent_record_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        decode_record(MAGIC + codec.pack(body() | BENT[name]))


def test_truncated_padded_and_foreign_records_are_refused() -> None:
    data = encode_record(RECORD)
    for end in range(len(data)):
        with pytest.raises(FormatError):
            decode_record(data[:end])
    for other in (data + b"\0", b"X" + data[1:], MAGIC):
        with pytest.raises(FormatError):
            decode_record(other)
