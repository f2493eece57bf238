"""`doctor`: what it makes of facts, how it looks at a machine without leaving a trace, and that nothing makes it hang."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modelp2p.cli import diagnosis, probes, release_diagnosis
from modelp2p.cli.app import App
from modelp2p.cli.diagnosis import Check, Filesystem
from modelp2p.cli.doctor import _outcome, _Patient, examine
from modelp2p.cli.results import Row
from modelp2p.daemon.client import build
from modelp2p.daemon.config import Config, Discovery, config_to_toml
from modelp2p.daemon.lock import HomeLock, this_daemon
from modelp2p.protocol.errors import DeniedError, NotFoundError
from tests.cli.fakes import LINK, PUBLISHER, RELEASE, REVISION, STATUS, FakeDaemon, FakeReply, modelp2p, shows

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map
    from tests.cli.fakes import Answer

REF = f"lab/model@{REVISION}"
WAYS = Discovery(dht=True, lsd=False, pex=True, utp=True, trackers=True)
NODE: Map = {
    **STATUS["node"],  # type: ignore[dict-item]  # a map
    "build": build(),
    "dht_nodes": 3,
    "engine_restarts": 0,
}
LIVE: Map = {**RELEASE, "peers": 2, "peers_known": 5, "seeds": 1, "fullest_peer": 1000, "rate_down": 2_000_000}
GB = 10**9


def live(**changes: object) -> Row:
    return Row({**LIVE, **changes})  # type: ignore[dict-item]  # what a daemon sends


def node(**changes: object) -> Row:
    return Row({**NODE, **changes})  # type: ignore[dict-item]  # what a daemon sends


def filesystem(kind: str = "ext4", *, network: bool = False, reflinks: bool | None = False, locks: bool | None = True) -> Check:
    return diagnosis.filesystem_check("/h", Filesystem(kind, network, reflinks, locks))


JUDGED: dict[str, tuple[Check, str, str, str]] = {
    "daemon": (diagnosis.daemon_check(node(), build()), "ok", f"{build()}, pid 7, up 1 min 5 s", ""),
    "daemon of a command": (diagnosis.daemon_check(node(on_demand=True), build()), "ok", "started by a command", ""),
    "another version": (diagnosis.daemon_check(node(build="modelp2p 0.0.1"), build()), "warning", "modelp2p 0.0.1", "kill 7"),
    "no daemon": (diagnosis.no_daemon_check("/h", "none", 0), "warning", "none runs for /h", "modelp2p daemon"),
    "a deaf daemon": (diagnosis.no_daemon_check("/h", "does not answer", 9), "problem", "pid 9 holds the home", "kill -9 9"),
    "home": (diagnosis.home_check("/h", True, [], "", False), "ok", "/h can be written", ""),
    "new home": (diagnosis.home_check("/h", False, [], "", False), "ok", "(not made yet)", ""),
    "no place for a home": (
        diagnosis.home_check("/h", False, ["/"], "", False),
        "problem",
        "/h cannot be made",
        "sudo install -d -o $(id -u) /h",
    ),
    "store of root": (diagnosis.home_check("/h", True, ["/h/a b"], "", True), "problem", "cannot be written", "'/h/a b'"),
    "served by another": (diagnosis.home_check("/h", True, ["/h"], "svc", True), "ok", "svc's; only their daemon", ""),
    "of another": (
        diagnosis.home_check("/h", True, ["/h"], "svc", False),
        "problem",
        "svc's, and no daemon",
        "sudo -u svc modelp2p",
    ),
    "ext4": (filesystem(), "ok", "/h is ext4: hard links, no reflinks, locks", ""),
    "not tried": (filesystem("xfs", reflinks=None, locks=None), "ok", "reflinks not tried, locks not tried", ""),
    "tmpfs": (filesystem("tmpfs", reflinks=True), "warning", "empty after a restart", "MODELP2P_HOME="),
    "nfs": (filesystem("nfs4", network=True), "warning", "shared between hosts", "MODELP2P_HOME="),
    "no locks": (filesystem("fuse", network=True, locks=False), "problem", "no locks", "MODELP2P_HOME="),
    "vfat": (filesystem("vfat"), "problem", "no hard links", "MODELP2P_HOME="),
    "room": (diagnosis.space_check(11 * GB, GB), "ok", "11.0 GB free, 1.0 GB of them", ""),
    "little room": (diagnosis.space_check(11 * GB - 1, GB), "warning", "free", "modelp2p gc"),
    "no room": (diagnosis.space_check(GB, GB), "problem", "nothing can be fetched", "modelp2p gc"),
    "ports": (diagnosis.ports_check({"a:1": ""}, 1, frozenset({1}), True), "ok", "a:1; UDP port 1 bound", ""),
    "no udp": (diagnosis.ports_check({"a:1": ""}, 1, frozenset({2}), True), "warning", "UDP port 1 is not bound", "modelp2p"),
    "udp unwanted": (diagnosis.ports_check({"a:1": ""}, 1, frozenset(), False), "ok", "UDP is not used", ""),
    "udp unknown": (diagnosis.ports_check({"a:1": ""}, 1, None, True), "ok", "UDP not checked", ""),
    "half deaf": (diagnosis.ports_check({"a:1": "", "b:1": "x"}, 1, None, True), "warning", "not on b:1 (x)", "modelp2p"),
    "deaf": (diagnosis.ports_check({"a:1": "refused"}, 1, None, True), "problem", "a:1: refused", "modelp2p"),
    "closed": (diagnosis.ports_check({}, 0, None, True), "problem", "listens nowhere", "modelp2p"),
    "dht": (diagnosis.discovery_check("wan", WAYS, 9, 500), "ok", "dht, pex, trackers; 9 DHT nodes", ""),
    "young dht": (diagnosis.discovery_check("wan", WAYS, 0, 119), "ok", "just started", ""),
    "no dht": (diagnosis.discovery_check("wan", WAYS, 0, 120), "warning", "UDP may be blocked", "--peer"),
    "alone": (diagnosis.discovery_check("lan", Discovery(*[False] * 5), 0, 500), "ok", "only peers that are named", ""),
    "clock": (diagnosis.clock_check(86_400, 2 * 86_400, "x"), "ok", "1970-01-02", ""),
    "slow clock": (diagnosis.clock_check(86_399, 2 * 86_400, "x"), "problem", "before x of 1970-01-03", "timedatectl"),
    "trust": (diagnosis.trust_check([Row({"publisher": "p", "name": "*"})], None), "ok", "1 publisher for 1 name pattern", ""),
    "no trust": (diagnosis.trust_check([], None), "warning", "nobody is trusted", "modelp2p trust add"),
    "named": (diagnosis.trust_check([], live()), "ok", f"{PUBLISHER} may speak for lab/model", ""),
    "unnamed": (
        diagnosis.trust_check([], live(name_verified=False, link=LINK)),
        "warning",
        "nobody here gave the name",
        f"modelp2p trust add '{LINK}' --name lab/model",
    ),
    "descriptors": (diagnosis.descriptors_check(0, 4096), "ok", "a daemon started here may open 4096", ""),
    "few descriptors": (diagnosis.descriptors_check(7, 4095), "warning", "pid 7", "sudo prlimit --nofile=65536:65536 --pid 7"),
    "few for a new one": (diagnosis.descriptors_check(0, 64), "warning", "64", "--pid $$"),
    "engine": (diagnosis.engine_check(7, 0, True), "ok", "confined by Landlock 7", ""),
    "no engine": (diagnosis.engine_check(7, 0, False), "ok", "none runs; it would be confined", ""),
    "no landlock": (diagnosis.engine_check(0, 0, True), "warning", "not confined", "/sys/kernel/security/lsm"),
    "crashes": (diagnosis.engine_check(7, 2, True), "warning", "crashed 2 times", "modelp2p status"),
    "public off": (diagnosis.public_socket_check(False, False), "ok", "could not serve", ""),
    "public on": (diagnosis.public_socket_check(True, True), "ok", "on", ""),
    "public wanted": (diagnosis.public_socket_check(True, False), "problem", "Linux 6.16", "uname -r"),
    "cache": (diagnosis.cache_check("/c", True, True, True, True), "ok", "hard links", ""),
    "cache elsewhere": (diagnosis.cache_check("/c", True, True, False, True), "warning", "copied", "HF_HOME"),
    "cache of a service": (diagnosis.cache_check("/c", True, True, False, False), "ok", "symlinks", ""),
    "cache of root": (diagnosis.cache_check("/c", True, False, True, True), "problem", "/c cannot be written", "chown"),
    "no place for a cache": (
        diagnosis.cache_check("/c d", False, False, True, True),
        "problem",
        "/c d cannot be made",
        "sudo install -d -o $(id -u) '/c d'",
    ),
    "gateway": (diagnosis.gateway_check(True, False, 5, ""), "ok", "127.0.0.1:5", ""),
    "gateway deaf": (diagnosis.gateway_check(True, False, 5, "refused"), "problem", "127.0.0.1:5: refused", "modelp2p"),
    "gateway off": (diagnosis.gateway_check(False, False, 0, ""), "ok", "off", ""),
    "gateway missing": (diagnosis.gateway_check(True, False, 0, ""), "problem", "not there", "modelp2p daemon"),
    "gateway of a command": (diagnosis.gateway_check(True, True, 0, ""), "ok", "leaves with the command", ""),
    "jobs": (diagnosis.jobs_check([live(state="fetching")]), "ok", "1 fetch under way, none waits", ""),
    "jobs wait": (
        diagnosis.jobs_check([live(state="paused", error="no peer"), live(state="paused", error="x")]),
        "warning",
        f"{REF} waits: no peer (and 1 more)",
        f"modelp2p fetch {REF} --detach",
    ),
    "paused is no job": (diagnosis.jobs_check([live(state="paused")]), "ok", "none waits", ""),
    "releases": (diagnosis.releases_check([live(state="seeding"), live()]), "ok", "2 releases, 1 of them seeding", ""),
    "in error": (diagnosis.releases_check([live(state="error", error="rot")]), "problem", f"{REF}: rot", "verify"),
    "statements": (diagnosis.statements_check(0), "ok", "none is damaged", ""),
    "damaged": (diagnosis.statements_check(2), "problem", "2 statements damaged", "modelp2p fetch LINK"),
    "release": (release_diagnosis.release_check(live(state="seeding")), "ok", "seeding, 100.0 % of 3.0 MB", ""),
    "release at rest": (release_diagnosis.release_check(live()), "ok", "not served", ""),
    "coming": (release_diagnosis.release_check(live(state="fetching", proven=0)), "ok", "0.0 % of 3.0 MB verified, 2.0 MB/s", ""),
    "begun": (release_diagnosis.release_check(live(state="paused", proven=1)), "warning", "paused", f"modelp2p fetch {REF}"),
    "broken": (release_diagnosis.release_check(live(state="error", error="rot")), "problem", "rot", "--repair"),
    "seeds": (release_diagnosis.peers_check(live(state="fetching", proven=0)), "ok", "2 connected of 5 known, 1 seed: every", ""),
    "no peers": (
        release_diagnosis.peers_check(live(state="fetching", proven=0, peers=0)),
        "problem",
        "nobody delivers",
        "--peer",
    ),
    "partial peers": (
        release_diagnosis.peers_check(live(state="fetching", proven=300_000, seeds=0, fullest_peer=101)),
        "ok",
        "the fullest peer has 10.1 %, this node 10.0 %",
        "",
    ),
    "empty peers": (
        release_diagnosis.peers_check(live(state="fetching", proven=300_000, seeds=0, fullest_peer=100)),
        "warning",
        "10.0 %",
        "--peer",
    ),
    "a seed needs nobody": (release_diagnosis.peers_check(live(state="seeding", peers=0)), "ok", "0 connected", ""),
    "not in the swarm": (release_diagnosis.peers_check(live(state="paused")), "not checked", "paused", "modelp2p fetch"),
    "web seeds": (
        release_diagnosis.web_seeds_check(["https://a/", "b"], True),
        "ok",
        "2 web seeds in the manifest, first https://a/",
        "",
    ),
    "web seeds off": (release_diagnosis.web_seeds_check(["https://a/"], False), "warning", "switched off", "config show"),
    "web seeds of a service": (release_diagnosis.web_seeds_check(["https://a/"], None), "ok", "1 web seed", ""),
    "no web seeds": (release_diagnosis.web_seeds_check([], False), "ok", "names none", ""),
    "disk": (release_diagnosis.disk_check("a", 50_000_000, 1.0, True), "ok", "50.0 MB/s reading 50.0 MB of a", ""),
    "small files": (release_diagnosis.disk_check("a", 3, 0.009, True), "ok", "reading 3 B of a: too little to tell", ""),
    "slow for small files": (release_diagnosis.disk_check("a", 3, 0.1, True), "warning", "30 B/s reading 3 B", "iostat"),
    "slow disk": (release_diagnosis.disk_check("a", 49_999_999, 1.0, False), "warning", "perhaps from memory", "iostat"),
}


@pytest.mark.parametrize(("check", "verdict", "fact", "fix"), JUDGED.values(), ids=JUDGED)
def test_facts_get_a_verdict_and_one_command(check: Check, verdict: str, fact: str, fix: str) -> None:
    assert check.verdict == verdict
    assert fact in check.fact
    # What is well needs no command; what is not has one.
    assert (fix in check.fix) if fix else not check.fix


def test_looking_at_a_home_leaves_no_trace_in_it(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    os.utime(tmp_path, (1000, 1000))
    found = probes.filesystem_of(str(tmp_path))
    assert found.kind
    assert found.locks in (True, None)
    assert probes.unwritable(str(tmp_path)) == []
    assert probes.other_owner(str(tmp_path)) == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["store"]
    assert tmp_path.stat().st_mtime == 1000


def test_a_home_that_is_not_there_is_looked_for_above(tmp_path: Path) -> None:
    home = str(tmp_path / "a" / "b")
    assert probes.existing(home) == os.path.realpath(tmp_path)
    assert probes.unwritable(home) == []
    assert (probes.other_owner(home), probes.last_change(home), probes.lock_holder(home)) == ("", 0, 0)
    assert probes.is_beside(str(tmp_path), str(tmp_path))
    assert not probes.is_beside(str(tmp_path), "/proc")
    assert not (tmp_path / "a").exists()


def test_the_kind_of_a_file_system_is_that_of_the_nearest_mount() -> None:
    assert probes.filesystem_of("/proc").kind == "proc"
    assert probes.filesystem_of("/proc").reflinks is None


def test_the_holder_of_a_home_is_whom_the_kernel_names(tmp_path: Path) -> None:
    for home in ("held", "free"):
        (tmp_path / home / "run").mkdir(parents=True)
        HomeLock.acquire(tmp_path / home / "run" / "lock", this_daemon("s", pid=1, host="h")).release()
    with HomeLock.acquire(tmp_path / "held" / "run" / "lock", this_daemon("s", pid=1, host="h")):
        assert probes.lock_holder(str(tmp_path / "held")) == os.getpid()
        assert probes.lock_holder(str(tmp_path / "free")) == 0
    assert probes.lock_holder(str(tmp_path / "held")) == 0


def test_whoever_locks_a_file_of_the_same_number_elsewhere_is_not_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home" / "run").mkdir(parents=True)
    lock = tmp_path / "home" / "run" / "lock"
    with HomeLock.acquire(tmp_path / "elsewhere", this_daemon("s", pid=1, host="h")):
        HomeLock.acquire(lock, this_daemon("s", pid=1, host="h")).release()
        elsewhere, here = (f":{path.stat().st_ino} " for path in (tmp_path / "elsewhere", lock))
        locks = Path("/proc/locks").read_text("ascii").replace(elsewhere, here)
        monkeypatch.setattr(probes, "open", lambda path, **kwargs: io.StringIO(locks), raising=False)
        assert probes.lock_holder(str(tmp_path / "home")) == 0, "kill -9 would end somebody else"


@contextmanager
def serving(answer: bytes) -> Iterator[int]:
    """The port of a server that gives this answer to the first connection."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def test_a_port_accepts_or_says_why_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert probes.tcp_refusal(f"127.0.0.1:{port}") == probes.tcp_refusal(f"0.0.0.0:{port}") == ""
    assert probes.tcp_refusal(f"127.0.0.1:{port}") == probes.http_refusal(port) == "Connection refused"
    with serving(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") as port:
        assert probes.http_refusal(port) == ""
    with serving(b"SSH-2.0-x\r\n") as port:
        assert probes.http_refusal(port) == "not HTTP (BadStatusLine)"


def test_bound_udp_ports_are_known() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        ports = probes.udp_ports()
        assert ports is not None
        assert bound.getsockname()[1] in ports


def test_a_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(9_000_001))
    sample = probes.read_sample(str(tmp_path / "a"))
    assert sample.read_bytes == 9_000_001
    assert sample.seconds > 0


def test_limits_are_those_of_the_process() -> None:
    assert 0 < probes.descriptor_limit(os.getpid()) <= probes.descriptor_limit(0)
    assert probes.landlock_abi() >= 0


# The whole command, with a daemon from a table


def answers(tmp_path: Path, release: Map = LIVE, **more: Answer) -> dict[str, Answer]:
    # One that a command started: it has neither a gateway nor, as yet, an engine.
    here: Map = {**NODE, "home": str(tmp_path / "home"), "pid": os.getpid(), "engine_pid": 0, "on_demand": True}
    return {
        "status": {"node": here, "releases": [release]},
        "config": {"text": config_to_toml(Config().replace({"store.reserve": 0}))},
        "trust_list": {"entries": [{"publisher": PUBLISHER, "name": "lab/*"}]},
        "gateway": NotFoundError("this daemon has no gateway"),
        "show": shows(),
        **more,
    }


def doctor(tmp_path: Path, daemon: FakeDaemon, *args: str) -> int:
    # Without a reserve a nearly full disk is no problem.
    env = {"MODELP2P_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "MODELP2P_STORE__RESERVE": "0"}
    return modelp2p("doctor", *args, daemon=daemon, env=env)


def checks_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Map]:
    output = capsys.readouterr()
    assert output.err == ""
    body = json.loads(output.out)
    assert list(body) == ["v", "checks"]
    assert all(list(check) == ["name", "verdict", "fact", "fix"] for check in body["checks"])
    return {check["name"]: check for check in body["checks"]}


def test_without_a_daemon_it_says_what_it_could_not_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon({}, is_running=False)
    assert doctor(tmp_path, daemon, "--json") == 0
    checks = checks_of(capsys)
    assert checks["daemon"]["verdict"] == "warning"
    assert {checks[name]["verdict"] for name in ("home", "configuration", "file system")} == {"ok"}
    assert {checks[name]["verdict"] for name in ("ports", "trust", "gateway", "jobs")} == {"not checked"}
    # It brought no daemon, and made no home.
    assert daemon.started_with is None
    assert list(tmp_path.iterdir()) == []


def test_one_problem_is_exit_1_and_one_line_with_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad: Map = {**LIVE, "state": "error", "error": "2 file(s) changed"}
    daemon = FakeDaemon(answers(tmp_path, bad))
    assert doctor(tmp_path, daemon, "-q") == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(f"problem      releases       {REF}: 2 file(s) changed")
    assert lines[at + 1] == f"             fix: modelp2p verify {REF} --repair"
    assert not any(line.startswith("ok") for line in lines)


def test_a_command_that_mends_names_the_home_that_was_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = str(tmp_path / "my home")
    assert doctor(tmp_path, FakeDaemon({}, is_running=False), "--home", home, "--json") == 0
    assert checks_of(capsys)["daemon"]["fix"] == f"modelp2p --home '{home}' daemon"


def test_a_command_for_another_home_or_not_of_ours_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modelp2p home").mkdir()
    home = str(tmp_path / "modelp2p home")
    monkeypatch.setattr(probes, "filesystem_of", lambda folder: Filesystem("tmpfs", False, False, True))
    monkeypatch.setattr(probes, "unwritable", lambda folder: [home])
    assert doctor(tmp_path, FakeDaemon({}, is_running=False), "--home", home, "--json") == 1
    checks = checks_of(capsys)
    assert checks["file system"]["fix"] == "MODELP2P_HOME=/a/local/disk modelp2p daemon"
    assert checks["home"]["fix"] == f"sudo chown -R $(id -u) '{home}'"


def test_a_release_is_looked_at_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetching: Map = {**LIVE, "state": "fetching", "proven": 0}
    daemon = FakeDaemon(answers(tmp_path, fetching))
    assert doctor(tmp_path, daemon, "lab/model", "--json") == 0
    checks = checks_of(capsys)
    assert list(checks)[-4:] == ["release", "peers", "web seeds", "disk"]
    assert checks["peers"]["fact"] == "2 connected of 5 known, 1 seed: everything that is missing is there"
    assert "https://example.org/" in str(checks["web seeds"]["fact"])
    assert checks["trust"]["fact"] == f"{PUBLISHER} may speak for lab/model"
    # Its path is not of this machine.
    assert checks["disk"]["verdict"] == "not checked"
    assert daemon.asked[-1].args == {"ref": "lab/model"}


def test_what_a_daemon_lacks_that_leaves_with_its_command_is_no_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(tmp_path, FakeDaemon(answers(tmp_path)), "--json") == 0
    checks = checks_of(capsys)
    assert checks["ports"]["fact"] == "no engine runs: it opens them with the first transfer"
    assert checks["gateway"]["verdict"] == "ok"


def test_a_release_that_is_not_here_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = FakeDaemon(answers(tmp_path, show=NotFoundError("this release is not known here")))
    assert doctor(tmp_path, daemon, LINK, "--json") == 1
    check = checks_of(capsys)["release"]
    assert (check["verdict"], check["fix"]) == ("problem", f"modelp2p fetch '{LINK}'")


def test_a_typing_error_and_a_missing_bundle_are_errors_before_anything(tmp_path: Path) -> None:
    daemon = FakeDaemon(answers(tmp_path))
    assert doctor(tmp_path, daemon, "a/b/c") == 2
    assert doctor(tmp_path, daemon, str(tmp_path / "none.modelp2p")) == 3
    assert daemon.asked == []


def test_the_service_of_another_user_is_not_judged_by_our_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = DeniedError("for its owner only")
    daemon = FakeDaemon(answers(tmp_path, config=refused, trust_list=refused, gateway=refused))
    assert doctor(tmp_path, daemon, "lab/model", "--json") == 0
    checks = checks_of(capsys)
    assert {checks[name]["verdict"] for name in ("discovery", "gateway", "public socket", "trust")} == {"not checked"}
    assert checks["web seeds"]["fact"] == "1 web seed in the manifest, first https://example.org/"
    assert checks["releases"]["verdict"] == "ok"


def test_a_broken_configuration_is_a_problem_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text("[network]\nmax_upp = 1\n")
    assert doctor(tmp_path, FakeDaemon({}, is_running=False), "--json") == 1
    check = checks_of(capsys)["configuration"]
    assert "max_upp. Did you mean network.max_up?" in str(check["fact"])


def test_a_configuration_that_cannot_be_read_is_a_problem_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "home" / "config.toml"
    place.mkdir(parents=True)
    assert doctor(tmp_path, FakeDaemon({}, is_running=False), "--json") == 1
    assert checks_of(capsys)["configuration"]["fact"] == f"{place}: not a regular file."


def test_a_daemon_that_says_nothing_costs_its_checks_and_not_the_command(tmp_path: Path) -> None:
    gone = threading.Event()

    def never(args: Map, fds: Sequence[int]) -> FakeReply:
        gone.wait()
        return FakeReply({})

    app = App(FakeDaemon({"status": never}), {"MODELP2P_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path)})
    try:
        checks = {check.name: check for check in examine(app, None, check_s=0.2)}
    finally:
        gone.set()
    assert checks["daemon"].fact.startswith("none runs")
    assert (checks["configuration"].verdict, checks["ports"].verdict) == ("ok", "not checked")


def test_a_disk_that_hangs_costs_its_check_and_not_the_command() -> None:
    gone = threading.Event()

    def hang() -> Check:
        gone.wait()
        return diagnosis.ok("space", "too late")

    patient = _Patient(hang)
    try:
        assert _outcome("space", patient, time.monotonic()).verdict == "not checked"
    finally:
        gone.set()
    assert _outcome("space", patient, time.monotonic() + 10).fact == "too late"


def test_the_other_checks_are_told_while_one_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = threading.Event()

    def filesystem_of(folder: str) -> Filesystem:
        # Much longer than this check is given, and not for ever where nobody minds its time.
        told.wait(10)
        return Filesystem("ext4", False, False, True)

    monkeypatch.setattr(probes, "filesystem_of", filesystem_of)
    app = App(FakeDaemon({}, is_running=False), {"MODELP2P_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path)})
    try:
        checks = {check.name: check.verdict for check in examine(app, None, check_s=1.0)}
    finally:
        told.set()
    assert (checks["file system"], checks["home"], checks["hf cache"]) == ("not checked", "ok", "ok")


def test_what_the_disk_refuses_is_not_checked_and_a_bug_is_not_hidden() -> None:
    def refuse() -> Check:
        raise PermissionError(13, "Permission denied", "/h")

    def fail() -> Check:
        raise ValueError("a bug")

    end = time.monotonic() + 10
    assert _outcome("home", _Patient(refuse), end) == Check("home", "not checked", "/h: Permission denied")
    with pytest.raises(ValueError, match="a bug"):
        _outcome("home", _Patient(fail), end)
