"""`*.safetensors.index.json`: the table some checkpoints carry of which tensor lies in which file.

The loader does not need it (every header is read), but other readers follow it, so one that points outside the release is
refused: "every shard named must be a basename in the manifest". Indexes of other formats are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Container

from modelp2p.protocol.errors import FormatError

SUFFIX = ".safetensors.index.json"


def check_index(path: str, data: bytes, files: Container[str]) -> None:
    """Return if the index at `path` names only files of the release that lie in its own folder.

    Raises:
        FormatError: it does not, or is no index.
    """
    folder = path.rpartition("/")[0]
    try:
        index = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"'{path}' is not JSON", path=path) from exc
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise FormatError(f"'{path}' has no weight_map", path=path)
    for shard in dict.fromkeys(name if isinstance(name, str) else "" for name in weight_map.values()):
        if "/" in shard or (f"{folder}/{shard}" if folder else shard) not in files:
            raise FormatError(
                f"'{path}' names the shard '{shard[:200]}', which is not a file of the release beside it", path=path
            )
