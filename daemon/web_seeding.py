"""The web seeds of one fetch: performs what their plan decides, tells it how peers and origins do, and counts who sent what.

    WebSeedPlan ── usable origins ──► engine: SetWebSeeds ──► relay ──► origin
         ▲                                                      │
         └────────── delivered, failed, banned; peers' bytes ◄──┘

Invariants:
- the engine has exactly the web seeds that the plan allows now, also after it was restarted;
- nothing is opened, read or imported for an origin before the plan wants one;
- it never ends a fetch because of what an origin does; a token that cannot be read, or no port, does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.diskerror import on_disk
from modelp2p.daemon.relay import Relay, Relayed
from modelp2p.protocol.errors import UsageError
from modelp2p.protocol.webseeds import OriginError, Shares, WebOrigin, WebSeedPlan, usable_origins

if TYPE_CHECKING:
    from modelp2p.daemon.config import Config
    from modelp2p.daemon.origin import OriginClient
    from modelp2p.daemon.swarm import Swarm
    from modelp2p.protocol import engine_wire as wire
    from modelp2p.protocol.manifest import Manifest
    from modelp2p.protocol.statement import Release

log = logging.getLogger(__name__)

TICK_S = 1.0
"""How often the plan is asked at least: a torrent says once a second what it received, and only where that changed."""
MAX_TOKEN_BYTES = 4096


class WebSeeding:
    """Directs the web seeds of one torrent.

    Args:
        swarm: where the torrent is.
        relay: what the engine asks.
        release: what is fetched.
        origins: where it may be taken from; empty is nowhere.
        make_client: makes what asks them, when it is first needed.
        patience_s: how long peers may deliver nothing.

    Resources: from the first use of an origin on, connections to it, until `aclose`.
    """

    def __init__(
        self,
        swarm: Swarm,
        relay: Relay,
        release: Release,
        origins: tuple[WebOrigin, ...],
        make_client: Callable[[], Awaitable[OriginClient]],
        patience_s: float,
    ) -> None:
        self._swarm = swarm
        self._relay = relay
        self._release = release
        self._make_client = make_client
        self._plan = WebSeedPlan(origins, trio.current_time(), patience_s)
        self._shares = Shares()
        self._relayed: Relayed | None = None
        self._used: tuple[int, ...] = ()
        self._was_used = False
        """Whether the engine had any web seed since the last count."""
        self._wake = trio.Event()

    def __repr__(self) -> str:
        return f"<WebSeeding {self._release.ref}: {len(self._used)} of {len(self._plan.origins)} origins used>"

    @property
    def from_web(self) -> int:
        """Useful bytes that origins have sent."""
        return self._shares.from_web

    @property
    def from_peers(self) -> int:
        """Useful bytes that peers have sent."""
        return self._shares.from_peers

    @property
    def reason(self) -> str:
        """Which origins are kept from use and until when, for people; empty where none is."""
        return self._plan.reason(trio.current_time(), datetime.now().astimezone())

    async def run(self) -> None:
        """Direct until cancelled; returns at once where there is no origin.

        Raises:
            ModelP2PError: what was configured for web seeds cannot be used.
        """
        if not self._plan.origins:
            return
        while True:
            self._wake = trio.Event()
            await self._direct()
            now = trio.current_time()
            with trio.move_on_at(min(now + TICK_S, self._plan.next_deadline(now) or math.inf)):
                await self._wake.wait()

    async def aclose(self) -> None:
        """Relay nothing any more; once the torrent has left the swarm."""
        if self._relayed is not None:
            self._relay.remove(self._relayed)
            await self._relayed.client.aclose()

    def added(self) -> None:
        """The torrent was added to the swarm anew: it has no web seed, and is not held."""
        self._used = ()
        self.hold(False)
        self._wake.set()

    def hold(self, on: bool) -> None:
        """The torrent is held, or let go on."""
        self._plan.held(on, trio.current_time())

    def count(self, received: int, wasted: int) -> None:
        """What the torrent has received from everybody so far, and how much of it was of no use."""
        sent = sum(self._relayed.sent) if self._relayed is not None else 0
        self._shares.update(received=received, wasted=wasted, sent=sent, is_on_duty=self._was_used)
        self._was_used = bool(self._used)
        self._plan.heard_peers(self._shares.peers, trio.current_time())

    def failed(self, event: wire.WebSeedFailed) -> None:
        """The engine says that a web seed is of no use."""
        relayed = self._relayed
        number = self._relay.number_of(relayed, event.url) if relayed is not None else None
        if number is None:
            return
        if event.is_banned:
            # Also where it was taken out meanwhile: what it sent stays wrong.
            log.warning("%s: %s sent wrong bytes and is not asked again", self._release.ref, self._plan.origins[number].shown)
            self._plan.banned(number)
            self._wake.set()
        elif number in self._used:
            self._report(number, OriginError(event.message))

    async def _direct(self) -> None:
        usable = self._plan.usable(trio.current_time())
        if usable == self._used:
            return
        if self._relayed is None:
            self._relayed = Relayed(self._release, self._plan.origins, await self._make_client(), self._report)
            await self._relay.add(self._relayed)
        relayed, self._used = self._relayed, usable
        self._was_used |= bool(usable)
        await self._swarm.set_web_seeds(self._release.info_hash, [self._relay.url(relayed, number) for number in usable])

    def _report(self, number: int, error: OriginError | None) -> None:
        if error is None:
            self._plan.delivered(number)
            return
        log.info("%s: origin %s: %s", self._release.ref, self._plan.origins[number].shown, error.message)
        self._plan.failed(number, error, trio.current_time())
        self._wake.set()


def web_seeding_of(swarm: Swarm, relay: Relay, release: Release, config: Config, *, peers_only: bool) -> WebSeeding:
    """The web seeding of a fetch, under this configuration."""
    origins = () if peers_only else allowed_origins(release.manifest, config)
    make_client = partial(trio.to_thread.run_sync, _client_of, config)
    return WebSeeding(swarm, relay, release, origins, make_client, config.web_seeds.patience_s)


def allowed_origins(manifest: Manifest, config: Config) -> tuple[WebOrigin, ...]:
    """The web seeds of a manifest that this node may ask."""
    if not config.web_seeds.enabled:
        return ()
    return usable_origins(manifest.web_seeds, config.web_seeds.hosts)


def _client_of(config: Config) -> OriginClient:
    """In a thread: the import, and the authorities of the system, are 100 ms."""
    from modelp2p.daemon.origin import OriginClient

    token = _token_of(config.web_seeds.token_file)
    with on_disk("cannot read the certificate authorities, which the system or SSL_CERT_FILE names"):
        return OriginClient(config.web_seeds.hosts, token=token, token_origin=config.gateway.origin)


def _token_of(path: str) -> str:
    """The token in a file; empty for no file.

    Raises:
        StoreError, NotFoundError: it cannot be read.
        UsageError: it holds no token.
    """
    if not path:
        return ""
    with on_disk(f"cannot read the token file {path}"), Path(path).open("rb") as file:
        data = file.read(MAX_TOKEN_BYTES + 1)
    token = data.strip()
    # It becomes part of a header.
    if not token or len(data) > MAX_TOKEN_BYTES or any(not 0x21 <= byte <= 0x7E for byte in token):
        raise UsageError(f"{path} holds no token", hint="A token is one line of ASCII.", key="web_seeds.token_file")
    return token.decode("ascii")
