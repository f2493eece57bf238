"""Sites: `site` for one test, `pair` for the tests of one module that only need some seed and some node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.endtoend.site import Site, open_site

if TYPE_CHECKING:
    from tests.nodes import Node


@dataclass(frozen=True)
class Pair:
    """A running seed and a running node that fetches; each test brings a release of its own."""

    site: Site
    seed: Node
    node: Node


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("s")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with open_site(tmp_path_factory.mktemp("p")) as opened:
        yield Pair(opened, opened.node("seed"), opened.node("node"))
