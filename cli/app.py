"""What one command line knows: where the home is, how to reach the daemon, and what the common flags said.

The only place of the product that reads environment variables and platform folders for settings. An `App` is built by
`main`, handed to every verb through click's context, and never global.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from modelp2p.cli.connection import Connector

SYSTEM_FOLDER = "/etc/modelp2p"
"""Not platformdirs' site folder, which is /etc/xdg/modelp2p: administrators look here."""


@dataclass(slots=True)
class App:
    """One run of `modelp2p`."""

    connector: Connector
    environ: Mapping[str, str]
    as_json: bool = False
    quiet: bool = False
    home_flag: str | None = None
    config_file: str | None = None
    flags: dict[str, object] = field(default_factory=dict)
    """Dotted configuration keys that flags of this command set."""

    @property
    def is_home_named(self) -> bool:
        """Whether the user said which home this is about, instead of leaving it to the platform."""
        return bool(self.home_flag or self.environ.get("MODELP2P_HOME"))

    @property
    def home(self) -> str:
        """The home this command is about, absolute: flag, `MODELP2P_HOME`, then the user's data folder."""
        chosen = self.home_flag or self.environ.get("MODELP2P_HOME")
        if not chosen:
            import platformdirs

            chosen = platformdirs.user_data_dir("modelp2p")
        return os.path.abspath(os.path.expanduser(chosen))

    @property
    def keys_folder(self) -> str:
        """Where the user's publisher keys lie: `MODELP2P_KEYS`, `keys` in a named home, then the user's config folder."""
        if chosen := self.environ.get("MODELP2P_KEYS"):
            return os.path.abspath(os.path.expanduser(chosen))
        if home := self.environ.get("MODELP2P_HOME"):
            return os.path.join(os.path.abspath(os.path.expanduser(home)), "keys")
        return os.path.join(self.user_folder, "keys")

    @property
    def user_folder(self) -> str:
        """The user's configuration folder."""
        import platformdirs

        return platformdirs.user_config_dir("modelp2p")


pass_app = click.make_pass_decorator(App)
