"""Flags that several verbs share, written once so that they mean the same everywhere.

A shared flag stores its value in the `App`; a verb that uses one therefore has no parameter for it. Values are parsed by the
room that owns their meaning, imported only when such a flag is really given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from modelp2p.cli.app import App
from modelp2p.protocol.errors import FormatError, UsageError

if TYPE_CHECKING:
    from click import Context, Parameter

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Decorator = Callable[[Decorated], Decorated]
# Generic since click 8.4, a plain class before.
if TYPE_CHECKING:
    _Numbers: TypeAlias = click.ParamType[int]
    _Texts: TypeAlias = click.ParamType[str]
else:
    _Numbers = _Texts = click.ParamType


class Rate(_Numbers):
    """Bytes per second: `200M`, `1.5Gi`, `0` for no limit."""

    name = "rate"

    def convert(self, value: object, param: Parameter | None, ctx: Context | None) -> int:
        from modelp2p.daemon.settings import parse_quantity

        if isinstance(value, int):
            return value
        try:
            return parse_quantity(value, param.opts[0] if param else "rate", per_second=True)
        except UsageError as exc:
            self.fail(exc.message, param, ctx)


class Seconds(_Numbers):
    """A time above 0, such as `300` or `1.5`, rounded up to whole seconds: the control protocol carries no fractions."""

    name = "seconds"

    def convert(self, value: object, param: Parameter | None, ctx: Context | None) -> int:
        from modelp2p.daemon.requests import MAX_TIMEOUT_S

        try:
            seconds = float(str(value))
        except ValueError:
            self.fail(f"'{value}' is not a number of seconds", param, ctx)
        # Written so that "nan" is refused, too.
        if not 0 < seconds <= MAX_TIMEOUT_S:
            self.fail(f"'{value}' is not above 0 and at most {MAX_TIMEOUT_S} seconds", param, ctx)
        return math.ceil(seconds)


class Peer(_Texts):
    """`HOST:PORT` or `[IPv6]:PORT`, kept as text."""

    name = "host:port"

    def convert(self, value: object, param: Parameter | None, ctx: Context | None) -> str:
        from modelp2p.protocol.links import PeerAddress

        try:
            return str(PeerAddress.parse(str(value)))
        except (FormatError, ValueError) as exc:
            self.fail(str(exc), param, ctx)


def _keep(attribute: str) -> Callable[[Context, Parameter, object], None]:
    def callback(ctx: Context, param: Parameter, value: object) -> None:
        # A flag that was not given must not undo the same flag in front of the verb.
        if value not in (None, False, ()):
            setattr(ctx.find_object(App), attribute, value)

    return callback


def _keep_flag(key: str) -> Callable[[Context, Parameter, object], None]:
    def callback(ctx: Context, param: Parameter, value: object) -> None:
        app = ctx.find_object(App)
        if app is not None and value not in (None, ()):
            app.flags[key] = list(value) if isinstance(value, tuple) else value

    return callback


home_option: Decorator[Any] = click.option(
    "--home",
    metavar="DIR",
    expose_value=False,
    callback=_keep("home_flag"),
    help="The home of the daemon and its store (also MODELP2P_HOME).",
)
config_option: Decorator[Any] = click.option(
    "--config",
    metavar="FILE",
    expose_value=False,
    callback=_keep("config_file"),
    help="Read this configuration file instead of the usual ones.",
)
json_option: Decorator[Any] = click.option(
    "--json",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_keep("as_json"),
    help="Print one JSON object.",
)
quiet_option: Decorator[Any] = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_keep("quiet"),
    help="Print only the result, say nothing else.",
)
_listen_option: Decorator[Any] = click.option(
    "--listen",
    multiple=True,
    metavar="HOST:PORT",
    expose_value=False,
    callback=_keep_flag("network.listen"),
    help="Where a daemon started by this command listens; port 0 picks a free one.",
)
_profile_option: Decorator[Any] = click.option(
    "--profile",
    type=click.Choice(["lan", "wan"]),
    expose_value=False,
    callback=_keep_flag("network.profile"),
    help="How a daemon started by this command meets peers.",
)
peer_option: Decorator[Any] = click.option(
    "--peer", "peers", multiple=True, type=Peer(), help="A node that has it; may be repeated."
)
cache_dir_option: Decorator[Any] = click.option(
    "--cache-dir", metavar="DIR", help="The Hugging Face cache; default: where huggingface_hub keeps it."
)
timeout_option: Decorator[Any] = click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(),
    metavar="S",
    help="Give up after S seconds without a new verified byte (default 300).",
)
node_peer_option: Decorator[Any] = click.option(
    "--peer",
    multiple=True,
    type=Peer(),
    expose_value=False,
    callback=_keep_flag("network.peers"),
    help="A node that is offered to every swarm; may be repeated.",
)
node_limit_options: tuple[Decorator[Any], ...] = tuple(
    click.option(
        f"--max-{way}",
        type=Rate(),
        expose_value=False,
        callback=_keep_flag(f"network.max_{way}"),
        help=f"{word} limit of this node, such as 200M (bytes per second); 0 is none.",
    )
    for way, word in (("up", "Upload"), ("down", "Download"))
)


def together(*decorators: Decorator[Any]) -> Decorator[Any]:
    """One decorator that adds all of them, shown by --help in this order."""

    def decorate(function: Decorated) -> Decorated:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


place_options = together(home_option, config_option)
"""For every verb: where."""
client_options = together(json_option, quiet_option, _listen_option, _profile_option, home_option, config_option)
"""For a verb that talks to the daemon and may start one."""
node_options = together(_listen_option, _profile_option, node_peer_option, *node_limit_options, home_option, config_option)
"""For a verb that is the daemon."""
