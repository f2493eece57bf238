"""The greeting that opens a control connection and an engine connection: which versions a side speaks.

A version is an integer for the whole conversation. Both sides send theirs first; the highest that both know is spoken.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelp2p.protocol.errors import DaemonError


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of each side: the versions it speaks, and its build for humans."""

    v_min: int
    v_max: int
    build: str


def check_versions(message: object, v_min: int, v_max: int, *, sides: str, hint: str) -> Hello:
    """The other side's greeting, if it has a version in common with `v_min` to `v_max`.

    Args:
        message: the first message that came.
        v_min: the oldest version this build speaks.
        v_max: the newest.
        sides: who talks, for the error: "client and daemon".
        hint: what a user should do about different versions.

    Raises:
        DaemonError: it is no greeting, or speaks only versions this build does not.
    """
    if not isinstance(message, Hello):
        raise DaemonError(f"{sides} do not speak one protocol: the other side opened with something else")
    if message.v_max < v_min or message.v_min > v_max:
        raise DaemonError(
            f"{sides} have no protocol version in common ({message.build} speaks {message.v_min} to {message.v_max}, "
            f"this build {v_min} to {v_max})",
            hint=hint,
        )
    return message
