"""One libtorrent session, driven by commands and answering in events. The only room that calls libtorrent.

Invariants:
- a torrent is known by its info-hash alone; an alert or command for one that is not there means nothing;
- every alert is copied when it is popped (`alerts`), and the wake-up socket is drained before popping: the other way
  round a wake-up can be lost;
- calls that wait for the network thread are made only where there is no other way (metadata, resync after a loss).
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import assert_never
from urllib.parse import urlsplit

import libtorrent as lt

from modelp2p.daemon.engine import layout
from modelp2p.daemon.engine.alerts import (
    FilesChecked,
    MetadataArrived,
    SocketOpened,
    StatusUpdates,
    TorrentAdded,
    TorrentGone,
    copy_alert,
    join_address,
    peers_of,
    status_of,
)
from modelp2p.daemon.engine.settings import clamp_rate, libtorrent_settings, uses_pex
from modelp2p.protocol.engine_wire import (
    Add,
    AddFailed,
    AddMagnet,
    Command,
    Configure,
    Connect,
    Dropped,
    EngineSettings,
    Event,
    FileFailed,
    Flush,
    Flushed,
    ListenFailed,
    Listening,
    MagnetSpec,
    MetadataReceived,
    PeerBanned,
    PiecesFinished,
    Remove,
    Removed,
    SessionStatus,
    SetConnections,
    SetLimits,
    SetPiecePriorities,
    SetWanted,
    SetWebSeeds,
    Throttle,
    TorrentFile,
    TorrentSpec,
    TorrentStatus,
    TransferFinished,
    WebSeedFailed,
)
from modelp2p.protocol.errors import DaemonError, FormatError
from modelp2p.protocol.text import printable

THROTTLED_RATE = 1024
"""Bytes per second of a held torrent: enough that its peers do not call it dead, nothing beside 128 MiB."""


STATS_TICKS = 10
"""Seconds between two looks at the counters of the session."""


@dataclass(slots=True)
class _Torrent:
    """What the engine remembers of a torrent beside libtorrent."""

    spec: TorrentSpec | MagnetSpec
    handle: lt.torrent_handle | None = None
    """None until libtorrent has taken it."""
    waiting: list[Command] = field(default_factory=list)
    """Commands that came before the handle, or for the successor."""
    farewell: Removed | None = None
    """Set once it was removed; said when libtorrent is through with it, so that nothing about it is heard later."""
    successor: TorrentSpec | MagnetSpec | None = None
    """Added meanwhile under the same info-hash."""
    max_down: int = 0
    held: bool = False
    initial: list[bool] = field(default_factory=list)
    flushes: int = 0
    """Asked for and not yet answered; libtorrent also flushes unasked."""
    failed_paths: set[str] = field(default_factory=set)
    """Files whose failure was said: a full disk brings hundreds of alerts a second."""
    web_seeds: set[str] = field(default_factory=set)
    """All it ever had: libtorrent may ban one after it was taken out."""


class Session:
    """A running session.

    Resources: `close` stops it; the wake-up sockets outlive the libtorrent session, which writes to them until its end.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._pex = uses_pex(settings)
        self._torrents: dict[bytes, _Torrent] = {}
        self._status = SessionStatus(0)
        self._ticks = 0
        self._wake, self._woken_by = socket.socketpair()
        for end in (self._wake, self._woken_by):
            # A full blocking socket would stop libtorrent's network thread.
            end.setblocking(False)
        # The stub knows settings as one literal dict; ours is made at run time, and `lt` refuses an unknown key itself.
        chosen = libtorrent_settings(settings)
        self._is_in_dht = bool(chosen["enable_dht"])
        parameters = lt.session_params(chosen)  # type: ignore[call-overload]
        parameters.disk_io_constructor = "pread_disk_io_constructor"
        self._session: lt.session | None = lt.session(parameters)
        self._bind_limits_to_everyone(self._lt)
        self._lt.set_alert_fd(self._woken_by.fileno())

    def __repr__(self) -> str:
        return f"<Session {len(self._torrents)} torrents>"

    def fileno(self) -> int:
        """Readable when there are events."""
        return self._wake.fileno()

    def listening(self, landlock: int) -> list[Event]:
        """The outcome of opening the listen sockets: failures, then one `Listening`. Called once, first."""
        # A question to the network thread, answered after it has opened its sockets.
        port = self._lt.listen_port()
        events: list[Event] = []
        addresses = []
        for copied in filter(None, map(copy_alert, self._lt.pop_alerts())):
            if isinstance(copied, ListenFailed):
                events.append(copied)
            elif isinstance(copied, SocketOpened) and copied.is_tcp:
                addresses.append(join_address(copied.address, copied.port))
        return [*events, Listening(port if addresses else 0, tuple(addresses), landlock)]

    def handle(self, command: Command) -> Iterator[Event]:
        """Performs a command; yields what can be said at once."""
        match command:
            case Configure():
                raise DaemonError("an engine is configured once")
            case Add(spec) | AddMagnet(spec):
                yield from self._add(spec)
            case SetLimits(None, up, down):
                self._lt.apply_settings({"upload_rate_limit": clamp_rate(up), "download_rate_limit": clamp_rate(down)})
            case SetLimits():
                self._to_torrent(command.info_hash or b"", command)
            case SetConnections(limit):
                self._lt.apply_settings({"connections_limit": limit})
            case Remove() | Connect() | SetWanted() | SetPiecePriorities() | SetWebSeeds() | Throttle() | Flush():
                self._to_torrent(command.info_hash, command)
            case _:
                assert_never(command)

    def read_events(self) -> Iterator[Event]:
        """Everything libtorrent has said since the last call; pieces of one torrent in one event."""
        try:
            while self._wake.recv(4096):
                pass
        except BlockingIOError:
            pass
        copies = [copied for alert in self._lt.pop_alerts() if (copied := copy_alert(alert)) is not None]
        finished: dict[bytes, list[int]] = {}
        for copied in copies:
            if isinstance(copied, PiecesFinished):
                finished.setdefault(copied.info_hash, []).extend(self._news(copied))
        # First, so that whoever hears `Flushed` or `TransferFinished` has heard of every piece before it.
        yield from (PiecesFinished(info_hash, tuple(pieces)) for info_hash, pieces in finished.items() if pieces)
        for copied in copies:
            match copied:
                case PiecesFinished():
                    pass
                case TorrentAdded():
                    yield from self._added(copied)
                case FilesChecked():
                    self._resume(copied.info_hash)
                case TorrentGone():
                    yield from self._gone(copied.info_hash)
                case MetadataArrived():
                    yield from self._metadata(copied.info_hash)
                case StatusUpdates():
                    yield from (self._with_peers(status) for status in copied.torrents)
                case SocketOpened():
                    pass
                case FileFailed():
                    yield from self._file_failed(copied)
                case PeerBanned():
                    yield self._ban_of(copied)
                case TransferFinished():
                    # A magnet wants no file: that it lacks none is not news.
                    if (torrent := self._torrents.get(copied.info_hash)) and isinstance(torrent.spec, TorrentSpec):
                        yield copied
                case Flushed():
                    yield from self._flushed(copied)
                case SessionStatus():
                    if copied != self._status:
                        self._status = copied
                        yield copied
                case Dropped():
                    yield copied
                    yield from self._resync()
                case _:
                    yield copied

    def tick(self) -> None:
        """Once a second: ask what changed; the answers come as events."""
        self._lt.post_torrent_updates(0)
        if self._is_in_dht and self._ticks % STATS_TICKS == 0:
            # Some 300 counters become a dict of Python each time: too much to do every second for one of them.
            self._lt.post_session_stats()
        self._ticks += 1

    def close(self) -> None:
        """Leaves all swarms and writes what is received; waits for libtorrent's threads."""
        self._torrents.clear()
        # The last reference: its destructor joins. Only then may the sockets it writes to be closed.
        self._session = None
        self._wake.close()
        self._woken_by.close()

    @property
    def _lt(self) -> lt.session:
        assert self._session is not None, "the session is closed"
        return self._session

    @staticmethod
    def _bind_limits_to_everyone(session: lt.session) -> None:
        # By default libtorrent puts private and loopback addresses in a class of their own, free of all limits.
        every = lt.ip_filter()
        mask = 1 << session.global_peer_class_id
        every.add_rule("0.0.0.0", "255.255.255.255", mask)
        every.add_rule("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", mask)
        session.set_peer_class_filter(every)

    def _add(self, spec: TorrentSpec | MagnetSpec) -> Iterator[Event]:
        if (known := self._torrents.get(spec.info_hash)) is not None:
            if known.farewell is not None and known.successor is None:
                known.successor = spec
            return
        torrent = _Torrent(spec)
        try:
            if isinstance(spec, TorrentSpec):
                params = layout.torrent_params(spec, pex=self._pex)
                torrent.max_down = spec.max_down
                torrent.initial = params.have_pieces
            else:
                params = layout.magnet_params(spec, pex=self._pex)
        except FormatError as error:
            yield AddFailed(spec.info_hash, error.message)
            return
        self._torrents[spec.info_hash] = torrent
        self._lt.async_add_torrent(params)

    def _added(self, reply: TorrentAdded) -> Iterator[Event]:
        torrent = self._torrents.get(reply.info_hash)
        if torrent is None:
            return
        if torrent.farewell is not None:
            # Removed before libtorrent had taken it.
            if reply.error:
                yield from self._gone(reply.info_hash)
            else:
                torrent.handle = reply.handle
                self._lt.remove_torrent(reply.handle)
            return
        if reply.error:
            del self._torrents[reply.info_hash]
            yield AddFailed(reply.info_hash, reply.error)
            return
        torrent.handle = reply.handle
        waiting, torrent.waiting = torrent.waiting, []
        for command in waiting:
            self._perform(reply.info_hash, torrent, reply.handle, command)

    def _gone(self, info_hash: bytes) -> Iterator[Event]:
        torrent = self._torrents.get(info_hash)
        if torrent is None or torrent.farewell is None:
            return
        del self._torrents[info_hash]
        yield torrent.farewell
        if torrent.successor is not None:
            yield from self._add(torrent.successor)
            for command in torrent.waiting:
                self._to_torrent(info_hash, command)

    def _resume(self, info_hash: bytes) -> None:
        torrent = self._torrents.get(info_hash)
        if torrent is not None and torrent.handle is not None and torrent.farewell is None:
            torrent.handle.resume()

    def _to_torrent(self, info_hash: bytes, command: Command) -> None:
        torrent = self._torrents.get(info_hash)
        if torrent is None:
            return
        if torrent.farewell is not None:
            if isinstance(command, Remove):
                torrent.successor = None
                torrent.waiting.clear()
            elif torrent.successor is not None:
                torrent.waiting.append(command)
        elif torrent.handle is not None:
            self._perform(info_hash, torrent, torrent.handle, command)
        elif isinstance(command, Remove):
            # libtorrent is taking it: were it forgotten here, its answer would be taken for that to a later add.
            torrent.farewell = Removed(info_hash, 0, 0, 0)
            torrent.waiting.clear()
        else:
            torrent.waiting.append(command)

    def _perform(self, info_hash: bytes, torrent: _Torrent, handle: lt.torrent_handle, command: Command) -> None:
        match command:
            case Remove():
                # Status comes once a second, so the last second of a transfer would go uncounted.
                status = status_of(handle.status(0))
                torrent.farewell = Removed(info_hash, status.payload_down, status.payload_up, status.wasted)
                self._lt.remove_torrent(handle)
            case Connect(peers=peers):
                for endpoint in layout.endpoints(peers):
                    handle.connect_peer(endpoint)
            case SetLimits(up=up, down=down):
                torrent.max_down = down
                handle.set_upload_limit(clamp_rate(up))
                self._limit_download(torrent, handle)
            case Throttle(held=held):
                torrent.held = held
                self._limit_download(torrent, handle)
            case Flush():
                torrent.flushes += 1
                handle.flush_cache()
            case SetWanted(paths=paths):
                self._set_wanted(handle, frozenset(paths))
            case SetWebSeeds(urls=urls):
                # All that libtorrent has, not only what it was told: a redirect leaves another one behind.
                for url in handle.url_seeds():
                    handle.remove_url_seed(url)
                for url in urls:
                    handle.add_url_seed(url)
                torrent.web_seeds.update(urls)
            case SetPiecePriorities(pieces=pieces, priorities=priorities):
                handle.prioritize_pieces([(piece, min(7, value)) for piece, value in zip(pieces, priorities, strict=True)])
            case Configure() | Add() | AddMagnet() | SetConnections():
                raise AssertionError("not a command to one torrent")

    @staticmethod
    def _limit_download(torrent: _Torrent, handle: lt.torrent_handle) -> None:
        handle.set_download_limit(THROTTLED_RATE if torrent.held else clamp_rate(torrent.max_down))

    @staticmethod
    def _set_wanted(handle: lt.torrent_handle, paths: frozenset[str]) -> None:
        info = handle.torrent_file()
        if info is None:
            return
        priorities = [layout.UNWANTED] * info.layout().num_files()
        for index, path, _ in layout.laid_files(info.layout()):
            priorities[index] = layout.WANTED if path in paths else layout.UNWANTED
        handle.prioritize_files(priorities)

    def _metadata(self, info_hash: bytes) -> Iterator[Event]:
        torrent = self._torrents.get(info_hash)
        if torrent is None or torrent.handle is None or torrent.farewell is not None:
            return
        info = torrent.handle.torrent_file()
        if info is None:
            return
        try:
            files = layout.laid_files(info.layout())
        except FormatError as error:
            self._to_torrent(info_hash, Remove(info_hash))
            yield AddFailed(info_hash, error.message)
            return
        base = torrent.spec.save_path
        described = tuple(TorrentFile(path, size, f"{base}/{path}", wanted=False) for _, path, size in files)
        yield MetadataReceived(info_hash, bytes(info.info_section()), described)

    def _news(self, event: PiecesFinished) -> Iterator[int]:
        # libtorrent also announces what it was told it has.
        torrent = self._torrents.get(event.info_hash)
        known = torrent.initial if torrent else []
        return (piece for piece in event.pieces if piece >= len(known) or not known[piece])

    def _flushed(self, event: Flushed) -> Iterator[Event]:
        torrent = self._torrents.get(event.info_hash)
        if torrent is not None and torrent.flushes:
            torrent.flushes -= 1
            yield event

    def _file_failed(self, failure: FileFailed) -> Iterator[Event]:
        torrent = self._torrents.get(failure.info_hash)
        if torrent is None:
            return
        files = torrent.spec.files if isinstance(torrent.spec, TorrentSpec) else ()
        path = next((file.path for file in files if file.disk_path == failure.path), printable(failure.path))
        if path not in torrent.failed_paths:
            torrent.failed_paths.add(path)
            yield replace(failure, path=path)

    def _ban_of(self, ban: PeerBanned) -> PeerBanned | WebSeedFailed:
        """A ban as it was meant: libtorrent names a web seed by its address, like any other peer."""
        torrent = self._torrents.get(ban.info_hash)
        for url in sorted(torrent.web_seeds) if torrent else ():
            if urlsplit(url).netloc == ban.address:
                return WebSeedFailed(ban.info_hash, url, "sent bytes that do not match their hash", True)
        return ban

    def _with_peers(self, status: TorrentStatus) -> TorrentStatus:
        torrent = self._torrents.get(status.info_hash)
        if torrent is None or torrent.handle is None or torrent.farewell is not None:
            return status
        return replace(status, peer_list=peers_of(torrent.handle) if status.peers else ())

    def _resync(self) -> Iterator[Event]:
        for info_hash, torrent in list(self._torrents.items()):
            if torrent.handle is None:
                continue
            if torrent.farewell is not None:
                if not torrent.handle.is_valid():
                    yield from self._gone(info_hash)
                continue
            status = torrent.handle.status(lt.torrent_handle.query_pieces)
            known: Iterable[bool] = torrent.initial or [False] * len(status.pieces)
            news = tuple(piece for piece, (has, had) in enumerate(zip(status.pieces, known, strict=False)) if has and not had)
            if news:
                yield PiecesFinished(info_hash, news)
            # The answers may be among what was lost, and that its files were looked at.
            torrent.handle.resume()
            for _ in range(torrent.flushes):
                torrent.handle.flush_cache()
            if status.is_finished and isinstance(torrent.spec, TorrentSpec):
                yield TransferFinished(info_hash)
