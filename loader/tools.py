"""What one open release makes copies with, in one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelp2p.loader.windows import Transfers

if TYPE_CHECKING:
    from modelp2p.loader.device import Device
    from modelp2p.loader.gpu import Verifier
    from modelp2p.loader.hashers import Hashers
    from modelp2p.loader.hashing import Workers
    from modelp2p.loader.readers import Reader
    from modelp2p.loader.ring import Ring
    from modelp2p.loader.shard import Shard

OnBad = Callable[[str, int], bool]
"""Told path and piece; returns whether the file was repaired, so that reading it again is worth while."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What a flow works with."""

    device: Device
    ring: Ring
    workers: Workers
    hashers: Hashers
    verifier: Verifier | None
    """Who proves on the device; None: the workers do, in host memory."""
    reader_of: Callable[[Shard], Reader]
    on_bad: OnBad | None = None
    on_reread: Callable[[], None] = lambda: None
    on_repair: Callable[[int], None] = lambda pieces: None
    transfers: Transfers = field(default_factory=Transfers)
