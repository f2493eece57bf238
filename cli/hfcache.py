"""The Hugging Face cache of this user: where it is, and how a release gets there (docs/OPERATIONS.md).

Only a release whose publisher is trusted for its name gets in: clients of the Hub will load it by that name and ask nobody.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from modelp2p.cli.output import say
from modelp2p.protocol.errors import DaemonError, DeniedError, ModelP2PError

if TYPE_CHECKING:
    from modelp2p.cli.app import App
    from modelp2p.cli.connection import Client
    from modelp2p.cli.hfcache_writing import Materialized
    from modelp2p.cli.results import Row
    from modelp2p.protocol.manifest import Manifest


def cache_folder(environ: Mapping[str, str], given: str | None = None) -> str:
    """The cache as huggingface_hub itself would find it (its `constants.py`), absolute; `given` is a folder the user named."""
    if given:
        return os.path.abspath(os.path.expanduser(given))
    caches = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    home = _expanded(environ.get("HF_HOME") or os.path.join(caches, "huggingface"))
    chosen = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return os.path.abspath(_expanded(chosen))


def put_into_cache(app: App, client: Client, result: Row, cache: str, ref: str, *, moves_main: bool) -> str | None:
    """Give what `fetch` or `adopt` made visible its place in the cache; returns the snapshot, or None with the reason said.

    Never an error: the release is here, verified, whatever the cache is like.
    """
    tree, name = result.text("path"), result.text("name")
    if result.text("state") not in ("partial", "complete"):
        return None
    try:
        owner = os.stat(tree).st_uid
    except OSError:
        return None  # a store this user cannot look into
    if owner != os.geteuid():
        say(app, f"Not in your Hugging Face cache: the files are the service's. Then: modelp2p materialize {name}")
        return None
    if not result.flag("name_verified"):
        say(app, f"Not in the Hugging Face cache: nobody is trusted for {name} here. Then: {trust_command(ref, name)}")
        return None
    try:
        manifest = manifest_of(client, result)
        placed = place(app, client, result, manifest, cache, moves_main=moves_main)
    except ModelP2PError as exc:
        say(app, f"Not in the Hugging Face cache: {exc.message}.{f' {exc.hint}' if exc.hint else ''}")
        return None
    return placed.snapshot


def place(app: App, client: Client, result: Row, manifest: Manifest, cache: str, *, moves_main: bool) -> Materialized:
    """Write a release that lies at the result's `path` into the cache, and say what that cost.

    Raises:
        StoreError: the cache holds something else under one of its names, or the disk refused.
        NotFoundError: no file of it is here.
    """
    from modelp2p.cli.hfcache_writing import materialize

    placed = materialize(result.text("path"), manifest, cache, partial(say, app), moves_main=moves_main)
    if placed.linked:
        # A new name alters the ctime of an inode, and loaders would hash the file anew at every load.
        with contextlib.suppress(DeniedError):  # the public socket of a service that runs as this user
            client.call("linked", {"ref": f"{manifest.name}@{manifest.revision}"})
    return placed


def manifest_of(client: Client, result: Row) -> Manifest:
    """The manifest of a release the daemon named, stated by somebody who is trusted for the name."""
    from modelp2p.protocol.manifest import MAX_MANIFEST_BYTES, decode_manifest

    reply = client.call("show", {"ref": result.ref})
    contents = reply.read_fds(MAX_MANIFEST_BYTES)
    manifest = decode_manifest(contents[0]) if contents else None
    same = manifest is not None and manifest.info_hash.hex() == result.text("info_hash")
    if manifest is None or not same or reply.result.get("name_verified") is not True:
        raise DaemonError(f"the daemon shows another {result.ref} than it fetched")
    return manifest


def trust_command(ref: str, name: str) -> str:
    """What to type so that the publisher behind a link or bundle may speak for the name."""
    return f"modelp2p trust add {shlex.quote(ref)} --name {name}"


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))
