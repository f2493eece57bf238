"""Clients of the control socket that misbehave: each loses its own connection, and everybody else is served at once."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random

import pytest

from modelp2p.protocol import control, layout
from modelp2p.protocol.control import Failure, Hello, Request
from modelp2p.protocol.framing import FrameDecoder
from tests.badinput.cases import SMALL_STORE, run
from tests.nodes import Node, wait_until

SERVED_S = 2.0
GRACE_S = 3.0
HELLO = control.encode_message(Hello(1, 1, "test"))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("n") / "node", sections=SMALL_STORE).start() as running:
        yield running
        assert running.process is not None
        assert running.process.poll() is None, running.log
        assert "Traceback" not in running.log


@contextmanager
def connected(node: Node) -> Iterator[socket.socket]:
    """A bare connection. By way of a descriptor, because the path may be too long for a socket address."""
    folder = os.open(node.home / layout.RUN, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(f"/proc/self/fd/{folder}/control.sock")
            yield connection
    finally:
        os.close(folder)


def check_others_are_served(node: Node) -> None:
    """A new client gets an answer in time."""
    assert node.process is not None
    began = time.monotonic()
    done = run(node, "status", "--json")
    assert done.code == 0, done
    assert done.json["node"]["pid"] == node.process.pid
    assert time.monotonic() - began < SERVED_S


def farewell(connection: socket.socket) -> Failure | None:
    """What the daemon said before it hung up, which it must do."""
    decoder = FrameDecoder(control.MAX_FRAME_BYTES)
    last = None
    while True:
        try:
            data = connection.recv(1 << 16)
        except ConnectionResetError:
            return last
        if not data:
            return last
        decoder.receive_data(data)
        while (frame := decoder.next_frame()) is not None:
            message = control.decode_message(frame)
            last = message if isinstance(message, Failure) else last


@pytest.fixture(scope="module")
def drip(node: Node) -> Iterator[Callable[[], float]]:
    """A client that sends a frame byte by byte all through these tests; call it for the seconds until it was cut off."""
    lived: list[float] = []

    def run_drip() -> None:
        began = time.monotonic()
        with connected(node) as connection, suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(HELLO + (1 << 16).to_bytes(4, "big"))
            connection.settimeout(0.2)
            while time.monotonic() - began < 2 * control.REQUEST_TIMEOUT_S:
                connection.sendall(b"\0")
                with suppress(TimeoutError):
                    if not connection.recv(1 << 16):
                        break
        lived.append(time.monotonic() - began)

    thread = threading.Thread(target=run_drip)
    thread.start()

    def seconds() -> float:
        thread.join()
        return lived[0]

    yield seconds
    thread.join()


NONSENSE = {
    "garbage": Random(1).randbytes(4096),
    "4 GiB": b"\xff\xff\xff\xff" + b"x" * 100,
    "one over the limit": (control.MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
    "empty frame": bytes(4),
    "no msgpack": b"\0\0\0\4\xc1\xc1\xc1\xc1",
    "nested too deep": (1000).to_bytes(4, "big") + b"\x91" * 1000,
    "huge map": b"\0\0\0\5\xdf\xff\xff\xff\xff",
    "request before hello": control.encode_message(Request(1, "status")),
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "newer protocol": control.encode_message(Hello(99, 99, "future")),
    "hello twice": HELLO + HELLO,
    "garbage after hello": HELLO + Random(2).randbytes(1000),
    "descriptors that never come": HELLO + control.encode_message(Request(1, "publish", {}, 3)),
}


@pytest.mark.swarm
@pytest.mark.usefixtures("drip")
@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_costs_its_sender_the_connection(node: Node, what: str) -> None:
    with connected(node) as connection:
        connection.sendall(NONSENSE[what])
        answer = farewell(connection)
        assert answer is None or answer.error().message
    check_others_are_served(node)


@pytest.mark.swarm
@pytest.mark.parametrize(
    "request_map",
    [
        Request(1, "no-such-verb"),
        Request(1, "fetch"),
        Request(1, "fetch", {"ref": 7}),
        Request(1, "fetch", {"ref": "../../etc/passwd"}),
        Request(1, "fetch", {"ref": "lab/model", "peers": ["x" * 10_000]}),
        Request(1, "fetch", {"ref": "lab/model", "unknown": True}),
        Request(1, "fetch", {"ref": "lab/model", "timeout_s": -1}),
        Request(1, "fetch", {"ref": "", "bundle": True}),
        Request(1, "publish", {"name": "lab/model"}),
        Request(1, "publish_commit", {"token": "guess"}),
        Request(1, "show", {"ref": "\x1b[2J"}),
        Request(1, "limits", {"max_up": 2**62}),
        Request(1, "trust_add", {"ref": "lab/model", "name": "*"}),
        Request(1, "trust_remove", {"publisher": "/etc/passwd"}),
        Request(1, "verify", {"ref": []}),
        Request(1, "seed", {"refs": [1, 2, 3]}),
        Request(1, "rm", {}),
    ],
    ids=lambda request: f"{request.verb}-{len(str(request.args))}",
)
def test_a_bad_request_is_answered_and_the_connection_lives(node: Node, request_map: Request) -> None:
    with connected(node) as connection:
        decoder = FrameDecoder(control.MAX_FRAME_BYTES)

        def next_message() -> control.Message:
            while (frame := decoder.next_frame()) is None:
                data = connection.recv(1 << 16)
                assert data, "the daemon hung up"
                decoder.receive_data(data)
            return control.decode_message(frame)

        connection.sendall(HELLO + control.encode_message(request_map))
        assert isinstance(next_message(), Hello)
        while isinstance(answer := next_message(), control.Event):
            pass
        assert isinstance(answer, Failure)
        assert answer.error().kind.exit_code in (2, 3, 4), answer
        assert "internal error" not in answer.error().message
        connection.sendall(control.encode_message(Request(2, "status")))
        assert isinstance(next_message(), control.Result)


@pytest.mark.swarm
def test_silent_clients_and_half_frames_hold_nobody_up(node: Node) -> None:
    assert node.process is not None
    descriptors = Path(f"/proc/{node.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    with ExitStack() as stack:
        for number in range(100):
            try:
                connection = stack.enter_context(connected(node))
                # Some say nothing, some stop in the middle of a length, of a hello, of a frame.
                connection.sendall((b"", b"\0\0", HELLO[:-1], (1 << 20).to_bytes(4, "big") + b"x")[number % 4])
            except OSError:
                continue
        check_others_are_served(node)
    wait_until(lambda: len(list(descriptors.iterdir())) <= before, 5, "descriptors are given back")
    check_others_are_served(node)


@pytest.mark.swarm
def test_a_client_that_never_reads_holds_nobody_up(node: Node) -> None:
    with connected(node) as connection:
        connection.setblocking(False)
        request = control.encode_message(Request(1, "status"))
        data = HELLO + request * 20_000
        with ExitStack() as stack:
            stack.callback(connection.close)
            try:
                while data:
                    data = data[connection.send(data) :]
            except (BlockingIOError, ConnectionError):
                pass
            check_others_are_served(node)
    check_others_are_served(node)


@pytest.mark.swarm
def test_more_descriptors_than_allowed_are_refused_and_closed(node: Node) -> None:
    assert node.process is not None
    descriptors = Path(f"/proc/{node.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        with connected(node) as connection:
            connection.sendall(HELLO)
            try:
                for _ in range(4):
                    socket.send_fds(connection, [b"\0"], [null] * 60)
            except ConnectionError:
                pass
            farewell(connection)
    finally:
        os.close(null)
    wait_until(lambda: len(list(descriptors.iterdir())) <= before, 5, "descriptors are given back")
    check_others_are_served(node)


_OTHER_USER = """
import os, socket, sys
folder, uid = int(sys.argv[1]), int(sys.argv[2])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
connection = socket.socket(socket.AF_UNIX)
try:
    connection.connect(f"/proc/self/fd/{folder}/control.sock")
except PermissionError:
    sys.exit(13)
try:
    connection.sendall(bytes.fromhex(sys.argv[3]))
except BrokenPipeError:
    pass
while data := connection.recv(65536):
    sys.stdout.buffer.write(data)
"""


@pytest.mark.swarm
@pytest.mark.parametrize("is_open", [False, True], ids=["closed by its mode", "opened by mistake"])
def test_another_user_commands_nothing(node: Node, is_open: bool) -> None:
    assert os.getuid() == 0, "this test has to become another user, and may not"
    place = node.home / layout.RUN / "control.sock"
    assert place.stat().st_mode & 0o777 == 0o600
    assert place.parent.stat().st_mode & 0o777 == 0o700
    folder = os.open(place.parent, os.O_PATH)
    try:
        if is_open:
            place.chmod(0o666)
            place.parent.chmod(0o755)
        request = HELLO + control.encode_message(Request(1, "stop"))
        done = subprocess.run(
            [sys.executable, "-c", _OTHER_USER, str(folder), "65534", request.hex()],
            pass_fds=[folder],
            capture_output=True,
            timeout=20,
            check=False,
        )
    finally:
        place.chmod(0o600)
        place.parent.chmod(0o700)
        os.close(folder)
    if not is_open:
        assert done.returncode == 13, done
    else:
        assert b"only the owner" in done.stdout, done
        assert len(done.stdout) < struct.unpack(">I", done.stdout[:4])[0] + 5, "it was told more than that"
    check_others_are_served(node)


@pytest.mark.swarm
def test_a_slow_drip_ends_at_the_deadline(node: Node, drip: Callable[[], float]) -> None:
    assert control.REQUEST_TIMEOUT_S - GRACE_S < drip() < control.REQUEST_TIMEOUT_S + GRACE_S
    check_others_are_served(node)
