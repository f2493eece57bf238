"""`export`: a release as a folder of plain files, to be carried to where no network reaches. `import` takes it in there."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import daemon
from modelp2p.cli.options import client_options
from modelp2p.cli.output import emit_block, emit_json, out, say
from modelp2p.cli.progress import progress_of
from modelp2p.cli.refs import ref_args, typed_ref
from modelp2p.cli.results import Row
from modelp2p.cli.units import size_text
from modelp2p.protocol.errors import DaemonError, NotFoundError, PartialError, UsageError
from modelp2p.protocol.selection import wanted_paths
from modelp2p.protocol.text import some_of

if TYPE_CHECKING:
    from modelp2p.protocol.statement import Release, Statement


@click.command()
@click.argument("ref")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--include", multiple=True, metavar="GLOB", help="Only files that match; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No files that match; may be repeated.")
@client_options
@pass_app
def export(app: App, /, ref: str, directory: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
    """Copy REF below DIR with all that proves it, and print the folder of its files.

    The files lie in DIR/ORG--MODEL/REVISION; beside that folder lie the bundle, a torrent and a list of SHA-256 sums. Every byte
    is hashed while it is copied. Run the command again to go on: what is there is hashed, never trusted and never overwritten.
    """
    started = time.monotonic()
    with ref_args(typed_ref(ref)) as (args, fds), daemon(app) as client:
        reply = client.call("show", args | {"bundle_out": True}, fds)
        row = Row(reply.result)
        from modelp2p.protocol.statement import MAX_BUNDLE_BYTES

        statement, release = _verified(row, reply.read_fds(MAX_BUNDLE_BYTES))
    from modelp2p.cli.export_writing import Export

    tree = _open_tree(row.text("path"), release)
    try:
        here = _files_in(tree)
        wanted = _wanted(release, here, include, exclude, is_partial=row.text("state") == "partial")
        with progress_of(app) as progress:
            made = Export(directory, tree, statement, release, progress.on_event).write(wanted)
    finally:
        os.close(tree)
    files, total = len(release.manifest.files), sum(release.manifest.file(path).size for path in wanted)
    state = "complete" if len(wanted) == files else "partial"
    if app.as_json:
        emit_json(
            {
                "path": made.path,
                "name": str(release.manifest.name),
                "revision": release.manifest.revision,
                "info_hash": release.info_hash.hex(),
                "publisher": release.publisher_id,
                "state": state,
                "files": len(wanted),
                "bytes": total,
                "copied_bytes": made.copied_bytes,
                "bundle": made.bundle,
                "torrent": made.torrent,
                "save_path": made.save_path,
                "seconds": round(time.monotonic() - started, 3),
            }
        )
        return
    if app.quiet:
        out(made.path)
        return
    emit_block(
        [
            ("Path", made.path),
            ("Bundle", made.bundle),
            ("Torrent", f"{made.torrent}, to be saved in {made.save_path}"),
            ("Release", release.ref),
            ("Signed by", release.publisher_id),
            ("Status", f"{state}: {len(wanted)} of {files} files, {size_text(total)}, every byte verified"),
        ]
    )
    if state == "partial":
        say(app, f"The torrent is that of all {files} files: a BitTorrent client will ask for the others.")


def _verified(row: Row, contents: list[bytes]) -> tuple[Statement, Release]:
    """The statement the daemon sent, by its own signature: what leaves this machine is not the daemon's word."""
    from modelp2p.protocol.statement import decode_bundle, verify_statement

    if len(contents) != 2:
        raise DaemonError("the daemon sent no bundle", hint="Client and daemon may differ in version: restart the daemon.")
    statement = decode_bundle(contents[1])
    release = verify_statement(statement)
    if release.info_hash.hex() != row.text("info_hash"):
        raise DaemonError(f"the daemon shows {row.ref} with the bundle of another release")
    return statement, release


def _open_tree(path: str, release: Release) -> int:
    from modelp2p.daemon.diskerror import on_disk

    try:
        with on_disk(f"cannot read '{path}'"):
            return os.open(os.path.realpath(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotFoundError as exc:
        raise _not_here(release) from exc


def _files_in(tree: int) -> frozenset[str]:
    """The paths of all files below a visible tree: those that are proven whole."""
    found = set()
    for folder, _, names, _ in os.fwalk(".", dir_fd=tree, follow_symlinks=False):
        found |= {os.path.normpath(os.path.join(folder, name)) for name in names}
    return frozenset(found)


def _not_here(release: Release) -> NotFoundError:
    return NotFoundError(f"no finished file of {release.ref} is here", hint=f"modelp2p fetch {release.ref}")


def _wanted(
    release: Release, here: frozenset[str], include: tuple[str, ...], exclude: tuple[str, ...], *, is_partial: bool
) -> tuple[str, ...]:
    """The files to export.

    `is_partial`: the owner asked for some files of the release, and has them all. Without globs it is those, then.

    Raises:
        NotFoundError: no file of it is here.
        UsageError: the globs select none.
        PartialError: some that should go are not here.
    """
    wanted = wanted_paths({entry.path: entry.size for entry in release.manifest.files}, include, exclude)
    if not wanted:
        raise UsageError(f"no file of {release.ref} matches", hint="'modelp2p show' lists its files.")
    missing = [path for path in wanted if path not in here]
    if len(missing) == len(wanted):
        raise _not_here(release)
    if missing and (include or exclude or not is_partial):
        raise PartialError(
            f"{len(missing)} of {len(wanted)} files of {release.ref} are not here: {some_of(missing)}",
            hint=f"Fetch them first (modelp2p fetch {release.ref}), or leave them out with --exclude. Nothing was written.",
            path=missing[0],
        )
    return tuple(path for path in wanted if path in here)
