"""`install hf-extension`: makes `hf p2p ...` run this very modelp2p.

The folder and its manifest are those of an extension of `hf` (huggingface_hub 1.33 and 2.4, `cli/extensions.py`), which looks
for them below the user's home folder whatever `HF_HOME` and `XDG_DATA_HOME` say.

Invariants:
- an extension of that name which somebody else wrote is left alone;
- the manifest is written first, because it says whose folder this is; without the program behind it `hf` knows no extension.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import shutil
import sys

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.options import json_option, quiet_option
from modelp2p.cli.output import emit_json, out, say
from modelp2p.protocol.errors import StoreError
from modelp2p.protocol.text import printable

_ROOT = "~/.local/share/hf/extensions"
_NAME = "hf-p2p"
_MANIFEST = "manifest.json"
_LATEST = ".latest_commit"
# `hf extensions update` installs what lies in the repository of this owner. No account of GitHub can have this name.
_OWNER = "--local--"
_NEVER_ASK_AGAIN = int(datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC).timestamp())
_MAX_MANIFEST_BYTES = 1 << 16


@click.group()
def install() -> None:
    """Make other programs know this one."""


@install.command("hf-extension")
@click.option("--remove", is_flag=True, help="Take it away again.")
@json_option
@quiet_option
@pass_app
def hf_extension(app: App, remove: bool) -> None:
    """Make 'hf p2p VERB' the same as 'modelp2p VERB', by this installation. Doing it again changes nothing.

    An extension of that name that is not from here is left alone, and an error.
    """
    folder = os.path.join(os.path.expanduser(_ROOT), _NAME)
    is_there = _is_ours(folder)
    if remove:
        if is_there:
            shutil.rmtree(folder)
        _tell(app, folder, changed=is_there, said=f"{folder} is removed" if is_there else "It was not installed")
        return
    changed = _write(folder)
    _tell(app, folder, changed=changed, said="'hf p2p' is this modelp2p" + ("" if changed else ", as it was before"))
    if shutil.which("hf") is None:
        say(app, "There is no 'hf' in PATH; it comes with huggingface_hub.")


def _tell(app: App, folder: str, *, changed: bool, said: str) -> None:
    if app.as_json:
        emit_json({"path": folder, "changed": changed})
    elif app.quiet:
        out(printable(folder))
    else:
        say(app, said)


def _is_ours(folder: str) -> bool:
    """Whether the extension is from here; False where there is none.

    Raises:
        StoreError: it is somebody else's.
    """
    if not os.path.lexists(folder):
        return False
    manifest = _manifest_of(folder)
    # An empty folder is what is left of a run that was stopped at once.
    if os.path.islink(folder) or not (manifest.get("owner") == _OWNER or _is_empty(folder)):
        raise StoreError(f"'{folder}' is another extension, and is left alone", hint="hf extensions remove p2p", path=folder)
    return True


def _write(folder: str) -> bool:
    """Bring the extension to what it has to be; returns whether it was something else."""
    from modelp2p.daemon.files import write_atomic

    program = os.path.join(folder, _NAME)
    wanted = _program().encode()
    if _manifest_of(folder).get("executable_path") == program and _is_program(program, wanted):
        return False
    os.makedirs(folder, exist_ok=True)
    manifest = {
        "owner": _OWNER,
        "repo": _NAME,
        "repo_id": "modelp2p, installed on this machine",
        "short_name": _NAME.removeprefix("hf-"),
        "executable_path": program,
        "type": "binary",
        "installed_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "description": "Fetch, verify and seed models over BitTorrent v2",
        "commit_sha": None,
    }
    write_atomic(folder, _MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode(), 0o644)
    # Else `hf` would look for news about it at GitHub, once a day.
    write_atomic(folder, _LATEST, b"", 0o644)
    os.utime(os.path.join(folder, _LATEST), (_NEVER_ASK_AGAIN, _NEVER_ASK_AGAIN))
    write_atomic(folder, _NAME, wanted, 0o755)
    return True


def _program() -> str:
    # -P: a folder named like one of our packages, where the user happens to be, must not be imported instead of it.
    return (
        "#!/bin/sh\n# Written by 'modelp2p install hf-extension'.\n"
        f'exec {shlex.quote(sys.executable)} -P -m modelp2p.cli.main "$@"\n'
    )


def _manifest_of(folder: str) -> dict[str, object]:
    try:
        with open(os.path.join(folder, _MANIFEST), "rb") as file:
            manifest = json.loads(file.read(_MAX_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _is_empty(folder: str) -> bool:
    return os.path.isdir(folder) and not os.listdir(folder)


def _is_program(path: str, wanted: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_MANIFEST_BYTES) == wanted and os.access(path, os.X_OK)
    except FileNotFoundError:
        return False
