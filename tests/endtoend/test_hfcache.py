"""Both ways between a node and the Hugging Face cache, judged by huggingface_hub and transformers themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modelp2p.protocol.hfcache import Listed, encode_tree
from modelp2p.protocol.layout import RECORD
from modelp2p.protocol.record import decode_record
from tests.endtoend.hub import Hub
from tests.endtoend.site import MIB, inodes, model, size_of, snapshot, weights
from tests.nodes import tree_bytes

if TYPE_CHECKING:
    from tests.endtoend.conftest import Pair
    from tests.nodes import Node

pytestmark = pytest.mark.swarm


@dataclass(frozen=True)
class Generation:
    """A version of huggingface_hub, and the interpreter of an environment that has it."""

    version: str
    python: str
    knows_listings: bool = True
    """Whether it keeps the listing of a commit, and looks whether a snapshot is complete."""


GENERATIONS = (Generation("2.4", sys.executable),)
"""Those that users have. Further ones need environments of their own; the first test also needs transformers in them."""
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
SHARD = "model-00001-of-00002.safetensors"


@dataclass(frozen=True)
class Client:
    """A user's program, offline unless a command names an endpoint."""

    generation: Generation
    hf_home: Path

    @property
    def cache(self) -> Path:
        return self.hf_home / "hub"

    def name(self, name: str) -> str:
        """A name of its own for each generation: they share the nodes, and the nodes share files of equal content."""
        return f"{name}-{self.generation.version}"

    def repo(self, name: str) -> Path:
        return self.cache / f"models--{name.replace('/', '--')}"

    def run(self, *commands: list[str], offline: bool = True) -> list[Any]:
        """One result for each command, or the class of what it raised."""
        environment = {**os.environ, "HF_HOME": str(self.hf_home), "HF_HUB_OFFLINE": str(int(offline)), "TQDM_DISABLE": "1"}
        script = Path(__file__).with_name("hf_client.py")
        done = subprocess.run(
            [self.generation.python, str(script), json.dumps(commands)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout)
        assert len(results) == len(commands)
        return list(results)


@pytest.fixture(params=GENERATIONS, ids=[f"huggingface_hub {generation.version}" for generation in GENERATIONS])
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param, Path(os.environ["HF_HOME"]))


def trusted(node: Node, link: str, peer: Node, name: str) -> None:
    done = node.run("trust", "add", link, "--name", name, "--peer", peer.address, "--timeout", "20")
    # The patterns of one module never meet, and the same one twice is no error.
    assert done.code == 0, done.err


def fetch(node: Node, ref: str, peer: Node, *more: str) -> dict[str, Any]:
    return node.ok("fetch", ref, "--peer", peer.address, "--timeout", "20", *more)


def test_a_fetched_model_loads_offline_by_its_name(pair: Pair, client: Client, tmp_path: Path) -> None:
    name = client.name("lab/bert")
    (made,) = client.run(["make", str(tmp_path / "bert")])
    published = pair.seed.publish(tmp_path / "bert", name)
    trusted(pair.node, published["link"], pair.seed, name)
    fetched = fetch(pair.node, published["link"], pair.seed)
    assert client.run(["snapshot", name], ["load", name]) == [fetched["hf_cache"], made]


def test_removing_a_model_from_the_cache_loses_nothing_here(pair: Pair, client: Client) -> None:
    name = client.name("lab/removed")
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
    in_cache = [fetched["hf_cache"], {"revisions": [[name, fetched["revision"], ["main"], len(files)]], "warnings": []}]
    assert client.run(["snapshot", name], ["scan"]) == in_cache
    if client.generation.knows_listings:
        shown = pair.node.ok("show", name)["files"]
        hub = Hub(name, fetched["revision"], files, frozenset(item["path"] for item in shown if item["etag"] == item["sha256"]))
        with hub.serve() as endpoint:
            (checked,) = client.run(["verify", name, endpoint], offline=False)
        assert checked == {"checked": len(files), "wrong": [], "missing": [], "extra": []}
    assert client.run(["remove", fetched["revision"]]) == [size_of(files)]
    assert not list(repo.glob("blobs/*"))
    assert snapshot(store.resolve()) == before
    assert pair.node.ok("verify", name)["ok"]

    # Two at once put it back.
    both = [pair.node.spawn("materialize", name, "-q") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert {out.decode().strip() for out, _ in outputs} == {fetched["hf_cache"]}
    assert client.run(["snapshot", name], ["scan"]) == in_cache
    assert tree_bytes(Path(fetched["hf_cache"])) == files
    assert not [path for path in repo.rglob("*") if path.name.startswith(".")]


def test_the_cache_stays_shut_for_a_publisher_nobody_trusts(pair: Pair, client: Client) -> None:
    name = client.name("lab/stranger")
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
    name = client.name("lab/part")
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
    incomplete = ["IncompleteSnapshotError" if client.generation.knows_listings else part["hf_cache"]]
    assert client.run(["snapshot", name]) == incomplete
    assert fetch(pair.node, name, pair.seed, "--no-hf-cache")["hf_cache"] is None
    assert client.run(["snapshot", name]) == incomplete
    fetch(pair.node, name, pair.seed)
    assert client.run(["snapshot", name], ["snapshot", name, revision]) == [part["hf_cache"]] * 2
    assert tree_bytes(Path(part["hf_cache"])) == files


def test_what_the_cache_holds_otherwise_is_left_and_the_fetch_is_none_the_worse(pair: Pair, client: Client) -> None:
    name = client.name("lab/otherwise")
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
    name = client.name("hub/commit")
    hub = commit_of(name)
    caches = [tmp_path / "first", tmp_path / "second"]
    with hub.serve() as endpoint:
        client.run(*(["download", name, endpoint, str(cache)] for cache in caches), offline=False)
    before = [snapshot(cache) for cache in caches]
    for node in (pair.seed, pair.node):
        node.run("keys", "init", "lab", "--no-passphrase")
    if not client.generation.knows_listings:
        refused = pair.seed.run("publish", "--from-hf", name, "--cache-dir", str(caches[0]), "--json")
        assert (refused.code, refused.json["error"]["kind"]) == (3, "NOT_FOUND")
        assert "does not say which files" in refused.json["error"]["message"]
        return
    first = pair.seed.ok("publish", "--from-hf", name, "--cache-dir", str(caches[0]))
    second = pair.node.ok("publish", "--from-hf", f"{name}@{COMMIT}", "--cache-dir", str(caches[1]), "--as", name)
    assert (first["name"], first["revision"], first["files"]) == (name, COMMIT, len(hub.files))
    assert first["publisher"] != second["publisher"]
    assert first["info_hash"] == second["info_hash"]
    shown = pair.seed.ok("show", name)
    assert shown["origin"] == {"repo": name, "commit": COMMIT}
    assert shown["web_seeds"] == [f"https://huggingface.co/{name}/resolve/"]
    assert {item["path"]: item["etag"] for item in shown["files"]} == {path: hub.etag(path) for path in hub.files}
    # Nothing was copied, written or left there.
    assert [snapshot(cache) for cache in caches] == before
    blobs = set(inodes(caches[0]).values())
    assert set(inodes(first["path"]).values()) <= blobs
    again = pair.seed.ok("publish", "--from-hf", name, "--cache-dir", str(caches[0]))
    assert again["link"] == first["link"]

    # A third one who fetches it has the cache that huggingface_hub would have made, listing included.
    third = pair.site.node(f"third-{client.generation.version}")
    trusted(third, first["link"], pair.seed, name)
    fetched = fetch(third, first["link"], pair.seed)
    assert tree_bytes(Path(fetched["hf_cache"])) == hub.files
    ours, theirs = client.repo(name), caches[0] / client.repo(name).name
    assert {path.name for path in (ours / "blobs").iterdir()} == {path.name for path in (theirs / "blobs").iterdir()}
    listing = Path("trees") / f"{COMMIT}.json"
    assert (ours / listing).read_bytes() == (theirs / listing).read_bytes()
    assert (ours / "refs/main").read_bytes() == (theirs / "refs/main").read_bytes()
    hub.requests.clear()
    with hub.serve() as endpoint:
        assert client.run(["download", name, endpoint, str(client.cache)], offline=False) == [fetched["hf_cache"]]
    assert not [request for request in hub.requests if "/resolve/" in request]


def test_a_damaged_blob_is_not_published(pair: Pair, client: Client, tmp_path: Path) -> None:
    name = client.name("hub/damaged")
    hub = commit_of(name)
    with hub.serve() as endpoint:
        client.run(["download", name, endpoint, str(tmp_path)], offline=False)
    blob = client.repo(name).name + "/blobs/" + hub.etag("model.safetensors")
    data = bytearray(hub.files["model.safetensors"])
    data[MIB] ^= 1
    (tmp_path / blob).write_bytes(data)
    pair.seed.run("keys", "init", "lab", "--no-passphrase")
    if not client.generation.knows_listings:
        (tmp_path / client.repo(name).name / "trees").mkdir()
        rows = [Listed(path, len(data), bytes.fromhex(hub.etag(path))) for path, data in hub.files.items()]
        (tmp_path / client.repo(name).name / "trees" / f"{COMMIT}.json").write_bytes(encode_tree(rows))
    done = pair.seed.run("publish", "--from-hf", name, "--cache-dir", str(tmp_path), "--json")
    assert (done.code, done.json["error"]["kind"]) == (4, "BAD_HASH")
    assert "model.safetensors" in done.json["error"]["message"]
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".modelp2p")]


@pytest.mark.parametrize("suffix", [".incomplete", ".0a1b2c3d.incomplete"], ids=["huggingface_hub 0.36", "huggingface_hub 2"])
def test_an_interrupted_download_is_finished_from_the_swarm(pair: Pair, client: Client, suffix: str) -> None:
    name = client.name(f"lab/interrupted{len(suffix)}")
    files = model(name, 4 * MIB, MIB + 5)
    published = pair.seed.publish(pair.site.write(files), name)
    trusted(pair.node, published["link"], pair.seed, name)
    blobs = client.repo(name) / "blobs"
    blobs.mkdir(parents=True)
    for item in pair.seed.ok("show", name)["files"]:
        data = files[item["path"]]
        if item["path"] == SHARD:
            (blobs / f"{item['etag']}{suffix}").write_bytes(data[: 3 * MIB])
        else:
            (blobs / item["etag"]).write_bytes(data)
    before = snapshot(blobs)
    done = pair.node.ok("adopt", published["link"], "--from-hf", "--peer", pair.seed.address, "--timeout", "20")
    assert (done["from_peers"], done["adopted"]) == (MIB, size_of(files) - MIB)
    after = snapshot(blobs)
    assert {path: after[path] for path in before} == before
    assert client.run(["snapshot", name]) == [done["hf_cache"]]
    assert tree_bytes(Path(done["hf_cache"])) == files


def test_a_snapshot_given_as_a_folder_is_adopted_by_its_blobs(pair: Pair, client: Client) -> None:
    name = client.name("hub/given")
    hub = commit_of(name)
    with hub.serve() as endpoint:
        (folder,) = client.run(["download", name, endpoint, str(client.cache)], offline=False)
    published = pair.seed.publish(pair.site.write(hub.files), name)
    done = pair.node.ok("adopt", published["link"], folder, "--peer", pair.seed.address, "--timeout", "20")
    assert done["from_peers"] == 0
    assert done["adopted"] == size_of(hub.files) - len(hub.files[".gitattributes"])
