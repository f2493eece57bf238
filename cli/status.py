"""`status`: what the daemon is doing, once or every second."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, cast

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import Client, daemon
from modelp2p.cli.options import home_option, json_option, quiet_option
from modelp2p.cli.output import emit_json, flush, out, table
from modelp2p.cli.units import duration_text, percent_text, rate_text, size_text
from modelp2p.protocol.text import printable

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

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
    with daemon(app, start=False) as client:
        if watch and sys.stdout.isatty() and not app.as_json:
            _watch_live(app, client)
        while True:
            _print(app, client.call("status", {}).result)
            if not watch:
                return
            flush()
            time.sleep(REFRESH_S)


def _print(app: App, result: Map) -> None:
    if app.as_json:
        node, releases = cast("Map", result["node"]), cast("list[Value]", result["releases"])
        emit_json({"node": _first(node, _NODE_KEYS), "releases": [_first(cast("Map", item), _RELEASE_KEYS) for item in releases]})
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
            lines = _lines(client.call("status", {}).result, quiet=app.quiet)
            live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)
            time.sleep(REFRESH_S)


def _lines(result: Map, *, quiet: bool) -> list[str]:
    node = cast("Map", result["node"])
    releases = [cast("Map", item) for item in cast("list[Value]", result["releases"])]
    if quiet:
        return [printable(f"{item['name']}@{item['revision']} {item['state']}") for item in releases]
    facts = [f"pid {node['pid']}", f"port {node['listen_port']}", f"profile {node['profile']}"]
    if isinstance(uptime := node.get("uptime_s"), int):
        facts.append(f"up {duration_text(uptime)}")
    if node.get("on_demand"):
        facts.append("on demand")
    if "landlock" in node:
        facts.append("engine confined" if node["landlock"] else "engine not confined")
    lines = [printable(", ".join(facts))]
    if not releases:
        return [*lines, "no releases"]
    rows = [
        (
            item["name"],
            str(item["revision"])[:12],
            item["state"],
            percent_text(_whole(item["proven"]), _whole(item["size"])),
            size_text(_whole(item["size"])),
            rate_text(_whole(item["rate_down"])),
            rate_text(_whole(item["rate_up"])),
            item["peers"],
            size_text(_whole(item["uploaded"])),
        )
        for item in releases
    ]
    headers = ("NAME", "REVISION", "STATE", "VERIFIED", "SIZE", "DOWN", "UP", "PEERS", "UPLOADED")
    lines += table(headers, rows, right="VERIFIED SIZE DOWN UP PEERS UPLOADED")
    return [*lines, *(printable(f"{item['name']}: {item['error']}") for item in releases if item.get("error"))]


def _first(source: Map, keys: tuple[str, ...]) -> dict[str, object]:
    """`source` with the keys of the contract first."""
    return {key: source[key] for key in keys} | {key: value for key, value in source.items() if key not in keys}


def _whole(value: Value) -> int:
    return value if isinstance(value, int) else 0
