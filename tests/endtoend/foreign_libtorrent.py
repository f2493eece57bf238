"""A client that is not ours: the distribution's libtorrent, as any program uses it. Run with the system's Python.

    /usr/bin/python3 foreign_libtorrent.py FOLDER PEER SOURCE...

Downloads every source, a magnet or a torrent file, from PEER, prints its port, then `done` when all are complete, and seeds until
its standard input ends. Without a peer all has to be there.
"""

import sys
import time

WAIT_S = 40.0
NO_PEER = "-"


def main() -> int:
    """Download, say so, seed."""
    # Not at the top: tests that only need the names above may have another libtorrent, or none.
    import libtorrent as lt

    folder, peer, *sources = sys.argv[1:]
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
    for source in sources:
        params = lt.parse_magnet_uri(source) if source.startswith("magnet:") else lt.load_torrent_file(source)
        params.save_path = folder
        handle = session.add_torrent(params)
        if peer != NO_PEER:
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
