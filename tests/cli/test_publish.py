from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import pytest

from modelp2p.protocol import torrent
from modelp2p.protocol.envelope import decode_envelope, envelope_digest
from modelp2p.protocol.kinds import kind_of
from modelp2p.protocol.manifest import FileEntry, Lineage, Manifest, Origin, content_revision, decode_manifest, encode_manifest
from modelp2p.protocol.merkle import leaf_hashes, root_of
from modelp2p.protocol.names import ModelName, Revision
from modelp2p.protocol.publisher import decode_chain
from modelp2p.protocol.statement import payload_info
from tests.cli.fakes import INFO_HASH, LINK, RELEASE, REVISION, FakeDaemon, FakeReply, memory, modelp2p
from tests.releases import bundle_of

if TYPE_CHECKING:
    from pathlib import Path

    from modelp2p.protocol.codec import Map, Value

PUBLISH_KEYS = ["v", "link", "name", "revision", "info_hash", "manifest", "publisher", "files", "bytes", "seconds"]
CONTENT = {"config.json": b"{}", "model.safetensors": b"x" * 40_000}


def manifest_of(args: Map) -> Manifest:
    """What a daemon states about CONTENT for these arguments."""
    files = tuple(
        FileEntry(path, len(data), root_of(leaf_hashes(data)), hashlib.sha256(data).digest(), "sha256", None, kind_of(path))
        for path, data in CONTENT.items()
    )
    origin = cast("dict[str, str] | None", args.get("origin"))
    revision = Revision(origin["commit"]) if origin else content_revision(files)
    piece_length = torrent.piece_length_for(sum(file.size for file in files))
    rows = cast("list[dict[str, str]]", args["lineage"])
    return Manifest(
        name=ModelName.parse(str(args["name"])),
        revision=revision,
        created=cast("int", args["created"]),
        sequence=cast("int", args["sequence"]),
        info_hash=torrent.info_hash(payload_info(revision, files, piece_length)),
        piece_length=piece_length,
        files=files,
        license=str(args["license"]),
        license_file=cast("str | None", args.get("license_file")),
        lineage=tuple(
            Lineage(row["relation"], row["name"], Revision(row["revision"]), bytes.fromhex(row["info_hash"])) for row in rows
        ),
        origin=Origin(origin["repo"], Revision(origin["commit"])) if origin else None,
        web_seeds=tuple(cast("list[str]", args["web_seeds"])),
        trackers=tuple(cast("list[str]", args["trackers"])),
        notes=tuple(cast("dict[str, str]", args["notes"]).items()),
    )


class Publishing:
    """A daemon's two publish verbs; keeps the envelopes that were committed."""

    def __init__(self, alter: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> None:
        self.alter = alter
        self.envelopes: list[bytes] = []
        self.daemon = FakeDaemon({"publish": self.publish, "publish_commit": self.commit, "show": self.show})

    def publish(self, args: Map, fds: Sequence[int]) -> FakeReply:
        self.manifest = self.alter(manifest_of(args))
        existing = self.envelopes[-1:]
        fds = tuple(memory(data) for data in (encode_manifest(self.manifest), *existing))
        return FakeReply({"token": "t", "mode": "link", "skipped": [".git"]}, fds)

    def show(self, args: Map, fds: Sequence[int]) -> FakeReply:
        return FakeReply(dict(RELEASE), (memory(b"manifest"),))

    def commit(self, args: Map, fds: Sequence[int]) -> FakeReply:
        envelope, chain = (os.pread(fd, 1 << 20, 0) for fd in fds)
        self.envelopes.append(envelope)
        self.committed = args
        publisher = decode_chain(chain)
        publisher.verify_envelope(decode_envelope(envelope))
        manifest = decode_manifest(decode_envelope(envelope).payload)
        result: dict[str, Value] = {
            "link": LINK,
            "name": str(manifest.name),
            "revision": manifest.revision,
            "info_hash": manifest.info_hash.hex(),
            "manifest": envelope_digest(envelope).hex(),
            "publisher": publisher.publisher_id,
            "files": len(manifest.files),
            "bytes": manifest.total_bytes,
            "milliseconds": 5,
            "seeding": True,
        }
        return FakeReply(result)

    @property
    def sequences(self) -> list[int]:
        return [decode_manifest(decode_envelope(envelope).payload).sequence for envelope in self.envelopes]


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A folder to publish, and a key to publish with."""
    (tmp_path / "model").mkdir()
    assert modelp2p("keys", "init", "lab", "--no-passphrase", "-q") == 0
    capsys.readouterr()
    return str(tmp_path / "model")


def test_json_has_the_keys_of_the_contract_first(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("publish", folder, "--as", "lab/model", "--json", daemon=Publishing().daemon) == 0
    body = json.loads(capsys.readouterr().out)
    assert list(body)[: len(PUBLISH_KEYS)] == PUBLISH_KEYS
    assert (body["v"], body["name"], body["files"], body["bytes"]) == (1, "lab/model", 2, 40_002)


def test_what_is_signed_is_shown_and_the_link_is_the_result(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("publish", folder, "--as", "lab/model", daemon=Publishing().daemon) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[0] == f"Link:      {LINK}"
    assert "Seeding:   yes" in output.out
    for said in ("model.safetensors  40.0 kB  weights", "skipped: .git", "hard links", "with key 'lab'"):
        assert said in output.err
    assert modelp2p("publish", folder, "--as", "lab/model", "-q", daemon=Publishing().daemon) == 0
    assert capsys.readouterr() == (f"{LINK}\n", "")


def test_a_daemon_that_leaves_with_the_command_seeds_nothing(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    publishing = Publishing()
    publishing.daemon.is_running = False
    assert modelp2p("publish", folder, "--as", "lab/model", daemon=publishing.daemon) == 0
    output = capsys.readouterr()
    assert "Seeding:   no" in output.out
    assert "Nothing is seeding it yet. Run: modelp2p seed lab/model" in output.err


def test_everything_said_is_in_the_manifest(folder: str) -> None:
    publishing = Publishing()
    flags = f"--license mit --license-file config.json --origin lab/model@{REVISION} --tracker udp://t:1 --no-seed"
    flags += " --note compute=12h --note use=a=b --web-seed https://x/ --base finetune=lab/base --sequence 9"
    descriptors = len(os.listdir("/proc/self/fd"))
    assert modelp2p("publish", folder, "--as", "lab/model", *flags.split(), daemon=publishing.daemon) == 0
    manifest = decode_manifest(decode_envelope(publishing.envelopes[0]).payload)
    assert (manifest.license, manifest.license_file, manifest.sequence) == ("mit", "config.json", 9)
    assert manifest.origin == Origin("lab/model", Revision(REVISION))
    assert manifest.notes == (("compute", "12h"), ("use", "a=b"))
    assert manifest.lineage == (Lineage("finetune", "lab/model", Revision(REVISION), bytes.fromhex(INFO_HASH)),)
    assert publishing.committed == {"token": "t", "seed": False}
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_base_may_be_a_bundle_that_is_checked_here(folder: str, tmp_path: Path) -> None:
    (tmp_path / "base.modelp2p").write_bytes(bundle_of({"a.safetensors": b"base"}))
    publishing = Publishing()
    base = f"merged={tmp_path}/base.modelp2p"
    assert modelp2p("publish", folder, "--as", "lab/model", "--base", base, daemon=publishing.daemon) == 0
    assert [item.relation for item in publishing.manifest.lineage] == ["merged"]
    assert "show" not in [asked.verb for asked in publishing.daemon.asked]


def test_publishing_the_same_again_returns_the_same_envelope(folder: str) -> None:
    publishing = Publishing()
    for _ in range(3):
        assert modelp2p("publish", folder, "--as", "lab/model", daemon=publishing.daemon) == 0
    assert len(set(publishing.envelopes)) == 1
    assert modelp2p("publish", folder, "--as", "lab/model", "--license", "mit", daemon=publishing.daemon) == 0
    assert publishing.sequences == [1, 1, 1, 2]


def test_an_envelope_that_is_not_ours_is_not_taken_for_the_same(folder: str) -> None:
    from tests.releases import statement_of

    publishing = Publishing()
    publishing.envelopes.append(statement_of(CONTENT).envelope)
    assert modelp2p("publish", folder, "--as", "lab/model", daemon=publishing.daemon) == 0
    assert publishing.envelopes[0] != publishing.envelopes[1]


LIES: dict[str, Callable[[Manifest], Manifest]] = {
    "name": lambda manifest: dataclasses.replace(manifest, name=ModelName.parse("lab/other")),
    "license": lambda manifest: dataclasses.replace(manifest, license="proprietary"),
    "sequence": lambda manifest: dataclasses.replace(manifest, sequence=2**53 - 1),
    "web_seeds": lambda manifest: dataclasses.replace(manifest, web_seeds=("https://evil/",)),
    "info-hash": lambda manifest: dataclasses.replace(manifest, info_hash=bytes(32)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_daemon_cannot_make_us_sign_something_else(lie: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    publishing = Publishing(LIES[lie])
    assert modelp2p("publish", folder, "--as", "lab/model", daemon=publishing.daemon) == 4
    error = capsys.readouterr().err
    assert lie in error
    assert "was not signed" in error
    assert publishing.envelopes == []


def test_a_used_sequence_is_not_signed_again(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    publishing = Publishing()
    assert modelp2p("publish", folder, "--as", "lab/model", "--sequence", "5", daemon=publishing.daemon) == 0
    assert modelp2p("publish", folder, "--as", "lab/model", "--license", "mit", "--sequence", "5", daemon=publishing.daemon) == 2
    assert "sequence 5 of lab/model is used" in capsys.readouterr().err
    assert modelp2p("publish", folder, "--as", "lab/model", "--license", "mit", daemon=publishing.daemon) == 0
    assert publishing.sequences == [5, 6]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_can_read_is_not_used(
    mode: int, folder: str, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = own_home / "modelp2p/keys/lab/release.key"
    key.chmod(mode)
    daemon = Publishing().daemon
    assert modelp2p("publish", folder, "--as", "lab/model", daemon=daemon) == 10
    assert f"Hint: chmod 600 {key}" in capsys.readouterr().err
    assert daemon.asked == []


@pytest.mark.slow
def test_passphrases_right_wrong_and_missing(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("correct horse\n")
    wrong.write_text("battery staple\n")
    assert modelp2p("keys", "init", "sealed", "--passphrase-file", str(right), "-q") == 0
    publishing = Publishing()

    def publish(*flags: str) -> int:
        return modelp2p("publish", folder, "--as", "lab/model", "--key", "sealed", *flags, daemon=publishing.daemon)

    assert publish("--passphrase-file", str(wrong)) == 10
    assert "wrong passphrase" in capsys.readouterr().err
    assert publish() == 10
    assert "needs its passphrase" in capsys.readouterr().err
    assert publishing.daemon.asked == [], "nothing is hashed before the key is open"
    assert publish("--passphrase-file", str(right)) == 0


WRONG = {
    "no name": ([], 2),
    "not a name": (["--as", "a/b/c"], 2),
    "no such key": (["--as", "a/b", "--key", "nobody"], 3),
    "note without value": (["--as", "a/b", "--note", "compute"], 2),
    "unknown relation": (["--as", "a/b", "--base", "stolen=a/b"], 2),
    "origin without commit": (["--as", "a/b", "--origin", "a/b"], 2),
    "sequence 0": (["--as", "a/b", "--sequence", "0"], 2),
}


@pytest.mark.parametrize(("flags", "code"), WRONG.values(), ids=WRONG.keys())
def test_wrong_flags_publish_nothing(flags: list[str], code: int, folder: str) -> None:
    publishing = Publishing()
    assert modelp2p("publish", folder, *flags, daemon=publishing.daemon) == code
    assert publishing.daemon.asked == []


def test_only_a_folder_can_be_published(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "nothing"):
        assert modelp2p("publish", str(tmp_path / place), "--as", "a/b", daemon=Publishing().daemon) == 3


def test_without_a_key_the_hint_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert modelp2p("publish", str(tmp_path), "--as", "a/b", daemon=Publishing().daemon) == 3
    assert "modelp2p keys init NAME" in capsys.readouterr().err
