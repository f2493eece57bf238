"""Landlock: a process that entered the sandbox reaches its own folders and nothing else of the home."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from modelp2p.daemon.supervisor import EngineFolders, EngineSwarm
from modelp2p.protocol.engine_wire import FileFailed
from tests.daemon.swarming import PIECE, RealWorld, Shared, quiet_settings, running

if TYPE_CHECKING:
    from pathlib import Path

# Imports first, as the engine does: afterwards there is no reading of modules.
PROBE = """
import encodings.idna, errno, json, os, socket, sys
from modelp2p.daemon.engine import sandbox
home, *tries = sys.argv[1:]
abi = sandbox.enter([home + "/data"], [home + "/store"])
def attempt(text):
    how, path = text.split(":")
    path = home + "/" + path
    try:
        match how:
            case "read": open(path, "rb").read()
            case "list": os.listdir(path)
            case "write": open(path, "wb").write(b"x")
            case "append": open(path, "ab").write(b"x")
            case "truncate": os.truncate(path, 0)
            case "mkdir": os.mkdir(path)
            case "unlink": os.unlink(path)
            case "link": os.link(home + "/store/kept", path)
            case "symlink": os.symlink("/etc/passwd", path)
            case "exec": os.posix_spawn("/bin/true", ["true"], {})
            case "resolve": socket.getaddrinfo("localhost", 1)
    except OSError as error:
        # A link across folders fails as if across disks: landlock(7), "LANDLOCK_ACCESS_FS_REFER".
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EXDEV):
            raise
        return False
    return True
print(json.dumps([abi, {text: attempt(text) for text in tries}]))
"""

REACHABLE = [
    "write:data/new",
    "read:data/new",
    "unlink:data/new",
    "mkdir:data/folder",
    "list:data",
    "read:store/kept",
    "list:store",
    "resolve:",
]
REFUSED = [
    "read:keys/release.key",
    "list:keys",
    "write:keys/new",
    "append:keys/release.key",
    "truncate:keys/release.key",
    "unlink:keys/release.key",
    "read:journal/log",
    "list:.",
    "write:store/kept",
    "unlink:store/kept",
    "truncate:store/kept",
    "mkdir:store/new",
    "link:data/stolen",
    "symlink:data/way-out",
    "read:../outside",
    "exec:",
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("data/old", "store/kept", "keys/release.key", "journal/log", "../outside"):
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "home"


def probe(home: Path, tries: list[str]) -> tuple[int, dict[str, bool]]:
    answer = subprocess.run([sys.executable, "-c", PROBE, str(home), *tries], check=True, capture_output=True, text=True).stdout
    abi, could = json.loads(answer)
    return abi, could


def test_the_engine_reaches_its_own_folders(home: Path) -> None:
    _, could = probe(home, REACHABLE)
    assert could == dict.fromkeys(REACHABLE, True)


def test_the_engine_is_refused_at_keys_and_everywhere_else(home: Path) -> None:
    abi, could = probe(home, REFUSED)
    # Without Landlock nothing is promised, and the state says 0.
    refused = [text for text, succeeded in could.items() if not succeeded]
    assert abi == 0 or refused == REFUSED


@pytest.mark.swarm
async def test_a_running_engine_says_what_binds_it(home: Path) -> None:
    abi, _ = probe(home, [])
    swarm = EngineSwarm(quiet_settings(), EngineFolders(str(home / "data"), (str(home / "store"),)))
    async with running(swarm, home / "data"):
        assert (await swarm.wait_listening()).landlock == abi


@pytest.mark.swarm
async def test_a_file_outside_the_folders_is_never_written_and_the_failure_is_named(home: Path) -> None:
    shared = Shared({"model.safetensors": bytes(PIECE)})
    seed_swarm = RealWorld().make(home / "seed")
    swarm = EngineSwarm(quiet_settings(), EngineFolders(str(home / "data")))
    async with running(seed_swarm, home / "seed") as seed, running(swarm, home / "data") as node:
        shared.write(seed.folder)
        await seed.swarm.add(shared.spec(seed.folder, have=True))
        await swarm.add(shared.spec(home / "keys", have=False, peers=(await seed.peer(),)))
        if (await swarm.wait_listening()).landlock:
            failure = await node.wait_for(FileFailed)
            assert failure.path == "model.safetensors"
            assert not failure.no_space
            assert [path.name for path in (home / "keys").iterdir()] == ["release.key"]
