"""What verification costs on a GPU: the parts of a load, whole loads verified and not, and rivals on the same files.

    python -m tests.bench.gpu_load --memory /dev/shm/bench --disk /var/tmp/bench --json gpu.json --report gpu.md
    python -m tests.bench.gpu_load --fake      # all of it on the tests' device: finds out that it runs, measures nothing

It needs torch, safetensors, and what the loader itself imports (msgpack, cryptography, tuf, securesystemslib); no libtorrent, no
network, no install: from a checkout, put `.types` on PYTHONPATH.

| Experiment | What |
|---|---|
| E0 | rates of the links: the ceilings |
| E1 | SHA-256 on the device, by way to the kernels, size and streams |
| E2 | from the page cache into page-locked memory, by reader, threads and slot |
| E3 | page-locked windows of mapped files, and whole loads by ring and by windows: which should be the default |
| E4 | whole loads, verified and not |
| E5 | the same beside rivals |
| E6 | the same with a cold page cache |
| E7 | a flipped bit in the page cache: is it caught |

Protocol: every contestant in a new process, one round that does not count and then `--runs` rounds, each in the reverse order of
the one before. Time runs from the call until all tensors are tensors of their own on the device and the device has nothing left
to do; imports and the CUDA context come before. "First" is the first load of a process (kernels, page-locked memory and all),
"steady" the second. In the round that does not count all tensors are compared with what a plain read of the files gives.

Results are kept in `--json` after every process, and what is there is not measured again: `--only E0,E1` and `--budget` cut the
whole into calls of any length.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the path above first, as for all below

from modelp2p.loader.readers import cached_share  # noqa: E402
from modelp2p.loader.source import SourceFile  # noqa: E402
from modelp2p.protocol.errors import IntegrityError  # noqa: E402
from tests.bench import gpu_data, gpu_rivals  # noqa: E402
from tests.bench.gpu_bed import FAKE, MIB, REAL, Bed, Clock, Scale  # noqa: E402
from tests.bench.gpu_probes import PROBES  # noqa: E402
from tests.bench.gpu_report import report  # noqa: E402

EXPERIMENTS = ("E0", "E1", "E2", "E3", "E4", "E5", "E6", "E7")
PLACES = ("memory", "disk")
PREPARE = "prepare"


@dataclass(frozen=True, slots=True)
class Task:
    """What one process does."""

    experiment: str
    place: str
    name: str
    """Of a contestant; of a probe, empty."""
    round: int
    """0 does not count."""

    @property
    def key(self) -> str:
        return f"{self.experiment}/{self.place}/{self.name}/{self.round}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What all processes of a run share."""

    device: str
    is_fake: bool
    places: dict[str, str]
    scale: Scale

    @property
    def bed(self) -> Bed:
        return Bed(self.device, self.is_fake)


def tasks(settings: Settings, only: Sequence[str]) -> Iterator[Task]:
    """All of a run, in order; rounds of contestants alternate their direction."""
    for experiment in only:
        if experiment in PROBES:
            # The links and the kernels do not know where files lie.
            places = PLACES if experiment in ("E2", "E3") else PLACES[:1]
            yield from (Task(experiment, place, "", 1) for place in places)
        if experiment == "E7":
            yield from (Task(experiment, "memory", transfer, 1) for transfer in ("ring", "register"))
        names = [one.name for one in contestants(experiment) if not one.absence(is_fake=settings.is_fake)]
        for place in ("disk",) if experiment == "E6" else PLACES:
            for number in range(settings.scale.runs + 1):
                yield from (Task(experiment, place, name, number) for name in (names if number % 2 else names[::-1]))


def contestants(experiment: str) -> tuple[gpu_rivals.Contestant, ...]:
    """Who loads in an experiment."""
    by_name = gpu_rivals.BY_NAME
    ours = (by_name[gpu_rivals.VERIFIED], by_name[gpu_rivals.UNVERIFIED])
    return {
        "E3": (ours[0], by_name[gpu_rivals.WINDOWS]),
        "E4": gpu_rivals.OURS,
        "E5": (*ours, *gpu_rivals.RIVALS),
        "E6": (*gpu_rivals.COLD, by_name[gpu_rivals.SAFETENSORS]),
    }.get(experiment, ())


def perform(task: Task, settings: Settings) -> dict[str, Any]:
    """One task, in this process."""
    folder, bed = Path(settings.places[task.place]), settings.bed
    if task.experiment == PREPARE:
        build(settings)
        return {"machine": bed.facts(settings.places)}
    if not task.name:
        return PROBES[task.experiment](bed, settings.scale, folder)
    if task.experiment == "E7":
        return flipped(folder / "small", bed, task.name)
    return timed(gpu_rivals.BY_NAME[task.name], folder, bed, is_cold=task.experiment == "E6", is_checked=task.round == 0)


def timed(contestant: gpu_rivals.Contestant, folder: Path, bed: Bed, *, is_cold: bool, is_checked: bool) -> dict[str, Any]:
    """Figures of one contestant in this process."""
    clock = Clock()
    import_module(contestant.module)
    torch.zeros(1, device=bed.torch_device)
    bed.synchronize()
    result: dict[str, Any] = {"setup_s": clock.seconds}
    if is_cold:
        result["cached_share"] = drop_cache(folder)
    for kind in ("first",) if is_cold else ("first", "steady"):
        loaded: gpu_rivals.Loaded = {}
        facts: dict[str, object] = {}
        clock = Clock()
        loaded = contestant.load(folder, bed, facts)
        bed.synchronize()
        result |= {f"{kind}_s": clock.seconds, f"{kind}_cpu_s": clock.cpu_seconds}
        result |= {"bytes": sum(tensor.nbytes for tensor in loaded.values()), **facts}
    result |= bed.memory()
    if is_checked:
        check_equal(loaded, folder, bed)
        result["is_equal"] = True
    return result


def check_equal(loaded: gpu_rivals.Loaded, folder: Path, bed: Bed) -> None:
    """Exit where a tensor is missing, too many, on another device, or differs in a bit."""
    left = dict(loaded)
    for name, data in gpu_data.reference(folder):
        tensor = left.pop(name, None)
        if tensor is None or tensor.device.type != bed.torch_device.type:
            sys.exit(f"tensor {name} is not on the device")
        if not torch.equal(tensor.contiguous().view(-1).view(torch.uint8), data.to(tensor.device)):
            sys.exit(f"tensor {name} differs from the file")
    if left:
        sys.exit(f"tensors nobody wrote: {sorted(left)[:3]}")


def flipped(folder: Path, bed: Bed, transfer: str) -> dict[str, Any]:
    """E7: whether a verified load refuses one bit that changed in the page cache behind the back of record and time stamps."""
    path = gpu_data.shards_of(folder)[-1]
    at = path.stat().st_size - 4321
    with _flipped_bit(path, at):
        with gpu_rivals.opened(folder, bed, transfer=transfer, verify="off") as release:
            unnoticed = len(release.load())
        try:
            with gpu_rivals.opened(folder, bed, transfer=transfer, verify="gpu") as release:
                release.load()
        except IntegrityError as exc:
            piece = exc.facts.get("piece")
        else:
            return {"caught": 0, "unverified_tensors": unnoticed}
    with gpu_rivals.opened(folder, bed, transfer=transfer, verify="gpu") as release:
        is_right = piece == at // release.release.manifest.piece_length
        whole = len(release.load())
    return {"caught": int(is_right), "piece": piece, "unverified_tensors": unnoticed, "tensors_after_mending": whole}


@contextlib.contextmanager
def _flipped_bit(path: Path, at: int) -> Iterator[None]:
    stat = path.stat()

    def flip() -> None:
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 4]))
        path.chmod(0o444)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    flip()
    try:
        yield
    finally:
        flip()


def drop_cache(folder: Path) -> float | None:
    """Empty the page cache of the files, of everything where this is root; the share that is in it afterwards."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
    manifest = {entry.path: entry for entry in _entries(folder)}
    shares = []
    for path in gpu_data.shards_of(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        source = SourceFile(str(path), manifest[path.name])
        shares.append(cached_share(source))
        source.close()
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _entries(folder: Path) -> Sequence[Any]:
    from modelp2p.loader.locate import locate

    return locate(gpu_data.NAME, publisher=None, home=str(folder / "home")).release.manifest.files


def build(settings: Settings) -> None:
    """Whatever of the data is not there yet."""
    device, scale = settings.bed.torch_device, settings.scale
    for place in PLACES:
        folder = Path(settings.places[place])
        gpu_data.build(folder, scale.data, scale.shards, scale.tensor, device)
        if not settings.is_fake:
            gpu_rivals.prepare(folder)
    gpu_data.build(Path(settings.places["memory"]) / "small", 5 * MIB, 1, MIB, device)


def run(settings: Settings, only: Sequence[str], place: Path | None, *, budget_s: float, is_inline: bool) -> dict[str, Any]:
    """Everything that is not in the results yet and fits the time; the results, all told."""
    results: dict[str, Any] = {"v": 1, "fake": settings.is_fake, "tasks": {}}
    if place is not None and place.exists():
        results = json.loads(place.read_text(encoding="utf-8"))
        if results["fake"] != settings.is_fake:
            sys.exit(f"{place} holds results of {'a fake' if results['fake'] else 'a real'} run")
    ended = time.monotonic() + budget_s
    # In a process of its own as well, so that this one holds nothing on the device.
    preparing = Task(PREPARE, "memory", "", 0)
    prepared = perform(preparing, settings) if is_inline else spawned(preparing, settings, budget_s)
    if "error" in prepared:
        sys.exit(f"no data: {prepared['error']}")
    results["machine"] = prepared["machine"]
    results["scale"] = asdict(settings.scale)
    results["absent"] = {
        one.name: why
        for experiment in EXPERIMENTS
        for one in contestants(experiment)
        if (why := one.absence(is_fake=settings.is_fake))
    }
    todo = [task for task in tasks(settings, only) if task.key not in results["tasks"]]
    for number, task in enumerate(todo):
        if time.monotonic() > ended:
            print(f"out of time: {len(todo) - number} tasks are left; the same call goes on", file=sys.stderr)
            break
        results["tasks"][task.key] = perform(task, settings) if is_inline else spawned(task, settings, ended - time.monotonic())
        if place is not None:
            fresh = place.with_suffix(".new")
            fresh.write_text(json.dumps(results), encoding="utf-8")
            fresh.replace(place)
        print(f"{number + 1}/{len(todo)} {task.key}", file=sys.stderr)
    return results


def spawned(task: Task, settings: Settings, left_s: float) -> dict[str, Any]:
    """The same in a process of its own; what it said, or why it failed."""
    text = json.dumps({"task": asdict(task), "settings": asdict(settings)})
    command = [sys.executable, "-m", "tests.bench.gpu_load", "--child", text]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=max(60.0, left_s))
    except subprocess.TimeoutExpired:
        return {"error": "it took longer than the time that was left"}
    if done.returncode:
        return {"error": " ".join(done.stderr.split()[-60:])}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(text: str) -> None:
    """Perform a task of `spawned` and print its figures."""
    asked = json.loads(text)
    settings = Settings(**{**asked["settings"], "scale": _scale(asked["settings"]["scale"])})
    print(json.dumps(perform(Task(**asked["task"]), settings)))


def _scale(fields: dict[str, Any]) -> Scale:
    lists: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Scale(**lists)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--fake", action="store_true", help="the tests' device and tiny sizes: its figures mean nothing")
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="experiments, with commas")
    parser.add_argument("--memory", type=Path, help="a folder in memory (tmpfs) for the checkpoint; it stays")
    parser.add_argument("--disk", type=Path, help="a folder on a disk, likewise")
    parser.add_argument("--size", type=float, help="GiB of the checkpoint, which is there three times where rivals convert it")
    parser.add_argument("--runs", type=int, help="timed rounds")
    parser.add_argument("--budget", type=float, default=500, help="seconds after which no further process is started")
    parser.add_argument("--json", type=Path, help="results, to go on with and to keep")
    parser.add_argument("--report", type=Path, help="write the tables to this file as well")
    parser.add_argument("--inline", action="store_true", help="all in this process: for tests")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child)
        return
    only = args.only.split(",")
    if unknown := set(only) - set(EXPERIMENTS):
        parser.error(f"no experiment {sorted(unknown)}")
    if not args.fake and (args.memory is None or args.disk is None):
        parser.error("say where the data goes: --memory and --disk")
    scale = FAKE if args.fake else REAL
    scale = replace(scale, runs=args.runs or scale.runs, data=int(args.size * (1 << 30)) if args.size else scale.data)
    temporary = tempfile.mkdtemp(prefix="modelp2p-bench-") if args.memory is None or args.disk is None else ""
    try:
        places = {"memory": str(args.memory or Path(temporary, "memory")), "disk": str(args.disk or Path(temporary, "disk"))}
        settings = Settings(args.device, args.fake, places, scale)
        results = run(settings, only, args.json, budget_s=args.budget, is_inline=args.inline)
    finally:
        if temporary:
            shutil.rmtree(temporary)
    text = report(results)
    print(text)
    if args.report:
        args.report.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
