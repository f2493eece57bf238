"""A client that is not ours: the distribution's libtorrent, as any program uses it. Run with the system's Python.

    /usr/bin/python3 foreign_libtorrent.py FOLDER PEER MAGNET...

Downloads every magnet from PEER, prints its port, then `done` when all are complete, and seeds until its standard input ends.
"""

import sys
import time

import libtorrent as lt

WAIT_S = 40.0


def main() -> int:
    """Download, say so, seed."""
    folder, peer, *magnets = sys.argv[1:]
    host, _, port = peer.rpartition(":")
    session = lt.session(
        {
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "listen_interfaces": "127.0.0.1:0",
            "allow_multiple_connections_per_ip": True,
        }
    )
    print(session.listen_port(), flush=True)
    handles = []
    for magnet in magnets:
        params = lt.parse_magnet_uri(magnet)
        params.save_path = folder
        handle = session.add_torrent(params)
        handle.connect_peer((host, int(port)))
        handles.append(handle)
    deadline = time.monotonic() + WAIT_S
    while not all(handle.status().is_seeding for handle in handles):
        if time.monotonic() > deadline:
            print("\n".join(f"{handle.status().state} {handle.status().progress}" for handle in handles), file=sys.stderr)
            return 1
        time.sleep(0.05)
    print("done", flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
