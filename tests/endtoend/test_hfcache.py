"""Both ways between a node and the Hugging Face cache, judged by huggingface_hub and transformers themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modelp2p.protocol.layout import RECORD
from modelp2p.protocol.record import decode_record
from tests.clients.programs import GENERATIONS, NEWEST, NOWHERE, OLDEST, Generation, Program, environment_of
from tests.endtoend.hub import Hub
from tests.endtoend.site import MIB, inodes, model, size_of, snapshot, weights
from tests.nodes import tree_bytes

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair
    from tests.nodes import Node

pytestmark = pytest.mark.swarm

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
SHARD = "model-00001-of-00002.safetensors"


@dataclass(frozen=True)
class Client:
    """A user's program and its cache; it reaches nothing but what a command names."""

    generation: Generation
    hf_home: Path
    program: Program

    @property
    def cache(self) -> Path:
        return self.hf_home / "hub"

    def repo(self, name: str) -> Path:
        return self.cache / f"models--{name.replace('/', '--')}"

    def ask(self, *command: str) -> Any:  # noqa: ANN401  # JSON
        return self.program.ask(*command)


@contextmanager
def client_of(generation: Generation, hf_home: Path) -> Iterator[Client]:
    with Program(generation, environment_of(NOWHERE, hf_home)) as program:
        yield Client(generation, hf_home, program)


@pytest.fixture
def client() -> Iterator[Client]:
    """The newest one, with the cache that every command of this test finds by itself."""
    with client_of(NEWEST, Path(os.environ["HF_HOME"])) as newest:
        yield newest


def trusted(node: Node, link: str, peer: Node, name: str) -> None:
    done = node.run("trust", "add", link, "--name", name, "--peer", peer.address, "--timeout", "20")
    # The patterns of one module never meet, and the same one twice is no error.
    assert done.code == 0, done.err


def fetch(node: Node, ref: str, peer: Node, *more: str) -> dict[str, Any]:
    return node.ok("fetch", ref, "--peer", peer.address, "--timeout", "20", *more)


def test_removing_a_model_from_the_cache_loses_nothing_here(pair: Pair, client: Client) -> None:
    name = "lab/removed"
    files = model(name, 2 * MIB, MIB + 5)
    published = pair.seed.publish(pair.site.write(files), name)
    trusted(pair.node, published["link"], pair.seed, name)
    fetched = fetch(pair.node, published["link"], pair.seed)
    repo = client.repo(name)
    assert fetched["hf_cache"] == str(repo / "snapshots" / fetched["revision"])

    # The blobs are the store's own inodes, and loaders need not hash them anew because of that.
    store = Path(fetched["path"])
    assert set(inodes(repo / "blobs").values()) == set(inodes(store).values())
    record = decode_record((store.resolve().parent / RECORD).read_bytes())
    assert record.files.keys() == files.keys()
    assert all(known.matches((store / path).stat()) for path, known in record.files.items())

    before = snapshot(store.resolve())
    in_cache = {"revisions": [[name, fetched["revision"], ["main"], len(files)]], "warnings": []}
    assert (client.ask("cached", name), client.ask("scan")) == (fetched["hf_cache"], in_cache)
    shown = pair.node.ok("show", name)["files"]
    hub = Hub(name, fetched["revision"], files, frozenset(item["path"] for item in shown if item["etag"] == item["sha256"]))
    with hub.serve() as endpoint:
        checked = client.ask("verify", name, endpoint)
    assert checked == {"checked": len(files), "wrong": [], "missing": [], "extra": []}
    assert client.ask("remove", fetched["revision"]) == size_of(files)
    assert not list(repo.glob("blobs/*"))
    assert snapshot(store.resolve()) == before
    assert pair.node.ok("verify", name)["ok"]

    # Two at once put it back.
    both = [pair.node.spawn("materialize", name, "-q") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert {out.decode().strip() for out, _ in outputs} == {fetched["hf_cache"]}
    assert (client.ask("cached", name), client.ask("scan")) == (fetched["hf_cache"], in_cache)
    assert tree_bytes(Path(fetched["hf_cache"])) == files
    assert not [path for path in repo.rglob("*") if path.name.startswith(".")]


def test_the_cache_stays_shut_for_a_publisher_nobody_trusts(pair: Pair, client: Client) -> None:
    name = "lab/stranger"
    published = pair.seed.publish(pair.site.write(model(name, MIB)), name)
    arguments = ("fetch", published["link"], "--peer", pair.seed.address, "--timeout", "20")
    done = pair.node.run(*arguments)
    assert done.code == 0
    assert "HF cache" not in done.out
    assert "modelp2p trust add 'magnet:?" in done.err
    assert f"--name {name}" in done.err
    assert pair.node.ok(*arguments)["hf_cache"] is None
    refused = pair.node.run("materialize", name, "--json")
    assert (refused.code, refused.json["error"]["kind"]) == (4, "UNKNOWN_PUBLISHER")
    assert f"--name {name}" in refused.json["error"]["hint"]
    assert not client.cache.exists()
    trusted(pair.node, published["link"], pair.seed, name)
    shown = pair.node.ok("materialize", name)
    assert Path(shown["hf_cache"]).is_dir()
    assert shown["missing"] == shown["copied_bytes"] == 0


def test_a_part_of_a_release_is_no_complete_snapshot_and_the_ref_moves_only_by_name(pair: Pair, client: Client) -> None:
    name = "lab/part"
    files = model(name, MIB, MIB)
    published = pair.seed.publish(pair.site.write(files), name)
    trusted(pair.node, published["link"], pair.seed, name)
    main = client.repo(name) / "refs" / "main"
    main.parent.mkdir(parents=True)
    main.write_text(COMMIT)
    part = fetch(pair.node, published["link"], pair.seed, "--include", "*.json")
    assert main.read_text() == COMMIT
    revision = part["revision"]
    assert fetch(pair.node, f"{name}@{revision}", pair.seed, "--include", "*.json")["hf_cache"] == part["hf_cache"]
    assert main.read_text() == COMMIT
    fetch(pair.node, name, pair.seed, "--include", "*.json")
    assert main.read_text() == revision
    assert set(tree_bytes(Path(part["hf_cache"]))) == {"config.json"}
    assert client.ask("cached", name)["error"] == "IncompleteSnapshotError"
    assert fetch(pair.node, name, pair.seed, "--no-hf-cache")["hf_cache"] is None
    assert client.ask("cached", name)["error"] == "IncompleteSnapshotError"
    fetch(pair.node, name, pair.seed)
    assert client.ask("cached", name) == client.ask("cached", name, revision) == part["hf_cache"]
    assert tree_bytes(Path(part["hf_cache"])) == files


def test_every_generation_reads_the_cache_that_we_write_where_no_endpoint_answers(pair: Pair, tmp_path: Path) -> None:
    name = "lab/every"
    files = model(name, 2 * MIB, MIB + 5)
    published = pair.seed.publish(pair.site.write(files), name)
    trusted(pair.node, published["link"], pair.seed, name)
    fetch(pair.node, published["link"], pair.seed, "--no-hf-cache", "--include", "*.json")
    with ExitStack() as stack:
        clients = [stack.enter_context(client_of(generation, tmp_path / generation.version)) for generation in GENERATIONS]
        for client in clients:
            part = pair.node.ok("materialize", name, "--cache-dir", str(client.cache))
            found = client.ask("cached", name)
            if client.generation.keeps_listings:
                assert found["error"] == "IncompleteSnapshotError"
            else:
                assert found == part["hf_cache"]
        fetch(pair.node, name, pair.seed, "--no-hf-cache")
        for client in clients:
            whole = pair.node.ok("materialize", name, "--cache-dir", str(client.cache))
            assert client.ask("cached", name) == client.ask("cached", name, whole["revision"]) == whole["hf_cache"]
            assert tree_bytes(Path(whole["hf_cache"])) == files
            # It asks, hears nothing, and makes do with what it has.
            assert client.ask("snapshot", name).keys() == files.keys()
            assert client.ask("scan") == {"revisions": [[name, whole["revision"], ["main"], len(files)]], "warnings": []}
            assert client.ask("remove", whole["revision"]) == size_of(files)
            assert not list(client.repo(name).glob("blobs/*"))
    assert pair.node.ok("verify", name)["ok"]


def test_what_the_cache_holds_otherwise_is_left_and_the_fetch_is_none_the_worse(pair: Pair, client: Client) -> None:
    name = "lab/otherwise"
    published = pair.seed.publish(pair.site.write(model(name, MIB)), name)
    trusted(pair.node, published["link"], pair.seed, name)
    fetched = fetch(pair.node, published["link"], pair.seed, "--no-hf-cache")
    blob = client.repo(name) / "blobs" / next(item["etag"] for item in pair.node.ok("show", name)["files"])
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"something else")
    before = snapshot(client.cache)
    done = pair.node.run("fetch", name)
    assert done.code == 0
    assert f"{blob}' has 14 bytes instead of" in done.err
    refused = pair.node.run("materialize", name)
    assert refused.code == 1
    assert snapshot(client.cache) == before
    assert fetched["hf_cache"] is None


def commit_of(name: str) -> Hub:
    """A commit as the Hub has them: a hidden file, an empty one, a folder, and text that is in LFS all the same."""
    files = {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": f"# {name}\n".encode(),
        "config.json": json.dumps({"name": name}).encode(),
        "empty.txt": b"",
        "onnx/model.safetensors": weights(f"{name}.onnx", 3 * MIB + 5),
        "model.safetensors": weights(f"{name}.main", 4 * MIB),
        "tokenizer.json": json.dumps({name: list(range(1000))}).encode(),
    }
    return Hub(name, COMMIT, files, frozenset({"onnx/model.safetensors", "model.safetensors", "tokenizer.json"}))


def test_a_cached_commit_is_one_release_whoever_publishes_it(pair: Pair, client: Client, tmp_path: Path) -> None:
    name = "hub/commit"
    hub = commit_of(name)
    caches = oldest, older, newest = [tmp_path / generation.version for generation in GENERATIONS]
    with hub.serve() as endpoint:
        for generation, cache in zip(GENERATIONS, caches, strict=True):
            with client_of(generation, tmp_path) as other:
                other.ask("download", name, endpoint, str(cache))
    before = [snapshot(cache) for cache in caches]
    for node in (pair.seed, pair.node):
        node.run("keys", "init", "lab", "--no-passphrase")
    first = pair.seed.ok("publish", "--from-hf", name, "--cache-dir", str(newest))
    second = pair.node.ok("publish", "--from-hf", f"{name}@{COMMIT}", "--cache-dir", str(older), "--as", name)
    assert (first["name"], first["revision"], first["files"]) == (name, COMMIT, len(hub.files))
    assert first["publisher"] != second["publisher"]
    assert first["info_hash"] == second["info_hash"]
    shown = pair.seed.ok("show", name)
    assert shown["origin"] == {"repo": name, "commit": COMMIT}
    assert shown["web_seeds"] == [f"https://huggingface.co/{name}/resolve/"]
    assert {item["path"]: item["etag"] for item in shown["files"]} == {path: hub.etag(path) for path in hub.files}
    # Nothing was copied, written or left there.
    assert [snapshot(cache) for cache in caches] == before
    blobs = set(inodes(newest).values())
    assert set(inodes(first["path"]).values()) <= blobs
    again = pair.seed.ok("publish", "--from-hf", name, "--cache-dir", str(newest))
    assert again["link"] == first["link"]
    refused = pair.seed.run("publish", "--from-hf", name, "--cache-dir", str(oldest), "--json")
    assert (refused.code, refused.json["error"]["kind"]) == (3, "NOT_FOUND")
    assert "does not say which files" in refused.json["error"]["message"]

    # A third one who fetches it has the cache that huggingface_hub would have made, listing included.
    third = pair.site.node("third")
    trusted(third, first["link"], pair.seed, name)
    fetched = fetch(third, first["link"], pair.seed)
    assert tree_bytes(Path(fetched["hf_cache"])) == hub.files
    ours, theirs = client.repo(name), newest / client.repo(name).name
    assert {path.name for path in (ours / "blobs").iterdir()} == {path.name for path in (theirs / "blobs").iterdir()}
    listing = Path("trees") / f"{COMMIT}.json"
    assert (ours / listing).read_bytes() == (theirs / listing).read_bytes()
    assert (ours / "refs/main").read_bytes() == (theirs / "refs/main").read_bytes()
    hub.requests.clear()
    with hub.serve() as endpoint:
        assert client.ask("download", name, endpoint, str(client.cache)) == fetched["hf_cache"]
    assert not [request for request in hub.requests if "/resolve/" in request]


def test_a_damaged_blob_is_not_published(pair: Pair, client: Client, tmp_path: Path) -> None:
    name = "hub/damaged"
    hub = commit_of(name)
    with hub.serve() as endpoint:
        client.ask("download", name, endpoint, str(tmp_path))
    blob = client.repo(name).name + "/blobs/" + hub.etag("model.safetensors")
    data = bytearray(hub.files["model.safetensors"])
    data[MIB] ^= 1
    (tmp_path / blob).write_bytes(data)
    pair.seed.run("keys", "init", "lab", "--no-passphrase")
    done = pair.seed.run("publish", "--from-hf", name, "--cache-dir", str(tmp_path), "--json")
    assert (done.code, done.json["error"]["kind"]) == (4, "BAD_HASH")
    assert "model.safetensors" in done.json["error"]["message"]
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".modelp2p")]


@pytest.mark.parametrize("generation", [OLDEST, NEWEST], ids=lambda generation: generation.version)
def test_an_interrupted_download_is_finished_from_the_swarm(pair: Pair, generation: Generation) -> None:
    name = f"lab/interrupted-{generation.version}"
    files = model(name, 4 * MIB, MIB + 5)
    published = pair.seed.publish(pair.site.write(files), name)
    trusted(pair.node, published["link"], pair.seed, name)
    hf_home = Path(os.environ["HF_HOME"])
    blobs = hf_home / f"hub/models--{name.replace('/', '--')}/blobs"
    blobs.mkdir(parents=True)
    for item in pair.seed.ok("show", name)["files"]:
        data = files[item["path"]]
        if item["path"] == SHARD:
            (blobs / f"{item['etag']}{generation.suffix}").write_bytes(data[: 3 * MIB])
        else:
            (blobs / item["etag"]).write_bytes(data)
    before = snapshot(blobs)
    done = pair.node.ok("adopt", published["link"], "--from-hf", "--peer", pair.seed.address, "--timeout", "20")
    assert (done["from_peers"], done["adopted"]) == (MIB, size_of(files) - MIB)
    after = snapshot(blobs)
    assert {path: after[path] for path in before} == before
    with client_of(generation, hf_home) as client:
        assert client.ask("cached", name) == done["hf_cache"]
    assert tree_bytes(Path(done["hf_cache"])) == files


def test_a_snapshot_given_as_a_folder_is_adopted_by_its_blobs(pair: Pair, client: Client) -> None:
    name = "hub/given"
    hub = commit_of(name)
    with hub.serve() as endpoint:
        folder = client.ask("download", name, endpoint, str(client.cache))
    published = pair.seed.publish(pair.site.write(hub.files), name)
    done = pair.node.ok("adopt", published["link"], folder, "--peer", pair.seed.address, "--timeout", "20")
    assert done["from_peers"] == 0
    assert done["adopted"] == size_of(hub.files) - len(hub.files[".gitattributes"])
