"""Figures of repeated measurements: medians and spreads, pair by pair.

A noisy machine drifts: it is fast for ten seconds and slow for the next. Two measurements
that follow each other share the drift, so each pair's ratio is taken first and the median of
the ratios is the result; medians over all of A and all of B are shown beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Repeated values: their median, quartiles and ends. `spread` is the distance of the
    quartiles as a share of the median."""

    count: int
    median: float
    low: float
    high: float
    quartile_1: float
    quartile_3: float

    @property
    def spread(self) -> float:
        return (self.quartile_3 - self.quartile_1) / self.median if self.median else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, with linear interpolation; NaN for none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(values: Sequence[float]) -> Summary:
    """Summary of at least one value; ValueError for none."""
    if not values:
        raise ValueError("no values to summarize")
    return Summary(
        count=len(values),
        median=statistics.median(values),
        low=min(values),
        high=max(values),
        quartile_1=quantile(values, 0.25),
        quartile_3=quantile(values, 0.75),
    )


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ratio of each pair; ValueError when the two do not pair up or a divisor is 0."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values against {len(theirs)}: these are no pairs")
    if not all(theirs):
        raise ValueError("a measurement of 0 cannot be compared with")
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def histogram_quantile(histogram: Sequence[tuple[float, int]], share: float) -> float:
    """Quantile of (value, count) buckets in ascending order; NaN when they are empty."""
    total = sum(count for _, count in histogram)
    seen = 0
    for value, count in histogram:
        seen += count
        if total and seen >= share * total:
            return value
    return math.nan
