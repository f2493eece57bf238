"""An open release: its tensors by name, each proven before it is handed out.

What keeps the bytes true after the check:
- a **copy** is hashed where it will stay (or in the staging it is placed from): nothing can change it afterwards;
- a **view** shows the store's own file, read-only. It is right as long as nobody writes to that inode; the store never does.
  Writing to a view kills the process (SIGSEGV): clone what you want to change, or load with `mapping="pread"`. Truncating
  the file under it kills the process as well (SIGBUS). Views stay valid after `close`, after `rm`, and alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import TYPE_CHECKING, Self

from modelp2p.loader.copying import Staging, copy_parts
from modelp2p.loader.hashing import Workers
from modelp2p.loader.index import MAX_INDEX_BYTES, SUFFIX, check_index
from modelp2p.loader.parts import Part, part_of
from modelp2p.loader.pieces import PieceTable
from modelp2p.loader.shard import Shard, Way, open_shard, standing_of, way_of
from modelp2p.loader.source import SourceFile
from modelp2p.loader.stats import LoadStats
from modelp2p.loader.views import view_parts
from modelp2p.protocol.errors import FormatError, NotFoundError, UsageError
from modelp2p.protocol.safetensors import DEFAULT_MAX_HEADER_BYTES

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.copier import Copier
    from modelp2p.loader.locate import Located
    from modelp2p.protocol.manifest import FileEntry

VERIFY = ("auto", "cpu", "record", "off")
MAPPING = ("auto", "mmap", "pread")
Progress = Callable[[int, int], None]
"""Told (bytes done, bytes to do) in the thread of the caller."""

_log = logging.getLogger("modelp2p.loader")


class OpenRelease:
    """The tensors of one release. Made by `open_release`; use it in a `with` block, and from one thread at a time.

    Args:
        located: the believed release and its folder.
        copier: the device.
        verify: `cpu` hashes every piece under what is handed out. `auto` does not where the daemon's record vouches for
            the file as it is now and the bytes stay on the host. `record` accepts nothing else than the record. `off`
            checks signature and sizes only, says so in the log and in `stats`.
        mapping: `auto` gives views of files the store made, and copies of all others (borrowed files, plain folders, files
            no record counts for). `mmap` gives views of all but borrowed files. `pread` copies everything.
        files: globs over file paths; only these shards are opened.
        workers: threads that read and hash; all cores by default.
        max_header_bytes: limit of one file's header, at most 100 MiB.

    Raises:
        NotFoundError: a file is missing, or there is no safetensors file.
        IntegrityError: a header, or the size of a file, is not what was signed.
        FormatError: a header is not valid, or two files hold one tensor name.
    """

    def __init__(
        self,
        located: Located,
        copier: Copier,
        *,
        verify: str = "auto",
        mapping: str = "auto",
        files: str | Sequence[str] | None = None,
        workers: int | None = None,
        max_header_bytes: int = DEFAULT_MAX_HEADER_BYTES,
    ) -> None:
        _check_choice("verify", verify, VERIFY)
        _check_choice("mapping", mapping, MAPPING)
        if workers is not None and workers < 1:
            raise UsageError(f"workers must be at least 1, not {workers}")
        self.release = located.release
        """The verified statement: manifest, layers, publisher."""
        self.directory = located.directory
        self.is_name_verified = located.is_name_verified
        self.stats = LoadStats(str(copier.device), verify, "mmap" if copier.is_host else copier.transfer)
        self._located = located
        self._verify = verify
        self._mapping = mapping
        self._max_header_bytes = max_header_bytes
        self._copier = copier
        self._staging = Staging(copier)
        self._workers = Workers(workers)
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
        path, part = self._part(name)
        ((_, tensor),) = self._hand_out(self._shards[path], [part], dtype, _ignore)
        return tensor

    def slice(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows `start` up to `stop` of dimension 0; only the pieces they touch are read."""
        path, part = self._part(name)
        ((_, tensor),) = self._hand_out(self._shards[path], [part.rows(start, stop)], dtype, _ignore)
        return tensor

    def stream(
        self,
        include: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, file by file, each after every piece under it was proven.

        Args:
            include: names or globs; all tensors by default.
            dtype: cast floating-point tensors to this; integers and booleans keep theirs.
            progress: called while it works.

        Raises:
            IntegrityError: a piece is bad or a file changed. What was handed out before is good.
        """
        by_file: dict[str, list[Part]] = {}
        for name in self.keys(include):
            path, part = self._parts[name]
            by_file.setdefault(path, []).append(part)
        to_do = {path: _bytes_under(self._shards[path], parts) for path, parts in by_file.items()}
        total, before = sum(to_do.values()), 0
        for path, parts in by_file.items():
            done = before

            def on_bytes(count: int) -> None:
                nonlocal done
                done += count
                if progress is not None:
                    progress(min(done, total), total)

            yield from self._hand_out(self._shards[path], parts, dtype, on_bytes)
            before += to_do[path]
            if progress is not None and done != before:
                progress(before, total)

    def load(
        self,
        include: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> dict[str, torch.Tensor]:
        """All of `stream` at once."""
        return dict(self.stream(include, dtype, progress))

    def close(self) -> None:
        """Give files and threads back; tensors stay valid. Idempotent."""
        for shard in self._shards.values():
            shard.mapped = None
            shard.source.close()
        self._workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<OpenRelease {self.name} of {len(self._parts)} tensors in {len(self._shards)} files on {self._copier.device}>"

    def _open(self, entries: Sequence[FileEntry]) -> None:
        missing = [entry.path for entry in entries if not os.path.exists(self._place(entry))]
        if missing:
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
        source = SourceFile(self._place(entry), entry, self._hint)
        try:
            shard = open_shard(source, self._table(entry), self._way, self._max_header_bytes)
        except BaseException:
            source.close()
            raise
        if shard.way.is_hashed:
            self.stats.verified_bytes += shard.header_read_bytes
        return shard

    def _way(self, source: SourceFile) -> Way:
        record = self._located.record
        standing = standing_of(None if record is None else record.files.get(source.entry.path), source)
        return way_of(standing, verify=self._verify, mapping=self._mapping, is_host=self._copier.is_host, path=source.entry.path)

    def _check_indexes(self) -> None:
        """Always hashed where it is looked at: an index is small, and is parsed."""
        for entry in self.release.manifest.files:
            if not entry.path.endswith(SUFFIX) or not os.path.exists(self._place(entry)):
                continue
            if entry.size > MAX_INDEX_BYTES:
                raise FormatError(f"'{entry.path}' of {entry.size} bytes is larger than any index", path=entry.path)
            source = SourceFile(self._place(entry), entry, self._hint)
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

    def _hand_out(
        self, shard: Shard, parts: Sequence[Part], dtype: torch.dtype | None, on_bytes: Callable[[int], None]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        def count(size: int) -> None:
            self.stats.verified_bytes += size
            on_bytes(size)

        ready: Iterator[tuple[Part, torch.Tensor, bool]]
        started = time.perf_counter()
        if shard.way.is_view:
            ready = iter(view_parts(shard, parts, self._workers, count))
        else:
            copies = copy_parts(shard, parts, self._staging, self._workers, count)
            ready = ((part, tensor, False) for part, tensor in copies)
        for part, tensor, is_view in ready:
            self._tally(shard, part, is_view)
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            self.stats.seconds += time.perf_counter() - started
            yield part.name, tensor
            started = time.perf_counter()
        self.stats.seconds += time.perf_counter() - started

    def _tally(self, shard: Shard, part: Part, is_view: bool) -> None:
        self.stats.tensors += 1
        self.stats.bytes += part.size
        if not is_view:
            self.stats.copied_bytes += part.size
        if not shard.way.is_view:
            self.stats.transfer = self._copier.transfer
        if self._verify == "off":
            self.stats.unverified_bytes += part.size
        elif not shard.way.is_hashed:
            self.stats.recorded_bytes += part.size


def _bytes_under(shard: Shard, parts: Sequence[Part]) -> int:
    return shard.table.bytes_in(shard.table.covering((part.begin, part.end) for part in parts))


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


def _ignore(_: int) -> None:
    return
