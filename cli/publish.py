"""`publish`: a folder becomes a signed release.

Two steps, so that the daemon never holds a key: it hashes and returns an unsigned manifest; this process checks that the
manifest says what was asked, shows it, signs it, and hands back the envelope.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.connection import daemon
from modelp2p.cli.hfcache import cache_folder
from modelp2p.cli.hfcache_reading import find_snapshot, linked
from modelp2p.cli.keyring import key_of
from modelp2p.cli.options import cache_dir_option, client_options
from modelp2p.cli.output import emit_block, emit_json, out, say, table
from modelp2p.cli.passphrase import ask, passphrase_from_file
from modelp2p.cli.progress import progress_of
from modelp2p.cli.refs import local_release_of, open_user_path, ref_args, typed_ref
from modelp2p.cli.results import Row
from modelp2p.cli.units import size_text
from modelp2p.protocol.errors import FormatError, UntrustedError, UsageError
from modelp2p.protocol.hfcache import Listed
from modelp2p.protocol.names import BundleRef, ModelName, check_revision

if TYPE_CHECKING:
    from modelp2p.cli.connection import Client
    from modelp2p.cli.hfcache_reading import Snapshot
    from modelp2p.protocol.codec import Map
    from modelp2p.protocol.manifest import Manifest

_KEYS = ("link", "name", "revision", "info_hash", "manifest", "publisher", "files", "bytes", "seconds")
_MOST_ROWS = 20
_HUB = "https://huggingface.co"
"""Where the files of a cached commit can also be had, as a BEP 19 web seed: commit and path follow `resolve/`."""


@click.command()
@click.argument("directory", type=click.Path(), required=False)
@click.option("--as", "name", metavar="ORG/MODEL", help="The name it gets.")
@click.option("--from-hf", metavar="ORG/MODEL[@REV]", help="Publish this snapshot of the Hugging Face cache instead of a folder.")
@cache_dir_option
@click.option("--key", metavar="NAME", help="The key to sign with; needed where there are several.")
@click.option("--passphrase-file", metavar="FILE", help="Read the key's passphrase from the first line of FILE.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only files that match; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No files that match; may be repeated.")
@click.option("--license", "license_", default="", metavar="SPDX", help="The licence, such as apache-2.0.")
@click.option("--license-file", metavar="PATH", help="The file of the release that holds the licence.")
@click.option("--note", "notes", multiple=True, metavar="KEY=TEXT", help="Something to say about it; may be repeated.")
@click.option("--base", "bases", multiple=True, metavar="RELATION=REF", help="What it was made from: finetune=org/model.")
@click.option("--origin", metavar="REPO@COMMIT", help="The repository and commit the files were taken from.")
@click.option("--web-seed", "web_seeds", multiple=True, metavar="URL", help="An HTTPS copy of the files; may be repeated.")
@click.option("--no-web-seed", is_flag=True, help="With --from-hf: do not name the Hub as an HTTPS copy.")
@click.option("--tracker", "trackers", multiple=True, metavar="URL", help="A tracker to announce to; may be repeated.")
@click.option("--sequence", type=click.IntRange(min=1), help="The statement's number; default: one more than the last.")
@click.option("--no-seed", is_flag=True, help="Store it without seeding.")
@client_options
@pass_app
def publish(
    app: App,
    directory: str | None,
    name: str | None,
    from_hf: str | None,
    cache_dir: str | None,
    key: str | None,
    passphrase_file: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    license_: str,
    license_file: str | None,
    notes: Sequence[str],
    bases: Sequence[str],
    origin: str | None,
    web_seeds: Sequence[str],
    no_web_seed: bool,
    trackers: Sequence[str],
    sequence: int | None,
    no_seed: bool,
) -> None:
    """Sign DIRECTORY as a release and print its link.

    Nothing in DIRECTORY is changed or uploaded: the files are hashed where they are and served from there. Publishing the same
    again returns the same link. With --from-hf it is a model of the Hugging Face cache, whole and under its commit, so that all
    who publish that commit share one swarm.
    """
    if (directory is None) == (from_hf is None):
        raise click.UsageError("give either DIRECTORY or --from-hf")
    if from_hf is not None and (include or exclude or origin is not None):
        raise click.UsageError("--from-hf publishes a commit as it is: it does not go with --include, --exclude or --origin")
    if no_web_seed and from_hf is None:
        raise click.UsageError("--no-web-seed goes with --from-hf: a folder gets no web seed by itself")
    snapshot = None if from_hf is None else find_snapshot(cache_folder(app.environ, cache_dir), from_hf)
    if name is None and snapshot is None:
        raise click.UsageError("--as is missing: say which name the folder gets")
    model = snapshot.name if name is None and snapshot is not None else _name_of(name or "")
    folder = key_of(app.keys_folder, key)
    sealed = folder.release_key()
    passphrase = None
    if sealed.is_encrypted:
        passphrase = passphrase_from_file(passphrase_file) if passphrase_file is not None else ask(folder.name)
    # Opened before the hashing, which may take an hour: a wrong passphrase is said at once.
    private = sealed.open(passphrase)
    chain = folder.chain()
    args: Map = {
        "name": str(model),
        "created": int(time.time()),
        "sequence": sequence if sequence is not None else folder.highest_sequence(str(model)) + 1,
        "license": license_,
        "notes": cast("Map", dict(_pair(note, "--note") for note in notes)),
        "web_seeds": list(web_seeds),
        "trackers": list(trackers),
        "publisher": chain.publisher_id,
        "include": list(include),
        "exclude": list(exclude),
    }
    if license_file is not None:
        args["license_file"] = license_file
    if origin is not None:
        args["origin"] = _origin(origin)
    if snapshot is not None:
        args["origin"] = {"repo": str(snapshot.name), "commit": snapshot.commit}
        hub = () if no_web_seed else (f"{_HUB}/{snapshot.name}/resolve/",)
        args["web_seeds"] = list(dict.fromkeys((*web_seeds, *hub)))
    started = time.monotonic()
    with daemon(app) as client:
        args["lineage"] = [_lineage(client, base) for base in bases]
        with _source(app, directory, snapshot) as fds, progress_of(app) as progress:
            prepared = client.call("publish", args, fds, progress.on_event)
        from modelp2p.cli.signing import existing_or_signed, read_prepared

        manifest, payload, existing = read_prepared(prepared, args)
        if snapshot is not None and tuple(map(Listed.of, manifest.files)) != snapshot.files:
            raise UntrustedError("the daemon prepared a manifest of other files than the commit has. It was not signed.")
        _show_manifest(app, manifest, folder.name, Row(prepared.result))
        envelope = existing_or_signed(manifest, payload, existing, private, chain, folder)
        result = _commit(client, Row(prepared.result), envelope, chain.documents, seed=not no_seed)
        # A daemon that came for this command leaves with it: saying "seeding" would be a promise nobody keeps.
        seeding = result.flag("seeding") and client.started_pid is None
    result.source["seeding"] = seeding
    _show_result(app, result, time.monotonic() - started)


@contextmanager
def _source(app: App, directory: str | None, snapshot: Snapshot | None) -> Iterator[list[int]]:
    """The descriptors of `publish`: the folder, and for a snapshot its listing."""
    if snapshot is None:
        assert directory is not None
        fd = open_user_path(directory, "folder", os.O_DIRECTORY)
        try:
            yield [fd]
        finally:
            os.close(fd)
        return
    from modelp2p.cli.signing import sealed_memory
    from modelp2p.protocol.hfcache import encode_listing

    listing = sealed_memory("listing", encode_listing(snapshot.files))
    try:
        with linked(snapshot, app.home) as folder:
            yield [folder, listing]
    finally:
        os.close(listing)


def _commit(client: Client, prepared: Row, envelope: bytes, documents: Sequence[bytes], *, seed: bool) -> Row:
    from modelp2p.cli.signing import sealed_memory
    from modelp2p.protocol.publisher import encode_chain

    fds = [sealed_memory("envelope", envelope), sealed_memory("publisher", encode_chain(documents))]
    try:
        args: Map = {"token": prepared.source["token"], "seed": seed}
        return Row(client.call("publish_commit", args, fds).result)
    finally:
        for fd in fds:
            os.close(fd)


def _show_manifest(app: App, manifest: Manifest, key: str, prepared: Row) -> None:
    if app.quiet:
        return
    rows = [(entry.path, size_text(entry.size), entry.kind.value) for entry in manifest.files[:_MOST_ROWS]]
    for line in table(("FILE", "SIZE", "KIND"), rows, right="SIZE"):
        say(app, line)
    if len(manifest.files) > _MOST_ROWS:
        say(app, f"... and {len(manifest.files) - _MOST_ROWS} more")
    for path in prepared.texts("skipped"):
        say(app, f"skipped: {path}")
    words = {"reflink": "without copying (shared blocks)", "link": "without copying (hard links)", "copy": "as copies"}
    mode = prepared.text("mode", "")
    say(app, f"{len(manifest.files)} files, {size_text(manifest.total_bytes)}, stored {words.get(mode, mode)}")
    say(app, f"Signing {manifest.name}@{manifest.revision} with key '{key}'")


def _show_result(app: App, result: Row, seconds: float) -> None:
    if app.as_json:
        result.source.pop("milliseconds", None)
        emit_json(result.first(*_KEYS) | {"seconds": round(seconds, 3)})
        return
    if app.quiet:
        out(result.text("link"))
        return
    emit_block(
        [
            ("Link", result.text("link")),
            ("Release", result.ref),
            ("Publisher", result.text("publisher")),
            ("Size", f"{result.number('files')} files, {size_text(result.number('bytes'))}"),
            ("Seeding", "yes" if result.flag("seeding") else "no"),
        ]
    )
    if not result.flag("seeding"):
        say(app, f"Nothing is seeding it yet. Run: modelp2p seed {result.text('name')}")


def _name_of(text: str) -> ModelName:
    try:
        return ModelName.parse(text)
    except FormatError as exc:
        raise UsageError(f"--as: {exc.message}", hint=exc.hint) from exc


def _pair(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"{flag} '{text[:80]}' is not KEY=VALUE")
    return key, value


def _origin(text: str) -> Map:
    repo, _, commit = text.partition("@")
    try:
        return {"repo": str(ModelName.parse(repo)), "commit": check_revision(commit)}
    except FormatError as exc:
        raise UsageError(f"--origin: {exc.message}", hint="Write REPO@COMMIT with the full commit of 40 hex digits.") from exc


def _lineage(client: Client, text: str) -> Map:
    """What `RELATION=REF` pins: name, revision and info-hash of the parent."""
    from modelp2p.protocol.manifest import RELATIONS

    relation, ref_text = _pair(text, "--base")
    if relation not in RELATIONS:
        raise UsageError(f"--base: '{relation[:40]}' is not a relation", hint=f"Use one of: {', '.join(sorted(RELATIONS))}.")
    ref = typed_ref(ref_text)
    if isinstance(ref, BundleRef):
        name, revision, info_hash, _ = local_release_of(ref.path)
        return {"relation": relation, "name": name, "revision": revision, "info_hash": info_hash}
    with ref_args(ref) as (args, fds):
        reply = client.call("show", args, fds)
    for fd in reply.fds:
        os.close(fd)  # its manifest: what pins it is in the row
    return {"relation": relation, **{key: reply.result[key] for key in ("name", "revision", "info_hash")}}
