"""A home with one believed release of three shards, and the release as a plain folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loader.models import three_shards
from tests.releases import Home, bundle_of, statement_of, write_files


@pytest.fixture(scope="session")
def shards() -> dict[str, bytes]:
    return three_shards()


@pytest.fixture
def home(own_home: Path, shards: dict[str, bytes]) -> Home:
    """The default home (`MODELP2P_HOME`), which trusts `lab` and holds `lab/model`."""
    found = Home(own_home / "modelp2p")
    found.trust()
    found.add(statement_of(shards), shards)
    return found


@pytest.fixture
def tree(home: Home) -> Path:
    """The visible tree of `lab/model`."""
    (link,) = (home.path / "models" / "lab" / "model").iterdir()
    return link.resolve()


@pytest.fixture
def folder(tmp_path: Path, shards: dict[str, bytes]) -> Path:
    """The same files in a plain folder with a bundle."""
    place = write_files(tmp_path / "plain", shards)
    (place / "lab.modelp2p").write_bytes(bundle_of(shards))
    return place
