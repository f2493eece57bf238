"""One byte range of an HTTP request, as bytes of a file.

Invariants: a range that is answered lies inside the file and is not empty; what this page does not serve (several ranges, other
units, nonsense) is as if nobody had asked for a range, which a server may always do.

Spec: RFC 9110 section 14, https://www.rfc-editor.org/rfc/rfc9110#name-range-requests
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_ONE_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `begin` up to, not including, `end` of a file."""

    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


class UnsatisfiableError(ValueError):
    """The range lies behind the end of the file: 416."""


def parse_range(header: str | None, size: int) -> Span | None:
    """The part of a file of `size` bytes that a `Range` header asks for; None for the whole file.

    Raises:
        UnsatisfiableError: nothing of it exists.
    """
    match = _ONE_RANGE.fullmatch(header.strip()) if header else None
    if match is None:
        return None
    first, last = match[1], match[2]
    if not first:
        if not last:
            return None
        # "If the selected representation is shorter than the specified suffix-length, the entire representation is used."
        span = Span(max(0, size - int(last)), size)
    elif last and int(last) < int(first):
        return None  # "A recipient of a byte-range-spec that is invalid MUST ignore it": here, the only one
    else:
        span = Span(int(first), min(size, int(last) + 1) if last else size)
    if span.begin >= span.end:
        raise UnsatisfiableError
    return span
