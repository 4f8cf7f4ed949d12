"""Reads a live view: what an agent shows in shared memory while it works, hangs or is dead.

Contract. Nothing here asks the agent, and nothing here can disturb it: the page is mapped
for reading. find() and View raise LiveError with one sentence. Times are nanoseconds, of
CLOCK_MONOTONIC where they are points in time; sizes are bytes.

Consistency: the picture of counters is one moment (its version is checked); histograms and
traces are newer than it by up to some milliseconds, each of their values whole. A picture
that an agent did not finish because it was killed is shown as it is.
"""

import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .core import MetricsLayout as Layout

SHM_DIR = Path("/dev/shm")
PATTERN = "epochd-*.live"
TRIES = 1000
SILENT_NS = 1_000_000_000
"""A reactor that does not sleep and has not shown anything for so long hangs."""

_UPPER = [*Layout.bucket_low[1:], 1 << 40]


class LiveError(Exception):
    """No live view, or none that can be read; the text says which and why."""


class Histogram:
    """Counts of durations in log-linear buckets (format.h)."""

    def __init__(self, buckets: Sequence[int]) -> None:
        self.buckets = buckets

    def __sub__(self, earlier: "Histogram") -> "Histogram":
        """What came since. An earlier one of another agent counts as nothing."""
        pairs = zip(self.buckets, earlier.buckets, strict=True)
        return Histogram([max(0, now - then) for now, then in pairs])

    @property
    def count(self) -> int:
        return sum(self.buckets)

    def percentile(self, percent: float) -> int:
        """A duration in ns that so many percent do not exceed, at most 1/16 too high; 0 when
        nothing was counted."""
        rank, seen = self.count * percent / 100, 0
        for number, value in enumerate(self.buckets):
            seen += value
            if value and seen >= rank:
                return _UPPER[number] - 1
        return 0

    def mean(self) -> float:
        """In ns, from the middle of each bucket; 0 when nothing was counted."""
        middle = sum(
            value * (low + high - 1) / 2
            for value, low, high in zip(self.buckets, Layout.bucket_low, _UPPER, strict=True)
            if value
        )
        return middle / (self.count or 1)

    def summary(self) -> dict[str, Any]:
        """Count, mean, median, upper percentiles and highest value, in ns."""
        return {
            "count": self.count,
            "mean-ns": round(self.mean()),
            "p50-ns": self.percentile(50),
            "p99-ns": self.percentile(99),
            "p999-ns": self.percentile(99.9),
            "max-ns": self.percentile(100),
        }


@dataclass(frozen=True)
class Snapshot:
    """A live view as it was at `read_ns`: the header and the picture as in format.h, and the
    histograms by stage."""

    read_ns: int
    header: dict[str, Any]
    state: dict[str, Any]
    stages: dict[str, Histogram]

    @property
    def as_of_ns(self) -> int:
        """The moment that the picture shows: of a sleeping agent it is right until now."""
        return self.read_ns if self.header["sleeping"] else int(self.state["updated_ns"])


class View:
    """One agent's live view, mapped. `name` begins with a slash, as in query-status."""

    def __init__(self, name: str) -> None:
        self.name = f"/{name.lstrip('/')}"
        path = f"{SHM_DIR}{self.name}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LiveError(f"live view {path}: {error.strerror}") from None
        try:
            status = os.fstat(fd)
            self._file = (status.st_dev, status.st_ino)
            if status.st_size < Layout.traces[1]:
                raise LiveError(f"live view {path}: {status.st_size} bytes are too few; it is of "
                                "another version, or not made yet")
            self._map = mmap.mmap(fd, Layout.traces[1], access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
        self.header = Layout.parse_header(self._map[: Layout.header_bytes])
        if (self.header["magic"], self.header["version"]) != (Layout.magic, Layout.version):
            self.close()
            raise LiveError(f"live view {path}: it is of another version, or not made yet")

    def close(self) -> None:
        self._map.close()

    def replaced(self) -> bool:
        """Whether a newer agent has put another view in its place."""
        try:
            status = os.stat(f"{SHM_DIR}{self.name}")
        except OSError:
            return False
        return (status.st_dev, status.st_ino) != self._file

    def _version(self) -> int:
        first = Layout.state[0]  # the picture's first word
        return int.from_bytes(self._map[first : first + 8], "little")

    def _picture(self) -> bytes:
        first, last = Layout.state
        for _ in range(TRIES):
            before = self._version()
            data = self._map[first:last]
            if before % 2 == 0 and before == self._version():
                break
        return data

    def read(self) -> Snapshot:
        """Everything but the traces."""
        header = Layout.parse_header(self._map[: Layout.header_bytes])
        state = Layout.parse_state(self._picture())
        first, last = Layout.stages
        words = memoryview(self._map[first:last]).cast("Q").tolist()
        each = len(Layout.bucket_low)
        stages = {
            name: Histogram(words[number * each : (number + 1) * each])
            for number, name in enumerate(Layout.stage_names)
        }
        return Snapshot(time.monotonic_ns(), header, state, stages)

    def traces(self, count: int) -> list[dict[str, Any]]:
        """The newest traced requests, at most `count`, oldest first."""
        first, last = Layout.traces
        size = Layout.trace_bytes
        data, again = self._map[first:last], self._map[first:last]
        found = []
        for at in range(0, last - first, size):
            # One that was being replaced while it was copied has another number now.
            if any(data[at : at + 8]) and data[at : at + 8] == again[at : at + 8]:
                found.append(Layout.parse_trace(data[at : at + size]))
        # Each reactor numbers its own.
        found.sort(key=lambda trace: (trace["fetched_ns"] + trace["published_ns"],
                                      int(trace["number"])))
        return found[-count:] if count else []

    def health(self, snapshot: Snapshot) -> tuple[str, str]:
        """(idle, busy, stopped, hung or dead; a sentence for a person)."""
        silent_ns = snapshot.read_ns - snapshot.state["updated_ns"]
        for_long = f"{silent_ns / 1e9:.1f} s ago"
        process = _process_state(snapshot.header["pid"])
        if process in ("", "Z", "X"):
            return "dead", f"the agent is gone; this is what it left, {for_long}"
        if process in ("T", "t"):
            return "stopped", f"the process is stopped (SIGSTOP or a debugger), {for_long}"
        if snapshot.header["sleeping"]:
            return "idle", "asleep until something comes"
        if silent_ns > SILENT_NS:
            return "hung", f"the reactor hangs: its last sign was {for_long}"
        return "busy", "serving or polling"


def _process_state(pid: int) -> str:
    """The letter in /proc/PID/stat; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def find(control: Path | None = None) -> str:
    """The name of the only live view, or of the agent with this control socket; LiveError."""
    names: dict[str, str] = {}
    hidden = 0
    for path in sorted(SHM_DIR.glob(PATTERN)):
        try:
            view = View(path.name)
        except LiveError:
            hidden += 1
            continue
        names[view.name] = view.header["control"]
        view.close()
    if control is not None:
        wanted = control.absolute(), control.resolve()
        names = {
            name: path for name, path in names.items()
            if Path(path) in wanted or Path(path).resolve() in wanted
        }
    if len(names) == 1:
        return next(iter(names))
    if not names:
        where = f" of an agent with the control socket {control}" if control else ""
        more = f"; {hidden} cannot be read" if hidden else ""
        raise LiveError(f"no live view{where} in {SHM_DIR}{more}; is epochd running, and are you "
                        "root or its user?")
    listed = ", ".join(f"{name} ({path})" for name, path in names.items())
    raise LiveError(f"several agents run: {listed}; choose one with -s SOCK or --shm NAME")
