"""Text from strangers, made safe to show.

Owns one rule: what reaches a terminal or a log holds no control, bidi or invisible character. Such a character is
shown as its escape, never dropped, so that two different names never look the same (Trojan Source, CVE-2021-42574).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

# Cc control, Cf format (bidi overrides, zero width), Cs lone surrogates, Co private use, Cn unassigned,
# Zl/Zp line and paragraph separators: none of these belongs in a name on one line.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

# Shown as nothing although their category is a letter, mark or symbol (Unicode "Default_Ignorable_Code_Point", and the
# Braille blank): fillers, variation selectors, the combining grapheme joiner.
_HIDDEN_ELSEWHERE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
)


SHOWN_NAMES = 5
"""Of a list in a message; a model has thousands."""


def is_hidden(character: str) -> bool:
    """Whether a single character steers or hides instead of showing."""
    return unicodedata.category(character) in _HIDDEN_CATEGORIES or character in _HIDDEN_ELSEWHERE


def printable(text: str) -> str:
    """`text` on one line with every hidden character escaped; idempotent on its own output."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii") if is_hidden(character) else character for character in text
    )


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are: for a message of one line."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
