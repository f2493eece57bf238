"""`config show` and `config validate`."""

from __future__ import annotations

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.configuring import effective_config, read_config_file, usual_files
from modelp2p.cli.connection import daemon
from modelp2p.cli.options import config_option, home_option, json_option
from modelp2p.cli.output import emit_json, out
from modelp2p.protocol.codec import take
from modelp2p.protocol.errors import UsageError
from modelp2p.protocol.text import printable


@click.group()
def config() -> None:
    """Show and check the configuration."""


@config.command()
@click.option("--running", is_flag=True, help="What the running daemon uses instead.")
@json_option
@home_option
@config_option
@pass_app
def show(app: App, running: bool) -> None:
    """Print every value as TOML, with where it came from."""
    if running:
        with daemon(app, start=False) as client:
            text = take(client.call("config", {}).result, "text", str)
        if app.as_json:
            emit_json({"text": text})
        else:
            for written in text.splitlines():
                out(printable(written))
        return
    from modelp2p.daemon.config import describe

    found = effective_config(app)
    lines = describe(found.config)
    if app.as_json:
        origins = {line.key: found.origins.get(line.key, "default") for line in lines}
        emit_json({"values": {line.key: _plain(line.value) for line in lines}, "origins": origins, "files": found.files})
        return
    section = ""
    for line in lines:
        head, _, name = line.key.partition(".")
        if head != section:
            out(f"[{head}]" if not section else f"\n[{head}]")
            section = head
        out(printable(f"{name} = {line.value}  # {found.origins.get(line.key, 'default')}"))
    out()
    for path in usual_files(app) if app.config_file is None else ():
        out(printable(f"# {'read' if path in found.files else 'not there'}: {path}"))


@config.command()
@click.argument("file")
@json_option
@pass_app
def validate(app: App, file: str) -> None:
    """Check FILE: unknown keys and wrong values are errors (exit 2)."""
    from modelp2p.daemon.config import keys_in, parse_config

    text = read_config_file(file)
    try:
        parse_config(text)
        count = len(keys_in(text))
    except UsageError as exc:
        raise UsageError(f"{file}: {exc.message}", hint=exc.hint, **exc.facts) from exc
    if app.as_json:
        emit_json({"ok": True, "file": file, "keys": count})
    else:
        out(printable(f"{file}: ok, sets {count} {'key' if count == 1 else 'keys'}"))


def _plain(toml_value: str) -> object:
    import tomllib

    return tomllib.loads(f"value = {toml_value}")["value"]
