"""A client that is not ours, with web seeds and no peer: libtorrent, as any program uses it. For any interpreter that has it.

    python web_seed_client.py FOLDER TORRENT...

Downloads the torrents, all at once, from the web seeds that they name. Prints the payload bytes that came, or what it was told.
"""

import sys
import time

import libtorrent as lt

WAIT_S = 30.0


def main() -> int:
    """Download."""
    folder, *torrents = sys.argv[1:]
    session = lt.session(
        {
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "listen_interfaces": "127.0.0.1:0",
            "alert_mask": lt.alert.category_t.error_notification | lt.alert.category_t.peer_notification,
        }
    )
    handles = []
    for torrent in torrents:
        params = lt.load_torrent_file(torrent)
        params.save_path = folder
        handles.append(session.add_torrent(params))
    said: list[str] = []
    deadline = time.monotonic() + WAIT_S
    while not all(handle.status().is_seeding for handle in handles):
        said += [f"{alert.what()}: {alert.message()}" for alert in session.pop_alerts()]
        if time.monotonic() > deadline:
            print("\n".join([*said[-20:], *(str(handle.status().progress) for handle in handles)]), file=sys.stderr)
            return 1
        time.sleep(0.02)
    print(sum(handle.status().total_payload_download for handle in handles))
    return 0


if __name__ == "__main__":
    sys.exit(main())
