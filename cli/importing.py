"""`import`: takes in what `export` wrote, on a machine that may have no network at all.

The bundle says what every byte must be, and the daemon proves it. All else in the folder is a hint: the list of sums says which
files were meant to be there, and the torrent is not read.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from glob import escape
from typing import TYPE_CHECKING

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import daemon
from modelp2p.cli.hfcache import cache_folder, put_into_cache, trust_command
from modelp2p.cli.options import client_options
from modelp2p.cli.progress import progress_of
from modelp2p.cli.refs import open_user_path
from modelp2p.cli.results import Row
from modelp2p.cli.taken import show_taken
from modelp2p.cli.units import size_text
from modelp2p.protocol import exported
from modelp2p.protocol.errors import (
    FormatError,
    InterruptedFetchError,
    NotFoundError,
    StoreError,
    UnknownPublisherError,
    UsageError,
)
from modelp2p.protocol.job import MAX_PATTERNS
from modelp2p.protocol.names import check_publisher_id
from modelp2p.protocol.text import some_of

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map
    from modelp2p.protocol.manifest import Manifest
    from modelp2p.protocol.statement import Release

_WITHOUT_SUMS = "Choose the files yourself, with --include or --exclude: then it is not read."


@dataclass(frozen=True, slots=True)
class Found:
    """An export on the disk."""

    bundle: str
    folder: str
    """Where the files lie."""

    @property
    def sums(self) -> str:
        """The list of what was meant to be there; it may be missing."""
        return self.bundle.removesuffix(exported.BUNDLE_SUFFIX) + exported.SUMS_SUFFIX


@click.command("import")
@click.argument("path", type=click.Path())
@click.option("--include", multiple=True, metavar="GLOB", help="Only files that match; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No files that match; may be repeated.")
@click.option("--publisher", metavar="ID", help="Believe this publisher for this import, whoever is trusted for the name.")
@click.option("--allow-code", is_flag=True, help="Also take pickles and code, which run with your rights.")
@click.option("--no-seed", is_flag=True, help="Do not seed it afterwards.")
@click.option("--no-hf-cache", is_flag=True, help="Do not put it into the Hugging Face cache.")
@client_options
@pass_app
def import_release(
    app: App,
    /,
    path: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    publisher: str | None,
    allow_code: bool,
    no_seed: bool,
    no_hf_cache: bool,
) -> None:
    """Take in the release that was exported to PATH, verify every byte, and print where it is now.

    PATH is the folder given to export, one inside it, or the bundle. No peer is asked: a file that is missing or bad is named,
    exit 11. Nothing at PATH is changed.
    """
    if publisher is not None:
        _check_id(publisher)
    found = find_export(path)
    started = time.monotonic()
    with ExitStack() as stack:
        bundle = open_user_path(found.bundle, "bundle")
        stack.callback(os.close, bundle)
        if not stat.S_ISREG(os.fstat(bundle).st_mode):
            raise NotFoundError(f"'{found.bundle}' is not a file", hint="The bundle lies beside the folder of the files.")
        # A link would lead the daemon to look for the bytes wherever whoever wrote the folder wants.
        if os.path.islink(found.folder):
            raise StoreError(
                f"'{found.folder}' is a symlink, which is not followed", hint="Put the bundle beside the real folder."
            )
        folder = open_user_path(found.folder, "folder", os.O_DIRECTORY | os.O_NOFOLLOW)
        stack.callback(os.close, folder)
        release = _release_in(bundle)
        args: Map = {"ref": "", "bundle": True, "offline": True, "allow_code": allow_code, "seed": not no_seed}
        if include or exclude:
            args |= {"include": list(include), "exclude": list(exclude)}
        else:
            args |= _as_exported(release.manifest, found.sums)
        if publisher is not None:
            args["publisher"] = publisher
        with daemon(app) as client, progress_of(app) as progress:
            try:
                result = Row(client.call("adopt", args, [bundle, folder], progress.on_event).result)
            except UnknownPublisherError as exc:
                if publisher is not None:
                    raise
                raise UnknownPublisherError(exc.message, hint=_consent(found.bundle, release), **exc.facts) from exc
            except KeyboardInterrupt as exc:
                raise InterruptedFetchError(
                    "Interrupted; what is verified is kept.", hint="Run the same command again to go on."
                ) from exc
            cache = None if no_hf_cache else cache_folder(app.environ)
            if cache is not None:
                result.source["hf_cache"] = put_into_cache(app, client, result, cache, found.bundle, moves_main=False)
    show_taken(app, result, time.monotonic() - started, partial(_details, result))


def _check_id(publisher: str) -> None:
    try:
        check_publisher_id(publisher)
    except FormatError as exc:
        raise UsageError(exc.message, hint=exc.hint) from exc


def find_export(path: str) -> Found:
    """The export that a user means: by its bundle, by the folder of its files, or by a folder around it that holds no other.

    Raises:
        NotFoundError: there is none.
        UsageError: there are several.
    """
    if path.endswith(exported.BUNDLE_SUFFIX) and not os.path.isdir(path):
        return _of_bundle(path)
    path = os.path.abspath(path)
    beside = path + exported.BUNDLE_SUFFIX
    inside = _bundles_in(path)
    if not inside and os.path.isfile(beside):
        return Found(beside, path)
    if not inside:
        inside = [bundle for name in _names_in(path) for bundle in _bundles_in(os.path.join(path, name))]
    if not inside:
        raise NotFoundError(f"no exported release lies in '{path}'", hint="An export has a .modelp2p bundle beside its files.")
    if len(inside) > 1:
        raise UsageError(f"'{path}' holds {len(inside)} exports: {some_of(inside)}", hint="Name the bundle you mean.")
    return _of_bundle(inside[0])


def _of_bundle(bundle: str) -> Found:
    folder = bundle.removesuffix(exported.BUNDLE_SUFFIX)
    # A bundle may also lie among its files, as the loader takes it.
    return Found(bundle, folder if os.path.isdir(folder) else os.path.dirname(os.path.abspath(bundle)))


def _bundles_in(folder: str) -> list[str]:
    found = (os.path.join(folder, name) for name in _names_in(folder) if name.endswith(exported.BUNDLE_SUFFIX))
    return [path for path in found if os.path.isfile(path)]


def _names_in(folder: str) -> list[str]:
    try:
        # Hidden names are other programs' leftovers, such as what macOS writes beside every file of a stick.
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _release_in(bundle: int) -> Release:
    from modelp2p.protocol.statement import MAX_BUNDLE_BYTES, decode_bundle, verify_statement

    data = bytearray()
    # Not `read`: the daemon is given the same descriptor, and its position.
    while len(data) <= MAX_BUNDLE_BYTES and (chunk := os.pread(bundle, 1 << 20, len(data))):
        data += chunk
    return verify_statement(decode_bundle(bytes(data)))


def _as_exported(manifest: Manifest, sums: str) -> Map:
    """The selection that was exported, as globs: nothing where it was everything, or where no list says."""
    try:
        fd = _open_sums(sums)
    except NotFoundError:
        return {}
    with os.fdopen(fd, "rb") as file:
        data = file.read(exported.MAX_SUMS_BYTES + 1)
    try:
        listed = exported.decode_sums(data)
    except FormatError as exc:
        raise StoreError(f"'{sums}' is damaged: {exc.message}", hint=_WITHOUT_SUMS) from exc
    signed = {entry.path: entry.sha256 for entry in manifest.files}
    if not listed or listed.items() - signed.items():
        raise StoreError(f"'{sums}' is the list of another release", hint=_WITHOUT_SUMS)
    return _globs_of(listed, signed)


def _open_sums(path: str) -> int:
    # A link would have a line of any file of this user's shown as a bad one.
    if not os.path.islink(path):
        fd = open_user_path(path, "list of sums", os.O_NOFOLLOW)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    raise StoreError(f"'{path}' is not a file", hint=_WITHOUT_SUMS)


def _globs_of(listed: Mapping[str, bytes], signed: Mapping[str, bytes]) -> Map:
    left_out = [escape(path) for path in signed if path not in listed]
    if not left_out:
        return {}
    if len(left_out) <= MAX_PATTERNS:
        return {"exclude": [*left_out]}
    if len(listed) <= MAX_PATTERNS:
        return {"include": [escape(path) for path in listed]}
    raise UsageError(
        f"{len(listed)} of {len(signed)} files were exported, too many to name each", hint="Choose them with --include."
    )


def _consent(bundle: str, release: Release) -> str:
    return (
        f"If you trust them: {trust_command(bundle, str(release.manifest.name))}; "
        f"or for this import alone: --publisher {release.publisher_id}"
    )


def _details(result: Row, seconds: float) -> list[tuple[str, str]]:
    taken = result.number("adopted")
    how = f"{size_text(taken)} taken in and verified in {seconds:.1f} s" if taken else "up to date"
    return [("Status", f"{result.text('state')}: {how}")]
