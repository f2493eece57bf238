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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import TYPE_CHECKING, Self

from modelp2p.loader.arriving import ArrivingFile
from modelp2p.loader.attest import Attestation, attest_tensors
from modelp2p.loader.hashing import Workers
from modelp2p.loader.index import MAX_INDEX_BYTES, SUFFIX, check_index
from modelp2p.loader.model import Model, Scattered, fitted, tensors_of
from modelp2p.loader.parts import Part, part_of
from modelp2p.loader.pieces import PieceTable
from modelp2p.loader.pipeline import OnBad, Tools, flow
from modelp2p.loader.plan import Cuts, Want, cut_of, pieces_under
from modelp2p.loader.plan import plan as plan_of
from modelp2p.loader.readers import READERS, Reader, choose, evidence_of, reader_of
from modelp2p.loader.ring import Ring
from modelp2p.loader.shard import Shard, Standing, Way, open_shard, standing_of, way_of
from modelp2p.loader.source import SourceFile
from modelp2p.loader.stats import LoadStats
from modelp2p.loader.targets import Target, existing_target
from modelp2p.loader.views import view_parts
from modelp2p.protocol.errors import FormatError, NotFoundError, UsageError
from modelp2p.protocol.safetensors import DEFAULT_MAX_HEADER_BYTES

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.arriving import Arrivals
    from modelp2p.loader.device import Device
    from modelp2p.loader.gpu import Verifier
    from modelp2p.loader.locate import Located
    from modelp2p.protocol.manifest import FileEntry

VERIFY = ("auto", "gpu", "cpu", "record", "off")
MAPPING = ("auto", "mmap", "pread")
ARRIVING_SPAN_BYTES = 4 << 20
"""Spans of a release that is still being fetched: a tensor is handed out with its span, and large ones are long in coming."""
Progress = Callable[[int, int], None]
"""Told (bytes done, bytes to do) in the thread of the caller."""

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
        max_header_bytes: limit of one file's header, at most 100 MiB.
        reader: how copies are read: `preadv`, `mmap`, `direct`, or `auto` by evidence (see `readers`).
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
        on_bad: OnBad | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        _check_choice("verify", verify, VERIFY)
        _check_choice("mapping", mapping, MAPPING)
        _check_choice("reader", reader, READERS)
        if verify == "gpu" and device.is_host:
            raise UsageError("verify='gpu' is for GPUs", hint="On the cpu, verify='cpu' hashes every byte.")
        if workers is not None and workers < 1:
            raise UsageError(f"workers must be at least 1, not {workers}")
        self.release = located.release
        """The verified statement: manifest, layers, publisher."""
        self.directory = located.directory
        self.is_name_verified = located.is_name_verified
        self.stats = LoadStats(str(device.device), verify, "mmap" if device.is_host else device.transfer)
        self._located = located
        self._verify = verify
        self._mapping = mapping
        self._max_header_bytes = max_header_bytes
        self._reader = reader
        self._device = device
        self._verifier = self._verifier_of(device)
        self._ring = Ring(device)
        self._arrivals = arrivals
        self._workers = Workers(workers, on_abandon=None if arrivals is None else arrivals.interrupt)
        self._tools = Tools(
            device, self._ring, self._workers, self._verifier, self._reader_of, on_bad, self._count_reread, self._count_repair
        )
        self._hint = f"Repair it: modelp2p verify {self.release.ref} --repair"
        self._shards: dict[str, Shard] = {}
        self._parts: dict[str, tuple[str, Part]] = {}
        if verify == "off":
            _log.warning("%s is loaded with verify='off': its bytes are not compared with what was signed", self.release.ref)
        started = time.perf_counter()
        try:
            self._open(_chosen(self.release.manifest.files, files))
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
        for pattern in patterns:
            if pattern not in self._parts and not any(fnmatchcase(name, pattern) for name in self._parts):
                raise NotFoundError(f"no tensor of {self.name} is called '{pattern[:200]}'", hint="See release.keys().")
        exact = set(patterns)
        return tuple(n for n in self._parts if n in exact or any(fnmatchcase(n, pattern) for pattern in patterns))

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
        """Name and tensor, file by file, each after every piece under it was proven.

        Args:
            include: names or globs; all tensors by default.
            dtype: cast floating-point tensors to this; integers and booleans keep theirs.
            progress: called while it works.
            plan: which tensors are cut, and how: `{name: (dim, start, stop)}`, or a function of name and shape that gives
                such a cut or None. Only the pieces under the cuts are read.

        Raises:
            IntegrityError: a piece is bad or a file changed. What was handed out before is good.
            NotFoundError, UsageError: a plan names a tensor or rows that do not exist.
        """
        yield from self._wanted(self._wants(self.keys(include), dtype, plan), progress)

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
        by_name = {want.part.name: want for of_file in wants.values() for want in of_file}
        found = fitted(tensors, by_name, self._device.device, is_strict=strict)
        chosen = {path: [want for want in of_file if want.part.name in tensors] for path, of_file in wants.items()}

        def target_of(device: Device, want: Want, number: int) -> Target:
            return existing_target(device, want, tensors[want.part.name])

        for _ in self._wanted({path: of_file for path, of_file in chosen.items() if of_file}, progress, target_of):
            pass
        return found

    def attest(self, model: Model) -> Attestation:
        """Hash what a model's tensors hold now, in the memory where they are, and compare it with what was signed.

        Nothing is read from the disk but headers. Tensors are found by the release's names; what was cast, cut or left out
        cannot be judged, and neither can its neighbours' bytes in the same piece (see `attest`).

        Raises:
            UsageError: nobody can hash on this device.
        """
        by_file: dict[str, list[Part]] = {path: [] for path in self._shards}
        for path, part in self._parts.values():
            by_file[path].append(part)
        files = [(self._shards[path], parts) for path, parts in by_file.items()]
        return attest_tensors(files, tensors_of(model), self._device, self._ring, self._max_header_bytes)

    def close(self) -> None:
        """Give files and threads back; tensors stay valid. Idempotent."""
        if self._arrivals is not None:
            self._arrivals.close()
        for shard in self._shards.values():
            shard.close()
        self._workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<OpenRelease {self.name} of {len(self._parts)} tensors in {len(self._shards)} files on {self._device.device}>"

    def _open(self, entries: Sequence[FileEntry]) -> None:
        if self._arrivals is not None:
            indexes = [entry for entry in self.release.manifest.files if entry.path.endswith(SUFFIX)]
            # The first piece of each: nearly all headers end in it, and what is longer is asked for when it is known.
            self._arrivals.want([(e.path, 0, e.size) for e in indexes] + [(e.path, 0, min(e.size, 1)) for e in entries])
        elif missing := [entry.path for entry in entries if not os.path.exists(self._place(entry))]:
            raise NotFoundError(
                f"{self.name} is not complete here: {len(missing)} of {len(entries)} files are missing, first '{missing[0]}'",
                hint=f"Fetch the rest: modelp2p fetch {self.name}",
                path=missing[0],
            )
        self._check_indexes()
        for entry in entries:
            shard = self._shard(entry)
            self._shards[entry.path] = shard
            for info in shard.header.tensors:
                if info.name in self._parts:
                    raise FormatError(
                        f"tensor '{info.name[:120]}' is in '{self._parts[info.name][0]}' and in '{entry.path}'",
                        hint="Choose one with files=, for example files='unet/*'.",
                        tensor=info.name[:120],
                    )
                self._parts[info.name] = (entry.path, part_of(info, shard.header))

    def _shard(self, entry: FileEntry) -> Shard:
        source = self._source(entry)
        try:
            shard = open_shard(source, self._table(entry), self._way, self._max_header_bytes)
        except BaseException:
            source.close()
            raise
        if shard.way.is_hashed:
            self.stats.verified_bytes += shard.header_read_bytes
        return shard

    def _source(self, entry: FileEntry) -> SourceFile:
        if self._arrivals is not None:
            return ArrivingFile(self._arrivals, self._place(entry), entry, self._hint)
        return SourceFile(self._place(entry), entry, self._hint)

    def _is_here(self, entry: FileEntry) -> bool:
        """Whether the file can be read, now or when it has arrived."""
        return os.path.exists(self._place(entry)) if self._arrivals is None else self._arrivals.includes(entry.path)

    def _way(self, source: SourceFile) -> Way:
        record = self._located.record
        if self._arrivals is not None:
            # Somebody still writes to it: copied and hashed, as what belongs to the user.
            standing = Standing(is_borrowed=True)
        else:
            standing = standing_of(None if record is None else record.files.get(source.entry.path), source)
        return way_of(standing, verify=self._verify, mapping=self._mapping, is_host=self._device.is_host, path=source.entry.path)

    def _check_indexes(self) -> None:
        """Always hashed where it is looked at: an index is small, and is parsed."""
        for entry in self.release.manifest.files:
            if not entry.path.endswith(SUFFIX) or not self._is_here(entry):
                continue
            if entry.size > MAX_INDEX_BYTES:
                raise FormatError(f"'{entry.path}' of {entry.size} bytes is larger than any index", path=entry.path)
            source = self._source(entry)
            try:
                data = memoryview(bytearray(entry.size))
                source.read_into(data, 0)
            finally:
                source.close()
            table = self._table(entry)
            for piece in range(table.count if self._verify != "off" else 0):
                begin, end = table.span(range(piece, piece + 1))
                table.check(piece, data[begin:end])
            check_index(entry.path, bytes(data), {other.path for other in self.release.manifest.files})

    def _table(self, entry: FileEntry) -> PieceTable:
        return PieceTable.of(entry, self.release.manifest.piece_length, self.release.layers.of(entry), self._hint)

    def _place(self, entry: FileEntry) -> str:
        return os.path.join(self.directory, entry.path)

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

    def _wants(self, names: Sequence[str], dtype: torch.dtype | None, cuts: Cuts | None) -> dict[str, list[Want]]:
        """What is wanted of each file, by path.

        Raises:
            NotFoundError: the plan names a tensor that is not in the release.
            UsageError: it asks for rows that a tensor has not.
        """
        if isinstance(cuts, Mapping):
            for name in cuts:
                self._part(name)
        by_file: dict[str, list[Want]] = {}
        for name in names:
            path, part = self._parts[name]
            by_file.setdefault(path, []).append(Want.of(part, cut_of(cuts, name, part.shape), dtype))
        return by_file

    def _one(self, name: str, cut: tuple[int, int, int] | None, dtype: torch.dtype | None) -> torch.Tensor:
        path, part = self._part(name)
        ((_, tensor),) = self._wanted({path: [Want.of(part, cut, dtype)]}, None)
        return tensor

    def _wanted(
        self,
        by_file: Mapping[str, Sequence[Want]],
        progress: Progress | None,
        target_of: Callable[[Device, Want, int], Target] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything wanted, by name; consecutive files that are copied share one flow."""
        if self._arrivals is not None:
            self._arrivals.want(_order_of((self._shards[path].table, wants) for path, wants in by_file.items()))
        batches = list(self._batches(by_file, is_copied=target_of is not None))
        meter = _Meter(progress, sum(size for _, _, size in batches))
        started = time.perf_counter()
        for is_view, files, size in batches:
            before = meter.done
            for want, shard, tensor, shown in self._made(is_view, files, meter, target_of):
                self._tally(shard, want, shown)
                self.stats.seconds += time.perf_counter() - started
                yield want.part.name, tensor
                started = time.perf_counter()
            meter.reach(before + size)
        self.stats.seconds += time.perf_counter() - started

    def _batches(
        self, by_file: Mapping[str, Sequence[Want]], *, is_copied: bool
    ) -> Iterator[tuple[bool, list[tuple[Shard, list[Want]]], int]]:
        """`(is_view, [(shard, wants)], bytes to read)`: one for each file that is viewed, one for all between that are not."""
        copied: list[tuple[Shard, list[Want]]] = []
        for path, wants in by_file.items():
            shard = self._shards[path]
            may_view = shard.way.is_view and not is_copied
            viewed = [want for want in wants if may_view and _is_stretch(want)]
            if viewed:
                if copied:
                    yield False, copied, _bytes_under(copied)
                    copied = []
                yield True, [(shard, viewed)], _bytes_under([(shard, viewed)])
            # A cut of another dimension is no stretch of the file: a view of it would reach over bytes nobody proved.
            if others := [want for want in wants if not (may_view and _is_stretch(want))]:
                copied.append((shard, others))
        if copied:
            yield False, copied, _bytes_under(copied)

    def _made(
        self,
        is_view: bool,
        files: Sequence[tuple[Shard, Sequence[Want]]],
        meter: _Meter,
        target_of: Callable[[Device, Want, int], Target] | None,
    ) -> Iterator[tuple[Want, Shard, torch.Tensor, bool]]:
        """`(want, shard, tensor, whether it is a view)` for one batch."""

        def on_bytes(shard: Shard, size: int) -> None:
            if shard.way.is_hashed:
                self.stats.verified_bytes += size
                self.stats.verifier = self.stats.verifier or "cpu"
            meter.add(size)

        if is_view:
            ((shard, wants),) = files
            by_part = {_part_under(want): want for want in wants}
            for part, tensor, shown in view_parts(shard, list(by_part), self._workers, lambda size: on_bytes(shard, size)):
                want = by_part[part]
                yield want, shard, tensor if want.dtype is None else tensor.to(want.dtype), shown
            return
        shards = [shard for shard, _ in files]
        owners = [shard for shard, wants in files for _ in wants]
        slot_bytes = self._device.slot_bytes if self._arrivals is None else min(self._device.slot_bytes, ARRIVING_SPAN_BYTES)
        made = plan_of([shard.table for shard in shards], [wants for _, wants in files], slot_bytes)
        for number, tensor in flow(shards, made, self._tools, lambda file, size: on_bytes(shards[file], size), target_of):
            yield made.wants[number], owners[number], tensor, False

    def _tally(self, shard: Shard, want: Want, is_view: bool) -> None:
        self.stats.tensors += 1
        self.stats.bytes += want.size
        if not is_view:
            self.stats.copied_bytes += want.size
        if not shard.way.is_view:
            self.stats.transfer = self._device.transfer
        if self._verify == "off":
            self.stats.unverified_bytes += want.size
        elif not shard.way.is_hashed:
            self.stats.recorded_bytes += want.size


class _Meter:
    """Bytes done of bytes to do, told as they change."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self.done = 0

    def add(self, count: int) -> None:
        self.reach(min(self.done + count, self._total))

    def reach(self, done: int) -> None:
        if done != self.done:
            self.done = done
            if self._progress is not None:
                self._progress(done, self._total)


def _is_stretch(want: Want) -> bool:
    return not want.size or want.rows.count == 1


def _part_under(want: Want) -> Part:
    """A want that is one stretch of its file, as a part of its own."""
    if not want.size:
        return Part(want.part.name, want.part.dtype, want.shape, want.part.begin, want.part.begin)
    return Part(want.part.name, want.part.dtype, want.shape, want.rows.begin, want.rows.end)


def _order_of(files: Iterable[tuple[PieceTable, Sequence[Want]]]) -> Iterator[tuple[str, int, int]]:
    """Path, begin and end of what is going to be read, in that order."""
    for table, wants in files:
        for begin, end in pieces_under(table, wants):
            yield table.path, *table.span(range(begin, end))


def _bytes_under(files: Sequence[tuple[Shard, Sequence[Want]]]) -> int:
    return sum(shard.table.bytes_in(pieces_under(shard.table, wants)) for shard, wants in files)


def _chosen(entries: Sequence[FileEntry], files: str | Sequence[str] | None) -> list[FileEntry]:
    shards = [entry for entry in entries if entry.path.endswith(".safetensors")]
    if files is not None:
        patterns = [files] if isinstance(files, str) else list(files)
        shards = [entry for entry in shards if any(fnmatchcase(entry.path, pattern) for pattern in patterns)]
    if not shards:
        what = "no safetensors file" if files is None else "no safetensors file that files= asks for"
        raise NotFoundError(f"the release has {what}", hint="The loader reads *.safetensors only.")
    return shards


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{what}='{value[:40]}' is not one of {', '.join(choices)}")
