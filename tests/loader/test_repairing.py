"""A bad piece that the daemon is asked about: repaired, not repaired, and nobody there. The daemon is the real one, in memory."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load as load_bytes

from modelp2p.daemon.client import build
from modelp2p.daemon.lock import HomeLock, this_daemon
from modelp2p.loader import load, open_release, repairing, stream
from modelp2p.loader.locate import Located, locate
from modelp2p.loader.repairing import JUST_NOW_S, DaemonRepair
from modelp2p.protocol import control, layout
from modelp2p.protocol.errors import IntegrityError, UsageError
from modelp2p.protocol.statement import verify_statement
from tests.endtoend.site import flip_byte
from tests.loader.models import MIB, same
from tests.memory_node import MemoryDaemon
from tests.releases import Home, publisher, statement_of

if TYPE_CHECKING:
    import torch

SHARD, OTHER = "model-1.safetensors", "model-2.safetensors"
PATIENCE_S = 1.0
NAME = "lab/model"


@pytest.fixture
def daemon(tmp_path: Path, shards: dict[str, bytes]) -> Iterator[MemoryDaemon]:
    # Below a short path: the one of a socket has at most 107 bytes.
    with MemoryDaemon(tmp_path, statement_of(shards), shards) as running:
        yield running


@pytest.fixture
def expected(shards: dict[str, bytes]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path, data in shards.items():
        if path.endswith(".safetensors"):
            found |= load_bytes(data)
    return found


def check_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(same(tensors[name], expected[name]) for name in expected)


def located_in(home: Path) -> Located:
    return locate(NAME, publisher=None, home=str(home))


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.slow
@pytest.mark.parametrize("verify", ["auto", "cpu"])
def test_bad_pieces_are_fetched_again_and_the_numbers_are_right(
    daemon: MemoryDaemon, shards: dict[str, bytes], expected: dict[str, torch.Tensor], verify: str
) -> None:
    flip_byte(daemon.tree / SHARD, MIB + 9)
    flip_byte(daemon.tree / SHARD, 2 * MIB + 9)
    flip_byte(daemon.tree / OTHER, MIB + 9)
    with open_release(NAME, home=daemon.home, mapping="pread", verify=verify, workers=1) as release:
        check_same(release.load(), expected)
    # One round trip a file, and one piece after the other where one worker stops at the first bad one.
    assert set(daemon.verified) == {(SHARD,), (OTHER,)}
    assert len(daemon.verified) == 2
    assert release.stats.refetches == 2
    assert release.stats.rereads > 0
    assert release.stats.fallbacks == []
    assert (daemon.tree / SHARD).read_bytes() == shards[SHARD]
    assert (daemon.tree / OTHER).read_bytes() == shards[OTHER]


@pytest.mark.slow
@pytest.mark.parametrize("call", ["load", "stream"])
def test_load_and_stream_repair_too(daemon: MemoryDaemon, expected: dict[str, torch.Tensor], call: str) -> None:
    flip_byte(daemon.tree / OTHER, MIB + 9)
    function = load if call == "load" else stream
    check_same(dict(function(NAME, home=daemon.home, mapping="pread", verify="cpu")), expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", [SHARD, "model.safetensors.index.json"])
def test_what_a_file_is_opened_with_is_repaired_too(daemon: MemoryDaemon, expected: dict[str, torch.Tensor], path: str) -> None:
    flip_byte(daemon.tree / path, 12)
    with open_release(NAME, home=daemon.home) as release:
        check_same(release.load(), expected)
        assert (release.stats.rereads, release.stats.refetches) == (1, 1)
        # The new record counts: views of a file that the store has made.
        assert release.stats.copied_bytes == 0
    assert daemon.verified == [(path,)]


@pytest.mark.slow
def test_where_nobody_has_the_piece_nothing_over_it_is_handed_out(
    daemon: MemoryDaemon, expected: dict[str, torch.Tensor]
) -> None:
    daemon.lose_seed()
    flip_byte(daemon.tree / SHARD, 2 * MIB + 9)
    handed: dict[str, torch.Tensor] = {}
    with open_release(NAME, home=daemon.home, mapping="pread", verify="cpu", timeout=PATIENCE_S) as release:
        with pytest.raises(IntegrityError) as caught:
            handed.update(release.stream(["a", "b"]))
        assert len(release.stats.fallbacks) == 1
    assert (caught.value.facts["path"], caught.value.facts["piece"]) == (SHARD, 2)
    assert "no new proven byte for 1 s" in release.stats.fallbacks[0]
    assert release.stats.fallbacks[0].startswith(f"'{SHARD}' was not repaired: ")
    assert release.stats.refetches == 0
    assert "b" not in handed
    assert all(same(handed[name], expected[name]) for name in handed)


@pytest.mark.slow
def test_a_bad_header_that_stays_bad_says_what_was_tried(daemon: MemoryDaemon) -> None:
    daemon.lose_seed()
    flip_byte(daemon.tree / SHARD, 12)
    with pytest.raises(IntegrityError, match=f"piece 0 .* differs .*; '{SHARD}' was not repaired: no new proven byte") as caught:
        open_release(NAME, home=daemon.home, timeout=PATIENCE_S)
    assert (caught.value.facts["path"], caught.value.facts["piece"]) == (SHARD, 0)
    assert "--repair" in caught.value.hint


@pytest.mark.slow
def test_a_daemon_that_ends_during_the_repair_is_a_no(daemon: MemoryDaemon) -> None:
    located = located_in(daemon.home)
    flip_byte(daemon.tree / SHARD, MIB + 9)
    with open_release(NAME, home=daemon.home, mapping="pread", verify="cpu") as release:
        daemon.die_on_add()
        with pytest.raises(IntegrityError) as caught:
            release.load()
        assert "closed the connection" in release.stats.fallbacks[0]
    assert caught.value.facts["path"] == SHARD
    repair = DaemonRepair(located, str(daemon.home))
    daemon.stop()
    assert not repair(SHARD, 1)


@pytest.mark.slow
def test_a_daemon_that_ends_between_two_files_costs_only_what_is_bad(
    daemon: MemoryDaemon, expected: dict[str, torch.Tensor]
) -> None:
    flip_byte(daemon.tree / SHARD, MIB + 9)
    with open_release(NAME, home=daemon.home, mapping="pread", verify="cpu") as release:
        check_same({"a": release.tensor("a")}, {"a": expected["a"]})
        daemon.stop()
        assert same(release.tensor("d"), expected["d"])
        flip_byte(daemon.tree / OTHER, MIB + 9)
        with pytest.raises(IntegrityError):
            release.tensor("d")
        assert same(release.tensor("e"), expected["e"])
        assert [reason.split(": ")[0] for reason in release.stats.fallbacks] == [f"'{OTHER}' was not repaired"]


@pytest.mark.slow
def test_several_pieces_of_a_span_are_one_round_trip_and_a_piece_that_is_still_bad_is_another(daemon: MemoryDaemon) -> None:
    flip_byte(daemon.tree / SHARD, MIB + 9)
    clock = Clock()
    repair = DaemonRepair(located_in(daemon.home), str(daemon.home), clock=clock)
    assert all(repair(SHARD, piece) for piece in (1, 2, 3))
    assert daemon.verified == [(SHARD,)]
    assert repair(OTHER, 1)
    assert repair(SHARD, 1)
    assert daemon.verified == [(SHARD,), (OTHER,), (SHARD,)]
    assert repair(SHARD, 2)
    clock.now += JUST_NOW_S
    assert repair(SHARD, 3)
    assert daemon.verified[3:] == [(SHARD,)]


@pytest.mark.slow
def test_a_callers_own_repair_takes_the_place_of_the_daemons(
    daemon: MemoryDaemon, shards: dict[str, bytes], expected: dict[str, torch.Tensor]
) -> None:
    told: list[tuple[str, int]] = []

    def mend(path: str, piece: int) -> bool:
        told.append((path, piece))
        place = daemon.tree / path
        place.unlink()
        place.write_bytes(shards[path])
        return True

    flip_byte(daemon.tree / SHARD, 12)
    flip_byte(daemon.tree / OTHER, MIB + 9)
    with open_release(NAME, home=daemon.home, mapping="pread", verify="cpu", on_bad=mend) as release:
        check_same(release.load(), expected)
        assert release.stats.refetches == 2
    assert told == [(SHARD, 0), (OTHER, 1)]
    assert daemon.verified == []


def test_without_a_daemon_it_is_a_no_with_a_reason(home: Home, tree: Path) -> None:
    flip_byte(tree / SHARD, MIB + 9)
    with open_release(NAME, home=home.path, mapping="pread", verify="cpu") as release:
        with pytest.raises(IntegrityError) as caught:
            release.tensor("a")
        assert "no daemon is running" in release.stats.fallbacks[0]
    assert (caught.value.facts["path"], caught.value.facts["piece"]) == (SHARD, 1)


def test_files_outside_of_the_homes_store_are_nobodys_to_repair(home: Home, folder: Path) -> None:
    flip_byte(folder / SHARD, MIB + 9)
    with open_release(folder, home=home.path, publisher=publisher().id, mapping="pread", verify="cpu") as release:
        with pytest.raises(IntegrityError):
            release.tensor("a")
        assert "outside of the home's store" in release.stats.fallbacks[0]


def test_another_homes_files_are_not_asked_about(home: Home, tree: Path, tmp_path: Path) -> None:
    repair = DaemonRepair(locate(tree, publisher=publisher().id, home=str(tmp_path)), str(tmp_path))
    reasons: list[str] = []
    repair.on_refusal = reasons.append
    assert not repair(SHARD, 1)
    assert "outside of the home's store" in reasons[0]


@pytest.mark.slow
def test_a_release_the_daemon_does_not_know_is_a_no(daemon: MemoryDaemon, shards: dict[str, bytes]) -> None:
    newer = replace(located_in(daemon.home), release=verify_statement(statement_of(shards, sequence=2)))
    reasons: list[str] = []
    repair = DaemonRepair(newer, str(daemon.home))
    repair.on_refusal = reasons.append
    assert not repair(SHARD, 1)
    assert "not known here" in reasons[0]


@pytest.mark.slow
def test_a_repair_may_be_given_all_the_time_there_is(daemon: MemoryDaemon) -> None:
    flip_byte(daemon.tree / SHARD, MIB + 9)
    assert DaemonRepair(located_in(daemon.home), str(daemon.home), timeout_s=float("inf"))(SHARD, 1)


@pytest.mark.parametrize("timeout_s", [float("nan"), -1])
def test_a_timeout_that_is_none_is_refused(home: Home, tree: Path, timeout_s: float) -> None:
    with pytest.raises(UsageError, match="timeout"):
        DaemonRepair(located_in(home.path), str(home.path), timeout_s)


def test_a_daemon_that_falls_silent_is_a_no(home: Home, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stopped in the middle: it has said hello, and takes what is sent."""
    monkeypatch.setattr(repairing, "GRACE_S", 0.0)
    run = home.path / layout.RUN
    run.mkdir(mode=0o700)
    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run / "s"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(control.encode_message(control.Hello(control.V_MIN, control.V_MAX, build())))
                done.wait()

        thread = threading.Thread(target=serve)
        thread.start()
        reasons: list[str] = []
        repair = DaemonRepair(located_in(home.path), str(home.path), timeout_s=0.05)
        repair.on_refusal = reasons.append
        with HomeLock.acquire(home.path / layout.LOCK, this_daemon(str(run / "s"), pid=os.getpid(), host="here")):
            assert not repair(SHARD, 1)
        done.set()
        thread.join()
    assert "said nothing for 0.05 s" in reasons[0]
