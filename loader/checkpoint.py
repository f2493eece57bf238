"""A release as other programs know a checkpoint: a root folder with a few weight files and small files that say what they are.

A release may hold one model twice (`consolidated.safetensors` beside the shards) and others in folders below (`original/`,
`1_Dense/`). Chosen is what `from_pretrained` and vLLM choose: the shards that the root folder's index names, else
`model.safetensors`, else every safetensors file of the root folder.

A small file decides what the weights become, so its bytes are proven before anybody parses them, whatever `verify` says.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from modelp2p.loader.documents import read_document
from modelp2p.loader.home import home_at
from modelp2p.loader.index import check_index
from modelp2p.loader.locate import locate
from modelp2p.loader.pieces import PieceTable, repair_hint
from modelp2p.loader.source import SourceFile
from modelp2p.protocol.errors import NotFoundError

if TYPE_CHECKING:
    import torch

    from modelp2p.loader.release import OpenRelease
    from modelp2p.protocol.statement import Release

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def open_checkpoint(
    ref: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    files: str | Sequence[str] | None = None,
    publisher: str | None = None,
    home: str | os.PathLike[str] | None = None,
    **options: Any,  # noqa: ANN401 - handed on to open_release, which names and checks them
) -> OpenRelease:
    """`open_release` of the weight files of the root folder only, unless `files` says which.

    Of a release that is still being fetched everything is opened: its index may not be here yet.
    """
    # Late, so that a program may import this module before it knows whether it will load anything: torch takes seconds.
    from modelp2p.loader.api import open_release

    place = home_at(home)
    if files is None:
        try:
            located = locate(ref, publisher=publisher, home=place)
            files = weight_files(located.release, located.directory)
        except NotFoundError:
            files = None
    return open_release(ref, device, files=files, publisher=publisher, home=place, **options)


def weight_files(release: Release, directory: str) -> list[str] | None:
    """Patterns of the files that are the root folder's checkpoint; None where only folders below hold weights.

    Raises:
        IntegrityError: the index is not what was signed.
        FormatError: it is, and is none.
    """
    paths = {entry.path for entry in release.manifest.files}
    roots = [path for path in sorted(paths) if path.endswith(".safetensors") and "/" not in path]
    if INDEX in paths:
        data = proven(release, directory, INDEX)
        check_index(INDEX, data, paths)
        roots = sorted(set(cast("dict[str, str]", json.loads(data)["weight_map"]).values()))
    elif SINGLE in roots:
        roots = [SINGLE]
    # The loader takes patterns, and a bracket is a letter like any other in a file's name.
    return [glob.escape(path) for path in roots] or None


def proven(release: Release, directory: str, path: str) -> bytes:
    """The proven bytes of a small file of the release.

    Args:
        release: the believed release.
        directory: where a copy of its files lies.
        path: of the file, in both.

    Raises:
        NotFoundError: it is not here.
        IntegrityError: it is not what was signed.
        FormatError: no small file is that large.
    """
    entry = release.manifest.file(path)
    source = SourceFile(os.path.join(directory, path), entry, repair_hint(release))
    return read_document(source, PieceTable.in_release(release, entry))
