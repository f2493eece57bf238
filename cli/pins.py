"""`pin` and `unpin`: releases that `rm` and `gc` leave alone."""

from __future__ import annotations

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import daemon
from modelp2p.cli.options import client_options
from modelp2p.cli.output import emit_json, out, say, table
from modelp2p.cli.refs import ref_args, typed_ref
from modelp2p.cli.results import Row
from modelp2p.cli.units import size_text
from modelp2p.protocol.text import printable

_KEYS = ("name", "revision", "info_hash", "pinned", "changed")


@click.command()
@click.argument("ref", required=False)
@click.option("--list", "is_list", is_flag=True, help="List what is pinned.")
@client_options
@pass_app
def pin(app: App, ref: str | None, is_list: bool) -> None:
    """Keep REF on this node: rm refuses it, and gc leaves it alone, until it is unpinned.

    What is pinned is the content, so every statement about it.
    """
    if (ref is None) != is_list:
        raise click.UsageError("give either REF or --list")
    if ref is None:
        _list(app)
    else:
        _mark(app, "pin", ref)


@click.command()
@click.argument("ref")
@client_options
@pass_app
def unpin(app: App, ref: str) -> None:
    """Take the pin off REF; nothing is removed by that."""
    _mark(app, "unpin", ref)


def state_text(item: Row) -> str:
    """The state of a release as tables show it: with a word more where it is pinned."""
    return item.text("state") + (" (pinned)" if item.flag("pinned") else "")


def _mark(app: App, verb: str, ref: str) -> None:
    with ref_args(typed_ref(ref)) as (args, fds), daemon(app) as client:
        result = Row(client.call(verb, args, fds).result)
    if app.as_json:
        emit_json({key: result.source.get(key) for key in _KEYS})
        return
    now = "pinned" if result.flag("pinned") else "not pinned"
    what = result.ref if "name" in result.source else f"content {result.text('info_hash')}"
    say(app, f"{what} is {now}" + ("" if result.flag("changed") else ", as it was before"))


def _list(app: App) -> None:
    with daemon(app) as client:
        result = Row(client.call("pins", {}).result)
    if app.as_json:
        emit_json(result.first("pins"))
        return
    pins = result.rows("pins")
    # A pin whose statement was damaged: the files are kept, and only a fetch can tell what they are.
    known = [item for item in pins if "name" in item.source]
    if app.quiet:
        for item in known:
            out(printable(item.ref))
        return
    if not pins:
        say(app, "Nothing is pinned. Pin a release: modelp2p pin REF.")
        return
    rows = [(item.text("name"), item.short_revision, item.text("state"), size_text(item.number("size"))) for item in known]
    rows += [(f"unknown content {item.text('info_hash')}", "", "", "") for item in pins if "name" not in item.source]
    for line in table(("NAME", "REVISION", "STATE", "SIZE"), rows, right="SIZE"):
        out(line)
