"""`load`: a smoke test of the whole chain, from signature to tensors on a device, with what it cost."""

from __future__ import annotations

from collections.abc import Sequence

import click

from modelp2p.cli.app import App, pass_app
from modelp2p.cli.options import home_option, json_option, quiet_option
from modelp2p.cli.output import emit_block, emit_json, out
from modelp2p.cli.progress import progress_of
from modelp2p.cli.units import rate_text, size_text
from modelp2p.protocol.errors import ModelP2PError


@click.command()
@click.argument("ref")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda:N", help="Where the tensors go.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only tensors of these names; may be repeated.")
@click.option("--files", multiple=True, metavar="GLOB", help="Only tensors of these files; may be repeated.")
@click.option("--publisher", metavar="ID", help="The publisher that must have signed; default: who is trusted for the name.")
@click.option(
    "--verify",
    type=click.Choice(["auto", "gpu", "cpu", "record", "off"]),
    default="auto",
    show_default=True,
    help="Where the bytes are hashed; record believes the daemon's, off believes the disk.",
)
@json_option
@quiet_option
@home_option
@pass_app
def load(
    app: App, ref: str, device: str, include: Sequence[str], files: Sequence[str], publisher: str | None, verify: str
) -> None:
    """Load REF onto a device, verify its bytes on the way, and say how fast it was.

    REF may also be a folder with a bundle in it. No daemon is needed for a release that is here. Needs modelp2p[torch].
    """
    with progress_of(app) as progress:
        try:
            from modelp2p.loader import open_release

            opened = open_release(ref, device, verify=verify, files=list(files) or None, publisher=publisher, home=app.home)
        except ModuleNotFoundError as exc:
            if exc.name not in ("torch", "numpy"):
                raise
            raise ModelP2PError("loading needs torch, which is not installed", hint="pip install 'modelp2p[torch]'") from exc
        with opened as release:

            def loaded(done: int, total: int) -> None:
                progress.on_event({"phase": "loading", "done": done, "total": total})

            tensors = release.load(list(include) or None, None, loaded)
            stats = release.stats
            # Dropped before the release closes: views of its files end with it.
            count = len(tensors)
            del tensors
    if app.as_json:
        emit_json(
            {
                "name": ref,
                "device": stats.device,
                "tensors": count,
                "bytes": stats.bytes,
                "verified_bytes": stats.verified_bytes,
                "seconds": round(stats.seconds, 6),
                "gb_per_s": round(stats.bytes_per_s / 1e9, 3),
                "transfer": stats.transfer,
                "verify": stats.verify,
                "recorded_bytes": stats.recorded_bytes,
                "unverified_bytes": stats.unverified_bytes,
                "copied_bytes": stats.copied_bytes,
                "reader": stats.reader,
                "verifier": stats.verifier,
                "rereads": stats.rereads,
                "refetches": stats.refetches,
                "fallbacks": stats.fallbacks,
            }
        )
        return
    if app.quiet:
        out(str(count))
        return
    emit_block(
        [
            ("Release", ref),
            ("Device", stats.device),
            ("Tensors", f"{count}, {size_text(stats.bytes)}"),
            (
                "Verified",
                f"{size_text(stats.verified_bytes)} hashed now, by {stats.verifier or 'cpu'}" if stats.verified_bytes else "",
            ),
            ("Recorded", f"{size_text(stats.recorded_bytes)} on the daemon's word" if stats.recorded_bytes else ""),
            ("Unverified", size_text(stats.unverified_bytes) if stats.unverified_bytes else ""),
            ("Transfer", f"{stats.transfer}, read by {stats.reader}" if stats.reader else stats.transfer),
            ("Repaired", f"{stats.refetches} bad pieces fetched again" if stats.refetches else ""),
            *(("Note", reason) for reason in stats.fallbacks),
            ("Time", f"{stats.seconds:.3f} s, {rate_text(stats.bytes_per_s)}"),
        ]
    )
