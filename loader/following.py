"""Asking the daemon for a release that it is still fetching: its statement, its files, and what of them is proven.

The statement that comes from a daemon is bytes from anywhere: it is verified here, and believed by the same rules as one that
lies on the disk (`locate.Believer`). No path that a message holds is opened; files come as descriptors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from modelp2p.daemon.client import Client
from modelp2p.loader.arriving import Arrivals, check_timeout
from modelp2p.loader.locate import Believer, Located
from modelp2p.protocol import codec, layout
from modelp2p.protocol.errors import (
    DaemonError,
    DeniedError,
    FormatError,
    NotFoundError,
    UnavailableError,
    UntrustedError,
    UsageError,
)
from modelp2p.protocol.layers import MAX_LAYERS_BYTES
from modelp2p.protocol.links import parse_link
from modelp2p.protocol.names import BundleRef, LinkRef, NameRef, check_publisher_id, parse_ref
from modelp2p.protocol.ranges import Ranges
from modelp2p.protocol.statement import Statement

if TYPE_CHECKING:
    from modelp2p.daemon.client import Reply
    from modelp2p.protocol.codec import Map, Value
    from modelp2p.protocol.statement import Release
    from modelp2p.protocol.streaming import Span

SILENCE_S = 40.0
"""How long the daemon may take for a short call, which asks no network: a busy disk, and then some."""
GRACE_S = 10.0
"""How long it may take at least, however short a time without progress is to be."""
HURRY_S = 1.0
"""How long one may still take when the load that asked was interrupted. A daemon that is well needs milliseconds."""
HINT = "A release can be loaded while it is being fetched, also by 'modelp2p fetch --detach'."


def follow(
    ref: str | os.PathLike[str], *, publisher: str | None, home: str, timeout_s: float, absent: NotFoundError
) -> tuple[Located, Arrivals]:
    """The release that the daemon of `home` is fetching under this reference, and its arrivals, already listened to.

    Args:
        ref: a name or link; a path is none that a daemon could be asked about.
        publisher: who must have signed.
        home: whose daemon is asked, and whose pins decide.
        timeout_s: how long a reader waits without progress; no answer of the daemon is waited for much longer.
        absent: what is wrong where nobody fetches it.

    Raises:
        NotFoundError: `absent`.
        UntrustedError: the daemon's statement does not hold, or nobody vouches for its publisher.
        DaemonError: the daemon fell silent.
        UsageError: `timeout_s` is negative, or no number.
    """
    silence_s = min(check_timeout(timeout_s) + GRACE_S, SILENCE_S)
    parsed = BundleRef(os.fspath(ref)) if isinstance(ref, os.PathLike) else parse_ref(ref)
    if isinstance(parsed, BundleRef):
        raise absent
    try:
        orders = Client.connect(home)
    except (DaemonError, DeniedError):
        raise absent from None
    try:
        token, statement = _open(orders, str(ref), publisher, silence_s)
        located = _believed(statement, parsed, publisher, home)
        follower = DaemonFollower(orders, Client.connect(home), token, silence_s)
    except (NotFoundError, UsageError, UnavailableError) as exc:
        # A daemon of an older version does not know the verb.
        orders.close()
        raise NotFoundError(absent.message, hint=f"{absent.hint} {HINT}", **absent.facts) from exc
    except BaseException:
        orders.close()
        raise
    arrivals = Arrivals(located.release, follower, timeout_s)
    arrivals.start()
    return located, arrivals


class DaemonFollower:
    """A `Follower` over the control socket: `news` is for the one long call, `orders` for all others.

    Owns both connections. Where one of the others was not answered in `silence_s`, none is made any more.
    """

    def __init__(self, orders: Client, news: Client, token: str, silence_s: float = SILENCE_S) -> None:
        self._orders = orders
        self._news = news
        self._token = token
        self._silence_s = silence_s
        self._ordering = threading.Lock()
        self._is_closed = False

    def follow(self, on_event: Callable[[Map], None]) -> Ranges:
        # The socket is this thread's to close: another one could only make it somebody else's in the middle of a call.
        with self._news:
            reply = self._news.call("stream_follow", {"stream": self._token}, on_event=on_event)
            return Ranges.from_list(reply.result.get("proven"))

    def want(self, pieces: Sequence[Span]) -> None:
        wishes: list[Value] = [[begin, end] for begin, end in pieces]
        self._order("stream_want", {"pieces": wishes})

    def open_file(self, path: str) -> int:
        reply = self._order("stream_file", {"path": path})
        if len(reply.fds) != 1:
            for fd in reply.fds:
                os.close(fd)
            raise DaemonError("the daemon sent no descriptor of a file")
        return reply.fds[0]

    def interrupt(self) -> None:
        # Held as long as a call is under way.
        if self._ordering.acquire(timeout=HURRY_S):
            self._ordering.release()
        else:
            self._orders.hang_up()

    def close(self) -> None:
        # Calls under way in other threads end with this; a socket that is only closed would leave them waiting.
        self._news.hang_up()
        self._orders.hang_up()
        with self._ordering:
            if not self._is_closed:
                self._is_closed = True
                self._orders.close()

    def _order(self, verb: str, args: Map) -> Reply:
        with self._ordering:
            try:
                return self._orders.call(verb, args, silence_s=self._silence_s)
            except DaemonError:
                # Nothing more can be called; whoever tries shall not wait for as long again.
                self._orders.hang_up()
                raise


def _open(orders: Client, ref: str, publisher: str | None, silence_s: float) -> tuple[str, Statement]:
    """The stream's token and the statement it is about."""
    args: Map = {"ref": ref}
    try:
        # By name, a daemon answers with whom it trusts; the caller may mean somebody else.
        reply = orders.call("stream_open", args | ({"publisher": publisher} if publisher else {}), silence_s=silence_s)
    except DeniedError:
        if publisher is None:
            raise
        # A service tells others about whom it trusts only; that may be the same.
        reply = orders.call("stream_open", args, silence_s=silence_s)
    contents = reply.read_fds(MAX_LAYERS_BYTES)
    if len(contents) != 3:
        raise DaemonError("the daemon sent no statement")
    layers, envelope, chain = contents
    return codec.take(reply.result, "stream", str), Statement(envelope, layers, chain)


def _believed(statement: Statement, ref: NameRef | LinkRef, publisher: str | None, home: str) -> Located:
    """The release of a daemon's statement, where it is the one that was asked for and is believed."""
    link = parse_link(ref.text) if isinstance(ref, LinkRef) else None
    try:
        believer = Believer(home, None if publisher is None else check_publisher_id(publisher), link)
    except FormatError as exc:
        raise UsageError(exc.message, hint=exc.hint) from exc
    release = believer.proven(statement)
    is_named = believer.believes(release)
    if isinstance(ref, NameRef) and not _fits(release, ref):
        raise UntrustedError(f"the daemon was asked for {ref} and answered with a statement about {release.ref}")
    directory = os.path.join(os.path.realpath(home), layout.tree_of(release.info_hash, release.manifest.revision))
    return Located(release, directory, None, is_named)


def _fits(release: Release, ref: NameRef) -> bool:
    return release.manifest.name == ref.name and (ref.revision is None or release.manifest.revision.startswith(ref.revision))
