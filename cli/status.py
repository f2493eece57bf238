"""`status`: what the daemon is doing, once or every second."""

from __future__ import annotations

import sys
import time

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import Client, daemon
from modelp2p.cli.options import home_option, json_option, quiet_option
from modelp2p.cli.output import emit_json, flush, out, table
from modelp2p.cli.pins import state_text
from modelp2p.cli.results import Row
from modelp2p.cli.units import duration_text, percent_text, rate_text, size_text
from modelp2p.protocol.text import printable

REFRESH_S = 1.0
_NODE_KEYS = ("pid", "listen_port", "profile", "publisher_ids")
_RELEASE_KEYS = ("name", "revision", "info_hash", "state", "size", "proven", "rate_down", "rate_up", "peers", "uploaded")


@click.command()
@click.option("-w", "--watch", is_flag=True, help="Again every second, until Ctrl-C. With --json one object a line.")
@json_option
@quiet_option
@home_option
@pass_app
def status(app: App, watch: bool) -> None:
    """Show what the daemon is doing. Exit 8 where none runs."""
    with daemon(app, start=False, service=True) as client:
        if watch and sys.stdout.isatty() and not app.as_json:
            _watch_live(app, client)
        while True:
            _print(app, Row(client.call("status", {}).result))
            if not watch:
                return
            flush()
            time.sleep(REFRESH_S)


def _print(app: App, result: Row) -> None:
    if app.as_json:
        node = result.row("node") or Row({})
        releases = [item.first(*_RELEASE_KEYS) for item in result.rows("releases")]
        emit_json({"node": node.first(*_NODE_KEYS), "releases": releases})
        return
    for line in _lines(result, quiet=app.quiet):
        out(line)


def _watch_live(app: App, client: Client) -> None:
    """Redraws in place until Ctrl-C or until the daemon goes away; lines are cut at the terminal's edge, never wrapped."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    with Live(console=console, auto_refresh=False, screen=False, vertical_overflow="crop") as live:
        while True:
            lines = _lines(Row(client.call("status", {}).result), quiet=app.quiet)
            live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)
            time.sleep(REFRESH_S)


def _lines(result: Row, *, quiet: bool) -> list[str]:
    node, releases = result.row("node") or Row({}), result.rows("releases")
    if quiet:
        return [printable(f"{item.ref} {item.text('state')}") for item in releases]
    facts = [
        f"pid {node.number('pid')}",
        f"port {node.number('listen_port')}",
        f"profile {node.text('profile')}",
        f"up {duration_text(node.number('uptime_s'))}",
    ]
    facts.append(f"engine confined (Landlock {level})" if (level := node.number("landlock")) else "engine not confined")
    if node.flag("on_demand"):
        facts.append("on demand")
    if addresses := node.texts("public_http"):
        facts.append(f"everybody at {' '.join(addresses)}")
    lines = [printable(", ".join(facts))]
    if not releases:
        return [*lines, "no releases"]
    rows = [
        (
            item.text("name"),
            item.short_revision,
            state_text(item),
            percent_text(item.number("proven"), item.number("size")),
            size_text(item.number("size")),
            rate_text(item.number("rate_down")),
            rate_text(item.number("rate_up")),
            item.number("peers"),
            size_text(item.number("uploaded")),
        )
        for item in releases
    ]
    headers = ("NAME", "REVISION", "STATE", "VERIFIED", "SIZE", "DOWN", "UP", "PEERS", "UPLOADED")
    lines += table(headers, rows, right="VERIFIED SIZE DOWN UP PEERS UPLOADED")
    errors = [(item.text("name"), item.text(key, "")) for item in releases for key in ("error", "origin")]
    return [*lines, *(printable(f"{name}: {error}") for name, error in errors if error)]
