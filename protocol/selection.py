"""Which files of a release a user selected, by the patterns of `hf download`."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase


def wanted_paths(sizes: Mapping[str, int], include: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[str, ...]:
    """The paths that `hf download`'s --include and --exclude patterns select: fnmatch over the whole path.

    A pattern ending in `/` selects the folder. No include means everything; exclude wins.
    """

    def matches(path: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(path, pattern + "*" if pattern.endswith("/") else pattern) for pattern in patterns)

    return tuple(path for path in sizes if (not include or matches(path, include)) and not matches(path, exclude))
