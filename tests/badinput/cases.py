"""What every test of bad input is made of: small releases, the exact shape of a refusal, and judges that read the disk."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import libtorrent as lt

from modelp2p.cli.connection import SocketConnector
from modelp2p.cli.main import run as run_command
from modelp2p.protocol import layout
from modelp2p.protocol.journal import JournalState, replay
from modelp2p.protocol.statement import Release, Statement, encode_bundle, verify_statement
from tests.nodes import Done, Node, wait_until
from tests.releases import NAME, statement_of

if TYPE_CHECKING:
    from modelp2p.protocol.ranges import Ranges

MIB = 1 << 20
SMALL_STORE: Mapping[str, Mapping[str, object]] = {"store": {"reserve": 0}}
"""Tests run on disks of a few megabytes."""
_UPLOADS = lt.alert.category_t.upload_notification
_BLOCK_BYTES = 16 << 10


def tensors(seed: int, size: int) -> bytes:
    """A valid safetensors file with `size` random bytes of tensors."""
    half = size // 2
    header = {
        f"{seed}.a": {"dtype": "U8", "shape": [half], "data_offsets": [0, half]},
        f"{seed}.b": {"dtype": "U8", "shape": [size - half], "data_offsets": [half, size]},
    }
    return safetensors(json.dumps(header).encode(), Random(seed).randbytes(size))


def safetensors(header: bytes, body: bytes) -> bytes:
    """A safetensors file around any header."""
    padded = header + b" " * (-len(header) % 8)
    return len(padded).to_bytes(8, "little") + padded + body


def model(seed: int, *megabytes: int) -> dict[str, bytes]:
    """The files of a small model: one shard of each size, and a configuration."""
    shards = {f"model-{number}.safetensors": tensors(seed + number, size * MIB) for number, size in enumerate(megabytes)}
    return {"config.json": b'{"model_type": "test", "seed": %d}' % seed, **shards}


@dataclass(frozen=True)
class Case:
    """A signed release that no node has yet."""

    files: Mapping[str, bytes]
    statement: Statement
    release: Release

    @classmethod
    def of(cls, files: Mapping[str, bytes], *, name: str = NAME, by: str = "lab") -> Case:
        statement = statement_of(files, name=name, by=by)
        return cls(files, statement, verify_statement(statement))

    @property
    def size(self) -> int:
        return self.release.manifest.total_bytes

    @property
    def info_hash(self) -> bytes:
        return self.release.info_hash

    @property
    def link(self) -> str:
        return str(self.release.link())

    def bundle(self, folder: Path) -> str:
        """A `.modelp2p` file about it."""
        return write_bundle(folder / "release.modelp2p", encode_bundle(self.statement))

    def data(self, node: Node) -> Path:
        """The engine's folder on a node."""
        return node.home / layout.data_of(self.info_hash)

    def tree(self, node: Node) -> Path:
        """The visible tree on a node."""
        return node.home / layout.tree_of(self.info_hash, self.release.manifest.revision)

    def journal(self, node: Node) -> JournalState:
        """What a node's journal says, read as it lies there."""
        path = node.home / layout.journal_of(self.info_hash)
        return replay(path.read_bytes(), self.info_hash) if path.exists() else JournalState()

    def trusted_by(self, node: Node, folder: Path) -> str:
        """Make a node trust the publisher for the name; returns a bundle to fetch by."""
        bundle = self.bundle(folder)
        node.ok("trust", "add", bundle, "--name", str(self.release.manifest.name))
        return bundle

    def check_whole(self, node: Node) -> None:
        """Everything is visible, equal, and read-only."""
        tree = self.tree(node)
        for path, data in self.files.items():
            assert (tree / path).read_bytes() == data, path
            assert (tree / path).stat().st_mode & 0o222 == 0, path

    def check_journal(self, node: Node) -> Ranges:
        """Every journaled piece is on the disk, hashed against the signed layers; returns what is journaled."""
        state = self.journal(node)
        for piece in state.proven.ints():
            path, offset, length = self.release.pieces.locate(piece)
            place = self.data(node) / path
            with place.open("rb") as file:
                file.seek(offset)
                assert file.read(length) == self.files[path][offset : offset + length], f"journaled, but not on the disk: {piece}"
        for path in state.files:
            assert (self.tree(node) / path).read_bytes() == self.files[path]
        return state.proven


def write_bundle(path: Path, data: bytes) -> str:
    """A bundle file; returns its path as a user would type it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


@dataclass(frozen=True)
class Refusal:
    """What a user and a script were told."""

    message: str
    hint: str
    facts: Mapping[str, Any]


def run(node: Node, *arguments: str, timeout_s: float = 60) -> Done:
    """Run one command: beside a running daemon in this process, for the sake of speed; else in one of its own."""
    if node.process is None:
        return node.run(*arguments, timeout_s=timeout_s)
    told, said = io.StringIO(), io.StringIO()
    with redirect_stdout(told), redirect_stderr(said):
        code = run_command(["--config", str(node.folder / "config.toml"), *arguments], SocketConnector(), node.environment)
    return Done(code, told.getvalue(), said.getvalue())


def refused(node: Node, *arguments: str, code: int, kind: str, timeout_s: float = 60) -> Refusal:
    """Run a command twice, for a user and for a script: both must be refused alike, in the form that docs/DESIGN.md fixes."""
    check_told(run(node, *arguments, timeout_s=timeout_s), code)
    return refused_once(node, *arguments, code=code, kind=kind, timeout_s=timeout_s)


def refused_once(node: Node, *arguments: str, code: int, kind: str, timeout_s: float = 60) -> Refusal:
    """Run a command as a script would, where running it changes something."""
    done = run(node, *arguments, "--json", timeout_s=timeout_s)
    check_clean(done.out + done.err)
    assert done.code == code, f"{arguments}: exit {done.code}\n{done.out}\n{done.err}\n{node.log[-2000:]}"
    assert "Traceback" not in done.err
    error = done.json["error"]
    assert done.json["v"] == 1
    assert (error["code"], error["kind"]) == (code, kind), error
    assert error["message"]
    assert error["hint"], error
    return Refusal(error["message"], error["hint"], error.get("facts", {}))


def check_told(done: Done, code: int) -> str:
    """One error line and one hint on stderr, nothing on stdout; returns the error line."""
    check_clean(done.out + done.err)
    lines = done.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    hints = [line for line in lines if line.startswith("Hint: ")]
    assert done.code == code, f"exit {done.code}\n{done.out}\n{done.err}"
    assert (len(errors), len(hints), done.out) == (1, 1, ""), f"{done.out}\n{done.err}"
    assert lines[-2:] == [errors[0], hints[0]], lines
    assert "Traceback" not in done.err
    return errors[0]


def check_clean(text: str) -> None:
    """A terminal that shows this obeys nobody."""
    assert all(character == "\n" or character.isprintable() for character in text), ascii(text)


def left_in(home: Path) -> set[str]:
    """Everything a release could have left in a home: data, visible names, statements, journals."""
    places = (layout.DATA, layout.STORE, layout.MODELS, layout.MANIFESTS, layout.JOURNAL)
    return {str(path.relative_to(home)) for place in places for path in (home / place).rglob("*")}


class Sampler:
    """Opens every visible file of a home, about a hundred times a second, and compares it with what was signed."""

    def __init__(self, home: Path, files: Mapping[str, bytes]) -> None:
        self._home = home
        self._files = files
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.looks = 0
        self.seen: set[str] = set()
        self.wrong: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        if exc is None:
            assert self.wrong == []

    def _run(self) -> None:
        while not self._over.wait(0.01):
            self._look()
        self._look()

    def _look(self) -> None:
        self.looks += 1
        for folder, _, names in os.walk(self._home / layout.STORE):
            for name in names:
                path = Path(folder, name)
                # Below store/<info-hash>/<revision>/; the record beside it, and names of a moment, are not files of the model.
                parts = path.relative_to(self._home / layout.STORE).parts[2:]
                if not parts or name.endswith(".tmp"):
                    continue
                try:
                    found = path.read_bytes()
                except FileNotFoundError:
                    continue
                self.seen.add("/".join(parts))
                if found != self._files.get("/".join(parts)):
                    self.wrong.append(str(path))


@dataclass
class Witness:
    """An honest seed that is not ours: plain libtorrent in this process, which remembers every block it sent."""

    case: Case
    folder: Path
    max_up: int = 0
    host: str = "127.0.0.1"
    sent: list[tuple[int, int]] = field(default_factory=list)
    """(piece, block) in the order they left."""

    def __enter__(self) -> Self:
        for path, data in self.case.files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(data)
        self._session: Any = lt.session(
            {
                "listen_interfaces": f"{self.host}:0",
                "enable_dht": False,
                "enable_lsd": False,
                "enable_upnp": False,
                "enable_natpmp": False,
                "enable_incoming_utp": False,
                "enable_outgoing_utp": False,
                "webtorrent_stun_server": "",
                "allow_multiple_connections_per_ip": True,
                "alert_mask": _UPLOADS,
                "alert_queue_size": 1_000_000,
                "upload_rate_limit": self.max_up,
                # By default libtorrent serves local peers without limits.
                "send_buffer_watermark": 64 << 10 if self.max_up else 1 << 20,
            }
        )
        every = lt.ip_filter()
        every.add_rule("0.0.0.0", "255.255.255.255", 1 << self._session.global_peer_class_id)
        self._session.set_peer_class_filter(every)
        params = lt.load_torrent_buffer(self.case.release.torrent_bytes())
        params.save_path = str(self.folder)
        assert params.ti is not None
        info = params.ti.layout()
        params.have_pieces = [True] * info.num_pieces()
        params.renamed_files = {
            index: str(self.folder / info.file_path(index).removeprefix(info.name() + "/"))
            for index in range(info.num_files())
            if not info.file_flags(index) & lt.file_storage.flag_pad_file
        }
        params.flags = lt.torrent_flags.update_subscribe
        self._handle = self._session.add_torrent(params)
        wait_until(lambda: self._handle.status().is_seeding, 10, "the witness seeds")
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        del self._handle
        self._session = None

    @property
    def address(self) -> str:
        """`HOST:PORT` for --peer."""
        return f"{self.host}:{self._session.listen_port()}"

    @property
    def peers(self) -> int:
        """Connections now."""
        return int(self._handle.status().num_peers)

    def uploads(self) -> list[tuple[int, int]]:
        """Every (piece, block) sent so far."""
        for alert in self._session.pop_alerts():
            if isinstance(alert, lt.block_uploaded_alert):
                self.sent.append((alert.piece_index, alert.block_index))
        return self.sent

    @property
    def uploaded(self) -> int:
        """Payload bytes sent so far, by blocks."""
        return len(self.uploads()) * _BLOCK_BYTES


def pids_of(home: Path) -> list[int]:
    """Every live process that was told this home or its data folder: daemons, whoever started them."""
    found = []
    needle = str(home).encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                command = Path("/proc", entry, "cmdline").read_bytes()
                environment = Path("/proc", entry, "environ").read_bytes()
            except OSError:
                continue
            if needle in command or needle in environment:
                found.append(int(entry))
    return found


def children_of(pid: int) -> dict[int, str]:
    """Pid and command line of a process's children."""
    found = {}
    try:
        # Any of its threads may have started them.
        children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return {}
    for child in children:
        try:
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def wait_gone(home: Path, timeout_s: float = 10) -> None:
    """Until no process works on a home any more."""
    deadline = time.monotonic() + timeout_s
    while left := pids_of(home):
        assert time.monotonic() < deadline, (
            f"still running for {home}: {[Path(f'/proc/{pid}/cmdline').read_bytes() for pid in left]}"
        )
        time.sleep(0.05)
