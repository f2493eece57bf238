"""Who may use which name here: the user's word only, never the first comer's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modelp2p.protocol import codec
from modelp2p.protocol.errors import FormatError, ModelP2PError, UnknownPublisherError, UntrustedError
from modelp2p.protocol.names import ModelName, PublisherId
from modelp2p.protocol.statement import verify_statement
from modelp2p.protocol.trust import TrustBook, TrustEntry, admit, check_no_rival, decode_book, encode_book
from tests.releases import publisher, statement_of

LAB, OTHER = publisher("lab").id, publisher("other").id
RELEASE = verify_statement(statement_of({"a": b"a"}))
# The same name and revision by another publisher is only possible with the same content, or with a claimed origin.
TWIN = verify_statement(statement_of({"a": b"a"}, by="other"))

MATCHES = {
    ("*", "lab/model"): True,
    ("*", "model"): True,
    ("lab/*", "lab/model"): True,
    ("lab/*", "labs/model"): False,
    ("lab/*", "model"): False,
    ("lab/model", "lab/model"): True,
    ("lab/model", "lab/model2"): False,
    ("lab/model", "Lab/model"): False,
    ("model", "model"): True,
    ("model", "lab/model"): False,
}


@pytest.mark.parametrize(("pattern", "name"), MATCHES)
def test_pattern_matches_whole_segments(pattern: str, name: str) -> None:
    assert TrustEntry(pattern, LAB).matches(ModelName.parse(name)) is MATCHES[pattern, name]


@pytest.mark.parametrize("pattern", ["", "**", "*/model", "lab/mod*", "lab/", "/x", "a/b/c", "lab/*\n", "lab /x", "lab/[ab]"])
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ModelP2PError):
        TrustEntry(pattern, LAB)


def test_entry_of_no_publisher_is_refused() -> None:
    with pytest.raises(FormatError):
        TrustEntry("*", PublisherId("lab"))


def test_name_is_not_taken_over_silently() -> None:
    book = TrustBook().added(TrustEntry("lab/*", LAB))
    assert book.added(TrustEntry("lab/*", LAB)) is book
    with pytest.raises(UntrustedError) as caught:
        book.added(TrustEntry("lab/*", OTHER))
    assert LAB in caught.value.message
    assert OTHER in caught.value.message
    assert "trust remove" in caught.value.hint
    assert book.removed(LAB, "lab/*").added(TrustEntry("lab/*", OTHER)).publishers() == {OTHER}


def test_removing_takes_one_pattern_or_all() -> None:
    book = TrustBook((TrustEntry("a/*", LAB), TrustEntry("b/*", LAB), TrustEntry("c/*", OTHER)))
    assert [entry.pattern for entry in book.removed(LAB, "a/*").entries] == ["b/*", "c/*"]
    assert [entry.pattern for entry in book.removed(LAB, None).entries] == ["c/*"]
    assert book.removed(OTHER, "a/*") == book


def test_book_gives_one_pattern_to_one_publisher() -> None:
    with pytest.raises(FormatError):
        TrustBook((TrustEntry("a/*", LAB), TrustEntry("a/*", OTHER)))


def test_book_round_trip() -> None:
    book = TrustBook((TrustEntry("a/*", LAB), TrustEntry("b/c", OTHER)))
    assert decode_book(encode_book(book)) == book
    assert decode_book(encode_book(TrustBook())) == TrustBook()


BAD_BOOKS = {
    "version 2": codec.pack({"v": 2, "entries": []}),
    "no entries": codec.pack({"v": 1}),
    "entry as list": codec.pack({"v": 1, "entries": [["*", LAB]]}),
    "entry with more": codec.pack({"v": 1, "entries": [{"pattern": "*", "publisher": LAB, "x": 1}]}),
    "publisher of no form": codec.pack({"v": 1, "entries": [{"pattern": "*", "publisher": "lab"}]}),
    "one pattern for two": codec.pack({"v": 1, "entries": [{"pattern": "*", "publisher": who} for who in (LAB, OTHER)]}),
    "truncated": encode_book(TrustBook((TrustEntry("*", LAB),)))[:-1],
    "empty": b"",
}


@pytest.mark.parametrize("name", BAD_BOOKS)
def test_bad_trust_file_is_refused(name: str) -> None:
    with pytest.raises(ModelP2PError):
        decode_book(BAD_BOOKS[name])


def test_link_authorises_the_fetch_but_not_the_name() -> None:
    assert admit(RELEASE, TrustBook(), RELEASE.link()) is False
    assert admit(RELEASE, TrustBook((TrustEntry("lab/*", LAB),)), RELEASE.link()) is True
    assert admit(RELEASE, TrustBook((TrustEntry("lab/*", LAB),)), None) is True


@pytest.mark.parametrize(
    "entries", [(), (TrustEntry("lab/*", OTHER),), (TrustEntry("lab/other", LAB),)], ids=["none", "rival", "elsewhere"]
)
def test_bundle_of_an_untrusted_publisher_is_refused(entries: tuple[TrustEntry, ...]) -> None:
    with pytest.raises(UnknownPublisherError) as caught:
        admit(RELEASE, TrustBook(entries), None)
    assert caught.value.kind.exit_code == 4
    assert LAB in caught.value.message


LINK = RELEASE.link()
WRONG_LINKS = {
    "other content": replace(LINK, info_hash=bytes(32)),
    "other statement": replace(LINK, manifest_hash=bytes(32)),
    "other publisher": replace(LINK, publisher=OTHER),
    "other name": replace(LINK, name=ModelName("lab", "other")),
    "the twin's statement": TWIN.link(),
}


@pytest.mark.parametrize("name", WRONG_LINKS)
def test_statement_that_a_link_does_not_pin_is_refused_even_if_trusted(name: str) -> None:
    with pytest.raises(UntrustedError) as caught:
        admit(RELEASE, TrustBook((TrustEntry("*", LAB),)), WRONG_LINKS[name])
    assert caught.value.kind.exit_code == 4


def test_same_ref_with_other_content_is_refused_naming_both_publishers() -> None:
    with pytest.raises(UntrustedError) as caught:
        check_no_rival(RELEASE, [(RELEASE.ref, OTHER, bytes(32))])
    assert LAB in caught.value.message
    assert OTHER in caught.value.message
    assert caught.value.kind.exit_code == 4


def test_same_content_by_others_and_other_names_are_no_rivals() -> None:
    assert TWIN.ref == RELEASE.ref
    assert TWIN.info_hash == RELEASE.info_hash
    check_no_rival(
        RELEASE, [(TWIN.ref, OTHER, TWIN.info_hash), ("lab/model@" + "0" * 40, LAB, bytes(32)), ("x@y", LAB, bytes(32))]
    )
