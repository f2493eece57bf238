"""Streams: who reads a release while it is being fetched hears what is proven, and says what it needs next.

Loaders do so over the control socket, each call of which is a verb here; the gateway has its streams in this process.

    stream_open ─► the statement, to be verified by the loader itself
    stream_follow ─► (long call, a second connection) ranges of pieces as they are proven, until the fetch has ended
    stream_file ─► a read-only descriptor of a staged or finished file
    stream_want ─► the order of reading, which becomes piece priorities

Invariants:
- a piece is told only once it is journaled: read back, hashed, and its data on the disk;
- a stream belongs to the connection that began it and ends with it; then the pieces it hurried are ordinary again;
- nobody hurries what the fetch under way does not ask for, so nothing unreserved is ever written;
- events wait for a slow reader instead of being dropped, so a difference is always one to what was heard.

It fetches nothing: where nobody fetches a release that is not here, there is no stream.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import trio

from modelp2p.daemon.beneath import open_beneath
from modelp2p.daemon.control import Answer, Call
from modelp2p.daemon.folder import ReleaseFolder
from modelp2p.daemon.requests import Target, text
from modelp2p.protocol import layout, streaming
from modelp2p.protocol.errors import DeniedError, FormatError, NotFoundError, UnavailableError, UsageError
from modelp2p.protocol.names import check_publisher_id
from modelp2p.protocol.ranges import Ranges

if TYPE_CHECKING:
    from modelp2p.daemon.library import Entry
    from modelp2p.daemon.node import Node, Shared
    from modelp2p.daemon.sealed import SealedCache
    from modelp2p.daemon.transfer import Transfer
    from modelp2p.protocol.codec import Map
    from modelp2p.protocol.statement import Release
    from modelp2p.protocol.streaming import Span

EVENT_S = 0.1
"""Least time between two looks of one stream: what is proven meanwhile is one event."""
STEER_AGAIN_S = 1.0
"""Priorities are told again this often: libtorrent sets files' priorities in the background, and forgets those of pieces then."""
MAX_STREAMS = 64
MAX_STREAMS_OF_RELEASE = 32
"""One for each rank of a large machine, and some."""
_SESSION_KEY = "stream"
_NOBODY_HINT = "Start a fetch of it ('modelp2p fetch REF', with --detach to leave it to the daemon), then load while it runs."


Door = Literal["owner", "public", "gateway"]
"""How a reader came in. Each has its own streams, so that none takes what is another's."""


@dataclass(slots=True, eq=False)
class Stream:
    """One reader."""

    token: str
    release: Release
    shared: Shared
    door: Door
    wishes: tuple[Span, ...] = ()
    is_open: bool = True
    is_followed: bool = False
    steered: float = 0.0
    """When what it ordered was last told again; of `wait_news`."""


@dataclass(slots=True)
class _Told:
    """The priorities in force in one life of one torrent; another life starts with none."""

    transfer: Transfer
    life: int
    wanted: Ranges
    priorities: dict[int, int] = field(default_factory=dict)


class Streams:
    """All streams of one node. Priorities of streams that have ended are taken back by tasks in `nursery`."""

    def __init__(self, node: Node, nursery: trio.Nursery, cache: SealedCache) -> None:
        self._node = node
        self._nursery = nursery
        self._sealed = cache
        self._streams: dict[str, Stream] = {}
        self._told: dict[bytes, _Told] = {}

    def __repr__(self) -> str:
        return f"<Streams {len(self._streams)} open>"

    async def open(self, call: Call) -> Answer:
        """`stream_open`: a stream of this connection, and the statement its reader has to verify.

        Raises:
            NotFoundError: not known here, or neither here nor being fetched.
            UnknownPublisherError: the name is known only from publishers nobody here trusts for it.
            DeniedError: too many streams.
        """
        if _SESSION_KEY in call.session:
            raise UsageError("this connection has a stream already")
        entry = self._entry(call)
        shared = self._node.of(entry.info_hash)
        if not (is_under_way(shared) or shared.is_complete or shared.is_partial):
            raise NotFoundError(f"{entry.ref} is not complete here, and nobody is fetching it", hint=_NOBODY_HINT)
        release = await trio.to_thread.run_sync(self._node.library.release, entry.digest)
        statement = await trio.to_thread.run_sync(self._node.store.load_statement, entry.digest)
        stream = call.session[_SESSION_KEY] = self.begin(release, shared, "public" if call.is_strangers else "owner")
        fds: list[int] = []
        try:
            for name, data in statement.files().items():
                fds.append(self._sealed.get(entry.digest, name, partial(bytes, data)))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return Answer({"stream": stream.token, "state": shared.state}, tuple(fds))

    async def follow(self, call: Call) -> Answer:
        """`stream_follow`: events with what is proven, until nobody works on the release any more.

        Raises:
            ModelP2PError: how the fetch ended.
            UnavailableError: there is no fetch any more, and the release is not complete.
        """
        stream = self._streams.get(text(call.args, "stream"))
        if stream is None or stream.is_followed:
            raise UsageError("there is no such stream, or it is followed already")
        stream.is_followed = True
        shared = stream.shared
        await self._tell(stream, call.send)
        if not stream.is_open:
            raise UsageError("the stream was closed")
        if not self._node.library.about(shared.info_hash):
            raise NotFoundError(f"{stream.release.ref} was removed while it was loaded")
        if not (shared.is_complete or shared.is_partial):
            raise shared.watch.failure or UnavailableError(
                f"{stream.release.ref} is not complete here, and nobody is fetching it any more", hint=_NOBODY_HINT
            )
        # Events that still wait are cut off by the result: it says everything once more.
        return Answer({"state": shared.state, "proven": (await self._all_proven(stream)).to_list()})

    async def file(self, call: Call) -> Answer:
        """`stream_file`: a read-only descriptor of one file, in the engine's folder or finished.

        Raises:
            NotFoundError: no such file in the release, or not begun.
        """
        stream, path = _stream_of(call), text(call.args, "path")
        if path not in stream.release.manifest:
            raise NotFoundError(f"{stream.release.ref} has no file '{path[:200]}'")
        shared = stream.shared
        # Until a fetch has staged its files, what lies there may be about to be replaced.
        while shared.watch.fetches and shared.transfer is None and stream.is_open:
            await shared.watch.wait()
        return Answer({}, (await trio.to_thread.run_sync(self.open_file, stream.release, path),))

    async def want(self, call: Call) -> Answer:
        """`stream_want`: this reader's order from now on.

        Raises:
            UsageError: not a list of ranges of this release's pieces.
        """
        stream = _stream_of(call)
        try:
            wishes = streaming.decode_wishes(call.args.get("pieces"), stream.release.pieces.total)
        except FormatError as exc:
            raise UsageError(exc.message) from exc
        await self.order(stream, wishes)
        return Answer({})

    def end(self, session: dict[str, object]) -> None:
        """A connection has gone: its stream, if it had one, goes too."""
        stream = session.pop(_SESSION_KEY, None)
        if isinstance(stream, Stream):
            self.finish(stream)

    # For readers in this process

    def begin(self, release: Release, shared: Shared, door: Door) -> Stream:
        """A new stream; whoever begins it finishes it.

        Raises:
            DeniedError: too many streams.
        """
        taken = [stream for stream in self._streams.values() if stream.door == door]
        same = sum(stream.shared is shared for stream in taken)
        if len(taken) >= MAX_STREAMS or same >= MAX_STREAMS_OF_RELEASE:
            raise DeniedError(
                "too many programs load from fetches under way",
                hint=f"At most {MAX_STREAMS} at once, {MAX_STREAMS_OF_RELEASE} from one release. Load when it is complete.",
            )
        stream = Stream(secrets.token_hex(16), release, shared, door)
        self._streams[stream.token] = stream
        return stream

    async def order(self, stream: Stream, wishes: tuple[Span, ...]) -> None:
        """This reader's order from now on."""
        stream.wishes = wishes
        await self._steer(stream.shared)

    def proven(self, stream: Stream) -> Ranges:
        """What is known to be proven while a transfer goes on; nothing else is."""
        transfer = stream.shared.transfer
        return Ranges() if transfer is None else transfer.folder.state.proven

    async def wait_news(self, stream: Stream) -> None:
        """Until something may have changed, at most `STEER_AGAIN_S`; what was ordered stays in force."""
        with trio.move_on_at(stream.steered + STEER_AGAIN_S):
            await stream.shared.watch.wait()
        is_old = trio.current_time() - stream.steered >= STEER_AGAIN_S
        if is_old:
            stream.steered = trio.current_time()
        await self._steer(stream.shared, again=is_old)
        await trio.sleep(EVENT_S)

    def open_file(self, release: Release, path: str) -> int:
        """A read-only descriptor, the caller's, of a file in the engine's folder or finished. Blocks.

        Raises:
            NotFoundError: not begun.
        """
        folder = self._node.store.fd
        try:
            return open_beneath(folder, f"{layout.data_of(release.info_hash)}/{path}", os.O_RDONLY)
        except NotFoundError:
            # Shared with another release: it has a name in the visible tree only.
            tree = layout.tree_of(release.info_hash, release.manifest.revision)
            return open_beneath(folder, f"{tree}/{path}", os.O_RDONLY)

    def finish(self, stream: Stream) -> None:
        """The reader has gone: what it hurried is ordinary again. Idempotent."""
        if not stream.is_open:
            return
        stream.is_open = False
        del self._streams[stream.token]
        stream.shared.watch.ring()
        if stream.wishes:
            self._nursery.start_soon(self._steer, stream.shared)

    async def _tell(self, stream: Stream, send: Callable[[Map], Awaitable[None]]) -> None:
        """Send what is proven while somebody works on it."""
        shared = stream.shared
        told, wanted, note, life = Ranges(), Ranges(), "", 0
        steered = trio.current_time()
        while stream.is_open and is_under_way(shared):
            proven, asked, waits_for, lives = told, wanted, shared.waits_for, life
            if (transfer := shared.transfer) is not None:
                proven, lives, waits_for = transfer.folder.state.proven, transfer.lives, ""
                # What an earlier fetch was asked for stays in it: it is here by now.
                asked = wanted.union(self._told_of(shared, transfer).wanted)
            is_old = trio.current_time() - steered >= STEER_AGAIN_S
            if (proven, asked, waits_for, lives) == (told, wanted, note, life) and not is_old:
                with trio.move_on_after(STEER_AGAIN_S):
                    await shared.watch.wait()
                continue
            if asked != wanted:
                await send({"phase": "streaming", "wanted": asked.to_list()})
            if waits_for != note:
                await send({"phase": "waiting", "note": waits_for})
            for event in streaming.news(told, proven):
                await send(event)
            told, wanted, note, life = proven, asked, waits_for, lives
            await self._steer(shared, again=is_old)
            steered = trio.current_time() if is_old else steered
            await trio.sleep(EVENT_S)

    async def _all_proven(self, stream: Stream) -> Ranges:
        """What is proven of a release that nobody works on."""
        if stream.shared.is_complete:
            return Ranges.span(0, stream.release.pieces.total)
        async with stream.shared.lock:  # a journal is opened by one task at a time
            folder = await trio.to_thread.run_sync(ReleaseFolder.open, self._node.store, stream.release)
            folder.close()
        return folder.state.proven

    async def _steer(self, shared: Shared, *, again: bool = False) -> None:
        """Bring the engine's priorities to what all streams of a content need now; `again` tells also what was told before."""
        transfer = shared.transfer
        if transfer is None:
            self._told.pop(shared.info_hash, None)
            return
        told = self._told_of(shared, transfer)
        proven = transfer.folder.state.proven
        missing = told.wanted.minus(proven)
        readers = [stream for stream in self._streams.values() if stream.shared is shared]
        for stream in readers:
            stream.wishes = streaming.still_open(stream.wishes, proven)
        length = transfer.folder.release.pieces.piece_length
        now = streaming.together([streaming.urgency(stream.wishes, missing, length) for stream in readers])
        changed = streaming.changes(told.priorities, now, missing) | (now if again else {})
        told.priorities = now
        if changed:
            await self._node.swarm.set_piece_priorities(shared.info_hash, changed)
        if not readers:
            self._told.pop(shared.info_hash, None)

    def _told_of(self, shared: Shared, transfer: Transfer) -> _Told:
        told = self._told.get(shared.info_hash)
        if told is None or told.transfer is not transfer:
            pieces = transfer.folder.release.pieces
            owned = [pieces.pieces_of(path) for path in transfer.wanted]
            wanted = Ranges.of((run.start, run.stop) for run in owned)
            told = self._told[shared.info_hash] = _Told(transfer, transfer.lives, wanted)
        elif told.life != transfer.lives:
            told.life, told.priorities = transfer.lives, {}
        return told

    def _entry(self, call: Call) -> Entry:
        node, target = self._node, Target.of(text(call.args, "ref"))
        if target.link is not None:
            entry = node.library.by_link(target.link)
            if entry is None:
                raise NotFoundError("this release is not known here", hint=_NOBODY_HINT)
            return entry
        assert target.name is not None
        if call.args.get("publisher") is None:
            return node.library.by_name(target.name, node.book)
        try:
            publisher = check_publisher_id(text(call.args, "publisher"))
        except FormatError as exc:
            raise UsageError(exc.message, hint=exc.hint) from exc
        return node.library.by_publisher(target.name, publisher)


def is_under_way(shared: Shared) -> bool:
    """Whether somebody fetches this content, or will."""
    return shared.watch.fetches > 0 or shared.jobs > 0


def _stream_of(call: Call) -> Stream:
    stream = call.session.get(_SESSION_KEY)
    if not isinstance(stream, Stream):
        raise UsageError("this connection has no stream")
    return stream
