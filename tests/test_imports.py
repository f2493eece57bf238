"""The house rules of `docs/DESIGN.md`, walked over the syntax trees of all rooms: which room may import what.

The walk reads source and imports nothing, so it sees a forbidden import inside a function as well as at the top.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import TypeIs

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("protocol", "daemon", "loader", "cli")

# protocol/ is bytes and values: what could open, wait, spawn, draw lots or read a clock stays outside.
IMPURE = {
    "I/O": ("asyncio", "glob", "http", "io", "mmap", "os", "pathlib", "select", "selectors", "shutil", "socket", "ssl", "sys"),
    "I/O in disguise": ("logging", "subprocess", "tempfile", "urllib.request", "urllib.response"),
    "a thread or task": ("concurrent", "multiprocessing", "queue", "signal", "threading", "trio"),
    "a clock or chance": ("random", "secrets", "time", "uuid"),
}
IMPURE_CALLS = frozenset({"open", "input", "print", "exec", "eval", "__import__", "breakpoint"})

# A foreign package and the only places that may know it, as path prefixes.
HOMES = {
    "libtorrent": ("daemon/engine/",),
    "msgpack": ("protocol/codec.py",),
    "cryptography": ("protocol/signing.py", "protocol/keyfile.py"),
    "tuf": ("protocol/publisher.py",),
    "securesystemslib": ("protocol/publisher.py",),
    "torch": ("loader/",),
    "trio": ("daemon/",),
    "h11": ("daemon/",),
    "httpcore2": ("daemon/origin.py",),
    "click": ("cli/",),
    "rich": ("cli/",),
    "platformdirs": ("cli/", "daemon/"),
    "transformers": ("loader/transformers.py",),
    "vllm": ("loader/vllm.py",),
}
# Oracles and baselines of tests and benchmarks; the product has strict parsers and clients of its own.
NOWHERE = frozenset({"safetensors", "huggingface_hub", "requests", "numpy"})

# The client, and what it needs of the daemon's room: any process may import these cheaply.
STDLIB_ONLY = frozenset({"daemon/client.py", "daemon/lock.py", "daemon/diskerror.py"})
# The demo compares what our loader gives with what the format's own reader gives: an independent witness is its point.
WITNESSES = frozenset({("cli/demo.py", "safetensors")})


When = Literal["import", "call", "types"]


class Import(NamedTuple):
    """One imported module as written, and when it is: with its file, when a function is called, or for the type checker only."""

    module: str
    line: int
    when: When


def imports_of(tree: ast.AST) -> Iterator[Import]:
    """Every import of a file; `from a.b import c` counts as `a.b.c`, since c may be a module."""

    def walk(node: ast.AST, when: When) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield from (Import(f"{source}.{alias.name}", node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.Call) and (module := _by_name(node)):
            yield Import(module, node.lineno, when)
        elif _is_type_checking(node):
            yield from (found for child in node.body for found in walk(child, "types"))
            yield from (found for child in node.orelse for found in walk(child, when))
            return
        inside: When = "call" if when == "import" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else when
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(tree, "import")


def violations(path: str, source: str) -> list[str]:
    """What a file may not import, one sentence each that names the file, the line and the import.

    `path` is relative to the repository, with forward slashes.
    """
    tree = ast.parse(source, filename=path)
    found = [f"{path}:{item.line}: {item.module}: {why}" for item in imports_of(tree) if (why := _objection(path, item))]
    if path.startswith("protocol/"):
        found += [
            f"{path}:{node.lineno}: {node.func.id}(): protocol/ is pure"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS
        ]
    return found


def _objection(path: str, item: Import) -> str:
    room = path.partition("/")[0]
    top = item.module.partition(".")[0]
    if top in ROOMS or not top:
        return "import it as modelp2p.<room>"
    if top == "modelp2p":
        return _objection_to_ours(path, room, item)
    if top in NOWHERE and (path, top) not in WITNESSES:
        return "for tests and benchmarks only"
    homes = HOMES.get(top)
    if homes is not None and not path.startswith(homes):
        return f"only in {', '.join(homes)}"
    if path in STDLIB_ONLY and homes is not None:
        return f"{path} is standard library and protocol only"
    if room == "protocol" and item.when != "types":
        return next((f"protocol/ is pure: this is {what}" for what, names in IMPURE.items() if _is_in(item.module, names)), "")
    return ""


def _objection_to_ours(path: str, room: str, item: Import) -> str:
    target = item.module.removeprefix("modelp2p.")
    target_room = target.partition(".")[0]
    is_client = target == "daemon.client" or target.startswith("daemon.client.")
    if path in STDLIB_ONLY:
        target_file = "/".join(target.split(".")[:2]) + ".py"
        return "" if target_room == "protocol" or target_file in STDLIB_ONLY else f"{path} is standard library and protocol only"
    if target_room in ("protocol", room) and target_room in ROOMS:
        return ""
    if room == "loader" and is_client:
        return ""
    if room == "cli" and target_room in ROOMS:
        return "" if is_client or item.when != "import" else "import it inside the verb that needs it"
    return f"{room}/ may not import {target_room}"


def _is_in(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def _by_name(call: ast.Call) -> str:
    """The module in `import_module("a.b")`, as packages are imported that are not installed where types are checked."""
    match call:
        case ast.Call(func=ast.Name(id="import_module"), args=[ast.Constant(value=str(module))]):
            return module
        case _:
            return ""


def _is_type_checking(node: ast.AST) -> TypeIs[ast.If]:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_every_room_keeps_to_its_imports() -> None:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    found = [
        message for path in files for message in violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert len(files) >= len(ROOMS), "the rooms were not found"
    assert not found, "\n".join(found)


PLANTED = {
    "room by its folder name": ("daemon/service.py", "import protocol.codec", "protocol.codec"),
    "relative import": ("daemon/service.py", "from . import config", "..config"),
    "protocol opens a file": ("protocol/codec.py", "def f():\n    return open('x')", "open()"),
    "protocol imports os": ("protocol/codec.py", "import os.path", "os.path"),
    "protocol imports the daemon": ("protocol/codec.py", "from modelp2p.daemon import config", "modelp2p.daemon.config"),
    "protocol imports os beside its types": ("protocol/codec.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import os", "os"),
    "protocol imports trio in a function": ("protocol/codec.py", "def f():\n    import trio", "trio"),
    "daemon imports the loader": ("daemon/service.py", "import modelp2p.loader", "modelp2p.loader"),
    "daemon imports the cli in a function": (
        "daemon/main.py",
        "def f():\n    from modelp2p.cli import main",
        "modelp2p.cli.main",
    ),
    "client imports trio": ("daemon/client.py", "import trio", "trio"),
    "client imports its own room": ("daemon/client.py", "from modelp2p.daemon.config import Config", "modelp2p.daemon.config"),
    "client imports for types alone": (
        "daemon/client.py",
        "if TYPE_CHECKING:\n    from modelp2p.daemon.config import Config",
        "modelp2p.daemon.config",
    ),
    "loader imports the service": ("loader/api.py", "from modelp2p.daemon import service", "modelp2p.daemon.service"),
    "loader imports libtorrent": ("loader/api.py", "import libtorrent as lt", "libtorrent"),
    "cli imports the daemon at the top": ("cli/daemon.py", "from modelp2p.daemon.main import run", "modelp2p.daemon.main"),
    "cli imports the loader at the top": ("cli/load.py", "import modelp2p.loader", "modelp2p.loader"),
    "cli imports torch in a function": ("cli/load.py", "def f():\n    import torch", "torch"),
    "libtorrent outside the engine": ("daemon/service.py", "import libtorrent", "libtorrent"),
    "msgpack outside the codec": ("protocol/manifest.py", "from msgpack import packb", "msgpack"),
    "torch outside the loader": ("daemon/service.py", "import torch", "torch"),
    "cryptography in trust rules": ("protocol/publisher.py", "import cryptography.x509", "cryptography"),
    "tuf in the daemon": ("daemon/trust.py", "from tuf.api.metadata import Root", "tuf.api.metadata"),
    "transformers by name outside its door": (
        "loader/api.py",
        "def f():\n    return import_module('transformers.models').BertModel",
        "transformers.models",
    ),
    "the oracle in the product": ("loader/api.py", "from safetensors import safe_open", "safetensors"),
}


@pytest.mark.parametrize(("path", "source", "named"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_caught_and_named(path: str, source: str, named: str) -> None:
    (message,) = violations(path, source)
    assert message.startswith(f"{path}:")
    assert named in message


ALLOWED = {
    "daemon to protocol": ("daemon/service.py", "from modelp2p.protocol.codec import pack\nimport trio, os"),
    "engine to libtorrent": ("daemon/engine/session.py", "import libtorrent as lt\nfrom modelp2p.daemon.swarm import Swarm"),
    "client": ("daemon/client.py", "import socket, os\nfrom modelp2p.protocol.framing import FrameDecoder"),
    "loader": ("loader/api.py", "import torch, mmap\nfrom modelp2p.daemon.client import Client"),
    "cli": ("cli/load.py", "import click\nfrom modelp2p.daemon.client import Client\ndef f():\n    from modelp2p import loader"),
    "cli for types": ("cli/config.py", "if TYPE_CHECKING:\n    from modelp2p.daemon.config import Config"),
    "codec": ("protocol/codec.py", "import msgpack, hashlib, struct"),
    "a type of the standard library": ("protocol/journal.py", "if TYPE_CHECKING:\n    import os"),
    "links": ("protocol/links.py", "from urllib.parse import urlsplit"),
}


@pytest.mark.parametrize(("path", "source"), ALLOWED.values(), ids=ALLOWED.keys())
def test_what_the_rooms_need_is_allowed(path: str, source: str) -> None:
    assert violations(path, source) == []
