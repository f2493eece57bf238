"""Which libtorrent settings an engine runs with: a pure function from `EngineSettings`, so that a test can read them all.

Invariants:
- nothing talks to strangers unless the profile or the caller asks for it: DHT, LSD, UPnP, NAT-PMP and STUN are all named;
- no port is ever moved silently: `max_retry_port_bind` is what the caller allowed;
- hash checks, certificate checks and the SSRF rules are on in every profile.

Names and meanings: https://libtorrent.org/reference-Settings.html
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from modelp2p.protocol.errors import UsageError

if TYPE_CHECKING:
    from modelp2p.protocol.engine_wire import EngineSettings

LibtorrentSettings = dict[str, bool | int | str]

MAX_METADATA_BYTES = 8 << 20
MAX_RATE = 2**31 - 1
"""libtorrent keeps rates in 32 bits and cuts larger ones silently; 2.1 GB/s and more mean unlimited."""

# The bits are libtorrent's public ABI (alert.hpp); block progress and logs stay off: 64,000 alerts per second at 1 GB/s.
# Storage stays off too: a flush that was asked for is answered anyway, others would be taken for the answer.
_ERROR, _PEER, _STATUS, _PIECE_PROGRESS = 1 << 0, 1 << 1, 1 << 6, 1 << 22
ALERT_MASK = _ERROR | _STATUS | _PIECE_PROGRESS | _PEER

_PROFILES: dict[str, LibtorrentSettings] = {
    "wan": {
        "enable_dht": True,
        "enable_lsd": False,
        "enable_incoming_utp": True,
        "enable_outgoing_utp": True,
        "in_enc_policy": 1,  # enabled: some access networks still throttle what looks like BitTorrent
        "out_enc_policy": 1,
        "min_reconnect_time": 10,
        "peer_connect_timeout": 10,
        "connections_limit": 800,
        "max_out_request_queue": 1000,
        "max_allowed_in_request_queue": 1000,  # 160 MB/s from one peer 100 ms away
    },
    "lan": {
        "enable_dht": False,
        "enable_lsd": True,
        # 18 MiB/s over uTP against 230 over TCP on one machine (libtorrent#6265, #3542).
        "enable_incoming_utp": False,
        "enable_outgoing_utp": False,
        "in_enc_policy": 2,  # disabled: RC4 costs 4.4 CPU seconds per GiB against 2.5
        "out_enc_policy": 2,
        "min_reconnect_time": 1,  # 60 by default: a node that starts before its seed would wait a minute
        "peer_connect_timeout": 5,
        "connections_limit": 4000,
        # What was asked of a peer still arrives when a torrent is held. The number the *remote* allows is what counts: lowering
        # only our own changed nothing. One peer on loopback: 50 to 130 MiB with 8000, 15 to 21 with 1000, 4 to 11 with 500.
        "max_out_request_queue": 500,
        "max_allowed_in_request_queue": 500,
    },
}

_ALWAYS: LibtorrentSettings = {
    # Who we are, and whom we do not talk to.
    "enable_upnp": False,
    "enable_natpmp": False,
    "webtorrent_stun_server": "",
    "max_webtorrent_offers": 0,
    "disable_hash_checks": False,
    "validate_https_trackers": True,
    "ssrf_mitigation": True,
    "allow_idna": False,
    "no_connect_privileged_ports": True,
    "listen_system_port_fallback": False,
    "user_agent": "modelp2p/0.1",
    "peer_fingerprint": "-MP0100-",
    "max_metadata_size": MAX_METADATA_BYTES,
    "stop_tracker_timeout": 1,
    # Everything wanted runs at once; the daemon is the one that queues.
    "active_downloads": -1,
    "active_seeds": -1,
    "active_limit": -1,
    "active_checking": 1,
    "unchoke_slots_limit": -1,
    "auto_sequential": False,
    "max_failcount": 10,
    "peer_dscp": 0,
    # Limits are of payload as users count it, and bind every socket alike.
    "rate_limit_ip_overhead": False,
    # At the stock 500 ms a limit of 4 MB/s came as bursts of up to 10 MB with silent seconds between; at 25 ms every second
    # brings 3.7 to 4.3 MB. An idle engine costs 0.3 % of a core.
    "tick_interval": 25,
    "mixed_mode_algorithm": 0,
    # Stock buffers and queues make a local transfer 14 MB/s instead of 250 (libtorrent#5923, #6265, Tribler#2620).
    "send_buffer_watermark": 10 << 20,
    "send_buffer_low_watermark": 1 << 20,
    "send_buffer_watermark_factor": 150,
    "send_not_sent_low_watermark": 512 << 10,
    "request_queue_time": 3,
    "listen_queue_size": 3000,
    "connection_speed": 300,
    "aio_threads": 8,
    "hashing_threads": 2,
    "file_pool_size": 500,
    # Received but not yet written; with what the daemon has not proven this stays under its 128 MiB.
    "max_queued_disk_bytes": 64 << 20,
    "checking_mem_usage": 2048,
    # A torrent that is added complete announces every piece it has at once; 65,536 is a usual large one.
    "alert_queue_size": 100_000,
    "alert_mask": ALERT_MASK,
}


def libtorrent_settings(settings: EngineSettings) -> LibtorrentSettings:
    """The settings pack of an engine.

    Raises:
        UsageError: an unknown profile, or a listen address that is not an IP literal with a port.
    """
    if settings.profile not in _PROFILES:
        raise UsageError(f"unknown network profile '{settings.profile}'", hint="Known: " + ", ".join(_PROFILES))
    chosen = _ALWAYS | _PROFILES[settings.profile]
    chosen |= {
        "listen_interfaces": ",".join(_listen_address(text) for text in settings.listen),
        "max_retry_port_bind": settings.port_tries,
        "upload_rate_limit": clamp_rate(settings.max_up),
        "download_rate_limit": clamp_rate(settings.max_down),
        "allow_multiple_connections_per_ip": settings.many_per_address,
    }
    if settings.connections:
        chosen["connections_limit"] = settings.connections
    if settings.dht is not None:
        chosen["enable_dht"] = settings.dht
    if settings.lsd is not None:
        chosen["enable_lsd"] = settings.lsd
    if settings.utp is not None:
        chosen |= {"enable_incoming_utp": settings.utp, "enable_outgoing_utp": settings.utp}
    if settings.dht_bootstrap is not None:
        chosen["dht_bootstrap_nodes"] = ",".join(settings.dht_bootstrap)
    if not chosen["enable_dht"]:
        # Otherwise the name is looked up even though nobody asks it anything.
        chosen["dht_bootstrap_nodes"] = ""
    return chosen


def uses_pex(settings: EngineSettings) -> bool:
    """Whether torrents exchange peers; on in both profiles unless switched off."""
    return settings.pex is not False


def clamp_rate(rate: int) -> int:
    """A rate limit as libtorrent takes it: 0 for none."""
    return 0 if rate > MAX_RATE else rate


def _listen_address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    literal = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        ip_address(literal)
        if not colon or not 0 <= int(port) <= 65_535:
            raise ValueError(port)
    except ValueError as exc:
        raise UsageError(f"cannot listen on '{text}': an IP address and a port are needed, such as 0.0.0.0:16881") from exc
    return text
