"""Which file paths a release may hold: reject, never repair (docs/DESIGN.md).

libtorrent silently rewrites hostile names (`..` becomes `_`, a bidi override vanishes), so a name on disk could differ from
the signed one. Every rule here therefore refuses the whole release instead. Collisions are judged as the most forgiving
file system would: case-folded and NFKC-normalised, for files and for every directory prefix.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.text import is_hidden

MAX_PATH_BYTES = 1024
MAX_COMPONENT_BYTES = 200
MAX_DEPTH = 16
MAX_FILES = 10_000

# https://learn.microsoft.com/windows/win32/fileio/naming-a-file: reserved with any extension.
_WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", "conin$", "conout$", "clock$"}
    | {f"{kind}{digit}" for kind in ("com", "lpt") for digit in (*"0123456789", "\u00b9", "\u00b2", "\u00b3")}
)
# A backslash is a separator there, and a colon opens an alternate data stream or a drive.
_SEPARATORS_ELSEWHERE = "\\:"


def check_path(path: str) -> str:
    """`path` itself, when it is a legal relative path of a release file.

    Raises:
        FormatError: naming the first rule it breaks.
    """
    try:
        size = len(path.encode("utf-8"))
    except UnicodeEncodeError as exc:
        raise FormatError(f"path '{path[:80]}' is not valid Unicode") from exc
    if size > MAX_PATH_BYTES:
        raise FormatError(f"path of {size} bytes exceeds the limit of {MAX_PATH_BYTES}", path=path[:80])
    components = path.split("/")
    if len(components) > MAX_DEPTH:
        raise FormatError(f"path '{path[:80]}' is deeper than {MAX_DEPTH} components", path=path[:80])
    for component in components:
        reason = _objection(component)
        if reason:
            raise FormatError(f"path '{path[:200]}' is refused: {reason}", path=path[:200])
    return path


def check_paths(paths: Iterable[str]) -> None:
    """Check each path and that no two could be one file, or a file and a folder, on any file system.

    Raises:
        FormatError: an illegal path, a collision, or more than `MAX_FILES` paths.
    """
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for count, path in enumerate(paths, start=1):
        if count > MAX_FILES:
            raise FormatError(f"more than {MAX_FILES} files")
        check_path(path)
        folded = _folded(path)
        if folded in files:
            raise FormatError(f"paths '{files[folded]}' and '{path}' collide", path=path)
        files[folded] = path
        components = path.split("/")
        for end in range(1, len(components)):
            folder = "/".join(components[:end])
            known = folders.setdefault(_folded(folder), folder)
            if known != folder:
                raise FormatError(f"folders '{known}' and '{folder}' collide", path=path)
    for folded, path in files.items():
        if folded in folders:
            raise FormatError(f"'{path}' is both a file and a folder", path=path)


def _folded(path: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())


def _objection(component: str) -> str:
    if component in ("", ".", ".."):
        return f"component '{component}' is not a name"
    if len(component.encode("utf-8")) > MAX_COMPONENT_BYTES:
        return f"a component is longer than {MAX_COMPONENT_BYTES} bytes"
    if not (component.isascii() and component.isprintable()) and any(is_hidden(character) for character in component):
        return "it holds a control, bidi or invisible character"
    for character in _SEPARATORS_ELSEWHERE:
        if character in component:
            return f"it holds the character '{character}'"
    if component[0] == "-":
        return "a component starts with '-'"
    if component[-1] in ". ":
        return "a component ends in a dot or space"
    # Compatibility forms (U+FF0E full stop, U+2215 division slash ...) may become separators elsewhere.
    normal = unicodedata.normalize("NFKC", component)
    if normal in (".", "..") or any(c in "/\\\0" for c in normal):
        return "it normalises to a separator or dot name"
    if normal.casefold().split(".")[0].rstrip(" ") in _WINDOWS_DEVICES:
        return "it is a Windows device name"
    return ""
