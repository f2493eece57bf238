"""What reaches a terminal shows everything and steers nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelp2p.protocol.text import is_hidden, printable

HIDDEN = {
    "NUL": "\0",
    "newline": "\n",
    "carriage return": "\r",
    "tab": "\t",
    "escape": "\x1b",
    "C1 control sequence introducer": "\x9b",
    "delete": "\x7f",
    "soft hyphen": "\xad",
    "zero width space": "\u200b",
    "zero width joiner": "\u200d",
    "right-to-left override": "\u202e",
    "right-to-left isolate": "\u2067",
    "line separator": "\u2028",
    "byte order mark": "\ufeff",
    "tag letter": "\U000e0041",
    "lone surrogate": "\ud800",
    "private use": "\ue000",
    "unassigned": "\u0378",
    "Hangul filler": "\u3164",
    "half-width Hangul filler": "\uffa0",
    "Braille blank": "\u2800",
    "combining grapheme joiner": "\u034f",
    "variation selector": "\ufe0f",
    "variation selector supplement": "\U000e0100",
}


@pytest.mark.parametrize("character", HIDDEN.values(), ids=HIDDEN.keys())
def test_hidden_character_is_escaped_not_dropped(character: str) -> None:
    assert is_hidden(character)
    shown = printable(f"a{character}b")
    assert character not in shown
    assert shown.startswith("a\\")
    assert shown != printable("ab")


@pytest.mark.parametrize("text", ["", "plain", "Größe", "模型", "e\u0301", "🙂", "a b", "back\\slash"])
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert printable(text) == text


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_result_shows_every_character_and_stays_as_it_is(text: str) -> None:
    shown = printable(text)
    assert not any(is_hidden(character) for character in shown)
    assert printable(shown) == shown
