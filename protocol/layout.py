"""Where things lie below a home, as relative paths (docs/DESIGN.md). Pure: digests in, paths out.

version                                   integer: the layout this home follows
data/<info-hash>/                         0700  the engine's folder of one release; never moves
store/<info-hash>/<revision>/             0755  the visible tree: hard links to proven files
store/<info-hash>/record                  0644  what was proven about those files, for loaders
manifests/<sha256 of envelope>/           0755  layers, manifest, publisher: one statement
models/<org>/<model>/<revision>           symlink into store, where the publisher is trusted for the name
models/by-publisher/<id>/<org>/<model>/<revision>   the same, where it is not
journal/<info-hash>                       0700  what is proven, append-only
jobs/<sha256 of it>                       0700  a detached fetch that is not done
pins/<info-hash>                          0700  a content that is not to be removed
trust/                                    which publisher may use which name, and root chains
keys/                                     0700
run/                                      0700  lock, the gateway's token, and the socket where no runtime folder exists
public.sock                               symlink to the public socket of a service that has one
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelp2p.protocol.names import ModelName, PublisherId

HOME_VERSION = 1
DATA, STORE, MANIFESTS, MODELS, JOURNAL, JOBS, PINS, TRUST, KEYS, RUN = (
    "data",
    "store",
    "manifests",
    "models",
    "journal",
    "jobs",
    "pins",
    "trust",
    "keys",
    "run",
)
PRIVATE = (DATA, JOURNAL, JOBS, PINS, KEYS, RUN)
"""Folders only the owner may enter (0700); the others are 0755."""
BY_PUBLISHER = "by-publisher"
RECORD = "record"
LOCK = f"{RUN}/lock"
GATEWAY_TOKEN = f"{RUN}/gateway-token"
PUBLIC_SOCKET = "public.sock"


def data_of(info_hash: bytes) -> str:
    """The engine's folder of a release or manifest swarm."""
    return f"{DATA}/{info_hash.hex()}"


def tree_of(info_hash: bytes, revision: str) -> str:
    """The visible tree."""
    return f"{STORE}/{info_hash.hex()}/{revision}"


def record_of(info_hash: bytes) -> str:
    """The record beside the visible tree."""
    return f"{STORE}/{info_hash.hex()}/{RECORD}"


def statement_of(digest: bytes) -> str:
    """The folder of a statement."""
    return f"{MANIFESTS}/{digest.hex()}"


def journal_of(info_hash: bytes) -> str:
    """The journal file."""
    return f"{JOURNAL}/{info_hash.hex()}"


def job_of(job_id: bytes) -> str:
    """The file of a detached fetch."""
    return f"{JOBS}/{job_id.hex()}"


def pin_of(info_hash: bytes) -> str:
    """The file that pins a content."""
    return f"{PINS}/{info_hash.hex()}"


def model_of(name: ModelName, revision: str) -> str:
    """The visible path of a release whose publisher is trusted for its name."""
    return f"{MODELS}/{name.org}/{name.model}/{revision}"


def unnamed_model_of(publisher: PublisherId, name: ModelName, revision: str) -> str:
    """The visible path of a release whose publisher this node does not trust for its name."""
    return f"{MODELS}/{BY_PUBLISHER}/{publisher}/{name.org}/{name.model}/{revision}"
