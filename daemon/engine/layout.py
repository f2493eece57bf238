"""A torrent's parameters for libtorrent, made from a spec: the layout is compared first, then everything is set by us.

Invariants:
- libtorrent's own idea of every path and size equals the spec's, or the torrent is refused: it renames silently what it
  holds for unsafe, and what it would rename is not what the publisher signed;
- each file lies at its `disk_path`, whatever name libtorrent would give it;
- `have` is stated for every piece, so that no torrent is ever rechecked, and `seed_mode` is never used: it would grow the
  hash trees to 2 GiB per TiB.
"""

from __future__ import annotations

from typing import NamedTuple

import libtorrent as lt

from modelp2p.protocol.engine_wire import MagnetSpec, Peer, TorrentFile, TorrentSpec, unpack_bits
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.text import printable

_MAX_PIECES = 2_000_000
_MAX_TOKENS = 4_000_000
WANTED, UNWANTED = 4, 0


class LaidFile(NamedTuple):
    """A file as libtorrent lists it: its number there, and its path inside the release."""

    number: int
    path: str
    size: int


def torrent_params(spec: TorrentSpec, *, pex: bool) -> lt.add_torrent_params:
    """Parameters that add exactly `spec`.

    Raises:
        FormatError: the torrent does not parse, or is not the one the spec describes.
    """
    try:
        params: lt.add_torrent_params = lt.load_torrent_buffer(
            spec.torrent,
            {"max_pieces": _MAX_PIECES, "max_decode_tokens": _MAX_TOKENS},  # type: ignore[call-overload]  # stub asks for all four
        )
    except RuntimeError as exc:
        raise FormatError(f"libtorrent cannot read the torrent: {exc}") from exc
    info = params.ti
    if info is None or not info.info_hashes().has_v2() or info.info_hashes().v2.to_bytes() != spec.info_hash:
        raise FormatError("the torrent has another info-hash than its spec")
    layout = info.layout()
    if layout.piece_length() != spec.piece_length:
        raise FormatError(f"the torrent has pieces of {layout.piece_length()} bytes, not {spec.piece_length}")
    by_path = {file.path: file for file in spec.files}
    laid = laid_files(layout)
    _compare(laid, by_path)
    priorities = [UNWANTED] * layout.num_files()
    for index, path, _ in laid:
        priorities[index] = WANTED if by_path[path].wanted else UNWANTED
    params.renamed_files = {index: by_path[path].disk_path for index, path, _ in laid}
    params.file_priorities = priorities
    params.have_pieces = unpack_bits(spec.have, layout.num_pieces())
    params.upload_limit, params.download_limit = spec.max_up, spec.max_down
    _fill(params, spec, pex)
    if spec.sequential:
        params.flags |= lt.torrent_flags.sequential_download
    # Resumed once libtorrent has looked at its files (`session`): a torrent that is resumed calls its peers at once, one that is
    # added running leaves them to the next tick of a second hand, and half a second passes.
    params.flags |= lt.torrent_flags.paused
    return params


def magnet_params(spec: MagnetSpec, *, pex: bool) -> lt.add_torrent_params:
    """Parameters that ask for the metadata of `spec` and for no file."""
    params = lt.add_torrent_params()
    params.info_hashes = lt.info_hash_t(lt.sha256_hash(spec.info_hash))
    _fill(params, spec, pex)
    params.flags |= lt.torrent_flags.default_dont_download
    return params


def laid_files(layout: lt.file_storage) -> list[LaidFile]:
    """Every file but pads, without the torrent's name in front where libtorrent puts it there.

    A torrent of one top-level file is "single-file" to libtorrent: no folder, and the file's name is the torrent's name.
    """
    found = []
    prefix = layout.name() + "/"
    for index in range(layout.num_files()):
        if layout.file_flags(index) & lt.file_storage.flag_pad_file:
            continue
        if layout.file_flags(index) & lt.file_storage.flag_symlink:
            raise FormatError(f"the torrent holds a symlink: {printable(layout.file_path(index))}")
        path = layout.file_path(index).removeprefix(prefix)
        found.append(LaidFile(index, path, layout.file_size(index)))
    return found


def _compare(laid: list[LaidFile], by_path: dict[str, TorrentFile]) -> None:
    for _, path, size in laid:
        if path not in by_path:
            raise FormatError(f"libtorrent would write a file the release does not list: {path}", path=path)
        if by_path[path].size != size:
            raise FormatError(f"libtorrent reads {size} bytes for {path}, not {by_path[path].size}", path=path)
    missing = by_path.keys() - {path for _, path, _ in laid}
    if missing:
        raise FormatError(f"libtorrent would rename {min(missing)}", path=min(missing))
    if len(laid) != len(by_path):
        raise FormatError("the torrent lists a path twice")


def _fill(params: lt.add_torrent_params, spec: TorrentSpec | MagnetSpec, pex: bool) -> None:
    params.save_path = spec.save_path
    params.peers = endpoints(spec.peers)
    params.trackers = list(spec.trackers)
    params.tracker_tiers = [0] * len(spec.trackers)
    params.dht_nodes = []
    params.url_seeds = []
    # Written out, not taken from the defaults: `auto_managed` would queue and pause.
    flags = lt.torrent_flags
    params.flags = flags.update_subscribe | flags.apply_ip_filter | flags.duplicate_is_error
    if not pex:
        params.flags |= flags.disable_pex


def endpoints(peers: tuple[Peer, ...]) -> list[tuple[str, int]]:
    """Peers as libtorrent takes them."""
    return [(peer.host, peer.port) for peer in peers]
