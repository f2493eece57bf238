"""`fetch` and `adopt`: a release on this machine, verified, and the path it is at.

Both ask the daemon and wait. Ctrl-C hangs up, which pauses the job there: everything proven is kept, exit 7.
"""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import click

from modelp2p.cli import local_dir as local
from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import daemon
from modelp2p.cli.options import Rate, client_options, peer_option, together
from modelp2p.cli.output import emit_block, emit_json, out, say, table
from modelp2p.cli.progress import progress_of
from modelp2p.cli.refs import open_user_path, ref_args, typed_ref
from modelp2p.cli.units import rate_text, size_text
from modelp2p.protocol.errors import InterruptedFetchError
from modelp2p.protocol.text import printable

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value
    from modelp2p.protocol.names import Ref

_KEYS = ("path", "name", "revision", "info_hash", "publisher", "state", "bytes", "from_peers", "from_web", "seconds")
_fetch_options = together(
    click.option("--include", multiple=True, metavar="GLOB", help="Only files that match; may be repeated."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No files that match; may be repeated."),
    click.option("--revision", metavar="REV", help="The revision, where REF is a plain name."),
    peer_option,
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="S",
        help="Give up after S seconds without a new verified byte.",
    ),
    click.option("--allow-code", is_flag=True, help="Also fetch pickles and code, which run with your rights."),
    click.option("--no-seed", is_flag=True, help="Do not seed it afterwards."),
    click.option("--max-up", type=Rate(), help="Upload limit of this release, such as 200M."),
    click.option("--max-down", type=Rate(), help="Download limit of this release."),
)


@click.command()
@click.argument("ref")
@_fetch_options
@click.option("--local-dir", metavar="DIR", help="Also put the files into DIR, as copies of their own.")
@click.option("--dry-run", is_flag=True, help="Say what would be fetched, and fetch nothing.")
@click.option("--detach", is_flag=True, help="Leave the fetch to the daemon and return.")
@client_options
@pass_app
def fetch(app: App, ref: str, revision: str | None, local_dir: str | None, dry_run: bool, detach: bool, **flags: Any) -> None:
    """Download REF, verify every byte, and print the path.

    REF is org/model, org/model@revision, a magnet link or a .modelp2p bundle. Running the command again resumes.
    """
    if local_dir is not None and (dry_run or detach):
        raise click.UsageError("--local-dir needs the files: it does not go with --dry-run or --detach")
    args = _args_of(**flags) | {"dry_run": dry_run, "detach": detach}
    result, seconds = _run(app, "fetch", typed_ref(ref, revision), args, [], detach=detach)
    if dry_run:
        _show_plan(app, result)
        return
    if local_dir is not None:
        local.place(str(result["path"]), local_dir, flags["include"], flags["exclude"])
        result = {**result, "store_path": result["path"], "path": os.path.abspath(local_dir)}
    _show_result(app, result, seconds)


@click.command()
@click.argument("ref")
@click.argument("path", type=click.Path())
@_fetch_options
@client_options
@pass_app
def adopt(app: App, ref: str, path: str, revision: str | None, **flags: Any) -> None:
    """Take the good bytes of REF from PATH, a folder or file of yours, and fetch the rest.

    Nothing at PATH is changed: the store gets copies (sharing blocks where the file system can).
    """
    fd = open_user_path(path, "file or folder")
    try:
        if not (stat.S_ISDIR(os.fstat(fd).st_mode) or stat.S_ISREG(os.fstat(fd).st_mode)):
            raise click.UsageError(f"'{path}' is neither a folder nor a file")
        args = _args_of(**flags) | {"dry_run": False, "detach": False}
        result, seconds = _run(app, "adopt", typed_ref(ref, revision), args, [fd])
    finally:
        os.close(fd)
    _show_result(app, result, seconds)


def _args_of(
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    peers: Sequence[str],
    timeout: float | None,
    allow_code: bool,
    no_seed: bool,
    max_up: int | None,
    max_down: int | None,
) -> Map:
    args: Map = {
        "include": list(include),
        "exclude": list(exclude),
        "peers": list(peers),
        "allow_code": allow_code,
        "seed": not no_seed,
    }
    # The control protocol carries no fractions; what is left out is the daemon's default.
    optional = {"timeout_s": None if timeout is None else math.ceil(timeout), "max_up": max_up, "max_down": max_down}
    return args | cast("Map", {key: value for key, value in optional.items() if value is not None})


def _run(app: App, verb: str, ref: Ref, args: Map, fds: Sequence[int], *, detach: bool = False) -> tuple[Map, float]:
    started = time.monotonic()
    with ref_args(ref) as (ref_map, ref_fds), daemon(app) as client:
        progress = progress_of(app)
        try:
            with progress:
                reply = client.call(verb, {**args, **ref_map}, [*ref_fds, *fds], progress.on_event)
        except KeyboardInterrupt as exc:
            share = progress.situation.percent
            raise InterruptedFetchError(
                f"Interrupted at {share}, everything verified is kept." if share else "Interrupted before the first byte.",
                hint="Run the same command again to resume.",
                done=progress.situation.done,
                total=progress.situation.total,
            ) from exc
        if detach:
            client.detach()
    return reply.result, time.monotonic() - started


def _show_result(app: App, result: Map, seconds: float) -> None:
    if app.as_json:
        body: dict[str, object] = {key: result.get(key, "" if key in ("path", "publisher") else 0) for key in _KEYS}
        body["seconds"] = round(seconds, 3)
        emit_json(body | {key: value for key, value in result.items() if key not in body})
        return
    if app.quiet:
        out(str(result["path"]))
        return
    verified = "" if result.get("name_verified", True) else " (name not verified: no publisher is trusted for it)"
    emit_block(
        [
            ("Path", result.get("path")),
            ("Release", f"{result['name']}@{result['revision']}"),
            ("Signed by", f"{result['publisher']}{verified}"),
            ("Adopted", size_text(_whole(result["adopted"])) if "adopted" in result else None),
            ("Status", _status(result, seconds)),
            ("Note", result.get("note")),
        ]
    )


def _status(result: Map, seconds: float) -> str:
    peers, web = _whole(result.get("from_peers", 0)), _whole(result.get("from_web", 0))
    got = peers + web
    if result.get("state") in ("queued", "fetching", "paused"):
        return f"{result['state']}, in the daemon"
    if got == 0:
        return f"{result.get('state')}: up to date, {size_text(_whole(result.get('bytes', 0)))}"
    source = f" ({size_text(web)} of it from the web)" if web else ""
    return (
        f"{result.get('state')}: {size_text(got)} from peers{source} in {seconds:.1f} s, {rate_text(got / max(seconds, 0.001))}"
    )


def _show_plan(app: App, result: Map) -> None:
    if app.as_json:
        emit_json(result)
        return
    files = [cast("Map", item) for item in cast("list[Value]", result["files"])]
    if app.quiet:
        for item in files:
            if item["have"] != item["size"]:
                out(printable(str(item["path"])))
        return
    rows = [(item["path"], size_text(_whole(item["size"])), size_text(_whole(item["have"]))) for item in files]
    for line in table(("FILE", "SIZE", "HERE"), rows, right="SIZE HERE"):
        out(line)
    out()
    emit_block(
        [
            ("Release", f"{result['name']}@{result['revision']}"),
            ("Signed by", result["publisher"]),
            ("Total", size_text(_whole(result["bytes"]))),
            ("To fetch", size_text(_whole(result["needed_bytes"]))),
            ("Free", size_text(_whole(result["free_bytes"]))),
            ("Peers", result.get("peers")),
        ]
    )
    say(app, "Dry run: nothing was fetched.")


def _whole(value: Value) -> int:
    return value if isinstance(value, int) else 0
