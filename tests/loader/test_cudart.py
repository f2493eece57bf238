"""Calls of the CUDA runtime that page-lock a mapped file: which, by whom, in which order, and what is left after each error."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from modelp2p.loader import cudart
from modelp2p.loader.cudart import READ_ONLY, HostRegistrar
from modelp2p.loader.windows import WindowError
from modelp2p.protocol.errors import ModelP2PError

PAGE = mmap.PAGESIZE


@dataclass
class FakeRuntime:
    """`torch.cuda.cudart()` on a machine of our own: answers with `codes`, then with success, and notes who asked for what."""

    codes: list[int] = field(default_factory=list)
    undo_code: int = 0
    calls: list[tuple[str, int, int, int]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    locked: dict[int, int] = field(default_factory=dict)
    is_entered: bool = False

    @contextmanager
    def enter(self) -> Iterator[None]:
        self.is_entered = True
        yield
        self.is_entered = False

    def cudaHostRegister(self, ptr: int, size: int, flags: int, /) -> int:
        self._note("register", ptr, size, flags)
        code = self.codes.pop(0) if self.codes else 712 if ptr in self.locked else 0
        if not code:
            self.locked[ptr] = size
        return code

    def cudaHostUnregister(self, ptr: int, /) -> int:
        self._note("unregister", ptr, 0, 0)
        if ptr not in self.locked:
            return 713
        del self.locked[ptr]
        return self.undo_code

    def _note(self, *call: str | int) -> None:
        assert self.is_entered, "another device may be the thread's current one"
        self.calls.append(call)  # type: ignore[arg-type]  # as it is called above
        self.threads.add(threading.get_ident())


def registrar(runtime: FakeRuntime) -> HostRegistrar:
    return HostRegistrar(runtime, runtime.enter)


@pytest.fixture
def mapped(tmp_path: Path) -> memoryview:
    """Three pages and a bit of a file, mapped as the loader does."""
    place = tmp_path / "file"
    place.write_bytes(bytes(3 * PAGE + 10))
    with place.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 3 * PAGE + 10, mmap.MAP_SHARED, mmap.PROT_READ))


def row(mapped: memoryview, begin: int, end: int) -> torch.Tensor:
    return torch.frombuffer(mapped, dtype=torch.uint8, count=end - begin, offset=begin)


pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")


def test_whole_pages_are_locked_for_reading_and_let_go(mapped: memoryview) -> None:
    runtime = FakeRuntime()
    host = registrar(runtime)
    first, last = row(mapped, 0, PAGE), row(mapped, 2 * PAGE, 3 * PAGE + 10)
    for memory in (first, last):
        event = host.register(memory)
        event.wait()
        assert event.is_done()
    assert host.held_bytes == 3 * PAGE
    base = first.data_ptr()
    assert runtime.calls == [("register", base, PAGE, READ_ONLY), ("register", base + 2 * PAGE, 2 * PAGE, READ_ONLY)]
    for memory in (first, last, first):
        host.unregister(memory).wait()
    assert (runtime.locked, host.held_bytes) == ({}, 0)
    assert len(runtime.calls) == 4, "once each"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1, "file system"),
        (2, "no memory"),
        (304, "kernel refused"),
        (712, "already"),
        (801, "read-only"),
        (999, "error 999"),
    ],
)
def test_a_refusal_says_why_and_leaves_nothing(mapped: memoryview, code: int, reason: str) -> None:
    runtime = FakeRuntime([code])
    host = registrar(runtime)
    memory = row(mapped, 0, PAGE)
    event = host.register(memory)
    with pytest.raises(WindowError, match=reason) as caught:
        event.wait()
    assert caught.value.facts == {"code": code}
    host.unregister(memory).wait()
    assert [call[0] for call in runtime.calls] == ["register"], "what was refused is not undone"
    assert host.held_bytes == 0


def test_what_another_window_locked_is_not_undone_by_the_refused_one(mapped: memoryview) -> None:
    runtime = FakeRuntime()
    host = registrar(runtime)
    first, again = row(mapped, 0, PAGE), row(mapped, 0, PAGE)
    host.register(first).wait()
    with pytest.raises(WindowError, match="already"):
        host.register(again).wait()
    host.unregister(again).wait()
    assert runtime.locked
    host.unregister(first).wait()
    assert not runtime.locked


def test_never_in_the_callers_thread(mapped: memoryview) -> None:
    """A call that fails leaves its error there, for the next kernel to stumble over."""
    runtime = FakeRuntime([1])
    host = registrar(runtime)
    for begin in (0, PAGE):
        host.register(row(mapped, begin, begin + PAGE))
        host.unregister(row(mapped, begin, begin + PAGE)).wait()
    assert len(runtime.threads) == 1
    assert threading.get_ident() not in runtime.threads


def test_a_mapping_lives_until_it_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(PAGE))
    with (tmp_path / "file").open("rb") as file:
        memory = row(memoryview(mmap.mmap(file.fileno(), PAGE, mmap.MAP_SHARED, mmap.PROT_READ)), 0, PAGE)
    host = registrar(FakeRuntime())
    host.register(memory).wait()
    seen = weakref.ref(memory)
    gone = host.unregister
    del memory
    gc.collect()
    held = seen()
    assert held is not None
    gone(held).wait()
    del held
    # The thread's last task may hold it a moment longer: the next one is through when it does not.
    host.unregister(torch.empty(1, dtype=torch.uint8)).wait()
    gc.collect()
    assert seen() is None


def test_memory_that_can_not_be_let_go_is_never_unmapped(mapped: memoryview) -> None:
    runtime = FakeRuntime(undo_code=719)
    host = registrar(runtime)
    memory = row(mapped, 0, PAGE)
    host.register(memory).wait()
    with pytest.raises(ModelP2PError, match="error 719"):
        host.unregister(memory).wait()
    assert cudart._NEVER_UNMAPPED.pop() is memory
    assert host.held_bytes == 0
