"""`trust add|list|remove`: which publisher this node believes for which name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import daemon
from modelp2p.cli.options import client_options, peer_option, timeout_option
from modelp2p.cli.output import emit_block, emit_json, out, say, table
from modelp2p.cli.refs import ref_args, typed_ref
from modelp2p.cli.results import Row
from modelp2p.protocol.errors import FormatError, UsageError
from modelp2p.protocol.names import NameRef, check_publisher_id

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map


@click.group()
def trust() -> None:
    """Which publisher may speak for which name.

    A link authorises its publisher for one fetch. Only an entry made here lets a publisher's releases be found by name.
    """


@trust.command()
@click.argument("ref", metavar="LINK|BUNDLE")
@click.option("--name", required=True, metavar="PATTERN", help="org/model, org/* or *: what the publisher may speak for.")
@peer_option
@timeout_option
@client_options
@pass_app
def add(app: App, ref: str, name: str, peers: Sequence[str], timeout_s: int | None) -> None:
    """Trust the publisher of LINK or BUNDLE for every name that PATTERN matches.

    The statement behind a link that is not known here is fetched first, from --peer too.
    """
    typed = typed_ref(ref)
    if isinstance(typed, NameRef):
        raise UsageError("trust is given to the publisher of a link or bundle, not to a name", hint="Give the link you trust.")
    with ref_args(typed) as (args, fds), daemon(app) as client:
        asked: Map = {**args, "name": name} | ({"peers": list(peers)} if peers else {})
        if timeout_s is not None:
            asked["timeout_s"] = timeout_s
        result = Row(client.call("trust_add", asked, fds).result)
    if app.as_json:
        emit_json(result.first("publisher", "name"))
    elif app.quiet:
        out(result.text("publisher"))
    else:
        emit_block([("Publisher", result.text("publisher")), ("May sign", result.text("name"))])


@trust.command("list")
@client_options
@pass_app
def list_(app: App) -> None:
    """List what was trusted."""
    with daemon(app) as client:
        result = Row(client.call("trust_list", {}).result)
    if app.as_json:
        emit_json(result.first("entries"))
        return
    entries = result.rows("entries")
    if not entries:
        say(app, "No publisher is trusted for any name. Add one: modelp2p trust add LINK --name org/model.")
        return
    for line in table(("NAME", "PUBLISHER"), [(item.text("name"), item.text("publisher")) for item in entries]):
        out(line)


@trust.command()
@click.argument("publisher")
@click.option("--name", metavar="PATTERN", help="Only this entry; default: all of the publisher's.")
@client_options
@pass_app
def remove(app: App, publisher: str, name: str | None) -> None:
    """Take trust back from PUBLISHER (its id). Releases that are here stay."""
    try:
        args: Map = {"publisher": check_publisher_id(publisher)}
    except FormatError as exc:
        raise UsageError(exc.message, hint=exc.hint) from exc
    if name is not None:
        args["name"] = name
    with daemon(app) as client:
        result = Row(client.call("trust_remove", args).result)
    if app.as_json:
        emit_json(result.first("removed"))
    else:
        say(app, f"{result.number('removed')} removed")
