"""What libtorrent really runs with: the table is read back from live sessions, and the limits are measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import libtorrent as lt
import pytest
import trio

from modelp2p.daemon.engine.settings import MAX_RATE, libtorrent_settings, uses_pex
from modelp2p.daemon.supervisor import EngineFolders, EngineSwarm
from modelp2p.protocol.engine_wire import EngineSettings, TransferFinished
from modelp2p.protocol.errors import UsageError
from tests.daemon.swarming import Shared, quiet_settings, running

if TYPE_CHECKING:
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
    running_with = session.get_settings()
    assert {key: running_with[key] for key in chosen} == chosen


RATE = 4_000_000
MEASURED_S = 10
LIMITS = {
    "node down": ({"max_down": RATE}, {}, {}, {}),
    "node up": ({}, {"max_up": RATE}, {}, {}),
    "torrent down": ({}, {}, {"max_down": RATE}, {}),
    "torrent up": ({}, {}, {}, {"max_up": RATE}),
}
"""Settings of the fetching node and of the seed, and what is set in the specs of both: one limit each."""


@pytest.mark.swarm
@pytest.mark.slow
async def test_rate_limits_bind_local_peers_and_are_used(tmp_path: Path) -> None:
    """All four at once, each with its own pair of nodes: how long does it take to fetch what fits into 10 seconds?"""
    # Zeros: one root, quickly made, and as good as anything to count.
    shared = Shared({"zeros": bytes(RATE * MEASURED_S)}, 1 << 20)
    used: dict[str, float] = {}

    async def measure(name: str) -> None:
        node_settings, seed_settings, node_spec, seed_spec = LIMITS[name]
        places = [tmp_path / name / "seed", tmp_path / name / "node"]
        settings = [quiet_settings(**seed_settings), quiet_settings(**node_settings)]
        swarms = [EngineSwarm(given, EngineFolders(str(place))) for given, place in zip(settings, places, strict=True)]
        async with running(swarms[0], places[0]) as seed, running(swarms[1], places[1]) as node:
            shared.write(seed.folder)
            await seed.swarm.add(replace(shared.spec(seed.folder, have=True), **seed_spec))
            await node.swarm.add(replace(shared.spec(node.folder, have=False), **node_spec))
            peer = await seed.peer()
            await node.swarm.wait_listening()
            began = trio.current_time()
            await node.swarm.connect(shared.info_hash, [peer])
            await node.wait_for(TransferFinished)
            used[name] = MEASURED_S / (trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for name in LIMITS:
            nursery.start_soon(measure, name)
    outside = {name: f"{share:.1%} of the limit" for name, share in used.items() if not 0.85 <= share <= 1.05}
    assert not outside
