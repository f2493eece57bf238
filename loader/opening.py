"""Opening the safetensors files of a release, on the disk or on their way here: indexes checked, headers proven, ways decided."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from modelp2p.loader.arriving import ArrivingFile
from modelp2p.loader.documents import read_document
from modelp2p.loader.index import SUFFIX, check_index
from modelp2p.loader.pieces import PieceTable, repair_hint
from modelp2p.loader.shard import Shard, Standing, Way, open_shard, standing_of, way_of
from modelp2p.loader.source import SourceFile
from modelp2p.protocol.errors import NotFoundError

if TYPE_CHECKING:
    from modelp2p.loader.arriving import Arrivals
    from modelp2p.loader.locate import Located
    from modelp2p.protocol.manifest import FileEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """How the files of one release are opened (for what is not said here, see `OpenRelease`)."""

    located: Located
    arrivals: Arrivals | None
    verify: str
    mapping: str
    max_header_bytes: int
    is_host: bool
    """Whether tensors are made in this process's memory."""

    def shards(self, files: str | Sequence[str] | None) -> Iterator[tuple[str, Shard]]:
        """Path and shard of each safetensors file, one after the other; whoever takes a shard closes it.

        Args:
            files: globs over paths; all by default.

        Raises:
            NotFoundError: there is none, or not all are here.
            IntegrityError: an index or header is not what was signed.
            FormatError: it is, and is not valid.
        """
        entries = _chosen(self.located.release.manifest.files, files)
        if self.arrivals is not None:
            indexes = [entry for entry in self.located.release.manifest.files if entry.path.endswith(SUFFIX)]
            # The first piece of each: nearly all headers end in it, and what is longer is asked for when it is known.
            self.arrivals.want([(e.path, 0, e.size) for e in indexes] + [(e.path, 0, min(e.size, 1)) for e in entries])
        elif missing := [entry.path for entry in entries if not os.path.exists(self._place(entry))]:
            ref = self.located.release.ref
            raise NotFoundError(
                f"{ref} is not complete here: {len(missing)} of {len(entries)} files are missing, first '{missing[0]}'",
                hint=f"Fetch the rest: modelp2p fetch {ref}",
                path=missing[0],
            )
        self._check_indexes()
        for entry in entries:
            yield entry.path, self._shard(entry)

    def document(self, path: str) -> bytes | None:
        """The proven bytes of a small file, whatever `verify` says; None where the release has none of that name.

        Raises:
            NotFoundError: it is signed and not here.
            IntegrityError: it is not what was signed.
            FormatError: no small file is that large.
        """
        entry = next((entry for entry in self.located.release.manifest.files if entry.path == path), None)
        return None if entry is None else read_document(self._source(entry), self._table(entry))

    def _shard(self, entry: FileEntry) -> Shard:
        source = self._source(entry)
        try:
            return open_shard(source, self._table(entry), self._way, self.max_header_bytes)
        except BaseException:
            source.close()
            raise

    def _way(self, source: SourceFile) -> Way:
        record = self.located.record
        if self.arrivals is not None:
            # Somebody still writes to it: copied and hashed, as what belongs to the user.
            standing = Standing(is_borrowed=True)
        else:
            standing = standing_of(None if record is None else record.files.get(source.entry.path), source)
        return way_of(standing, verify=self.verify, mapping=self.mapping, is_host=self.is_host, path=source.entry.path)

    def _check_indexes(self) -> None:
        """Always hashed where it is looked at: an index is small, and is parsed."""
        files = self.located.release.manifest.files
        for entry in files:
            if entry.path.endswith(SUFFIX) and self._is_here(entry):
                data = read_document(self._source(entry), self._table(entry), is_hashed=self.verify != "off")
                check_index(entry.path, data, {other.path for other in files})

    def _is_here(self, entry: FileEntry) -> bool:
        """Whether the file can be read, now or when it has arrived."""
        return os.path.exists(self._place(entry)) if self.arrivals is None else self.arrivals.includes(entry.path)

    def _source(self, entry: FileEntry) -> SourceFile:
        hint = repair_hint(self.located.release)
        if self.arrivals is not None:
            return ArrivingFile(self.arrivals, self._place(entry), entry, hint)
        return SourceFile(self._place(entry), entry, hint)

    def _table(self, entry: FileEntry) -> PieceTable:
        return PieceTable.in_release(self.located.release, entry)

    def _place(self, entry: FileEntry) -> str:
        return os.path.join(self.located.directory, entry.path)


def _chosen(entries: Sequence[FileEntry], files: str | Sequence[str] | None) -> list[FileEntry]:
    shards = [entry for entry in entries if entry.path.endswith(".safetensors")]
    if files is not None:
        patterns = [files] if isinstance(files, str) else list(files)
        shards = [entry for entry in shards if any(fnmatchcase(entry.path, pattern) for pattern in patterns)]
    if not shards:
        what = "no safetensors file" if files is None else "no safetensors file that files= asks for"
        raise NotFoundError(f"the release has {what}", hint="The loader reads *.safetensors only.")
    return shards
