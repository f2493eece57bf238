"""What libtorrent really runs with: the table is read back from live sessions, and the limits are measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import libtorrent as lt
import pytest
import trio

from modelp2p.daemon.engine.settings import MAX_RATE, libtorrent_settings, uses_pex
from modelp2p.daemon.supervisor import EngineFolders, EngineSwarm
from modelp2p.protocol.engine_wire import EngineSettings, PiecesFinished
from modelp2p.protocol.errors import UsageError
from tests.daemon.swarming import Node, Shared, quiet_settings, running

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SAFE = {
    "disable_hash_checks": False,
    "validate_https_trackers": True,
    "ssrf_mitigation": True,
    "allow_idna": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "webtorrent_stun_server": "",
    "peer_dscp": 0,
    "no_connect_privileged_ports": True,
    "listen_system_port_fallback": False,
    "max_retry_port_bind": 0,
    "max_metadata_size": 8 << 20,
}
DISCOVERY = {
    "wan": {"enable_dht": True, "enable_lsd": False, "enable_outgoing_utp": True, "enable_incoming_utp": True},
    "lan": {"enable_dht": False, "enable_lsd": True, "enable_outgoing_utp": False, "enable_incoming_utp": False},
}


@pytest.mark.parametrize("profile", ["wan", "lan"])
def test_each_profile_is_safe_and_discovers_what_it_says(profile: str) -> None:
    chosen = libtorrent_settings(EngineSettings(profile))
    assert chosen.items() >= (SAFE | DISCOVERY[profile]).items()
    assert chosen["listen_interfaces"] == "0.0.0.0:16881,[::]:16881"


@pytest.mark.parametrize("profile", ["wan", "lan"])
def test_overrides_win_over_the_profile(profile: str) -> None:
    for on in (True, False):
        settings = EngineSettings(profile, dht=on, lsd=on, pex=on, utp=on, dht_bootstrap=("192.0.2.1:1", "192.0.2.2:1"))
        chosen = libtorrent_settings(settings)
        assert {chosen[key] for key in ("enable_dht", "enable_lsd", "enable_incoming_utp", "enable_outgoing_utp")} == {on}
        assert chosen["dht_bootstrap_nodes"] == ("192.0.2.1:1,192.0.2.2:1" if on else "")
        assert uses_pex(settings) is on


def test_lan_speaks_no_rc4_and_reconnects_at_once() -> None:
    lan = libtorrent_settings(EngineSettings("lan"))
    assert lan["in_enc_policy"] == lan["out_enc_policy"] == lt.enc_policy.pe_disabled
    assert lan["min_reconnect_time"] == 1


@pytest.mark.parametrize("address", ["", "127.0.0.1", "localhost:1", "127.0.0.1:65536", "::1:80x", "127.0.0.1:1,0.0.0.0:2"])
def test_only_addresses_are_listened_on(address: str) -> None:
    with pytest.raises(UsageError):
        libtorrent_settings(EngineSettings(listen=(address,)))


def test_an_unknown_profile_is_named() -> None:
    with pytest.raises(UsageError, match="moon"):
        libtorrent_settings(EngineSettings("moon"))


def test_a_rate_that_32_bits_cannot_hold_means_unlimited() -> None:
    assert libtorrent_settings(EngineSettings(max_up=MAX_RATE))["upload_rate_limit"] == MAX_RATE
    assert libtorrent_settings(EngineSettings(max_up=MAX_RATE + 1))["upload_rate_limit"] == 0


@pytest.mark.swarm
@pytest.mark.parametrize("profile", ["wan", "lan"])
def test_a_live_session_runs_with_every_setting(profile: str) -> None:
    quiet = replace(quiet_settings(), profile=profile)
    chosen = libtorrent_settings(quiet)
    session = lt.session(lt.session_params(chosen))  # type: ignore[call-overload]  # the stub wants a literal
    running_with: Mapping[str, object] = dict(session.get_settings())
    assert {key: running_with[key] for key in chosen} == chosen


RATE = 4_000_000
WARM_UP_S, MEASURED_S = 2, 10
PIECE_BYTES = 128 << 10


class Limits(NamedTuple):
    """One limit each: of the fetching node, of the seed's node, of the torrent here, of the torrent at the seed."""

    node_down: int = 0
    node_up: int = 0
    torrent_down: int = 0
    torrent_up: int = 0


LIMITS = [Limits(node_down=RATE), Limits(node_up=RATE), Limits(torrent_down=RATE), Limits(torrent_up=RATE)]


@pytest.mark.swarm
@pytest.mark.slow
async def test_rate_limits_bind_local_peers_and_are_used(tmp_path: Path) -> None:
    """All four at once, each between its own pair of nodes: never above by more than 5 %, at least 85 % used, over 10 s."""
    # Zeros: one root, quickly made, and as good as anything to count.
    shared = Shared({"zeros": bytes(RATE * (WARM_UP_S + MEASURED_S + 3))}, PIECE_BYTES)
    used: dict[Limits, float] = {}

    async def measure(limits: Limits, place: Path) -> None:
        seeding = EngineSwarm(quiet_settings(max_up=limits.node_up), EngineFolders(str(place / "seed")))
        fetching = EngineSwarm(quiet_settings(max_down=limits.node_down), EngineFolders(str(place / "node")))
        async with running(seeding, place / "seed") as seed, running(fetching, place / "node") as node:
            shared.write(seed.folder)
            await seed.swarm.add(replace(shared.spec(seed.folder, have=True), max_up=limits.torrent_up))
            spec = shared.spec(node.folder, have=False, peers=(await seed.peer(),))
            await node.swarm.add(replace(spec, max_down=limits.torrent_down))
            await node.wait_for(PiecesFinished)
            await trio.sleep(WARM_UP_S)
            began, before = await next_piece(node)
            await trio.sleep(MEASURED_S)
            ended, after = await next_piece(node)
            used[limits] = (after - before) * PIECE_BYTES / (ended - began) / RATE

    async with trio.open_nursery() as nursery:
        for number, limits in enumerate(LIMITS):
            nursery.start_soon(measure, limits, tmp_path / str(number))
    outside = {limits: f"{share:.1%}" for limits, share in used.items() if not 0.85 <= share <= 1.05}
    assert not outside


async def next_piece(node: Node) -> tuple[float, int]:
    """When the next piece is finished, and how many are then: libtorrent's own counters move only once a second."""
    before = len(node.announced())
    with trio.fail_after(10):
        while len(node.announced()) == before:  # noqa: ASYNC110  # the moment counts
            await trio.sleep(0.005)
    return trio.current_time(), len(node.announced())
