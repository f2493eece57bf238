"""libtorrent's alerts, copied into values of ours the moment they are popped.

An alert object is a pointer into a buffer that the next `pop_alerts` reuses: kept any longer it reads as another alert, or
crashes (libtorrent#6437, #7429). So nothing but `copy_alert` ever looks at one, and what it returns owns all it holds. A
`torrent_handle` is the exception: it is a copy of its own.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TypeAlias

import libtorrent as lt

from modelp2p.protocol.engine_wire import (
    Dropped,
    Event,
    FileFailed,
    Flushed,
    ListenFailed,
    PeerBanned,
    PeerStatus,
    PieceFailed,
    PiecesFinished,
    SessionStatus,
    TorrentStatus,
    TransferFinished,
    WebSeedFailed,
)
from modelp2p.protocol.text import printable

MAX_LISTED_PEERS = 20
"""Peers in one status: enough for a table on a screen."""
_MAX_CLIENT_CHARACTERS = 40
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class TorrentAdded:
    """The session took the torrent, or says in `error` why not."""

    info_hash: bytes
    handle: lt.torrent_handle
    error: str


@dataclass(frozen=True, slots=True)
class TorrentGone:
    """A removed torrent is gone: its last piece was announced, and none of its files is written any more."""

    info_hash: bytes


@dataclass(frozen=True, slots=True)
class MetadataArrived:
    """A magnet has its info dict now."""

    info_hash: bytes


@dataclass(frozen=True, slots=True)
class FilesChecked:
    """libtorrent has looked at the files of a torrent and may be let go on."""

    info_hash: bytes


@dataclass(frozen=True, slots=True)
class StatusUpdates:
    """The torrents that changed within the last second; peers are not in it yet."""

    torrents: tuple[TorrentStatus, ...]


@dataclass(frozen=True, slots=True)
class SocketOpened:
    """One listen socket; only TCP ones are told apart by users."""

    address: str
    port: int
    is_tcp: bool


Copied: TypeAlias = Event | TorrentAdded | TorrentGone | FilesChecked | MetadataArrived | StatusUpdates | SocketOpened


def copy_alert(alert: lt.alert) -> Copied | None:
    """What an alert says, or None for one that says nothing to us."""
    match alert:
        case lt.piece_finished_alert():
            return PiecesFinished(_hash_of(alert), (alert.piece_index,))
        case lt.state_update_alert():
            # A torrent removed a moment ago can still be listed; its handle has no hash any more.
            return StatusUpdates(tuple(status_of(status) for status in alert.status if status.handle.is_valid()))
        case lt.add_torrent_alert():
            # A refused torrent has no handle, but the parameters still name it.
            digest = alert.params.info_hashes.v2.to_bytes()
            return TorrentAdded(digest, alert.handle, _message(alert.error))
        case lt.torrent_removed_alert():
            return TorrentGone(alert.info_hashes.v2.to_bytes())
        case lt.torrent_checked_alert():
            return FilesChecked(_hash_of(alert))
        case lt.metadata_received_alert():
            return MetadataArrived(_hash_of(alert))
        case lt.torrent_finished_alert():
            return TransferFinished(_hash_of(alert))
        case lt.cache_flushed_alert():
            return Flushed(_hash_of(alert))
        case lt.hash_failed_alert():
            return PieceFailed(_hash_of(alert), alert.piece_index)
        case lt.peer_ban_alert():
            return PeerBanned(_hash_of(alert), join_address(*alert.endpoint))
        case lt.url_seed_alert():
            return WebSeedFailed(_hash_of(alert), alert.server_url(), printable(alert.error_message()), False)
        case lt.file_error_alert():
            return FileFailed(_hash_of(alert), alert.filename(), _message(alert.error), alert.error.value() in _NO_SPACE)
        case lt.fastresume_rejected_alert():
            # A file is missing or short that the spec called complete; libtorrent would wait, paused, and say no more.
            return FileFailed(_hash_of(alert), "", printable(alert.message()), False)
        case lt.torrent_error_alert():
            return FileFailed(_hash_of(alert), "", printable(alert.message()), False)
        case lt.listen_succeeded_alert():
            return SocketOpened(alert.address, alert.port, str(alert.socket_type) == "tcp")
        case lt.listen_failed_alert():
            return ListenFailed(join_address(alert.address, alert.port), _message(alert.error), alert.error.value())
        case lt.session_stats_alert():
            return SessionStatus(alert.values["dht.dht_nodes"])
        case lt.alerts_dropped_alert():
            return Dropped()
        case _:
            return None


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _hash_of(alert: lt.torrent_alert) -> bytes:
    return alert.handle.info_hashes().v2.to_bytes()


def _message(code: lt.error_code) -> str:
    return printable(code.message()) if code.value() else ""


def status_of(status: lt.torrent_status) -> TorrentStatus:
    """What libtorrent says of a torrent, without its peers."""
    return TorrentStatus(
        info_hash=status.info_hashes.v2.to_bytes(),
        rate_down=status.download_payload_rate,
        rate_up=status.upload_payload_rate,
        peers=status.num_peers,
        seeds=status.num_seeds,
        payload_down=status.total_payload_download,
        payload_up=status.total_payload_upload,
        wasted=status.total_redundant_bytes + status.total_failed_bytes,
        known=status.list_peers,
    )


def peers_of(handle: lt.torrent_handle) -> tuple[PeerStatus, ...]:
    """The peers of a torrent now, the fastest first.

    A round trip through the network thread, once a second for each torrent that changed: the asynchronous
    `peer_info_alert` carries a vector for which the 2.1.1 binding has no converter.
    """
    infos = handle.get_peer_info()
    ranked = sorted(infos, key=lambda info: info.payload_down_speed + info.payload_up_speed, reverse=True)
    return tuple(_peer(info) for info in ranked[:MAX_LISTED_PEERS])


def _peer(info: lt.peer_info) -> PeerStatus:
    return PeerStatus(
        address=join_address(*info.ip),
        client=printable(info.client.decode("utf-8", "replace"))[:_MAX_CLIENT_CHARACTERS],
        rate_down=max(0, info.payload_down_speed),
        rate_up=max(0, info.payload_up_speed),
        has=info.progress_ppm // 1000,
        source="peer" if info.connection_type == lt.peer_info.standard_bittorrent else "web",
    )
