"""An open release: its tensors by name, each proven before it is handed out.

What keeps the bytes true after the check:
- a **copy** is hashed in private staging, on a GPU in the GPU's own memory, and placed from there: nothing changes it afterwards;
- a **view** shows the store's own file, read-only. It is right as long as nobody writes to that inode; the store never does.
  Writing to a view kills the process (SIGSEGV): clone what you want to change, or load with `mapping="pread"`. Truncating
  the file under it kills the process as well (SIGBUS). Views stay valid after `close`, after `rm`, and alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import TYPE_CHECKING, Self

from modelp2p.loader.attest import Attestation, attest_tensors
from modelp2p.loader.delivery import Delivery, Files, Progress, TargetOf
from modelp2p.loader.hashers import Hashers
from modelp2p.loader.hashing import Workers
from modelp2p.loader.model import Model, Scattered, fitted, tensors_of
from modelp2p.loader.opening import Opening
from modelp2p.loader.parts import Part, part_of
from modelp2p.loader.plan import Cuts, Want, cut_of
from modelp2p.loader.readers import READERS, Reader, choose, evidence_of, reader_of
from modelp2p.loader.ring import Ring
from modelp2p.loader.stats import LoadStats
from modelp2p.loader.targets import Target, existing_target
from modelp2p.loader.tools import OnBad, Tools
from modelp2p.loader.windows import TRANSFERS, Transfers
from modelp2p.protocol.errors import FormatError, NotFoundError, UsageError
from modelp2p.protocol.safetensors import DEFAULT_MAX_HEADER_BYTES

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.arriving import Arrivals
    from modelp2p.loader.device import Device
    from modelp2p.loader.gpu import Verifier
    from modelp2p.loader.locate import Located
    from modelp2p.loader.shard import Shard

VERIFY = ("auto", "gpu", "cpu", "record", "off")
MAPPING = ("auto", "mmap", "pread")

_log = logging.getLogger("modelp2p.loader")


class OpenRelease:
    """The tensors of one release. Made by `open_release`; use it in a `with` block, and from one thread at a time.

    Args:
        located: the believed release and its folder.
        device: where tensors are made.
        verify: `gpu` hashes every piece under what is handed out where it arrived, in the device's memory; `cpu` hashes it
            on the host. `auto` is `gpu` on a GPU, or `cpu` with the reason in `stats.fallbacks`; on the host it is `cpu`, but
            does not hash where the daemon's record vouches for the file as it is now. `record` accepts nothing else than the
            record. `off` checks signature and sizes only, says so in the log and in `stats`.
        mapping: `auto` gives views of files the store made, and copies of all others (borrowed files, plain folders, files
            no record counts for). `mmap` gives views of all but borrowed files. `pread` copies everything.
        files: globs over file paths; only these shards are opened.
        workers: threads that read and hash; all cores by default.
        max_header_bytes: limit of one file's header, at most 100,000,000.
        reader: how copies are read: `preadv`, `mmap`, `direct`, or `auto` by evidence (see `readers`).
        transfer: how bytes get to a GPU: `ring` (through page-locked slots), `register` (straight from the file's mapping, see
            `windows`), or `auto`, which is `ring` today. What cannot go the way asked for goes through the ring, with the reason
            in `stats.fallbacks`.
        on_bad: told path and number of a piece that stayed bad when it was read again; returns whether it was repaired.
        arrivals: of a release that is still being fetched, started; then everything is hashed and copied as it arrives. They
            are closed with this.

    Raises:
        NotFoundError: a file is missing, or there is no safetensors file.
        IntegrityError: a header, or the size of a file, is not what was signed.
        FormatError: a header is not valid, or two files hold one tensor name.
    """

    def __init__(
        self,
        located: Located,
        device: Device,
        *,
        verify: str = "auto",
        mapping: str = "auto",
        files: str | Sequence[str] | None = None,
        workers: int | None = None,
        max_header_bytes: int = DEFAULT_MAX_HEADER_BYTES,
        reader: str = "auto",
        transfer: str = "auto",
        on_bad: OnBad | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        _check_choice("verify", verify, VERIFY)
        _check_choice("mapping", mapping, MAPPING)
        _check_choice("reader", reader, READERS)
        _check_choice("transfer", transfer, TRANSFERS)
        if transfer != "auto" and device.is_host:
            raise UsageError(f"transfer='{transfer}' is for GPUs", hint="On the cpu, mapping= says how files are read.")
        if verify == "gpu" and device.is_host:
            raise UsageError("verify='gpu' is for GPUs", hint="On the cpu, verify='cpu' hashes every byte.")
        if workers is not None and workers < 1:
            raise UsageError(f"workers must be at least 1, not {workers}")
        self.release = located.release
        """The verified statement: manifest, layers, publisher."""
        self.directory = located.directory
        self.is_name_verified = located.is_name_verified
        self.stats = LoadStats(str(device.device), verify, "mmap" if device.is_host else device.transfer)
        self._verify = verify
        self._mapping = mapping
        self._max_header_bytes = max_header_bytes
        self._reader = reader
        self._device = device
        self._verifier = self._verifier_of(device)
        self._arrivals = arrivals
        self._on_bad = on_bad
        self._worker_count = workers
        self._transfers = Transfers(
            transfer, is_proven_on_device=self._verifier is not None, on_reason=self.stats.fallbacks.append
        )
        self._is_closed = False
        self._equip()
        self._shards: dict[str, Shard] = {}
        self._parts: dict[str, tuple[str, Part]] = {}
        if verify == "off":
            _log.warning("%s is loaded with verify='off': its bytes are not compared with what was signed", self.release.ref)
        self._opening = Opening(
            located=located,
            arrivals=arrivals,
            verify=verify,
            mapping=mapping,
            max_header_bytes=max_header_bytes,
            is_host=device.is_host,
        )
        started = time.perf_counter()
        try:
            self._open(files)
        except BaseException:
            self.close()
            raise
        self.stats.seconds += time.perf_counter() - started

    @property
    def name(self) -> str:
        """`org/model@revision`."""
        return self.release.ref

    @property
    def publisher(self) -> str:
        """Who signed."""
        return self.release.publisher_id

    @property
    def files(self) -> tuple[str, ...]:
        """The opened safetensors files, by path in the release."""
        return tuple(self._shards)

    @property
    def metadata(self) -> Mapping[str, Mapping[str, str]]:
        """What each file's header says under `__metadata__`, by path. The publisher's words, not ours."""
        return {path: shard.header.metadata for path, shard in self._shards.items()}

    def keys(self, include: str | Sequence[str] | None = None) -> tuple[str, ...]:
        """Tensor names, in the order of files and of places in them.

        Args:
            include: names or globs; all tensors by default.

        Raises:
            NotFoundError: one of them fits no tensor.
        """
        if include is None:
            return tuple(self._parts)
        patterns = [include] if isinstance(include, str) else list(include)
        # Lists of names are as long as models are; only what is no name is compared with every name.
        exact = {pattern for pattern in patterns if pattern in self._parts}
        globs = [pattern for pattern in patterns if pattern not in exact]
        found = {pattern: {name for name in self._parts if fnmatchcase(name, pattern)} for pattern in dict.fromkeys(globs)}
        for pattern, names in found.items():
            if not names:
                raise NotFoundError(f"no tensor of {self.name} is called '{pattern[:200]}'", hint="See release.keys().")
        chosen = exact.union(*found.values())
        return tuple(name for name in self._parts if name in chosen)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape the tensor will have."""
        return self._part(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype it is stored in."""
        return self._part(name)[1].dtype

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor; only the pieces it touches are read."""
        return self._one(name, None, dtype)

    def slice(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None, *, dim: int = 0) -> torch.Tensor:
        """Rows `start` up to `stop` of a dimension; only the pieces they touch are read."""
        return self._one(name, (dim, start, stop), dtype)

    def stream(
        self,
        include: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
        *,
        plan: Cuts | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, each after every piece under it was proven.

        File by file; what is still being fetched comes in the order in which a model uses it (`order`).

        Args:
            include: names or globs; all tensors by default.
            dtype: cast floating-point tensors to this; integers, booleans and 4-bit numbers keep theirs.
            progress: called while it works.
            plan: which tensors are cut, and how: `{name: (dim, start, stop)}`, or a function of name and shape that gives
                such a cut or None. Only the pieces under the cuts are read.

        Raises:
            IntegrityError: a piece is bad or a file changed. What was handed out before is good.
            NotFoundError, UsageError: a plan names a tensor or rows that do not exist.
        """
        yield from self._deliver(self._wants(self.keys(include), dtype, plan), progress)

    def load(
        self,
        include: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
        *,
        plan: Cuts | None = None,
    ) -> dict[str, torch.Tensor]:
        """All of `stream` at once."""
        return dict(self.stream(include, dtype, progress, plan=plan))

    def into(
        self,
        model: Model,
        include: str | Sequence[str] | None = None,
        progress: Progress | None = None,
        *,
        plan: Cuts | None = None,
        strict: bool = True,
    ) -> Scattered:
        """Fill a model's own parameters and buffers, which stay where they are: no second copy of the weights.

        Only proven bytes are written. Where it fails half-way, some tensors hold the release and others what they held.
        A tensor of another floating-point dtype, or one that is not contiguous, is cast or copied through memory of its size.

        Args:
            model: a module, or tensors by name, all on this release's device.
            include: names or globs of the release's tensors; all by default.
            progress: called while it works.
            plan: as for `stream`.
            strict: refuse before anything is read where one side has a tensor the other has not.

        Raises:
            UsageError: names, shapes, dtypes or devices do not fit; nothing was read or written.
            IntegrityError: a piece is bad or a file changed.
        """
        tensors = tensors_of(model)
        wants = self._wants(self.keys(include), None, plan)
        by_name = {want.part.name: want for _, of_file in wants for want in of_file}
        found = fitted(tensors, by_name, self._device.device, is_strict=strict)
        chosen = [(shard, [want for want in of_file if want.part.name in tensors]) for shard, of_file in wants]

        def target_of(device: Device, want: Want, number: int) -> Target:
            return existing_target(device, want, tensors[want.part.name])

        for _ in self._deliver([(shard, of_file) for shard, of_file in chosen if of_file], progress, target_of):
            pass
        return found

    def attest(self, model: Model) -> Attestation:
        """Hash what a model's tensors hold now, in the memory where they are, and compare it with what was signed.

        Nothing is read from the disk but headers. Tensors are found by the release's names; what was cast, cut or left out
        cannot be judged, and neither can its neighbours' bytes in the same piece (see `attest`).

        Raises:
            UsageError: nobody can hash on this device, or the model's `state_dict` shows copies of its tensors.
        """
        self._check_usable()
        by_file: dict[str, list[Part]] = {path: [] for path in self._shards}
        for path, part in self._parts.values():
            by_file[path].append(part)
        files = [(self._shards[path], parts) for path, parts in by_file.items()]
        return attest_tensors(files, tensors_of(model), self._device, self._ring, self._max_header_bytes)

    def document(self, path: str) -> bytes | None:
        """The bytes of a small file of the release, as its configuration; None where it has none of that name.

        Proven, whatever `verify` says, and waited for where the release is still being fetched.

        Raises:
            NotFoundError: it is signed and not here.
            IntegrityError: it is not what was signed.
            FormatError: it has more than 64 MiB.
        """
        return self._opening.document(path)

    def close(self) -> None:
        """Give files and threads back; tensors stay valid. Idempotent."""
        self._is_closed = True
        if self._arrivals is not None:
            self._arrivals.close()
        if self._pid == os.getpid():
            # Before the files: readers use their descriptors.
            self._hashers.interrupt()
            self._workers.close()
            self._hashers.close()
        self._ring.close()
        for shard in self._shards.values():
            shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<OpenRelease {self.name} of {len(self._parts)} tensors in {len(self._shards)} files on {self._device.device}>"

    def _equip(self) -> None:
        """Get what copies and proofs are made with; nothing of it costs anything before it is used."""
        self._pid = os.getpid()
        self._ring = Ring(self._device)
        self._workers = Workers(self._worker_count, on_abandon=self._interrupt)
        # This process hashes as well.
        self._hashers = Hashers(self._workers.count - 1)
        self._tools = Tools(
            self._device,
            self._ring,
            self._workers,
            self._hashers,
            self._verifier,
            self._reader_of,
            self._on_bad,
            self._count_reread,
            self._count_repair,
            self._transfers,
        )
        self._delivery = Delivery(self._tools, self.stats, self._arrivals)

    def _interrupt(self) -> None:
        """End whatever a reader may be waiting for."""
        self._hashers.interrupt()
        if self._arrivals is not None:
            self._arrivals.interrupt()

    def _deliver(
        self, files: Files, progress: Progress | None = None, target_of: TargetOf | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        self._check_usable()
        yield from self._delivery.deliver(files, progress, target_of)

    def _check_usable(self) -> None:
        """Return if the release is open; in a process forked from the one that opened it, with tools of its own.

        Threads are not forked, and staging that two processes read into would be proven by one and written to by the other.

        Raises:
            UsageError: it was closed, or is being fetched and was opened in another process.
        """
        if self._is_closed:
            raise UsageError(f"{self.name} was closed", hint="Load inside of the with block, or open it again.")
        if self._pid != os.getpid():
            if self._arrivals is not None:
                raise UsageError(f"{self.name} is being fetched and was opened before a fork", hint="Open it in this process.")
            self._equip()

    def _open(self, files: str | Sequence[str] | None) -> None:
        for path, shard in self._opening.shards(files):
            self._shards[path] = shard
            if shard.way.is_hashed:
                self.stats.verified_bytes += shard.header_read_bytes
            for info in shard.header.tensors:
                if info.name in self._parts:
                    raise FormatError(
                        f"tensor '{info.name[:120]}' is in '{self._parts[info.name][0]}' and in '{path}'",
                        hint="Choose one with files=, for example files='unet/*'.",
                        tensor=info.name[:120],
                    )
                self._parts[info.name] = (path, part_of(info, shard.header))

    def _part(self, name: str) -> tuple[str, Part]:
        try:
            return self._parts[name]
        except KeyError:
            raise NotFoundError(f"{self.name} has no tensor '{name[:200]}'", hint="See release.keys().") from None

    def _verifier_of(self, device: Device) -> Verifier | None:
        """Who proves on the device; None where the workers do, or nobody."""
        if device.is_host or self._verify not in ("auto", "gpu"):
            self.stats.verifier = "cpu" if self._verify == "cpu" else ""
            return None
        try:
            verifier = device.verifier()
        except UsageError as exc:
            if self._verify == "gpu":
                raise
            self.stats.fallbacks.append(f"hashed on the cpu: {exc.message}")
            self.stats.verifier = "cpu"
            return None
        self.stats.fallbacks += verifier.notes
        self.stats.verifier = verifier.name
        return verifier

    def _reader_of(self, shard: Shard) -> Reader:
        if shard.reader is None:
            name = self._reader
            if name == "auto":
                name = choose(evidence_of(shard.source, is_own=shard.way.is_own), mapping=self._mapping)
            shard.reader, refusal = reader_of(shard.source, name)
            if refusal and refusal not in self.stats.fallbacks:
                self.stats.fallbacks.append(refusal)
            self.stats.reader = "+".join(sorted({*filter(None, self.stats.reader.split("+")), shard.reader.name}))
        return shard.reader

    def _count_reread(self) -> None:
        self.stats.rereads += 1

    def _count_repair(self, pieces: int) -> None:
        self.stats.refetches += pieces

    def _wants(self, names: Sequence[str], dtype: torch.dtype | None, cuts: Cuts | None) -> list[tuple[Shard, list[Want]]]:
        """What is wanted of each file.

        Raises:
            NotFoundError: the plan names a tensor that is not in the release.
            UsageError: it asks for rows that a tensor has not, or `dtype` is nothing to cast to.
        """
        if isinstance(cuts, Mapping):
            for name in cuts:
                self._part(name)
        by_file: dict[str, list[Want]] = {}
        for name in names:
            path, part = self._parts[name]
            by_file.setdefault(path, []).append(Want.of(part, cut_of(cuts, name, part.shape), dtype))
        return [(self._shards[path], wants) for path, wants in by_file.items()]

    def _one(self, name: str, cut: tuple[int, int, int] | None, dtype: torch.dtype | None) -> torch.Tensor:
        path, part = self._part(name)
        ((_, tensor),) = self._deliver([(self._shards[path], [Want.of(part, cut, dtype)])])
        return tensor


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{what}='{value[:40]}' is not one of {', '.join(choices)}")
