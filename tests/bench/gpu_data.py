"""The releases that the GPU benchmark loads: seeded random checkpoints in a store of their own, signed by a throwaway publisher.

Random bits, never zeros: nothing compresses them, and a kernel that forgets a word is found. The same files lie in a plain
folder, by hard link, for loaders that know no store.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from modelp2p.loader.staging import bytes_of
from modelp2p.protocol import layout, torrent
from modelp2p.protocol.envelope import Envelope, Signature, encode_envelope, pae
from modelp2p.protocol.kinds import kind_of
from modelp2p.protocol.layers import encode_layers, make_layers
from modelp2p.protocol.manifest import FileEntry, Manifest, content_revision, encode_manifest
from modelp2p.protocol.merkle import leaf_hashes, piece_layer, root_of
from modelp2p.protocol.names import ModelName
from modelp2p.protocol.publisher import encode_chain, keyid_of
from modelp2p.protocol.statement import Statement, payload_info, verify_statement
from tests.releases import Home, publisher

NAME = "bench/model"
CHUNK_BYTES = 64 << 20


def build(folder: Path, size: int, shards: int, tensor_bytes: int, device: torch.device) -> None:
    """A release of about `size` bytes in `folder/home`, its files also in `folder/plain`. Nothing where it is there already.

    Args:
        folder: where; on the file system that is to be measured.
        size: bytes of all files.
        shards: files.
        tensor_bytes: of one tensor; every eighth is cut into 64 small ones.
        device: makes the random numbers.
    """
    done = folder / "complete"
    wanted = json.dumps([size, shards, tensor_bytes])
    if done.exists() and done.read_text() == wanted:
        return
    plain = folder / "plain"
    plain.mkdir(parents=True, exist_ok=True)
    paths = [plain / f"model-{number:05}.safetensors" for number in range(shards)]
    for number, path in enumerate(paths):
        _write(path, number, max(1, size // shards // tensor_bytes), tensor_bytes, device)
    with ThreadPoolExecutor(min(shards, os.cpu_count() or 1)) as pool:
        hashed = list(pool.map(_hashed, paths))
    statement = _statement([entry for entry, _ in hashed], {entry.path: leaves for entry, leaves in hashed})
    release = verify_statement(statement)
    home = Home(folder / "home")
    home.trust(pattern="bench/*")
    tree = home.path / layout.tree_of(release.info_hash, release.manifest.revision)
    tree.mkdir(parents=True)
    for path in paths:
        os.link(path, tree / path.name)
    home.state(statement)
    home.record(release)
    link = home.path / layout.model_of(release.manifest.name, release.manifest.revision)
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(tree, link.parent))
    done.write_text(wanted)


def shards_of(folder: Path) -> list[Path]:
    """The files, in order."""
    return sorted((folder / "plain").glob("*.safetensors"))


def reference(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and bytes of every tensor, read here by the plainest means: nobody's loader."""
    for path in shards_of(folder):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for name, info in header.items():
                begin, end = info["data_offsets"]
                file.seek(8 + length + begin)
                yield name, torch.frombuffer(bytearray(file.read(end - begin)), dtype=torch.uint8)


def _write(path: Path, seed: int, tensors: int, tensor_bytes: int, device: torch.device) -> None:
    header: dict[str, object] = {}
    at = 0
    for number in range(tensors):
        parts = 64 if number % 8 == 7 else 1
        for part in range(parts):
            size = tensor_bytes // parts
            header[f"layers.{seed}.{number}.{part}"] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [at, at + size]}
            at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator(device).manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, at, CHUNK_BYTES):
            count = min(CHUNK_BYTES, at - begin)
            words = torch.randint(-(2**63), 2**63 - 1, (count // 8,), generator=generator, device=device).cpu()
            file.write(bytes_of(words))
    path.chmod(0o444)


def _hashed(path: Path) -> tuple[FileEntry, bytes]:
    digest, found = hashlib.sha256(), bytearray()
    with path.open("rb") as file:
        # Chunks are whole leaves, so the leaves of the file are those of its chunks.
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            found += leaf_hashes(chunk)
    size, leaves = path.stat().st_size, bytes(found)
    return FileEntry(path.name, size, root_of(leaves), digest.digest(), "sha256", None, kind_of(path.name)), leaves


def _statement(entries: list[FileEntry], leaves: dict[str, bytes]) -> Statement:
    files = tuple(sorted(entries, key=lambda entry: entry.path.encode()))
    piece_length = torrent.piece_length_for(sum(entry.size for entry in files))
    revision = content_revision(files)
    info_hash = torrent.info_hash(payload_info(revision, files, piece_length))
    manifest = Manifest(ModelName.parse(NAME), revision, 1_700_000_000, 1, info_hash, piece_length, files)
    layers = {entry.root: piece_layer(leaves[entry.path], piece_length) for entry in files if entry.size > piece_length}
    payload, signer = encode_manifest(manifest), publisher()
    signature = Signature(keyid_of(signer.key.public), signer.key.sign(pae(payload)))
    return Statement(
        encode_envelope(Envelope(payload, (signature,))),
        encode_layers(make_layers(piece_length, layers)),
        encode_chain([signer.document]),
    )
