"""Shell completion: the script a shell loads, and what is offered for the values of arguments and options.

Invariants:
- asking the daemon ends after `PATIENCE_S`, with nothing offered; no daemon is started, and nothing is said on stderr;
- verbs know nothing of it: what a value is follows from the name or the metavar of its parameter, by the tables below.

The protocol between shell and program is click's: https://click.palletsprojects.com/en/stable/shell-completion/
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class
from click.types import StringParamType

from modelp2p.cli.app import App
from modelp2p.cli.connection import daemon
from modelp2p.cli.output import out
from modelp2p.cli.results import Row
from modelp2p.cli.units import percent_text, size_text
from modelp2p.protocol.errors import ModelP2PError

if TYPE_CHECKING:
    from click import Context, Parameter

PATIENCE_S = 0.3
"""Longer than this a Tab key feels broken."""
PROGRAM = "modelp2p"
VARIABLE = "_MODELP2P_COMPLETE"
_PATHS = ("/", "./", "../", "~")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: Context, shell: str) -> None:
    """Print the script by which SHELL completes verbs, flags, releases, keys and publishers.

    For bash: eval "$(modelp2p completion bash)" in ~/.bashrc. For zsh: the same in ~/.zshrc, after compinit. For fish:
    modelp2p completion fish > ~/.config/fish/completions/modelp2p.fish
    """
    script = get_completion_class(shell)
    assert script is not None
    out(script(ctx.find_root().command, {}, PROGRAM, VARIABLE).source().rstrip())


class _Offered(StringParamType, ABC):
    """A text for which a shell is offered what `_candidates` finds."""

    def shell_complete(self, ctx: Context, param: Parameter, incomplete: str) -> list[CompletionItem]:
        app = ctx.find_object(App)
        try:
            found = self._candidates(app, incomplete) if app is not None else ()
        except (ModelP2PError, OSError):
            # A daemon of another version, a folder of another user: nothing to offer, and no place to say so.
            found = ()
        return [item for item in found if item.value.startswith(incomplete)]

    @abstractmethod
    def _candidates(self, app: App, incomplete: str) -> Iterable[CompletionItem]:
        """What may be meant; what does not begin with `incomplete` is left out by the caller."""


class _Paths(_Offered):
    """Files and folders, which the shell itself completes; `kind` is click's word for it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def _candidates(self, app: App, incomplete: str) -> Iterable[CompletionItem]:
        return [CompletionItem(incomplete, type=self._kind)]


class _Releases(_Offered):
    """The names of this node, with revisions where a name has several; else a bundle or a folder."""

    def _candidates(self, app: App, incomplete: str) -> Iterable[CompletionItem]:
        if incomplete.startswith(_PATHS):
            return [CompletionItem(incomplete, type="file")]
        rows = _told(app, ("ls", "releases"))
        names: dict[str, list[Row]] = {}
        for row in rows:
            names.setdefault(row.text("name"), []).append(row)
        items = []
        for name, known in names.items():
            if "@" not in incomplete:
                items.append(CompletionItem(name, help=_described(known[0])))
            if "@" in incomplete or len(known) > 1:
                items += [CompletionItem(f"{name}@{row.short_revision}", help=_described(row)) for row in known]
        if incomplete and not any(item.value.startswith(incomplete) for item in items):
            return [CompletionItem(incomplete, type="file")]
        return items


class _Publishers(_Offered):
    """Whoever signed what is here or is trusted for a name."""

    def _candidates(self, app: App, incomplete: str) -> Iterable[CompletionItem]:
        rows = _told(app, ("ls", "releases"), ("trust_list", "entries"))
        known = {row.text("publisher"): row.text("name") for row in rows}
        return [CompletionItem(publisher, help=name) for publisher, name in sorted(known.items())]


class _Keys(_Offered):
    """The user's own keys."""

    def _candidates(self, app: App, incomplete: str) -> Iterable[CompletionItem]:
        from modelp2p.cli.keyring import key_names

        return [CompletionItem(name) for name in key_names(app.keys_folder)]


_RELEASES, _PUBLISHERS, _KEYS, _FILES, _FOLDERS = _Releases(), _Publishers(), _Keys(), _Paths("file"), _Paths("dir")
_BY_METAVAR: Mapping[str, _Offered] = {
    "DIR": _FOLDERS,
    "FILE": _FILES,
    "LINK|BUNDLE": _FILES,
    "PATH": _FILES,
}
_BY_NAME: Mapping[str, _Offered] = {
    "file": _FILES,
    "key": _KEYS,
    "publisher": _PUBLISHERS,
    "ref": _RELEASES,
    "refs": _RELEASES,
}
_BY_COMMAND: Mapping[tuple[str, str], _Offered] = {("show", "name"): _KEYS}


def with_values(command: click.Command) -> None:
    """Make a command, and those below it, offer values. For a process that completes: what it parses stays the same."""
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        with_values(below)
    for param in command.params:
        # What has a type of its own, such as a choice, knows best.
        if type(param.type) is not StringParamType or param.name is None:
            continue
        offered = (
            _BY_COMMAND.get((command.name or "", param.name)) or _BY_METAVAR.get(param.metavar or "") or _BY_NAME.get(param.name)
        )
        if offered is not None:
            param.type = offered


def _described(row: Row) -> str:
    return f"{row.text('state')}, {percent_text(row.number('proven'), row.number('size'))} of {size_text(row.number('size'))}"


def _told(app: App, *questions: tuple[str, str]) -> list[Row]:
    """The rows that a daemon which runs already answers in time to verbs, each with the key of its rows."""
    # Whatever the connection has to say would be written into the line the user is typing.
    app.quiet = True
    rows: list[Row] = []

    def ask() -> None:
        try:
            with daemon(app, start=False, service=True) as client:
                for verb, key in questions:
                    rows.extend(Row(client.call(verb, {}).result).rows(key))
        except (ModelP2PError, OSError):
            return

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return list(rows)
