"""`daemon` and `seed`: this process becomes the daemon of its home, in the foreground."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.configuring import effective_config
from modelp2p.cli.connection import daemon as connected
from modelp2p.cli.options import json_option, node_options, quiet_option
from modelp2p.cli.output import emit_json, out, say
from modelp2p.cli.refs import local_release_of, typed_ref
from modelp2p.protocol.errors import DaemonError
from modelp2p.protocol.names import BundleRef
from modelp2p.protocol.text import printable


@click.command()
@node_options
@pass_app
def daemon(app: App) -> int:
    """Run the daemon in the foreground until Ctrl-C or SIGTERM.

    It says READY on stderr (and to systemd) when it accepts commands.
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
    try:
        with connected(app, start=False) as client:
            peers, max_up = app.flags.get("network.peers", []), app.flags.get("network.max_up")
            args = {"refs": texts, "peers": peers} | ({} if max_up is None else {"max_up": max_up})
            result = client.call("seed", cast("dict[str, object]", args)).result  # type: ignore[arg-type]  # flags are values
    except DaemonError:
        return _run(app, tuple(texts))
    releases = cast("list[str]", result.get("releases", []))
    if app.as_json:
        emit_json(result)
    else:
        say(app, f"A daemon runs already (port {result.get('listen_port')}): it seeds them now.")
        for release in releases:
            out(printable(release))
    return 0


def _run(app: App, seed_refs: tuple[str, ...] | None) -> int:
    config = effective_config(app).config
    from modelp2p.daemon.main import run_daemon

    return run_daemon(app.home, config, seed_refs=seed_refs)


def _text_of(text: str) -> str:
    """A reference as text for the daemon; a bundle is opened and checked here, and becomes its link."""
    ref = typed_ref(text)
    return local_release_of(ref.path)[3] if isinstance(ref, BundleRef) else str(getattr(ref, "text", ref))
