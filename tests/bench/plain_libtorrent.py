"""A plain libtorrent peer in a process of its own: what a BitTorrent client without proof, journal or daemon does.

    python -m tests.bench.plain_libtorrent seed TORRENT FOLDER --settings tuned|stock
    python -m tests.bench.plain_libtorrent fetch TORRENT FOLDER --peer PORT --settings tuned|stock [--stop-after S]

`tuned` is exactly the engine's `lan` profile. A fetch ends, as ours does, with fsync of every file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import libtorrent as lt

from modelp2p.daemon.engine.settings import libtorrent_settings
from modelp2p.protocol.engine_wire import EngineSettings


def session(kind: str) -> lt.session:
    """A session on loopback without discovery."""
    quiet: dict[str, Any] = {"enable_dht": False, "enable_lsd": False, "enable_upnp": False, "enable_natpmp": False}
    quiet |= {"listen_interfaces": "127.0.0.1:0", "webtorrent_stun_server": ""}
    if kind == "tuned":
        tuned = EngineSettings(profile="lan", listen=("127.0.0.1:0",), dht=False, lsd=False, many_per_address=True)
        settings = {**libtorrent_settings(tuned), **quiet}
    else:
        # Two peers on one address cannot meet otherwise; it has no part in speed.
        settings = {**quiet, "allow_multiple_connections_per_ip": True}
    parameters = lt.session_params(settings)  # type: ignore[call-overload]
    if kind == "tuned":
        parameters.disk_io_constructor = "pread_disk_io_constructor"
    return lt.session(parameters)


def main() -> None:
    """Run one peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("seed", "fetch"))
    parser.add_argument("torrent", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--settings", choices=("tuned", "stock"), default="tuned")
    parser.add_argument("--peer", type=int)
    parser.add_argument("--stop-after", type=float, default=600.0)
    given = parser.parse_args()
    running = session(given.settings)
    params = lt.load_torrent_buffer(given.torrent.read_bytes())
    params.save_path = str(given.folder)
    params.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
    if given.role == "seed":
        assert params.ti is not None
        params.have_pieces = [True] * params.ti.num_pieces()
        running.add_torrent(params)
        while running.listen_port() == 0:
            time.sleep(0.05)
        print(running.listen_port(), flush=True)
        sys.stdin.read()
        return
    handle = running.add_torrent(params)
    started = time.monotonic()
    handle.connect_peer(("127.0.0.1", given.peer))
    while not (status := handle.status()).is_seeding and time.monotonic() - started < given.stop_after:
        time.sleep(0.02)
    if status.is_seeding:
        handle.flush_cache()
        while not any(isinstance(alert, lt.cache_flushed_alert) for alert in running.pop_alerts()):
            time.sleep(0.005)
        for path in sorted(given.folder.rglob("*")):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
    seconds = time.monotonic() - started
    print(json.dumps({"seconds": seconds, "bytes": handle.status().total_payload_download, "done": status.is_seeding}))


if __name__ == "__main__":
    main()
