"""One tree, one exit code a kind, and nothing of a stranger's text obeyed by a terminal."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from modelp2p.protocol import errors
from modelp2p.protocol.errors import FormatError, Kind, ModelP2PError, error_of

EXIT_CODES = {
    "OTHER": 1,
    "USAGE": 2,
    "NOT_FOUND": 3,
    "BAD_SIGNATURE": 4,
    "BAD_HASH": 4,
    "UNKNOWN_PUBLISHER": 4,
    "TIMED_OUT": 5,
    "NETWORK": 6,
    "INTERRUPTED": 7,
    "DAEMON_UNREACHABLE": 8,
    "NO_SPACE": 9,
    "DENIED": 10,
    "PARTIAL": 11,
    "ROLLBACK": 20,
    "EXPIRED": 21,
    "WITHDRAWN": 22,
    "EQUIVOCATION": 23,
    "POLICY": 24,
}


def tree(root: type[ModelP2PError] = ModelP2PError) -> Iterator[type[ModelP2PError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


CLASSES = {cls.__name__: cls for cls in tree()}


def test_exit_codes_are_the_contract() -> None:
    assert {kind.name: kind.exit_code for kind in Kind} == EXIT_CODES


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_survives_the_wire_and_pickling_with_its_code(name: str) -> None:
    error = CLASSES[name]("broken", hint="mend it", path="a/b", size=3)
    again = error_of(error.kind.name, error.message, error.hint, error.facts)
    assert again.kind is error.kind
    assert (again.message, again.hint, again.facts) == (error.message, error.hint, error.facts)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (copy.message, copy.hint, copy.facts) == (error.message, error.hint, error.facts)


@pytest.mark.parametrize("name", CLASSES)
def test_class_docstring_is_a_sentence_a_user_may_read(name: str) -> None:
    assert CLASSES[name].__doc__
    assert str(CLASSES[name].__doc__).rstrip().endswith(".")


def test_kind_of_a_newer_peer_becomes_the_root_class() -> None:
    assert error_of("SOLAR_FLARE", "x").kind is Kind.OTHER


def test_facts_from_the_wire_cannot_take_the_place_of_arguments() -> None:
    error = error_of("USAGE", "right", "hint", {"message": "wrong", "hint": "wrong", "self": 1, "not a name": 2})
    assert error.message == "right"
    assert error.hint == "hint"
    assert error.facts == {"not a name": 2}


def test_terminal_escapes_in_messages_and_hints_are_disarmed() -> None:
    error = FormatError("path '\x1b[2J\u202egnp.exe\n' is bad", hint="see \x1b]8;;http://evil\x07")
    assert str(error) == error.message == "path '\\x1b[2J\\u202egnp.exe\\n' is bad"
    assert "\x1b" not in error.hint
    assert "\x07" not in error.hint


def test_untrusted_and_corrupt_are_never_a_retry() -> None:
    assert not issubclass(errors.UntrustedError, errors.UnavailableError)
    assert not issubclass(errors.CorruptError, errors.UnavailableError)
