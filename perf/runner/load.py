"""Load on a vhost-user-blk socket: one run of the load generator, perf/blkload.

The generator is a process of its own on CPUs of its own. Its exit status says what happened:
1 is wrong data or a failed request (the run fails), 3 that something is missing.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .failures import FailedError, MissingError
from .process import Server, pinned

BLKLOAD = Path(__file__).resolve().parents[1] / "blkload"
DEATH_SECONDS = 1.0
PATIENCE_SECONDS = 180.0  # beyond what a run was asked to take


@dataclass(frozen=True)
class LoadResult:
    """What a run of the generator measured. Times in ns."""

    ios: int
    seconds: float
    iops: float
    mib_s: float
    latency_ns: dict[str, float]
    histogram: list[tuple[float, int]]
    series: list[tuple[float, int]]

    def short(self) -> dict[str, Any]:
        """For the JSON of a pair: all but the long lists."""
        return {
            "ios": self.ios,
            "seconds": self.seconds,
            "iops": self.iops,
            "mib_s": self.mib_s,
            "latency_ns": self.latency_ns,
        }


def parse(data: dict[str, Any]) -> LoadResult:
    """The generator's JSON; FailedError when it tells of errors."""
    wrong, errors = data.get("verify_errors", 0), data.get("errors", 0)
    if wrong or errors:
        raise FailedError(f"{errors} requests failed and {wrong} blocks held wrong data")
    return LoadResult(
        ios=int(data["ios"]),
        seconds=float(data["seconds"]),
        iops=float(data["iops"]),
        mib_s=float(data["mib_s"]),
        latency_ns={key: float(value) for key, value in data["latency_ns"].items()},
        histogram=[(float(ns), int(count)) for ns, count in data.get("histogram", [])],
        series=[(float(t), int(count)) for t, count in data.get("series", [])],
    )


def job(**arguments: object) -> dict[str, object]:
    """Options of a run, for Load(..., **job(...)): a literal that reads like the call."""
    return arguments


def blocks_of(image: Path, size: int) -> dict[str, object]:
    """Options for data of an image: each block in its place when the region is as large as the
    image; for a smaller one, pieces of 64 KiB from all over it."""
    return job(data=image, pool=size, in_place=True)


class Load:
    """A run in the background. `arguments` are options of perf/blkload without the dashes,
    True for a flag, a list for one that comes several times:
    Load(server, socket, cpus, rw="randwrite", ios=1000)."""

    def __init__(
        self,
        server: Server | None,
        socket: Path,
        cpus: Sequence[int] | None,
        /,
        **arguments: object,
    ) -> None:
        if not BLKLOAD.exists():
            raise MissingError(f"the load generator {BLKLOAD} is not there")
        self.server = server
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - until close()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        seconds = arguments.get("seconds", 0)
        ramp = arguments.get("ramp", 0)
        assert isinstance(seconds, (int, float))
        assert isinstance(ramp, (int, float))
        self._deadline = time.monotonic() + seconds + ramp + PATIENCE_SECONDS
        words = [str(BLKLOAD), "--socket", str(socket), "--json", "-"]
        for key, value in arguments.items():
            if value is True:
                words.append(f"--{key.replace('_', '-')}")
            elif isinstance(value, list):
                words += [f"--{key.replace('_', '-')}={one}" for one in value]
            elif value is not None and value is not False:
                words += [f"--{key.replace('_', '-')}", str(value)]
        self.words = words
        self._process = subprocess.Popen(
            pinned(words, cpus),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
        )

    def running(self) -> bool:
        """Is it still at work? FailedError when the server died under it."""
        if self._process.poll() is not None:
            return False
        if self.server is not None:
            self.server.check()
        if time.monotonic() > self._deadline:
            raise FailedError(f"the load does not end: {' '.join(self.words)}")
        return True

    def result(self) -> LoadResult:
        """Wait for the end and return what was measured."""
        while self.running():
            time.sleep(0.005)
        status = self._process.returncode
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip()
        if status:
            self._await_death()
            kind = MissingError if status == 3 else FailedError
            raise kind(f"load generator, exit status {status}: {text[-1500:]}")
        self._output.seek(0)
        return parse(json.loads(self._output.read()))

    def _await_death(self) -> None:
        """The server's death is the better explanation. Its sockets are closed a moment before
        it can be seen."""
        deadline = time.monotonic() + DEATH_SECONDS
        while self.server is not None and time.monotonic() < deadline:
            self.server.check()
            time.sleep(0.01)

    def close(self) -> None:
        """End it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()
        self._errors.close()

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def run_load(
    server: Server | None, socket: Path, cpus: Sequence[int] | None, /, **arguments: object
) -> LoadResult:
    """One run from begin to end."""
    with Load(server, socket, cpus, **arguments) as load:
        return load.result()
