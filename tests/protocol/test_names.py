"""Names: the one spelling of each, and every odd one refused."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelp2p.protocol.errors import FormatError, ModelP2PError, UsageError
from modelp2p.protocol.names import (
    BundleRef,
    LinkRef,
    ModelName,
    NameRef,
    check_publisher_id,
    check_revision,
    parse_ref,
    publisher_id_of,
)

REVISION = "0123456789abcdef0123456789abcdef01234567"
LONGEST = "a" * 96

LEGAL = ["model", "org/model", "O-r.g_1/m.O-d_2", f"{LONGEST}/{LONGEST}", "0/1", "a-b/c.d", "by-publisher", "by-publishers/x"]

ILLEGAL = {
    "empty": "",
    "only a slash": "/",
    "no model": "org/",
    "no organisation": "/model",
    "three segments": "a/b/c",
    "97 characters": "a" * 97,
    "dot dot": "org/..",
    "dot dot inside": "org/a..b",
    "double dash": "org/a--b",
    "leading dot": "org/.hidden",
    "leading dash": "-org/model",
    "leading underscore": "org/_model",
    "the bare organisation spelled out": "_/model",
    "reserved organisation": "by-publisher/model",
    "reserved organisation, one capital": "By-publisher/model",
    "reserved organisation in capitals": "BY-PUBLISHER/model",
    "space": "org/a b",
    "newline at the end": "org/model\n",
    "NUL": "org/mod\0el",
    "escape": "org/\x1b[31m",
    "full-width letters": "org/\uff4dodel",
    "Cyrillic a": "org/mod\u0430",
    "digit of another script": "org/\u0661",
    "backslash": "org\\model",
    "percent": "org/%2e%2e",
    "at": "org/a@b",
}


@pytest.mark.parametrize("text", LEGAL)
def test_legal_name_prints_as_it_was_written(text: str) -> None:
    assert str(ModelName.parse(text)) == text
    assert parse_ref(text) == NameRef(ModelName.parse(text), None)


@pytest.mark.parametrize("text", ILLEGAL.values(), ids=ILLEGAL.keys())
def test_odd_name_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        ModelName.parse(text)


def test_one_segment_lives_where_no_two_segment_name_can() -> None:
    assert ModelName.parse("model") == ModelName("_", "model")
    with pytest.raises(FormatError):
        ModelName.parse("_/model")


@given(st.text(max_size=30))
@settings(max_examples=200)
def test_whatever_parses_prints_back_and_is_plain(text: str) -> None:
    try:
        name = ModelName.parse(text)
    except FormatError:
        return
    assert str(name) == text
    assert text.isascii()
    assert ".." not in text


REFS = {
    "magnet:?xt=urn:btmh:1220": LinkRef("magnet:?xt=urn:btmh:1220"),
    "x.modelp2p": BundleRef("x.modelp2p"),
    "./x": BundleRef("./x"),
    "../x": BundleRef("../x"),
    "/x": BundleRef("/x"),
    f"org/model@{REVISION}": NameRef(ModelName("org", "model"), REVISION),
    "org/model@0123456": NameRef(ModelName("org", "model"), "0123456"),
}


@pytest.mark.parametrize("text", REFS)
def test_reference_is_told_by_its_shape(text: str) -> None:
    ref = parse_ref(text)
    assert ref == REFS[text]
    if isinstance(ref, NameRef):
        assert str(ref) == text


@pytest.mark.parametrize(
    "text", ["", "org/model@", "org/model@012345", f"org/model@{REVISION}0", "org/model@ABCDEF0", "a/b@c@d", "http://x/y", "~/x"]
)
def test_reference_of_no_shape_is_a_usage_error_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_ref(text)
    assert caught.value.kind.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", REVISION[:-1], REVISION + "0", REVISION.upper(), REVISION + "\n", "g" * 40, "\u0661" * 40])
def test_revision_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        check_revision(text)


def test_publisher_id_is_the_hash_of_the_first_root() -> None:
    text = publisher_id_of(b"root")
    assert check_publisher_id(text) == text
    assert len(text) == 55
    assert text == text.lower()
    assert "=" not in text
    assert publisher_id_of(b"root ") != text
    assert hashlib.sha256(b"root").digest()[:1] == bytes([0x48])
    assert text.startswith("mp1j")  # 0x48 = 01001 000: base32 digit 9


@pytest.mark.parametrize(
    "text", ["", "mp1", "mp2" + "a" * 52, "mp1" + "a" * 51, "mp1" + "A" * 52, "mp1" + "1" * 52, "mp1" + "a" * 52 + "\n"]
)
def test_publisher_id_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ModelP2PError):
        check_publisher_id(text)
