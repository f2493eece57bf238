"""Small files of a release, read whole: configurations, indexes. They decide what weights become, so they are proven first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelp2p.protocol.errors import FormatError

if TYPE_CHECKING:
    from modelp2p.loader.pieces import PieceTable
    from modelp2p.loader.source import SourceFile

MAX_DOCUMENT_BYTES = 64 << 20
"""The largest tokenizers have 40 MB; an index of 200,000 tensors with names of 250 bytes has 50."""


def read_document(source: SourceFile, table: PieceTable, *, is_hashed: bool = True) -> bytes:
    """All bytes of an open file, proven; closes it.

    Raises:
        FormatError: no small file is that large.
        IntegrityError: it is not what was signed.
    """
    try:
        if table.size > MAX_DOCUMENT_BYTES:
            raise FormatError(f"'{table.path}' of {table.size} bytes is too large to be read at once", path=table.path)
        data = memoryview(bytearray(table.size))
        source.read_into(data, 0)
        if is_hashed:
            table.check_run(range(table.count), data)
        return bytes(data)
    finally:
        source.close()


def check_file(source: SourceFile, table: PieceTable) -> None:
    """Return if an open file of any size is what was signed; one piece of it is in memory at a time. Closes it.

    Raises:
        IntegrityError: it is not.
    """
    try:
        for piece in range(table.count):
            begin, end = table.span(range(piece, piece + 1))
            data = memoryview(bytearray(end - begin))
            source.read_into(data, begin)
            table.check(piece, data)
    finally:
        source.close()
