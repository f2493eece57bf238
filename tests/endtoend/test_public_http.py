"""The public listener of a real daemon: programs of others download whole releases from it and from nothing else."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from modelp2p.protocol.publisher import decode_chain
from modelp2p.protocol.statement import decode_bundle, verify_statement
from modelp2p.protocol.torrent import bencode
from tests.endtoend.site import MIB, open_site, size_of, some_bytes, weights
from tests.nodes import Node, tree_bytes

if TYPE_CHECKING:
    from tests.endtoend.site import Site

pytestmark = pytest.mark.swarm

HOST = "models.example.org"
CLIENT = Path(__file__).with_name("web_seed_client.py")
ODD = ("sub/x y+#%.txt", "sub/%41&=;@,.txt", "sub/what?.txt", "sub/~'(!)*$.txt", "sub/\u00fcber \u6a21\u578b.txt", "[a]{b}^`|")
SHARD = "model-00001-of-00002.safetensors"
MANY = (
    {SHARD: weights("public", 5 * MIB + 5), "model-00002-of-00002.safetensors": weights("p", MIB), "empty": b""}
    | {path: some_bytes(path, 20_000) for path in ODD}
    | {f"many/{number:03}/{number}.txt": some_bytes(str(number), 17_000 + number) for number in range(120)}
)
SMALL = {f"{number}/config.json": some_bytes(str(number), 900 + number) for number in range(120)}
ONE = {"only file+1.gguf": b"GGUF" + some_bytes("one", 2 * MIB)}
RELEASES = {"lab/many": MANY, "lab/one": ONE, "lab/small": SMALL}
CLIENTS = {
    "the libtorrent of ours": (sys.executable, ("lab/many", "lab/one", "lab/small")),
    # 2.0.8 loses a file of less than 16 KiB now and then, and asks again after 20 s. It does so with nginx, too.
    "the libtorrent of the distribution": ("/usr/bin/python3", ("lab/many", "lab/one")),
}


@dataclass(frozen=True)
class Open:
    """A node with a public listener on two addresses, and what it published: the answers of `publish`, by name."""

    site: Site
    node: Node
    urls: tuple[str, ...]
    published: dict[str, dict[str, Any]]

    def torrent(self, name: str, path: Path, base: str) -> str:
        """What anybody can make of the newest bundle that is there, with a web seed (BEP 19, "url-list"); returns where it is."""
        release = verify_statement(decode_bundle(curl(f"{self.urls[0]}/{name}/main.modelp2p")))
        assert release.manifest.revision == self.published[name]["revision"]
        path.write_bytes(release.torrent_bytes().removesuffix(b"e") + bencode("url-list") + bencode(base) + b"e")
        return str(path)

    def folder(self, name: str) -> str:
        """The path of a release."""
        return f"/{name}/resolve/{self.published[name]['revision']}"


@pytest.fixture(scope="module")
def everybody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    with open_site(tmp_path_factory.mktemp("e")) as site:
        public = {"enabled": True, "listen": ["127.0.0.1:0", "127.0.0.2:0"], "hosts": [HOST]}
        node = site.stack.enter_context(Node(site.folder / "node", {}, {"store": {"reserve": 0}, "public_http": public}))
        node.start()
        published = {name: node.publish(site.write(files), name) for name, files in RELEASES.items()}
        yield Open(site, node, tuple(node.ok("status")["node"]["public_http"]), published)


def curl(url: str, *arguments: str) -> bytes:
    done = subprocess.run(["curl", "-sS", "--fail", "--max-time", "60", *arguments, url], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def status_of(url: str, *arguments: str) -> int:
    command = ["curl", "-sS", "--max-time", "60", "--output", "/dev/null", "--write-out", "%{http_code}", *arguments, url]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def download(python: str, folder: Path, *torrents: str, trusted: Path | None = None) -> int:
    """Have libtorrent download; returns the payload bytes that came."""
    environment = {**os.environ, "SSL_CERT_FILE": str(trusted)} if trusted else None
    command = [python, str(CLIENT), str(folder), *torrents]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"it needs the package python3-libtorrent (apt-get install python3-libtorrent): {done.stderr}"
    return int(done.stdout)


@pytest.mark.parametrize("number", range(len(CLIENTS)), ids=list(CLIENTS))
def test_libtorrent_needs_nothing_but_this_web_seed(everybody: Open, tmp_path: Path, number: int) -> None:
    python, names = list(CLIENTS.values())[number]
    torrents: list[str] = []
    expected: dict[str, bytes] = {}
    for name in names:
        revision, files = everybody.published[name]["revision"], RELEASES[name]
        # To libtorrent a torrent of one file has no folder, so its web seed is the folder.
        base = everybody.folder(name) if len(files) == 1 else f"/{name}/resolve"
        file = tmp_path / f"{len(torrents)}.torrent"
        torrents.append(everybody.torrent(name, file, f"{everybody.urls[number]}{base}/"))
        expected |= files if len(files) == 1 else {f"{revision}/{path}": data for path, data in files.items()}
    came = download(python, tmp_path / "all", *torrents)
    assert tree_bytes(tmp_path / "all") == expected
    assert came == size_of(expected)


def test_curl_and_a_node_of_ours_get_what_they_ask_for_and_strangers_nothing_else(everybody: Open, tmp_path: Path) -> None:
    url = everybody.urls[0]
    base = url + everybody.folder("lab/many")
    for path in ODD:
        assert curl(f"{base}/{quote(path)}", "--path-as-is") == MANY[path]
    assert curl(f"{base}/{SHARD}", "--range", "1000-1999") == MANY[SHARD][1000:2000]
    half = tmp_path / SHARD
    half.write_bytes(MANY[SHARD][: MIB + 1])
    curl(f"{base}/{SHARD}", "--continue-at", "-", "--output", str(half))
    assert half.read_bytes() == MANY[SHARD]
    assert status_of(f"{base}/{SHARD}", "--header", "Host: evil.example") == 421
    assert status_of(f"{base}/{SHARD}", "--data", "x") == 405
    assert f"everybody at {' '.join(everybody.urls)}\n" in everybody.node.run("status").out
    # As docs/PUBLIC_HTTP.md says: one file by curl, and the node fetches.
    publisher = everybody.published["lab/many"]["publisher"]
    chain = decode_chain(curl(f"{url}/.well-known/modelp2p/publishers/{publisher}"))
    assert chain.publisher_id == publisher
    # What is published is for everybody, until its publisher is not trusted for the name any more.
    assert everybody.node.run("trust", "remove", publisher, "--name", "lab/one").code == 0
    assert [status_of(f"{url}/lab/{name}/main.modelp2p") for name in ("one", "many")] == [404, 200]
    everybody.node.ok("trust", "add", everybody.published["lab/one"]["link"], "--name", "lab/one")
    assert status_of(f"{url}/lab/one/main.modelp2p") == 200
    curl(f"{url}/lab/many/main.modelp2p", "--remote-name", "--output-dir", str(tmp_path))
    bundle, node = str(tmp_path / "main.modelp2p"), everybody.site.node("reader")
    node.ok("trust", "add", bundle, "--name", "lab/*")
    result = node.ok("fetch", bundle, "--peer", everybody.node.address, "--timeout", "20", "--no-hf-cache")
    assert tree_bytes(Path(result["path"])) == MANY


def test_behind_a_proxy_with_tls_it_answers_to_its_name(everybody: Open, tmp_path: Path) -> None:
    certificate = certificate_for(tmp_path / "certificate.pem", HOST, "localhost")
    with proxy(certificate, everybody.urls[0]) as port:
        to_proxy = ("--cacert", str(certificate), "--resolve", f"{HOST}:{port}:127.0.0.1")
        url = f"https://{HOST}:{port}{everybody.folder('lab/many')}"
        assert curl(f"{url}/{SHARD}", *to_proxy) == MANY[SHARD]
        assert curl(f"{url}/{SHARD}", *to_proxy, "--range", "0-0") == MANY[SHARD][:1]
        # libtorrent asks the system's resolver: the one name that it knows is localhost.
        torrent = everybody.torrent("lab/many", tmp_path / "torrent", f"https://localhost:{port}/lab/many/resolve/")
        came = download(sys.executable, tmp_path / "all", torrent, trusted=certificate)
    assert came == size_of(MANY)
    assert tree_bytes(tmp_path / "all" / everybody.published["lab/many"]["revision"]) == MANY


def test_a_busy_port_ends_the_daemon_with_its_name(everybody: Open) -> None:
    taken = everybody.urls[0].removeprefix("http://")
    public = {"enabled": True, "listen": [taken]}
    done = Node(everybody.site.folder / "late", {}, {"public_http": public}).run("daemon", timeout_s=30)
    assert (done.code, taken in done.err) == (6, True)


def certificate_for(path: Path, *names: str) -> Path:
    """A certificate for these names that vouches for itself, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    others = [*(x509.DNSName(name) for name in names), x509.IPAddress(ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC))
        .add_extension(x509.SubjectAlternativeName(others), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(certificate.public_bytes(Encoding.PEM) + private)
    return path


@contextmanager
def proxy(certificate: Path, url: str) -> Iterator[int]:
    """A proxy with TLS in front of an address; yields its port on loopback."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    command = [sys.executable, str(Path(__file__).with_name("tls_proxy.py")), str(certificate), host, port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()
