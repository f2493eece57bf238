"""What a running daemon says about itself and about one release, for `doctor`: asked once, never changing anything.

What only the owner of a daemon may ask stays unknown where the service of another user answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from modelp2p.cli.configuring import effective_config
from modelp2p.cli.connection import Client, daemon
from modelp2p.cli.diagnosis import Check, ok, problem
from modelp2p.cli.refs import ref_args
from modelp2p.cli.results import Row
from modelp2p.protocol.errors import DeniedError, ModelP2PError, NotFoundError, UsageError

if TYPE_CHECKING:
    from modelp2p.cli.app import App
    from modelp2p.daemon.config import Config
    from modelp2p.protocol.codec import Map
    from modelp2p.protocol.names import Ref


@dataclass(slots=True)
class Told:
    """The answers. Without a daemon `node` is None, and `silence` says why."""

    config: Config
    """The daemon's, where it told it; else the one that a daemon started from here would get."""
    configuration: Check
    """Of the files that the latter is read from."""
    node: Row | None = None
    silence: str = ""
    is_owner: bool = False
    """Whether the daemon told what only its owner may know: its configuration, whom it trusts, its gateway."""
    releases: Sequence[Row] = ()
    trusted: Sequence[Row] = ()
    gateway_port: int = 0
    shown: Row | None = None
    """The release that was asked for, as `show` has it."""
    unshown: ModelP2PError | None = None
    """Why there is none."""

    @property
    def live(self) -> Row | None:
        """The release that was asked for, as `status` has it."""
        shown = self.shown
        return next((row for row in self.releases if shown and row.text("info_hash") == shown.text("info_hash")), None)


def configured(app: App) -> Told:
    """What the configuration says, and nobody yet; hangs where the disk of its files does."""
    from modelp2p.daemon.config import Config

    try:
        found = effective_config(app)
    except ModelP2PError as exc:
        said = f"{exc.message}. {exc.hint}".strip()
        return Told(Config(), problem("configuration", said, "modelp2p config show"))
    except OSError as exc:
        # Without a path where it is a descriptor that could not be read.
        place = exc.filename if isinstance(exc.filename, str) else "one of its files"
        return Told(Config(), problem("configuration", f"{place}: {exc.strerror}", "modelp2p config show"))
    said = f"no mistake in {', '.join(found.files)}" if found.files else "no file sets anything"
    return Told(found.config, ok("configuration", said))


def interview(app: App, ref: Ref | None, known: Told) -> Told:
    """What is `known`, and what the daemon of this home says, or the machine's service; hangs where that one does.

    Raises:
        NotFoundError: there is no such bundle file.
    """
    told = replace(known)
    if ref is None:
        _ask(app, told, None)
        return told
    with ref_args(ref) as asked:
        _ask(app, told, asked)
    return told


def _ask(app: App, told: Told, asked: tuple[Map, list[int]] | None) -> None:
    try:
        with daemon(app, start=False, service=True) as client:
            status = Row(client.call("status", {}).result)
            _ask_as_owner(client, told)
            if asked is not None:
                _ask_for_release(client, told, *asked)
    except ModelP2PError as exc:
        # Also one that hangs up in the middle: then what it said before is worth nothing.
        told.silence = exc.message
        return
    told.node, told.releases = status.row("node") or Row({}), status.rows("releases")


def _ask_as_owner(client: Client, told: Told) -> None:
    from modelp2p.daemon.config import parse_config

    try:
        told.trusted = Row(client.call("trust_list", {}).result).rows("entries")
        told.config = parse_config(Row(client.call("config", {}).result).text("text"))
        told.is_owner = True
        told.gateway_port = urlsplit(Row(client.call("gateway", {}).result).text("endpoint")).port or 0
    except (DeniedError, NotFoundError, UsageError):
        return  # not the owner's daemon, one of another version, or one without a gateway


def _ask_for_release(client: Client, told: Told, args: Map, fds: list[int]) -> None:
    from modelp2p.cli.shown import shown
    from modelp2p.protocol.manifest import MAX_MANIFEST_BYTES

    try:
        reply = client.call("show", args, fds)
        told.shown = shown(reply.result, reply.read_fds(MAX_MANIFEST_BYTES))
    except ModelP2PError as exc:
        told.unshown = exc
