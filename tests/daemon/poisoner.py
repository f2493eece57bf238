"""A hostile seed: checks honestly that it has a torrent, then serves other bytes. Run by `test_poison.py` as a process.

Arguments: torrent file, folder, address to listen on. Prints its port, and serves until its stdin closes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import libtorrent as lt


def main() -> None:
    torrent, folder, address = sys.argv[1:]
    session = lt.session(
        {
            "listen_interfaces": f"{address}:0",
            "outgoing_interfaces": address,
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "webtorrent_stun_server": "",
            "allow_multiple_connections_per_ip": True,
        }
    )
    params = lt.load_torrent_buffer(Path(torrent).read_bytes())
    params.save_path = folder
    assert params.ti is not None
    layout = params.ti.layout()
    params.have_pieces = [True] * layout.num_pieces()
    params.renamed_files = {
        index: f"{folder}/{layout.file_path(index).removeprefix(layout.name() + '/')}"
        for index in range(layout.num_files())
        if not layout.file_flags(index) & lt.file_storage.flag_pad_file
    }
    params.flags = lt.torrent_flags.update_subscribe
    handle = session.add_torrent(params)
    # A busy libtorrent takes a moment to see that nothing is missing.
    for _ in range(400):
        if handle.status().is_seeding:
            break
        time.sleep(0.05)
    else:
        sys.exit("not a seed after 20 s")
    for path in Path(folder).rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(byte ^ 0x55 for byte in path.read_bytes()))
    print(session.listen_port(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
