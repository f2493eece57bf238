"""`fetch` and `adopt`: a release on this machine, verified, and the path it is at.

Both ask the daemon and wait. Ctrl-C hangs up, which pauses the job there: everything proven is kept, exit 7.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from modelp2p.cli import local_dir as local
from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import daemon
from modelp2p.cli.hfcache import cache_folder, put_into_cache
from modelp2p.cli.options import Rate, cache_dir_option, client_options, peer_option, timeout_option, together
from modelp2p.cli.output import emit_block, emit_json, out, say, table
from modelp2p.cli.progress import progress_of
from modelp2p.cli.refs import name_of, open_user_path, ref_args, text_of, typed_ref
from modelp2p.cli.results import Row
from modelp2p.cli.taken import show_taken
from modelp2p.cli.units import rate_text, size_text
from modelp2p.protocol.errors import DaemonError, InterruptedFetchError
from modelp2p.protocol.names import NameRef
from modelp2p.protocol.text import printable

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map
    from modelp2p.protocol.names import Ref

MAX_PLAN_BYTES = 16 << 20
"""What a dry run may list, beside the control frame: 10,000 paths of 1,024 bytes, with two sizes each."""
_fetch_options = together(
    click.option("--include", multiple=True, metavar="GLOB", help="Only files that match; may be repeated."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No files that match; may be repeated."),
    click.option("--revision", metavar="REV", help="The revision, where REF is a plain name."),
    peer_option,
    timeout_option,
    click.option("--peers-only", "--no-web-seed", "peers_only", is_flag=True, help="Do not ask the release's web seeds."),
    click.option("--allow-code", is_flag=True, help="Also fetch pickles and code, which run with your rights."),
    click.option("--no-seed", is_flag=True, help="Do not seed it afterwards."),
    click.option("--max-up", type=Rate(), help="Upload limit of this release, such as 200M."),
    click.option("--max-down", type=Rate(), help="Download limit of this release."),
    click.option("--no-hf-cache", is_flag=True, help="Do not put it into the Hugging Face cache."),
)


class _Flags(TypedDict):
    """What `_fetch_options` parse, by parameter name."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    peers: tuple[str, ...]
    timeout_s: int | None
    peers_only: bool
    allow_code: bool
    no_seed: bool
    max_up: int | None
    max_down: int | None
    no_hf_cache: bool


@click.command()
@click.argument("ref")
@_fetch_options
@click.option("--local-dir", metavar="DIR", help="Also put the files into DIR, as copies of their own.")
@click.option("--dry-run", is_flag=True, help="Say what would be fetched, and fetch nothing.")
@click.option("--detach", is_flag=True, help="Leave the fetch to the daemon and return.")
@client_options
@pass_app
def fetch(
    app: App, /, ref: str, revision: str | None, local_dir: str | None, dry_run: bool, detach: bool, **flags: Unpack[_Flags]
) -> None:
    """Download REF, verify every byte, and print the path.

    REF is org/model, org/model@revision, a magnet link or a .modelp2p bundle. Running the command again resumes.
    """
    if local_dir is not None and (dry_run or detach):
        raise click.UsageError("--local-dir needs the files: it does not go with --dry-run or --detach")
    typed = typed_ref(ref, revision)
    args = _args_of(flags) | {"dry_run": dry_run, "detach": detach}
    # As with `hf download`, files that get a folder of their own are not for the cache.
    is_for_cache = not (dry_run or detach or local_dir is not None or flags["no_hf_cache"])
    cache = cache_folder(app.environ) if is_for_cache else None
    result, contents, seconds = _run(app, "fetch", typed, args, [], cache, detach=detach)
    if dry_run:
        _show_plan(app, result, contents)
        return
    if local_dir is not None:
        tree = result.text("path")
        local.place(tree, local_dir, flags["include"], flags["exclude"])
        result.source.update(path=os.path.abspath(local_dir), store_path=tree)
    show_taken(app, result, seconds, partial(_details, result))


@click.command()
@click.argument("ref")
@click.argument("path", type=click.Path(), required=False)
@click.option("--from-hf", is_flag=True, help="Take them from the Hugging Face cache, also what was interrupted.")
@cache_dir_option
@_fetch_options
@client_options
@pass_app
def adopt(
    app: App,
    /,
    ref: str,
    path: str | None,
    from_hf: bool,
    cache_dir: str | None,
    revision: str | None,
    **flags: Unpack[_Flags],
) -> None:
    """Take the good bytes of REF from PATH, a folder or file of yours, and fetch the rest.

    Nothing at PATH is changed: the store gets copies (sharing blocks where the file system can). With --from-hf it is what the
    Hugging Face cache holds of the model.
    """
    if (path is None) != from_hf:
        raise click.UsageError("give either PATH or --from-hf")
    from modelp2p.cli.hfcache_reading import adoptable, blobs_of

    typed, cache = typed_ref(ref, revision), cache_folder(app.environ, cache_dir)
    path = blobs_of(cache, name_of(typed)) if path is None else adoptable(path)
    fd = open_user_path(path, "file or folder")
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise click.UsageError(f"'{path}' is neither a folder nor a file")
        args = _args_of(flags)
        if stat.S_ISREG(mode):
            # A descriptor has no name; which file of the release it may be is told by its last component.
            args["file_name"] = os.path.basename(path)
        result, _, seconds = _run(app, "adopt", typed, args, [fd], None if flags["no_hf_cache"] else cache)
    finally:
        os.close(fd)
    show_taken(app, result, seconds, partial(_details, result))


def _args_of(flags: _Flags) -> Map:
    args: Map = {
        "include": list(flags["include"]),
        "exclude": list(flags["exclude"]),
        "peers": list(flags["peers"]),
        "allow_code": flags["allow_code"],
        "seed": not flags["no_seed"],
    }
    # What is left out is the daemon's default.
    optional: Map = {"timeout_s": flags["timeout_s"], "max_up": flags["max_up"], "max_down": flags["max_down"]}
    optional["peers_only"] = flags["peers_only"] or None
    return args | {key: value for key, value in optional.items() if value is not None}


def _run(
    app: App, verb: str, ref: Ref, args: Map, fds: Sequence[int], cache: str | None, *, detach: bool = False
) -> tuple[Row, list[bytes], float]:
    """The reply, what its descriptors hold, and the seconds it took; the release also goes into the Hugging Face `cache`."""
    started = time.monotonic()
    by_name = verb == "fetch" and isinstance(ref, NameRef)
    with ref_args(ref) as (ref_map, ref_fds), daemon(app, service=by_name) as client:
        progress = progress_of(app)
        try:
            with progress:
                reply = client.call(verb, {**args, **ref_map}, [*ref_fds, *fds], progress.on_event)
            seconds = time.monotonic() - started
            if detach:
                client.detach()
            result, contents = Row(reply.result), reply.read_fds(MAX_PLAN_BYTES)
            if cache is not None:
                # A name alone asks for this revision to be the one that the name means; a revision, a link or a bundle does not.
                moves_main = isinstance(ref, NameRef) and ref.revision is None
                result.source["hf_cache"] = put_into_cache(app, client, result, cache, text_of(ref), moves_main=moves_main)
        except KeyboardInterrupt as exc:
            share = progress.situation.percent
            raise InterruptedFetchError(
                f"Interrupted at {share}; what is verified is kept." if share else "Interrupted before the first byte.",
                hint="Run the same command again to resume.",
                done=progress.situation.done,
                total=progress.situation.total,
            ) from exc
    return result, contents, seconds


def _details(result: Row, seconds: float) -> list[tuple[str, str]]:
    return [
        ("Adopted", size_text(result.number("adopted")) if "adopted" in result.source else ""),
        ("Status", _status(result, seconds)),
        ("Note", result.text("note", "")),
    ]


def _status(result: Row, seconds: float) -> str:
    state = result.text("state")
    if state in ("queued", "fetching", "paused"):
        return f"{state}: the daemon goes on with it; see modelp2p status"
    from_peers, from_web = result.number("from_peers"), result.number("from_web")
    got = from_peers + from_web
    if got == 0:
        return f"{state}: up to date, {size_text(result.number('bytes'))}"
    web = f" and {size_text(from_web)} from the web" if from_web else ""
    return f"{state}: {size_text(from_peers)} from peers{web} in {seconds:.1f} s, {rate_text(got / max(seconds, 0.001))}"


def _show_plan(app: App, result: Row, contents: list[bytes]) -> None:
    from modelp2p.protocol import codec

    if not contents:
        raise DaemonError("the daemon sent no plan", hint="Client and daemon may differ in version: restart the daemon.")
    result.source["files"] = codec.take(codec.unpack_map(contents[0], max_bytes=MAX_PLAN_BYTES), "files", list)
    if app.as_json:
        emit_json(result.first("name", "revision", "info_hash", "publisher", "files", "bytes", "needed_bytes", "free_bytes"))
        return
    files = result.rows("files")
    if app.quiet:
        for item in files:
            if item.number("have") != item.number("size"):
                out(printable(item.text("path")))
        return
    rows = [(item.text("path"), size_text(item.number("size")), size_text(item.number("have"))) for item in files]
    for line in table(("FILE", "SIZE", "HERE"), rows, right="SIZE HERE"):
        out(line)
    out()
    emit_block(
        [
            ("Release", result.ref),
            ("Signed by", result.text("publisher")),
            ("Total", size_text(result.number("bytes"))),
            ("To fetch", size_text(result.number("needed_bytes"))),
            ("Free", size_text(result.number("free_bytes"))),
            ("Peers", result.source.get("peers")),
        ]
    )
    say(app, "Dry run: nothing was fetched.")
