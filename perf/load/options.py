"""What a load is: a `Target` (back ends and their queues) and a `Workload` (requests on them).

The two are apart because one load can run several workloads one after the other. Sizes are bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import UsageError

OPS = ("read", "write", "zero", "discard")
UNITS = {"": 1, "k": 10, "m": 20, "g": 30, "t": 40}
SIZE = re.compile(r"(\d+)([kmgt]?)(?:i?b)?", re.IGNORECASE)
PATTERNS = ("seq", "rand", "zipf")
THETA = 0.99
"""The exponent of a zipf pattern that names none, as in YCSB."""


def parse_size(text: str) -> int:
    """Bytes of "4096", "4k", "4KiB", "1G": units are powers of 1024."""
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"'{text}' is no size; write 4096, 4k, 16M or 1G")
    number, unit = match.groups()
    return int(number) << UNITS[unit.lower()] if unit else int(number)


def parse_mix(text: str) -> dict[str, int]:
    """Weights of operations: "read=70,write=30"."""
    mix: dict[str, int] = {}
    for part in text.split(","):
        op, _, weight = part.strip().partition("=")
        if op not in OPS or not weight.isdecimal() or op in mix:
            raise UsageError(f"--mix {text}: '{part}' is not OPERATION=WEIGHT, one of {OPS} each")
        mix[op] = int(weight)
    if not 0 < sum(mix.values()) < 1 << 31:
        raise UsageError(f"--mix {text}: the weights add up to nothing that can be drawn from")
    return mix


def parse_pattern(text: str) -> tuple[str, float]:
    """Name and exponent of "seq", "rand", "zipf" or "zipf:1.1"."""
    name, colon, number = text.partition(":")
    try:
        theta = float(number) if colon else THETA
    except ValueError:
        theta = -1.0
    if name not in PATTERNS or (colon and name != "zipf") or not 0 < theta < 100:
        raise UsageError(f"--pattern {text}: give seq, rand, zipf or zipf:EXPONENT above 0")
    return name, theta


@dataclass
class Target:
    """The back ends, and what of them is used. One disk a socket."""

    sockets: list[str]
    queues: int = 1
    """On each disk."""
    iodepth: int = 32
    """Requests in flight on each queue."""
    bs: int = 4096
    """Bytes a request; a multiple of the disks' logical blocks."""
    offset: int = 0
    """Where the used part of each disk begins."""
    size: int | None = None
    """How long it is; None: to the end of the disk."""
    pool: int = 4 << 20
    """Bytes of prepared data for writes, used in turn; at least one request's."""
    compress: int = 0
    """Per cent by which that data can be compressed."""
    data: str | None = None
    """A file to cut it from instead."""
    in_place: bool = False
    """Block n of the used part always gets block n of the prepared data, not the next in turn:
    with a pool as large as the file, an image's blocks each in its place."""
    verify: bool = False
    """Stamp what is written and check what is read."""
    seed: int = 1
    hugepages: bool = False
    indirect: bool = True
    """Indirect descriptors if the back end has them, as Linux does."""
    event_idx: bool = True
    ring_size: int | None = None
    """Entries a queue; None: the smallest that fits, 128 at least."""


@dataclass
class Workload:
    """The requests of one run. Without seconds, ios or once it runs until it is stopped."""

    mix: dict[str, int] = field(default_factory=lambda: {"write": 1})
    pattern: str = "rand"
    theta: float = THETA
    seed: int = 1
    seconds: float | None = None
    ios: int | None = None
    once: bool = False
    """Sequentially, each block of the used part exactly once."""
    written_only: bool = False
    """With once and Target.verify: only blocks that this load has written."""
    ramp: float = 0.0
    """Seconds before anything is counted."""
    rate: float | None = None
    """Requests a second on all queues together; latencies then count from the due time."""
    lockstep: bool = False
    """Submit full batches, and the next one only when the last is done: with `ios` and a seed,
    back ends see the very same work each time."""
    sleep: bool = False
    """Wait for the back end's calls, as a guest does, instead of polling."""
    stuck_s: float = 30.0
    """Give up when nothing was done for so long."""
    errors_max: int = 1
    """Stop after so many failed requests or wrong blocks."""
    interval_s: float = 0.1
    """Of the series of counts over time."""
