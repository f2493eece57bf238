"""Files of the store under attack and on a full disk."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelp2p.daemon import beneath, linking, space
from modelp2p.daemon.beneath import make_dirs_beneath, open_beneath, remove_tree_beneath
from modelp2p.daemon.files import (
    FileStamp,
    atomic_symlink,
    check_staging,
    create_staging,
    finish_file,
    write_atomic,
)
from modelp2p.daemon.linking import OWN_INODE_WAYS, link_visible, place_copy
from modelp2p.daemon.space import free_bytes, reserve
from modelp2p.protocol.errors import CorruptError, NoSpaceError, NotFoundError, StoreError

DATA = random.Random(4).randbytes(100_000)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "home").mkdir()
    fd = os.open(tmp_path / "home", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB; without one the promises about full disks cannot be tested, which is a failure."""
    at = tmp_path / "small"
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", at], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.fail(f"this test needs root and the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield at
    subprocess.run(["umount", "-l", at], check=True)


@pytest.fixture(params=["openat2", "walk"])
def _resolver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.ENOSYS, "as on an old kernel")

    if request.param == "walk":
        monkeypatch.setattr(beneath, "_openat2", refuse)


@pytest.fixture
def descriptors() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def read_beneath(dirfd: int, path: str) -> bytes:
    with open(open_beneath(dirfd, path, os.O_RDONLY), "rb") as file:
        return file.read()


@pytest.mark.usefixtures("_resolver", "descriptors")
class TestBeneath:
    def test_a_nested_file_is_reached(self, tmp_path: Path) -> None:
        (tmp_path / "a/b").mkdir(parents=True)
        (tmp_path / "a/b/c").write_bytes(DATA)
        dirfd = os.open(tmp_path, os.O_RDONLY)
        assert read_beneath(dirfd, "a/b/c") == DATA
        with pytest.raises(NotFoundError):
            open_beneath(dirfd, "a/b/d", os.O_RDONLY)
        os.close(dirfd)

    @pytest.mark.parametrize("path", ["", "/etc/passwd", "..", "../x", "a/../../x", "./a", "a//b", "a/", "a\0b"])
    def test_a_path_that_leaves_is_refused(self, tmp_path: Path, path: str) -> None:
        dirfd = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(StoreError, match="not a path below"):
            open_beneath(dirfd, path, os.O_RDONLY)
        with pytest.raises(StoreError, match="not a path below"):
            remove_tree_beneath(dirfd, path)
        os.close(dirfd)

    @pytest.mark.parametrize("link", ["a", "a/b", "a/b/c"])
    def test_a_symlink_anywhere_on_the_way_is_refused(self, tmp_path: Path, link: str) -> None:
        home, outside = tmp_path / "home", tmp_path / "outside"
        (outside / "b").mkdir(parents=True)
        (outside / "b/c").write_bytes(DATA)
        (outside / "c").write_bytes(DATA)
        (home / link).parent.mkdir(parents=True)
        target = {"a": outside, "a/b": outside, "a/b/c": outside / "c"}[link]
        (home / link).symlink_to(target)
        dirfd = os.open(home, os.O_RDONLY)
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_TRUNC):
            with pytest.raises(StoreError):
                open_beneath(dirfd, "a/b/c", flags, 0o600)
        with pytest.raises(StoreError):
            create_staging(dirfd, "a/b/c", 10)
        with pytest.raises(StoreError):
            check_staging(dirfd, "a/b/c")
        os.close(dirfd)
        assert (outside / "b/c").read_bytes() == (outside / "c").read_bytes() == DATA
        assert sorted(one.name for one in outside.rglob("*")) == ["b", "c", "c"]

    def test_a_fifo_does_not_stop_us(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "f")
        dirfd = os.open(tmp_path, os.O_RDONLY)
        os.close(open_beneath(dirfd, "f", os.O_RDONLY))
        with pytest.raises(StoreError, match="not a regular file"):
            check_staging(dirfd, "f")
        os.close(dirfd)

    def test_a_folder_that_turns_into_a_symlink_is_never_followed(self, tmp_path: Path) -> None:
        home, outside = tmp_path / "home", tmp_path / "outside"
        for folder in (home / "real", outside):
            folder.mkdir(parents=True)
            (folder / "f").write_bytes(folder.name.encode())
        (home / "link").symlink_to(outside)
        stop = threading.Event()

        def flip() -> None:
            while not stop.is_set():
                os.rename(home / "real", home / "d")
                os.rename(home / "d", home / "real")
                os.rename(home / "link", home / "d")
                os.rename(home / "d", home / "link")

        flipper = threading.Thread(target=flip)
        flipper.start()
        dirfd = os.open(home, os.O_RDONLY)
        try:
            for _ in range(2000):
                try:
                    assert read_beneath(dirfd, "d/f") == b"real"
                except (StoreError, NotFoundError):
                    continue
        finally:
            stop.set()
            flipper.join()
            os.close(dirfd)


def test_folders_get_their_mode_and_existing_ones_keep_theirs(tmp_path: Path, home: int) -> None:
    (tmp_path / "home/a").mkdir(mode=0o750)
    make_dirs_beneath(home, "a/b/c", mode=0o755)
    make_dirs_beneath(home, "a/b/c", mode=0o700)
    assert [(tmp_path / "home" / one).stat().st_mode & 0o777 for one in ("a", "a/b", "a/b/c")] == [0o750, 0o755, 0o755]


def test_removing_a_tree_spares_what_its_links_point_to(tmp_path: Path, home: int) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_bytes(DATA)
    tree = tmp_path / "home/t"
    tree.mkdir()
    (tree / "link").symlink_to(outside)
    (tree / "hard").hardlink_to(outside / "f")
    (tree / "sub").mkdir()
    (tmp_path / "home/link").symlink_to(outside)
    assert remove_tree_beneath(home, "t")
    assert remove_tree_beneath(home, "link")
    assert not remove_tree_beneath(home, "t")
    assert not remove_tree_beneath(home, "no/such/thing")
    assert os.listdir(tmp_path / "home") == []
    assert (outside / "f").read_bytes() == DATA


class TestStaging:
    def test_a_new_file_is_private_and_has_its_space(self, tmp_path: Path, home: int) -> None:
        fd = create_staging(home, "d/model.bin", 1_000_000)
        found = os.fstat(fd)
        assert (found.st_size, found.st_mode & 0o7777, found.st_nlink) == (1_000_000, 0o600, 1)
        assert found.st_blocks * 512 >= 1_000_000
        assert (tmp_path / "home/d").stat().st_mode & 0o777 == 0o700
        os.close(fd)
        assert FileStamp.of(check_staging(home, "d/model.bin")) == FileStamp.of(found)
        with pytest.raises(StoreError, match="File exists"):
            create_staging(home, "d/model.bin", 5)

    def test_a_hard_link_is_refused_unless_it_is_ours(self, tmp_path: Path, home: int) -> None:
        victim = tmp_path / "victim"
        victim.write_bytes(DATA)
        (tmp_path / "home/x").hardlink_to(victim)
        with pytest.raises(StoreError, match="has 2 names instead of 1"):
            check_staging(home, "x")
        check_staging(home, "x", links=2)

    def test_a_foreign_owner_is_refused(self, tmp_path: Path, home: int) -> None:
        (tmp_path / "home/x").write_bytes(DATA)
        with pytest.raises(StoreError, match="belongs to uid"):
            check_staging(home, "x", uid=os.geteuid() + 1)

    @pytest.mark.parametrize("kind", ["folder", "symlink", "dangling", "fifo", "socket"])
    def test_anything_but_a_file_is_refused(self, tmp_path: Path, home: int, kind: str) -> None:
        path, victim = tmp_path / "home/x", tmp_path / "victim"
        victim.write_bytes(DATA)
        match kind:
            case "folder":
                path.mkdir()
            case "symlink":
                path.symlink_to(victim)
            case "dangling":
                path.symlink_to(tmp_path / "new")
            case "fifo":
                os.mkfifo(path)
            case _:
                os.mknod(path, 0o140600)
        with pytest.raises(StoreError, match=r"is a symlink|is not a regular file"):
            check_staging(home, "x")
        with pytest.raises(StoreError):
            create_staging(home, "x", 10)
        assert victim.read_bytes() == DATA
        assert not (tmp_path / "new").exists()

    def test_finishing_makes_it_read_only_but_never_a_borrowed_file(self, tmp_path: Path) -> None:
        for borrowed, mode in ((False, 0o444), (True, 0o664)):
            path = tmp_path / f"{borrowed}"
            path.write_bytes(DATA)
            path.chmod(0o664)
            fd = os.open(path, os.O_RDONLY)
            stamp = finish_file(fd, borrowed=borrowed)
            os.close(fd)
            assert path.stat().st_mode & 0o777 == mode
            assert stamp.matches(path.stat())

    def test_a_stamp_notices_every_kind_of_change(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        path.write_bytes(DATA)
        stamp = FileStamp.of(path.stat())
        (tmp_path / "other").hardlink_to(path)
        assert stamp.matches(path.stat(), ignore_ctime=True)
        path.write_bytes(DATA[:-1])
        assert not stamp.matches(path.stat(), ignore_ctime=True)


class TestFullDisk:
    def test_a_reservation_that_does_not_fit_leaves_nothing(self, small_disk: Path) -> None:
        dirfd = os.open(small_disk, os.O_RDONLY)
        free = free_bytes(small_disk)
        assert 7_000_000 < free <= 8 * 1024 * 1024
        with pytest.raises(NoSpaceError) as caught:
            create_staging(dirfd, "big", 20_000_000)
        assert caught.value.facts["needed"] == 20_000_000
        assert caught.value.facts["free"] == free
        assert caught.value.kind.exit_code == 9
        assert str(20_000_000 - free) in caught.value.hint
        assert os.listdir(small_disk) == []
        assert free_bytes(dirfd) == free
        os.close(create_staging(dirfd, "fits", 5_000_000))
        with pytest.raises(NoSpaceError):
            create_staging(dirfd, "second", 5_000_000)
        os.close(dirfd)

    def test_reserving_keeps_what_is_there(self, small_disk: Path) -> None:
        path = small_disk / "f"
        path.write_bytes(DATA)
        with path.open("r+b") as file:
            assert reserve(file.fileno(), 1_000_000)
            with pytest.raises(NoSpaceError):
                reserve(file.fileno(), 20_000_000)
        assert path.stat().st_size == 1_000_000
        assert path.read_bytes()[: len(DATA)] == DATA

    def test_where_nothing_can_be_reserved_free_space_is_compared(
        self, small_disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(space, "_fallocate", lambda fd, size: errno.EOPNOTSUPP)
        with (small_disk / "f").open("w+b") as file:
            assert not reserve(file.fileno(), 1_000_000, keep_free_bytes=1_000_000)
            assert os.fstat(file.fileno()).st_size == 1_000_000
            with pytest.raises(NoSpaceError):
                reserve(file.fileno(), 7_500_000, keep_free_bytes=1_000_000)
            assert os.fstat(file.fileno()).st_size == 1_000_000

    def test_small_files_stay_as_they_were(self, small_disk: Path) -> None:
        write_atomic(small_disk, "record", b"old")
        with pytest.raises(NoSpaceError):
            write_atomic(small_disk, "record", random.Random(5).randbytes(9_000_000))
        assert (small_disk / "record").read_bytes() == b"old"
        assert os.listdir(small_disk) == ["record"]

    def test_a_copy_that_does_not_fit_leaves_nothing(self, small_disk: Path, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(random.Random(6).randbytes(9_000_000))
        dirfd = os.open(small_disk, os.O_RDONLY)
        with source.open("rb") as file, pytest.raises(NoSpaceError):
            place_copy(file.fileno(), dirfd, "f")
        assert os.listdir(small_disk) == []
        os.close(dirfd)


class TestPlacing:
    def test_publishing_without_copying_shares_blocks_or_the_inode(self, tmp_path: Path, home: int) -> None:
        source = tmp_path / "source"
        source.write_bytes(DATA)
        source.chmod(0o640)
        with source.open("rb") as file:
            way = place_copy(file.fileno(), home, "d/f")
        placed = tmp_path / "home/d/f"
        assert way in ("reflink", "link")
        assert placed.samefile(source) == (way == "link")
        assert placed.read_bytes() == DATA
        assert source.stat().st_mode & 0o777 == 0o640
        assert os.listdir(placed.parent) == ["f"]

    def test_another_file_system_means_a_copy_with_progress(self, small_disk: Path, home: int, tmp_path: Path) -> None:
        (small_disk / "source").write_bytes(DATA)
        told: list[int] = []
        with (small_disk / "source").open("rb") as file:
            assert place_copy(file.fileno(), home, "f", progress=told.append) == "copy"
        assert (tmp_path / "home/f").read_bytes() == DATA
        assert sum(told) == len(DATA)

    def test_an_own_inode_is_never_the_source(self, tmp_path: Path, home: int) -> None:
        (tmp_path / "source").write_bytes(DATA)
        with (tmp_path / "source").open("rb") as file:
            assert place_copy(file.fileno(), home, "f", OWN_INODE_WAYS) in OWN_INODE_WAYS
            with pytest.raises(StoreError, match="exists already"):
                place_copy(file.fileno(), home, "f", OWN_INODE_WAYS)
            place_copy(file.fileno(), home, "f", OWN_INODE_WAYS, replace=True)
        assert not (tmp_path / "home/f").samefile(tmp_path / "source")
        assert (tmp_path / "home/f").read_bytes() == DATA
        assert os.listdir(tmp_path / "home") == ["f"]

    def test_a_source_that_changes_meanwhile_is_an_error(self, tmp_path: Path, home: int) -> None:
        source = tmp_path / "source"
        source.write_bytes(DATA)

        def touch(_: int) -> None:
            os.utime(source, ns=(1, 1))

        with source.open("rb") as file, pytest.raises(CorruptError, match="changed while"):
            place_copy(file.fileno(), home, "f", ("copy",), progress=touch)
        assert os.listdir(tmp_path / "home") == []

    def test_a_source_that_shrinks_meanwhile_is_an_error(
        self, tmp_path: Path, home: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = tmp_path / "source"
        source.write_bytes(DATA)
        monkeypatch.setattr(linking, "_STEP_BYTES", 10_000)
        with source.open("rb") as file, pytest.raises(CorruptError, match="shorter than expected"):
            place_copy(file.fileno(), home, "f", ("copy",), progress=lambda _: os.truncate(source, 5_000))
        assert os.listdir(tmp_path / "home") == []

    def test_only_regular_files_are_placed(self, tmp_path: Path, home: int) -> None:
        with pytest.raises(StoreError, match="not a regular file"):
            place_copy(home, home, "f")
        (tmp_path / "source").write_bytes(b"")
        with (tmp_path / "source").open("rb") as file, pytest.raises(StoreError):
            place_copy(file.fileno(), home, "../f")


class TestVisible:
    def test_a_link_appears_and_doing_it_again_changes_nothing(self, tmp_path: Path, home: int) -> None:
        os.close(create_staging(home, "data/f", 100))
        first = link_visible(home, "data/f", home, "store/x/f")
        assert link_visible(home, "data/f", home, "store/x/f") == first
        assert (tmp_path / "home/store/x/f").samefile(tmp_path / "home/data/f")
        assert first.matches((tmp_path / "home/data/f").stat())
        check_staging(home, "data/f", links=2)
        assert (tmp_path / "home/store/x").stat().st_mode & 0o777 == 0o755

    def test_another_file_is_replaced_only_on_request(self, tmp_path: Path, home: int) -> None:
        for name in ("a", "b"):
            os.close(create_staging(home, name, 100))
        link_visible(home, "a", home, "v/f")
        with pytest.raises(StoreError, match="exists already"):
            link_visible(home, "b", home, "v/f")
        link_visible(home, "b", home, "v/f", replace=True)
        assert (tmp_path / "home/v/f").samefile(tmp_path / "home/b")
        assert os.listdir(tmp_path / "home/v") == ["f"]
        check_staging(home, "a")

    def test_a_symlink_is_never_made_visible(self, tmp_path: Path, home: int) -> None:
        (tmp_path / "secret").write_bytes(DATA)
        (tmp_path / "home/f").symlink_to(tmp_path / "secret")
        with pytest.raises(StoreError):
            link_visible(home, "f", home, "v/f")
        assert not (tmp_path / "home/v/f").exists()


def test_a_symlink_is_replaced_in_one_step_and_a_file_never(tmp_path: Path) -> None:
    link = tmp_path / "models/org/model/rev"
    atomic_symlink("../../../store/1", link)
    atomic_symlink("../../../store/2", link)
    atomic_symlink("../../../store/2", link)
    assert os.readlink(link) == "../../../store/2"
    assert os.listdir(link.parent) == ["rev"]
    (tmp_path / "file").write_bytes(DATA)
    with pytest.raises(StoreError, match="in the way"):
        atomic_symlink("x", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_small_file_is_written_whole_with_its_mode(tmp_path: Path, home: int) -> None:
    write_atomic(home, "a", b"one")
    write_atomic(tmp_path / "home", "a", b"two", mode=0o644)
    path = tmp_path / "home/a"
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644
    for name in ("", "..", "a/b"):
        with pytest.raises(StoreError, match="not a file name"):
            write_atomic(home, name, b"x")
    (tmp_path / "victim").write_bytes(DATA)
    path.unlink()
    path.symlink_to(tmp_path / "victim")
    write_atomic(home, "a", b"three")
    assert (tmp_path / "victim").read_bytes() == DATA
    assert not path.is_symlink()
