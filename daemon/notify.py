"""systemd's notification protocol: one datagram to `$NOTIFY_SOCKET`.

Format: https://www.freedesktop.org/software/systemd/man/sd_notify.html
"""

from __future__ import annotations

import logging
import socket
import time

import trio

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
"""A quarter of the unit's WatchdogSec: a stuck event loop stops sending and is restarted."""


class Notifier:
    """Tells the service manager; does nothing where there is none."""

    def __init__(self, address: str | None) -> None:
        self._address = "\0" + address[1:] if address and address.startswith("@") else address

    def tell(self, text: str) -> None:
        """Send one notification; a manager that is gone is logged, nothing else."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            try:
                channel.sendto(text.encode("utf-8"), self._address)
            except OSError as exc:
                log.warning("the service manager cannot be told: %s", exc)

    def reloading(self) -> None:
        """Say that the configuration is being read again; `READY=1` ends it."""
        # The time is how systemd tells this reload from the one before: sd_notify(3), RELOADING=1.
        self.tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    async def keep_alive(self) -> None:
        """Feed the watchdog until cancelled."""
        while self._address:
            self.tell("WATCHDOG=1")
            await trio.sleep(KEEP_ALIVE_S)
