"""`materialize`: a release that is here gets its place in the Hugging Face cache, as `fetch` gives it by itself."""

from __future__ import annotations

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import daemon
from modelp2p.cli.hfcache import cache_folder, place, trust_command
from modelp2p.cli.options import cache_dir_option, client_options
from modelp2p.cli.output import emit_block, emit_json, out
from modelp2p.cli.refs import ref_args, typed_ref
from modelp2p.protocol.errors import UnknownPublisherError
from modelp2p.protocol.names import NameRef


@click.command()
@click.argument("ref")
@cache_dir_option
@client_options
@pass_app
def materialize(app: App, ref: str, cache_dir: str | None) -> None:
    """Put the files of REF that are here into the Hugging Face cache, and print the snapshot.

    from_pretrained, hf and vllm then load it by its name, without a network. Nothing in the cache is overwritten, and what is
    removed there stays in the store.
    """
    typed = typed_ref(ref)
    with ref_args(typed) as (args, fds), daemon(app, service=isinstance(typed, NameRef)) as client:
        reply = client.call("show", args, fds)
        from modelp2p.cli.shown import shown
        from modelp2p.protocol.manifest import MAX_MANIFEST_BYTES, decode_manifest

        contents = reply.read_fds(MAX_MANIFEST_BYTES)
        result = shown(reply.result, contents)
        name = result.text("name")
        if not result.flag("name_verified"):
            raise UnknownPublisherError(
                f"nobody is trusted for {name} here, and the cache gives files by name alone",
                hint=trust_command(result.text("link"), name),
            )
        # A name alone asks for this revision to be the one that the name means; a revision, a link or a bundle does not.
        moves_main = isinstance(typed, NameRef) and typed.revision is None
        placed = place(
            app, client, result, decode_manifest(contents[0]), cache_folder(app.environ, cache_dir), moves_main=moves_main
        )
    if app.as_json:
        keys = {key: result.source[key] for key in ("name", "revision", "info_hash")}
        counts = {"files": placed.files, "missing": placed.missing, "copied_bytes": placed.copied_bytes}
        emit_json({"hf_cache": placed.snapshot, **keys, **counts})
    elif app.quiet:
        out(placed.snapshot)
    else:
        missing = f", {placed.missing} more are not here" if placed.missing else ""
        emit_block([("HF cache", placed.snapshot), ("Release", result.ref), ("Files", f"{placed.files}{missing}")])
