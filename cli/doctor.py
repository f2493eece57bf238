"""`doctor`: what keeps this node from working, one line for each thing, with one command that mends it.

Invariants:
- nothing is changed, no daemon is started, and a check that cannot be made says so;
- each check has its own deadline: a disk or a daemon that hangs costs that check, never the command.

Here is who is asked what; `interview.py` asks the daemon and `probes.py` looks at the machine, `diagnosis.py` and
`release_diagnosis.py` judge.
"""

from __future__ import annotations

import os
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import click

from modelp2p.cli import diagnosis, probes, release_diagnosis
from modelp2p.cli.app import App, pass_app
from modelp2p.cli.diagnosis import Check, unchecked
from modelp2p.cli.hfcache import cache_folder
from modelp2p.cli.interview import Told, configured, interview
from modelp2p.cli.options import json_option, place_options, quiet_option
from modelp2p.cli.output import emit_json, out
from modelp2p.cli.refs import text_of, typed_ref
from modelp2p.daemon.client import build
from modelp2p.protocol.errors import ModelP2PError, NotFoundError
from modelp2p.protocol.text import printable

if TYPE_CHECKING:
    from modelp2p.cli.results import Row
    from modelp2p.protocol.names import Ref

CHECK_S = 5.0
"""A machine that is well answers each question within a fraction of a second."""
_PROBLEM_EXIT = 1
_NOBODY = "there is no daemon to ask"
_NOT_OURS = "only the owner of this daemon may ask"

Answer = TypeVar("Answer")
Questions = Mapping[str, Callable[[], Check]]


@click.command()
@click.argument("ref", required=False)
@json_option
@quiet_option
@place_options
@pass_app
def doctor(app: App, ref: str | None) -> int:
    """Look for what keeps this node, and REF, from working; exit 1 where there is a problem.

    Nothing is changed, and no daemon is started. With -q only what is not well is printed.
    """
    checks = examine(app, typed_ref(ref) if ref is not None else None)
    if app.home_flag:
        checks = [replace(check, fix=_in_home(app.home, check.fix)) for check in checks]
    if app.as_json:
        emit_json({"checks": [{"name": c.name, "verdict": c.verdict, "fact": c.fact, "fix": c.fix} for c in checks]})
    else:
        _print([check for check in checks if check.verdict != "ok"] if app.quiet else checks)
    return _PROBLEM_EXIT if any(check.verdict == "problem" for check in checks) else 0


def examine(app: App, ref: Ref | None, *, check_s: float = CHECK_S) -> list[Check]:
    """Every check, in the order a user reads them; takes three times `check_s` at most.

    Raises:
        NotFoundError: there is no such bundle file.
    """
    from modelp2p.daemon.config import Config

    try:
        told = _Patient(partial(configured, app)).result(check_s)
    except TimeoutError:
        told = Told(Config(), unchecked("configuration", f"its files were not read within {check_s:g} s"))
    try:
        told = _Patient(partial(interview, app, ref, told)).result(check_s)
    except TimeoutError:
        told.silence = f"nothing was heard within {check_s:g} s"
    questions = {**_of_machine(app, told), **_of_daemon(told), **(_of_release(ref, told) if ref is not None else {})}
    patients = {name: _Patient(question) for name, question in questions.items()}
    end = time.monotonic() + check_s
    return [_outcome(name, patient, end) for name, patient in patients.items()]


def _of_machine(app: App, told: Told) -> Questions:
    node, config = told.node, told.config
    home = node.text("home", app.home) if node is not None else app.home
    pid = node.number("pid") if node is not None else 0
    return {
        "daemon": lambda: (
            diagnosis.daemon_check(node, build())
            if node is not None
            else diagnosis.no_daemon_check(home, told.silence, probes.lock_holder(home))
        ),
        "configuration": lambda: told.configuration,
        "home": lambda: diagnosis.home_check(
            home, os.path.isdir(home), probes.unwritable(home), probes.other_owner(home), node is not None
        ),
        "file system": lambda: diagnosis.filesystem_check(home, probes.filesystem_of(probes.existing(home))),
        "space": lambda: _space(home, config.store.reserve),
        "descriptors": lambda: diagnosis.descriptors_check(pid, probes.descriptor_limit(pid)),
        "clock": lambda: diagnosis.clock_check(int(time.time()), probes.last_change(home), "the last change of the home"),
        "engine": lambda: _engine(node),
        "hf cache": lambda: _cache(cache_folder(app.environ), home),
    }


def _of_daemon(told: Told) -> Questions:
    node, config = told.node, told.config
    if node is None:
        names = ("ports", "discovery", "gateway", "public socket", "trust", "jobs", "releases", "statements")
        return {name: partial(unchecked, name, _NOBODY) for name in names}
    questions: dict[str, Callable[[], Check]] = {
        "ports": lambda: _ports(node, told),
        "discovery": lambda: diagnosis.discovery_check(
            node.text("profile"), config.network.discovery, node.number("dht_nodes"), node.number("uptime_s")
        ),
        "gateway": lambda: _gateway(node, told),
        "public socket": lambda: diagnosis.public_socket_check(config.control.public, probes.can_open_public_socket()),
        "trust": lambda: diagnosis.trust_check(told.trusted, told.shown),
        "jobs": lambda: diagnosis.jobs_check(told.releases),
        "releases": lambda: diagnosis.releases_check(told.releases),
        "statements": lambda: diagnosis.statements_check(node.number("damaged_statements")),
    }
    if told.is_owner:
        return questions
    return questions | {name: partial(unchecked, name, _NOT_OURS) for name in ("discovery", "gateway", "public socket", "trust")}


def _of_release(ref: Ref, told: Told) -> Questions:
    shown, live = told.shown, told.live
    if told.node is None:
        return {"release": partial(unchecked, "release", _NOBODY, "modelp2p daemon")}
    if shown is None or live is None:
        why = told.unshown.message if told.unshown is not None else "the daemon does not know it any more"
        judged = diagnosis.problem if isinstance(told.unshown, NotFoundError) else unchecked
        return {"release": partial(judged, "release", why, f"modelp2p fetch {shlex.quote(text_of(ref))}")}
    asks_web_seeds = told.config.web_seeds.enabled if told.is_owner else None
    return {
        "release": lambda: release_diagnosis.release_check(live),
        "peers": lambda: release_diagnosis.peers_check(live),
        "web seeds": lambda: release_diagnosis.web_seeds_check(shown.texts("web_seeds"), asks_web_seeds),
        "disk": lambda: _disk(shown),
    }


def _space(home: str, reserve_bytes: int) -> Check:
    from modelp2p.daemon.space import free_bytes

    return diagnosis.space_check(free_bytes(probes.existing(home)), reserve_bytes)


def _engine(node: Row | None) -> Check:
    is_running = node is not None and bool(node.number("engine_pid"))
    abi = node.number("landlock") if node is not None and is_running else probes.landlock_abi()
    return diagnosis.engine_check(abi, node.number("engine_restarts") if node is not None else 0, is_running)


def _cache(cache: str, home: str) -> Check:
    above_cache, above_home = probes.existing(cache), probes.existing(home)
    is_ours = not probes.other_owner(above_home)
    is_beside = probes.is_beside(above_cache, above_home)
    return diagnosis.cache_check(cache, os.path.isdir(cache), not probes.unwritable(cache), is_beside, is_ours)


def _ports(node: Row, told: Told) -> Check:
    if not node.number("engine_pid"):
        return unchecked("ports", "no engine runs: it opens them with the first transfer")
    answers = {address: probes.tcp_refusal(address) for address in node.texts("listen_addresses")}
    ways = told.config.network.discovery
    if not told.is_owner:
        return diagnosis.ports_check(answers, node.number("listen_port"), None, wants_udp=True)
    return diagnosis.ports_check(answers, node.number("listen_port"), probes.udp_ports(), wants_udp=ways.dht or ways.utp)


def _gateway(node: Row, told: Told) -> Check:
    port = told.gateway_port
    refused = probes.http_refusal(port) if port else ""
    return diagnosis.gateway_check(told.config.gateway.enabled, node.flag("on_demand"), port, refused)


def _disk(shown: Row) -> Check:
    tree = shown.text("path")
    for row in sorted(shown.rows("files"), key=lambda row: row.number("size"), reverse=True):
        path = os.path.join(tree, row.text("path"))
        if os.path.isfile(path):
            return release_diagnosis.disk_check(row.text("path"), *probes.read_sample(path))
    return unchecked("disk", "no finished file of it is here")


class _Patient(Generic[Answer]):
    """A question that is being answered in a thread of its own, which is left behind where it takes too long."""

    def __init__(self, question: Callable[[], Answer]) -> None:
        self._question = question
        self._answers: list[Answer] = []
        self._failure: BaseException | None = None
        # A daemon thread: the process ends without it.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self, timeout_s: float) -> Answer:
        """The answer, or what the question raised; TimeoutError where there is none in time."""
        self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive():
            raise TimeoutError
        if self._failure is not None:
            raise self._failure
        return self._answers[0]

    def _run(self) -> None:
        try:
            self._answers.append(self._question())
        except BaseException as exc:
            self._failure = exc


def _outcome(name: str, patient: _Patient[Check], end: float) -> Check:
    try:
        return patient.result(end - time.monotonic())
    except TimeoutError:
        return unchecked(name, "no answer in time: a disk or the daemon hangs")
    except ModelP2PError as exc:
        return unchecked(name, exc.message)
    except OSError as exc:
        return unchecked(name, f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))


def _in_home(home: str, fix: str) -> str:
    """A command of ours that mends this home has to name it, too; one that is not ours, or for another home, stays."""
    ours = "modelp2p "
    return f"{ours}--home {shlex.quote(home)} {fix.removeprefix(ours)}" if fix.startswith(ours) else fix


def _print(checks: Sequence[Check]) -> None:
    for check in checks:
        out(printable(f"{check.verdict:<11}  {check.name:<13}  {check.fact}"))
        if check.fix:
            out(printable(f"{'':13}fix: {check.fix}"))
