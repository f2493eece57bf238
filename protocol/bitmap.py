"""Bitmaps of pieces: one bit a piece, the first in the highest bit of the first byte, as BEP 3's "bitfield" has it.

https://www.bittorrent.org/beps/bep_0003.html
"""

from __future__ import annotations

from collections.abc import Sequence

from modelp2p.protocol.errors import FormatError


def pack_bits(bits: Sequence[bool]) -> bytes:
    """The bitmap of `bits`; spare bits at the end are zero."""
    padded = "".join("1" if bit else "0" for bit in bits) + "0" * (-len(bits) % 8)
    return int(padded or "0", 2).to_bytes(len(padded) // 8, "big")


def unpack_bits(bitmap: bytes, count: int) -> list[bool]:
    """The first `count` bits of `bitmap`.

    Raises:
        FormatError: the bitmap is not exactly as long as `count` bits need, or a spare bit is set.
    """
    if len(bitmap) != -(-count // 8):
        raise FormatError(f"a bitmap of {len(bitmap)} bytes for {count} pieces")
    bits = f"{int.from_bytes(bitmap, 'big'):0{len(bitmap) * 8}b}" if bitmap else ""
    if "1" in bits[count:]:
        raise FormatError("a spare bit of a bitmap is set")
    return [bit == "1" for bit in bits[:count]]
