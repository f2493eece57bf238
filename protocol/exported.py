"""An exported release as values: what its folder holds, by which names, for machines that no network reaches.

    <org>--<model>/<revision>/<path>     the files; a BitTorrent client that saves below <org>--<model> finds them
    <org>--<model>/<revision>.modelp2p   the bundle: all that is believed
    <org>--<model>/<revision>.torrent    for clients that know no bundles
    <org>--<model>/<revision>.sha256     the exported files as `sha256sum` writes them: which were meant to be there

Only the bundle is signed. The torrent follows from it and is never read back; the sums select files and prove nothing.
Pure: what touches the disk is in `cli/`.

Specs: https://www.bittorrent.org/beps/bep_0012.html (`announce-list`), https://www.bittorrent.org/beps/bep_0019.html (`url-list`)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.paths import MAX_FILES, check_path
from modelp2p.protocol.torrent import Bencodable, bencode

if TYPE_CHECKING:
    from modelp2p.protocol.names import ModelName, Revision
    from modelp2p.protocol.statement import Release

BUNDLE_SUFFIX, TORRENT_SUFFIX, SUMS_SUFFIX = ".modelp2p", ".torrent", ".sha256"
MAX_SUMS_BYTES = 16 << 20
"""10,000 paths of 1,024 bytes, with a digest each."""
# Text mode or binary mode, as `sha256sum` calls them; a path that it would have to escape is no path of a release.
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)", re.ASCII)


def folder_of(name: ModelName) -> str:
    """The folder of all exported revisions of a model; no two names share one, since none holds `--`."""
    return str(name).replace("/", "--")


def bundle_of(revision: Revision) -> str:
    """The bundle beside the folder of a revision, where the loader looks for it, too."""
    return revision + BUNDLE_SUFFIX


def torrent_of(revision: Revision) -> str:
    """The torrent beside it."""
    return revision + TORRENT_SUFFIX


def sums_of(revision: Revision) -> str:
    """The sums beside it."""
    return revision + SUMS_SUFFIX


def torrent_file(release: Release) -> bytes:
    """The payload torrent as a file, with the trackers and web seeds of the signed manifest and no others."""
    manifest = release.manifest
    front: dict[str, Bencodable] = {}
    if manifest.trackers:
        # One tier: the publisher prefers none of them.
        front = {"announce": manifest.trackers[0], "announce-list": [list(manifest.trackers)]}
    back: dict[str, Bencodable] = {"url-list": list(manifest.web_seeds)} if manifest.web_seeds else {}
    # The keys of `torrent_bytes`, `info` and `piece layers`, sort between these.
    return b"d" + bencode(front)[1:-1] + release.torrent_bytes()[1:-1] + bencode(back)[1:-1] + b"e"


def has_own_folder(release: Release) -> bool:
    """Whether BitTorrent clients keep the files in a folder named like the revision: not where there is one file at the top."""
    return len(release.manifest.files) > 1 or "/" in release.manifest.files[0].path


def encode_sums(digests: Mapping[str, bytes]) -> bytes:
    """A file of sums, from path to SHA-256."""
    return "".join(f"{digests[path].hex()}  {path}\n" for path in sorted(digests)).encode()


def decode_sums(data: bytes) -> dict[str, bytes]:
    """Path to SHA-256 of a file of sums.

    Raises:
        FormatError: it is none, or larger than any release needs.
    """
    if len(data) > MAX_SUMS_BYTES:
        raise FormatError(f"a file of sums has {len(data)} bytes, more than the limit of {MAX_SUMS_BYTES}")
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as exc:
        raise FormatError("a file of sums is not text") from exc
    if lines.pop():
        raise FormatError("a file of sums ends in the middle of a line")
    if len(lines) > MAX_FILES:
        raise FormatError(f"a file of sums has {len(lines)} lines, more than the limit of {MAX_FILES}")
    found: dict[str, bytes] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise FormatError(f"'{line[:80]}' is not a line of sha256sum")
        path = check_path(match[2])
        if path in found:
            raise FormatError(f"a file of sums names '{path[:200]}' twice", path=path)
        found[path] = bytes.fromhex(match[1])
    return found
