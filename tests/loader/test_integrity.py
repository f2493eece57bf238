"""Bytes that are not what was signed: whatever the way, no tensor over them is handed out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modelp2p.loader import load, open_release
from modelp2p.loader.device import HostDevice
from modelp2p.loader.home import default_home
from modelp2p.loader.locate import locate
from modelp2p.loader.release import OpenRelease
from modelp2p.loader.source import SourceFile
from modelp2p.protocol.errors import FormatError, IntegrityError, NotFoundError, StoreError, UsageError
from modelp2p.protocol.statement import decode_bundle, verify_statement
from tests.loader.models import MIB, file_of, raw_file
from tests.releases import Home, bundle_of, publisher, write_files

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.plan import Move

FILE = "model-1.safetensors"


def flip(place: Path, at: int) -> None:
    """Change one bit in the same inode."""
    data = bytearray(place.read_bytes())
    data[at] ^= 0x10
    place.chmod(0o644)
    with place.open("r+b") as file:
        file.write(data)


REGIONS = {
    "length of the header": 3,
    "header": 20,
    "first leaf": 4000,
    "leaf in the middle": MIB + 5 * 16384 + 9,
    "first byte of a later piece": 2 * MIB,
    "tail leaf": -70,
    "last byte": -1,
}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("mapping", ["auto", "pread"])
@pytest.mark.parametrize("at", REGIONS.values(), ids=REGIONS.keys())
def test_one_bit_anywhere_is_found_and_placed(tree: Path, mapping: str, at: int) -> None:
    place = tree / FILE
    flip(place, at)
    size = place.stat().st_size
    with pytest.raises(IntegrityError) as caught:
        load("lab/model", mapping=mapping)
    facts = caught.value.facts
    where = at % size
    assert facts["path"] == FILE
    assert facts["piece"] == where // MIB
    assert (facts["begin"], facts["end"]) == (where // MIB * MIB, min(size, (where // MIB + 1) * MIB))
    assert facts["expected"] != facts["got"]
    assert "modelp2p verify" in caught.value.hint


def test_a_plain_folder_is_checked_as_well(folder: Path) -> None:
    flip(folder / FILE, -1)
    with pytest.raises(IntegrityError):
        load(folder, publisher=publisher().id)


def test_good_tensors_beside_a_bad_piece_can_be_had(home: Home, tree: Path) -> None:
    flip(tree / "model-2.safetensors", -1)
    with open_release("lab/model", home=home.path) as release:
        assert release.slice("d", 0, 1000).numel() == 1000
        with pytest.raises(IntegrityError):
            release.tensor("d")
        with pytest.raises(IntegrityError):
            release.slice("d", 3 * MIB // 4 - 1, 3 * MIB // 4)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("verify", ["auto", "cpu", "record", "off"])
@pytest.mark.parametrize("change", [-1, 1], ids=["truncated", "longer"])
def test_a_wrong_size_is_refused_in_every_mode(tree: Path, verify: str, change: int) -> None:
    place = tree / FILE
    place.chmod(0o644)
    os.truncate(place, place.stat().st_size + change)
    with pytest.raises(IntegrityError, match="were signed"):
        load("lab/model", verify=verify)


def replaced(place: Path) -> None:
    other = place.with_name("other")
    other.write_bytes(place.read_bytes())
    other.replace(place)


def touched(place: Path) -> None:
    os.utime(place, ns=(0, time.time_ns() + 10**9))


def removed(place: Path) -> None:
    place.unlink()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("change", [replaced, touched, removed])
@pytest.mark.parametrize("options", [{"verify": "cpu"}, {"verify": "record"}, {"verify": "record", "mapping": "pread"}])
def test_a_file_that_changes_while_it_is_open(tree: Path, change: Callable[[Path], None], options: dict[str, str]) -> None:
    release = open_release("lab/model", **options)  # type: ignore[arg-type]
    with release:
        release.tensor("a")
        change(tree / FILE)
        with pytest.raises(IntegrityError, match=r"replaced|written|vanished"):
            release.tensor("b")


@pytest.mark.usefixtures("home")
def test_a_new_hard_link_is_no_change(tree: Path) -> None:
    with open_release("lab/model", verify="cpu") as release:
        os.link(tree / FILE, tree / "another-name")
        release.tensor("b")


@pytest.mark.usefixtures("home")
def test_truncation_while_open_is_an_error_for_copies(tree: Path) -> None:
    with open_release("lab/model", mapping="pread") as release:
        (tree / FILE).chmod(0o644)
        os.truncate(tree / FILE, MIB)
        with pytest.raises(IntegrityError, match="has 1048576 bytes"):
            release.tensor("b")


@pytest.mark.slow
def test_truncation_under_a_view_kills_the_process_as_documented(home: Home, tree: Path) -> None:
    code = f"""
import os
from modelp2p.loader import load
tensor = load("lab/model", home={str(home.path)!r})["d"]
os.chmod({str(tree / "model-2.safetensors")!r}, 0o644)
os.truncate({str(tree / "model-2.safetensors")!r}, 0)
print(tensor.sum())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGBUS


class SwappingDevice(HostDevice):
    """Changes the file behind the loader's back after each span was proven."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def move(self, target: torch.Tensor, source: torch.Tensor, move: Move) -> None:
        flip(self.place, 100 + int(self.place.read_bytes()[100] & 1))
        super().move(target, source, move)


def test_what_is_copied_is_what_was_hashed(home: Home, tree: Path, shards: dict[str, bytes]) -> None:
    located = locate("lab/model", publisher=None, home=default_home())
    device = SwappingDevice(tree / "model-2.safetensors")
    with OpenRelease(located, device, verify="cpu", mapping="pread", files="model-2.safetensors") as release:
        tensor = release.tensor("d")
    data = shards["model-2.safetensors"]
    assert tensor.numpy().tobytes() == data[-3 * MIB :]


def test_missing_files_are_named_with_what_to_do(home: Home, tree: Path) -> None:
    (tree / "model-2.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"1 of 3 files are missing, first 'model-2") as caught:
        load("lab/model", home=home.path)
    assert caught.value.hint.endswith(f"modelp2p fetch lab/model@{tree.name}")
    assert set(load("lab/model", home=home.path, files="model-3*")) == {"e", "f"}


def test_what_is_no_file_is_refused(tmp_path: Path, folder: Path) -> None:
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)
    with pytest.raises(IntegrityError, match="not a regular file"):
        load(folder, publisher=publisher().id)


def test_an_open_that_fails_leaks_no_descriptor(folder: Path) -> None:
    flip(folder / "model-3.safetensors", 9)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(IntegrityError):
        load(folder, publisher=publisher().id)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_source_gives_its_descriptor_back_once(folder: Path) -> None:
    release = verify_statement(decode_bundle((folder / "lab.modelp2p").read_bytes()))
    source = SourceFile(str(folder / FILE), release.manifest.file(FILE))
    source.close()
    source.close()
    with pytest.raises(StoreError, match="was closed"):
        source.check_unchanged()


HOSTILE = {
    "empty file": b"",
    "shorter than its length": b"\x08",
    "huge announced header": (1 << 62).to_bytes(8, "little") + b"{}",
    "over the loader's default": (17 << 20).to_bytes(8, "little") + bytes(18 << 20),
    "not JSON": raw_file(b"{nope}"),
    "one name twice": raw_file(
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    ),
    "data outside the file": raw_file(b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', b"12345678"),
    "overlap": raw_file(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', b"123"
    ),
    "hole": raw_file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"12"),
    "negative": raw_file(b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}}'),
    "terminal escape in a name": raw_file(b'{"a\\u001b[31m":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_signed_but_hostile_header_is_refused(tmp_path: Path, data: bytes) -> None:
    # A second file, since no torrent has zero bytes.
    files = {"m.safetensors": data, "readme.txt": b"x"}
    write_files(tmp_path, files)
    (tmp_path / "m.modelp2p").write_bytes(bundle_of(files))
    for verify in ("cpu", "off"):
        with pytest.raises(FormatError):
            load(tmp_path, publisher=publisher().id, verify=verify)


def test_a_header_larger_than_the_default_can_be_allowed(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}' + b" " * (17 << 20)
    files = {"m.safetensors": raw_file(header, b"7")}
    write_files(tmp_path, files)
    (tmp_path / "m.modelp2p").write_bytes(bundle_of(files))
    with open_release(tmp_path, publisher=publisher().id, max_header_bytes=32 << 20) as release:
        assert release.tensor("a").tolist() == [ord("7")]


INDEXES = {
    "a path upwards": {"a": "../m.safetensors"},
    "an absolute path": {"a": "/etc/passwd"},
    "a file the release lacks": {"a": "other.safetensors"},
    "no text": {"a": 7},
}


@pytest.mark.parametrize("weight_map", INDEXES.values(), ids=INDEXES.keys())
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, weight_map: object) -> None:
    files = {"sub/m.safetensors": file_of(1, a=64), "sub/model.safetensors.index.json": b"", "m.safetensors": file_of(1, z=64)}
    files["sub/model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    write_files(tmp_path, files)
    (tmp_path / "m.modelp2p").write_bytes(bundle_of(files))
    with pytest.raises(FormatError, match="index"):
        load(tmp_path, publisher=publisher().id)


@pytest.mark.parametrize("text", [b"[", b"[]", b'{"weight_map": []}', b"[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    files = {"m.safetensors": file_of(1, a=64), "model.safetensors.index.json": text}
    write_files(tmp_path, files)
    (tmp_path / "m.modelp2p").write_bytes(bundle_of(files))
    with pytest.raises(FormatError, match="index"):
        load(tmp_path, publisher=publisher().id)


def test_an_altered_index_is_found_before_it_is_parsed(folder: Path) -> None:
    flip(folder / "model.safetensors.index.json", 5)
    with pytest.raises(IntegrityError):
        load(folder, publisher=publisher().id)


def test_verify_off_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(folder / "model-2.safetensors", -1)
    with open_release(folder, publisher=publisher().id, verify="off") as release:
        release.load()
        assert release.stats.unverified_bytes == release.stats.bytes
        assert release.stats.verified_bytes == 0
    assert "verify='off'" in caplog.text


@pytest.mark.parametrize(
    "options", [{"verify": "gpu"}, {"mapping": "yes"}, {"workers": 0}, {"device": "nope"}, {"device": "meta"}]
)
def test_arguments_out_of_range_are_refused(folder: Path, options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        load(folder, publisher=publisher().id, **options)  # type: ignore[arg-type]
