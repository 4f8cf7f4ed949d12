"""Figures for a person: three digits and a unit."""

from __future__ import annotations


def rate(value: float) -> str:
    """Requests a second."""
    for limit, unit in ((1e6, "M/s"), (1e3, "k/s")):
        if value >= limit:
            return f"{_digits(value / limit)} {unit}"
    return f"{_digits(value)} /s"


def bandwidth(value: float) -> str:
    """MiB a second."""
    return f"{_digits(value / 1024)} GiB/s" if value >= 1024 else f"{_digits(value)} MiB/s"


def microseconds(value: float) -> str:
    if value >= 1e6:
        return f"{_digits(value / 1e6)} s"
    return f"{_digits(value / 1e3)} ms" if value >= 1e3 else f"{_digits(value)} us"


def times(value: float) -> str:
    return f"{_digits(value)} x"


def size(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.0f} TiB"


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


UNITS = {"IOPS": rate, "MiB/s": bandwidth, "us": microseconds, "x": times}
"""How the values of a row's unit are shown."""
