"""Which files of a folder become a release; hashing and placing them is tested with real nodes in tests/endtoend."""

from __future__ import annotations

import pytest

from modelp2p.daemon.publishing import chosen_paths
from modelp2p.protocol.errors import FormatError, UsageError
from modelp2p.protocol.paths import MAX_FILES

FULL = {f"f{number:05}": 1 for number in range(MAX_FILES)}


def test_paths_come_in_the_order_of_the_manifest() -> None:
    assert chosen_paths({"a/b": 1, "b": 0, "a.json": 1}, (), ("c",)) == ["a.json", "a/b", "b"]


def test_as_many_files_as_a_release_may_have_and_not_one_more() -> None:
    assert len(chosen_paths(FULL, (), ())) == MAX_FILES
    with pytest.raises(UsageError, match="10001 files to publish, and a release has at most 10000") as caught:
        chosen_paths({**FULL, "one-more": 1}, (), ())
    assert "--exclude" in caught.value.hint
    # What is not selected does not count, and is not looked at.
    assert len(chosen_paths({**FULL, "one-more": 1, "-bad": 1}, ("f*",), ())) == MAX_FILES


def test_nothing_to_publish() -> None:
    for sizes in ({}, {"empty": 0}):
        with pytest.raises(UsageError, match="nothing to publish"):
            chosen_paths(sizes, (), ())


@pytest.mark.parametrize("path", ["-rf", "a\x1b", "mod\udcff\udcfe.json"])
def test_a_path_that_no_release_may_have_is_refused_before_anything_is_sorted(path: str) -> None:
    with pytest.raises(FormatError):
        chosen_paths({"good": 1, path: 1}, (), ())
