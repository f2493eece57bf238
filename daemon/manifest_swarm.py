"""Fetching a statement from its manifest swarm, when only a link is known.

The proof is by derivation: the three files must rebuild to exactly the info-hash the link pins, so nothing a peer sends is
believed, and libtorrent's word that they are complete is not needed. Names and sizes are checked before a byte is asked for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.beneath import make_dirs_beneath, open_beneath
from modelp2p.daemon.diskerror import engine_disk_error
from modelp2p.protocol import engine_wire as wire
from modelp2p.protocol import layout
from modelp2p.protocol.errors import FormatError, ModelP2PError, TimedOutError
from modelp2p.protocol.statement import FILE_LIMITS, FILE_NAMES, Statement
from modelp2p.protocol.torrent import MANIFEST_PIECE_BYTES, PieceMap, torrent_bytes

if TYPE_CHECKING:
    from modelp2p.daemon.store import Store
    from modelp2p.daemon.swarm import Swarm
    from modelp2p.protocol.links import Link, PeerAddress

_LOOK_S = 0.1
"""How often the few KiB are looked at once the engine says they are there; its cache reaches the file within 0.5 s."""
_FLUSH_AFTER_LOOKS = 20


async def fetch_statement(
    link: Link,
    peers: tuple[PeerAddress, ...],
    trackers: tuple[str, ...],
    store: Store,
    swarm: Swarm,
    events: trio.MemoryReceiveChannel[wire.Event],
    timeout_s: float,
) -> Statement:
    """The statement `link` pins.

    `events` carries the swarm's events about `link.manifest_hash` and the engine's own; `timeout_s` counts without any progress.

    Raises:
        TimedOutError: no peer had it in time.
        FormatError: the swarm's files are not those of a statement.
    Cancellation: the torrent leaves the swarm and the folder is removed.
    """
    folder = layout.data_of(link.manifest_hash)
    make_dirs_beneath(store.fd, folder, mode=0o700)
    spec = wire.MagnetSpec(link.manifest_hash, str(store.path(folder)), tuple(wire.Peer(p.host, p.port) for p in peers), trackers)
    await swarm.add_magnet(spec)
    received, deadline = 0, trio.current_time() + timeout_s
    try:
        while True:
            with trio.move_on_at(deadline) as patience:
                event = await events.receive()
            if patience.cancelled_caught:
                raise TimedOutError(
                    f"no peer answered with the manifest of {link.name} within {timeout_s:g} s",
                    hint="Check that a seed node is reachable; name one with --peer HOST:PORT.",
                )
            match event:
                case wire.MetadataReceived(info=info, files=files):
                    _check_files({file.path: file.size for file in files})
                    deadline = trio.current_time() + timeout_s
                    # Added anew, complete: a magnet that wants nothing yet is a seed to its seeds, who hang up on it, and
                    # libtorrent waits `min_reconnect_time` (10 s in `wan`) before it calls them again.
                    await swarm.remove(link.manifest_hash)
                    await swarm.add(_spec(link, info, files, spec))
                case wire.TorrentStatus(payload_down=down) if down > received:
                    # Only bytes are progress: a peer that connects and hangs up for ever says something every second, too.
                    received, deadline = down, trio.current_time() + timeout_s
                case wire.TransferFinished():
                    return await _read_back(link, folder, store, swarm, timeout_s)
                case wire.AddFailed(message=message):
                    raise FormatError(f"the manifest swarm cannot be joined: {message}")
                case wire.FileFailed(path=path, message=message, no_space=no_space):
                    raise engine_disk_error(path, message, no_space=no_space)
                case wire.EngineRestarted():
                    await swarm.add_magnet(spec)
                case _:
                    pass
    finally:
        with trio.CancelScope(shield=True):
            await swarm.remove(link.manifest_hash)
            store.remove(folder)


def _check_files(files: dict[str, int]) -> None:
    if tuple(sorted(files)) != FILE_NAMES:
        raise FormatError("the swarm that the link calls a manifest holds other files")
    for name, size in files.items():
        if size > FILE_LIMITS[name]:
            raise FormatError(f"'{name}' in the manifest swarm has {size} bytes, over the limit of {FILE_LIMITS[name]}")


def _spec(link: Link, info: bytes, files: tuple[wire.TorrentFile, ...], magnet: wire.MagnetSpec) -> wire.TorrentSpec:
    placed = tuple(wire.TorrentFile(file.path, file.size, f"{magnet.save_path}/{file.path}", wanted=True) for file in files)
    pieces = PieceMap(placed, MANIFEST_PIECE_BYTES)
    return wire.TorrentSpec(
        info_hash=link.manifest_hash,
        # Without layers: peers send them, checked against the roots in the info dict, which the info-hash covers.
        torrent=torrent_bytes(info, {}),
        save_path=magnet.save_path,
        piece_length=MANIFEST_PIECE_BYTES,
        files=placed,
        have=wire.pack_bits([False] * pieces.total),
        peers=magnet.peers,
        trackers=magnet.trackers,
    )


async def _read_back(link: Link, folder: str, store: Store, swarm: Swarm, timeout_s: float) -> Statement:
    looks = max(1, int(timeout_s / _LOOK_S))
    for look in range(looks):
        statement = _read(folder, store)
        if statement is not None and statement.manifest_torrent().info_hash == link.manifest_hash:
            return statement
        if look == _FLUSH_AFTER_LOOKS:
            await swarm.flush(link.manifest_hash)
        await trio.sleep(_LOOK_S)
    raise TimedOutError(f"the manifest of {link.name} did not reach the disk", hint="Is the disk full?")


def _read(folder: str, store: Store) -> Statement | None:
    parts = {}
    for name in FILE_NAMES:
        try:
            fd = open_beneath(store.fd, f"{folder}/{name}", os.O_RDONLY)
        except ModelP2PError:
            return None
        try:
            parts[name] = os.pread(fd, FILE_LIMITS[name], 0)
        finally:
            os.close(fd)
    return Statement(parts["manifest"], parts["layers"], parts["publisher"])
