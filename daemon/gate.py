"""Who may come in by a control socket, and what they may ask there: pure decisions over a peer's credentials and a request.

Two gates: the owner's socket takes this user and root and refuses them nothing; the public one takes other users of the
machine and lets them look, and fetch or stream what the site already trusts.

Invariants of the public gate:
- nobody changes anything through it but by fetching a name whose publisher the node trusts for that name;
- no request through it directs the node's connections, its limits, its policy or its jobs;
- no descriptor is taken (the socket itself refuses them, see `listening`);
- what a request costs is bounded: few patterns, no bundle, and each user has few connections.

It says nothing about whether a name is trusted or known: that is the library's word (`Library.by_name`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from modelp2p.protocol import control
from modelp2p.protocol.errors import DeniedError, FormatError, ModelP2PError
from modelp2p.protocol.names import NameRef, parse_ref

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

ROOT_UID = 0
# A stream of others: only `stream_open` names a release, what follows belongs to the connection or to a secret it was given.
STREAM_VERBS = frozenset({"stream_file", "stream_follow", "stream_open", "stream_want"})
PUBLIC_VERBS = frozenset({"fetch", "ls", "resolve", "show", "status"}) | STREAM_VERBS
# What the command line sends although nobody asked for it (an empty list, false, 0) is no wish.
MAX_PUBLIC_PATTERNS = 16
MAX_PUBLIC_PATTERN_CHARACTERS = 256
"""Globs are compiled, and matched with every path of a release: an owner's thousand are a second of work."""
_OWNERS_WISHES = ("bundle", "peers", "allow_code", "detach", "max_up", "max_down")


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end, as the kernel saw it when it connected; `groups` are the primary one and all others."""

    uid: int
    groups: frozenset[int] = frozenset()


class Gate(Protocol):
    """What a server asks about each peer and each request."""

    @property
    def mode(self) -> int:
        """The mode of the socket file."""

    @property
    def max_fds(self) -> int:
        """Descriptors a peer may have under way; what exceeds this costs it the connection."""

    @property
    def is_public(self) -> bool:
        """Whether others than the owner come in here."""

    @property
    def max_per_user(self) -> int:
        """Connections one user may have at once; 0 for no limit beside that of all."""

    def too_many_fds(self) -> ModelP2PError:
        """What a peer hears that sent more."""

    def check_peer(self, peer: Peer) -> None:
        """Raises DeniedError where `peer` may not connect."""

    def check_request(self, verb: str, args: Map) -> None:
        """Raises DeniedError where the request is not for this socket, UsageError where it cannot be judged."""


@dataclass(frozen=True, slots=True)
class OwnerGate:
    """`control.sock`: the user of this daemon and root, who may do everything."""

    uid: int
    mode: int = 0o600
    max_fds: int = control.MAX_FDS
    max_per_user: int = 0
    is_public: bool = False

    def too_many_fds(self) -> ModelP2PError:
        return FormatError(f"more than {self.max_fds} descriptors at once")

    def check_peer(self, peer: Peer) -> None:
        if peer.uid not in (self.uid, ROOT_UID):
            raise DeniedError("only the owner may command this daemon")

    def check_request(self, verb: str, args: Map) -> None:
        pass


@dataclass(frozen=True, slots=True)
class PublicGate:
    """`public.sock`: users of this machine who may look, and fetch names. Empty `users` and `groups` together mean everybody."""

    uid: int
    owner: str
    """Name of the daemon's user, for hints."""
    timeout_s: float
    """The longest a fetch may wait for a byte: what the node itself waits."""
    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    mode: int = 0o666
    max_fds: int = 0
    max_per_user: int = 8
    is_public: bool = True

    def too_many_fds(self) -> ModelP2PError:
        return self._denied("files and folders are taken from the owner of this daemon only")

    def check_peer(self, peer: Peer) -> None:
        if peer.uid in (self.uid, ROOT_UID) or not (self.users or self.groups):
            return
        if peer.uid not in self.users and not peer.groups & self.groups:
            raise DeniedError(
                f"this service is not for user {peer.uid}",
                hint="The administrator names users and groups in allow_users and allow_groups below [control].",
            )

    def check_request(self, verb: str, args: Map) -> None:
        if verb not in PUBLIC_VERBS:
            raise self._denied(f"'{verb[:60]}' is for the owner of this daemon, {self.owner}")
        match verb:
            case "fetch":
                self._check_fetch(args)
            case "show" if args.get("bundle_out"):
                raise self._denied(f"a bundle is for the owner of this daemon, {self.owner}, to give out")
            case "stream_open":
                self._check_stream(args)
            case _:
                pass

    def _check_fetch(self, args: Map) -> None:
        for wish in _OWNERS_WISHES:
            if args.get(wish):
                raise self._denied(f"a fetch with '{wish}' is for the owner of this daemon, {self.owner}")
        for key in ("include", "exclude"):
            globs = args.get(key)
            if isinstance(globs, list) and (
                len(globs) > MAX_PUBLIC_PATTERNS or any(len(str(glob)) > MAX_PUBLIC_PATTERN_CHARACTERS for glob in globs)
            ):
                raise self._denied(
                    f"a fetch with more than {MAX_PUBLIC_PATTERNS} globs, or one of over {MAX_PUBLIC_PATTERN_CHARACTERS} "
                    f"characters, is for the owner of this daemon, {self.owner}"
                )
        if args.get("seed") is False:
            raise self._denied(f"whether this node seeds is for its owner to say, {self.owner}")
        timeout = args.get("timeout_s")
        if isinstance(timeout, int) and timeout > self.timeout_s:
            raise DeniedError(
                f"this service waits at most {self.timeout_s:g} s for a byte, not {timeout}", hint="Leave the timeout out."
            )
        self._check_name(args)

    def _check_stream(self, args: Map) -> None:
        if args.get("publisher") is not None:
            raise self._denied(f"a publisher whom the node need not trust is for the owner of this daemon to name, {self.owner}")
        self._check_name(args)

    def _check_name(self, args: Map) -> None:
        ref = args.get("ref")
        if isinstance(ref, str) and not isinstance(parse_ref(ref), NameRef):
            raise DeniedError(
                "other users fetch by name only, what this service already knows and trusts",
                hint=f"Ask {self.owner} or an administrator to fetch this link and to trust its publisher for the name.",
            )

    def _denied(self, message: str) -> DeniedError:
        hint = f"Run it as {self.owner} (sudo -u {self.owner} ...) or root, or ask an administrator."
        return DeniedError(message, hint=hint)
