"""The real compiler, without a GPU: what it makes of the kernels. A missing wheel is a failure: it is a test dependency."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modelp2p.loader.gpu.build import KERNELS, NvrtcWay, compile_kernels, source
from modelp2p.loader.gpu.way import WayError
from tests.loader.gpu.host import HostDriver, wheel_nvrtc

if TYPE_CHECKING:
    from modelp2p.loader.gpu.nvrtc import Nvrtc
    from modelp2p.loader.gpu.way import Kernels

pytestmark = pytest.mark.slow

MOST_REGISTERS = 64
"""65,536 registers of a processor in 1,024 threads: half of all it could hold, and enough to keep its adders busy."""

_USED = re.compile(
    r"Function properties for (?P<name>\w+)\s+\S+\s+\.?\s*(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (?P<registers>\d+) registers"
)


@pytest.fixture(scope="module")
def compiler() -> Nvrtc:
    return wheel_nvrtc()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_stay_in_registers(compiler: Nvrtc, arch: str) -> None:
    made = compiler.compile(source().encode(), arch)
    assert made.image.startswith(b"\x7fELF")
    used = {found["name"]: found for found in _USED.finditer(made.log)}
    assert set(used) == set(KERNELS), made.log
    for name, found in used.items():
        assert found["stack"] == found["stores"] == found["loads"] == "0", f"{name} on {arch} uses local memory"
        assert int(found["registers"]) <= MOST_REGISTERS, f"{name} on {arch} takes {found['registers']} registers"
    assert "warning" not in made.log


def test_the_whole_way_without_a_gpu(compiler: Nvrtc, kernels: Kernels, tmp_path: Path) -> None:
    driver = HostDriver(kernels.functions)
    way = NvrtcWay(folder=str(tmp_path), compiler=lambda: compiler, driver=lambda: driver)
    made = [compile_kernels("sm_90", [way]) for _ in range(2)]
    assert [kernels.notes for kernels in made] == [(), ()]
    assert driver.images[0] == driver.images[1]
    assert all(name.encode() in driver.images[0] for name in KERNELS)


def test_what_does_not_compile_is_told_in_one_line(compiler: Nvrtc) -> None:
    with pytest.raises(WayError, match="NVRTC_ERROR_COMPILATION") as caught:
        compiler.compile(b'extern "C" __global__ void f() { no_such_thing(); }', "sm_90")
    assert "no_such_thing" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.facts == {"way": "cuda-nvrtc", "stage": "compile"}
    with pytest.raises(WayError, match="NVRTC_ERROR"):
        compiler.compile(source().encode(), "sm_10")
