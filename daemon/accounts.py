"""The public socket's allow-list as the kernel's numbers: names of users and groups are looked up once, at start."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from modelp2p.daemon.gate import PublicGate
from modelp2p.protocol.errors import UsageError

if TYPE_CHECKING:
    from modelp2p.daemon.config import Config


def public_gate(config: Config) -> PublicGate:
    """The gate that `[control]` describes, for a daemon of this process's user.

    Raises:
        UsageError: this machine knows no such user or group.
    """
    uid = os.getuid()
    try:
        owner = pwd.getpwuid(uid).pw_name
    except KeyError:
        owner = str(uid)
    users = _numbers(config.control.allow_users, "user", lambda name: pwd.getpwnam(name).pw_uid)
    groups = _numbers(config.control.allow_groups, "group", lambda name: grp.getgrnam(name).gr_gid)
    return PublicGate(uid, owner, config.fetch.timeout_s, users, groups)


def _numbers(names: Iterable[str], kind: str, number_of: Callable[[str], int]) -> frozenset[int]:
    found = set()
    for name in names:
        try:
            found.add(int(name) if name.isdigit() else number_of(name))
        except KeyError as exc:
            raise UsageError(
                f"control.allow_{kind}s names the {kind} '{name}', which this machine does not know",
                hint=f"Check the spelling with: getent {'passwd' if kind == 'user' else 'group'} {name}",
            ) from exc
    return frozenset(found)
