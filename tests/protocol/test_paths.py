"""Hostile paths: reject, never repair (docs/DESIGN.md)."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.paths import MAX_FILES, check_path, check_paths

LEGAL = {
    "plain": "model.safetensors",
    "folder": "a/b/c.json",
    "hidden file": ".gitattributes",
    "two dots inside": "a..b",
    "dots in front": "..a",
    "space inside": "my model.bin",
    "umlaut": "größe.txt",
    "Chinese": "模型/权重.safetensors",
    "brackets and at": "model-00001-of-00002@main[x]+(1)=.safetensors",
    "component of 200 bytes": "a" * 200,
    "path of 1,024 bytes": "/".join(["a" * 200] * 5) + "/" + "b" * 19,
    "depth 16": "/".join("abcdefghijklmnop"),
    "console is not a device": "console.txt",
    "device name inside": "my.con",
    "com10 is no device": "com10",
}

HOSTILE = {
    "empty": "",
    "absolute": "/etc/passwd",
    "dot dot": "..",
    "escape from the folder": "a/../../b",
    "dot": "./a",
    "dot inside": "a/./b",
    "empty component": "a//b",
    "trailing slash": "a/",
    "backslash": "a\\b",
    "Windows escape": "..\\..\\b",
    "drive": "c:/a",
    "alternate stream": "a.txt:stream",
    "NUL": "a\0b",
    "newline": "a\nb",
    "ANSI escape": "\x1b[2Ja",
    "C1 escape": "\x9b2Ja",
    "delete": "a\x7f",
    "right-to-left override": "gnp\u202eexe.bin",
    "right-to-left isolate": "a\u2067b",
    "zero width space": "a\u200bb",
    "soft hyphen": "a\xadb",
    "Hangul filler": "\u3164",
    "variation selector": "a\ufe0fb",
    "line separator": "a\u2028b",
    "lone surrogate": "a\ud800",
    "unassigned": "a\u0378",
    "private use": "a\ue000",
    "leading dash": "-rf",
    "leading dash inside": "a/-rf",
    "trailing dot": "a.",
    "trailing space": "a ",
    "folder with a trailing dot": "a./b",
    "folder with a trailing space": "a /b",
    "full-width slash": "a\uff0fb",
    "full-width backslash": "a\uff3cb",
    "full-width dots": "\uff0e\uff0e",
    "one dot leader twice": "\u2024\u2024",
    "two dot leader": "\u2025",
    "device": "CON",
    "device with extension": "nul.safetensors",
    "device as folder": "aux/a",
    "device with spaces": "con .txt",
    "device with superscript": "COM\u00b9",
    "device in full-width letters": "\uff23\uff2f\uff2e",
    "console input": "conin$",
    "component of 201 bytes": "a" * 201,
    "component of 201 bytes in two-byte letters": "ä" * 100 + "a",
    "path of 1,025 bytes": "/".join(["a" * 200] * 5) + "/" + "b" * 20,
    "depth 17": "/".join("abcdefghijklmnopq"),
    "absurdly long": "a" * 10_000_000,
    "absurdly deep": "a/" * 1_000_000 + "a",
}


@pytest.mark.parametrize("path", LEGAL.values(), ids=LEGAL.keys())
def test_legal_path_is_returned_unchanged(path: str) -> None:
    assert check_path(path) == path
    check_paths([path])


@pytest.mark.parametrize("path", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_path_is_refused_in_a_short_safe_message(path: str) -> None:
    started = time.perf_counter()
    with pytest.raises(FormatError) as caught:
        check_path(path)
    assert time.perf_counter() - started < 0.5
    assert len(caught.value.message) < 2000
    assert caught.value.message.isprintable()
    with pytest.raises(FormatError):
        check_paths(["fine.txt", path])


COLLISIONS = {
    "twice": ["a", "a"],
    "case": ["Model.bin", "model.BIN"],
    "sharp s": ["stra\u00dfe", "STRASSE"],
    "composed and decomposed": ["\u00e9", "e\u0301"],
    "full-width": ["a", "\uff41"],
    "ligature": ["\ufb01le", "file"],
    "superscript": ["x2", "x\u00b2"],
    "Kelvin sign": ["k", "\u212a"],
    "case of a folder": ["A/x", "a/y"],
    "case of a folder in the middle": ["a/B/x", "a/b/y"],
    "composed folder": ["\u00e9/x", "e\u0301/y"],
    "file and folder": ["a", "a/b"],
    "folder and file": ["a/b", "a"],
    "file and folder by case": ["A", "a/b"],
    "file and deep folder": ["a/b", "a/b/c/d"],
}


@pytest.mark.parametrize("paths", COLLISIONS.values(), ids=COLLISIONS.keys())
def test_two_paths_that_could_be_one_are_refused(paths: list[str]) -> None:
    for path in paths:
        check_path(path)
    with pytest.raises(FormatError):
        check_paths(paths)
    with pytest.raises(FormatError):
        check_paths(reversed(paths))


def test_file_count_at_and_above_the_limit() -> None:
    check_paths(f"f{number}" for number in range(MAX_FILES))
    with pytest.raises(FormatError, match="more than"):
        check_paths(f"f{number}" for number in range(MAX_FILES + 1))
    assert MAX_FILES == 10_000


def test_absurd_file_count_stops_at_the_limit() -> None:
    def endless() -> Iterator[str]:
        number = 0
        while True:
            number += 1
            yield f"f{number}"

    with pytest.raises(FormatError):
        check_paths(endless())


COMPONENTS = st.text(max_size=12) | st.sampled_from(["..", ".", "", "con", "a.", "-x", "a", "A", "b.bin", "\u202e", "x" * 201])


@given(st.lists(COMPONENTS, min_size=1, max_size=5).map("/".join))
@settings(max_examples=400)
def test_only_harmless_paths_survive(path: str) -> None:
    try:
        check_path(path)
    except FormatError:
        return
    assert len(path.encode()) <= 1024
    for component in path.split("/"):
        assert component not in ("", ".", "..")
        assert component[0] != "-"
        assert component[-1] not in ". "
        assert len(component.encode()) <= 200
        assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for c in component)
        assert not set(component) & set("\\:\0")
        assert not set(unicodedata.normalize("NFKC", component)) & set("/\\\0")


@given(st.lists(st.sampled_from(["a", "A", "b", "\uff41", "a/b", "A/c", "a/b/c", "b/a", "B"]), min_size=1, max_size=4))
@settings(max_examples=150)
def test_sets_that_survive_are_distinct_on_every_file_system(paths: list[str]) -> None:
    try:
        check_paths(paths)
    except FormatError:
        return
    folded = [unicodedata.normalize("NFKC", path).casefold() for path in paths]
    assert len(set(folded)) == len(folded)
    assert not any(other.startswith(path + "/") for path in folded for other in folded)
