"""The gateway of a real daemon, judged by huggingface_hub, transformers and curl as users have them: only HF_ENDPOINT is set."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modelp2p.daemon.client import Client
from modelp2p.protocol import layout
from tests.endtoend.site import MIB, model, size_of, some_bytes, weights
from tests.nodes import tree_bytes, wait_until

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair
    from tests.nodes import Node

pytestmark = pytest.mark.swarm

CLIENTS = {"huggingface_hub 2.4": sys.executable}
"""Interpreters with the generations of huggingface_hub that users have, each in an environment of its own."""
SECRET = "hf_thisIsTheUsersToken"
SHARD = "model-00001-of-00001.safetensors"


@dataclass(frozen=True)
class User:
    """A user's programs, with a cache of their own, and a token that concerns nobody here."""

    python: str
    folder: Path
    number: int = 0
    """Tells the releases of one generation's test from those of another's."""

    def environment(self, endpoint: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
        return {**kept, "HF_HOME": str(self.folder), "HF_ENDPOINT": endpoint, "HF_TOKEN": SECRET, "TQDM_DISABLE": "1"}

    def spawn(self, endpoint: str, *commands: list[str | int]) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("gateway_client.py")
        command = [self.python, str(script), json.dumps(commands)]
        return subprocess.Popen(
            command, env=self.environment(endpoint), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, endpoint: str, *commands: list[str | int]) -> tuple[list[Any], str]:
        """One result for each command, and what was said beside."""
        return heard(self.spawn(endpoint, *commands))

    def hf(self, endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(self.python).with_name("hf")), *arguments]
        return subprocess.run(command, env=self.environment(endpoint), capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(params=list(enumerate(CLIENTS.values())), ids=list(CLIENTS))
def user(request: pytest.FixtureRequest, tmp_path: Path) -> User:
    number, python = request.param
    return User(python, tmp_path / "user", number)


def heard(process: subprocess.Popen[str]) -> tuple[list[Any], str]:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return list(json.loads(out)), err


def endpoint_of(node: Node) -> str:
    return str(node.ok("env")["env"]["HF_ENDPOINT"])


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {path: digest(data) for path, data in files.items()}


def curl(*arguments: str) -> bytes:
    done = subprocess.run(["curl", "-sS", "--max-time", "60", *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def share(pair: Pair, name: str, files: dict[str, bytes], *more: str) -> dict[str, Any]:
    """Publish at the seed; let the node trust the name and fetch, with these flags."""
    published = pair.seed.publish(pair.site.write(files), name)
    done = pair.node.run("trust", "add", published["link"], "--name", name, "--peer", pair.seed.address, "--timeout", "20")
    assert done.code == 0, done.err
    pair.node.ok("fetch", published["link"], "--peer", pair.seed.address, "--timeout", "20", "--no-hf-cache", *more)
    return published


def proven(node: Node, name: str) -> int:
    with Client.connect(str(node.home)) as client:
        rows = client.call("status", {}).result["releases"]
    assert isinstance(rows, list)
    (row,) = [row for row in rows if isinstance(row, dict) and row["name"] == name]
    assert isinstance(row["proven"], int)
    return row["proven"]


def hurry(node: Node, name: str) -> None:
    with Client.connect(str(node.home)) as client:
        client.call("limits", {"ref": name, "max_down": 0})


def test_a_complete_release_through_everything_that_the_hubs_client_does(pair: Pair, user: User) -> None:
    shard = "model.safetensors"
    files = {shard: weights("all", 3 * MIB), "config.json": b"{}", "extra/notes with a space.txt": b"far\n"}
    published = share(pair, "lab/all", files)
    commit, publisher = published["revision"], published["publisher"]
    endpoint = endpoint_of(pair.node)
    results, said = user.run(
        endpoint,
        ["snapshot", "lab/all"],
        ["snapshot", "lab/all", commit],
        ["file", "lab/all", "config.json", commit[:12]],
        ["listing", "lab/all"],
        ["part", "lab/all", shard, 1000, 1010],
        ["metadata", "lab/all"],
        ["file", "lab/all", "adapter_config.json"],
        ["file", "lab/all", "config.json", "dev"],
        ["file", "lab/none", "config.json"],
        ["upload", "lab/all"],
    )
    whole, again, config, listing, part, tensors, no_file, no_revision, no_repo, upload = results
    assert whole == again == digests(files)
    assert config == digest(files["config.json"])
    in_root = {(f"lab/all/{path}", "file", len(data)) for path, data in files.items()}
    assert {tuple(row) for row in listing} == in_root | {("lab/all/extra", "directory", 0)}
    assert bytes.fromhex(part) == files[shard][1000:1010]
    assert tensors == ["all.a", "all.b"]
    assert no_file["error"].endswith("EntryNotFoundError")  # "Remote" from 1.0 on
    assert no_revision["error"] == "RevisionNotFoundError"
    assert no_repo["error"] == "RepositoryNotFoundError"
    assert "read-only" in upload["said"]
    # The one line that users see of us (not before 1.0), and what clients remember.
    assert said.count(f"served from swarm, signed by {publisher}") <= 1
    repo = user.folder / "hub/models--lab--all"
    assert (repo / "refs/main").read_text() == commit
    assert (repo / ".no_exist" / commit / "adapter_config.json").exists()
    # Blobs are called as on the Hub.
    blobs = {path.name for path in (repo / "blobs").iterdir()}
    assert blobs == {row["etag"] for row in pair.node.ok("show", "lab/all")["files"]}


def test_the_hf_command_downloads(pair: Pair, user: User, tmp_path: Path) -> None:
    files = model("hf", MIB)
    share(pair, "lab/hf", files)
    endpoint = endpoint_of(pair.node)
    done = user.hf(endpoint, "download", "lab/hf", "--local-dir", str(tmp_path / "here"))
    assert done.returncode == 0, done.stderr
    here = tree_bytes(tmp_path / "here")
    assert {path: data for path, data in here.items() if not path.startswith(".cache")} == files
    assert pair.node.home.joinpath(layout.GATEWAY_TOKEN).stat().st_mode & 0o777 == 0o600
    # Neither what the user showed us nor what leads to us is written down.
    assert SECRET not in pair.node.log
    assert endpoint.rpartition("/")[2] not in pair.node.log
    assert not [path for path in pair.node.home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_what_was_downloaded_is_what_the_endpoint_says_by_the_hubs_own_check(pair: Pair, tmp_path: Path) -> None:
    published = share(pair, "lab/verified", model("verified", MIB))
    user, endpoint = User(sys.executable, tmp_path / "user"), endpoint_of(pair.node)
    done = user.hf(endpoint, "download", "lab/verified")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"served from swarm, signed by {published['publisher']}") == 1
    verified = user.hf(endpoint, "cache", "verify", "lab/verified")
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_model_and_its_tokenizer_load_by_name(pair: Pair, user: User, tmp_path: Path) -> None:
    (made,), _ = user.run("http://127.0.0.1:9", ["make", str(tmp_path / "bert")])
    assert "error" not in made, made
    share(pair, "lab/bert", tree_bytes(tmp_path / "bert"))
    (used,), _ = user.run(endpoint_of(pair.node), ["use", "lab/bert"])
    assert used == made


def test_a_release_is_served_while_it_is_fetched(pair: Pair, user: User) -> None:
    name = f"lab/arriving-{user.number}"
    files = model(name, 12 * MIB, 12 * MIB)
    share(pair, name, files, "--detach", "--max-down", "2Mi")
    with user.spawn(endpoint_of(pair.node), ["snapshot", name]) as process:
        blobs = user.folder / f"hub/models--{name.replace('/', '--')}/blobs"
        # The client has been told what there is, has begun to download, and the fetch goes on.
        wait_until(lambda: any(blobs.glob("*.incomplete")), 60, "a download")
        assert proven(pair.node, name) < size_of(files)
        hurry(pair.node, name)
        (found,), _ = heard(process)
    assert found == digests(files)


def test_what_is_asked_for_comes_first_and_a_killed_download_goes_on(pair: Pair, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "z.bin.gguf": b"GGUF" + some_bytes("resume", 40 * MIB)}
    share(pair, "lab/resume", files, "--detach", "--max-down", "4Mi")
    url, data = f"{endpoint_of(pair.node)}/lab/resume/resolve/main/z.bin.gguf", files["z.bin.gguf"]
    # The end of the file is asked for, and comes before most of the rest.
    assert curl("-r", "-1000", url) == data[-1000:]
    at = proven(pair.node, "lab/resume")
    assert at < len(data) * 3 // 4, at
    target = tmp_path / "z"
    with subprocess.Popen(["curl", "-sS", "-o", str(target), url]) as killed:
        wait_until(lambda: target.exists() and target.stat().st_size > 0, 60, "bytes of a file under way")
        killed.kill()
    have = target.stat().st_size
    assert 0 < have < len(data)
    assert target.read_bytes() == data[:have]
    hurry(pair.node, "lab/resume")
    curl("-C", "-", "-o", str(target), url)
    assert target.read_bytes() == data


def test_ranges_by_curl(pair: Pair, tmp_path: Path) -> None:
    files = {"config.json": b"0123456789", "model.safetensors": model("curl", 2 * MIB)[SHARD]}
    published = share(pair, "lab/curl", files)
    base = f"{endpoint_of(pair.node)}/lab/curl/resolve/{published['revision']}"
    shard = files["model.safetensors"]
    for ask, expected in {"0-0": shard[:1], "5-": shard[5:], "-7": shard[-7:], "1048570-1048590": shard[1048570:1048591]}.items():
        assert curl("-r", ask, f"{base}/model.safetensors") == expected
    # Several parts at once are answered with the whole, which a server may do.
    assert curl("-r", "0-1,5-6", f"{base}/config.json") == files["config.json"]
    status = curl("-o", str(tmp_path / "x"), "-w", "%{http_code}", "-r", "10-", f"{base}/config.json")
    assert status == b"416"
    # Two files over one connection, and a head that says the size.
    both = curl(f"{base}/config.json", "-r", "0-3", f"{base}/config.json")
    assert both == b"01230123"
    head = curl("-I", f"{base}/model.safetensors").decode().lower()
    assert f"content-length: {len(shard)}" in head
    assert f'etag: "{digest(shard)}"' in head


def test_who_hangs_up_is_noticed_at_once(pair: Pair) -> None:
    files = model("left", 24 * MIB)
    share(pair, "lab/left", files, "--detach", "--max-down", "2Mi")
    endpoint = endpoint_of(pair.node)
    host, _, path = endpoint.removeprefix("http://").partition("/")
    address, _, port = host.partition(":")
    # More than one release may have streams: none of those who left still takes a place.
    for _ in range(40):
        with socket.create_connection((address, int(port))) as connection:
            connection.sendall(f"GET /{path}/lab/left/resolve/main/{SHARD} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("ascii"))
    assert curl("-r", "0-9", f"{endpoint}/lab/left/resolve/main/config.json") == files["config.json"][:10]
    pair.node.ok("rm", "lab/left", "-y")


def test_the_address_is_printed_for_shells_and_two_nodes_have_two(pair: Pair) -> None:
    endpoint = endpoint_of(pair.node)
    assert pair.node.run("env", "-q").out == f"{endpoint}\n"
    assert pair.node.run("env").out == f"export HF_ENDPOINT={endpoint}\n"
    assert pair.node.run("env", "--shell", "fish").out == f"set -gx HF_ENDPOINT {endpoint}\n"
    other = endpoint_of(pair.seed)
    assert other.split("/")[2] != endpoint.split("/")[2]
    assert other.split("/")[4] != endpoint.split("/")[4]
    idle = pair.site.node("idle", start=False)
    assert idle.run("env").code == 8


def test_a_named_port_that_is_taken_stops_the_daemon_with_words(pair: Pair) -> None:
    port = int(endpoint_of(pair.node).split("/")[2].partition(":")[2])
    other = pair.site.node("taken", start=False)
    other.sections = {**other.sections, "gateway": {"port": port}}
    other.write_config()
    done = other.run("daemon", timeout_s=60)
    assert done.code != 0
    assert str(port) in done.err
    assert "Hint:" in done.err
    other.sections = {**other.sections, "gateway": {"enabled": False}}
    other.write_config()
    other.start()
    assert other.run("env").code == 3
