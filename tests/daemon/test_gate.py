from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from modelp2p.daemon.accounts import public_gate
from modelp2p.daemon.config import parse_config
from modelp2p.daemon.gate import ROOT_UID, OwnerGate, Peer, PublicGate
from modelp2p.protocol.errors import DeniedError, FormatError, UsageError

if TYPE_CHECKING:
    from modelp2p.protocol.codec import Map

OWNER, ALICE, BOB, STAFF = 990, 1001, 1002, 50
LINK = "magnet:?xt=urn:btmh:1220" + "ab" * 32 + "&x.mp=" + "cd" * 32 + "&x.pub=mp1" + "a" * 52
EVERYBODY = PublicGate(OWNER, "modelp2p", 300.0)
ALICE_ONLY = PublicGate(OWNER, "modelp2p", 300.0, users=frozenset({ALICE}))
STAFF_ONLY = PublicGate(OWNER, "modelp2p", 300.0, groups=frozenset({STAFF}))
EITHER = PublicGate(OWNER, "modelp2p", 300.0, frozenset({ALICE}), frozenset({STAFF}))

PEERS = {
    "the owner, by the owner's socket": (OwnerGate(OWNER), Peer(OWNER), True),
    "root, by the owner's socket": (OwnerGate(OWNER), Peer(ROOT_UID), True),
    "another, by the owner's socket": (OwnerGate(OWNER), Peer(ALICE), False),
    "root's group, by the owner's socket": (OwnerGate(OWNER), Peer(ALICE, frozenset({0})), False),
    "no list": (EVERYBODY, Peer(BOB), True),
    "on the list": (ALICE_ONLY, Peer(ALICE), True),
    "not on the list": (ALICE_ONLY, Peer(BOB), False),
    "not on the list, group of that number": (ALICE_ONLY, Peer(BOB, frozenset({ALICE})), False),
    "the owner is on every list": (ALICE_ONLY, Peer(OWNER), True),
    "root is on every list": (STAFF_ONLY, Peer(ROOT_UID), True),
    "a member": (STAFF_ONLY, Peer(BOB, frozenset({7, STAFF})), True),
    "no member": (STAFF_ONLY, Peer(BOB, frozenset({7})), False),
    "user of the group's number": (STAFF_ONLY, Peer(STAFF), False),
    "either: the user": (EITHER, Peer(ALICE), True),
    "either: the group": (EITHER, Peer(BOB, frozenset({STAFF})), True),
    "either: neither": (EITHER, Peer(BOB), False),
}


@pytest.mark.parametrize(("gate", "peer", "may"), PEERS.values(), ids=PEERS)
def test_who_may_connect(gate: OwnerGate | PublicGate, peer: Peer, may: bool) -> None:
    if may:
        gate.check_peer(peer)
    else:
        with pytest.raises(DeniedError):
            gate.check_peer(peer)


TAKEN: dict[str, tuple[str, Map]] = {
    "status": ("status", {}),
    "ls": ("ls", {}),
    "show": ("show", {"ref": "lab/model", "bundle_out": False}),
    "show by link": ("show", {"ref": LINK}),
    "resolve": ("resolve", {"ref": "lab/model"}),
    "fetch": ("fetch", {"ref": "lab/model"}),
    "fetch, a revision": ("fetch", {"ref": "lab/model@0123abc"}),
    "fetch, some files": ("fetch", {"ref": "lab/model", "include": ["*.json"], "exclude": ["a"], "dry_run": True}),
    "fetch, as patient as the node": ("fetch", {"ref": "lab/model", "timeout_s": 300}),
    "fetch, as the command line sends it": (
        "fetch",
        {"ref": "lab/model", "include": [], "exclude": [], "peers": [], "allow_code": False, "seed": True, "detach": False},
    ),
    "stream": ("stream_open", {"ref": "lab/model@0123abc"}),
    "stream, what belongs to the connection": ("stream_file", {"path": "config.json"}),
    "stream, what needs the secret": ("stream_follow", {"stream": "0" * 32}),
    "stream, an order": ("stream_want", {"pieces": [[0, 1]]}),
}
REFUSED: dict[str, tuple[str, Map]] = {
    **{
        verb: (verb, {"ref": "lab/model"})
        for verb in (
            *("adopt", "config", "gc", "limits", "publish", "publish_commit", "rm", "seed", "stop"),
            *("trust_add", "trust_list", "trust_remove", "verify", "nonsense"),
        )
    },
    "show, with a bundle": ("show", {"ref": "lab/model", "bundle_out": True}),
    "fetch, a thousand globs": ("fetch", {"ref": "lab/model", "include": ["*"] * 1000}),
    "fetch, a glob of a kilobyte": ("fetch", {"ref": "lab/model", "exclude": ["*" * 1000]}),
    "fetch by link": ("fetch", {"ref": LINK}),
    "fetch by bundle": ("fetch", {"ref": "", "bundle": True}),
    "fetch by bundle, with a name beside it": ("fetch", {"ref": "lab/model", "bundle": True}),
    "fetch by bundle, truthy": ("fetch", {"ref": "lab/model", "bundle": 1}),
    "fetch by path": ("fetch", {"ref": "./x.modelp2p"}),
    "fetch from peers": ("fetch", {"ref": "lab/model", "peers": ["10.0.0.1:1"]}),
    "fetch code": ("fetch", {"ref": "lab/model", "allow_code": True}),
    "fetch detached": ("fetch", {"ref": "lab/model", "detach": True}),
    "fetch, limits up": ("fetch", {"ref": "lab/model", "max_up": 1}),
    "fetch, limits down": ("fetch", {"ref": "lab/model", "max_down": 1}),
    "fetch, no seeding": ("fetch", {"ref": "lab/model", "seed": False}),
    "fetch, more patient than the node": ("fetch", {"ref": "lab/model", "timeout_s": 301}),
    "stream by link": ("stream_open", {"ref": LINK}),
    "stream by path": ("stream_open", {"ref": "/x"}),
    "stream of a publisher nobody trusts": ("stream_open", {"ref": "lab/model", "publisher": "mp1" + "a" * 52}),
}


@pytest.mark.parametrize(("verb", "args"), TAKEN.values(), ids=TAKEN)
def test_what_others_may_ask(verb: str, args: Map) -> None:
    EVERYBODY.check_request(verb, args)


@pytest.mark.parametrize(("verb", "args"), REFUSED.values(), ids=REFUSED)
def test_what_only_the_owner_may_ask(verb: str, args: Map) -> None:
    with pytest.raises(DeniedError) as caught:
        EVERYBODY.check_request(verb, args)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    OwnerGate(OWNER).check_request(verb, args)


def test_a_reference_that_is_none_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        EVERYBODY.check_request("fetch", {"ref": "lab/mo del"})


def test_a_strangers_descriptors_are_denied_and_the_owners_surplus_is_an_error() -> None:
    assert EVERYBODY.max_fds == 0
    assert isinstance(EVERYBODY.too_many_fds(), DeniedError)
    assert isinstance(OwnerGate(OWNER).too_many_fds(), FormatError)


def test_names_of_the_configuration_become_numbers() -> None:
    gate = public_gate(parse_config("[control]\nallow_users = ['root', 1001]\nallow_groups = ['root', '50']"))
    assert (gate.users, gate.groups) == (frozenset({0, 1001}), frozenset({0, 50}))
    assert gate.uid == os.getuid()


@pytest.mark.parametrize("kind", ["users", "groups"])
def test_a_name_nobody_has_is_an_error(kind: str) -> None:
    with pytest.raises(UsageError, match="no-such-account") as caught:
        public_gate(parse_config(f"[control]\nallow_{kind} = ['no-such-account']"))
    assert "getent" in caught.value.hint
