"""Messages between the daemon and an engine, the child process that hosts one libtorrent session. Sans-I/O.

Each frame (see `framing`) holds one canonical msgpack map with a single key, the message's name, over a map of its fields.
Both sides open with `Hello`; then the daemon sends `Configure` once and any number of commands, and the engine sends events.
Nothing is answered by number: a command is done when its event says so, and every command may be sent twice.

Invariants:
- the dataclasses below are the format: `encode_message` and `decode_message` walk their fields, so a field has one name
  and one type in both processes;
- a message that decodes is complete: no unknown, missing or wrongly typed field, every digest 32 bytes long;
- no message carries a key, a signature or a path chosen by the network.

A *piece* is a global piece index in the order of the info dict, as `torrent.PieceMap` counts; rates are bytes per second
with 0 for unlimited; a bitmap (see `bitmap`) has one bit a piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, cast, get_args

from modelp2p.protocol import codec
from modelp2p.protocol.bitmap import pack_bits as pack_bits
from modelp2p.protocol.bitmap import unpack_bits as unpack_bits
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.framing import encode_frame
from modelp2p.protocol.hello import Hello as Hello
from modelp2p.protocol.hello import check_versions
from modelp2p.protocol.merkle import HASH_BYTES
from modelp2p.protocol.shapes import from_value, to_value

MAX_FRAME_BYTES = 16 << 20
"""Holds a torrent with the layers of about 400,000 pieces (6 TiB at 16 MiB)."""
V_MIN = 1
V_MAX = 1


class _Checked:
    """Values whose digests are checked when they are built, on whichever side."""

    __slots__ = ()

    def __post_init__(self) -> None:
        digest = getattr(self, "info_hash", None)
        if digest is not None and len(digest) != HASH_BYTES:
            raise FormatError(f"an info-hash has {HASH_BYTES} bytes, not {len(digest)}")


@dataclass(frozen=True, slots=True)
class Peer:
    """An address to try; on the wire `host` is an IP literal, host names are the daemon's to resolve."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class TorrentFile:
    """One file of a release, and where its bytes lie on this disk."""

    path: str
    size: int
    disk_path: str
    wanted: bool = True


@dataclass(frozen=True, slots=True)
class TorrentSpec(_Checked):
    """A torrent the engine shall share: everything comes from here, nothing from the torrent but the info dict and layers."""

    info_hash: bytes
    torrent: bytes
    save_path: str
    piece_length: int
    files: tuple[TorrentFile, ...]
    have: bytes
    peers: tuple[Peer, ...] = ()
    trackers: tuple[str, ...] = ()
    max_up: int = 0
    max_down: int = 0
    sequential: bool = False


@dataclass(frozen=True, slots=True)
class MagnetSpec(_Checked):
    """A swarm of which only the info-hash is known, and where its files would lie: `save_path/<path>`."""

    info_hash: bytes
    save_path: str
    peers: tuple[Peer, ...] = ()
    trackers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How an engine behaves on the network; None leaves a switch to the profile."""

    profile: str = "wan"
    listen: tuple[str, ...] = ("0.0.0.0:16881", "[::]:16881")
    port_tries: int = 0
    """Further ports to try where one is busy; 0 makes a busy port an error."""
    dht: bool | None = None
    lsd: bool | None = None
    pex: bool | None = None
    utp: bool | None = None
    dht_bootstrap: tuple[str, ...] | None = None
    max_up: int = 0
    max_down: int = 0
    connections: int = 0
    """Most peer connections at once; 0 leaves it to the profile."""
    many_per_address: bool = False
    """Several peers may share one address: daemons behind one NAT, several sessions on one host."""


# Commands


@dataclass(frozen=True, slots=True)
class Configure:
    """Comes once, after `Hello`: the engine locks itself into `data` and `readable`, then opens its session."""

    settings: EngineSettings
    data: str
    readable: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Add:
    """Share a torrent; nothing happens where it is there already."""

    spec: TorrentSpec


@dataclass(frozen=True, slots=True)
class AddMagnet:
    """Ask a swarm for its metadata and for nothing else."""

    spec: MagnetSpec


@dataclass(frozen=True, slots=True)
class Remove(_Checked):
    """Stop sharing; files stay."""

    info_hash: bytes


@dataclass(frozen=True, slots=True)
class Connect(_Checked):
    """Try these peers."""

    info_hash: bytes
    peers: tuple[Peer, ...]


@dataclass(frozen=True, slots=True)
class SetWanted(_Checked):
    """Exactly these paths are wanted from now on."""

    info_hash: bytes
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetPiecePriorities(_Checked):
    """The priority, 0 (never) to 7 (first), of some pieces: the byte at the place of each piece."""

    info_hash: bytes
    pieces: tuple[int, ...]
    priorities: bytes


@dataclass(frozen=True, slots=True)
class SetWebSeeds(_Checked):
    """Exactly these web seeds (BEP 19) from now on; the same again gives each of them another chance."""

    info_hash: bytes
    urls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetLimits(_Checked):
    """Rate limits of one torrent, or of the whole node where `info_hash` is None."""

    info_hash: bytes | None
    up: int
    down: int


@dataclass(frozen=True, slots=True)
class SetConnections:
    """Most peer connections at once, over all torrents; those beyond it are closed."""

    limit: int


@dataclass(frozen=True, slots=True)
class Throttle(_Checked):
    """Hold the download of a torrent nearly still, or let it go on at its limit."""

    info_hash: bytes
    held: bool


@dataclass(frozen=True, slots=True)
class Flush(_Checked):
    """Write what is still in the engine's cache; `Flushed` follows."""

    info_hash: bytes


# Events


@dataclass(frozen=True, slots=True)
class Listening:
    """The engine is up; `addresses` are those that accept TCP, `landlock` the ABI that binds it (0: none)."""

    port: int
    addresses: tuple[str, ...]
    landlock: int


@dataclass(frozen=True, slots=True)
class ListenFailed:
    """One address could not be opened; `errno` is the system's."""

    address: str
    message: str
    errno: int


@dataclass(frozen=True, slots=True)
class AddFailed(_Checked):
    """The torrent was refused and is not there."""

    info_hash: bytes
    message: str


@dataclass(frozen=True, slots=True)
class PiecesFinished(_Checked):
    """A hint: these pieces were received and hashed. They are on disk soon, or never."""

    info_hash: bytes
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PieceFailed(_Checked):
    """A piece did not match its hash; it is fetched again."""

    info_hash: bytes
    piece: int


@dataclass(frozen=True, slots=True)
class PeerBanned(_Checked):
    """A peer sent bad bytes and is not talked to any more."""

    info_hash: bytes
    address: str


@dataclass(frozen=True, slots=True)
class WebSeedFailed(_Checked):
    """A web seed did not deliver, or (`is_banned`) sent bytes that are not those of the torrent; `url` as it was set."""

    info_hash: bytes
    url: str
    message: str
    is_banned: bool


@dataclass(frozen=True, slots=True)
class PeerUnresolved(_Checked):
    """A peer's host name has no address; said by the daemon's side."""

    info_hash: bytes
    host: str
    message: str


@dataclass(frozen=True, slots=True)
class MetadataReceived(_Checked):
    """The info dict of a magnet, and the files libtorrent read in it, without the name folder and without pads."""

    info_hash: bytes
    info: bytes
    files: tuple[TorrentFile, ...]


@dataclass(frozen=True, slots=True)
class FileFailed(_Checked):
    """The disk refused; nothing since the last proof is certain. `path` is empty where no file is to blame."""

    info_hash: bytes
    path: str
    message: str
    no_space: bool


@dataclass(frozen=True, slots=True)
class Flushed(_Checked):
    """A `Flush` was done: what was received before it has been written, though not synced."""

    info_hash: bytes


@dataclass(frozen=True, slots=True)
class TransferFinished(_Checked):
    """Everything wanted was received; a hint like `PiecesFinished`."""

    info_hash: bytes


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One connected peer; `has` is the share it holds, in thousandths; `source` is `peer` or `web`."""

    address: str
    client: str
    rate_down: int
    rate_up: int
    has: int
    source: str


@dataclass(frozen=True, slots=True)
class TorrentStatus(_Checked):
    """Once a second for every torrent that changed. Byte counts are since it was added; rates are of payload."""

    info_hash: bytes
    rate_down: int
    rate_up: int
    peers: int
    seeds: int
    payload_down: int
    payload_up: int
    wasted: int
    peer_list: tuple[PeerStatus, ...] = ()
    known: int = 0
    """Peers that were heard of, connected or not."""


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """How the engine stands in the network, said when it changes: nodes in its routing tables of the DHT, 0 where that is off."""

    dht_nodes: int


@dataclass(frozen=True, slots=True)
class Removed(_Checked):
    """A torrent left the session; its final byte counts, as in `TorrentStatus`."""

    info_hash: bytes
    payload_down: int
    payload_up: int
    wasted: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """Alerts were lost; every finished piece is being announced again."""


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The engine is gone, and every torrent with it; said by the daemon's side."""

    reason: str


@dataclass(frozen=True, slots=True)
class EngineRestarted:
    """A new engine is there and knows no torrent; said by the daemon's side."""


Command: TypeAlias = (
    Configure
    | Add
    | AddMagnet
    | Remove
    | Connect
    | SetWanted
    | SetPiecePriorities
    | SetWebSeeds
    | SetLimits
    | SetConnections
    | Throttle
    | Flush
)
Event: TypeAlias = (
    Listening
    | ListenFailed
    | AddFailed
    | PiecesFinished
    | PieceFailed
    | PeerBanned
    | WebSeedFailed
    | PeerUnresolved
    | MetadataReceived
    | FileFailed
    | Flushed
    | TransferFinished
    | TorrentStatus
    | SessionStatus
    | Removed
    | Dropped
    | EngineDied
    | EngineRestarted
)
Message: TypeAlias = Hello | Command | Event

_MESSAGES: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}


def encode_message(message: Message) -> bytes:
    """The frame of `message`, length included.

    Raises:
        FormatError: larger than a frame may be.
    """
    return encode_frame(codec.pack({type(message).__name__: to_value(message)}), MAX_FRAME_BYTES)


def decode_message(frame: bytes) -> Message:
    """The message in a frame's payload.

    Raises:
        FormatError: not exactly one message as its dataclass describes it.
    """
    source = codec.unpack_map(frame, max_bytes=MAX_FRAME_BYTES)
    if len(source) != 1:
        raise FormatError("an engine message has one name")
    ((name, body),) = source.items()
    if name not in _MESSAGES:
        raise FormatError(f"unknown engine message '{name}'")
    return cast("Message", from_value(body, _MESSAGES[name], name))


def check_hello(message: Message) -> Hello:
    """The other side's greeting, if we have a version in common.

    Raises:
        DaemonError: it is no greeting, or speaks only versions this build does not.
    """
    hint = "modelp2p was updated while it ran: restart the daemon."
    return check_versions(message, V_MIN, V_MAX, sides="daemon and engine", hint=hint)
