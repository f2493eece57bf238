"""The gateway of a real daemon, judged by huggingface_hub, transformers and curl as users have them: only HF_ENDPOINT is set."""

from __future__ import annotations

import hashlib
import socket
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modelp2p.protocol import layout
from tests.bench.sparse import SHARDS, hold_sparse
from tests.clients.programs import GENERATIONS, NEWEST, OLDEST, Generation, Program, environment_of
from tests.endtoend.site import MIB, model, size_of, some_bytes, weights
from tests.nodes import tree_bytes, wait_until

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair
    from tests.nodes import Node

pytestmark = pytest.mark.swarm

SECRET = "hf_thisIsTheUsersToken"
SHARD = "model-00001-of-00001.safetensors"


@dataclass(frozen=True)
class User:
    """A user's programs, with a cache of their own, and a token that concerns nobody here."""

    generation: Generation
    folder: Path

    def environment(self, endpoint: str) -> dict[str, str]:
        return environment_of(endpoint, self.folder, {"HF_TOKEN": SECRET})

    def program(self, endpoint: str) -> Program:
        return Program(self.generation, self.environment(endpoint))

    def hf(self, endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(self.generation.python).with_name("hf")), *arguments]
        return subprocess.run(command, env=self.environment(endpoint), capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(params=GENERATIONS, ids=lambda generation: generation.version)
def user(request: pytest.FixtureRequest, tmp_path: Path) -> User:
    return User(request.param, tmp_path)


@dataclass(frozen=True)
class Shared:
    """A release that is complete at the node."""

    name: str
    files: dict[str, bytes]
    commit: str
    publisher: str


@pytest.fixture(scope="module")
def shared(pair: Pair) -> Shared:
    """The one that every client reads."""
    files = {"model.safetensors": weights("all", 3 * MIB), "config.json": b"{}", "extra/notes with a space.txt": b"far\n"}
    published = share(pair, "lab/all", files)
    return Shared("lab/all", files, published["revision"], published["publisher"])


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


def has_begun(user: User, name: str) -> bool:
    """Whether bytes of a file are in the user's cache, and not yet all."""
    blobs = user.folder / f"hub/models--{name.replace('/', '--')}/blobs"
    with suppress(FileNotFoundError):  # it has got its name in this moment
        return any(path.stat().st_size for path in blobs.glob("*.incomplete"))
    return False


def test_a_complete_release_through_everything_that_the_hubs_client_does(pair: Pair, shared: Shared, user: User) -> None:
    name, shard, commit = shared.name, "model.safetensors", shared.commit
    with user.program(endpoint_of(pair.node)) as program:
        assert program.ask("snapshot", name) == program.ask("snapshot", name, commit) == digests(shared.files)
        assert program.ask("file", name, "config.json", commit[:12]) == digest(shared.files["config.json"])
        assert program.ask("size", name, shard) == len(shared.files[shard])
        in_root = {(f"{name}/{path}", "file", len(data)) for path, data in shared.files.items()}
        assert {tuple(row) for row in program.ask("listing", name)} == in_root | {(f"{name}/extra", "directory", 0)}
        assert bytes.fromhex(program.ask("part", name, shard, 1000, 1010)) == shared.files[shard][1000:1010]
        assert program.ask("metadata", name) == ["all.a", "all.b"]
        assert program.ask("file", name, "adapter_config.json")["error"].endswith("EntryNotFoundError")  # "Remote" from 1.0 on
        assert program.ask("file", name, "config.json", "dev")["error"] == "RevisionNotFoundError"
        assert program.ask("file", "lab/none", "config.json")["error"] == "RepositoryNotFoundError"
        upload = program.ask("upload", name)
        assert (upload["error"], "read-only" in upload["said"]) == ("HfHubHTTPError", True)
        # The one line that users see of us (not before 1.0), and what clients remember.
        assert program.said.count(f"served from swarm, signed by {shared.publisher}") <= 1
    repo = user.folder / "hub/models--lab--all"
    assert (repo / "refs/main").read_text() == commit
    assert (repo / ".no_exist" / commit / "adapter_config.json").exists()
    # Blobs are called as on the Hub.
    blobs = {path.name for path in (repo / "blobs").iterdir()}
    assert blobs == {row["etag"] for row in pair.node.ok("show", name)["files"]}


def test_the_hf_command_downloads(pair: Pair, shared: Shared, user: User, tmp_path: Path) -> None:
    endpoint = endpoint_of(pair.node)
    done = user.hf(endpoint, "download", shared.name, "--local-dir", str(tmp_path / "here"))
    assert done.returncode == 0, done.stderr
    here = tree_bytes(tmp_path / "here")
    assert {path: data for path, data in here.items() if not path.startswith(".cache")} == shared.files
    assert pair.node.home.joinpath(layout.GATEWAY_TOKEN).stat().st_mode & 0o777 == 0o600
    # Neither what the user showed us nor what leads to us is written down.
    assert SECRET not in pair.node.log
    assert endpoint.rpartition("/")[2] not in pair.node.log
    assert not [path for path in pair.node.home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_what_was_downloaded_is_what_the_endpoint_says_by_the_hubs_own_check(pair: Pair, shared: Shared, tmp_path: Path) -> None:
    user, endpoint = User(NEWEST, tmp_path), endpoint_of(pair.node)
    done = user.hf(endpoint, "download", shared.name)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"served from swarm, signed by {shared.publisher}") == 1
    verified = user.hf(endpoint, "cache", "verify", shared.name)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_model_and_its_tokenizer_load_by_name(pair: Pair, tmp_path: Path) -> None:
    folder = str(tmp_path / "bert")
    with User(NEWEST, tmp_path).program(endpoint_of(pair.node)) as program:
        made, spoken = program.ask("make", "bert", folder), program.ask("make_tokenizer", folder)
        share(pair, "lab/bert", tree_bytes(tmp_path / "bert"))
        assert program.ask("compare", folder, "lab/bert") == made
        assert program.ask("tokens", "lab/bert") == spoken == [1, 2, 3, 0]


def test_a_release_is_served_to_all_generations_while_it_is_fetched(pair: Pair, tmp_path: Path) -> None:
    name = "lab/arriving"
    files = model(name, 24 * MIB, 24 * MIB)
    users = [User(generation, tmp_path / generation.version) for generation in GENERATIONS]
    with ExitStack() as stack:
        programs = [stack.enter_context(user.program(endpoint_of(pair.node))) for user in users]
        for program in programs:
            program.ask("scan")  # imports, which take longer than the fetch of what is asked for first
        share(pair, name, files, "--detach", "--max-down", "4Mi")
        for program in programs:
            program.begin("snapshot", name)
        for user in users:
            # The client has been told what there is, has begun to download, and the fetch goes on.
            wait_until(partial(has_begun, user, name), 60, "a download")
        assert pair.node.release(name)["proven"] < size_of(files)
        pair.node.hurry(name)
        for program in programs:
            assert program.end() == digests(files)


def test_what_is_asked_for_comes_first_and_a_killed_download_goes_on(pair: Pair, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "z.bin.gguf": b"GGUF" + some_bytes("resume", 40 * MIB)}
    share(pair, "lab/resume", files, "--detach", "--max-down", "4Mi")
    url, data = f"{endpoint_of(pair.node)}/lab/resume/resolve/main/z.bin.gguf", files["z.bin.gguf"]
    # The end of the file is asked for, and comes before most of the rest.
    assert curl("-r", "-1000", url) == data[-1000:]
    at = pair.node.release("lab/resume")["proven"]
    assert at < len(data) * 3 // 4, at
    target = tmp_path / "z"
    with subprocess.Popen(["curl", "-sS", "-o", str(target), url]) as killed:
        wait_until(lambda: target.exists() and target.stat().st_size > 0, 60, "bytes of a file under way")
        killed.kill()
    have = target.stat().st_size
    assert 0 < have < len(data)
    assert target.read_bytes() == data[:have]
    pair.node.hurry("lab/resume")
    curl("-C", "-", "-o", str(target), url)
    assert target.read_bytes() == data


def test_ranges_by_curl(pair: Pair, shared: Shared, tmp_path: Path) -> None:
    base = f"{endpoint_of(pair.node)}/{shared.name}/resolve/{shared.commit}"
    shard, config = shared.files["model.safetensors"], shared.files["config.json"]
    size = len(shard)
    asked = {
        "0-0": shard[:1],
        "5-": shard[5:],
        "-7": shard[-7:],
        f"-{2 * size}": shard,
        "1048570-1048590": shard[1048570:1048591],
    }
    for ask, expected in {**asked, f"9-{2 * size}": shard[9:]}.items():
        status = curl("-r", ask, "-o", str(tmp_path / "part"), "-w", "%{http_code}", f"{base}/model.safetensors")
        assert (status, (tmp_path / "part").read_bytes()) == (b"206", expected)
    # Several parts at once are answered with the whole, which a server may do.
    assert curl("-r", "0-1,5-6", f"{base}/model.safetensors") == shard
    behind = curl("-D", "-", "-o", str(tmp_path / "x"), "-w", "%{http_code}", "-r", f"{size}-", f"{base}/model.safetensors")
    assert behind.endswith(b"416")
    assert f"content-range: bytes */{size}\r\n" in behind.decode().lower()
    # Two files over one connection, and a head that says the size.
    assert curl(f"{base}/config.json", "-r", "0-0", f"{base}/config.json") == config[:1] * 2
    head = curl("-I", f"{base}/model.safetensors").decode().lower()
    assert f"content-length: {size}" in head
    assert f'etag: "{digest(shard)}"' in head


def test_half_a_file_goes_on_by_curl_and_several_connections_share_one(pair: Pair, shared: Shared, tmp_path: Path) -> None:
    url, data = f"{endpoint_of(pair.node)}/{shared.name}/resolve/main/model.safetensors", shared.files["model.safetensors"]
    target = tmp_path / "half"
    target.write_bytes(data[:MIB])
    got = curl("-C", "-", "-o", str(target), "-w", "%{http_code} %{size_download}", url)
    assert got == f"206 {len(data) - MIB}".encode()
    assert target.read_bytes() == data
    # As download managers do it.
    cuts = [0, MIB - 1, MIB + 7, 2 * MIB, len(data)]
    parts = [(tmp_path / str(begin), f"{begin}-{end - 1}") for begin, end in pairwise(cuts)]
    begun = [["-r", ask, "-o", str(path), url] for path, ask in parts]
    curl("-Z", *begun[0], *(word for more in begun[1:] for word in ("--next", "-sS", *more)))
    assert b"".join(path.read_bytes() for path, _ in parts) == data


SPELLINGS = (
    "../../../../../etc/passwd",
    "%2e%2e/%2e%2e/run/gateway-token",
    "..%2f..%2f..%2frun%2fgateway-token",
    "%252e%252e/config.json",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "/config.json",
    "./config.json",
    "extra/../config.json",
    "extra//notes%20with%20a%20space.txt",
    "config.json/",
    "config.json%00",
    "%00",
    "config.json%0d%0aX-Repo-Commit:%20x",
    "CONFIG.JSON",
)


def test_no_spelling_of_a_path_leads_to_another_file(pair: Pair, shared: Shared, tmp_path: Path) -> None:
    base = f"{endpoint_of(pair.node)}/{shared.name}/resolve/main/"
    asked = [word for spelling in SPELLINGS for word in ("-o", str(tmp_path / "answer"), base + spelling)]
    answers = curl("--path-as-is", "-w", "%{http_code} %header{x-error-code}\n", *asked).decode().splitlines()
    assert dict(zip(SPELLINGS, answers, strict=True)) == dict.fromkeys(SPELLINGS, "404 EntryNotFound")


def test_a_file_too_large_for_a_plain_download_is_downloaded(pair: Pair, tmp_path: Path) -> None:
    size = 50 * 1000**3 + 4096  # over the MAX_HTTP_DOWNLOAD_SIZE of huggingface_hub
    node = pair.site.node("large", start=False)
    release = hold_sparse(node.home, 0, SHARDS * size)
    name, path = str(release.manifest.name), release.pieces.paths[0]
    node.start()
    bundle = tmp_path / "large.modelp2p"
    node.ok("show", name, "--bundle", str(bundle))
    node.ok("trust", "add", str(bundle), "--name", name)
    endpoint = endpoint_of(node)
    for generation in GENERATIONS:
        user = User(generation, tmp_path / generation.version)
        with user.program(endpoint) as program:
            # A listing may say the size, and a range reaches the end.
            assert bytes.fromhex(program.ask("part", name, path, size - 9, size)) == bytes(9)
            assert program.ask("size", name, path) is None
            if generation is OLDEST:
                # It refuses what is too large, and what does not say how large it is.
                assert program.ask("file", name, path)["error"] == "LocalEntryNotFoundError"
                continue
            program.begin("file", name, path)
            wait_until(partial(has_begun, user, name), 60, "a download")
            program.process.kill()
    assert curl("-r", f"{size - 9}-", f"{endpoint}/{name}/resolve/main/{path}") == bytes(9)


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
    asked, expected = ("-r", "0-9", f"{endpoint}/lab/left/resolve/main/config.json"), files["config.json"][:10]
    first = curl(*asked)
    # What was requested before comes first: on a busy machine that takes longer than an answer may, and clients ask again.
    assert first == expected or b"nobody had its first bytes" in first, first
    assert curl("--retry", "5", *asked) == expected
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
