"""Odd but legal: forks, torch's modes, two Ctrl-C, memory that runs out, a repair between two views."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load as oracle

from modelp2p.loader import load, open_release
from modelp2p.loader.device import HostDevice
from modelp2p.loader.ring import Ring
from modelp2p.protocol.errors import IntegrityError, NotFoundError, UsageError
from tests.loader.fake_cuda import FakeCuda
from tests.loader.models import MIB, same
from tests.loader.test_load import expected
from tests.loader.test_pipeline import fake, open_on

if TYPE_CHECKING:
    from modelp2p.loader.staging import HostSlot
    from tests.releases import Home

FILE = "model-2.safetensors"


def rot(path: Path) -> bytes:
    """Change the last byte, as a disk does: times stay. Returns what was signed."""
    signed, before = path.read_bytes(), path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([signed[-1] ^ 1]))
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return signed


class Repairing:
    """Puts a new, good inode in the place of a file, as a daemon does."""

    def __init__(self, path: Path, signed: bytes) -> None:
        self.path, self.signed = path, signed
        self.asked: list[int] = []

    def __call__(self, path: str, piece: int) -> bool:
        self.asked.append(piece)
        fresh = self.path.with_suffix(".new")
        fresh.write_bytes(self.signed)
        fresh.chmod(0o444)
        fresh.replace(self.path)
        return True


def test_a_view_over_a_bad_piece_is_handed_out_after_its_repair(home: Home, tree: Path) -> None:
    repair = Repairing(tree / FILE, rot(tree / FILE))
    with open_release("lab/model", home=home.path, verify="cpu", on_bad=repair) as release:
        assert torch.equal(release.tensor("d"), oracle(repair.signed)["d"])
        assert (repair.asked, release.stats.refetches, release.stats.transfer) == ([3], 1, "mmap")


def test_a_view_that_stays_bad_is_an_error(home: Home, tree: Path) -> None:
    rot(tree / FILE)
    asked: list[int] = []

    def pretend(path: str, piece: int) -> bool:
        asked.append(piece)
        return True

    with open_release("lab/model", home=home.path, verify="cpu", on_bad=pretend) as release:
        with pytest.raises(IntegrityError):
            release.tensor("d")
        assert 1 < len(asked) < 10, "it is tried again, and not for ever"


def test_after_a_repair_by_a_copy_no_view_shows_the_old_file(home: Home, tree: Path) -> None:
    repair = Repairing(tree / FILE, rot(tree / FILE))
    with open_release("lab/model", home=home.path, verify="cpu", on_bad=repair) as release:
        release.slice("d", 0, 100)
        # A cast is a copy: it meets the bad piece, and a new inode takes the place of the one that is mapped.
        release.tensor("d", torch.float64)
        assert repair.asked == [3]
        assert torch.equal(release.tensor("d"), oracle(repair.signed)["d"])


def test_a_cast_is_made_of_bytes_that_were_private_when_they_were_hashed(
    home: Home, tree: Path, shards: dict[str, bytes]
) -> None:
    path = tree / "model-1.safetensors"
    with open_release("lab/model", home=home.path, verify="cpu") as release:
        stream = release.stream(["a", "b"], torch.float64)
        got = dict([next(stream)])
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(-2 * MIB, os.SEEK_END)
            file.write(bytes(2 * MIB))
        # All of this small file was read before the first tensor came, or it is read now and found bad.
        with suppress(IntegrityError):
            got |= dict(stream)
        want = expected(shards)
        assert all(torch.equal(tensor, want[name].double()) for name, tensor in got.items())
        assert release.stats.copied_bytes == sum(want[name].nbytes for name in got)
        assert release.stats.transfer == "copy"


@pytest.mark.parametrize("mode", [torch.device("meta"), torch.inference_mode()], ids=["meta", "inference"])
@pytest.mark.parametrize("options", [{}, {"mapping": "pread"}, {"dtype": torch.float64}], ids=["views", "copies", "cast"])
def test_the_callers_modes_of_torch_change_no_tensor(
    home: Home, shards: dict[str, bytes], mode: torch.device, options: dict[str, object]
) -> None:
    with mode:
        got = load("lab/model", home=home.path, **options)  # type: ignore[arg-type]
    for name, tensor in expected(shards).items():
        assert got[name].device.type == "cpu"
        assert torch.equal(got[name], tensor.to(got[name].dtype))
        if options:
            got[name].zero_()  # an ordinary tensor, which may be written to


@pytest.mark.usefixtures("home")
def test_a_release_serves_inside_and_outside_of_inference_mode(shards: dict[str, bytes]) -> None:
    with open_on(fake()) as release:
        with torch.inference_mode():
            release.load()
        assert all(same(tensor, expected(shards)[name]) for name, tensor in release.load().items())


_FORKING = """
import os, sys, torch
from modelp2p.loader import open_release
torch.set_num_threads(1)  # torch's own threads do not live in a forked process
release = open_release("lab/model", home=sys.argv[1], mapping=sys.argv[2], verify="cpu")
want = {name: tensor.clone() for name, tensor in release.load().items()}
children = []
for _ in range(3):
    if (pid := os.fork()) == 0:
        good = all(torch.equal(tensor, want[name]) for _ in range(30) for name, tensor in release.load().items())
        release.close()
        os._exit(0 if good else 9)
    children.append(pid)
good = all(torch.equal(tensor, want[name]) for _ in range(30) for name, tensor in release.load().items())
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
release.close()
sys.exit(0 if good and codes == [0, 0, 0] else f"parent {good}, children {codes}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["auto", "pread"])
def test_forked_processes_load_on_their_own(home: Home, mapping: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORKING, str(home.path), mapping], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_lane_whose_reader_nobody_waited_for_is_not_used_again() -> None:
    ring = Ring(HostDevice())
    ended = threading.Event()

    class Busy:
        def is_idle(self) -> bool:
            return ended.is_set()

    with ring.lanes(1 << 16) as lanes:
        lanes[0].reading = Busy()  # type: ignore[assignment]  # all that is asked of it
        kept = lanes[1:]
        busy = lanes[0]
    with ring.lanes(1 << 16) as again:
        assert busy not in again
        assert all(lane in again for lane in kept)
        assert len(again) == len(lanes), "another one takes its place"


def test_lanes_that_could_not_be_made_are_not_counted() -> None:
    class Short(FakeCuda):
        left = 2

        def host_slot(self, size_bytes: int, *, is_locked: bool = True) -> HostSlot:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("CUDA out of memory")
            return super().host_slot(size_bytes, is_locked=is_locked)

    device = Short(slots=3)
    ring = Ring(device, limit_bytes=3 << 16)
    for left in (2, 0, 0):
        device.left = left
        with pytest.raises(RuntimeError, match="out of memory"), ring.lanes(1 << 16):
            pass
    device.left = 100
    with ring.lanes(1 << 16) as lanes:
        assert len(lanes) == 3
        assert ring.locked_bytes == 3 << 16


def test_a_closed_release_says_so(home: Home) -> None:
    release = open_release("lab/model", home=home.path)
    release.close()
    for use in (release.load, lambda: release.tensor("a"), lambda: release.into({}, strict=False), lambda: release.attest({})):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_names_and_patterns_choose_what_they_say(home: Home) -> None:
    with open_release("lab/model", home=home.path) as release:
        assert release.keys(["c", "a", "[de]"]) == ("a", "c", "d", "e")
        with pytest.raises(NotFoundError, match="z"):
            release.keys(["a", "z*"])
