"""Experiments E0 to E3 of the GPU benchmark: the parts of a load one by one, each the most the whole could reach.

Each function runs in a process of its own and returns figures by name; those of `gpu_predictions` are among them.
"""

from __future__ import annotations

import mmap
import os
import statistics
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelp2p.loader.gpu import Batch
from modelp2p.loader.hashing import Workers
from modelp2p.loader.locate import locate
from modelp2p.loader.plan import Move
from modelp2p.loader.readers import reader_of
from modelp2p.loader.source import SourceFile
from modelp2p.loader.staging import bytes_of
from modelp2p.loader.windows import WindowError
from modelp2p.protocol.merkle import HASH_BYTES, piece_hash
from tests.bench.gpu_bed import MIB, Clock, best_of
from tests.bench.gpu_data import NAME, shards_of

if TYPE_CHECKING:
    from modelp2p.loader.device import Event
    from modelp2p.loader.readers import Reader
    from tests.bench.gpu_bed import Bed, Scale

Figures = dict[str, object]
AT_ONCE = 3
"""Windows and copies under way at once, as in a load."""


def ceilings(bed: Bed, scale: Scale, folder: Path) -> Figures:
    """E0: what the links do when nothing else is asked of them."""
    device = bed.device()
    rows: list[dict[str, Any]] = []
    for size in scale.copies:
        host, target = device.host_slot(size).memory, device.allocate(size)
        slot = device.slot(host)

        def upload(host: torch.Tensor = host, slot: torch.Tensor = slot) -> None:
            # Several in a row: the start of a copy is not what is asked about.
            for event in [device.upload(slot, host) for _ in range(4)]:
                event.wait()

        def within(slot: torch.Tensor = slot, target: torch.Tensor = target, size: int = size) -> None:
            for _ in range(4):
                device.move(target, slot, Move(0, 0, 0, size))
            device.mark().wait()

        rows.append({"bytes": size, "h2d_gb_s": _rate(4 * size, best_of(scale.runs, upload))})
        rows[-1]["d2d_gb_s"] = _rate(4 * size, best_of(scale.runs, within))
    device.drain()
    return {"rows": rows, "h2d_gb_s": max(r["h2d_gb_s"] for r in rows), "d2d_gb_s": max(r["d2d_gb_s"] for r in rows)}


def kernels(bed: Bed, scale: Scale, folder: Path) -> Figures:
    """E1: SHA-256 on the device, by every way to the kernels, sizes and streams; answers compared with hashlib on a sample."""
    figures: Figures = {"not_measured": "Triton: the loader has no Triton kernel"}
    made = {}
    for name, make in bed.verifiers(folder / "cubins").items():
        clock = Clock()
        try:
            made[name] = make()
        except Exception as exc:  # one closed way is a result
            figures[f"{name}, error"] = str(exc)
        figures[f"{name}, ready_s"] = clock.seconds
    rows: list[dict[str, Any]] = []
    for name, verifier in made.items():
        for size in scale.kernels:
            for count in (1, 2, 4):
                work = _hashing(bed, verifier.submit, size, count)
                seconds = best_of(scale.runs, work)
                row = {"way": name, "bytes": size, "streams": count, "ms": statistics.median(seconds) * 1e3}
                rows.append(row | {"gb_s": _rate(count * size, seconds)})
    single = [row for row in rows if row["streams"] == 1 and row["way"] == rows[0]["way"]]
    by_size = {row["bytes"]: row for row in single}
    figures |= {"rows": rows, "floor_ms": single[0]["ms"], "largest_gb_s": max(row["gb_s"] for row in single)}
    return figures | {"slot_gb_s": by_size.get(64 * MIB, single[-1])["gb_s"]}


def readers(bed: Bed, scale: Scale, folder: Path) -> Figures:
    """E2: from the page cache into page-locked slots, by reader, threads and slot length; nothing is uploaded."""
    device = bed.device()
    located = locate(NAME, publisher=None, home=str(folder / "home"))
    entry = located.release.manifest.files[0]
    source = SourceFile(os.path.join(located.directory, entry.path), entry)
    host = device.host_slot(max(scale.slots))
    view = host.view
    rows: list[dict[str, Any]] = []
    for name in ("preadv", "mmap"):
        reader, refusal = reader_of(source, name)
        for threads in scale.threads:
            for slot in scale.slots:
                total = min(entry.size // slot * slot, 32 * max(scale.slots)) or min(slot, entry.size)
                # One run of a slot to a thread at a time, as the pipeline cuts it.
                step = max(4096, slot // threads // 4096 * 4096)

                def read(run: range, slot: int = slot, step: int = step, reader: Reader = reader) -> None:
                    begin = run.start // step % (slot // step) * step
                    target = view[begin : begin + len(run)]
                    reader.read_into(target, run.start)

                runs = [range(at, min(at + step, total)) for at in range(0, total, step)]
                with closing(Workers(threads)) as workers:
                    seconds = best_of(scale.runs, partial(workers.run, read, runs, lambda run: None))
                rows.append({"reader": name, "threads": threads, "slot": slot, "gb_s": _rate(total, seconds), "why": refusal})
        reader.close()
    source.close()
    best = {name: max(row["gb_s"] for row in rows if row["reader"] == name) for name in ("preadv", "mmap")}
    return {"rows": rows, "preadv_best_gb_s": best["preadv"], "mmap_best_gb_s": best["mmap"]}


def windows(bed: Bed, scale: Scale, folder: Path) -> Figures:
    """E3: page-locking windows of a mapped file: its price, alone and behind uploads, read-only (8) and writable (0)."""
    path = shards_of(folder)[0]
    rows: list[dict[str, Any]] = []
    refusals: dict[str, str] = {}
    for flags in (8, 0):
        for size in scale.windows:
            memories = _windows(path, size)
            registrar = bed.registrar(flags)
            clock = Clock()
            try:
                for memory in memories:
                    registrar.register(memory).wait()
            except WindowError as exc:
                refusals[f"flags {flags}, {size}"] = exc.message
                continue
            finally:
                locked = clock.seconds
                clock = Clock()
                for memory in memories:
                    registrar.unregister(memory).wait()
            row = {"flags": flags, "window": size, "register_ms": locked / len(memories) * 1e3}
            row |= {"unregister_ms": clock.seconds / len(memories) * 1e3}
            if flags == 8:
                seconds = best_of(scale.runs, partial(_overlapped, bed, path, size))
                row["overlapped_gb_s"] = _rate(sum(memory.nbytes for memory in memories), seconds)
            rows.append(row)
    rates = [row["overlapped_gb_s"] for row in rows if "overlapped_gb_s" in row]
    return {"rows": rows, "refusals": refusals} | ({"overlapped_gb_s": max(rates)} if rates else {})


PROBES: dict[str, Callable[[Bed, Scale, Path], Figures]] = {"E0": ceilings, "E1": kernels, "E2": readers, "E3": windows}


def _hashing(bed: Bed, submit: Callable[..., None], size: int, count: int) -> Callable[[], None]:
    """Proofs of `count` slots on as many streams; the answers are looked at once, here."""
    length = min(4 * MIB, size)
    device = bed.torch_device
    generator = torch.Generator(device).manual_seed(size)
    slots = [torch.randint(0, 256, (size,), generator=generator, device=device, dtype=torch.uint8) for _ in range(count)]
    pieces = -(-size // length)
    sample = {0, pieces // 2, pieces - 1}
    batches, answers = [], []
    for slot in slots:
        expected = bytearray(HASH_BYTES * pieces)
        for piece in sample:
            data = bytes(bytes_of(slot[piece * length : (piece + 1) * length].cpu()))
            expected[piece * HASH_BYTES : (piece + 1) * HASH_BYTES] = piece_hash(data, length, pieces == 1)
        batches.append(Batch(size, length, pieces == 1, torch.tensor(expected, dtype=torch.uint8).to(device)))
        answers.append(torch.zeros(pieces, dtype=torch.int32, device=device))
    streams = bed.streams(count)

    def work() -> None:
        for stream, slot, batch, bad in zip(streams, slots, batches, answers, strict=True):
            with stream:
                submit(slot, batch, bad)
        bed.synchronize()

    bed.synchronize()
    work()
    for bad in answers:
        if {number for number, is_bad in enumerate(bad.tolist()) if not is_bad} != sample:
            raise SystemExit(f"the kernels disagree with hashlib at {size} bytes")
    return work


def _overlapped(bed: Bed, path: Path, size: int) -> None:
    """Map a file and upload it, each window page-locked meanwhile, `AT_ONCE` at a time."""
    device, memories = bed.device(size), _windows(path, size)
    slots = [device.bare_slot(max(memory.numel() for memory in memories)) for _ in range(AT_ONCE)]
    under_way: deque[tuple[torch.Tensor, Event]] = deque()
    ending: list[Event] = []
    todo = deque(memories)
    while todo or under_way:
        while todo and len(under_way) < AT_ONCE:
            memory = todo.popleft()
            under_way.append((memory, device.register(memory)))
        memory, registered = under_way.popleft()
        registered.wait()
        slot = slots[len(ending) % AT_ONCE]
        device.upload(slot[: memory.numel()], memory).wait()
        ending.append(device.unregister(memory))
    for event in ending:
        event.wait()
    device.drain()


def _windows(path: Path, size: int) -> list[torch.Tensor]:
    """The first 16 windows of a new mapping: what another mapping left in the page tables does not count."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
    return [whole[at : at + size] for at in range(0, min(len(mapping), 16 * size), size)]


def _rate(size: int, seconds: Sequence[float]) -> float:
    return size / statistics.median(seconds) / 1e9
