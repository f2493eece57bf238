"""`env`: what a shell has to export so that Hugging Face programs read from this node."""

from __future__ import annotations

import shlex

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import daemon
from modelp2p.cli.options import home_option, json_option, quiet_option
from modelp2p.cli.output import emit_json, out
from modelp2p.protocol.codec import take

_FORMS = {"sh": "export {name}={value}", "fish": "set -gx {name} {value}", "csh": "setenv {name} {value}"}


@click.command()
@click.option(
    "--shell", type=click.Choice(list(_FORMS)), default="sh", show_default=True, help="For which shell; sh is bash, zsh too."
)
@json_option
@quiet_option
@home_option
@pass_app
def env(app: App, shell: str) -> None:
    """Print the exports that lead Hugging Face programs to this node's gateway.

    Use it as: eval "$(modelp2p env)". The address holds a token: whoever has it may read what this node holds. With -q it is
    printed alone. Exit 8 where no daemon runs, 3 where it has no gateway.
    """
    with daemon(app, start=False) as client:
        endpoint = take(client.call("gateway", {}).result, "endpoint", str)
    if app.as_json:
        emit_json({"env": {"HF_ENDPOINT": endpoint}})
    elif app.quiet:
        out(endpoint)
    else:
        out(_FORMS[shell].format(name="HF_ENDPOINT", value=shlex.quote(endpoint)))
