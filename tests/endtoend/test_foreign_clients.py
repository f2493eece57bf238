"""Clients of others join the same swarm by the same link, download from us, and seed to us."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from modelp2p.protocol.links import parse_link
from tests.endtoend.qbittorrent import running_qbittorrent
from tests.endtoend.site import MIB, Site, check_uploaded, model, size_of
from tests.nodes import tree_bytes

pytestmark = pytest.mark.swarm

SYSTEM_PYTHON = "/usr/bin/python3"
SCRIPT = Path(__file__).with_name("foreign_libtorrent.py")


def test_plain_libtorrent_downloads_from_us_and_is_all_a_node_of_ours_needs(site: Site) -> None:
    found = subprocess.run([SYSTEM_PYTHON, "-c", "import libtorrent"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"install the package python3-libtorrent (apt-get install python3-libtorrent): {found.stderr}"
    files = model("foreign", 3 * MIB + 5, MIB)
    seed, node = site.node("seed"), site.node("node")
    published = seed.publish(site.write(files), "lab/foreign")
    folder = site.folder / "foreign"
    folder.mkdir()
    # Any client can carry the statement as well: its swarm is one more magnet.
    statement = f"magnet:?xt=urn:btmh:1220{parse_link(published['link']).manifest_hash.hex()}"
    command = [SYSTEM_PYTHON, str(SCRIPT), str(folder), seed.address, published["link"], statement]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as foreign:
        assert foreign.stdout is not None
        assert foreign.stdin is not None
        port = int(foreign.stdout.readline())
        assert foreign.stdout.readline() == "done\n"
        assert tree_bytes(folder / published["revision"]) == files
        check_uploaded(seed, "lab/foreign", size_of(files))
        seed.stop()
        result = node.ok("fetch", published["link"], "--peer", f"127.0.0.1:{port}", "--timeout", "20")
        assert (result["state"], result["from_peers"]) == ("complete", size_of(files))
        assert tree_bytes(Path(result["path"])) == files
        foreign.stdin.close()
        assert foreign.wait(20) == 0


def test_qbittorrent_downloads_from_us_and_seeds_to_a_node_of_ours(site: Site) -> None:
    files = model("qbittorrent", 3 * MIB, MIB + 7)
    folder = site.folder / "qbittorrent"
    folder.mkdir()
    with running_qbittorrent(folder) as client:
        seed, node = site.node("seed"), site.node("node")
        published = seed.publish(site.write(files), "lab/foreign")
        bundle = site.folder / "release.modelp2p"
        seed.ok("show", "lab/foreign", "--bundle", str(bundle))
        client.download(published["link"], seed.address)
        assert tree_bytes(folder / "downloads" / published["revision"]) == files
        check_uploaded(seed, "lab/foreign", size_of(files))
        seed.stop()
        # It brings the payload; the statement came as a file.
        node.ok("trust", "add", str(bundle), "--name", "lab/*")
        result = node.ok("fetch", str(bundle), "--peer", client.address, "--timeout", "20")
        assert (result["state"], result["from_peers"], result["name_verified"]) == ("complete", size_of(files), True)
        assert tree_bytes(Path(result["path"])) == files
