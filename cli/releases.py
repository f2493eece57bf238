"""`ls`, `show`, `verify`, `rm` and `gc`: the releases on this node."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import daemon
from modelp2p.cli.options import client_options, peer_option
from modelp2p.cli.output import emit_block, emit_json, out, say, table
from modelp2p.cli.progress import progress_of
from modelp2p.cli.refs import ref_args, typed_ref
from modelp2p.cli.units import percent_text, size_text, time_text
from modelp2p.protocol.errors import Kind
from modelp2p.protocol.text import printable

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

_SHORT_REVISION = 12


@click.command()
@client_options
@pass_app
def ls(app: App) -> None:
    """List the releases on this node."""
    with daemon(app) as client:
        result = client.call("ls", {}).result
    if app.as_json:
        emit_json(result)
        return
    releases = _maps(result["releases"])
    if app.quiet:
        for item in releases:
            out(printable(f"{item['name']}@{item['revision']}"))
        return
    if not releases:
        say(app, "There is no release here yet. Get one: modelp2p fetch REF.")
        return
    rows = [
        (
            item["name"] if item.get("name_verified") else f"{item['name']} (not verified)",
            str(item["revision"])[:_SHORT_REVISION],
            item["state"],
            size_text(_whole(item["size"])),
            percent_text(_whole(item["proven"]), _whole(item["size"])),
            item["files"],
        )
        for item in releases
    ]
    for line in table(("NAME", "REVISION", "STATE", "SIZE", "VERIFIED", "FILES"), rows, right="SIZE VERIFIED FILES"):
        out(line)


@click.command()
@click.argument("ref")
@click.option("--bundle", metavar="FILE", help="Also write the signed statement to FILE (name it *.modelp2p).")
@client_options
@pass_app
def show(app: App, ref: str, bundle: str | None) -> None:
    """Show all that is known about REF; with -q just its link."""
    with ref_args(typed_ref(ref)) as (args, fds), daemon(app) as client:
        reply = client.call("show", args | ({"bundle_out": True} if bundle else {}), fds)
    contents = _read_bundles(reply.read_fds)
    if bundle is not None and contents:
        _write_file(bundle, contents[0])
        say(app, f"The signed statement is in {bundle}")
    result = reply.result
    if app.as_json:
        emit_json(result)
    elif app.quiet:
        out(printable(str(result.get("link", ""))))
    else:
        _show(result)


@click.command()
@click.argument("ref")
@click.option("--repair", is_flag=True, help="Fetch again what is bad.")
@peer_option
@client_options
@pass_app
def verify(app: App, ref: str, repair: bool, peers: Sequence[str]) -> int:
    """Read REF back from disk and check every byte against the signed hashes. Exit 4 if any is bad."""
    with ref_args(typed_ref(ref)) as (args, fds), daemon(app) as client, progress_of(app) as progress:
        args = {**args, "repair": repair, "peers": list(peers)}
        result = client.call("verify", args, fds, progress.on_event).result
    ok = bool(result["ok"])
    bad = _maps(result["bad"])
    if app.as_json:
        emit_json(
            {key: result[key] for key in ("name", "ok", "bad")}
            | {k: v for k, v in result.items() if k not in ("name", "ok", "bad")}
        )
    else:
        if not app.quiet or not ok:
            for item in bad:
                out(printable(f"bad: {item['path']}, piece {item['piece']}"))
        name = f"{result['name']}@{result['revision']}"
        repaired = f", {size_text(_whole(result['repaired']))} repaired" if result.get("repaired") else ""
        say(
            app,
            f"{name}: {'every byte is good' if ok else f'{len(bad)} bad pieces'}, {size_text(_whole(result['bytes']))} read{repaired}",
        )
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
        result = client.call("rm", args, fds).result
    if app.as_json:
        emit_json(result)
    else:
        say(app, f"Removed {result['name']}@{result['revision']}, {size_text(_whole(result['freed']))} freed")
    return 0


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@client_options
@pass_app
def gc(app: App, dry_run: bool) -> None:
    """Remove what no release needs: leftovers of removed releases and of interrupted work."""
    with daemon(app) as client:
        result = client.call("gc", {"dry_run": dry_run}).result
    if app.as_json:
        emit_json(result)
        return
    for item in cast("list[Value]", result["removed"]):
        out(printable(str(item)))
    say(app, f"{size_text(_whole(result['freed']))} {'would be freed' if dry_run else 'freed'}")


def _show(result: Map) -> None:
    get = result.get
    emit_block(
        [
            ("Release", f"{get('name')}@{get('revision')}"),
            ("Signed by", f"{get('publisher')}{'' if get('name_verified') else ' (name not verified)'}"),
            ("State", get("state")),
            ("Path", get("path")),
            ("Created", f"{time_text(_whole(get('created', 0)))}, sequence {get('sequence')}"),
            ("License", " ".join(str(part) for part in (get("license"), get("license_file")) if part)),
            ("Origin", _line_of(get("origin"), "{repo}@{commit}")),
            *(("Made from", _line_of(item, "{relation} of {name}@{revision}")) for item in _maps(get("lineage", []))),
            *((f"Note {key}", value) for key, value in cast("Map", get("notes") or {}).items()),
            *(("Web seed", url) for url in cast("list[Value]", get("web_seeds", []))),
            *(("Tracker", url) for url in cast("list[Value]", get("trackers", []))),
            ("Statements", get("statements")),
            ("Manifest", get("manifest")),
            ("Info-hash", get("info_hash")),
            ("Link", get("link")),
        ]
    )
    out()
    rows = [
        (item["path"], size_text(_whole(item["size"])), item.get("kind", ""), item.get("sha256", ""))
        for item in _maps(result.get("files", []))
    ]
    for line in table(("FILE", "SIZE", "KIND", "SHA-256"), rows, right="SIZE"):
        out(line)


def _line_of(value: Value, form: str) -> str:
    return form.format_map(cast("dict[str, str]", value)) if isinstance(value, dict) else ""


def _read_bundles(read_fds: object) -> list[bytes]:
    from modelp2p.protocol.statement import MAX_BUNDLE_BYTES

    assert callable(read_fds)
    return cast("list[bytes]", read_fds(MAX_BUNDLE_BYTES))


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


def _maps(value: Value) -> list[Map]:
    return [cast("Map", item) for item in cast("list[Value]", value)]


def _whole(value: Value) -> int:
    return value if isinstance(value, int) else 0
