"""What `show` tells: the daemon's row about a release, joined with what its manifest states.

The manifest crosses as a descriptor, because 10,000 files do not fit a control frame; everything the publisher signed is read
from it here. A file's `etag` is the digest the Hugging Face Hub calls it by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelp2p.cli.results import Row
from modelp2p.protocol.errors import DaemonError
from modelp2p.protocol.links import Link
from modelp2p.protocol.manifest import FileEntry, Manifest, decode_manifest
from modelp2p.protocol.names import check_publisher_id

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value


def shown(row: Map, contents: list[bytes]) -> Row:
    """All fields of `show`; `contents` are those of the reply's descriptors, the manifest first.

    Raises:
        DaemonError: there is no manifest.
        FormatError: it is none.
    """
    if not contents:
        raise DaemonError("the daemon sent no manifest", hint="Client and daemon may differ in version: restart the daemon.")
    manifest = decode_manifest(contents[0])
    lineage: list[Value] = [
        {"relation": item.relation, "name": item.name, "revision": item.revision, "info_hash": item.info_hash.hex()}
        for item in manifest.lineage
    ]
    files: list[Value] = [_file(entry) for entry in manifest.files]
    return Row(
        {
            **row,
            "created": manifest.created,
            "license": manifest.license,
            "license_file": manifest.license_file,
            "lineage": lineage,
            "origin": {"repo": manifest.origin.repo, "commit": manifest.origin.commit} if manifest.origin else None,
            "web_seeds": list(manifest.web_seeds),
            "trackers": list(manifest.trackers),
            "notes": dict(manifest.notes),
            "piece_length": manifest.piece_length,
            "files": files,
            "link": str(_link(Row(row), manifest)),
        }
    )


def _file(entry: FileEntry) -> Map:
    return {
        "path": entry.path,
        "size": entry.size,
        "root": entry.root.hex(),
        "sha256": entry.sha256.hex(),
        "kind": entry.kind.value,
        "etag": (entry.git_sha1 or entry.sha256).hex(),
    }


def _link(row: Row, manifest: Manifest) -> Link:
    # The publisher is who the daemon says: a manifest does not name its signers, and its torrent holds more than itself.
    publisher = check_publisher_id(row.text("publisher"))
    try:
        manifest_hash = bytes.fromhex(row.text("manifest_hash"))
    except ValueError as exc:
        raise DaemonError("the daemon's 'manifest_hash' is not hexadecimal") from exc
    return Link(manifest.info_hash, manifest.name, manifest_hash, publisher, manifest.trackers, manifest.web_seeds)
