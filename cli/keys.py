"""`keys init`, `keys list` and `keys show`: the publisher identity of this user."""

from __future__ import annotations

import datetime

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.keyring import KeyFolder, create_key, key_names, key_of
from modelp2p.cli.options import json_option, quiet_option
from modelp2p.cli.output import emit_block, emit_json, out, say, table
from modelp2p.cli.passphrase import ask_new, passphrase_from_file

ROOT_LIFETIME = datetime.timedelta(days=365)
"""A year: TUF's own advice for a root that people renew by hand."""


@click.group()
def keys() -> None:
    """The keys you publish with."""


@keys.command()
@click.argument("name")
@click.option("--no-passphrase", is_flag=True, help="Protect the key by file permissions alone.")
@click.option("--passphrase-file", metavar="FILE", help="Read the passphrase from the first line of FILE.")
@json_option
@quiet_option
@pass_app
def init(app: App, name: str, no_passphrase: bool, passphrase_file: str | None) -> None:
    """Make a new publisher called NAME (a name for you; others see the publisher id)."""
    if no_passphrase and passphrase_file is not None:
        raise click.UsageError("--no-passphrase and --passphrase-file contradict each other")
    passphrase = None
    if passphrase_file is not None:
        passphrase = passphrase_from_file(passphrase_file)
    elif not no_passphrase:
        passphrase = ask_new()
    folder = create_key(app.keys_folder, name, passphrase, _now() + ROOT_LIFETIME)
    _print_key(app, folder)
    if not app.as_json:
        if no_passphrase:
            say(app, "The key has no passphrase: whoever can read its files can publish in your name.")
        say(app, "Keep a copy of that folder somewhere safe: a lost key cannot be made again.")


@keys.command("list")
@json_option
@quiet_option
@pass_app
def list_(app: App) -> None:
    """List the keys of this user."""
    found = [key_of(app.keys_folder, name) for name in key_names(app.keys_folder)]
    if app.as_json:
        emit_json({"keys": [_described(folder) for folder in found]})
    elif app.quiet:
        for folder in found:
            out(folder.name)
    elif found:
        for line in table(("NAME", "PUBLISHER"), [(folder.name, folder.chain().publisher_id) for folder in found]):
            out(line)
    else:
        say(app, f"There is no key in {app.keys_folder}. Make one: modelp2p keys init NAME.")


@keys.command()
@click.argument("name", required=False)
@json_option
@quiet_option
@pass_app
def show(app: App, name: str | None) -> None:
    """Show the key NAME (or the only one); with -q just its publisher id."""
    _print_key(app, key_of(app.keys_folder, name))


def _print_key(app: App, folder: KeyFolder) -> None:
    described = _described(folder)
    if app.as_json:
        emit_json(described)
    elif app.quiet:
        out(str(described["publisher"]))
    else:
        emit_block(
            [
                ("Publisher", described["publisher"]),
                ("Name", folder.name),
                ("Folder", folder.path),
                ("Passphrase", "yes" if described["encrypted"] else "no"),
                ("Root", f"version {described['root_version']}, expires {described['expires']}"),
            ]
        )


def _described(folder: KeyFolder) -> dict[str, object]:
    chain = folder.chain()
    return {
        "name": folder.name,
        "publisher": chain.publisher_id,
        "path": folder.path,
        "encrypted": folder.release_key().is_encrypted,
        "root_version": chain.version,
        "expires": chain.expires.strftime("%Y-%m-%d"),
        "keyids": list(chain.release_keyids()),
    }


def _now() -> datetime.datetime:
    # TUF dates have whole seconds.
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
