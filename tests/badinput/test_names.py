"""Folders with hostile names: publishing refuses, nothing is staged, and no terminal obeys a file name."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.badinput.cases import SMALL_STORE, check_clean, left_in, refused
from tests.nodes import Node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A running node with a key and no release."""
    with Node(tmp_path_factory.mktemp("n") / "node", sections=SMALL_STORE).start() as running:
        assert running.run("keys", "init", "lab", "--no-passphrase").code == 0
        yield running


def named(*names: str | bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            path = os.path.join(os.fsencode(folder), os.fsencode(name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "xb") as file:
                file.write(b"content")

    return make


def symlink(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to("/etc/hostname")


def folder_symlink(folder: Path) -> None:
    (folder / "shards").symlink_to("/etc", target_is_directory=True)


def unreadable_symlink(folder: Path) -> None:
    os.symlink(b"/etc/hostname", os.fsencode(folder) + b"/mod\xff\x1bel")


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")


def unreadable_fifo(folder: Path) -> None:
    os.mkfifo(os.fsencode(folder) + b"/mod\xff\x1bel")


def unix_socket(folder: Path) -> None:
    here = os.open(folder, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/model.safetensors")
    os.close(here)


def only_empty(folder: Path) -> None:
    (folder / "empty").touch()


def nothing(folder: Path) -> None:
    """An empty folder."""


FORMAT = {
    "terminal escape": named("a\x1b]0;owned\x07\x1b[31m.json"),
    "newline": named("a\nerror: all is well"),
    "bidi override": named("model\u202esrotensefas.json"),
    "zero width": named("mo\u200bdel.json"),
    "trailing dot": named("model."),
    "trailing space": named("model "),
    "leading dash": named("-rf"),
    "dash in a folder": named("ok/--help/model.json"),
    "case twins": named("Model.json", "model.json"),
    "case twins of folders": named("A/one.json", "a/two.json"),
    "NFC and NFD twins": named("caf\u00e9.json", "cafe\u0301.json"),
    "file and folder, folded": named("Shard", "shard/one.json"),
    "backslash": named("a\\..\\evil.json"),
    "colon": named("c:evil.json"),
    "device": named("nul.json"),
    "not UTF-8": named(b"mod\xff\xfeel.json"),
    "component of 201 bytes": named("x" * 201),
    "path of 1025 bytes": named("/".join(["y" * 170] * 6) + "/z"),
    "depth 17": named("/".join("abcdefghijklmnopq")),
    "FIFO": fifo,
    "FIFO, not UTF-8": unreadable_fifo,
    "socket": unix_socket,
}
USAGE = {
    "symlink": symlink,
    "symlink, not UTF-8": unreadable_symlink,
    "symlink to a folder": folder_symlink,
    "only empty files": only_empty,
    "empty folder": nothing,
}


@pytest.mark.swarm
@pytest.mark.parametrize("what", [*FORMAT, *USAGE])
def test_a_folder_that_no_release_may_have_is_refused_and_leaves_nothing(node: Node, what: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    {**FORMAT, **USAGE}[what](source)
    if what in FORMAT:
        (source / "good.json").write_text("{}")
        refused(node, "publish", str(source), "--as", "lab/model", code=4, kind="BAD_SIGNATURE")
    else:
        refused(node, "publish", str(source), "--as", "lab/model", code=2, kind="USAGE")
    assert left_in(node.home) == set()


@pytest.mark.swarm
def test_names_at_the_limit_are_published(node: Node, tmp_path: Path) -> None:
    names = (
        "x" * 200,
        "/".join("abcdefghijklmnop"),
        "/".join([*["y" * 170] * 5, "z" * 169]),
        "\u6a21\u578b.json",
        "with space.json",
    )
    assert max(len(name.encode()) for name in names) == 1024
    named(*names)(tmp_path / "source")
    named(b".hidden\xff\x1b")(tmp_path / "source")
    done = node.run("publish", str(tmp_path / "source"), "--as", "lab/limits", "--json")
    assert (done.code, done.json["files"]) == (0, len(names)), done
    check_clean(done.out + done.err)
    node.ok("rm", "lab/limits", "-y")
    assert node.ok("ls")["releases"] == []


@pytest.mark.swarm
@pytest.mark.parametrize(
    "name",
    [
        *("../evil", "a/b/c", "-x/model", "org/mo\x1b[2Jdel", "org/\u202emodel", "", "a--b/c", "org/" + "m" * 97),
        *("by-publisher/model", "By-Publisher/model"),
    ],
)
def test_a_name_that_no_release_may_have_is_a_usage_error(node: Node, name: str, tmp_path: Path) -> None:
    named("model.json")(tmp_path / "source")
    refused(node, "publish", str(tmp_path / "source"), f"--as={name}", code=2, kind="USAGE")
    assert left_in(node.home) == set()
