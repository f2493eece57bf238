"""qbittorrent-nox in a profile of its own, driven over its Web API."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.nodes import wait_until

_CONFIG = """\
[LegalNotice]
Accepted=true

[BitTorrent]
Session\\Port={port}
Session\\Interface=lo
Session\\InterfaceName=lo
Session\\DHTEnabled=false
Session\\LSDEnabled=false
Session\\PeXEnabled=false
Session\\MultiConnectionsPerIp=true
Session\\DefaultSavePath={folder}

[Preferences]
WebUI\\Address=127.0.0.1
WebUI\\Port={web}
WebUI\\LocalHostAuth=false
WebUI\\UseUPnP=false

[Network]
PortForwardingEnabled=false
"""


@dataclass(frozen=True)
class QBittorrent:
    """A running client."""

    web: int
    port: int

    @property
    def address(self) -> str:
        """`HOST:PORT` of its BitTorrent side."""
        return f"127.0.0.1:{self.port}"

    def call(self, path: str, **form: str) -> str:
        """One request of the Web API."""
        data = urllib.parse.urlencode(form).encode() if form else None
        with urllib.request.urlopen(f"http://127.0.0.1:{self.web}/api/v2/{path}", data, timeout=10) as reply:
            return str(reply.read().decode())

    def torrents(self) -> list[dict[str, Any]]:
        """What it says about its torrents."""
        found = json.loads(self.call("torrents/info"))
        assert isinstance(found, list)
        return found

    def download(self, magnet: str, peer: str) -> None:
        """Download a magnet from one peer, to the end."""
        assert self.call("torrents/add", urls=magnet) == "Ok."
        wait_until(self.torrents, 10, "qbittorrent-nox takes the magnet")
        key = self.torrents()[0]["hash"]
        self.call("torrents/addPeers", hashes=key, peers=peer)
        wait_until(lambda: self.torrents()[0]["progress"] == 1, 40, "qbittorrent-nox has everything")

    def is_up(self) -> bool:
        """Whether the Web API answers."""
        try:
            return bool(self.call("app/version"))
        except (OSError, urllib.error.URLError):
            return False


@contextmanager
def running_qbittorrent(folder: Path) -> Iterator[QBittorrent]:
    """A client whose profile and downloads lie below `folder`; fails where the program is not installed."""
    program = shutil.which("qbittorrent-nox")
    assert program is not None, (
        "qbittorrent-nox is missing: install the package qbittorrent-nox (apt-get install qbittorrent-nox)"
    )
    web, port = free_port(), free_port()
    config = folder / "profile" / "qBittorrent" / "config" / "qBittorrent.conf"
    config.parent.mkdir(parents=True)
    config.write_text(_CONFIG.format(port=port, web=web, folder=folder / "downloads"))
    with (
        (folder / "qbittorrent.log").open("wb") as log,
        subprocess.Popen(
            [program, f"--profile={folder / 'profile'}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process,
    ):
        try:
            client = QBittorrent(web, port)
            wait_until(client.is_up, 20, "qbittorrent-nox answers")
            yield client
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    """A TCP port of loopback that is free now; the client has no way to say which one it picked."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
