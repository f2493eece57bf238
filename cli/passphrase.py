"""Where a passphrase comes from: a file, or a prompt on the terminal. Never from a flag or a variable, which others can see."""

from __future__ import annotations

import os
import sys

import click

from modelp2p.cli.refs import open_user_path
from modelp2p.protocol.errors import DeniedError, UsageError

MAX_PASSPHRASE_BYTES = 1024


def passphrase_from_file(path: str) -> str:
    """The first line of `path`, without its line end.

    Raises:
        NotFoundError: no such file.
        UsageError: empty, too long, or not UTF-8.
    """
    with os.fdopen(open_user_path(path, "passphrase file"), "rb") as file:
        line = file.readline(MAX_PASSPHRASE_BYTES + 1).rstrip(b"\r\n")
    if not 0 < len(line) <= MAX_PASSPHRASE_BYTES:
        raise UsageError(f"the passphrase in {path} must have 1 to {MAX_PASSPHRASE_BYTES} bytes on its first line")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"the passphrase in {path} is not UTF-8 text") from exc


def ask_new() -> str:
    """A new passphrase, typed twice.

    Raises:
        UsageError: there is no terminal to ask on.
    """
    if not sys.stdin.isatty():
        raise UsageError(
            "a new key needs a passphrase, and there is no terminal to ask for it",
            hint="Give --passphrase-file FILE, or --no-passphrase to rely on file permissions alone.",
        )
    return str(click.prompt("New passphrase", hide_input=True, confirmation_prompt=True, err=True))


def ask(name: str) -> str:
    """The passphrase of the key `name`.

    Raises:
        DeniedError: there is no terminal to ask on.
    """
    if not sys.stdin.isatty():
        raise DeniedError(f"key '{name}' needs its passphrase", hint="Run in a terminal, or give --passphrase-file.")
    return str(click.prompt(f"Passphrase of key '{name}'", hide_input=True, err=True))
