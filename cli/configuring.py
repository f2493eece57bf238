"""The effective configuration of a command: flags, environment, files and defaults laid over each other, with origins.

Order, later wins: built-in defaults, /etc/modelp2p/config.toml, the user's config.toml, <home>/config.toml (or only the file
that --config names), `MODELP2P_<SECTION>__<KEY>`, `HF_HUB_OFFLINE` (no web seeds), flags. What a key means is
`daemon/config.py`'s business.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from modelp2p.cli.app import SYSTEM_FOLDER, App
from modelp2p.cli.refs import open_user_path
from modelp2p.protocol.errors import UsageError

if TYPE_CHECKING:
    from modelp2p.daemon.config import Config

_PREFIX = "MODELP2P_"
_FILE = "config.toml"
_YES = frozenset({"1", "ON", "YES", "TRUE"})
"""What huggingface_hub takes for true, in any case."""


class Effective(NamedTuple):
    """A configuration, where each value that is not a default came from, and the files that were read."""

    config: Config
    origins: Mapping[str, str]
    files: tuple[str, ...]


def effective_config(app: App) -> Effective:
    """The configuration a daemon started by this command gets.

    Raises:
        UsageError: any layer is wrong; the message names the file or variable.
        NotFoundError: the file that --config names is not there.
    """
    from modelp2p.daemon.config import Config, keys_in, parse_config

    changes: dict[str, object] = {}
    origins: dict[str, str] = {}
    files = (app.config_file,) if app.config_file is not None else tuple(filter(os.path.exists, usual_files(app)))
    for path in files:
        text = read_config_file(path)
        with _named(path):
            layer = parse_config(text)
            for key in keys_in(text):
                changes[key], origins[key] = layer.get(key), path
    for variable, key, value in _from_environment(app.environ):
        with _named(variable):
            Config().replace({key: value})
        changes[key], origins[key] = value, variable
    if app.environ.get("HF_HUB_OFFLINE", "").upper() in _YES:
        changes["web_seeds.enabled"], origins["web_seeds.enabled"] = False, "HF_HUB_OFFLINE"
    for key, value in app.flags.items():
        changes[key], origins[key] = value, "flag"
    return Effective(Config().replace(changes), origins, files)


def usual_files(app: App) -> tuple[str, ...]:
    """Where configuration files are looked for, weakest first."""
    return tuple(os.path.join(folder, _FILE) for folder in (SYSTEM_FOLDER, app.user_folder, app.home))


def read_config_file(path: str) -> str:
    """The text of a configuration file.

    Raises:
        NotFoundError: there is none.
        UsageError: no regular file, too large, or not UTF-8.
    """
    from modelp2p.daemon.config import MAX_CONFIG_BYTES

    fd = open_user_path(path, "configuration file")
    # A FIFO nobody has written to yet reads as an empty file: that would be all defaults, and no mistake.
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path}: not a regular file")
    with os.fdopen(fd, "rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise UsageError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path}: not UTF-8 text") from exc


class _named:
    """Says in which file or variable an error is."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, UsageError):
            raise UsageError(f"{self._place}: {exc.message}", hint=exc.hint, **exc.facts) from exc


def _from_environment(environ: Mapping[str, str]) -> list[tuple[str, str, object]]:
    found = []
    for variable in sorted(environ):
        section, separator, name = variable.removeprefix(_PREFIX).partition("__")
        if variable.startswith(_PREFIX) and separator:
            found.append((variable, f"{section}.{name}".lower(), _value_of(environ[variable])))
    return found


def _value_of(text: str) -> object:
    """`text` as TOML where it is TOML (`true`, `300`, `["a:1"]`), else as the string it is (`lan`, `200M`)."""
    try:
        return tomllib.loads(f"value = {text}\n")["value"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text
