"""Another user of the machine and a service that opens a public socket: they look and fetch names, and change nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from modelp2p.daemon.gate import PublicGate
from modelp2p.protocol import control, layout
from modelp2p.protocol.control import Failure, Hello, Request
from modelp2p.protocol.framing import FrameDecoder
from tests.endtoend.site import MIB, model
from tests.nodes import Done, Node, tree_bytes
from tests.releases import write_files

MOST = PublicGate(0, "", 0.0).max_per_user

pytestmark = pytest.mark.swarm

NOBODY, ANOTHER = 65534, 65533
# The interpreter itself may lie where only root can read, so everything is imported before this process becomes somebody else.
_AS_USER = """
import os, sys
from importlib import import_module
from modelp2p.cli.main import VERBS, main
from modelp2p.daemon import client
for module, _, _ in VERBS.values():
    import_module(module)
for module in ("modelp2p.cli.configuring", "modelp2p.daemon.config", "modelp2p.protocol.statement", "_strptime"):
    import_module(module)
client.build()
uid = int(sys.argv.pop(1))
os.setgroups([]); os.setgid(uid); os.setuid(uid)
sys.exit(main())
"""
_IMPOSTOR = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
listener.listen()
print("ready", flush=True)
connection, _ = listener.accept()
sys.stdout.buffer.write(connection.recv(65536))
"""


@dataclass
class Service(Node):
    """A node with the runtime folder that systemd would give it."""

    runtime: Path = field(default=Path())

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"RUNTIME_DIRECTORY": str(self.runtime)}

    def run_as(self, uid: int, *arguments: str, home: Path | None = None, keys: Path | None = None) -> Done:
        """Run one command as another user, who names this home."""
        environment = super().environment | {"MODELP2P_HOME": str(home or self.home), "HOME": "/nonexistent"}
        environment |= {"MODELP2P_KEYS": str(keys)} if keys else {}
        command = [sys.executable, "-c", _AS_USER, str(uid), *arguments]
        done = subprocess.run(
            command, env=environment, cwd="/", capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
        )
        return Done(done.returncode, done.stdout, done.stderr)


@contextmanager
def service(**control_section: object) -> Iterator[Service]:
    """A running service, where other users can reach it: pytest's own folders are private."""
    assert os.getuid() == 0, "this test has to become another user, and may not"
    folder = Path(tempfile.mkdtemp(prefix="modelp2p-", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "runtime").mkdir(mode=0o755)
    sections: dict[str, dict[str, object]] = {
        "store": {"reserve": 0},
        "fetch": {"timeout_s": 20},
        "control": {"public": True, **control_section},
    }
    try:
        with Service(folder / "node", sections=sections, runtime=folder / "runtime") as node:
            yield node.start()
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Served:
    """A service with one release whose publisher it trusts for the name, and one whose publisher it does not."""

    node: Service
    trusted: dict[str, Any]
    files: dict[str, bytes]
    other: dict[str, Any]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with service() as node:
        files = model("trusted", MIB)
        trusted = node.publish(write_files(node.folder / "a", files), "lab/trusted")
        other = node.publish(write_files(node.folder / "b", model("other", MIB)), "lab/other")
        # Publishing gives a name to its publisher; here one of the two is taken back.
        node.ok("trust", "remove", other["publisher"], "--name", "lab/other")
        yield Served(node, trusted, files, other)
        assert "Traceback" not in node.log


def ask(node: Service, request: Request) -> control.Message:
    """The answer to one request over the public socket, by root: the gate is the same for everybody who comes this way."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(node.runtime / "public.sock"))
        # Who is refused is told so and hung up on, perhaps before this is sent: the words wait to be read.
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(control.encode_message(Hello(1, 1, "test")) + control.encode_message(request))
        decoder = FrameDecoder(control.MAX_FRAME_BYTES)
        while True:
            while (frame := decoder.next_frame()) is None:
                data = connection.recv(1 << 16)
                assert data, "the daemon hung up"
                decoder.receive_data(data)
            if not isinstance(message := control.decode_message(frame), Hello | control.Event):
                return message


def test_others_look_and_fetch_what_the_site_trusts(served: Served) -> None:
    node = served.node
    status = node.run_as(NOBODY, "status", "--json")
    assert status.code == 0, status
    assert node.process is not None
    assert status.json["node"]["pid"] == node.process.pid
    listed = node.run_as(NOBODY, "ls", "--json")
    assert {row["name"] for row in listed.json["releases"]} == {"lab/trusted", "lab/other"}
    shown = node.run_as(NOBODY, "show", "lab/trusted", "--json")
    assert shown.json["link"] == served.trusted["link"]

    fetched = node.run_as(NOBODY, "fetch", "lab/trusted", "--json")
    assert fetched.code == 0, fetched
    assert fetched.json["name_verified"] is True
    path = Path(fetched.json["path"])
    assert tree_bytes(path) == served.files
    read = subprocess.run(
        ["cat", str(path / "config.json")], user=NOBODY, group=NOBODY, extra_groups=[], check=True, capture_output=True
    )
    assert json.loads(read.stdout) == {"seed": "trusted"}
    # Known here, but nobody may speak for that name.
    assert node.run_as(NOBODY, "fetch", "lab/other").code == 4
    assert node.run_as(NOBODY, "fetch", "lab/unknown").code == 3


REFUSED = {
    "fetch by link": ("fetch", "LINK"),
    "fetch code": ("fetch", "lab/trusted", "--allow-code"),
    "fetch from a peer": ("fetch", "lab/trusted", "--peer", "127.0.0.1:1"),
    "fetch, detached": ("fetch", "lab/trusted", "--detach"),
    "fetch, limited": ("fetch", "lab/trusted", "--max-down", "1M"),
    "fetch, patient": ("fetch", "lab/trusted", "--timeout", "21"),
    "rm": ("rm", "lab/trusted", "--yes"),
    "gc": ("gc",),
    "seed": ("seed",),
    "verify": ("verify", "lab/trusted"),
    "trust add": ("trust", "add", "LINK", "--name", "*"),
    "trust list": ("trust", "list"),
    "config": ("config", "show", "--running"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_others_change_nothing(served: Served, what: str) -> None:
    words = [served.trusted["link"] if word == "LINK" else word for word in REFUSED[what]]
    done = served.node.run_as(NOBODY, *words)
    assert done.code == 10, done
    assert done.out == ""
    error, hint = [line for line in done.err.splitlines() if line.startswith(("error: ", "Hint: "))]
    assert error.startswith("error: ")
    assert len(hint) > len("Hint: ")


def test_others_publish_nothing(served: Served) -> None:
    node, keys = served.node, served.node.folder / "keys-of-nobody"
    keys.mkdir(mode=0o700)
    os.chown(keys, NOBODY, NOBODY)
    # The key is the user's own; it is the folder, sent as a descriptor, that the service does not take.
    assert node.run_as(NOBODY, "keys", "init", "mine", "--no-passphrase", keys=keys).code == 0
    done = node.run_as(NOBODY, "publish", str(node.folder / "a"), "--as", "lab/mine", keys=keys)
    assert done.code == 10, done
    assert "error: files and folders are taken from the owner" in done.err
    assert "Hint: " in done.err


@pytest.mark.parametrize("verb", ["stop", "limits", "adopt", "publish", "publish_commit", "trust_remove", "no-such-verb"])
def test_whoever_comes_by_the_public_socket_commands_nothing(served: Served, verb: str) -> None:
    answer = ask(served.node, Request(1, verb))
    assert isinstance(answer, Failure)
    assert (answer.error().kind.exit_code, bool(answer.hint)) == (10, True)
    assert isinstance(ask(served.node, Request(1, "status")), control.Result)


def test_the_owners_socket_and_folders_stay_closed(served: Served) -> None:
    node = served.node
    assert (node.runtime / "public.sock").stat().st_mode & 0o777 == 0o666
    (own,) = (node.runtime / "modelp2p").iterdir()
    assert (own.stat().st_mode & 0o777, own.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    for name in layout.PRIVATE:
        assert (node.home / name).stat().st_mode & 0o777 == 0o700, name
    for path in (own, *(node.home / name / "x" for name in layout.PRIVATE)):
        tried = subprocess.run(["stat", str(path)], user=NOBODY, group=NOBODY, extra_groups=[], check=False, capture_output=True)
        assert b"Permission denied" in tried.stderr, path


def test_one_user_in_number_locks_nobody_else_out(served: Served) -> None:
    node, connections = served.node, []
    try:
        for _ in range(MOST):
            connections.append(connection := socket.socket(socket.AF_UNIX))
            connection.settimeout(20)
            connection.connect(str(node.runtime / "public.sock"))
            connection.sendall(control.encode_message(Hello(1, 1, "test")))
            assert connection.recv(1 << 16)
        answer = ask(node, Request(1, "status"))
        assert isinstance(answer, Failure)
        assert "connections to this service already" in answer.error().message
        assert node.run_as(NOBODY, "status").code == 0
        assert node.run("status").code == 0
    finally:
        for connection in connections:
            connection.close()


def test_only_who_is_on_the_list_is_served() -> None:
    with service(allow_users=[ANOTHER]) as node:
        assert node.run_as(ANOTHER, "status").code == 0
        refused = node.run_as(NOBODY, "status", "--json")
        assert refused.code == 10, refused
        assert "allow_users" in refused.json["error"]["hint"]
        # The administrator's root, who can enter the home, commands as ever.
        assert node.run("status").code == 0


def test_a_socket_that_is_not_the_services_is_told_nothing() -> None:
    folder = Path(tempfile.mkdtemp(prefix="modelp2p-", dir="/tmp"))
    try:
        folder.chmod(0o755)
        (folder / "run").mkdir(mode=0o700)
        command = [sys.executable, "-c", _IMPOSTOR, str(folder / "public.sock"), str(ANOTHER)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as impostor:
            assert impostor.stdout is not None
            assert impostor.stdout.readline() == b"ready\n"
            done = Service(folder / "node").run_as(NOBODY, "status", home=folder)
            assert done.code == 8, done
            assert f"user {ANOTHER}" in done.err
            assert impostor.stdout.read() == b""
    finally:
        shutil.rmtree(folder)
