"""The `modelp2p` command: a table of verbs that are imported only when used, and the frame every verb runs in.

Invariants:
- `modelp2p --help` imports no verb, no trio, no torch, no rich and no cryptography: it answers before a user looks up;
- every exit code goes through `failures.report`, or is 0;
- SIGTERM ends a verb exactly as Ctrl-C does.

A new verb is one line in `VERBS` and one file.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from modelp2p.cli.app import App
from modelp2p.cli.connection import Connector, SocketConnector
from modelp2p.cli.failures import TerminatedError, report
from modelp2p.cli.options import place_options
from modelp2p.cli.output import OutputClosedError, flush, mute, talk

if TYPE_CHECKING:
    from types import FrameType

    from click.shell_completion import CompletionItem

# verb: (module, attribute, one line for --help). In the order a newcomer needs them.
VERBS: dict[str, tuple[str, str, str]] = {
    "fetch": ("modelp2p.cli.fetch", "fetch", "Download a release, verify it and print its path."),
    "publish": ("modelp2p.cli.publish", "publish", "Sign a folder as a release and print its link."),
    "seed": ("modelp2p.cli.serve", "seed", "Seed releases in the foreground."),
    "daemon": ("modelp2p.cli.serve", "daemon", "Run the daemon in the foreground."),
    "status": ("modelp2p.cli.status", "status", "What the daemon is doing."),
    "ls": ("modelp2p.cli.releases", "ls", "The releases on this node."),
    "show": ("modelp2p.cli.releases", "show", "All that is known about one release."),
    "verify": ("modelp2p.cli.releases", "verify", "Read a release back and check every byte."),
    "load": ("modelp2p.cli.load", "load", "Load a release onto a device, with timings."),
    "adopt": ("modelp2p.cli.fetch", "adopt", "Take over files that are here already; fetch the rest."),
    "export": ("modelp2p.cli.export", "export", "Copy a release to a folder, for a machine without a network."),
    "import": ("modelp2p.cli.importing", "import_release", "Take in what was exported."),
    "materialize": ("modelp2p.cli.materialize", "materialize", "Put a release into the Hugging Face cache."),
    "pin": ("modelp2p.cli.pins", "pin", "Keep a release: rm and gc leave it alone."),
    "unpin": ("modelp2p.cli.pins", "unpin", "Take the pin off a release."),
    "rm": ("modelp2p.cli.releases", "rm", "Remove a release from this node."),
    "gc": ("modelp2p.cli.releases", "gc", "Remove what no release needs."),
    "trust": ("modelp2p.cli.trust", "trust", "Which publisher may speak for which name."),
    "keys": ("modelp2p.cli.keys", "keys", "The keys you publish with."),
    "demo": ("modelp2p.cli.demo", "demo", "See the whole job done between two nodes on this machine."),
    "env": ("modelp2p.cli.env", "env", "The address of the gateway, for Hugging Face programs."),
    "config": ("modelp2p.cli.config", "config", "Show and check the configuration."),
    "doctor": ("modelp2p.cli.doctor", "doctor", "Look for what keeps this node from working."),
    "completion": ("modelp2p.cli.completion", "completion", "Print the script by which a shell completes commands."),
    "install": ("modelp2p.cli.install", "install", "Make other programs know this one."),
}
# What users of other tools type first.
_OTHER_WORDS = {
    "download": "fetch",
    "pull": "fetch",
    "get": "fetch",
    "push": "publish",
    "upload": "publish",
    "list": "ls",
    "ps": "status",
    "remove": "rm",
    "prune": "gc",
    "fsck": "verify",
    "info": "show",
    "start": "daemon",
    "serve": "daemon",
}


class UnknownVerbError(click.UsageError):
    """A verb that does not exist, with the one that was probably meant."""

    def __init__(self, name: str, known: Sequence[str], ctx: click.Context) -> None:
        super().__init__(f"There is no command '{name}'.", ctx)
        close = difflib.get_close_matches(name, known, n=1)
        meant = _OTHER_WORDS.get(name) or (close[0] if close else "")
        self.hint = f"Did you mean '{ctx.command_path} {meant}'?" if meant in known else ""


class LazyGroup(click.Group):
    """A group whose verbs live in `VERBS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, attribute, _ = VERBS[cmd_name]
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        if ctx.resilient_parsing:
            from modelp2p.cli.completion import with_values

            with_values(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        # The group's own would import every verb to ask it for its line.
        verbs = [CompletionItem(name, help=line) for name, (_, _, line) in VERBS.items() if name.startswith(incomplete)]
        return [*verbs, *click.Command.shell_complete(self, ctx, incomplete)]

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise UnknownVerbError(args[0], list(VERBS), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="modelp2p", prog_name="modelp2p")
@place_options
def cli() -> None:
    """Fetch, verify, seed and publish model weights over BitTorrent v2.

    REF is org/model, org/model@revision, a magnet link or a .modelp2p bundle.
    """


def main() -> int:
    """Run the command line of this process; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows its escape; it never stops a command.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    with _sigterm_like_ctrl_c():
        return run(sys.argv[1:], SocketConnector(), os.environ)


def run(args: Sequence[str], connector: Connector, environ: Mapping[str, str]) -> int:
    """Run one command line against `connector`; returns the exit code and raises nothing."""
    app = App(connector, environ)
    try:
        result: Any = cli.main(args=list(args), prog_name="modelp2p", standalone_mode=False, obj=app)
        flush()
        return result if isinstance(result, int) else 0
    except (OutputClosedError, BrokenPipeError):
        # The plain one comes from click's own --help; the control client turns its broken pipes into errors of ours.
        mute(sys.stdout)
        return 0
    except click.exceptions.NoArgsIsHelpError as exc:
        talk_lines(exc.format_message())
        return exc.exit_code
    except BaseException as exc:
        if isinstance(exc, SystemExit | GeneratorExit):
            raise
        return report(exc, as_json=app.as_json or _asks_for_json(args), environ=environ)


def talk_lines(text: str) -> None:
    """Several lines for stderr; `talk` alone would show the line ends as escapes."""
    for line in text.splitlines():
        talk(line)


def _asks_for_json(args: Sequence[str]) -> bool:
    # A command line that click could not parse still says in which form its error is wanted.
    flags = args[: args.index("--")] if "--" in args else args
    return "--json" in flags


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> None:
        raise TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
