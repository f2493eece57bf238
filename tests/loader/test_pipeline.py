"""The pipeline on every device, with everything going wrong that can: what is handed out is what was signed, or nothing is."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load as oracle
from safetensors.torch import save

from modelp2p.loader.device import Device, HostDevice, device_for
from modelp2p.loader.hashing import Job, Workers
from modelp2p.loader.home import default_home
from modelp2p.loader.locate import locate
from modelp2p.loader.pipeline import flow
from modelp2p.loader.plan import Plan, Want
from modelp2p.loader.plan import plan as plan_of
from modelp2p.loader.readers import PreadvReader
from modelp2p.loader.release import OpenRelease
from modelp2p.protocol.errors import IntegrityError, ModelP2PError, StoreError, UsageError
from tests.loader.fake_cuda import FakeCuda, FakeEvent
from tests.loader.models import MIB, file_of, same, tensors_of
from tests.loader.test_integrity import REGIONS, flip
from tests.loader.test_load import DTYPES, expected
from tests.releases import Home, statement_of

if TYPE_CHECKING:
    from modelp2p.loader.gpu import Verifier
    from modelp2p.loader.parts import Part
    from modelp2p.loader.shard import Shard

FILE = "model-1.safetensors"
Make = Callable[[], Device]


def fake(seed: int = 0, *, slot_bytes: int = MIB, slots: int = 3, fails_at: int | None = None) -> FakeCuda:
    """A fake that moves nothing it did not find good."""
    return FakeCuda(seed, proves=True, slot_bytes=slot_bytes, slots=slots, fails_at=fails_at)


DEVICES = [
    pytest.param(HostDevice, id="host"),
    *(pytest.param(lambda seed=seed: fake(seed), id=f"fake-{seed}") for seed in range(6)),
    pytest.param(lambda: fake(0, slots=1), id="fake-one-lane"),
    pytest.param(lambda: fake(1, slot_bytes=64 * MIB), id="fake-one-span"),
    pytest.param(lambda: device_for("cuda:0"), id="cuda", marks=pytest.mark.gpu),
]
every_device = pytest.mark.parametrize("make", DEVICES)


def open_on(device: Device, **options: object) -> OpenRelease:
    """`lab/model` of the default home, copied onto a device and hashed on the way."""
    located = locate("lab/model", publisher=None, home=default_home())
    hashed = "cpu" if device.is_host else "gpu"
    return OpenRelease(located, device, **{"mapping": "pread", "verify": hashed, **options})  # type: ignore[arg-type]


def with_tools(release: OpenRelease, **changes: object) -> None:
    """Let a release work with other tools."""
    release._tools = replace(release._tools, **changes)  # type: ignore[arg-type]
    release._delivery = replace(release._delivery, tools=release._tools)


def interrupted(done: int, total: int) -> None:
    raise KeyboardInterrupt


def checked(device: Device, stream: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same stream; the fake looks at each tensor in the moment it is handed out."""
    for name, tensor in stream:
        if isinstance(device, FakeCuda):
            device.check_handed_out(tensor)
        yield name, tensor


@every_device
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("workers", [1, None])
def test_a_release_arrives_whole(make: Make, shards: dict[str, bytes], workers: int | None) -> None:
    device = make()
    want = expected(shards)
    got: dict[str, torch.Tensor] = {}
    with open_on(device, workers=workers) as release:
        for name, tensor in checked(device, release.stream()):
            assert same(tensor.cpu(), want[name]), "at once, not only at the end"
            got[name] = tensor
        stats = release.stats
    assert got.keys() == want.keys()
    assert all(got[name].device == device.device and same(got[name].cpu(), want[name]) for name in want)
    assert stats.transfer == device.transfer
    assert stats.copied_bytes == stats.bytes == sum(tensor.nbytes for tensor in want.values())
    total = sum(len(data) for path, data in shards.items() if path.endswith(".safetensors"))
    assert stats.verified_bytes >= total
    assert (stats.reader, stats.rereads, stats.refetches) == ("preadv", 0, 0)
    assert stats.fallbacks == list(device.verifier().notes)
    assert stats.verifier == device.verifier().name


@every_device
def test_every_dtype_is_bit_exact(make: Make, own_home: Path) -> None:
    raw = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    tensors = {}
    for dtype in DTYPES:
        data = raw % 2 if dtype is torch.bool else raw.clone()
        tensors[f"{dtype}.matrix"] = data.view(dtype).reshape(2, -1)
        tensors[f"{dtype}.empty"] = torch.empty(0, 4, dtype=dtype)
    add(own_home, {"m.safetensors": save(tensors)})
    with open_on(make()) as release:
        got = release.load()
    assert got.keys() == tensors.keys()
    assert all(same(got[name].cpu(), tensors[name]) for name in tensors)


def add(own_home: Path, files: dict[str, bytes]) -> Home:
    home = Home(own_home / "modelp2p")
    home.trust()
    home.add(statement_of(files), files)
    return home


@every_device
@pytest.mark.slow
def test_tensors_over_several_spans_and_a_reader_beside(make: Make, own_home: Path) -> None:
    device = make()
    large = 2 * device.slot_bytes + 12_340 if isinstance(device, FakeCuda) else 70 * MIB
    files = {"m.safetensors": file_of(1, small=64, large=large, last=MIB), "n.safetensors": file_of(2, x=64)}
    add(own_home, files)
    want = {name: t for data in files.values() for name, t in oracle(data).items()}
    with open_on(device) as release:
        for name, tensor in checked(device, release.stream()):
            assert same(tensor.cpu(), want[name])
            assert same(release.tensor("last").cpu(), want["last"]), "a second reader beside the stream"
        assert same(release.slice("large", 5, large // 5).cpu(), want["large"][5 : large // 5])


@every_device
@pytest.mark.usefixtures("home")
def test_an_abandoned_stream_leaves_a_usable_release(make: Make, shards: dict[str, bytes]) -> None:
    device = make()
    with open_on(device) as release:
        stream = release.stream()
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert not isinstance(device, FakeCuda) or not device.pending, "drained before memory was given back"
        assert same(release.tensor("d").cpu(), oracle(shards["model-2.safetensors"])["d"])


class Prompt(Workers):
    """All is read when it is asked for."""

    def start(self, task: Callable[[range], None], runs: Iterable[range]) -> Job:
        job = super().start(task, runs)
        job.finish()
        return job


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("seed", range(4))
def test_what_was_read_is_uploaded_before_anything_is_waited_for(seed: int) -> None:
    device = fake(seed, slots=3)
    with open_on(device) as release, closing(Prompt(2)) as workers:
        with_tools(release, workers=workers)
        release.load("d")
    # Of three spans each: poison, upload, proof.
    assert device.most_pending == 9
    assert not device.pending


class Patient(FakeCuda):
    """Is done with nothing before it is waited for."""

    def step_some(self) -> None:
        return


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("make", [HostDevice, fake, lambda: Patient(slot_bytes=MIB)], ids=["host", "fake", "patient"])
def test_what_is_proven_does_not_wait_for_bytes_that_have_not_arrived(make: Make, shards: dict[str, bytes]) -> None:
    """The second file arrives when the last tensor of the first was handed out."""
    handed, patience_s = threading.Event(), 20.0

    class Arriving(PreadvReader):
        def read_into(self, target: memoryview, offset: int) -> None:
            assert handed.wait(patience_s), "a read was waited for while something proven lay there"
            super().read_into(target, offset)

    got = {}
    with open_on(make(), workers=2) as release:
        late = release._shards["model-2.safetensors"]
        with_tools(release, reader_of=lambda shard: (Arriving if shard is late else PreadvReader)(shard.source))
        for name, tensor in release.stream(["a", "b", "c", "d"]):
            got[name] = tensor
            if name == "c":
                handed.set()
    assert list(got) == ["a", "b", "c", "d"]
    assert all(same(tensor, expected(shards)[name]) for name, tensor in got.items())


def reordered(made: Plan, order: Sequence[int]) -> Plan:
    """The same plan with its spans in another order."""
    spans = [made.spans[number] for number in order]
    last = {move.want: at for at, span in enumerate(spans) for move in span.moves}
    ended = [tuple(sorted({move.want for move in span.moves if last[move.want] == at})) for at, span in enumerate(spans)]
    return replace(made, spans=tuple(replace(span, completes=done) for span, done in zip(spans, ended, strict=True)))


def plan_in(release: OpenRelease, order: Callable[[int], Sequence[int]]) -> tuple[list[Shard], Plan]:
    """A plan for the first two files, with spans of one piece in an order of ours."""
    files = [(shard, [Want.of(part) for _, part in parts_of(release, shard)]) for shard in list(release._shards.values())[:2]]
    made = plan_of([shard.table for shard, _ in files], [wants for _, wants in files], MIB)
    return [shard for shard, _ in files], reordered(made, order(len(made.spans)))


def parts_of(release: OpenRelease, shard: Shard) -> list[tuple[str, Part]]:
    return [found for found in release._parts.values() if found[0] == shard.table.path]


def alternating(count: int) -> list[int]:
    """First, last, second, last but one: from file to file and back."""
    return [number for pair in zip(range(count), reversed(range(count)), strict=True) for number in pair][:count]


ORDERS = {
    "as they lie": lambda count: list(range(count)),
    "backwards": lambda count: list(reversed(range(count))),
    "alternating": alternating,
}
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())


@pytest.mark.usefixtures("home")
class TestOrder:
    @every_order
    @pytest.mark.parametrize("verify", ["hashed", "record"])
    @pytest.mark.parametrize("make", [HostDevice, fake, lambda: fake(3)], ids=["host", "fake", "fake-3"])
    def test_spans_in_any_order(
        self, make: Make, verify: str, order: Callable[[int], list[int]], shards: dict[str, bytes]
    ) -> None:
        device = make() if verify == "hashed" else FakeCuda(slot_bytes=MIB)
        with open_on(device, **({} if verify == "hashed" else {"verify": verify})) as release:
            files, made = plan_in(release, order)
            got = [
                (made.wants[number].part.name, tensor)
                for number, tensor in flow(files, made, release._tools, lambda file, size: None)
            ]
        assert sorted(name for name, _ in got) == ["a", "b", "c", "d"]
        assert all(same(tensor, expected(shards)[name]) for name, tensor in got)
        if verify == "hashed":
            done = [made.wants[want].part.name for span in made.spans for want in span.completes]
            assert [name for name, _ in got] == done, "each as soon as its last span is proven"

    @every_order
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("piece", [0, 1, 2])
    def test_how_far_one_gets_before_a_bad_span_is_no_matter_of_timing(
        self, tree: Path, seed: int, order: Callable[[int], list[int]], piece: int
    ) -> None:
        names: list[str] = []
        with open_on(fake(seed)) as release:
            # Now, since opening looks at the header, which may be what is bad.
            flip(tree / "model-2.safetensors", piece * MIB + 7)
            files, made = plan_in(release, order)
            with pytest.raises(IntegrityError) as caught:  # noqa: PT012 - what came before matters
                for number, _ in flow(files, made, release._tools, lambda file, size: None):
                    names.append(made.wants[number].part.name)
        assert caught.value.facts["piece"] == piece
        bad = next(at for at, span in enumerate(made.spans) if span.file == 1 and piece in span.pieces)
        assert names == [made.wants[want].part.name for span in made.spans[:bad] for want in span.completes]

    @pytest.mark.parametrize("changed", [0, 1])
    @pytest.mark.parametrize("make", [lambda: FakeCuda(slot_bytes=MIB), lambda: FakeCuda(5, slot_bytes=MIB)], ids=["0", "5"])
    def test_files_that_interleave_are_handed_out_each_when_all_of_it_was_found_unchanged(
        self, make: Make, tree: Path, changed: int
    ) -> None:
        names = []
        with open_on(make(), verify="record") as release:
            files, made = plan_in(release, alternating)
            place = tree / files[changed].table.path
            touched = [False]

            def on_span(file: int, size: int) -> None:
                if file == changed and not touched[0]:
                    touched[0] = True
                    os.utime(place, ns=(0, 1))

            with pytest.raises(IntegrityError, match="written to"):  # noqa: PT012 - what came before matters
                for number, _ in flow(files, made, release._tools, on_span):
                    names.append(made.wants[number].part.name)
        own = {want.part.name for want in made.wants if want.part.name in ("abc", "d")[changed]}
        assert not own & set(names), "nothing of the file that changed"


@every_device
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("at", REGIONS.values(), ids=REGIONS.keys())
def test_one_bit_anywhere_reaches_nobody(make: Make, tree: Path, at: int) -> None:
    place = tree / FILE
    flip(place, at)
    size = place.stat().st_size
    where = at % size
    device = make()
    handed = {}
    with pytest.raises(IntegrityError) as caught, open_on(device) as release:  # noqa: PT012 - what came before matters
        for name, tensor in checked(device, release.stream()):
            handed[name] = tensor
    facts = caught.value.facts
    assert (facts["path"], facts["piece"]) == (FILE, where // MIB)
    assert facts["expected"] != facts["got"]
    assert not any(name in handed for name, begin, end in places(place) if begin // MIB <= where // MIB < -(-end // MIB))
    assert not isinstance(device, FakeCuda) or not device.pending


def places(place: Path) -> list[tuple[str, int, int]]:
    """Names and byte ranges of tensors in a file of this suite whose header is as written."""
    sizes = {"a": MIB + 400, "b": 2 * MIB, "c": 64}
    at = place.stat().st_size - sum(sizes.values())
    found = []
    for name, size in sizes.items():
        found.append((name, at, at + size))
        at += size
    return found


@every_device
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("at", "good"), [(9 + MIB, set()), (9 + 2 * MIB, {"a"}), (-1, {"a"})])
def test_all_that_comes_before_a_bad_span_is_handed_out(make: Make, tree: Path, at: int, good: set[str]) -> None:
    device = make()
    flip(tree / FILE, at)
    flip(tree / "model-2.safetensors", -1)
    names = []
    with pytest.raises(IntegrityError) as caught, open_on(device) as release:  # noqa: PT012 - what came before matters
        for name, _ in checked(device, release.stream()):
            names.append(name)
    assert caught.value.facts["path"] == FILE
    # `f` has no bytes that could be bad; where the whole file is one span, none of it is good.
    assert set(names) - {"f"} == (set() if device.slot_bytes > 3 * MIB else good)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("seed", range(4))
def test_swapped_pieces(tree: Path, seed: int) -> None:
    place = tree / "model-2.safetensors"
    data = bytearray(place.read_bytes())
    data[MIB : 2 * MIB], data[2 * MIB : 3 * MIB] = data[2 * MIB : 3 * MIB], data[MIB : 2 * MIB]
    place.chmod(0o644)
    with place.open("r+b") as file:
        file.write(data)
    with open_on(fake(seed)) as release, pytest.raises(IntegrityError) as caught:
        release.tensor("d")
    assert caught.value.facts["piece"] == 1


class Faulty(FakeCuda):
    """Breaks what was uploaded, `times` times: a broken cable, not a broken file."""

    times = 0

    def upload(self, slot: torch.Tensor, host: torch.Tensor) -> FakeEvent:
        event = super().upload(slot, host)
        if self.times:
            self.times -= 1
            event.wait()
            slot[host.numel() // 2] ^= 1
        return event


@pytest.mark.usefixtures("home")
class TestTrouble:
    def test_a_copy_that_failed_is_made_again(self, shards: dict[str, bytes]) -> None:
        device = Faulty(proves=True, slot_bytes=MIB)
        device.times = 2
        with open_on(device) as release:
            got = release.load()
            assert 1 <= release.stats.rereads <= 2
        assert all(same(got[name], tensor) for name, tensor in expected(shards).items())

    def test_a_copy_that_always_fails_is_not_blamed_on_the_file(self) -> None:
        device = Faulty(proves=True, slot_bytes=MIB)
        device.times = 1000
        with open_on(device) as release, pytest.raises(IntegrityError, match="good in this machine's memory") as caught:
            release.tensor("d")
        assert "nvidia-smi" in caught.value.hint

    @pytest.mark.parametrize("make", [HostDevice, fake, lambda: fake(3)], ids=["host", "fake", "fake-3"])
    def test_a_bad_piece_is_repaired(self, make: Make, tree: Path, shards: dict[str, bytes]) -> None:
        place = tree / "model-2.safetensors"
        flip(place, 2 * MIB + 5)
        asked = []

        def on_bad(path: str, piece: int) -> bool:
            asked.append((path, piece))
            fresh = place.with_name("fresh")
            fresh.write_bytes(shards[path])
            fresh.replace(place)
            return True

        with open_on(make(), on_bad=on_bad) as release:
            assert same(release.tensor("d"), expected(shards)["d"])
            assert (release.stats.rereads, release.stats.refetches) == (2, 1)
        assert asked == [("model-2.safetensors", 2)]

    def test_who_cannot_repair_is_asked_once(self, tree: Path) -> None:
        flip(tree / "model-2.safetensors", 2 * MIB + 5)
        asked = []

        def on_bad(path: str, piece: int) -> bool:
            asked.append(piece)
            return False

        with open_on(fake(), on_bad=on_bad) as release, pytest.raises(IntegrityError):
            release.tensor("d")
        assert asked == [2]

    def test_promises_of_repair_are_believed_three_times(self, tree: Path) -> None:
        flip(tree / "model-2.safetensors", 2 * MIB + 5)
        asked = []

        def on_bad(path: str, piece: int) -> bool:
            asked.append(piece)
            return True

        with open_on(fake(), on_bad=on_bad) as release, pytest.raises(IntegrityError):
            release.tensor("d")
        assert asked == [2, 2, 2]

    @pytest.mark.parametrize("make", [HostDevice, fake], ids=["host", "fake"])
    @pytest.mark.parametrize("verify", ["hashed", "record", "off"])
    def test_a_file_truncated_while_open(self, make: Make, tree: Path, verify: str) -> None:
        device = make() if verify == "hashed" else FakeCuda()
        with open_on(device, **({} if verify == "hashed" else {"verify": verify})) as release:
            (tree / FILE).chmod(0o644)
            os.truncate(tree / FILE, MIB)
            with pytest.raises(IntegrityError, match="has 1048576 bytes"):
                release.tensor("b")

    @pytest.mark.parametrize("verify", ["record", "off"])
    def test_a_file_rewritten_meanwhile_is_noticed_where_nothing_is_hashed(self, tree: Path, verify: str) -> None:
        place = tree / "model-2.safetensors"

        class Rewriting(FakeCuda):
            def upload(self, slot: torch.Tensor, host: torch.Tensor) -> FakeEvent:
                os.utime(place, ns=(0, 1))
                return super().upload(slot, host)

        handed = []
        with open_on(Rewriting(slot_bytes=MIB), verify=verify) as release, pytest.raises(IntegrityError, match="written to"):
            handed += list(release.stream("d"))
        assert handed == []

    @pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 8, 13, 21])
    def test_a_device_that_fails(self, number: int) -> None:
        device = fake(number, fails_at=number)
        with open_on(device) as release, pytest.raises(ModelP2PError, match="fake device"):  # noqa: PT012
            for _, tensor in release.stream():
                device.check_handed_out(tensor)
        assert device.drained

    @pytest.mark.parametrize("make", [HostDevice, fake], ids=["host", "fake"])
    def test_no_reader_writes_to_a_slot_that_was_given_back(self, make: Make) -> None:
        """The first span is read at once, all others only when they are let go, or abandoned."""
        reading, let_go = [0], threading.Event()

        class Slow(PreadvReader):
            def read_into(self, target: memoryview, offset: int) -> None:
                reading[0] += 1
                if offset:
                    let_go.wait(0.05)
                super().read_into(target, offset)
                reading[0] -= 1

        with open_on(make(), workers=2) as release:
            with_tools(release, reader_of=lambda shard: Slow(shard.source))
            with pytest.raises(KeyboardInterrupt):
                for _ in release.stream("d", progress=interrupted):
                    pass
            assert reading == [0]
            let_go.set()

    def test_ctrl_c_drains(self) -> None:
        device = fake()
        with open_on(device) as release, pytest.raises(KeyboardInterrupt):
            release.load(progress=interrupted)
        assert not device.pending


@pytest.mark.usefixtures("home")
class TestWhoProves:
    def test_the_device_by_default_and_the_record_is_not_enough(self) -> None:
        for device, hashes in ((fake(), True), (HostDevice(), False)):
            with open_on(device, verify="auto") as release:
                release.load()
                assert (release.stats.verified_bytes > 0) is hashes

    def test_the_cpu_when_the_device_cannot(self, shards: dict[str, bytes]) -> None:
        class Plain(FakeCuda):
            def verifier(self) -> Verifier:
                raise UsageError("no kernels: NVRTC is not here")

        with open_on(Plain(slot_bytes=MIB), verify="auto") as release:
            got = release.load()
            assert release.stats.verifier == "cpu"
            assert release.stats.fallbacks == ["hashed on the cpu: no kernels: NVRTC is not here"]
            assert release.stats.verified_bytes > release.stats.bytes
        assert all(same(got[name], tensor) for name, tensor in expected(shards).items())
        with pytest.raises(UsageError, match="NVRTC"):
            open_on(Plain(), verify="gpu")

    @pytest.mark.parametrize("seed", range(4))
    def test_the_cpu_when_asked(self, shards: dict[str, bytes], tree: Path, seed: int) -> None:
        device = FakeCuda(seed, slot_bytes=MIB)
        with open_on(device, verify="cpu") as release:
            for name, tensor in checked(device, release.stream()):
                assert same(tensor, expected(shards)[name])
        flip(tree / FILE, -1)
        with open_on(FakeCuda(seed), verify="cpu") as release, pytest.raises(IntegrityError):
            release.load()

    @pytest.mark.parametrize("verify", ["record", "off"])
    def test_nobody_when_asked(self, shards: dict[str, bytes], verify: str) -> None:
        with open_on(FakeCuda(), verify=verify) as release:
            got = release.load()
            assert release.stats.verifier == ""
        assert all(same(got[name], tensor) for name, tensor in expected(shards).items())

    def test_gpu_is_refused_on_the_host(self) -> None:
        with pytest.raises(UsageError, match="for GPUs"):
            open_on(HostDevice(), verify="gpu")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("reader", ["preadv", "mmap", "direct"])
@pytest.mark.parametrize("make", [HostDevice, fake], ids=["host", "fake"])
def test_every_reader_gives_the_same(make: Make, reader: str, shards: dict[str, bytes]) -> None:
    with open_on(make(), reader=reader) as release:
        got = release.load()
        stats = release.stats
    assert all(same(got[name], tensor) for name, tensor in expected(shards).items())
    # Where the file system knows no O_DIRECT, the reason is told.
    assert stats.reader == reader or (stats.reader == "preadv" and "past the page cache" in stats.fallbacks[0])


@pytest.mark.usefixtures("home")
def test_a_reader_nobody_knows_is_refused() -> None:
    with pytest.raises(UsageError, match="reader"):
        open_on(HostDevice(), reader="gds")


@pytest.mark.usefixtures("home")
def test_a_disk_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_on(fake()) as release:

        def preadv(*_: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(StoreError, match="Input/output"):
            release.tensor("d")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("verify", ["gpu", "cpu"])
def test_a_gpu_loads_what_safetensors_loads(own_home: Path, verify: str) -> None:
    tensors = tensors_of(5, **{f"layer.{n}": 24 * MIB + 4 * n for n in range(12)})
    files = {"m.safetensors": save(tensors)}
    add(own_home, files)
    with open_on(device_for("cuda:0"), verify=verify) as release:
        # Dropped and made again on the caller's stream, while ours works on: memory must not be reused too early.
        for name, tensor in release.stream():
            noise = [torch.full_like(tensor, 7.0) for _ in range(2)]
            assert torch.equal(tensor.cpu(), tensors[name])
            del tensor, noise
        assert release.stats.transfer == "ring"
        assert release.stats.verifier == ("cpu" if verify == "cpu" else release.stats.verifier)
        assert (verify == "cpu") is (release.stats.verifier == "cpu")
        got = release.load(dtype=torch.bfloat16)
    assert all(torch.equal(got[name].cpu(), tensor.to(torch.bfloat16)) for name, tensor in tensors.items())


@pytest.mark.gpu
@pytest.mark.slow
def test_a_gpu_refuses_a_flipped_byte(own_home: Path) -> None:
    files = {"m.safetensors": file_of(3, a=100 * MIB, b=100 * MIB)}
    home = add(own_home, files)
    (link,) = (home.path / "models" / "lab" / "model").iterdir()
    flip(link.resolve() / "m.safetensors", 150 * MIB + 1)
    with open_on(device_for("cuda:0")) as release:
        assert torch.equal(release.tensor("a").cpu(), oracle(files["m.safetensors"])["a"])
        with pytest.raises(IntegrityError) as caught:
            release.tensor("b")
    piece = caught.value.facts["piece"]
    assert isinstance(piece, int)
    assert piece == (150 * MIB + 1) // release.release.manifest.piece_length
