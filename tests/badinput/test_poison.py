"""A seed that lies, beside an honest one: it is banned, the fetch completes, and nobody ever sees one of its bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.badinput.cases import SMALL_STORE, Case, Sampler, Witness, model
from tests.nodes import Node

POISONER = Path(__file__).parents[1] / "daemon" / "poisoner.py"
FILES = model(20, 6, 6)


@pytest.mark.swarm
def test_a_poisoner_is_banned_and_its_bytes_are_never_visible(tmp_path: Path) -> None:
    case = Case.of(FILES)
    node = Node(tmp_path / "node", sections=SMALL_STORE)
    bundle = case.trusted_by(node, tmp_path)
    bad = tmp_path / "bad"
    for path, data in case.files.items():
        bad.mkdir(exist_ok=True)
        (bad / path).write_bytes(data)
    torrent = tmp_path / "t.torrent"
    torrent.write_bytes(case.release.torrent_bytes())
    command = [sys.executable, str(POISONER), str(torrent), str(bad), "127.0.0.2"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as poisoner,
        # Slow, so that the poisoner is asked for most.
        Witness(case, tmp_path / "seed", max_up=6 << 20) as seed,
        node.start(),
    ):
        assert poisoner.stdout is not None
        peers = ("--peer", f"127.0.0.2:{int(poisoner.stdout.readline())}", "--peer", seed.address)
        with Sampler(node.home, case.files) as sampler:
            done = node.ok("fetch", bundle, *peers, "--timeout", "30")
        assert done["state"] == "complete"
        assert sampler.seen == set(case.files)
        assert "was banned" in node.log
        assert "127.0.0.2" in next(line for line in node.log.splitlines() if "was banned" in line)
        assert seed.uploaded >= case.size
    case.check_whole(node)
    case.check_journal(node)
