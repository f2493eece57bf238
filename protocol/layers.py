"""The `layers` file: every piece layer of a release, so that pieces are checked before any peer is believed.

Byte form (docs/DESIGN.md): canonical msgpack map from root (bin, 32 bytes) to its piece layer (bin), sorted by root, only for
files larger than the piece length. A smaller file has no layer: its one piece hash is its root. Each layer must hash to the root
that the signed manifest names, so the file itself needs no signature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.merkle import pieces_in, root_of_layer

if TYPE_CHECKING:
    from modelp2p.protocol.manifest import FileEntry, Manifest

HASH_BYTES = 32
MAX_LAYERS_BYTES = 72 << 20
"""2,097,152 pieces (libtorrent's limit, 32 TiB at 16 MiB) of 32 bytes, and 10,000 map entries."""


@dataclass(frozen=True, slots=True)
class Layers:
    """Piece layers of one manifest, each proven against its signed root."""

    piece_length: int
    _by_root: Mapping[bytes, bytes]

    def of(self, entry: FileEntry) -> bytes:
        """Concatenated 32-byte piece hashes of a file, in order; empty for an empty file."""
        if entry.size <= self.piece_length:
            return entry.root
        return self._by_root[entry.root]

    def piece_hash(self, entry: FileEntry, piece: int) -> bytes:
        """The expected hash of piece `piece` (counted within the file)."""
        return self.of(entry)[piece * HASH_BYTES : (piece + 1) * HASH_BYTES]

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """(root, layer) of every file larger than a piece, sorted by root."""
        return iter(sorted(self._by_root.items()))


def make_layers(piece_length: int, by_root: Mapping[bytes, bytes]) -> Layers:
    """Layers computed here from files (publish); foreign ones come through `decode_layers`."""
    return Layers(piece_length, dict(by_root))


def encode_layers(layers: Layers) -> bytes:
    """The canonical bytes of the `layers` file."""
    return codec.pack_table(dict(layers.items()))


def decode_layers(data: bytes, manifest: Manifest) -> Layers:
    """The layers of exactly this manifest.

    Raises:
        FormatError: malformed, a layer too many or missing, or one that does not hash to its signed root.
    """
    source = codec.unpack_table(data, max_bytes=MAX_LAYERS_BYTES)
    by_root: dict[bytes, bytes] = {}
    for entry in manifest.files:
        if entry.size <= manifest.piece_length:
            continue
        root, layer = entry.root, source.get(entry.root)
        # Checked for every file: two files may share a root, and a hostile manifest may give them different sizes.
        if layer is None or len(layer) != pieces_in(entry.size, manifest.piece_length) * HASH_BYTES:
            raise FormatError(f"the piece layer of root {root.hex()[:16]} is missing or of the wrong length")
        if root not in by_root and root_of_layer(layer, manifest.piece_length) != root:
            raise FormatError(f"piece layer does not hash to the signed root {root.hex()[:16]}")
        by_root[root] = layer
    if len(source) != len(by_root):
        raise FormatError("layers of files that are not in the manifest")
    return Layers(manifest.piece_length, by_root)
