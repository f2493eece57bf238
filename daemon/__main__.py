"""`python -m modelp2p.daemon`: how clients start a daemon on demand. People use `modelp2p daemon`."""

from __future__ import annotations

import argparse
import os
import sys

from modelp2p.daemon.config import MAX_CONFIG_BYTES, parse_config
from modelp2p.daemon.main import Surroundings, run_daemon
from modelp2p.protocol.errors import ModelP2PError


def main() -> int:
    """Run a daemon from the arguments; returns the exit code."""
    parser = argparse.ArgumentParser(prog="modelp2p.daemon")
    parser.add_argument("--home", required=True)
    parser.add_argument("--config-fd", type=int)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--on-demand", action="store_true")
    arguments = parser.parse_args()
    text = ""
    if arguments.config_fd is not None:
        with os.fdopen(arguments.config_fd, encoding="utf-8") as file:
            text = file.read(MAX_CONFIG_BYTES)
    # Its stderr is the client's terminal: only what somebody must know belongs there.
    config = parse_config(text).replace({"log.level": "error"}) if arguments.on_demand else parse_config(text)
    given = Surroundings(
        runtime_dir=os.environ.get("XDG_RUNTIME_DIR"), on_demand=arguments.on_demand, ready_fd=arguments.ready_fd
    )
    try:
        return run_daemon(arguments.home, config, given)
    except ModelP2PError as exc:
        if arguments.ready_fd is None:
            print(f"error: {exc.message}\nHint: {exc.hint}", file=sys.stderr)
        return exc.kind.exit_code


if __name__ == "__main__":
    sys.exit(main())
