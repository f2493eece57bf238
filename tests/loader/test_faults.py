"""One fault at a time: exactly what lies over a bad piece is withheld; every end has a type and leaves nothing behind."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
import torch

from modelp2p.loader.arriving import Arrivals
from modelp2p.loader.device import Device, HostDevice
from modelp2p.loader.home import default_home
from modelp2p.loader.locate import Located, locate
from modelp2p.loader.readers import PreadvReader
from modelp2p.loader.release import OpenRelease
from modelp2p.protocol.errors import DaemonError, IntegrityError, ModelP2PError
from modelp2p.protocol.merkle import LEAF_BYTES as LEAF
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.statement import Release, verify_statement
from tests.loader.fake_cuda import FakeCuda
from tests.loader.models import MIB, raw_file, same
from tests.loader.test_arriving import FakeFollower
from tests.loader.test_load import expected
from tests.loader.test_pipeline import FILE, checked, fake, open_on, with_tools
from tests.releases import bundle_of, publisher, statement_of, write_files

if TYPE_CHECKING:
    from modelp2p.loader.source import SourceFile

HEADER = 2048
"""Bytes before the first tensor."""
STEP = 200_003
"""Tensors are about this long, so that no border of one is a border of a piece or leaf."""
SIZES = {
    "whole": 3 * MIB,  # nothing is padded, neither leaf nor piece
    "tail": 2 * MIB + 5 * LEAF + 7,  # a short last leaf, then hashes of zeros
    "edge": 2 * MIB + 5 * LEAF,  # the zeros begin right behind a full leaf
    "byte": 2 * MIB + 1,  # the last piece is one byte
    "short": MIB - 1,  # one piece and no layer, all leaves but the last full
    "small": 5 * LEAF + 7,  # one piece, padded to its own tree only
}


def file_of(seed: int, size: int) -> bytes:
    """A file of exactly this size, of tensors of about `STEP` random bytes."""
    borders = [*range(0, size - HEADER, STEP), size - HEADER]
    entries = {
        f"{seed}.{number}": {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for number, (begin, end) in enumerate(pairwise(borders))
    }
    return raw_file(json.dumps(entries).encode().ljust(HEADER - 8), Random(seed).randbytes(size - HEADER))


FILES = {f"{name}.safetensors": file_of(seed, size) for seed, (name, size) in enumerate(SIZES.items())}
TENSORS = {path: expected({path: data}) for path, data in FILES.items()}
Stretch = tuple[int, int]


def places(path: str) -> dict[str, Stretch]:
    """Where the bytes of each tensor of a file lie."""
    found, at = {}, HEADER
    for name, tensor in sorted(TENSORS[path].items(), key=lambda item: int(item[0].partition(".")[2])):
        found[name] = (at, at + tensor.nbytes)
        at += tensor.nbytes
    return found


def regions(size: int) -> dict[str, int]:
    """Every kind of place in a file of this size, by the byte there; where two are one, it has both names."""
    last, leaf = (size - 1) // MIB * MIB, (size - 1) // LEAF * LEAF
    places = {
        "length of the header": 3, "header": 20, "padding of the header": HEADER - 1, "first byte of a tensor": HEADER,
        "end of the first leaf": LEAF - 1, "second leaf": LEAF, "leaf in the middle": size // 2 // LEAF * LEAF + 9,
        "end of the first piece": MIB - 1, "second piece": MIB, "first byte of the last piece": last,
        "end of the first leaf of the last piece": last + LEAF - 1, "before the last leaf": leaf - 1,
        "first byte of the last leaf": leaf, "last byte": size - 1,
    }  # fmt: skip
    names: dict[int, list[str]] = {}
    for name, at in places.items():
        if at < size:
            names.setdefault(at, []).append(name)
    return {", ".join(those): at for at, those in names.items()}


CASES = [
    pytest.param(f"{name}.safetensors", at, id=f"{name}: {where}")
    for name, size in SIZES.items()
    for where, at in regions(size).items()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files in a plain folder; who changes one puts it back."""
    place = write_files(tmp_path_factory.mktemp("faults"), FILES)
    (place / "lab.modelp2p").write_bytes(bundle_of(FILES))
    return place


@contextmanager
def changed(place: Path, *changes: tuple[int, bytes]) -> Iterator[None]:
    """The file with other bytes at some offsets, in the same inode."""
    try:
        write(place, changes)
        yield
    finally:
        write(place, [(0, FILES[place.name])])
        os.truncate(place, len(FILES[place.name]))


def write(place: Path, changes: Sequence[tuple[int, bytes]]) -> None:
    with place.open("r+b") as file:
        for at, data in changes:
            file.seek(at)
            file.write(data)


def flipped(path: str, at: int, bit: int = 3) -> tuple[int, bytes]:
    return at, bytes([FILES[path][at] ^ 1 << bit])


def opened(folder: Path, device: Device, path: str, **options: object) -> OpenRelease:
    located = locate(folder, publisher=publisher().id, home=default_home())
    hashed = "cpu" if device.is_host else "gpu"
    return OpenRelease(located, device, **{"mapping": "pread", "verify": hashed, "files": path, **options})  # type: ignore[arg-type]


OPENERS: dict[str, Callable[[Path, str], OpenRelease]] = {
    "views": lambda folder, path: opened(folder, HostDevice(), path, mapping="mmap"),
    "copies": lambda folder, path: opened(folder, HostDevice(), path),
    "ring": lambda folder, path: opened(folder, fake(1), path),
}
every_opener = pytest.mark.parametrize("opener", OPENERS)


@every_opener
@pytest.mark.parametrize(("path", "at"), CASES)
def test_exactly_the_tensors_over_a_bad_piece_are_withheld(folder: Path, opener: str, path: str, at: int) -> None:
    bad = at // MIB
    with changed(folder / path, flipped(path, at)):
        if not bad:
            # The header is in the first piece: there is nothing to ask for.
            with pytest.raises(IntegrityError) as caught:
                OPENERS[opener](folder, path)
            check_told(caught.value, path, bad)
            return
        with OPENERS[opener](folder, path) as release:
            withheld = {name for name, (begin, end) in places(path).items() if begin // MIB <= bad <= (end - 1) // MIB}
            assert withheld
            for name in withheld:
                with pytest.raises(IntegrityError) as caught:
                    release.tensor(name)
                check_told(caught.value, path, bad)
            # All others at once, also where the bad piece lies between them.
            rest = [name for name in places(path) if name not in withheld]
            got = release.load(rest)
            assert all(same(got[name], TENSORS[path][name]) for name in rest)


def check_told(error: IntegrityError, path: str, piece: int) -> None:
    facts = error.facts
    assert (facts["path"], facts["piece"]) == (path, piece)
    assert (facts["begin"], facts["end"]) == (piece * MIB, min((piece + 1) * MIB, len(FILES[path])))
    assert f"'{path}'" in error.message
    assert f"piece {piece} " in error.message


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.slow
def test_a_bad_piece_in_any_order_of_events(folder: Path, seed: int) -> None:
    path = "whole.safetensors"
    random = Random(seed)
    at = random.randrange(MIB, SIZES["whole"])
    device = fake(seed, slots=1 + seed % 3)
    got: dict[str, torch.Tensor] = {}

    def take() -> None:
        for name, tensor in checked(device, release.stream()):
            assert same(tensor, TENSORS[path][name])
            got[name] = tensor

    change = flipped(path, at, random.randrange(8))
    options = {"workers": 1 + seed % 2}
    with (
        changed(folder / path, change),
        opened(folder, device, path, **options) as release,
        pytest.raises(IntegrityError) as caught,
    ):
        take()
    check_told(caught.value, path, at // MIB)
    assert set(got) == {name for name, (_, end) in places(path).items() if end <= at // MIB * MIB}
    assert all(same(tensor, TENSORS[path][name]) for name, tensor in got.items())
    assert not device.pending


# --- pieces and files in the place of others -----------------------------------------------------------------------
@every_opener
def test_pieces_in_each_others_place(folder: Path, opener: str) -> None:
    path = "whole.safetensors"
    one, two = FILES[path][MIB : 2 * MIB], FILES[path][2 * MIB :]
    with changed(folder / path, (MIB, two), (2 * MIB, one)), OPENERS[opener](folder, path) as release:
        for piece in (1, 2):
            inside = next(
                name for name, (begin, end) in places(path).items() if begin >= piece * MIB and end <= (piece + 1) * MIB
            )
            with pytest.raises(IntegrityError) as caught:
                release.tensor(inside)
            check_told(caught.value, path, piece)


@every_opener
def test_a_piece_of_another_file_of_the_release(folder: Path, opener: str) -> None:
    path = "tail.safetensors"
    with changed(folder / path, (MIB, FILES["whole.safetensors"][MIB : 2 * MIB])), OPENERS[opener](folder, path) as release:
        with pytest.raises(IntegrityError) as caught:
            release.load()
        check_told(caught.value, path, 1)


@contextmanager
def replaced(place: Path) -> Iterator[None]:
    """Other bytes at the path, in another inode."""
    kept, other = place.with_name("kept"), place.with_name("other")
    os.link(place, kept)
    other.write_bytes(bytes(len(FILES[place.name])))
    other.replace(place)
    try:
        yield
    finally:
        kept.replace(place)


@every_opener
@pytest.mark.parametrize("is_first_there", [False, True], ids=["after opening", "between two tensors"])
def test_a_file_that_was_replaced(folder: Path, opener: str, is_first_there: bool) -> None:
    """Copies come from the inode that was opened; a view would be of a file that is no more the release's."""
    path = "whole.safetensors"
    first, *rest = places(path)
    with OPENERS[opener](folder, path) as release:
        if is_first_there:
            assert same(release.tensor(first), TENSORS[path][first])
        with replaced(folder / path):
            if opener == "views":
                with pytest.raises(IntegrityError, match="replaced"):
                    release.load(rest)
            else:
                got = release.load(rest)
                assert all(same(got[name], TENSORS[path][name]) for name in rest)


# --- short reads ---------------------------------------------------------------------------------------------------
# Past the page cache a read ends at a block, or at the end of the file.
@pytest.mark.parametrize(
    ("reader", "at_most"),
    [("preadv", 4095), ("preadv", 5000), ("preadv", MIB - 1), ("direct", 4096), ("direct", 1 << 16)],
)
@pytest.mark.parametrize("make", [HostDevice, fake], ids=["host", "fake"])
def test_a_kernel_that_gives_less_is_asked_again(
    folder: Path, make: Callable[[], Device], reader: str, at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, asked = os.preadv, []

    def less(fd: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(offset)
        return preadv(fd, [memoryview(buffers[0])[:at_most]], offset)

    path = "tail.safetensors"
    with opened(folder, make(), path, reader=reader) as release:
        monkeypatch.setattr(os, "preadv", less)
        got = release.load()
        assert release.stats.rereads == 0
    assert len(asked) >= SIZES["tail"] // at_most
    assert all(same(got[name], tensor) for name, tensor in TENSORS[path].items())


class Lazy(PreadvReader):
    """Leaves the end of the second piece as it was, `times` times: what the slot held before."""

    def __init__(self, source: SourceFile, times: int, missing: int) -> None:
        super().__init__(source)
        self.times, self.missing = times, missing

    def read_into(self, target: memoryview, offset: int) -> None:
        whole = 2 * MIB - offset
        if offset <= MIB and whole <= len(target) and self.times:
            self.times -= 1
            super().read_into(target[: whole - self.missing], offset)
            target, offset = target[whole:], offset + whole
        super().read_into(target, offset)


@pytest.mark.parametrize("make", [HostDevice, fake, lambda: fake(slots=1)], ids=["host", "fake", "fake-one"])
@pytest.mark.parametrize("missing", [1, 4096, MIB])
def test_a_reader_that_reads_less_than_it_says(folder: Path, make: Callable[[], Device], missing: int) -> None:
    path = "whole.safetensors"
    for times, is_fatal in ((1, False), (2, False), (3, True)):
        with opened(folder, make(), path, workers=1) as release:
            lazy = Lazy(release._shards[path].source, times, missing)
            with_tools(release, reader_of=lambda shard, lazy=lazy: lazy)
            if is_fatal:
                with pytest.raises(IntegrityError) as caught:
                    release.load()
                check_told(caught.value, path, 1)
            else:
                got = release.load()
                assert release.stats.rereads == times
                assert all(same(got[name], tensor) for name, tensor in TENSORS[path].items())


@pytest.mark.parametrize("missing", [1, 4096, LEAF, MIB])
@pytest.mark.parametrize("reader", ["preadv", "direct", "mmap"])
@pytest.mark.parametrize("make", [HostDevice, fake], ids=["host", "fake"])
def test_a_file_that_is_too_short_when_it_is_read(folder: Path, make: Callable[[], Device], reader: str, missing: int) -> None:
    path = "whole.safetensors"
    size = SIZES["whole"]
    with changed(folder / path), opened(folder, make(), path, reader=reader) as release:
        os.truncate(folder / path, size - missing)
        with pytest.raises(IntegrityError, match=f"has {size - missing} bytes") as caught:
            release.load()
    facts = caught.value.facts
    assert (facts["path"], facts["expected"], facts["got"]) == (path, size, size - missing)


# --- devices that fail ---------------------------------------------------------------------------------------------
Operation = Callable[[OpenRelease, dict[str, torch.Tensor]], object]


def fill(release: OpenRelease, model: dict[str, torch.Tensor]) -> object:
    return release.into(model)


OPERATIONS: dict[str, Operation] = {
    "load": lambda release, _: release.load(),
    "cast": lambda release, _: release.load(dtype=torch.float16),
    "slice": lambda release, _: release.slice("b", 10, 400_000),
    "cut": lambda release, _: release.load(plan={"b": (0, 100_000, 400_000)}),
    "into": fill,
    "attest": lambda release, model: release.attest(model),
}


@dataclass(frozen=True)
class Left:
    """What this process holds besides memory."""

    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> Left:
        return cls(len(os.listdir("/proc/self/fd")), threading.active_count())


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.slow
def test_a_device_that_fails_at_any_work(operation: str, shards: dict[str, bytes]) -> None:
    want = {name: tensor for name, tensor in expected(shards).items() if name in "abc"}
    before = Left.now()
    at = total = 0
    while not total:
        device = fake(at, slots=2, fails_at=at)
        model = {name: torch.full_like(tensor, 3) for name, tensor in want.items()}
        with open_on(device, files=FILE, workers=2) as release:
            if not has_failed(partial(OPERATIONS[operation], release, model)):
                total = device.issued
            assert not device.pending
            assert device.drained
            assert release._ring.locked_bytes <= sum(memory.numel() for memory in device.locked)
        assert Left.now() == before
        if operation == "into":
            assert all(bool(((model[name] == 3) | (model[name] == tensor)).all()) for name, tensor in want.items())
        at += 1
    assert at == total + 1 > 3, "every work has failed once"


def has_failed(act: Callable[[], object]) -> bool:
    """Whether the device failed in it; other errors are none it may cause."""
    try:
        act()
    except ModelP2PError as exc:
        if exc.message != "the fake device failed":
            raise
        return True
    return False


# --- daemons that die ----------------------------------------------------------------------------------------------
SHARD = "whole.safetensors"
ARRIVING = {SHARD: FILES[SHARD], "tail.safetensors": FILES["tail.safetensors"]}
PIECES = [(path, number) for path, data in sorted(ARRIVING.items(), reverse=True) for number in range(-(-len(data) // MIB))]
"""In the order in which they come: one file, then the other."""


@pytest.fixture(scope="module")
def arriving() -> Release:
    return verify_statement(statement_of(ARRIVING))


@pytest.fixture
def follower(tmp_path: Path) -> FakeFollower:
    return FakeFollower(write_files(tmp_path / "staged", ARRIVING))


def followed(release: Release, follower: FakeFollower, device: Device) -> OpenRelease:
    arrivals = Arrivals(release, follower, 20)
    arrivals.start()
    try:
        return OpenRelease(Located(release, str(follower.folder), None, True), device, arrivals=arrivals, workers=2)
    except BaseException:
        arrivals.close()
        raise


MAKES: list[Callable[[], Device]] = [HostDevice, fake, lambda: fake(5, slots=1)]


@pytest.mark.parametrize("make", MAKES, ids=["host", "fake", "fake-one"])
@pytest.mark.parametrize("arrived", range(len(PIECES) + 1))
def test_a_daemon_that_dies_after_any_piece(
    arriving: Release, follower: FakeFollower, make: Callable[[], Device], arrived: int
) -> None:
    before = Left.now()
    # The first pieces hold the headers; without them there is no release to open.
    first = [(path, 0) for path in ARRIVING]
    come = [*first, *(piece for piece in PIECES if piece not in first)][:arrived]
    for path, number in come:
        follower.arrive(arriving.pieces.first(path) + number)
    follower.news.put(DaemonError("the daemon closed the connection", hint="Its log says why."))
    device = make()
    want = {name: tensor for path in ARRIVING for name, tensor in TENSORS[path].items()}
    got: dict[str, torch.Tensor] = {}

    def load() -> None:
        with followed(arriving, follower, device) as release:
            for name, tensor in checked(device, release.stream()):
                got[name] = tensor

    if arrived == len(PIECES):
        load()
        assert got.keys() == want.keys()
    else:
        with pytest.raises(DaemonError, match="closed the connection"):
            load()
        here = {
            name
            for path in ARRIVING
            for name, (begin, end) in places(path).items()
            if all((path, number) in come for number in range(begin // MIB, -(-end // MIB)))
        }
        assert set(got) <= here
    assert all(same(tensor, want[name]) for name, tensor in got.items())
    assert not isinstance(device, FakeCuda) or not device.pending
    assert Left.now() == before


@pytest.mark.parametrize("make", MAKES, ids=["host", "fake", "fake-one"])
def test_a_model_that_was_being_filled_when_the_daemon_died(
    arriving: Release, follower: FakeFollower, make: Callable[[], Device]
) -> None:
    want = {name: tensor for path in ARRIVING for name, tensor in TENSORS[path].items()}
    model = {name: torch.full_like(tensor, 3) for name, tensor in want.items()}
    for path, number in [("tail.safetensors", 0), ("whole.safetensors", 0), ("tail.safetensors", 1)]:
        follower.arrive(arriving.pieces.first(path) + number)
    follower.news.put(DaemonError("the daemon closed the connection"))
    with followed(arriving, follower, make()) as release, pytest.raises(DaemonError):
        release.into(model)
    assert all(bool(((model[name] == 3) | (model[name] == tensor)).all()) for name, tensor in want.items())


@pytest.mark.parametrize("make", MAKES, ids=["host", "fake", "fake-one"])
def test_a_daemon_that_calls_proven_what_is_not(arriving: Release, follower: FakeFollower, make: Callable[[], Device]) -> None:
    """It is only asked when to read: all is hashed here, and read again in case that it was early."""
    write(follower.folder / SHARD, [(MIB, bytes(MIB))])
    follower.news.put(Ranges.span(0, arriving.pieces.total))
    with followed(arriving, follower, make()) as release:
        with pytest.raises(IntegrityError) as caught:
            release.load()
        check_told(caught.value, SHARD, 1)
        assert release.stats.rereads == 2
