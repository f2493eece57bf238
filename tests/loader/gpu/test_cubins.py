"""The cache of compiled kernels: whole or absent, whoever writes at once; and not believed where others can write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelp2p.loader.gpu import cubins

IMAGE = b"\x7fELF" + bytes(range(256)) * 100

WRITER = """
import sys
from modelp2p.loader.gpu import cubins
for number in range(60):
    assert cubins.write(sys.argv[1], "k.cubin", sys.argv[2].encode() * (1000 + 500 * number)) == ""
assert "torch" not in sys.modules
"""


def test_what_was_written_is_read(tmp_path: Path) -> None:
    folder = str(tmp_path / "a" / "b")
    assert cubins.write(folder, "k.cubin", IMAGE) == ""
    assert cubins.read(folder, "k.cubin") == IMAGE
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert [path.name for path in Path(folder).iterdir()] == ["k.cubin"]


def test_two_processes_at_once_leave_whole_files(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), letter]) for letter in "ab"]
    seen: set[bytes] = set()
    while any(writer.poll() is None for writer in writers):
        found = cubins.read(str(tmp_path), "k.cubin")
        if isinstance(found, bytes):
            seen.add(found[:1])
            assert found == found[:1] * len(found)
        else:
            assert "No such file" in found
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen
    assert [path.name for path in tmp_path.iterdir()] == ["k.cubin"]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_what_others_can_write_is_not_believed(tmp_path: Path, mode: int) -> None:
    cubins.write(str(tmp_path), "k.cubin", IMAGE)
    (tmp_path / "k.cubin").chmod(mode)
    assert "others can write it" in cubins.read(str(tmp_path), "k.cubin")


def test_no_link_pipe_or_folder_is_followed(tmp_path: Path) -> None:
    cubins.write(str(tmp_path), "k.cubin", IMAGE)
    (tmp_path / "link").symlink_to(tmp_path / "k.cubin")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder", "absent"):
        assert isinstance(cubins.read(str(tmp_path), name), str)


def test_an_absurdly_large_file_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "k.cubin").write_bytes(b"")
    os.truncate(tmp_path / "k.cubin", 1 << 40)
    assert "damaged" in cubins.read(str(tmp_path), "k.cubin")


def test_names_tell_apart_what_went_in() -> None:
    names = {
        cubins.name_of(text, arch, version)
        for text in (b"a", b"ab")
        for arch in ("sm_80", "sm_90")
        for version in ((13, 0), (13, 1), (12, 9))
    }
    assert len(names) == 12
    assert all("/" not in name for name in names)
