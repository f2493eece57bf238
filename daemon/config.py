"""The daemon's configuration: its values, their defaults, and how TOML becomes them.

Invariants:
- a `Config` that exists is valid: every section reads each of its values through that value's own reader;
- an unknown section or key is an error that names the nearest known one, so a typing error never means "the default";
- `parse_config("")` is exactly `Config()`, and `parse_config(config_to_toml(config))` is `config` again.

It deliberately opens no file and reads no environment: text comes in, values go out. Flags win over the file, the file over
the defaults: `parse_config(text).replace(flags)`. How a value is written (sizes, addresses) is `daemon/settings.py`.
Spec: TOML 1.0, https://toml.io/en/v1.0.0
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

from modelp2p.daemon.settings import (
    account,
    address,
    boolean,
    bound,
    choice,
    count,
    host_name,
    http_origin,
    ip,
    listed,
    optional,
    rate,
    seconds,
    setting,
    size,
    text,
    toml_value,
    web_host,
)
from modelp2p.protocol.errors import UsageError
from modelp2p.protocol.webseeds import PATIENCE_S

Origin = Literal["default", "file", "flag"]

DEFAULT_PORT = 16881
DEFAULT_HTTP_PORT = 16880
# Below the ports that gateways move to: this one is written into the configuration of a proxy, and never moves.
DEFAULT_PUBLIC_HTTP_PORT = 16780
# Both families; the only addresses whose port may move when it is busy.
DEFAULT_LISTEN = (f"0.0.0.0:{DEFAULT_PORT}", f"[::]:{DEFAULT_PORT}")

# Each TOML file is a page or two; a megabyte is a wrong path.
MAX_CONFIG_BYTES = 1 << 20


class Discovery(NamedTuple):
    """Which ways of meeting peers are on, after profile and overrides."""

    dht: bool
    lsd: bool
    pex: bool
    utp: bool
    trackers: bool


# `wan` talks to strangers but never shouts into the local network; `lan` is the other way round, and without uTP, which
# yields to everything and reaches about a tenth of TCP's rate on a fast link.
_PROFILES: Mapping[str, Discovery] = {
    "wan": Discovery(dht=True, lsd=False, pex=True, utp=True, trackers=True),
    "lan": Discovery(dht=False, lsd=True, pex=True, utp=False, trackers=False),
}


class _Section:
    """Reads every value when built, so that `Network(max_up="200M")` and `max_up = "200M"` in a file mean the same."""

    __slots__ = ()

    @classmethod
    def section(cls) -> str:
        """The section's name in a file: `PublicHttp` is `[public_http]`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The section's keys, in the order they are declared."""
        return tuple(item.name for item in fields(cls))  # type: ignore[arg-type]  # every subclass is a dataclass

    def __post_init__(self) -> None:
        section = self.section()
        for item in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = item.metadata["read"](getattr(self, item.name), f"{section}.{item.name}")
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True, slots=True)
class Network(_Section):
    """How this node meets others, and how much it may send and receive."""

    profile: str = setting("wan", choice("wan", "lan"))
    """`wan`: over the internet, DHT and trackers on. `lan`: one site, local discovery on, no strangers."""
    listen: tuple[str, ...] = setting((), listed(address(zero_port=True)))
    """Addresses for TCP and UDP; port 0 picks a free one. Empty is `DEFAULT_LISTEN`: see `listen_on`."""
    dht: bool | None = setting(None, optional(boolean))
    """The distributed hash table; unset follows the profile."""
    lsd: bool | None = setting(None, optional(boolean))
    """Local service discovery by multicast; unset follows the profile."""
    pex: bool | None = setting(None, optional(boolean))
    """Peer exchange; unset follows the profile."""
    utp: bool | None = setting(None, optional(boolean))
    """The UDP transport beside TCP; unset follows the profile."""
    trackers: bool | None = setting(None, optional(boolean))
    """Trackers that a manifest or link names; unset follows the profile."""
    peers: tuple[str, ...] = setting((), listed(address()))
    """`host:port` of nodes that are offered to every swarm."""
    peers_file: str = setting("", text)
    """A file with one `host:port` a line, read with the configuration; empty is none."""
    max_up: int = setting(0, rate)
    """Upload limit of this node in bytes per second; 0 is unlimited."""
    max_down: int = setting(0, rate)
    """Download limit of this node in bytes per second; 0 is unlimited."""
    connections: int = setting(500, count(2, 65_000))
    """Most peer connections at once, over all releases."""

    @property
    def listen_on(self) -> tuple[str, ...]:
        """The addresses to listen on, never empty."""
        return self.listen or DEFAULT_LISTEN

    @property
    def port_may_move(self) -> bool:
        """Whether a busy port may give way to the next free one: only where nobody named a port."""
        return not self.listen

    @property
    def discovery(self) -> Discovery:
        """The profile's ways of meeting peers, with this section's overrides."""
        chosen = {name: getattr(self, name) for name in Discovery._fields if getattr(self, name) is not None}
        return _PROFILES[self.profile]._replace(**chosen)


@dataclass(frozen=True, slots=True)
class Store(_Section):
    """How the node uses its disk."""

    reserve: int = setting(10**9, size)
    """Bytes of the file system that a fetch never uses; 0 is none."""
    reservation: bool = setting(True, boolean)
    """Whether a fetch takes its whole room on disk before it asks for a byte. Off only where tests need a disk to fill up."""


@dataclass(frozen=True, slots=True)
class Policy(_Section):
    """Which authentic releases the node still refuses."""

    allow_code: bool = setting(False, boolean)
    """Whether pickles and code may be fetched. They run with the rights of whoever loads them, signed or not."""


@dataclass(frozen=True, slots=True)
class Fetch(_Section):
    """How a fetch behaves where its flags say nothing."""

    timeout_s: float = setting(300.0, seconds)
    """Seconds without a newly proven byte after which a fetch gives up."""


@dataclass(frozen=True, slots=True)
class Hashing(_Section):
    """How much of the machine hashing may use."""

    workers: int = setting(0, count(0, 1024))
    """Threads that hash; 0 is one for every core."""


@dataclass(frozen=True, slots=True)
class Control(_Section):
    """Who besides the daemon's own user may talk to it."""

    public: bool = setting(False, boolean)
    """Whether a service also opens `public.sock`, by which other users of the machine look, and fetch trusted names."""
    allow_users: tuple[str, ...] = setting((), listed(account))
    """Users who may use it, by name or number. Empty, with `allow_groups` empty too, is every user of the machine."""
    allow_groups: tuple[str, ...] = setting((), listed(account))
    """Groups whose members may use it, by name or number."""


@dataclass(frozen=True, slots=True)
class Gateway(_Section):
    """The Hugging Face endpoint on loopback; `modelp2p env` prints its address."""

    enabled: bool = setting(True, boolean)
    """Whether a daemon in the foreground, or a service, has one."""
    port: int | None = setting(None, optional(count(0, 65_535)))
    """Where it listens, on 127.0.0.1 and ::1; 0 picks a free one. Unset is 16880, or the next free one below it."""
    unknown: str = setting("deny", choice("deny", "fetch", "redirect"))
    """What becomes of what is not here. `deny`: an error. `fetch`: known releases of trusted publishers are fetched, the rest is
    denied. `redirect`: the client is sent to `origin`, to which it shows its own token."""
    origin: str = setting("https://huggingface.co", http_origin)
    """Where `redirect` sends clients."""


@dataclass(frozen=True, slots=True)
class PublicHttp(_Section):
    """HTTP for everybody: complete releases of trusted names as a web seed, their bundles, and their publishers."""

    enabled: bool = setting(False, boolean)
    """Whether a daemon in the foreground, or a service, listens for everybody."""
    listen: tuple[str, ...] = setting((f"127.0.0.1:{DEFAULT_PUBLIC_HTTP_PORT}",), listed(bound))
    """Addresses it listens on, without TLS: that is a proxy's. Port 0 picks a free one; any other never moves."""
    hosts: tuple[str, ...] = setting((), listed(host_name))
    """Names it is called by, such as that of the proxy. IP addresses and `localhost` are always answered."""
    proxies: tuple[str, ...] = setting(("127.0.0.1", "::1"), listed(ip))
    """Where reverse proxies connect from: every other address may hold 16 connections at once."""


@dataclass(frozen=True, slots=True)
class WebSeeds(_Section):
    """Copies on web servers that signed manifests name: asked where peers deliver nothing, and never believed."""

    enabled: bool = setting(True, boolean)
    """Whether this node asks any. `HF_HUB_OFFLINE=1` in the daemon's environment is `false`."""
    hosts: tuple[str, ...] = setting((), listed(web_host))
    """`host` or `host:port` that may be asked without encryption, and at a private address, such as a mirror of the site."""
    token_file: str = setting("", text)
    """A file with the token that `gateway.origin` is shown, and nobody else; empty is none."""
    patience_s: float = setting(PATIENCE_S, seconds)
    """Seconds for which peers may deliver next to nothing before web seeds are asked."""


@dataclass(frozen=True, slots=True)
class Log(_Section):
    """What the daemon says on stderr."""

    level: str = setting("info", choice("debug", "info", "warning", "error"))
    """The least important kind of line that is still written."""


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a site may set, by section."""

    network: Network = field(default_factory=Network)
    store: Store = field(default_factory=Store)
    policy: Policy = field(default_factory=Policy)
    fetch: Fetch = field(default_factory=Fetch)
    hashing: Hashing = field(default_factory=Hashing)
    control: Control = field(default_factory=Control)
    gateway: Gateway = field(default_factory=Gateway)
    public_http: PublicHttp = field(default_factory=PublicHttp)
    web_seeds: WebSeeds = field(default_factory=WebSeeds)
    log: Log = field(default_factory=Log)

    def get(self, key: str) -> object:
        """The value of one dotted key.

        Raises:
            UsageError: there is no such key.
        """
        _check_known(key)
        section, name = key.split(".")
        return getattr(getattr(self, section), name)

    def replace(self, changes: Mapping[str, object]) -> Config:
        """A copy in which each dotted key (`network.max_up`) has a new value, written as a file may write it.

        Raises:
            UsageError: an unknown key, or a value that its key does not take.
        """
        for key in changes:
            _check_known(key)
        sections = {}
        for section, kind in _SECTIONS.items():
            now = getattr(self, section)
            sections[section] = kind(**{name: changes.get(f"{section}.{name}", getattr(now, name)) for name in kind.names()})
        return Config(**sections)  # type: ignore[arg-type]  # _SECTIONS holds each field's own class


class Described(NamedTuple):
    """One line of `config show`."""

    key: str
    value: str
    origin: Origin


_SECTIONS: Mapping[str, type[_Section]] = {
    kind.section(): kind for kind in (Network, Store, Policy, Fetch, Hashing, Control, Gateway, PublicHttp, WebSeeds, Log)
}
KEYS: tuple[str, ...] = tuple(f"{section}.{name}" for section, kind in _SECTIONS.items() for name in kind.names())


def parse_config(source: str | Mapping[str, object]) -> Config:
    """The configuration that a TOML text (or its parsed form) describes; what it leaves out has its default.

    Raises:
        UsageError: not TOML, an unknown section or key (the nearest one is named), or a value of the wrong kind.
    """
    return Config().replace(_flat(source))


def keys_in(source: str | Mapping[str, object]) -> frozenset[str]:
    """The dotted keys that a TOML text sets, for `describe`.

    Raises:
        UsageError: as `parse_config`, except that values are not looked at.
    """
    return frozenset(_flat(source))


def describe(config: Config, *, from_file: Iterable[str] = (), from_flags: Iterable[str] = ()) -> tuple[Described, ...]:
    """Every key with its value as TOML and where it came from; an unset value is shown as what the profile gives."""
    flags, file = frozenset(from_flags), frozenset(from_file)
    for key in flags | file:
        _check_known(key)
    lines = []
    for key in KEYS:
        origin: Origin = "flag" if key in flags else "file" if key in file else "default"
        lines.append(Described(key, toml_value(_effective(config, key)), origin))
    return tuple(lines)


def config_to_toml(config: Config) -> str:
    """A TOML text that parses to exactly `config`; values that follow the profile are left out."""
    blocks = []
    for section, kind in _SECTIONS.items():
        values = {name: getattr(getattr(config, section), name) for name in kind.names()}
        lines = [f"{name} = {toml_value(value)}" for name, value in values.items() if value is not None]
        blocks.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def parse_peers_file(content: str) -> tuple[str, ...]:
    """The `host:port` entries of a peers file in order, each once; `#` starts a comment.

    Raises:
        UsageError: a line is not `host:port`; the message names it by number.
    """
    read = address()
    peers: dict[str, None] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if entry:
            peers[read(entry, f"peers file, line {number}")] = None
    return tuple(peers)


def _effective(config: Config, key: str) -> object:
    if key == "network.listen":
        return config.network.listen_on
    if key == "gateway.port" and config.gateway.port is None:
        return DEFAULT_HTTP_PORT
    value = config.get(key)
    return getattr(config.network.discovery, key.partition(".")[2]) if value is None else value


def _flat(source: str | Mapping[str, object]) -> dict[str, object]:
    if isinstance(source, str):
        if len(source.encode("utf-8", "surrogatepass")) > MAX_CONFIG_BYTES:
            raise UsageError(f"The configuration is larger than {MAX_CONFIG_BYTES} bytes")
        try:
            source = tomllib.loads(source)
        except tomllib.TOMLDecodeError as exc:
            raise UsageError(f"The configuration is not TOML: {exc}") from exc
    flat: dict[str, object] = {}
    for section, table in source.items():
        if section not in _SECTIONS:
            raise _unknown(section, (*_SECTIONS, *KEYS))
        if not isinstance(table, Mapping):
            raise UsageError(f"{section} is a section, not a value", hint=f"Write [{section}] and its keys below it.")
        for name, value in table.items():
            _check_known(f"{section}.{name}")
            flat[f"{section}.{name}"] = value
    return flat


def _check_known(key: str) -> None:
    if key not in KEYS:
        raise _unknown(key, KEYS)


def _unknown(key: str, known: tuple[str, ...]) -> UsageError:
    name = key.rpartition(".")[2]
    # A right key in the wrong section is the likelier mistake than a similar word in the right one.
    same_name = [other for other in known if other.rpartition(".")[2] == name]
    nearest = (same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.0))[0]
    return UsageError(f"Unknown configuration key {key}", hint=f"Did you mean {nearest}?", key=key, nearest=nearest)
