"""A daemon that was asked and says nothing: who waits for it ends all the same."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from modelp2p.daemon.client import Client
from modelp2p.loader import following
from modelp2p.loader.arriving import Arrivals, ArrivingFile
from modelp2p.loader.following import DaemonFollower
from modelp2p.loader.hashing import Workers
from modelp2p.protocol import control
from modelp2p.protocol.errors import DaemonError, ModelP2PError
from modelp2p.protocol.framing import FrameDecoder
from modelp2p.protocol.statement import verify_statement
from tests.loader.test_arriving import FILES, PATIENCE_S, SHARD, Reading
from tests.releases import statement_of

ORDER = [(0, 1)]


@dataclass
class Silent:
    """The daemon's end of two connections that stay open."""

    follower: DaemonFollower
    orders: socket.socket

    def answer(self) -> str:
        """Take one request, and answer it; its verb."""
        request = self.hear()
        self.orders.sendall(control.encode_message(control.Result(request.id, {})))
        return request.verb

    def hear(self) -> control.Request:
        decoder = FrameDecoder(control.MAX_FRAME_BYTES)
        while (frame := decoder.next_frame()) is None:
            data = self.orders.recv(1 << 16)
            assert data
            decoder.receive_data(data)
        message = control.decode_message(frame)
        assert isinstance(message, control.Request)
        return message


@pytest.fixture
def daemon() -> Iterator[Silent]:
    yield from served(PATIENCE_S)


@pytest.fixture
def hasty() -> Iterator[Silent]:
    yield from served(0.05)


def served(silence_s: float) -> Iterator[Silent]:
    orders, theirs = socket.socketpair()
    news, their_news = socket.socketpair()
    theirs.settimeout(PATIENCE_S)
    client = Client(news)
    with theirs, their_news, client:
        follower = DaemonFollower(Client(orders), client, "token", silence_s)
        yield Silent(follower, theirs)
        follower.close()


def test_a_reader_ends_where_the_daemon_is_silent(hasty: Silent) -> None:
    release = verify_statement(statement_of(FILES))
    arrivals = Arrivals(release, hasty.follower, 0.05)
    arrivals.start()
    with pytest.raises(ModelP2PError, match=r"nothing new was proven for 0\.05 s"):
        Reading(ArrivingFile(arrivals, SHARD, release.manifest.file(SHARD)), 0, 1).result()
    with pytest.raises(DaemonError):
        hasty.follower.open_file(SHARD)
    arrivals.close()


def test_after_a_silence_nothing_is_waited_for_again(hasty: Silent) -> None:
    with pytest.raises(DaemonError, match=r"said nothing for 0\.05 s"):
        hasty.follower.want(ORDER)
    with pytest.raises(DaemonError, match="closed the connection"):
        hasty.follower.open_file(SHARD)


def test_an_interrupted_load_leaves_a_call_that_is_stuck(daemon: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "HURRY_S", 0.01)
    release = verify_statement(statement_of(FILES))
    arrivals = Arrivals(release, daemon.follower, PATIENCE_S)
    arrivals.start()
    file = ArrivingFile(arrivals, SHARD, release.manifest.file(SHARD))
    workers = Workers(2, on_abandon=arrivals.interrupt)
    job = workers.start(lambda _: file.read_into(memoryview(bytearray(1)), 0), [range(1)])
    assert daemon.hear().verb == "stream_want"
    job.abandon()
    assert job.is_done()
    workers.close()
    arrivals.close()


def test_an_interrupt_lets_a_call_be_that_is_answered(daemon: Silent) -> None:
    ended: list[str] = []

    def ask() -> None:
        daemon.follower.want(ORDER)
        ended.append("well")

    asking = threading.Thread(target=ask)
    asking.start()
    request = daemon.hear()
    interrupting = threading.Thread(target=daemon.follower.interrupt)
    interrupting.start()
    daemon.orders.sendall(control.encode_message(control.Result(request.id, {})))
    asking.join()
    interrupting.join()
    assert ended == ["well"]
    answering = threading.Thread(target=daemon.answer)
    answering.start()
    daemon.follower.want(ORDER)
    answering.join()
