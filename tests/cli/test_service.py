from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from platformdirs import user_data_path

from modelp2p.protocol.errors import DeniedError
from tests.cli.fakes import FETCHED, LINK, STATUS, FakeDaemon, modelp2p, shows

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map
    from tests.cli.fakes import Answer

REMOVED: Map = {"name": "lab/model", "revision": "0" * 40, "freed": 0}
ANSWERS: dict[str, Answer] = {"status": STATUS, "ls": {"releases": []}, "show": shows(), "fetch": FETCHED, "rm": REMOVED}


@pytest.fixture(autouse=True)
def no_home_named(own_home: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELP2P_HOME")


def asked_of(daemon: FakeDaemon) -> list[str]:
    return [asked.verb for asked in daemon.asked]


@pytest.mark.parametrize("words", [("status",), ("ls",), ("show", "lab/model"), ("fetch", "lab/model")], ids=lambda w: w[0])
def test_a_user_with_nothing_here_is_answered_by_the_service(words: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    service = FakeDaemon(ANSWERS)
    own = FakeDaemon(ANSWERS, is_running=False, service=service)
    assert modelp2p(*words, daemon=own) == 0
    assert (asked_of(service), asked_of(own)) == ([words[0]], [])
    assert "the service of this machine" in capfd.readouterr().err


@pytest.mark.parametrize("words", [("fetch", LINK), ("show", LINK), ("rm", "lab/model", "-y")], ids=["fetch", "show", "rm"])
def test_what_the_service_does_not_do_starts_a_daemon_of_the_user(words: tuple[str, ...]) -> None:
    service = FakeDaemon(ANSWERS)
    own = FakeDaemon(ANSWERS, is_running=False, service=service)
    assert modelp2p(*words, daemon=own) == 0
    assert (asked_of(service), asked_of(own)) == ([], [words[0]])


def test_an_own_daemon_an_own_release_or_a_named_home_come_first(tmp_path_factory: pytest.TempPathFactory) -> None:
    service = FakeDaemon(ANSWERS)
    assert modelp2p("ls", daemon=FakeDaemon(ANSWERS, service=service)) == 0
    assert modelp2p("ls", "--home", "/elsewhere", daemon=FakeDaemon(ANSWERS, is_running=False, service=service)) == 0
    (user_data_path("modelp2p") / "manifests" / ("ab" * 32)).mkdir(parents=True)
    assert modelp2p("ls", daemon=FakeDaemon(ANSWERS, is_running=False, service=service)) == 0
    assert asked_of(service) == []


def test_a_service_that_refuses_this_user_is_no_service() -> None:
    own = FakeDaemon(ANSWERS, is_running=False, service=DeniedError("this service is not for user 1000"))
    assert modelp2p("status", daemon=own) == 8
    assert modelp2p("ls", daemon=own) == 0
    assert asked_of(own) == ["ls"]
