"""When the daemon's record saves the hashing, and when it does not count."""

from __future__ import annotations

import dataclasses
import os
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modelp2p.loader import open_release
from modelp2p.loader.home import counts
from modelp2p.loader.shard import Standing, way_of
from modelp2p.protocol.errors import StoreError
from modelp2p.protocol.record import ReleaseRecord, decode_record, encode_record
from modelp2p.protocol.statement import Release, verify_statement
from tests.loader.models import bits
from tests.releases import Home, publisher, statement_of

if TYPE_CHECKING:
    from modelp2p.loader.stats import LoadStats


@pytest.fixture(scope="session")
def release(shards: dict[str, bytes]) -> Release:
    return verify_statement(statement_of(shards))


@pytest.fixture
def record_file(home: Home, release: Release) -> Path:
    return home.path / "store" / release.info_hash.hex() / "record"


def stats_of(home: Home, **options: str) -> LoadStats:
    with open_release("lab/model", home=home.path, **options) as opened:  # type: ignore[arg-type]
        tensors = opened.load()
        assert all(bits(tensor).numel() == tensor.nbytes for tensor in tensors.values())
        return opened.stats


def rewrite(place: Path, **changes: object) -> None:
    record = decode_record(place.read_bytes())
    place.write_bytes(encode_record(dataclasses.replace(record, **changes)))  # type: ignore[arg-type]


def test_a_record_that_fits_saves_all_hashing(home: Home) -> None:
    stats = stats_of(home)
    # Only the index is hashed besides, and is not counted: it is no tensor data.
    assert (stats.verified_bytes, stats.transfer) == (0, "mmap")
    assert stats.recorded_bytes == stats.bytes


def test_cpu_hashes_in_spite_of_it(home: Home) -> None:
    stats = stats_of(home, verify="cpu")
    assert stats.verified_bytes > stats.bytes
    assert stats.recorded_bytes == 0


def test_a_new_link_means_one_more_proof_and_still_views(home: Home, tree: Path) -> None:
    for place in list(tree.iterdir()):
        os.link(place, place.with_name(place.name + ".link"))
    stats = stats_of(home)
    assert stats.verified_bytes > stats.bytes
    assert stats.transfer == "mmap"
    with pytest.raises(StoreError, match="vouches"):
        stats_of(home, verify="record")


def test_a_borrowed_file_is_copied_and_the_copy_is_hashed(home: Home, release: Release) -> None:
    home.record(release, borrowed={"model-2.safetensors"})
    for mapping in ("auto", "mmap"):
        stats = stats_of(home, mapping=mapping)
        assert stats.transfer == "copy"
        # `f` has no bytes, and so nothing to view.
        assert stats.copied_bytes == release.manifest.file("model-2.safetensors").size // (1 << 20) * (1 << 20)
        assert stats.verified_bytes > stats.copied_bytes


def copied_over(place: Path) -> None:
    data, stamp = place.read_bytes(), place.stat()
    # Kept, so that the file system cannot give its number to the new one.
    place.rename(place.with_name(place.name + ".old"))
    place.write_bytes(data)
    os.utime(place, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def rewritten(place: Path) -> None:
    place.chmod(0o644)
    place.write_bytes(place.read_bytes())


@pytest.mark.parametrize("change", [copied_over, rewritten])
def test_another_inode_or_time_means_copy_and_hash(home: Home, tree: Path, change: object) -> None:
    for place in list(tree.iterdir()):
        change(place)  # type: ignore[operator]
    stats = stats_of(home)
    assert stats.recorded_bytes == 0
    assert stats.verified_bytes > stats.bytes
    assert stats.transfer == "copy"


UNSAFE = {
    "writable by the group": 0o664,
    "writable by all": 0o646,
}


@pytest.mark.parametrize("mode", UNSAFE.values(), ids=UNSAFE.keys())
def test_a_record_others_may_write_to_does_not_count(home: Home, record_file: Path, mode: int) -> None:
    for place in (record_file, record_file.parent, record_file.parent.parent):
        before = place.stat().st_mode
        place.chmod(mode | (before & 0o111))
        assert stats_of(home).recorded_bytes == 0
        place.chmod(before)
    assert stats_of(home).recorded_bytes > 0


def test_a_linked_record_does_not_count(home: Home, record_file: Path) -> None:
    record_file.rename(record_file.with_name("real"))
    record_file.symlink_to("real")
    assert stats_of(home).recorded_bytes == 0


USER, OWNER, STRANGER = 1000, 2000, 3000
# owners of record, folder and store, is_own_home -> counts
OWNERS = [
    (USER, USER, USER, True, True),
    (0, 0, 0, False, True),
    (0, USER, 0, False, True),
    (OWNER, OWNER, OWNER, True, True),
    (OWNER, OWNER, OWNER, False, False),
    (STRANGER, OWNER, OWNER, True, False),
    (OWNER, STRANGER, OWNER, True, False),
    (USER, STRANGER, USER, True, False),
]


@pytest.mark.parametrize(("record", "folder", "store", "is_own_home", "expected"), OWNERS)
def test_owners_that_count(record: int, folder: int, store: int, is_own_home: bool, expected: bool) -> None:
    def stat_of(mode: int, owner: int) -> os.stat_result:
        return os.stat_result((mode, 1, 1, 1, owner, owner, 0, 0, 0, 0))

    places = (stat_of(0o100644, record), stat_of(0o40755, folder), stat_of(0o40755, store))
    assert counts(*places, user=USER, is_own_home=is_own_home) is expected


DAMAGE = {
    "absent": None,
    "empty": b"",
    "not a record": b"hello",
    "truncated": b"MP2PRECD\x86",
}


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_record_costs_time_and_nothing_else(home: Home, record_file: Path, data: bytes | None) -> None:
    if data is None:
        record_file.unlink()
    else:
        record_file.write_bytes(data)
    stats = stats_of(home)
    assert (stats.recorded_bytes, stats.transfer) == (0, "copy")
    with pytest.raises(StoreError):
        stats_of(home, verify="record")


def test_a_record_of_another_release_does_not_count(home: Home, record_file: Path) -> None:
    rewrite(record_file, info_hash=bytes(32))
    assert stats_of(home).recorded_bytes == 0


def test_a_record_about_other_content_does_not_count(home: Home, record_file: Path) -> None:
    record: ReleaseRecord = decode_record(record_file.read_bytes())
    rewrite(record_file, files={path: dataclasses.replace(item, root=bytes(32)) for path, item in record.files.items()})
    assert stats_of(home).recorded_bytes == 0


def test_a_record_does_not_replace_the_signature(home: Home, record_file: Path, release: Release) -> None:
    folder = home.path / "manifests" / release.digest.hex()
    (folder / "manifest").write_bytes(statement_of({"m.safetensors": b"x"}, by="other").envelope)
    with pytest.raises(Exception, match="signatures"):
        stats_of(home, publisher=publisher().id)


OWN = Standing(is_own=True, is_proven=True)
TOUCHED = Standing(is_own=True)
BORROWED = Standing(is_borrowed=True, is_proven=True)
UNKNOWN = Standing()
# standing, verify, mapping, is_host -> is_view, is_hashed
POLICY = [
    (OWN, "auto", "auto", True, True, False),
    (OWN, "cpu", "auto", True, True, True),
    (OWN, "record", "auto", True, True, False),
    (OWN, "off", "auto", True, True, False),
    (OWN, "auto", "pread", True, False, False),
    (OWN, "auto", "auto", False, False, True),
    (OWN, "record", "auto", False, False, False),
    (TOUCHED, "auto", "auto", True, True, True),
    (TOUCHED, "off", "auto", True, True, False),
    (BORROWED, "auto", "auto", True, False, True),
    (BORROWED, "auto", "mmap", True, False, True),
    (BORROWED, "record", "auto", True, False, False),
    (UNKNOWN, "auto", "auto", True, False, True),
    (UNKNOWN, "auto", "mmap", True, True, True),
    (UNKNOWN, "off", "auto", True, False, False),
]


@pytest.mark.parametrize(("standing", "verify", "mapping", "is_host", "is_view", "is_hashed"), POLICY)
def test_policy(standing: Standing, verify: str, mapping: str, is_host: bool, is_view: bool, is_hashed: bool) -> None:
    way = way_of(standing, verify=verify, mapping=mapping, is_host=is_host)
    assert (way.is_view, way.is_hashed) == (is_view, is_hashed)


def test_laws_of_the_policy() -> None:
    standings = [Standing(*flags) for flags in product((False, True), repeat=3) if not (flags[0] and flags[1])]
    for standing, verify, mapping, is_host in product(
        standings, ("auto", "cpu", "off"), ("auto", "mmap", "pread"), (False, True)
    ):
        way = way_of(standing, verify=verify, mapping=mapping, is_host=is_host)
        assert not (way.is_view and (standing.is_borrowed or not is_host or mapping == "pread"))
        assert way.is_hashed or verify == "off" or (verify == "auto" and standing.is_proven and is_host)
    with pytest.raises(StoreError):
        way_of(TOUCHED, verify="record", mapping="auto", is_host=True)
