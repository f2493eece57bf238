"""The kernels built for the host, once for all tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.loader.gpu.host import host_kernels

if TYPE_CHECKING:
    from modelp2p.loader.gpu.way import Kernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return host_kernels(tmp_path_factory.mktemp("kernels"))
