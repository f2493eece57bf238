"""`ls`, `show`, `verify`, `rm` and `gc`: the releases on this node."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import daemon
from modelp2p.cli.options import client_options, peer_option
from modelp2p.cli.output import emit_block, emit_json, out, say, table
from modelp2p.cli.pins import state_text
from modelp2p.cli.progress import progress_of
from modelp2p.cli.refs import ref_args, typed_ref
from modelp2p.cli.results import Row
from modelp2p.cli.units import percent_text, size_text, time_text
from modelp2p.protocol.errors import Kind, UsageError
from modelp2p.protocol.names import NameRef
from modelp2p.protocol.selection import wanted_paths
from modelp2p.protocol.text import printable

if TYPE_CHECKING:
    from modelp2p.cli.connection import Client
    from modelp2p.protocol.codec import Map, Value


@click.command()
@client_options
@pass_app
def ls(app: App) -> None:
    """List the releases on this node."""
    with daemon(app, service=True) as client:
        result = Row(client.call("ls", {}).result)
    if app.as_json:
        emit_json(result.first("releases"))
        return
    releases = result.rows("releases")
    if app.quiet:
        for item in releases:
            out(printable(item.ref))
        return
    if not releases:
        say(app, "There is no release here yet. Get one: modelp2p fetch REF.")
        return
    rows = [
        (
            item.text("name") + ("" if item.flag("name_verified") else " (not verified)"),
            item.short_revision,
            state_text(item),
            size_text(item.number("size")),
            percent_text(item.number("proven"), item.number("size")),
            item.number("files"),
        )
        for item in releases
    ]
    for line in table(("NAME", "REVISION", "STATE", "SIZE", "VERIFIED", "FILES"), rows, right="SIZE VERIFIED FILES"):
        out(line)


@click.command()
@click.argument("ref")
@click.option("--bundle", metavar="FILE", help="Also write the signed statement to FILE (name it *.modelp2p).")
@click.option("--lineage", is_flag=True, help="Show what it was made from, back to the first release, and who signed each.")
@client_options
@pass_app
def show(app: App, ref: str, bundle: str | None, lineage: bool) -> None:
    """Show all that is known about REF; with -q just its link."""
    from modelp2p.cli.lineage import lineage_of, looking_at, show_lineage
    from modelp2p.cli.shown import shown
    from modelp2p.protocol.statement import MAX_BUNDLE_BYTES

    typed = typed_ref(ref)
    with ref_args(typed) as (args, fds), daemon(app, service=isinstance(typed, NameRef)) as client:
        reply = client.call("show", args | {"bundle_out": bundle is not None}, fds)
        contents = reply.read_fds(MAX_BUNDLE_BYTES)
        result = shown(reply.result, contents)
        links = lineage_of(result, looking_at(client)) if lineage else None
    if bundle is not None:
        for content in contents[1:]:
            _write_file(bundle, content)
            say(app, f"The signed statement is in {bundle}")
    if app.as_json:
        chain = {} if links is None else {"chain": [link.as_map() for link in links]}
        emit_json(result.first("name", "revision", "info_hash", "manifest", "publisher", "state") | chain)
    elif app.quiet:
        out(result.text("link"))
    elif links is not None:
        show_lineage(links)
    else:
        _show(result)


@click.command()
@click.argument("ref")
@click.option("--repair", is_flag=True, help="Fetch again what is bad.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only files that match; may be repeated.")
@peer_option
@client_options
@pass_app
def verify(app: App, ref: str, repair: bool, include: tuple[str, ...], peers: Sequence[str]) -> int:
    """Read REF back from disk and check every byte against the signed hashes. Exit 4 if any is bad."""
    with ref_args(typed_ref(ref)) as (args, fds), daemon(app) as client, progress_of(app) as progress:
        asked: Map = {**args, "repair": repair, "peers": list(peers)}
        if include:
            asked["only"] = _matching(client, ref, args, fds, include)
        result = Row(client.call("verify", asked, fds, progress.on_event).result)
    ok, bad = result.flag("ok"), result.rows("bad")
    if app.as_json:
        emit_json(result.first("name", "ok", "bad"))
    else:
        for item in bad:
            out(printable(f"bad: {item.text('path')}, piece {item.number('piece')}"))
        verdict = "every byte is good" if ok else f"{len(bad)} bad pieces"
        repaired = f", {result.number('repaired')} repaired" if result.number("repaired") else ""
        say(app, f"{result.ref}: {verdict}, {size_text(result.number('bytes'))} read{repaired}")
        if not ok and not repair:
            say(app, "Hint: add --repair to fetch them again.")
    return 0 if ok else Kind.BAD_HASH.exit_code


@click.command()
@click.argument("ref")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@client_options
@pass_app
def rm(app: App, ref: str, yes: bool) -> int:
    """Remove REF from this node: its files, its journal, and this node as a seed. Files you published from stay yours."""
    typed = typed_ref(ref)
    if not yes and sys.stdin.isatty() and not click.confirm(f"Remove {printable(ref)} from this node?", err=True):
        say(app, "Nothing was removed.")
        return Kind.OTHER.exit_code
    with ref_args(typed) as (args, fds), daemon(app) as client:
        result = Row(client.call("rm", args, fds).result)
    if app.as_json:
        emit_json(result.first("name", "revision", "freed"))
    else:
        say(app, f"Removed {result.ref}, {size_text(result.number('freed'))} freed")
    return 0


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@client_options
@pass_app
def gc(app: App, dry_run: bool) -> None:
    """Remove what no release needs: leftovers of removed releases and of interrupted work."""
    with daemon(app) as client:
        result = Row(client.call("gc", {"dry_run": dry_run}).result)
    if app.as_json:
        emit_json(result.first("removed", "freed"))
        return
    for item in result.texts("removed"):
        out(printable(item))
    say(app, f"{size_text(result.number('freed'))} {'would be freed' if dry_run else 'freed'}")


def _matching(client: Client, ref: str, args: Map, fds: Sequence[int], include: tuple[str, ...]) -> list[Value]:
    """The files of a release that any of these globs selects.

    Raises:
        UsageError: none.
    """
    from modelp2p.cli.shown import shown
    from modelp2p.protocol.manifest import MAX_MANIFEST_BYTES

    reply = client.call("show", args, fds)
    files = shown(reply.result, reply.read_fds(MAX_MANIFEST_BYTES)).rows("files")
    chosen = wanted_paths({item.text("path"): item.number("size") for item in files}, include, ())
    if not chosen:
        raise UsageError(f"no file of {ref} matches", hint="'modelp2p show' lists its files.")
    return list(chosen)


def _show(result: Row) -> None:
    origin, notes = result.row("origin"), result.row("notes") or Row({})
    unverified = "" if result.flag("name_verified") else " (name not verified)"
    emit_block(
        [
            ("Release", result.ref),
            ("Signed by", result.text("publisher") + unverified),
            ("State", state_text(result)),
            ("Path", result.text("path", "")),
            ("Created", f"{time_text(result.number('created'))}, sequence {result.number('sequence')}"),
            ("License", f"{result.text('license', '')} {result.text('license_file', '')}".strip()),
            ("Origin", f"{origin.text('repo')}@{origin.text('commit')}" if origin else ""),
            *(("Made from", f"{item.text('relation')} of {item.ref}") for item in result.rows("lineage")),
            *((f"Note {printable(key)}", notes.text(key, "")) for key in notes.source),
            *(("Web seed", url) for url in result.texts("web_seeds")),
            *(("Tracker", url) for url in result.texts("trackers")),
            ("Statements", result.number("statements")),
            ("Manifest", result.text("manifest", "")),
            ("Info-hash", result.text("info_hash")),
            ("Link", result.text("link", "")),
        ]
    )
    out()
    rows = [
        (item.text("path"), size_text(item.number("size")), item.text("kind", ""), item.text("sha256", ""))
        for item in result.rows("files")
    ]
    for line in table(("FILE", "SIZE", "KIND", "SHA-256"), rows, right="SIZE"):
        out(line)


def _write_file(path: str, data: bytes) -> None:
    temporary = f"{path}.{secrets.token_hex(8)}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
