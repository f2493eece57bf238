"""What the daemon says of a release it knows: the rows of `ls`, `show` and `status`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelp2p.protocol import layout

if TYPE_CHECKING:
    from modelp2p.daemon.library import Entry
    from modelp2p.daemon.node import Node
    from modelp2p.protocol.codec import Map


def summary(node: Node, entry: Entry) -> Map:
    """What it is, and how much of it is here."""
    shared = node.of(entry.info_hash)
    return {
        "name": str(entry.name),
        "revision": entry.revision,
        "info_hash": entry.info_hash.hex(),
        "manifest": entry.digest.hex(),
        "publisher": entry.publisher,
        "name_verified": node.is_named(entry),
        "sequence": entry.sequence,
        "state": shared.state,
        "pinned": entry.info_hash in node.pins,
        "size": entry.size,
        "proven": shared.proven,
        "error": shared.trouble,
    }


def live(node: Node, entry: Entry) -> Map:
    """The summary, and what the swarm does with it at this moment: bytes, bytes per second, counts of peers."""
    shared = node.of(entry.info_hash)
    transfer = shared.transfer
    status = transfer.status if transfer else shared.status
    traffic = transfer.traffic if transfer else shared.traffic
    return summary(node, entry) | {
        "rate_down": status.rate_down if status else 0,
        "rate_up": status.rate_up if status else 0,
        "peers": status.peers if status else 0,
        "peers_known": status.known if status else 0,
        "seeds": status.seeds if status else 0,
        "fullest_peer": max((peer.has for peer in status.peer_list), default=0) if status else 0,
        "uploaded": traffic.up,
        "downloaded": traffic.down,
        "origin": transfer.web.reason if transfer else "",
    }


def shown_path(node: Node, entry: Entry) -> str:
    """Where people find its files: below its name, or where no file is finished yet, in the store."""
    path = node.store.model_path(entry.name, entry.publisher, entry.revision, named=node.is_named(entry))
    return str(path) if path.is_symlink() else str(node.store.path(layout.tree_of(entry.info_hash, entry.revision)))
