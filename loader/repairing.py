"""Asking the home's daemon about a bad piece: to prove that file again, and to fetch what is bad of it.

Invariants:
- only files of the home's own store are asked about; the daemon puts a new inode in the place of a bad one, so who has the old
  one open keeps what it had, and has to open the path again;
- a daemon that is not there, refuses, fails or falls silent is an ordinary answer: no, with a reason;
- several bad pieces of one span are one round trip, and a piece that is still bad afterwards is another.

The daemon's yes is a hint that reading again is worth while; what is read then is hashed here like everything else.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelp2p.daemon.client import Client
from modelp2p.loader.arriving import DEFAULT_TIMEOUT_S, check_timeout
from modelp2p.loader.home import tree_at
from modelp2p.protocol import codec
from modelp2p.protocol.errors import CorruptError, IntegrityError, ModelP2PError, NotFoundError
from modelp2p.protocol.job import MAX_TIMEOUT_S

if TYPE_CHECKING:
    from modelp2p.loader.locate import Located

GRACE_S = 10.0
"""What we wait longer than the daemon does for a byte: it knows better what went wrong."""
JUST_NOW_S = 1.0
"""How old an answer may be that counts for another piece: the bad pieces of a span are asked about in one go."""

_log = logging.getLogger("modelp2p.loader")


@dataclass(slots=True)
class _Answer:
    is_repaired: bool
    pieces: set[int]
    """Those it was given for."""
    at: float


class DaemonRepair:
    """An `OnBad` for one release: told path and piece, it returns whether the daemon says that the file is good again.

    For one thread at a time. Holds nothing open between two calls.

    Args:
        located: the release and the folder its files are read from.
        home: whose daemon is asked.
        timeout_s: how long the daemon may go without a newly proven byte; infinite: as long as one can ask for.
        clock: monotonic seconds.

    Raises:
        UsageError: `timeout_s` is negative, or no number.
    """

    def __init__(
        self,
        located: Located,
        home: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._release = located.release
        self._directory = located.directory
        self._home = home
        self._timeout_s = min(MAX_TIMEOUT_S, check_timeout(timeout_s))
        self._clock = clock
        self._answers: dict[str, _Answer] = {}
        self._reasons: dict[str, str] = {}
        self.on_refusal: Callable[[str], None] = lambda reason: None
        """Told why a file was not repaired, in words."""

    def __repr__(self) -> str:
        return f"<DaemonRepair of {self._release.ref} by the daemon of {self._home}, {len(self._answers)} files asked about>"

    def __call__(self, path: str, piece: int) -> bool:
        last = self._answers.get(path)
        if last is not None and piece not in last.pieces and self._clock() - last.at < JUST_NOW_S:
            last.pieces.add(piece)
            return last.is_repaired
        _log.warning("piece %d of '%s' in %s is bad: asking the daemon to repair it", piece, path, self._release.ref)
        self._reasons.pop(path, None)
        try:
            self._repair(path)
        except ModelP2PError as exc:
            self._reasons[path] = reason = f"'{path}' was not repaired: {exc.message}"
            self.on_refusal(reason)
        is_repaired = path not in self._reasons
        self._answers[path] = _Answer(is_repaired, {piece}, self._clock())
        return is_repaired

    def explained(self, error: IntegrityError) -> IntegrityError:
        """The same error, saying also why the file it is about was not repaired, or that it was and this came of it."""
        path = error.facts.get("path")
        if not isinstance(path, str) or path not in self._answers:
            return error
        tried = self._reasons.get(path, "the daemon has repaired the file, and it is bad again")
        return IntegrityError(f"{error.message}; {tried}", hint=error.hint, **error.facts)

    def _repair(self, path: str) -> None:
        """Return when the file is good again.

        Raises:
            ModelP2PError: why it is not.
        """
        tree = tree_at(self._directory)
        if tree is None or tree.home != os.path.realpath(self._home) or tree.info_hash != self._release.info_hash:
            raise NotFoundError("it lies outside of the home's store, where a daemon repairs nothing")
        with Client.connect(self._home) as daemon:
            reply = daemon.call(
                "verify",
                {
                    "ref": str(self._release.link()),
                    "repair": True,
                    "only": [path],
                    "timeout_s": max(1, math.ceil(self._timeout_s)),
                },
                silence_s=self._timeout_s + GRACE_S,
            )
        if not codec.take(reply.result, "ok", bool):
            raise CorruptError("the daemon found it bad and could not replace it", path=path)
