"""What the fetch machine hears (events) and what it wants done (effects); see `fetching` for the rules between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from modelp2p.protocol.errors import ModelP2PError
    from modelp2p.protocol.ranges import Ranges


@dataclass(frozen=True, slots=True)
class Received:
    """The engine believes these pieces are finished."""

    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Proved:
    """Pieces were read back: the `good` match the signed layer, the `bad` do not, or not yet."""

    good: tuple[int, ...]
    bad: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Synced:
    """The data of these pieces is on the disk and the journal says so."""

    pieces: Ranges


@dataclass(frozen=True, slots=True)
class Fed:
    """The flat hash of a file has consumed everything before `end` (bytes)."""

    path: str
    end: int


@dataclass(frozen=True, slots=True)
class FileFinished:
    """A file was checked as a whole; `error` is why it must not be used."""

    path: str
    error: ModelP2PError | None = None


@dataclass(frozen=True, slots=True)
class Flushed:
    """The engine's cache is written out."""


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine died or the torrent was re-added: what it had received is gone."""


@dataclass(frozen=True, slots=True)
class DiskFailed:
    """The engine could not write."""

    error: ModelP2PError


@dataclass(frozen=True, slots=True)
class Tick:
    """Only time has passed."""


Event: TypeAlias = Received | Proved | Synced | Fed | FileFinished | Flushed | EngineLost | DiskFailed | Tick


@dataclass(frozen=True, slots=True)
class Prove:
    """Read this piece back and hash it; answer `Proved`."""

    piece: int


@dataclass(frozen=True, slots=True)
class Sync:
    """fdatasync the files under these pieces, append them to the journal; answer `Synced`."""

    pieces: Ranges


@dataclass(frozen=True, slots=True)
class Feed:
    """Feed bytes [begin, end) of a file, all proven, to its flat hash; answer `Fed`."""

    path: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class FinishFile:
    """Compare the flat hash, sync, make read-only and visible; answer `FileFinished`."""

    path: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Hold the transfer almost still, or let it go."""

    on: bool


@dataclass(frozen=True, slots=True)
class Flush:
    """Ask the engine to write its cache out; answer `Flushed`."""


@dataclass(frozen=True, slots=True)
class Readd:
    """Remove and add the torrent with only the proven pieces: libtorrent cannot unlearn a piece otherwise."""


@dataclass(frozen=True, slots=True)
class Complete:
    """Everything wanted is finished."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The fetch cannot go on; what is proven is kept."""

    error: ModelP2PError


Effect: TypeAlias = Prove | Sync | Feed | FinishFile | Hold | Flush | Readd | Complete | Fail
