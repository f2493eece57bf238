"""Releases of as many files as there may be: every answer about one crosses the control socket, whose frames hold 1 MiB."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from modelp2p.protocol.paths import MAX_FILES
from modelp2p.protocol.statement import decode_bundle
from tests.badinput.cases import refused
from tests.releases import Home, statement_of, write_files

if TYPE_CHECKING:
    from pathlib import Path

    from tests.endtoend.site import Site

pytestmark = pytest.mark.swarm

FOLDER = "/".join("d" * 56 for _ in range(4))
"""With a number of five digits behind it the manifest has almost its 4 MiB."""


@pytest.mark.slow
def test_a_release_of_ten_thousand_files_is_shown(site: Site) -> None:
    node = site.node("node", start=False)
    files = {f"{FOLDER}/{number:05}": b"%d" % number for number in range(MAX_FILES)}
    statement = statement_of(files)
    assert len(statement.envelope) > 3 << 20
    Home(node.home).state(statement)
    node.start()
    bundle = node.folder / "large.modelp2p"
    shown = node.ok("show", "lab/model", "--bundle", str(bundle))
    assert {item["path"]: item["size"] for item in shown["files"]} == {path: len(data) for path, data in files.items()}
    assert decode_bundle(bundle.read_bytes()) == statement
    assert node.ok("ls")["releases"][0]["files"] == MAX_FILES
    assert len(node.run("show", "lab/model").out.splitlines()) > MAX_FILES


@pytest.mark.slow
def test_one_file_too_many_is_said_before_anything_is_hashed(site: Site, tmp_path: Path) -> None:
    node = site.node("node")
    assert node.run("keys", "init", "lab", "--no-passphrase").code == 0
    source = write_files(tmp_path / "source", {f"{number:05}": b"x" for number in range(MAX_FILES + 1)})
    refusal = refused(node, "publish", str(source), "--as", "lab/many", code=2, kind="USAGE")
    assert f"{MAX_FILES + 1} files" in refusal.message
    assert node.ok("status")["node"]["bytes_hashed"] == 0
    # What the publisher says is checked first, too.
    notes = [word for number in range(65) for word in ("--note", f"k{number}=v")]
    refusal = refused(node, "publish", str(source), "--as", "lab/many", *notes, code=2, kind="USAGE")
    assert "notes" in refusal.message
