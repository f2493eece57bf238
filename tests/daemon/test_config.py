from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.daemon.config import (
    DEFAULT_LISTEN,
    KEYS,
    MAX_CONFIG_BYTES,
    Config,
    Control,
    Described,
    Discovery,
    Fetch,
    Gateway,
    Hashing,
    Log,
    Network,
    Policy,
    PublicHttp,
    Store,
    WebSeeds,
    config_to_toml,
    describe,
    keys_in,
    parse_config,
    parse_peers_file,
)
from modelp2p.daemon.settings import Endpoint, parse_quantity, split_address
from modelp2p.protocol.errors import UsageError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def read(name: str) -> str:
    return (CONFIGS / name).read_text(encoding="utf-8")


def test_default_file_parses_to_exactly_the_defaults() -> None:
    assert parse_config(read("default.toml")) == Config()


def test_default_file_shows_every_key() -> None:
    shown = re.sub(r"^# (\w+ = )", r"\1", read("default.toml"), flags=re.MULTILINE)
    assert keys_in(shown) == frozenset(KEYS)


def test_commented_discovery_in_the_default_file_is_what_its_profile_gives() -> None:
    shown = re.sub(r"^# (\w+ = )", r"\1", read("default.toml"), flags=re.MULTILINE)
    assert parse_config(shown).network.discovery == Config().network.discovery


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.toml")))
def test_every_profile_we_ship_is_valid(name: str) -> None:
    assert parse_config(read(name)) == parse_config(tomllib.loads(read(name)))


def test_cluster_profile_shouts_nowhere() -> None:
    network = parse_config(read("cluster.toml")).network
    assert network.discovery == Discovery(dht=False, lsd=False, pex=True, utp=False, trackers=False)
    assert not network.port_may_move


def test_empty_text_is_the_defaults() -> None:
    assert parse_config("") == Config() == parse_config({})


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("wan", Discovery(dht=True, lsd=False, pex=True, utp=True, trackers=True)),
        ("lan", Discovery(dht=False, lsd=True, pex=True, utp=False, trackers=False)),
    ],
)
def test_profile_decides_what_is_not_named(profile: str, expected: Discovery) -> None:
    assert Network(profile=profile).discovery == expected
    named = Network(profile=profile, dht=not expected.dht, lsd=not expected.lsd)
    assert named.discovery == expected._replace(dht=not expected.dht, lsd=not expected.lsd)


def test_only_an_unnamed_port_may_move() -> None:
    assert Config().network.listen_on == DEFAULT_LISTEN
    assert Config().network.port_may_move
    named = Network(listen=DEFAULT_LISTEN)
    assert named.listen_on == DEFAULT_LISTEN
    assert not named.port_may_move


UNKNOWN = {
    "a letter missing": ("[network]\nprofle = 'lan'", "network.profile"),
    "the other section": ("[network]\nreserve = '1G'", "store.reserve"),
    "a section misspelled": ("[netwrok]\ndht = true", "network"),
    "a key without its section": ("max_up = '1M'", "network.max_up"),
    "a word like no other": ("[fetch]\nzzz = 1", "fetch.timeout_s"),
}


@pytest.mark.parametrize(("source", "nearest"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_key_names_the_nearest(source: str, nearest: str) -> None:
    with pytest.raises(UsageError, match="Unknown configuration key") as caught:
        parse_config(source)
    assert caught.value.facts["nearest"] == nearest
    assert nearest in caught.value.hint


WRONG = {
    "not TOML": "[network",
    "duplicate key": "[log]\nlevel = 'info'\nlevel = 'info'",
    "section as a value": "network = 3",
    "unknown profile": "[network]\nprofile = 'LAN'",
    "number for a switch": "[network]\ndht = 1",
    "switch for a number": "[network]\nconnections = true",
    "fraction for a count": "[hashing]\nworkers = 1.5",
    "negative count": "[hashing]\nworkers = -1",
    "too many connections": "[network]\nconnections = 65001",
    "text for a list": "[network]\npeers = 'a:1'",
    "peer without a port": "[network]\npeers = ['node1']",
    "peer with port 0": "[network]\npeers = ['node1:0']",
    "peer with a port too high": "[network]\npeers = ['node1:65536']",
    "peer with a bare IPv6 address": "[network]\npeers = ['::1:80']",
    "peer with other digits": "[network]\npeers = ['node1:٣']",
    "listen on a bad IPv6 address": "[network]\nlisten = ['[::g]:1']",
    "peers file with a hidden character": '[network]\npeers_file = "a\\u202eb"',
    "unit in bits": "[network]\nmax_up = '200Mbit'",
    "unit of nobody": "[network]\nmax_up = '1 X'",
    "negative rate": "[network]\nmax_up = -1",
    "rate as a fraction": "[network]\nmax_up = 1.5",
    "rate beyond 64 bit": "[network]\nmax_up = '9223373T'",
    "size per second": "[store]\nreserve = '1G/s'",
    "no time at all": "[fetch]\ntimeout_s = 0",
    "time without end": "[fetch]\ntimeout_s = inf",
    "time that is no number": "[fetch]\ntimeout_s = nan",
    "time as text": "[fetch]\ntimeout_s = '5m'",
    "user by a fraction": "[control]\nallow_users = [1.5]",
    "user by a negative number": "[control]\nallow_users = [-1]",
    "group by a switch": "[control]\nallow_groups = [true]",
    "user with a space": "[control]\nallow_users = ['a b']",
    "a port that does not exist": "[gateway]\nport = 65536",
    "a port as an address": "[gateway]\nport = '0.0.0.0:16880'",
    "unknown policy": "[gateway]\nunknown = 'allow'",
    "origin without a scheme": "[gateway]\norigin = 'huggingface.co'",
    "origin with a path": "[gateway]\norigin = 'https://huggingface.co/x'",
    "origin with a user": "[gateway]\norigin = 'https://me@huggingface.co'",
    "origin with a line": '[gateway]\norigin = "https://a\\nb"',
    "origin with a port too high": "[gateway]\norigin = 'https://a:65536'",
    "everybody at a name": "[public_http]\nlisten = ['localhost:80']",
    "everybody at no port": "[public_http]\nlisten = ['127.0.0.1']",
    "a host with a port": "[public_http]\nhosts = ['models.example.org:443']",
    "a host with a path": "[public_http]\nhosts = ['models.example.org/x']",
    "a proxy by name": "[public_http]\nproxies = ['proxy']",
    "a proxy as a network": "[public_http]\nproxies = ['10.0.0.0/8']",
    "a web host as a URL": "[web_seeds]\nhosts = ['http://mirror']",
    "a web host with a path": "[web_seeds]\nhosts = ['mirror/x']",
    "a web host at port 0": "[web_seeds]\nhosts = ['mirror:0']",
    "a web host without brackets": "[web_seeds]\nhosts = ['2001:db8::1']",
    "no web host": "[web_seeds]\nhosts = ['']",
    "a web host as a number": "[web_seeds]\nhosts = [1]",
    "no patience at all": "[web_seeds]\npatience_s = 0",
    "unknown level": "[log]\nlevel = 'loud'",
}


@pytest.mark.parametrize("source", WRONG.values(), ids=WRONG.keys())
def test_wrong_value_is_refused(source: str) -> None:
    with pytest.raises(UsageError):
        parse_config(source)


def test_wrong_value_names_its_key_and_place() -> None:
    with pytest.raises(UsageError, match=r"network\.peers\[1\] must be host:port"):
        parse_config({"network": {"peers": ["a:1", "b"]}})


def test_text_beyond_its_limit_is_refused_unread() -> None:
    assert parse_config("#" * MAX_CONFIG_BYTES) == Config()
    with pytest.raises(UsageError, match="larger than"):
        parse_config("#" * (MAX_CONFIG_BYTES + 1))


QUANTITIES = {
    "number": (1500, 1500),
    "digits": ("0", 0),
    "decimal": ("200M", 200_000_000),
    "lower-case kilo": ("3k", 3000),
    "upper-case kilo": ("3K", 3000),
    "binary": ("1Gi", 1 << 30),
    "with B": ("64KiB", 65_536),
    "with a blank": ("2 T", 2 * 10**12),
    "fraction": ("1.5G", 1_500_000_000),
    "fraction cut to bytes": ("0.0015k", 1),
    "largest": (2**63 - 1, 2**63 - 1),
}


@pytest.mark.parametrize(("written", "expected"), QUANTITIES.values(), ids=QUANTITIES.keys())
def test_quantity_is_read_in_bytes(written: str | int, expected: int) -> None:
    assert parse_quantity(written, "--max-up", per_second=True) == expected
    assert parse_quantity(written, "--reserve") == expected


def test_rate_may_say_per_second() -> None:
    assert Network(max_up="12.5MB/s").max_up == 12_500_000  # type: ignore[arg-type]  # text is read like a file's


def test_address_is_taken_apart() -> None:
    assert split_address("[fe80::1]:16881", "--peer") == Endpoint("fe80::1", 16881)
    assert split_address("node-7.cluster:1", "--peer") == Endpoint("node-7.cluster", 1)


def test_replace_reads_flags_like_a_file_and_keeps_the_rest() -> None:
    config = parse_config("[network]\nmax_up = '1M'\n[store]\nreserve = 7")
    changed = config.replace({"network.max_up": "2M", "fetch.timeout_s": 5, "network.listen": ["127.0.0.1:0"]})
    assert changed.get("network.max_up") == 2_000_000
    assert changed.fetch.timeout_s == 5.0
    assert changed.network.listen_on == ("127.0.0.1:0",)
    assert changed.store == config.store
    assert config.network.max_up == 1_000_000


@pytest.mark.parametrize("key", ["network", "network.maxup", "max_up"])
def test_replace_and_get_refuse_an_unknown_key(key: str) -> None:
    with pytest.raises(UsageError):
        Config().replace({key: 1})
    with pytest.raises(UsageError):
        Config().get(key)


def test_describe_names_the_origin_of_each_value() -> None:
    source = "[network]\nprofile = 'lan'\nmax_up = '1k'"
    config = parse_config(source).replace({"network.max_up": "2k"})
    lines = {line.key: line for line in describe(config, from_file=keys_in(source), from_flags=["network.max_up"])}
    assert tuple(lines) == KEYS
    assert lines["network.profile"] == Described("network.profile", '"lan"', "file")
    assert lines["network.max_up"] == Described("network.max_up", "2000", "flag")
    assert lines["network.dht"] == Described("network.dht", "false", "default")
    assert lines["gateway.port"] == Described("gateway.port", "16880", "default")
    assert lines["network.listen"].value == '["0.0.0.0:16881", "[::]:16881"]'


SWITCH = st.none() | st.booleans()
RATE = st.integers(0, 2**63 - 1)
ADDRESSES = st.lists(st.sampled_from(["node1:1", "10.0.0.1:65535", "[::1]:16881"]), unique=True).map(tuple)
ACCOUNTS = st.lists(st.sampled_from(["alice", "1001", "DOM.b@c-d"]), unique=True).map(tuple)
CONFIGURATIONS = st.builds(
    Config,
    network=st.builds(
        Network,
        profile=st.sampled_from(["wan", "lan"]),
        listen=ADDRESSES,
        dht=SWITCH,
        utp=SWITCH,
        peers=ADDRESSES,
        peers_file=st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])),
        max_up=RATE,
        max_down=RATE,
        connections=st.integers(2, 65_000),
    ),
    store=st.builds(Store, reserve=RATE, reservation=st.booleans()),
    policy=st.builds(Policy, allow_code=st.booleans()),
    fetch=st.builds(Fetch, timeout_s=st.floats(min_value=1e-3, max_value=1e9)),
    hashing=st.builds(Hashing, workers=st.integers(0, 1024)),
    control=st.builds(Control, public=st.booleans(), allow_users=ACCOUNTS, allow_groups=ACCOUNTS),
    gateway=st.builds(
        Gateway,
        enabled=st.booleans(),
        port=st.none() | st.integers(0, 65_535),
        unknown=st.sampled_from(["deny", "fetch", "redirect"]),
        origin=st.sampled_from(["https://hub.example", "http://127.0.0.1:8080", "https://[::1]"]),
    ),
    public_http=st.builds(
        PublicHttp,
        enabled=st.booleans(),
        listen=st.lists(st.sampled_from(["0.0.0.0:80", "[::]:0"]), unique=True).map(tuple),
        hosts=st.lists(st.sampled_from(["models.example.org", "Cache"]), unique=True).map(tuple),
        proxies=st.lists(st.sampled_from(["10.0.0.1", "2001:db8:0:0::1"]), unique=True).map(tuple),
    ),
    web_seeds=st.builds(
        WebSeeds,
        enabled=st.booleans(),
        hosts=st.lists(st.sampled_from(["mirror", "Mirror:8080", "10.1.2.3", "[::1]", "[::1]:80"]), unique=True).map(tuple),
        token_file=st.sampled_from(["", "/run/credentials/modelp2p/token"]),
        patience_s=st.floats(0.1, 1000),
    ),
    log=st.builds(Log, level=st.sampled_from(["debug", "info", "warning", "error"])),
)


@pytest.mark.slow
@given(CONFIGURATIONS)
def test_written_configuration_reads_back_as_itself(config: Config) -> None:
    assert parse_config(config_to_toml(config)) == config


def test_a_final_slash_is_no_path() -> None:
    assert parse_config("[gateway]\norigin = 'https://hub.example:8443/'").gateway.origin == "https://hub.example:8443"


def test_peers_file_gives_each_peer_once_in_order() -> None:
    content = "# seeds\nnode2:16881\n\n  node1:16881  # rack 4\r\nnode2:16881\n[fe80::1]:7\n"
    assert parse_peers_file(content) == ("node2:16881", "node1:16881", "[fe80::1]:7")
    assert parse_peers_file("") == ()


def test_peers_file_names_the_bad_line() -> None:
    with pytest.raises(UsageError, match="line 2"):
        parse_peers_file("node1:1\nnode2\n")
