"""The bytes of releases for those who ask by HTTP: finished files at once, files of a fetch under way as their pieces are proven.

Invariants:
- a finished file is one that the record lists and whose stat is still the recorded one; a borrowed one is looked at again before
  its last bytes go out, so that what its owner changes meanwhile is never a whole answer;
- of a file that is being fetched only proven bytes leave this process;
- an answer that has begun is never silent for `SILENCE_S`: what is proven last is held back and goes out in drops until more is,
  and where there is nothing to send any more the connection ends, so that the client asks for the rest.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import trio

from modelp2p.daemon.beneath import open_beneath
from modelp2p.daemon.following import is_under_way
from modelp2p.protocol import layout
from modelp2p.protocol.errors import NotFoundError
from modelp2p.protocol.httprange import Span
from modelp2p.protocol.ranges import Ranges

if TYPE_CHECKING:
    from modelp2p.daemon.following import Stream, Streams
    from modelp2p.daemon.http_connection import Sink
    from modelp2p.daemon.node import Shared
    from modelp2p.daemon.store import Store
    from modelp2p.protocol.names import Revision
    from modelp2p.protocol.record import FileRecord, ReleaseRecord

log = logging.getLogger(__name__)

SILENCE_S = 8.0
"""Clients give up on a connection after 10 s without a byte (huggingface_hub `HF_HUB_DOWNLOAD_TIMEOUT`)."""
HELD_BACK_BYTES = 64 << 10
"""What is kept of the proven bytes while the next ones are on their way..."""
DROP_BYTES, DROP_S = 256, 3.0
"""...and how it goes out: it lasts for 12 minutes, longer than a fetch itself waits for a byte."""
_LAST_LOOK_BYTES = 1 << 20


class FinishedFile:
    """A span of a file that is whole; owns its descriptor."""

    def __init__(self, fd: int, span: Span, record: FileRecord) -> None:
        self._fd = fd
        self._span = span
        self._record = record

    async def send(self, sink: Sink) -> None:
        at, end = self._span.begin, self._span.end
        if self._record.borrowed:
            last = max(at, end - _LAST_LOOK_BYTES)
            await sink.send_file(self._fd, at, last)
            if not self._record.matches(os.fstat(self._fd), ignore_ctime=True):
                log.warning("a borrowed file was changed while it was sent; the answer was cut off")
                return
            at = last
        await sink.send_file(self._fd, at, end)

    def close(self) -> None:
        os.close(self._fd)


class FinishedFiles:
    """Opens the finished files of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._records: dict[bytes, tuple[tuple[int, int, int], ReleaseRecord]] = {}

    def open(self, info_hash: bytes, revision: Revision, path: str) -> tuple[int, FileRecord] | None:
        """A descriptor, the caller's, and the record of a file; None where it is not whole, or was changed. Blocks."""
        record = self._record(info_hash)
        item = record.files.get(path) if record is not None and record.revision == revision else None
        if item is None:
            return None
        try:
            fd = open_beneath(self._store.fd, f"{layout.tree_of(info_hash, revision)}/{path}", os.O_RDONLY)
        except NotFoundError:
            return None
        if item.matches(os.fstat(fd), ignore_ctime=True):
            return fd, item
        os.close(fd)
        return None

    def _record(self, info_hash: bytes) -> ReleaseRecord | None:
        try:
            stat = os.stat(self._store.path(layout.record_of(info_hash)), follow_symlinks=False)
        except OSError:
            self._records.pop(info_hash, None)
            return None
        # Records are replaced by rename: another one is another inode.
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        known = self._records.get(info_hash)
        if known is None or known[0] != stamp:
            record = self._store.load_record(info_hash)
            if record is None:
                return None
            known = self._records[info_hash] = (stamp, record)
        return known[1]


def is_expected(shared: Shared, path: str) -> bool:
    """Whether somebody fetches a file of a content; while nobody has begun to, whoever will."""
    return is_under_way(shared) and (shared.transfer is None or path in shared.transfer.wanted)


class ArrivingFile:
    """A span of a file that is being fetched; owns its stream, and its descriptor once there is one."""

    def __init__(self, streams: Streams, finished: FinishedFiles, stream: Stream, path: str, span: Span) -> None:
        self._streams = streams
        self._finished = finished
        self._stream = stream
        self._path = path
        self._span = span
        self._fd = -1

    async def begin(self) -> None:
        """Ask for the span, in the order of its bytes."""
        length = self._stream.release.pieces.piece_length
        first = self._stream.release.pieces.first(self._path)
        await self._streams.order(self._stream, ((first + self._span.begin // length, first - -self._span.end // length),))

    @property
    def is_expected(self) -> bool:
        """Whether somebody fetches the file."""
        return is_expected(self._stream.shared, self._path)

    def proven_end(self, at: int) -> int:
        """Up to which byte of the file, within the span, everything from `at` is proven; `at` where nothing is."""
        pieces = self._stream.release.pieces
        first, length = pieces.first(self._path), pieces.piece_length
        begin, end = first + at // length, first - -self._span.end // length
        run = next(iter(self._streams.proven(self._stream).intersect(Ranges.span(begin, end))), None)
        if run is None or run[0] > begin:
            return at
        return min(self._span.end, (run[1] - first) * length)

    async def wait_begun(self, deadline: float) -> bool:
        """Whether the first byte was proven, and its file opened, before `deadline`; False also where nobody fetches it."""
        while self.proven_end(self._span.begin) == self._span.begin:
            if trio.current_time() >= deadline or not self.is_expected:
                return False
            with trio.move_on_at(deadline):
                await self._streams.wait_news(self._stream)
        self._fd = await trio.to_thread.run_sync(self._streams.open_file, self._stream.release, self._path)
        return True

    async def send(self, sink: Sink) -> None:
        at, end, last = self._span.begin, self._span.end, trio.current_time()
        while at < end:
            proven, is_expected = self.proven_end(at), self.is_expected
            # Where nothing follows, nothing is held back.
            ready = proven if proven == end or not is_expected else proven - HELD_BACK_BYTES
            now = trio.current_time()
            if ready <= at and proven > at and now - last >= DROP_S:
                ready = min(proven, at + DROP_BYTES)
            if ready > at:
                await sink.send_file(self._fd, at, ready)
                at, last = ready, trio.current_time()
            elif not is_expected:
                # The fetch has ended. Either all of the file is here, or nobody is left to wait for.
                return await self._send_finished(sink, Span(at, end))
            elif now - last >= SILENCE_S:
                return
            else:
                with trio.move_on_at(last + (DROP_S if proven > at else SILENCE_S)):
                    await self._streams.wait_news(self._stream)

    async def _send_finished(self, sink: Sink, span: Span) -> None:
        release = self._stream.release
        found = await trio.to_thread.run_sync(self._finished.open, release.info_hash, release.manifest.revision, self._path)
        if found is None:
            return
        body = FinishedFile(found[0], span, found[1])
        try:
            await body.send(sink)
        finally:
            body.close()

    def close(self) -> None:
        self._streams.finish(self._stream)
        if self._fd >= 0:
            os.close(self._fd)
