"""A daemon that answers from a table, and a way to run one command line against it in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from modelp2p.cli.main import run
from modelp2p.protocol import codec
from modelp2p.protocol.errors import DaemonError, FormatError, ModelP2PError
from modelp2p.protocol.kinds import FileKind
from modelp2p.protocol.manifest import FileEntry, Lineage, Manifest, Origin, encode_manifest
from modelp2p.protocol.names import ModelName, Revision

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map, Value

REVISION = "0123456789abcdef0123456789abcdef01234567"
INFO_HASH = "ab" * 32
MANIFEST = "cd" * 32
PUBLISHER = "mp1" + "a" * 52
LINK = f"magnet:?xt=urn:btmh:1220{INFO_HASH}&dn=lab/model&x.mp={MANIFEST}&x.pub={PUBLISHER}"
PATH = f"/home/models/lab/model/{REVISION}"

RELEASE: Map = {
    "name": "lab/model",
    "revision": REVISION,
    "info_hash": INFO_HASH,
    "manifest": MANIFEST,
    "publisher": PUBLISHER,
    "name_verified": True,
    "state": "complete",
    "size": 3_000_000,
    "proven": 3_000_000,
    "sequence": 1,
    "error": "",
}
FETCHED: Map = {
    "path": PATH,
    "name": "lab/model",
    "revision": REVISION,
    "info_hash": INFO_HASH,
    "publisher": PUBLISHER,
    "name_verified": True,
    "state": "complete",
    "bytes": 3_000_000,
    "from_peers": 3_000_000,
    "from_web": 0,
    "reused": 0,
    "milliseconds": 1500,
}
PLANNED_FILES: list[Value] = [
    {"path": "a.safetensors", "size": 10, "have": 10},
    {"path": "b.safetensors", "size": 20, "have": 0},
]
PLAN: Map = {
    "name": "lab/model",
    "revision": REVISION,
    "info_hash": INFO_HASH,
    "publisher": PUBLISHER,
    "name_verified": True,
    "bytes": 30,
    "needed_bytes": 20,
    "free_bytes": 1000,
}
STATUS: Map = {
    "node": {
        "pid": 7,
        "listen_port": 16881,
        "profile": "wan",
        "publisher_ids": [PUBLISHER],
        "uptime_s": 65,
        "home": "/home",
        "landlock": 4,
        "engine_pid": 8,
        "on_demand": False,
    },
    "releases": [{**RELEASE, "rate_down": 5_000_000, "rate_up": 0, "peers": 2, "uploaded": 12}],
}
SHOWN_ROW: Map = {**RELEASE, "manifest_hash": MANIFEST, "path": PATH, "statements": 1}
"""What the daemon itself says to `show`; it sends `SHOWN_MANIFEST` along."""
SHOWN_MANIFEST = Manifest(
    name=ModelName.parse("lab/model"),
    revision=Revision(REVISION),
    created=1_700_000_000,
    sequence=1,
    info_hash=bytes.fromhex(INFO_HASH),
    piece_length=1 << 20,
    files=(FileEntry("a.safetensors", 3_000_000, bytes(32), b"\x11" * 32, "sha256", None, FileKind.WEIGHTS),),
    license="apache-2.0",
    lineage=(Lineage("finetune", "lab/base", Revision(REVISION), bytes.fromhex(INFO_HASH)),),
    origin=Origin("lab/model", Revision(REVISION)),
    web_seeds=("https://example.org/",),
    notes=(("compute", "12 GPU hours"),),
)
SHOWN: Map = {
    **SHOWN_ROW,
    "created": 1_700_000_000,
    "license": "apache-2.0",
    "license_file": None,
    "lineage": [{"relation": "finetune", "name": "lab/base", "revision": REVISION, "info_hash": INFO_HASH}],
    "origin": {"repo": "lab/model", "commit": REVISION},
    "web_seeds": ["https://example.org/"],
    "trackers": [],
    "notes": {"compute": "12 GPU hours"},
    "piece_length": 1 << 20,
    "files": [
        {"path": "a.safetensors", "size": 3_000_000, "root": "00" * 32, "sha256": "11" * 32, "kind": "weights", "etag": "11" * 32}
    ],
    "link": f"{LINK}&ws=https%3A%2F%2Fexample.org%2F",
}
"""What `show --json` makes of the two."""


@dataclass(frozen=True)
class FakeReply:
    result: Map
    fds: tuple[int, ...] = ()

    def read_fds(self, limit_bytes: int) -> list[bytes]:
        contents = []
        for fd in self.fds:
            size = os.fstat(fd).st_size
            if size > limit_bytes:
                raise FormatError("too large")
            contents.append(os.pread(fd, size, 0))
            os.close(fd)
        return contents


Answer: TypeAlias = "Map | FakeReply | BaseException | Callable[[Map, Sequence[int]], FakeReply]"


class Asked(NamedTuple):
    verb: str
    args: Map
    contents: list[bytes]
    """What the descriptors held that were files."""


@dataclass
class FakeDaemon:
    """Answers each verb from `answers` after sending `events`; notes what it was asked."""

    answers: Mapping[str, Answer]
    events: Sequence[Map] = ()
    is_running: bool = True
    service: FakeDaemon | ModelP2PError | None = None
    """The machine's service, or how it refuses this user."""
    asked: list[Asked] = field(default_factory=list)
    started_with: str | None = None
    closed: int = 0
    detached: int = 0

    def connect(self, home: str) -> FakeClient:
        if not self.is_running:
            raise DaemonError(f"no daemon is running for {home}", hint="Start one.")
        return FakeClient(self, None)

    def connect_service(self) -> FakeClient:
        if isinstance(self.service, ModelP2PError):
            raise self.service
        if self.service is None:
            raise DaemonError("no service answers")
        return FakeClient(self.service, None)

    def start(self, home: str, config_toml: str) -> FakeClient:
        self.started_with = config_toml
        return FakeClient(self, 4321)


@dataclass
class FakeClient:
    daemon: FakeDaemon
    started_pid: int | None

    def call(self, verb: str, args: Map, fds: Sequence[int] = (), on_event: Callable[[Map], None] | None = None) -> FakeReply:
        self.daemon.asked.append(Asked(verb, args, [_content(fd) for fd in fds]))
        for event in self.daemon.events:
            if on_event is not None:
                on_event(event)
        answer = self.daemon.answers[verb]
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, FakeReply):
            return answer
        return answer(args, fds) if callable(answer) else FakeReply(dict(answer))

    def detach(self) -> None:
        self.daemon.detached += 1

    def close(self) -> None:
        self.daemon.closed += 1


def modelp2p(*args: str, daemon: FakeDaemon | None = None, env: Mapping[str, str] | None = None) -> int:
    """The exit code of one command line; what it prints goes to this process's stdout and stderr."""
    return run(args, daemon or FakeDaemon({}), {**os.environ, **(env or {})})


def memory(data: bytes) -> int:
    """A descriptor with `data`, as the daemon sends one; whoever gets the reply closes it."""
    fd = os.memfd_create("test")
    os.write(fd, data)
    return fd


def shows(*more: bytes, manifest: Manifest = SHOWN_MANIFEST) -> Callable[[Map, Sequence[int]], FakeReply]:
    """The `show` of a daemon that sends a manifest, and `more` descriptors after it."""
    return lambda args, fds: FakeReply(dict(SHOWN_ROW), tuple(memory(data) for data in (encode_manifest(manifest), *more)))


def plans() -> FakeDaemon:
    """A daemon that answers a dry run."""
    return FakeDaemon({"fetch": lambda args, fds: FakeReply(dict(PLAN), (memory(codec.pack({"files": PLANNED_FILES})),))})


def failing(error: ModelP2PError, verb: str = "fetch") -> FakeDaemon:
    """A daemon that answers `verb` with an error."""
    return FakeDaemon({verb: error})


def _content(fd: int) -> bytes:
    try:
        return os.pread(fd, 1 << 20, 0)
    except OSError:
        return b""  # a folder
