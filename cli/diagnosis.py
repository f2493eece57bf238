"""What `doctor` makes of what it saw: a verdict, one line of fact and at most one command for each check. Facts in, checks out.

Nothing here reads, connects or waits: `probes.py` and `interview.py` do.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from modelp2p.cli.units import duration_text, size_text, time_text

if TYPE_CHECKING:
    from modelp2p.cli.results import Row
    from modelp2p.daemon.config import Discovery

Verdict = Literal["ok", "warning", "problem", "not checked"]

FEW_DESCRIPTORS = 4096
"""500 connections and 500 open files of libtorrent, as many of ours, and some room."""
LITTLE_ROOM_BYTES = 10_000_000_000
"""Less than this beyond the reserve holds hardly a model."""
DHT_WARM_UP_S = 120
CLOCK_SLACK_S = 86_400
_VOLATILE = frozenset({"tmpfs", "ramfs"})
_NO_HARD_LINKS = frozenset({"exfat", "msdos", "vfat"})
_OTHER_HOME = "MODELP2P_HOME=/a/local/disk modelp2p daemon"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report; `fix` is a command, empty where there is nothing to do."""

    name: str
    verdict: Verdict
    fact: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Filesystem:
    """Where a home lies. None means that it could not be found out without leaving a trace."""

    kind: str
    is_network: bool
    reflinks: bool | None
    locks: bool | None


def ok(name: str, fact: str) -> Check:
    """Nothing to do."""
    return Check(name, "ok", fact)


def warning(name: str, fact: str, fix: str) -> Check:
    """It works, and not as well as it could."""
    return Check(name, "warning", fact, fix)


def problem(name: str, fact: str, fix: str) -> Check:
    """Something does not work."""
    return Check(name, "problem", fact, fix)


def unchecked(name: str, why: str, fix: str = "") -> Check:
    """A check that could not be made."""
    return Check(name, "not checked", why, fix)


def daemon_check(node: Row, build: str) -> Check:
    """The daemon answers."""
    theirs = node.text("build", "of another version")
    if theirs != build:
        return warning("daemon", f"the daemon is {theirs}, this command is {build}", f"kill {node.number('pid')}")
    kind = ", started by a command" if node.flag("on_demand") else ""
    return ok("daemon", f"{build}, pid {node.number('pid')}, up {duration_text(node.number('uptime_s'))}{kind}")


def no_daemon_check(home: str, message: str, holder: int) -> Check:
    """No daemon answers; `holder` is the pid of a living process that has the home, 0 for none."""
    if holder:
        # One that hangs may not hear less; nothing that is proven is lost by it.
        return problem("daemon", f"pid {holder} holds the home and does not answer: {message}", f"kill -9 {holder}")
    return warning("daemon", f"none runs for {home}: nothing is seeded", "modelp2p daemon")


def home_check(home: str, exists: bool, unwritable: Sequence[str], owner: str, answers: bool) -> Check:
    """The folders of the home can be written, but for those `unwritable`; `owner` is another user whose it is, if it is."""
    if owner and answers:
        return ok("home", f"{home} is {owner}'s; only their daemon writes there")
    if owner:
        fix = f"sudo -u {shlex.quote(owner)} modelp2p daemon --home {shlex.quote(home)}"
        return problem("home", f"{home} is {owner}'s, and no daemon of theirs answers", fix)
    if unwritable:
        what = f"{home} cannot be made" if not exists else f"{unwritable[0]} cannot be written"
        return problem("home", what, _own(unwritable[0]) if exists else _make(home))
    return ok("home", f"{home}{'' if exists else ' (not made yet)'} can be written")


def filesystem_check(place: str, found: Filesystem) -> Check:
    """Links, reflinks and locks work where the home is."""
    links = found.kind not in _NO_HARD_LINKS
    can = [
        "hard links" if links else "no hard links",
        {True: "reflinks", False: "no reflinks", None: "reflinks not tried"}[found.reflinks],
        {True: "locks", False: "no locks", None: "locks not tried"}[found.locks],
    ]
    fact = f"{place} is {found.kind}: {', '.join(can)}"
    if found.locks is False or not links:
        return problem("file system", fact, _OTHER_HOME)
    if found.is_network:
        return warning("file system", f"{fact}; shared between hosts, where one daemon at a time may use it", _OTHER_HOME)
    if found.kind in _VOLATILE:
        return warning("file system", f"{fact}; it is empty after a restart", _OTHER_HOME)
    return ok("file system", fact)


def space_check(free_bytes: int, reserve_bytes: int) -> Check:
    """There is room beyond the reserve. A fetch that began has taken its room already."""
    fact = f"{size_text(free_bytes)} free, {size_text(reserve_bytes)} of them kept in reserve"
    room = free_bytes - reserve_bytes
    if room <= 0:
        return problem("space", f"{fact}: nothing can be fetched", "modelp2p gc")
    if room < LITTLE_ROOM_BYTES:
        return warning("space", fact, "modelp2p gc")
    return ok("space", fact)


def ports_check(answers: Mapping[str, str], port: int, udp: frozenset[int] | None, wants_udp: bool) -> Check:
    """The listen addresses accept TCP, and UDP is bound. `answers` maps each address to "" or why it does not accept."""
    if not answers:
        return problem("ports", "the daemon listens nowhere: peers cannot connect to it", "modelp2p config show --running")
    deaf = {address: why for address, why in answers.items() if why}
    fact = f"TCP accepted on {', '.join(address for address in answers if address not in deaf)}"
    if len(deaf) == len(answers):
        address, why = next(iter(deaf.items()))
        return problem("ports", f"TCP is not accepted on {address}: {why}", "modelp2p config show --running")
    if deaf:
        fact += f"; not on {', '.join(f'{address} ({why})' for address, why in deaf.items())}"
        return warning("ports", fact, "modelp2p config show --running")
    if not wants_udp:
        return ok("ports", f"{fact}; UDP is not used")
    if udp is None:
        return ok("ports", f"{fact}; UDP not checked")
    if port not in udp:
        return warning("ports", f"{fact}; UDP port {port} is not bound", "modelp2p config show --running")
    return ok("ports", f"{fact}; UDP port {port} bound. From outside only a peer can tell")


def discovery_check(profile: str, ways: Discovery, dht_nodes: int, uptime_s: int) -> Check:
    """The node can meet peers."""
    on = [name for name in ways._fields if getattr(ways, name) and name != "utp"]
    fact = f"profile {profile}: {', '.join(on) or 'only peers that are named'}"
    if not ways.dht:
        return ok("discovery", fact)
    fact += f"; {count_text(dht_nodes, 'DHT node')}"
    if dht_nodes:
        return ok("discovery", fact)
    if uptime_s < DHT_WARM_UP_S:
        return ok("discovery", f"{fact} yet, the daemon has just started")
    return warning("discovery", f"{fact}: UDP may be blocked", "modelp2p daemon --peer HOST:PORT")


def clock_check(now: int, newest: int, what: str) -> Check:
    """The clock is not behind the newest thing that is known to have happened: `what`, at `newest`."""
    if now + CLOCK_SLACK_S < newest:
        fact = f"the clock says {time_text(now)}, before {what} of {time_text(newest)}"
        return problem("clock", fact, "sudo timedatectl set-ntp true")
    return ok("clock", time_text(now))


def trust_check(entries: Sequence[Row], release: Row | None) -> Check:
    """Somebody may speak for names; with a release, its publisher for its name."""
    if release is not None:
        name, publisher = release.text("name"), release.text("publisher")
        if release.flag("name_verified"):
            return ok("trust", f"{publisher} may speak for {name}")
        fix = f"modelp2p trust add {shlex.quote(release.text('link', 'LINK'))} --name {name}"
        return warning("trust", f"{publisher} signed it, whom nobody here gave the name {name}", fix)
    if not entries:
        return warning("trust", "nobody is trusted for any name: releases are had by link only", "modelp2p trust add --help")
    publishers = {entry.text("publisher") for entry in entries}
    return ok("trust", f"{count_text(len(publishers), 'publisher')} for {count_text(len(entries), 'name pattern')}")


def descriptors_check(pid: int, limit: int) -> Check:
    """Enough files and connections may be open at once; `pid` is the daemon's, 0 for one that is started from here."""
    fact = f"{f'the daemon (pid {pid})' if pid else 'a daemon started here'} may open {limit} files and connections"
    if limit < FEW_DESCRIPTORS:
        return warning("descriptors", fact, f"sudo prlimit --nofile=65536:65536 --pid {pid or '$$'}")
    return ok("descriptors", fact)


def engine_check(abi: int, restarts: int, is_running: bool) -> Check:
    """The engine is locked in by the kernel, and does not crash."""
    fact = f"confined by Landlock {abi}" if abi else "this kernel has no Landlock: the engine is not confined"
    if not is_running and abi:
        fact = f"none runs; it would be {fact}"
    if restarts:
        return warning("engine", f"crashed {count_text(restarts, 'time')} since the daemon started; {fact}", "modelp2p status")
    return ok("engine", fact) if abi else warning("engine", fact, "cat /sys/kernel/security/lsm")


def public_socket_check(is_wanted: bool, is_possible: bool) -> Check:
    """Other users of the machine can be served where that is wanted."""
    if not is_wanted:
        return ok("public socket", f"off; this kernel {'could' if is_possible else 'could not'} serve other users")
    if not is_possible:
        return problem("public socket", "wanted, and this kernel cannot: it needs Linux 6.16", "uname -r")
    return ok("public socket", "on")


def cache_check(cache: str, exists: bool, is_writable: bool, is_beside: bool, store_is_ours: bool) -> Check:
    """Releases get into the Hugging Face cache, without a second copy."""
    if not is_writable:
        what = f"{cache} cannot be {'written' if exists else 'made'}"
        return problem("hf cache", what, _own(cache) if exists else _make(cache))
    if not store_is_ours:
        return ok("hf cache", f"{cache}: blobs are symlinks into a store that is not yours")
    if not is_beside:
        fact = f"{cache} is on another file system than the store: releases are copied into it"
        return warning("hf cache", fact, "export HF_HOME=/a/folder/beside/the/store")
    return ok("hf cache", f"{cache}: on the file system of the store, blobs are hard links")


def gateway_check(is_enabled: bool, is_on_demand: bool, port: int, refused: str) -> Check:
    """The Hugging Face endpoint answers; `port` is 0 where there is none, `refused` why it did not answer."""
    if port and not refused:
        return ok("gateway", f"answers on 127.0.0.1:{port}")
    if port:
        return problem("gateway", f"does not answer on 127.0.0.1:{port}: {refused}", "modelp2p status")
    if is_on_demand:
        return ok("gateway", "none: this daemon leaves with the command that started it")
    if is_enabled:
        return problem("gateway", "enabled, and not there", "modelp2p daemon")
    return ok("gateway", "off")


def jobs_check(releases: Sequence[Row]) -> Check:
    """No detached fetch waits for something that does not come by itself."""
    waiting = [row for row in releases if row.text("state") == "paused" and row.text("error", "")]
    if not waiting:
        under_way = sum(row.text("state") in ("queued", "fetching", "proving") for row in releases)
        return ok("jobs", f"{count_text(under_way, 'fetch', 'fetches')} under way, none waits")
    first = waiting[0]
    more = f" (and {len(waiting) - 1} more)" if len(waiting) > 1 else ""
    return warning("jobs", f"{first.ref} waits: {first.text('error')}{more}", f"modelp2p fetch {first.ref} --detach")


def releases_check(releases: Sequence[Row]) -> Check:
    """No release is in error."""
    bad = [row for row in releases if row.text("state") == "error"]
    if not bad:
        seeding = sum(row.text("state") == "seeding" for row in releases)
        return ok("releases", f"{count_text(len(releases), 'release')}, {seeding} of them seeding")
    first = bad[0]
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return problem("releases", f"{first.ref}: {first.text('error', '')}{more}", f"modelp2p verify {first.ref} --repair")


def statements_check(damaged: int) -> Check:
    """Every statement on the disk is as it was signed."""
    if damaged:
        return problem("statements", f"{count_text(damaged, 'statement')} damaged on the disk, not used", "modelp2p fetch LINK")
    return ok("statements", "none is damaged")


def count_text(number: int, one: str, many: str = "") -> str:
    """`1 seed`, `2 seeds`, `0 fetches`."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def _own(folder: str) -> str:
    return f"sudo chown -R $(id -u) {shlex.quote(folder)}"


def _make(folder: str) -> str:
    # What lies above it is not this user's to take, least of all with all that it holds.
    return f"sudo install -d -o $(id -u) {shlex.quote(folder)}"
