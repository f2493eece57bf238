"""One open file of a release: what it costs, and what is left of it when it was closed or forgotten."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelp2p.loader.source import SourceFile
from modelp2p.protocol.errors import StoreError
from modelp2p.protocol.statement import verify_statement
from tests.releases import statement_of, write_files

NAME, DATA = "card.md", b"# a card\n"


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], SourceFile]:
    files = {NAME: DATA}
    folder = write_files(tmp_path / "files", files)
    entry = verify_statement(statement_of(files)).manifest.file(NAME)
    return lambda: SourceFile(str(folder / NAME), entry)


def is_open(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def test_a_forgotten_file_gives_its_descriptor_back(make: Callable[[], SourceFile]) -> None:
    source = make()
    fd, path = source.fileno(), source.path
    view = source.mapping()
    assert is_open(fd, path)
    del source
    assert not is_open(fd, path)
    assert view == DATA


def test_a_descriptor_is_closed_once(make: Callable[[], SourceFile]) -> None:
    source = make()
    fd = source.fileno()
    source.close()
    other = os.open(source.path, os.O_RDONLY)
    assert other == fd, "the lowest free number"
    source.close()
    path = source.path
    del source
    assert is_open(other, path)
    os.close(other)


def test_reopening_gives_the_old_descriptor_back_and_keeps_the_new_one(make: Callable[[], SourceFile]) -> None:
    source = make()
    old, place = os.dup(source.fileno()), Path(source.path)
    before = len(os.listdir("/proc/self/fd"))
    place.unlink()
    place.write_bytes(DATA)
    source.reopen()
    assert len(os.listdir("/proc/self/fd")) == before
    assert is_open(source.fileno(), source.path)
    assert not is_open(old, source.path)
    source.check_unchanged()
    fd = source.fileno()
    source.close()
    assert not is_open(fd, source.path)
    os.close(old)


USES: dict[str, Callable[[SourceFile], object]] = {
    "read": lambda source: source.read_into(memoryview(bytearray(1)), 0),
    "map": SourceFile.mapping,
    "ask whether it changed": SourceFile.check_unchanged,
    "ask for its size": SourceFile.check_size,
    "reopen": SourceFile.reopen,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_closed_file_says_that_it_was_closed(make: Callable[[], SourceFile], use: Callable[[SourceFile], object]) -> None:
    source = make()
    source.close()
    with pytest.raises(StoreError, match="was closed"):
        use(source)


@contextmanager
def no_more_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_say_what_to_do(make: Callable[[], SourceFile]) -> None:
    with no_more_files(), pytest.raises(StoreError) as caught:
        make()
    assert "ulimit -n" in caught.value.hint
