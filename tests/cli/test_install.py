"""`hf p2p`: the extension that `install hf-extension` writes, as `hf` itself finds and runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.fakes import modelp2p

HF = str(Path(sys.executable).with_name("hf"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the extension goes: below the home folder, whatever else is set."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    return tmp_path / ".local/share/hf/extensions/hf-p2p"


def install(*args: str) -> int:
    return modelp2p("install", "hf-extension", *args)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_hf_runs_this_modelp2p_and_passes_its_exit_code_on(folder: Path, tmp_path: Path) -> None:
    assert install("-q") == 0
    # A PATH without modelp2p, and a folder with a file that is called like one of its modules.
    (tmp_path / "click.py").write_text("raise SystemExit(77)")
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "MODELP2P_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def hf(*args: str) -> subprocess.CompletedProcess[str]:
        # -P: the folder is in the way of our program, not of the oracle.
        command = [sys.executable, "-P", HF, *args]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    shown = hf("p2p", "config", "show", "--json")
    assert (shown.returncode, json.loads(shown.stdout)["v"]) == (0, 1)
    assert hf("p2p", "status").returncode == 8
    assert "Usage: modelp2p" in hf("p2p", "--help").stdout


def test_hf_knows_what_it_is_and_never_asks_for_news_of_it(folder: Path) -> None:
    from huggingface_hub.cli import extensions

    assert install("-q") == 0
    manifest = extensions.ExtensionManifest.load(folder)
    assert (manifest.short_name, manifest.type, manifest.executable_path) == ("p2p", "binary", str(folder / "hf-p2p"))
    assert [name for name, _ in extensions.list_installed_extensions_for_help()] == ["p2p"]
    # No request to GitHub, today or ever: `hf` believes that it has just asked.
    assert extensions._is_latest_commit_cached("p2p")
    assert extensions._get_latest_commit_sha(manifest) is None
    # `hf extensions update` installs whatever this owner publishes: it must be a name that nobody can have.
    assert manifest.owner.startswith("-")


def test_doing_it_again_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install("--json") == 0
    before = contents(folder)
    assert json.loads(capsys.readouterr().out) == {"v": 1, "path": str(folder), "changed": True}
    assert install("--json") == 0
    assert json.loads(capsys.readouterr().out)["changed"] is False
    assert contents(folder) == before


@pytest.mark.parametrize("damage", ["hf-p2p", "manifest.json", "mode", "empty"])
def test_what_is_missing_of_it_comes_back(damage: str, folder: Path) -> None:
    assert install("-q") == 0
    before = contents(folder)
    match damage:
        case "mode":
            (folder / "hf-p2p").chmod(0o644)
        case "empty":
            for path in folder.iterdir():
                path.unlink()
        case "manifest.json":
            written = json.loads(before["manifest.json"])
            (folder / "manifest.json").write_text(json.dumps(written | {"executable_path": "/elsewhere"}))
        case name:
            (folder / name).write_text("#!/bin/sh\nexec /an/older/python\n")
    assert install("-q") == 0
    assert os.access(folder / "hf-p2p", os.X_OK)
    after = contents(folder)
    assert after["hf-p2p"] == before["hf-p2p"]
    assert json.loads(after["manifest.json"])["executable_path"] == str(folder / "hf-p2p")


def test_it_is_taken_away_and_only_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install("-q") == 0
    capsys.readouterr()
    assert install("--remove") == 0
    assert f"{folder} is removed" in capsys.readouterr().err
    assert not folder.exists()
    assert install("--remove") == 0
    assert "was not installed" in capsys.readouterr().err


FOREIGN = {
    "of another repository": ("manifest.json", '{"owner": "somebody", "executable_path": "x"}'),
    "without a manifest": ("hf-p2p", "#!/bin/sh\n"),
    "with a broken manifest": ("manifest.json", "[1"),
}


@pytest.mark.parametrize("remove", [False, True], ids=["install", "remove"])
@pytest.mark.parametrize(("name", "text"), FOREIGN.values(), ids=FOREIGN)
def test_the_extension_of_somebody_else_is_left_alone(
    name: str, text: str, remove: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    assert install(*(["--remove"] if remove else [])) == 1
    assert "is another extension, and is left alone" in capsys.readouterr().err
    assert contents(folder) == {name: text.encode()}


def test_nothing_is_written_or_removed_through_a_link(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    folder.parent.mkdir(parents=True)
    folder.symlink_to(target)
    assert install() == install("--remove") == 1
    assert list(target.iterdir()) == []
