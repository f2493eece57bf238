"""Somebody writes to a file while it is loaded: a copy is right or an `IntegrityError`, and the process lives.

Nothing here is a matter of timing: the writer acts inside of the load, right before or right after one piece is read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from modelp2p.loader import load, open_release
from modelp2p.loader.device import Device, HostDevice
from modelp2p.loader.locate import locate
from modelp2p.loader.readers import Reader, reader_of
from modelp2p.loader.release import OpenRelease
from modelp2p.protocol.errors import IntegrityError
from modelp2p.protocol.statement import verify_statement
from tests.loader.fake_cuda import FakeCuda
from tests.loader.models import MIB, same, three_shards
from tests.loader.test_load import expected
from tests.loader.test_pipeline import FILE, checked, fake, open_on, with_tools
from tests.releases import Home, bundle_of, publisher, statement_of, write_files

if TYPE_CHECKING:
    from modelp2p.loader.shard import Shard

GOOD = three_shards()[FILE]
PIECE = 2
"""Where the writer acts; `a` ends before it, `b` covers it, `c` lies behind it. A byte in its middle is changed."""
AT = PIECE * MIB + MIB // 2
Act = Callable[[Path], None]


def write(place: Path, data: bytes, at: int = 0) -> None:
    """Write in the same inode, whoever may."""
    place.chmod(0o644)
    with place.open("r+b") as file:
        file.seek(at)
        file.write(data)


def truncate(place: Path, size: int) -> None:
    place.chmod(0o644)
    os.truncate(place, size)


def rewrite_unseen(place: Path) -> None:
    """As somebody who does not want to be seen: size and times are as before."""
    before = place.stat()
    write(place, bytes([GOOD[AT] ^ 1]), AT)
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_in_its_place(place: Path) -> None:
    other = place.with_name("other")
    other.write_bytes(bytes(len(GOOD)))
    other.replace(place)


HARMFUL: dict[str, Act] = {
    "one bit": lambda place: write(place, bytes([GOOD[AT] ^ 1]), AT),
    "one bit, unseen": rewrite_unseen,
    "everything": lambda place: write(place, bytes(len(GOOD))),
    "truncated to nothing": lambda place: truncate(place, 0),
    "truncated before the piece": lambda place: truncate(place, PIECE * MIB),
    "truncated inside of the piece": lambda place: truncate(place, AT + 1),
}
"""What the copy of the piece must not show."""
HARMLESS: dict[str, Act] = {
    "replaced by other bytes": put_in_its_place,
    "removed": lambda place: place.unlink(),
    "longer": lambda place: truncate(place, len(GOOD) + 5),
    "written again as it was": lambda place: write(place, GOOD),
}
"""The inode that was opened still has the right bytes."""
WRITERS = HARMFUL | HARMLESS


@dataclass
class Haunted:
    """A reader beside whom somebody writes, `times` times, before or after one piece is read."""

    inner: Reader
    act: Callable[[], None]
    is_before: bool
    times: int = 1000
    read: list[int] = field(default_factory=list)
    """Offsets, in the order of reading."""

    @property
    def name(self) -> str:
        return self.inner.name

    def read_into(self, target: memoryview, offset: int) -> None:
        self.read.append(offset)
        is_now = offset <= AT < offset + len(target) and self.times > 0
        self.times -= is_now
        if is_now and self.is_before:
            self.act()
        self.inner.read_into(target, offset)
        if is_now and not self.is_before:
            self.act()

    def close(self) -> None:
        self.inner.close()


def haunt(release: OpenRelease, reader: str, act: Callable[[], None], *, is_before: bool, times: int = 1000) -> Haunted:
    """Put a haunted reader in the place of the one of `FILE`; the other files keep theirs."""
    shard = release._shards[FILE]
    haunted = Haunted(reader_of(shard.source, reader)[0], act, is_before, times)
    chosen = release._tools.reader_of

    def reader_for(asked: Shard) -> Reader:
        return haunted if asked is shard else chosen(asked)

    with_tools(release, reader_of=reader_for)
    return haunted


MAKES: dict[str, Callable[[], Device]] = {"host": HostDevice, "fake": fake}
every_device = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
every_reader = pytest.mark.parametrize("reader", ["preadv", "direct"])


def taken(device: Device, release: OpenRelease, into: dict[str, torch.Tensor]) -> None:
    """Take what is handed out, and look at it in that moment."""
    want = expected(three_shards())
    for name, tensor in checked(device, release.stream()):
        assert same(tensor, want[name]), f"wrong numbers in {name}"
        into[name] = tensor


def failure(act: Callable[[], None]) -> IntegrityError | None:
    """How it failed, if it did; other errors are none a writer may cause."""
    try:
        act()
    except IntegrityError as exc:
        return exc
    return None


@every_device
@every_reader
@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("act", WRITERS.values(), ids=WRITERS.keys())
def test_a_copy_is_right_or_an_error(
    make: Callable[[], Device], reader: str, is_before: bool, act: Act, tree: Path, shards: dict[str, bytes]
) -> None:
    device = make()
    got: dict[str, torch.Tensor] = {}
    with open_on(device, workers=1) as release:
        haunted = haunt(release, reader, lambda: act(tree / FILE), is_before=is_before)
        error = failure(lambda: taken(device, release, got))
        if error is None:
            assert got.keys() == expected(shards).keys()
            assert not is_before or act in HARMLESS.values()
        else:
            assert error.facts["path"] == FILE
            assert "b" not in got or not is_before
        assert any(offset <= AT for offset in haunted.read)
    assert all(same(tensor, expected(shards)[name]) for name, tensor in got.items()), "and nothing changed afterwards"
    assert not isinstance(device, FakeCuda) or not device.pending


@every_device
@every_reader
def test_a_changed_piece_is_named_and_what_came_before_is_handed_out(make: Callable[[], Device], reader: str, tree: Path) -> None:
    device = make()
    got: dict[str, torch.Tensor] = {}
    with open_on(device, workers=1, files=FILE) as release, pytest.raises(IntegrityError) as caught:  # noqa: PT012
        haunt(release, reader, lambda: rewrite_unseen(tree / FILE), is_before=True)
        taken(device, release, got)
    facts = caught.value.facts
    assert (facts["piece"], facts["begin"], facts["end"]) == (PIECE, PIECE * MIB, (PIECE + 1) * MIB)
    assert facts["expected"] != facts["got"]
    # On the host the whole file is one span.
    assert set(got) == ({"a"} if isinstance(device, FakeCuda) else set())


@every_device
@every_reader
def test_bytes_that_are_wrong_for_a_moment_are_read_again(
    make: Callable[[], Device], reader: str, tree: Path, shards: dict[str, bytes]
) -> None:
    device = make()
    turn = [b"\0\0\0\0", GOOD[AT : AT + 4]]
    with open_on(device, workers=1) as release:
        haunt(release, reader, lambda: write(tree / FILE, turn.pop(0), AT), is_before=True, times=2)
        got: dict[str, torch.Tensor] = {}
        taken(device, release, got)
        assert (release.stats.rereads, release.stats.refetches) == (1, 0)
    assert got.keys() == expected(shards).keys()


@every_device
@every_reader
def test_a_model_never_holds_what_a_writer_wrote(make: Callable[[], Device], reader: str, tree: Path) -> None:
    want = {name: tensor for name, tensor in expected(three_shards()).items() if name in "abc"}
    model = {name: torch.full_like(tensor, 3) for name, tensor in want.items()}
    with open_on(make(), workers=1, files=FILE) as release, pytest.raises(IntegrityError):  # noqa: PT012
        haunt(release, reader, lambda: write(tree / FILE, bytes(len(GOOD))), is_before=True)
        release.into(model)
    for name, tensor in model.items():
        assert bool(((tensor == 3) | (tensor == want[name])).all()), name


def test_a_file_of_the_users_is_copied_whatever_is_asked(home: Home, tree: Path, shards: dict[str, bytes]) -> None:
    home.record(verify_statement(statement_of(shards)), borrowed=shards)
    with open_on(HostDevice(), mapping="mmap", verify="auto", workers=1) as release:
        haunt(release, "preadv", lambda: rewrite_unseen(tree / FILE), is_before=False)
        tensors = release.load()
        assert release.stats.copied_bytes == release.stats.bytes
    write(tree / FILE, bytes(len(GOOD)))
    assert all(same(tensors[name], tensor) for name, tensor in expected(shards).items())


OUTCOMES = """
import sys
from pathlib import Path
from tests.loader.test_writers import outcomes
print(*outcomes(Path(sys.argv[1])), sep="\\n")
"""


CUTS = (0, MIB, AT + 1, len(GOOD) - 4096, len(GOOD) - 1)


def outcomes(folder: Path) -> list[str]:
    """How every load ended under which the file was cut, in a process that may die of it."""
    files = three_shards()
    place = write_files(folder, files)
    (place / "lab.modelp2p").write_bytes(bundle_of(files))
    located = locate(place, publisher=publisher().id, home=str(folder / "home"))
    said = []
    for make, reader, cut in product(MAKES.values(), ("preadv", "direct"), CUTS):
        (place / FILE).write_bytes(GOOD)
        device = make()
        verify = "cpu" if device.is_host else "gpu"
        with OpenRelease(located, device, verify=verify, mapping="pread", workers=2) as release:
            haunt(release, reader, partial(truncate, place / FILE, cut), is_before=True)
            said.append("refused" if failure(partial(taken, device, release, {})) else "right")
    return said


@pytest.mark.slow
def test_no_truncation_under_a_copy_kills_the_process(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", OUTCOMES, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr[-2000:]}"
    said = done.stdout.split()
    # Every cut takes something that is read then or later.
    assert said == ["refused"] * (len(MAKES) * 2 * len(CUTS))


# --- views ---------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("home")
# Times that were set back are seen by nobody: a view is good as long as nobody writes to the inode.
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "one bit, unseen"])
def test_no_view_is_handed_out_of_a_file_that_changed_while_it_was_proven(name: str, tree: Path) -> None:
    """The writer acts when everything was hashed: only looking at the file once more can tell."""
    handed, acts = [], [WRITERS[name]]

    def progress(done: int, total: int) -> None:
        if acts:
            acts.pop()(tree / FILE)

    with open_release("lab/model", verify="cpu", files=FILE, workers=1) as release, pytest.raises(IntegrityError) as caught:  # noqa: PT012
        for tensor, _ in release.stream(progress=progress):
            handed.append(tensor)
    assert not acts
    assert caught.value.facts["path"] == FILE
    assert handed == []


@pytest.mark.usefixtures("home")
def test_a_view_shows_the_inode_it_was_made_of(tree: Path, shards: dict[str, bytes]) -> None:
    tensors = load("lab/model", verify="cpu")
    put_in_its_place(tree / FILE)
    assert all(same(tensors[name], tensor) for name, tensor in expected(shards).items())
