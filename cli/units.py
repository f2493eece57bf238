"""Sizes, rates and times for people. Scripts get plain numbers in JSON instead."""

from __future__ import annotations

import datetime

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size_text(size_bytes: int) -> str:
    """`1.4 GB`: powers of 1000, as disks and networks are sold."""
    value = float(size_bytes)
    for unit in _UNITS:
        if value < 999.95 or unit == _UNITS[-1]:
            return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def rate_text(rate_bytes_per_s: float) -> str:
    """`250.0 MB/s`."""
    return f"{size_text(int(rate_bytes_per_s))}/s"


def duration_text(seconds: float) -> str:
    """`8 s`, `3 min 5 s`, `2 h 10 min`, `4 d 3 h`: two units at most."""
    whole = int(seconds)
    for unit, below, length, lower in (("d", "h", 86_400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= length:
            rest = whole % length // lower
            return f"{whole // length} {unit} {rest} {below}" if rest else f"{whole // length} {unit}"
    return f"{whole} s"


def percent_text(done: int, total: int) -> str:
    """`83.1 %`, cut rather than rounded: 100 % is said only when everything is there."""
    if total <= 0:
        return "100.0 %" if done == total else "0.0 %"
    return f"{done * 1000 // total / 10:.1f} %"


def time_text(utc_s: int) -> str:
    """`2026-11-23 11:45 UTC`; a number no calendar holds is shown as it is."""
    try:
        return datetime.datetime.fromtimestamp(utc_s, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return str(utc_s)
