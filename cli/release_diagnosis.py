"""What `doctor` makes of one release: how much of it is here, who has the rest, and how fast it is read. Facts in, checks out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelp2p.cli.diagnosis import Check, count_text, ok, problem, unchecked, warning
from modelp2p.cli.units import percent_text, rate_text, size_text

if TYPE_CHECKING:
    from modelp2p.cli.results import Row

SLOW_DISK_BYTES_PER_S = 50_000_000
"""Half of what one hard disk reads in order: whatever reads slower is busy, broken or far away."""
SEEKING_S = 0.1
"""A few seeks of a hard disk: what is read in less says nothing about its rate."""


def release_check(live: Row) -> Check:
    """How much of the release is here, and what it is doing."""
    proven, size, state = live.number("proven"), live.number("size"), live.text("state")
    fact = f"{live.ref}: {state}, {percent_text(proven, size)} of {size_text(size)} verified"
    if state == "error":
        return problem("release", f"{fact}: {live.text('error', '')}", f"modelp2p verify {live.ref} --repair")
    if state == "paused":
        why = live.text("error", "")
        return warning("release", f"{fact}{f': {why}' if why else ''}", f"modelp2p fetch {live.ref}")
    if state == "complete":
        return ok("release", f"{fact}, not served")
    if state == "fetching":
        fact += f", {rate_text(live.number('rate_down'))}"
    return ok("release", fact)


def peers_check(live: Row) -> Check:
    """Somebody is there who has what is missing."""
    connected, known, seeds = live.number("peers"), live.number("peers_known"), live.number("seeds")
    fact = f"{connected} connected of {max(known, connected)} known, {count_text(seeds, 'seed')}"
    is_whole = live.number("proven") >= live.number("size")
    if live.text("state") not in ("fetching", "seeding"):
        return unchecked("peers", f"this node is not in its swarm now ({live.text('state')})", f"modelp2p fetch {live.ref}")
    if is_whole:
        return ok("peers", fact)
    fix = f"modelp2p fetch {live.ref} --peer HOST:PORT"
    if not connected:
        return problem("peers", f"{fact}: nobody delivers what is missing", fix)
    if seeds:
        return ok("peers", f"{fact}: everything that is missing is there")
    # Two partial peers may still have nothing that the other lacks: a share is an upper bound of what one can give.
    ours = 1000 * live.number("proven") // max(1, live.number("size"))
    fullest = live.number("fullest_peer")
    fact += f"; the fullest peer has {fullest / 10:.1f} %, this node {ours / 10:.1f} %"
    return warning("peers", fact, fix) if fullest <= ours else ok("peers", fact)


def web_seeds_check(urls: Sequence[str], is_enabled: bool | None) -> Check:
    """Which origins the manifest names, and whether this node may ask them; None where only the daemon's owner knows."""
    if not urls:
        return ok("web seeds", "the manifest names none")
    named = f"{count_text(len(urls), 'web seed')} in the manifest, first {urls[0]}"
    if is_enabled is None:
        return ok("web seeds", named)
    if not is_enabled:
        return warning("web seeds", f"{named}; switched off here", "modelp2p config show")
    return ok("web seeds", f"{named}; asked where peers do not deliver")


def disk_check(path: str, read_bytes: int, seconds: float, is_direct: bool) -> Check:
    """A file of the release is read at a usable rate."""
    rate = read_bytes / max(seconds, 1e-9)
    fact = f"{rate_text(rate)} reading {size_text(read_bytes)} of {path}{'' if is_direct else ', perhaps from memory'}"
    if rate < SLOW_DISK_BYTES_PER_S and seconds < SEEKING_S:
        return ok("disk", f"{fact}: too little to tell")
    if rate < SLOW_DISK_BYTES_PER_S:
        return warning("disk", fact, "iostat -x 1 3")
    return ok("disk", fact)
