"""A load generator for vhost-user-blk back ends: epochd, qemu-storage-daemon, SPDK.

It is the front end and the guest's driver at once: guest memory in POSIX shared memory, split rings
that one C thread fills and polls (load.c, ring.h), so that submitting and taking a 4 KiB request
costs tens of nanoseconds and no system call, unless the back end asks to be kicked. From a shell:
`perf/blkload --help`; from Python: `Load`, `Target`, `Workload`, `Result`.

What it measures: from the moment just before a request is made visible in the available ring to
the moment at which the used index is seen to have moved, by the time stamp counter. With a rate:
from the moment at which the request was due. Requests of a batch share both moments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import LoadError, MissingError, UsageError
from .options import Target, Workload, parse_mix, parse_pattern, parse_size
from .report import Result

if TYPE_CHECKING:
    from .engine import Load

__all__ = [
    "Load",
    "LoadError",
    "MissingError",
    "Result",
    "Target",
    "UsageError",
    "Workload",
    "parse_mix",
    "parse_pattern",
    "parse_size",
]


def __getattr__(name: str) -> object:
    """`Load` at first use: the command's --help needs no C part."""
    if name == "Load":
        from .engine import Load

        return Load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
