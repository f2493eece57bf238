"""When web seeds are used, which URLs they are, and which addresses count as public."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelp2p.protocol.errors import FormatError
from modelp2p.protocol.webseeds import (
    ENOUGH_BYTES,
    FIRST_REST_S,
    LAST_REST_S,
    MAX_ORIGINS,
    MAX_RETRY_AFTER_S,
    PATIENCE_S,
    HttpUrl,
    OriginError,
    Shares,
    WebOrigin,
    WebSeedPlan,
    is_public_address,
    retry_after_s,
    usable_origins,
)

REVISION = "ab" * 20
TWO = (WebOrigin("https://a.example/", "a.example"), WebOrigin("https://b.example/", "b.example"))
BUSY = OriginError("429", 60.0)
BROKEN = OriginError("the connection broke")
WALL = datetime(2026, 11, 23, 14, 0, 30, tzinfo=UTC)
JUST = 1e-6
"""Less than anything the plan counts in."""


def plan() -> WebSeedPlan:
    """Two origins, begun at 100."""
    return WebSeedPlan(TWO, 100.0)


def test_peers_get_patience_at_the_start_and_after_each_delivery() -> None:
    seeds = plan()
    assert seeds.usable(100 + PATIENCE_S - JUST) == ()
    assert seeds.next_deadline(100.0) == 100 + PATIENCE_S
    assert seeds.usable(100 + PATIENCE_S) == (0, 1)
    assert seeds.next_deadline(100 + PATIENCE_S) is None
    seeds.heard_peers(ENOUGH_BYTES, 110.0)
    assert seeds.usable(110.0) == ()
    assert seeds.usable(110 + PATIENCE_S) == (0, 1)
    # The same count again is no byte.
    seeds.heard_peers(ENOUGH_BYTES, 115.0)
    assert seeds.usable(115.0) == (0, 1)


def test_peers_that_drip_do_not_keep_the_origins_away() -> None:
    seeds, enough_in_s = plan(), 2 * PATIENCE_S
    for second in range(1, 100):
        seeds.heard_peers(int(second / enough_in_s * ENOUGH_BYTES), 100.0 + second)
        assert seeds.usable(100.0 + second) == (() if second < PATIENCE_S else (0, 1))
    # From what they sent in a long time follows nothing for what they send now.
    seeds.heard_peers(100 * ENOUGH_BYTES, 300.0)
    assert seeds.usable(300.0) == ()


def test_peers_deliver_where_it_is_enough_in_sum() -> None:
    seeds = plan()
    for second in range(1, 100):
        seeds.heard_peers(second * (ENOUGH_BYTES // 4), 100.0 + second)
        assert seeds.usable(100.0 + second) == ()


def test_a_server_that_names_a_time_rests_as_long() -> None:
    seeds = plan()
    seeds.failed(0, BUSY, 200.0)
    assert seeds.usable(200.0) == (1,)
    assert seeds.next_deadline(200.0) == 260.0
    assert seeds.usable(260 - JUST) == (1,)
    assert seeds.usable(260.0) == (0, 1)


@pytest.mark.parametrize(("asked", "rests"), [(0.0, 1.0), (1.0, 1.0), (MAX_RETRY_AFTER_S + 1, MAX_RETRY_AFTER_S)])
def test_what_a_server_asks_for_has_bounds(asked: float, rests: float) -> None:
    seeds = plan()
    seeds.failed(0, OriginError("503", asked), 200.0)
    assert 0 not in seeds.usable(200 + rests - JUST)
    assert 0 in seeds.usable(200 + rests)


def test_failures_in_a_row_rest_longer_and_longer_until_one_delivers() -> None:
    seeds, now, rests = plan(), 200.0, []
    for _ in range(9):
        seeds.failed(0, BROKEN, now)
        deadline = seeds.next_deadline(now)
        assert deadline is not None
        rests.append(deadline - now)
        now = deadline
    assert rests == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    seeds.delivered(0)
    seeds.failed(0, BROKEN, now)
    assert seeds.next_deadline(now) == now + FIRST_REST_S


def test_what_fails_during_a_rest_was_asked_before_it() -> None:
    seeds = plan()
    seeds.failed(0, BROKEN, 200.0)
    for _ in range(5):
        seeds.failed(0, BROKEN, 201.0)
    assert seeds.usable(206.0) == (0, 1)
    # What it was told to do counts all the same.
    seeds.failed(0, BUSY, 206.0)
    seeds.failed(0, BROKEN, 206.0)
    assert seeds.usable(265.0) == (1,)


def test_many_failures_do_not_overflow() -> None:
    seeds, now = plan(), 200.0
    for _ in range(3000):
        seeds.failed(0, BROKEN, now)
        now += LAST_REST_S
    assert seeds.usable(now - JUST) == (1,)
    assert seeds.usable(now) == (0, 1)


def test_wrong_bytes_end_the_use_of_an_origin() -> None:
    seeds = plan()
    seeds.banned(1)
    assert seeds.usable(10_000.0) == (0,)
    seeds.failed(1, BROKEN, 10_000.0)
    assert seeds.next_deadline(10_000.0) is None
    assert seeds.reason(10_000.0, WALL) == "origin b.example: sent wrong bytes, not asked again"


def test_nobody_is_blamed_for_a_hold() -> None:
    seeds = plan()
    seeds.heard_peers(ENOUGH_BYTES, 101.0)
    seeds.held(True, 103.0)
    assert seeds.usable(150.0) == ()  # peers cannot deliver: no origin is begun
    seeds.held(False, 150.0)
    assert seeds.usable(150 + PATIENCE_S - 2 - JUST) == ()
    assert seeds.usable(150 + PATIENCE_S - 2) == (0, 1)
    # What is in use stays in use.
    seeds.held(True, 160.0)
    seeds.held(True, 161.0)
    assert seeds.usable(300.0) == (0, 1)
    seeds.held(False, 300.0)
    seeds.held(False, 301.0)
    assert seeds.usable(301.0) == (0, 1)


def test_bytes_that_come_during_a_hold_are_heard() -> None:
    seeds = plan()
    seeds.held(True, 102.0)
    seeds.heard_peers(ENOUGH_BYTES, 110.0)
    seeds.held(False, 112.0)
    # Heard at 110, held until 112: the patience begins at 112.
    assert seeds.usable(112 + PATIENCE_S - JUST) == ()
    assert seeds.usable(112 + PATIENCE_S) == (0, 1)


def test_the_reason_is_one_line_with_a_time_of_day_that_holds() -> None:
    seeds = plan()
    assert seeds.reason(200.0, WALL) == ""
    seeds.failed(0, OriginError("429", 90.0), 200.0)
    # 90 s from 14:00:30 is 14:02:00; from 14:00:31 it is 14:02:01, and 14:02 would be too early.
    assert seeds.reason(200.0, WALL) == "origin a.example: 429 until 14:02"
    assert seeds.reason(200.0, WALL + timedelta(seconds=1)) == "origin a.example: 429 until 14:03"
    seeds.banned(1)
    assert seeds.reason(200.0, WALL).count(";") == 1
    assert seeds.reason(290.0, WALL) == "origin b.example: sent wrong bytes, not asked again"


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["peers", "failed", "busy", "delivered", "banned", "held", "free"]),
        st.floats(0, 400, allow_nan=False),
        st.integers(0, 1),
    ),
    max_size=30,
)


@given(EVENTS)
def test_the_next_deadline_is_when_more_becomes_usable(events: list[tuple[str, float, int]]) -> None:
    seeds, now, count = plan(), 100.0, 0
    for kind, pause, number in events:
        now += pause
        match kind:
            case "peers":
                count += ENOUGH_BYTES
                seeds.heard_peers(count, now)
            case "failed":
                seeds.failed(number, BROKEN, now)
            case "busy":
                seeds.failed(number, OriginError("503", pause * 20), now)
            case "delivered":
                seeds.delivered(number)
            case "banned":
                seeds.banned(number)
            case _:
                seeds.held(kind == "held", now)
    seeds.held(False, now)
    allowed = {number for kind, _, number in events if kind == "banned"} ^ {0, 1}
    while (deadline := seeds.next_deadline(now)) is not None:
        # Nothing changes before it.
        assert seeds.usable(now) == seeds.usable(now + (deadline - now) / 2)
        assert now < deadline <= now + MAX_RETRY_AFTER_S
        now = deadline
    # Left alone, all come back but the banned.
    assert set(seeds.usable(now)) == allowed


SECONDS = {"0": 0.0, "120": 120.0, " 7 ": 7.0, "3601": 3600.0, "9" * 18: 3600.0}
NO_WISH = ("", "-1", "1.5", "soon", "+5", "9" * 19, "١٢", "Mon, 99 Nov 2026 14:00:00 GMT", "Mon, 23 Nov 2026 14:00:00")


@pytest.mark.parametrize(("header", "seconds"), SECONDS.items())
def test_retry_after_in_seconds(header: str, seconds: float) -> None:
    assert retry_after_s(header, WALL) == seconds


@pytest.mark.parametrize("header", NO_WISH)
def test_what_is_no_retry_after(header: str) -> None:
    assert retry_after_s(header, WALL) is None


@pytest.mark.parametrize(("ahead_s", "seconds"), [(90, 90.0), (-5, 0.0), (0, 0.0), (7200, 3600.0)])
def test_retry_after_as_a_date(ahead_s: int, seconds: float) -> None:
    header = format_datetime(WALL + timedelta(seconds=ahead_s), usegmt=True)
    assert retry_after_s(header, WALL) == seconds


def test_no_header_asks_for_nothing() -> None:
    assert retry_after_s(None, WALL) is None


@given(st.text())
def test_no_header_breaks_the_reader(header: str) -> None:
    found = retry_after_s(header, WALL)
    assert found is None or 0 <= found <= MAX_RETRY_AFTER_S


def test_a_url_is_taken_apart() -> None:
    assert HttpUrl.parse("https://Hub.Example/a%20b?x=1#part") == HttpUrl("https", "hub.example", 443, "/a%20b?x=1")
    assert HttpUrl.parse("http://h") == HttpUrl("http", "h", 80, "/")
    assert HttpUrl.parse("https://[2001:db8::1]:8443/").shown == "[2001:db8::1]:8443"
    assert HttpUrl.parse("https://h:443/").shown == "h"
    assert HttpUrl.parse("http://h:443/").shown == "h:443"


NOT_URLS = (
    "", "h", "/a", "//h/", "ftp://h/", "https://", "https:///a", "https://u@h/", "https://u:p@h/", "https://@h/", "https://h:0/",
    "https://h:99999/", "https://h:x/", "https://[::1/", "https://h/a b", "https://h/é",
    "https://h/\n", "https://h/" + "a" * 8192,
)  # fmt: skip


@pytest.mark.parametrize("url", NOT_URLS)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(FormatError):
        HttpUrl.parse(url)


@given(st.text())
def test_no_text_breaks_the_url_reader(url: str) -> None:
    with contextlib.suppress(FormatError):
        HttpUrl.parse(url)


def test_an_origin_is_scheme_host_and_port() -> None:
    hub = HttpUrl.parse("https://hub.example/x").origin
    assert HttpUrl.parse("https://HUB.example:443/y").origin == hub
    for other in ("http://hub.example/", "https://hub.example:444/", "https://hub.example.evil/", "https://cdn.hub.example/"):
        assert HttpUrl.parse(other).origin != hub


def test_unencrypted_only_where_the_host_is_listed() -> None:
    plain = HttpUrl.parse("http://mirror:8080/")
    assert not plain.is_allowed(())
    assert not plain.is_allowed(("mirror:80", "mirro", "mirror:8080.evil"))
    assert plain.is_allowed(("mirror",))
    assert plain.is_allowed(("mirror:8080",))
    assert HttpUrl.parse("http://[::1]:80/").is_allowed(("[::1]",))
    assert HttpUrl.parse("https://anywhere/").is_allowed(())


def test_usable_origins_keep_order_and_leave_out_the_rest() -> None:
    urls = ["https://b/", "http://a/", "https://c/?q", "https://c/#x", "nonsense", "https://b/", "http://mirror/"]
    assert [origin.base for origin in usable_origins(urls, ("mirror",))] == ["https://b/", "http://mirror/"]
    assert len(usable_origins([f"https://h{number}/" for number in range(20)], ())) == MAX_ORIGINS


def test_where_a_file_lies() -> None:
    origin = WebOrigin("https://hub.example/org/model/resolve/", "hub.example")
    without_slash = WebOrigin("https://hub.example/org/model/resolve", "hub.example")
    url = f"https://hub.example/org/model/resolve/{REVISION}/sub/a%20b%2B%25%23%C3%A4%3F.txt"
    assert origin.file_url(REVISION, "sub/a b+%#ä?.txt", is_only_file=False) == url
    assert origin.file_url(REVISION, "sub/a b+%#ä?.txt", is_only_file=True) == url
    assert without_slash.file_url(REVISION, "sub/a b+%#ä?.txt", is_only_file=False) == url
    # Only a release of one file may be named by the whole address of the file.
    whole = WebOrigin("https://hub.example/model.gguf", "hub.example")
    assert whole.file_url(REVISION, "model.gguf", is_only_file=True) == whole.base


@given(st.text(min_size=1))
def test_a_path_comes_back_out_of_its_url(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        return  # no path of a manifest
    url = TWO[0].file_url(REVISION, path, is_only_file=False)
    assert url.isascii()
    assert unquote(url.removeprefix(f"https://a.example/{REVISION}/")) == path


PUBLIC = ("1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::1.1.1.1", "192.88.99.1")
NOT_PUBLIC = (
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.2.1",
    "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
    "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001::1",
    "64:ff9b:1::10.0.0.1", "::127.0.0.1", "::ffff:0:10.0.0.1", "fec0::1", "5f00::1", "1::1",
)  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public_address(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_of_the_internet(address: str) -> None:
    assert not is_public_address(address)


def test_bytes_of_web_seeds_and_peers_are_told_apart() -> None:
    shares = Shares()
    shares.update(received=10, wasted=0, sent=0, is_on_duty=False)
    assert (shares.from_peers, shares.from_web) == (10, 0)
    # 100 handed over, of which 60 came so far.
    shares.update(received=70, wasted=0, sent=100, is_on_duty=True)
    assert (shares.from_peers, shares.from_web) == (10, 60)
    # The rest, and 5 of a peer's.
    shares.update(received=115, wasted=0, sent=100, is_on_duty=True)
    assert (shares.from_peers, shares.from_web) == (15, 100)


def test_bytes_lost_with_a_connection_are_not_taken_for_what_peers_send_later() -> None:
    shares = Shares()
    shares.update(received=0, wasted=0, sent=50, is_on_duty=True)
    # Out of use: what is on its way may still come with the next count, and not with later ones.
    shares.update(received=30, wasted=0, sent=50, is_on_duty=False)
    shares.update(received=30, wasted=0, sent=50, is_on_duty=False)
    shares.update(received=90, wasted=0, sent=50, is_on_duty=False)
    assert (shares.from_peers, shares.from_web) == (60, 30)


def test_waste_is_nobodys_and_web_seeds_answer_for_it_while_they_are_in_use() -> None:
    shares = Shares()
    shares.update(received=100, wasted=40, sent=100, is_on_duty=True)
    assert (shares.from_peers, shares.from_web) == (0, 60)
    shares.update(received=100, wasted=40, sent=100, is_on_duty=False)
    shares.update(received=150, wasted=50, sent=100, is_on_duty=False)
    shares.update(received=160, wasted=55, sent=100, is_on_duty=False)
    assert shares.from_web >= 50
    assert shares.from_peers + shares.from_web == 160 - 55


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.booleans()), max_size=30))
def test_every_useful_byte_is_somebodys(steps: list[tuple[int, int, int, bool]]) -> None:
    shares, received, wasted, sent = Shares(), 0, 0, 0
    for more, trash, handed, is_on_duty in steps:
        received, wasted, sent = received + more, min(received + more, wasted + trash), sent + handed
        shares.update(received=received, wasted=wasted, sent=sent, is_on_duty=is_on_duty)
        assert shares.from_web <= sent
        assert shares.from_peers >= 0
        assert shares.from_peers + shares.from_web >= received - wasted
