"""What every test stands on: a home of its own, and the same random examples on every machine."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from pathlib import Path

# Derandomized: a test that passed yesterday fails today only because the code changed. No deadline: a shared machine is
# slow at random, and a hang is caught by the timeout of pytest itself. The home below is the same for all examples.
settings.register_profile(
    "modelp2p",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("modelp2p")

# A shell that starts us in the background ignores SIGINT, and every process we start would inherit that, Ctrl-C tests included.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Several threads of torch wait for each other at every operation on a small tensor, on cores that other tests are using: that was
# more than half of the time of the loader's tests. Also for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

_FOLDERS = {
    "HOME": "home",
    "MODELP2P_HOME": "modelp2p",
    "XDG_CACHE_HOME": "home/.cache",
    "XDG_CONFIG_HOME": "home/.config",
    "XDG_DATA_HOME": "home/.local/share",
    "XDG_RUNTIME_DIR": "run",
    "XDG_STATE_HOME": "home/.local/state",
    "HF_HOME": "home/.cache/huggingface",
}
# Set outside, these would move a cache, a socket or a listener to where the folders above do not reach.
_UNSET = ("HF_ENDPOINT", "HF_HUB_CACHE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID")


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder that holds every place a user's files could be, so that no test touches the real ones."""
    # Short on purpose: the path of a Unix socket has 108 bytes.
    base = tmp_path_factory.mktemp("h")
    for name, folder in _FOLDERS.items():
        place = base / folder
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        monkeypatch.setenv(name, str(place))
    for name in _UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    return base
