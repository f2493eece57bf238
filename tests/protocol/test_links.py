"""Links: round trips, odd addresses, and magnets that pin bytes but prove nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelp2p.protocol.errors import FormatError, ModelP2PError, UntrustedError
from modelp2p.protocol.links import MAX_LINK_CHARS, Link, PeerAddress, parse_link
from modelp2p.protocol.names import ModelName, PublisherId

PUBLISHER = PublisherId("mp1" + "a2b3" * 13)
TOPIC, MANIFEST = "11" * 32, "22" * 32
LINK = Link(bytes.fromhex(TOPIC), ModelName("org", "model"), bytes.fromhex(MANIFEST), PUBLISHER)
PARTS = {"xt": f"urn:btmh:1220{TOPIC}", "dn": "org/model", "x.mp": MANIFEST, "x.pub": PUBLISHER}


def magnet(**changes: str | None) -> str:
    parts = PARTS | {key.replace("_", "."): value for key, value in changes.items()}
    return "magnet:?" + "&".join(f"{key}={value}" for key, value in parts.items() if value is not None)


def test_link_is_one_fixed_string() -> None:
    assert str(LINK) == f"magnet:?xt=urn:btmh:1220{TOPIC}&dn=org/model&x.mp={MANIFEST}&x.pub={PUBLISHER}"
    assert parse_link(str(LINK)) == LINK


URLS = st.from_regex(r"(https|udp)://[a-z0-9.]{1,20}(:[0-9]{1,4})?/[A-Za-z0-9?&=%+#;äöü ]{0,20}", fullmatch=True)
PEERS = st.sampled_from(["1.2.3.4:1", "[2001:db8::1]:16881", "[::1]:65535", "node-7.example.org:16881", "host:80"]).map(
    PeerAddress.parse
)
NAMES = st.from_regex(r"([a-zA-Z0-9][a-z0-9._]{0,9}/)?[A-Z0-9][a-z0-9_]{0,9}", fullmatch=True).filter(
    lambda name: ".." not in name
)


@given(
    st.binary(min_size=32, max_size=32),
    NAMES,
    st.lists(URLS, max_size=3).map(tuple),
    st.lists(URLS, max_size=3).map(tuple),
    st.lists(PEERS, max_size=3).map(tuple),
)
@settings(max_examples=50)
def test_round_trip(
    digest: bytes, name: str, trackers: tuple[str, ...], seeds: tuple[str, ...], peers: tuple[PeerAddress, ...]
) -> None:
    link = Link(digest, ModelName.parse(name), digest[::-1], PUBLISHER, trackers, seeds, peers)
    assert parse_link(str(link)) == link
    assert str(link).isascii()
    assert " " not in str(link)


@pytest.mark.parametrize(
    "text",
    [
        magnet(x_mp=None),
        magnet(x_pub=None),
        magnet(x_mp=None, x_pub=None),
        "magnet:?xt=urn:btih:" + "a" * 40,
        "magnet:?",
    ],
)
def test_bare_magnet_is_refused_with_exit_code_4_and_a_hint(text: str) -> None:
    with pytest.raises(UntrustedError) as caught:
        parse_link(text)
    assert caught.value.kind.exit_code == 4
    assert "bundle" in caught.value.hint


ODD = {
    "empty": "",
    "http": "http://example.org/?" + magnet().split("?")[1],
    "magnet without a question mark": "magnet:",
    "magnet with a host": "magnet://host/?" + magnet().split("?")[1],
    "magnet with an open bracket": "magnet://[?" + magnet().split("?")[1],
    "no topic": magnet(xt=None),
    "v1 topic": magnet(xt="urn:btih:" + "a" * 40),
    "topic of another hash": magnet(xt="urn:btmh:1114" + "a" * 40),
    "topic too short": magnet(xt="urn:btmh:1220" + "a" * 62),
    "topic in capitals": magnet(xt="urn:btmh:1220" + "A" * 64),
    "two topics": magnet() + f"&xt=urn:btmh:1220{MANIFEST}",
    "two numbered topics": magnet() + f"&xt.2=urn:btmh:1220{MANIFEST}",
    "two publishers": magnet() + f"&x.pub={PUBLISHER}",
    "two manifests": magnet() + f"&x.mp={MANIFEST}",
    "manifest too short": magnet(x_mp="22" * 20),
    "manifest not hex": magnet(x_mp="zz" * 32),
    "publisher of another form": magnet(x_pub="mp1"),
    "no name": magnet(dn=None),
    "name that escapes": magnet(dn="../../etc"),
    "name that escapes, encoded": magnet(dn="%2e%2e%2fetc"),
    "name with NUL": magnet(dn="org/a%00"),
    "tracker with newline": magnet(tr="udp://a%0aHost:"),
    "web seed with escape": magnet(ws="https://a/%1b[2J"),
    "peer without port": magnet(x_pe="host"),
    "peer of port 0": magnet(x_pe="host:0"),
    "peer of port 65536": magnet(x_pe="host:65536"),
    "naked IPv6": magnet(x_pe="::1:80"),
    "bad UTF-8": magnet(dn="%ff"),
    "newline": magnet() + "\n",
    "not ASCII": magnet(dn="org/mödel"),
    "one character too long": magnet() + "&tr=" + "a" * (MAX_LINK_CHARS - len(magnet()) - 3),
    "257 parts": magnet() + "&a=b" * 253,
    "absurd": "magnet:?" + "&" * 10_000_000,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_link_is_refused(name: str) -> None:
    with pytest.raises(UntrustedError):
        parse_link(ODD[name])


def test_limits_are_reached_before_they_refuse() -> None:
    assert len(parse_link(magnet() + "&tr=" + "a" * (MAX_LINK_CHARS - len(magnet()) - 4)).trackers[0]) > 15_000
    assert parse_link(magnet() + "&a=b" * 252) == LINK


def test_other_magnets_habits_are_understood() -> None:
    text = magnet() + "&xt=urn:btih:" + "a" * 40 + "&tr.1=udp://a:1&tr.2=udp://b:2&tr=udp://c:3&xl=5&so=1&x.new=1#fragment"
    assert parse_link(text).trackers == ("udp://a:1", "udp://b:2", "udp://c:3")


PEER_TEXTS = {
    "1.2.3.4:5": ("1.2.3.4", 5, True),
    "8.8.8.8:53": ("8.8.8.8", 53, True),
    "127.0.0.1:1": ("127.0.0.1", 1, False),
    "10.1.2.3:1": ("10.1.2.3", 1, False),
    "192.168.0.1:1": ("192.168.0.1", 1, False),
    "169.254.169.254:80": ("169.254.169.254", 80, False),
    "0.0.0.0:1": ("0.0.0.0", 1, False),
    "[::1]:16881": ("::1", 16881, False),
    "[fe80::1]:1": ("fe80::1", 1, False),
    "[fd00::1]:1": ("fd00::1", 1, False),
    "[::ffff:10.0.0.1]:1": ("::ffff:10.0.0.1", 1, False),
    "[2606:4700::1111]:1": ("2606:4700::1111", 1, True),
    "example.org:65535": ("example.org", 65535, False),
}


@pytest.mark.parametrize("text", PEER_TEXTS)
def test_peer_address_round_trip_and_whether_the_internet_routes_it(text: str) -> None:
    peer = PeerAddress.parse(text)
    assert (peer.host, peer.port, peer.is_public) == PEER_TEXTS[text]
    assert str(peer) == text
    assert parse_link(magnet(x_pe=text)).peers == (peer,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":1",
        "a:",
        "a:b",
        "a:-1",
        "a:+1",
        "a:1.0",
        "a:000001",
        "a:\u0661",
        "[::1]",
        "[::1]:",
        "[a:b]:1",
        "[host]:1",
        "[]:1",
        "::1:1",
        "a b:1",
        "a/b:1",
        "user@a:1",
        "a\n:1",
        "[fe80::1%eth0]:1",
        "a" * 254 + ":1",
        "[::1:2",
    ],
)
def test_what_is_no_peer_address_is_refused(text: str) -> None:
    with pytest.raises(ModelP2PError):
        PeerAddress.parse(text)


@given(st.text(max_size=80))
@settings(max_examples=150)
def test_any_text_gives_a_link_or_an_error_of_the_tree(text: str) -> None:
    for candidate in (text, "magnet:?" + text, magnet() + "&" + text):
        try:
            link = parse_link(candidate)
        except UntrustedError:
            continue
        assert parse_link(str(link)) == link


def test_format_error_is_an_untrusted_error() -> None:
    assert issubclass(FormatError, UntrustedError)
