"""Everybody who loads in the GPU benchmark, by name: ours in each of its ways, and the rivals that can be imported.

The rivals' calls were written from the sources of safetensors 0.9.0rc1, instanttensor 0.2.2, fastsafetensors 0.5.0, flashpack
0.4.5, runai-model-streamer 0.17.0 and tensorizer 2.12.1; where one fails, its row says so and the others go on. All give tensors
of their own: where a loader hands out its ring, it is told to copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from modelp2p.loader.locate import locate
from modelp2p.loader.release import OpenRelease
from tests.bench.gpu_data import NAME, shards_of

if TYPE_CHECKING:
    import torch

    from tests.bench.gpu_bed import Bed

Loaded = dict[str, "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to have all tensors of a folder (see `gpu_data.build`) on a device."""

    name: str
    module: str
    """What has to be importable, and is imported before the clock starts."""
    load: Callable[[Path, Bed, dict[str, object]], Loaded]
    """Folder, device, and a dict to put facts into."""
    is_verified: bool = False
    needs: str = ""
    """An attribute of the module's `safe_open`, where only some versions have it."""
    on_cpu: bool = False
    """It loads to the CPU as well, and takes part in a fake run."""

    def absence(self, *, is_fake: bool) -> str:
        """Why it does not take part; empty if it does."""
        if find_spec(self.module.partition(".")[0]) is None:
            return f"{self.module.partition('.')[0]} is not installed"
        if self.needs and not hasattr(import_module(self.module).safe_open, self.needs):
            return f"this version of {self.module} has no {self.needs}"
        return "needs a GPU" if is_fake and not self.on_cpu else ""


@dataclass(frozen=True, slots=True)
class Ours:
    """Our loader with options; `facts` get its statistics."""

    options: dict[str, str] = field(default_factory=dict)
    transfer: str = "ring"

    def __call__(self, folder: Path, bed: Bed, facts: dict[str, object]) -> Loaded:
        with opened(folder, bed, transfer=self.transfer, **self.options) as release:
            loaded = release.load()
            stats = release.stats
            facts |= {"transfer": stats.transfer, "reader": stats.reader, "verifier": stats.verifier}
            facts |= {"fallbacks": list(stats.fallbacks), "ring_bytes": release._ring.locked_bytes}
        return loaded


@contextmanager
def opened(folder: Path, bed: Bed, *, transfer: str = "ring", **options: str) -> Iterator[OpenRelease]:
    """The release of a folder, with bytes going the way asked for."""
    located = locate(NAME, publisher=None, home=str(folder / "home"))
    with OpenRelease(located, bed.device(), transfer=transfer, **options) as release:  # type: ignore[arg-type]
        yield release


def _safetensors(folder: Path, bed: Bed, facts: dict[str, object]) -> Loaded:
    load_file = import_module("safetensors.torch").load_file
    return {name: t for path in shards_of(folder) for name, t in load_file(path, device=str(bed.torch_device)).items()}


def _safetensors_pread(folder: Path, bed: Bed, facts: dict[str, object]) -> Loaded:
    load_file = import_module("safetensors.torch").load_file
    device = str(bed.torch_device)
    return {name: t for path in shards_of(folder) for name, t in load_file(path, device=device, backend="pread").items()}


def _safetensors_prefetch(folder: Path, bed: Bed, facts: dict[str, object]) -> Loaded:
    safe_open = import_module("safetensors").safe_open
    loaded: Loaded = {}
    for path in shards_of(folder):
        with safe_open(path, framework="pt") as file, file.prefetch(device=bed.name, threads=16) as loader:
            loaded |= dict(loader)
    return loaded


def _instanttensor(folder: Path, bed: Bed, facts: dict[str, object]) -> Loaded:
    safe_open = import_module("instanttensor").safe_open
    with safe_open([str(path) for path in shards_of(folder)], framework="pt", device=bed.name) as file:
        return dict(file.tensors())


def _fastsafetensors(folder: Path, bed: Bed, facts: dict[str, object]) -> Loaded:
    module = import_module("fastsafetensors")
    loader = module.SafeTensorsFileLoader(module.SingleGroup(), device=bed.name, nogds=True)
    loader.add_filenames({0: [str(path) for path in shards_of(folder)]})
    buffers = loader.copy_files_to_device()
    # Its tensors are views of one buffer for each file, which closing would free.
    loaded = {name: buffers.get_tensor(name).clone() for name in loader.get_keys()}
    buffers.close()
    loader.close()
    return loaded


def _runai(folder: Path, bed: Bed, facts: dict[str, object]) -> Loaded:
    with import_module("runai_model_streamer").SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in shards_of(folder)], device=bed.name)
        return {name: tensor.to(bed.name) for name, tensor in streamer.get_tensors()}


def _flashpack(folder: Path, bed: Bed, facts: dict[str, object]) -> Loaded:
    module = import_module("flashpack.deserialization")
    storage, index = module.read_flashpack_file(str(folder / "model.flashpack"), device=bed.name)
    return dict(module.iterate_from_flash_tensor(storage, index))


def _tensorizer(folder: Path, bed: Bed, facts: dict[str, object]) -> Loaded:
    reader = import_module("tensorizer").TensorDeserializer(str(folder / "model.tensors"), device=bed.name, verify_hash=True)
    return dict(reader.items())


def prepare(folder: Path) -> None:
    """Convert the checkpoint for those who need it, untimed, once, where they are installed. Who cannot has no file to load."""
    for module, file, convert in (("flashpack", "model.flashpack", _pack), ("tensorizer", "model.tensors", _serialize)):
        if find_spec(module) is None or (folder / file).exists():
            continue
        load_file = import_module("safetensors.torch").load_file
        try:
            convert({name: t for path in shards_of(folder) for name, t in load_file(path).items()}, str(folder / file))
        except Exception as exc:  # a rival's, of any kind: its row will fail, the others go on
            print(f"{module} cannot convert the checkpoint: {exc}", file=sys.stderr)
            (folder / file).unlink(missing_ok=True)


def _pack(tensors: Loaded, path: str) -> None:
    import_module("flashpack").pack_to_file(tensors, path, target_dtype=None)


def _serialize(tensors: Loaded, path: str) -> None:
    serializer = import_module("tensorizer").TensorSerializer(path)
    serializer.write_state_dict(tensors)
    serializer.close()


def _ours(name: str, *, is_verified: bool, transfer: str = "ring", **options: str) -> Contestant:
    return Contestant(name, "modelp2p.loader.release", Ours(options, transfer), is_verified=is_verified, on_cpu=True)


VERIFIED, UNVERIFIED, WINDOWS = "ours, verified", "ours, not verified", "ours, verified, by windows"
SAFETENSORS = "safetensors load_file"
OURS = (
    _ours(VERIFIED, is_verified=True, verify="gpu"),
    _ours(UNVERIFIED, is_verified=False, verify="off"),
    _ours("ours, verified on the CPU", is_verified=True, verify="cpu"),
    _ours(WINDOWS, is_verified=True, transfer="register", verify="gpu"),
    _ours("ours, not verified, by windows", is_verified=False, transfer="register", verify="off"),
)
COLD = (
    _ours("ours, verified, preadv", is_verified=True, verify="gpu", reader="preadv"),
    _ours("ours, verified, direct", is_verified=True, verify="gpu", reader="direct"),
)
RIVALS = (
    Contestant(SAFETENSORS, "safetensors.torch", _safetensors, on_cpu=True),
    Contestant("safetensors backend=pread", "safetensors.torch", _safetensors_pread, on_cpu=True),
    Contestant("safetensors 0.9 prefetch", "safetensors", _safetensors_prefetch, needs="prefetch"),
    Contestant("instanttensor", "instanttensor", _instanttensor),
    Contestant("fastsafetensors, no GDS", "fastsafetensors", _fastsafetensors),
    Contestant("runai-model-streamer", "runai_model_streamer", _runai),
    Contestant("flashpack, converted", "flashpack", _flashpack),
    Contestant("tensorizer verify_hash, converted", "tensorizer", _tensorizer, is_verified=True),
)
BY_NAME = {contestant.name: contestant for contestant in (*OURS, *COLD, *RIVALS)}
