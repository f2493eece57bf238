"""`daemon` and `seed`: this process becomes the daemon of its home, in the foreground."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.configuring import effective_config
from modelp2p.cli.connection import running_daemon
from modelp2p.cli.options import json_option, node_options, quiet_option
from modelp2p.cli.output import emit_json, out, say
from modelp2p.cli.refs import local_release_of, typed_ref
from modelp2p.cli.results import Row
from modelp2p.protocol.names import BundleRef, LinkRef
from modelp2p.protocol.text import printable

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map


@click.command()
@node_options
@pass_app
def daemon(app: App) -> int:
    """Run the daemon in the foreground until Ctrl-C or SIGTERM.

    It says READY on stderr (and to systemd) when it accepts commands. SIGHUP makes it read its configuration again.
    """
    return _run(app, None)


@click.command()
@click.argument("refs", nargs=-1, metavar="[REF]...")
@json_option
@quiet_option
@node_options
@pass_app
def seed(app: App, refs: Sequence[str]) -> int:
    """Seed these releases (default: all) in the foreground.

    Where a daemon runs already, it is asked to seed them, and this command returns.
    """
    texts = [_text_of(ref) for ref in refs]
    with running_daemon(app) as client:
        if client is not None:
            args: dict[str, object] = {"refs": texts, "peers": app.flags.get("network.peers", [])}
            if (max_up := app.flags.get("network.max_up")) is not None:
                args["max_up"] = max_up
            _show(app, Row(client.call("seed", cast("Map", args)).result))
            return 0
    return _run(app, tuple(texts) or None)


def _show(app: App, result: Row) -> None:
    if app.as_json:
        emit_json(result.first("releases", "listen_port"))
        return
    say(app, f"A daemon runs already (port {result.number('listen_port')}): it seeds them now.")
    for release in result.texts("releases"):
        out(printable(release))


def _run(app: App, seed_refs: tuple[str, ...] | None) -> int:
    config = effective_config(app).config
    from modelp2p.daemon.main import Surroundings, run_daemon

    given = Surroundings(
        # A service gets its own runtime folder from systemd; a user has one from the login session.
        runtime_dir=app.environ.get("RUNTIME_DIRECTORY") or app.environ.get("XDG_RUNTIME_DIR"),
        service_dir=app.environ.get("RUNTIME_DIRECTORY"),
        notify_socket=app.environ.get("NOTIFY_SOCKET"),
        seed_refs=seed_refs,
        # At SIGHUP: the same files, variables and flags as now.
        read_config=lambda: effective_config(app).config,
    )
    return run_daemon(app.home, config, given)


def _text_of(text: str) -> str:
    """A reference as text for the daemon; a bundle is opened and checked here, and becomes its link."""
    match typed_ref(text):
        case BundleRef(path):
            return local_release_of(path)[3]
        case LinkRef(link):
            return link
        case name:
            return str(name)
