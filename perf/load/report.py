"""Figures of a run, from the loop's counters: percentiles by HdrHistogram, JSON, a table.

Latencies are whole nanoseconds. Minimum, maximum and mean are exact, percentiles and the histogram
are within 0.1 %; `histogram` holds [lowest latency of the bucket, count] and leaves out empty
ones.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hdrh.histogram import HdrHistogram

LOWEST_NS, HIGHEST_NS, DIGITS = 1, 60_000_000_000, 3
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}


def new_histogram() -> HdrHistogram:
    """An empty one, of the range and precision that the loop uses too."""
    return HdrHistogram(LOWEST_NS, HIGHEST_NS, DIGITS)


@dataclass
class Counts:
    """Requests of one kind that were done well; `counters` as in HdrHistogram's array."""

    ios: int
    bytes: int
    min_ns: int
    max_ns: int
    sum_ns: int
    counters: Sequence[int]

    def minus(self, earlier: Counts) -> Counts:
        """What came after `earlier`, from the counters alone: both may be glances during a run,
        at which other figures are a little younger or older. Exact to the bucket."""
        counters = [b - a for a, b in zip(earlier.counters, self.counters, strict=True)]
        where = [index for index, count in enumerate(counters) if count]
        scale = new_histogram()
        low = scale.get_value_from_index(where[0]) if where else 0
        high = scale.get_value_from_index(where[-1]) if where else 0
        ios = sum(counters)
        return Counts(
            ios,
            ios * self.bytes // self.ios if self.ios else 0,
            max(low, self.min_ns),
            min(int(scale.get_highest_equivalent_value(high)), self.max_ns),
            sum(counters[index] * int(scale.get_value_from_index(index)) for index in where),
            counters,
        )


def total(parts: Sequence[Counts]) -> Counts:
    """All kinds together."""
    return Counts(
        sum(part.ios for part in parts),
        sum(part.bytes for part in parts),
        min((part.min_ns for part in parts if part.ios), default=0),
        max(part.max_ns for part in parts),
        sum(part.sum_ns for part in parts),
        [sum(column) for column in zip(*(part.counters for part in parts), strict=True)],
    )


def figures(counts: Counts, seconds: float) -> dict[str, Any]:
    """ios, bytes, iops, mib_s, latency_ns and histogram."""
    histogram = new_histogram()
    points = []
    for index, count in enumerate(counts.counters):
        if count:
            ns = int(histogram.get_value_from_index(index))
            histogram.record_value(ns, count)
            points.append([ns, count])
    latency: dict[str, float] = dict.fromkeys(("min", *PERCENTILES, "max", "mean"), 0)
    if counts.ios:
        found = histogram.get_percentile_to_value_dict(list(PERCENTILES.values()))
        for name, percent in PERCENTILES.items():
            latency[name] = min(max(int(found[percent]), counts.min_ns), counts.max_ns)
        latency["min"], latency["max"] = counts.min_ns, counts.max_ns
        latency["mean"] = round(counts.sum_ns / counts.ios, 1)
    return {
        "ios": counts.ios,
        "bytes": counts.bytes,
        "iops": round(counts.ios / seconds, 3) if seconds else 0.0,
        "mib_s": round(counts.bytes / seconds / (1 << 20), 3) if seconds else 0.0,
        "latency_ns": latency,
        "histogram": points,
    }


@dataclass
class Result:
    """How a run ended and what it did.

    `ended`: "ended" (all was done), "stopped", "failed" (requests failed, data was wrong) or
    "lost" (the back end went away, hangs or breaks the rules); for the last two, and whenever
    there were errors, `failure` says what came first. `series`: requests done, by interval.
    """

    ended: str
    failure: str | None
    seconds: float
    errors: int
    verify_errors: int
    verified: int
    unknown: int
    kicks: int
    calls: int
    by_op: dict[str, Counts]
    series: list[tuple[float, int]]
    phases: list[tuple[str, float, dict[str, Counts]]] = field(default_factory=list)
    """With marks: name, seconds and counts of each stretch between two of them."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ios(self) -> int:
        return sum(counts.ios for counts in self.by_op.values())

    @property
    def iops(self) -> float:
        return self.ios / self.seconds if self.seconds else 0.0

    @property
    def ok(self) -> bool:
        """Nothing went wrong; being stopped is not wrong."""
        return self.failure is None

    def as_dict(self) -> dict[str, Any]:
        """As it is written as JSON."""
        return {
            "ended": self.ended,
            "failure": self.failure,
            "seconds": round(self.seconds, 9),
            "errors": self.errors,
            "verify_errors": self.verify_errors,
            "verified": self.verified,
            "unknown": self.unknown,
            "kicks": self.kicks,
            "calls": self.calls,
            **figures(total(list(self.by_op.values())), self.seconds),
            "by_op": {op: figures(counts, self.seconds) for op, counts in self._used()},
            "series": [[round(at, 6), count] for at, count in self.series],
            "phases": [
                {"name": name, "seconds": round(s, 6), **figures(total(list(ops.values())), s)}
                for name, s, ops in self.phases
            ],
            "options": self.options,
            "host": socket.gethostname(),
            "kernel": platform.release(),
        }

    def _used(self) -> list[tuple[str, Counts]]:
        return [(op, counts) for op, counts in self.by_op.items() if counts.ios]

    def table(self) -> str:
        """For people: a line for each operation and one for all."""
        lines = [
            f"{'':8} {'requests':>11} {'IOPS':>10} {'MiB/s':>9} "
            + " ".join(f"{name:>9}" for name in ("min us", *PERCENTILES, "max us"))
        ]
        rows = self._used()
        if len(rows) != 1:
            rows.append(("all", total(list(self.by_op.values()))))
        for name, counts in rows:
            now = figures(counts, self.seconds)
            micros = [now["latency_ns"][key] / 1000 for key in ("min", *PERCENTILES, "max")]
            lines.append(
                f"{name:8} {now['ios']:>11} {now['iops']:>10.0f} {now['mib_s']:>9.1f} "
                + " ".join(f"{value:>9.2f}" for value in micros)
            )
        lines.append(f"{self.seconds:.3f} s, {self.errors} errors, {self.kicks} kicks")
        if self.verified or self.unknown or self.verify_errors:
            lines.append(
                f"blocks checked: {self.verified} right, {self.verify_errors} wrong, "
                f"{self.unknown} of which nothing was known"
            )
        return "\n".join(lines)
