"""fio, for what the disk itself can do: io_uring, O_DIRECT, on files beside the agent's."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .failures import FailedError
from .process import find, pinned

SECONDS_MAX = 300


def available() -> None:
    """MissingError when there is no fio."""
    find("fio", "fio")


def run(file: Path, cpus: Sequence[int] | None, **options: object) -> dict[str, Any]:
    """One job on `file`; option names with _ for -, True for a bare one. Returns fio's own JSON
    of the job."""
    command = [find("fio", "fio"), "--name=job", f"--filename={file}", "--output-format=json"]
    command += ["--direct=1", "--thread", "--group_reporting", "--allow_file_create=0"]
    command += [f"--{key}={value}" for key, value in options.items()]
    try:
        done = subprocess.run(
            pinned(command, cpus),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FailedError(f"fio did not end in {SECONDS_MAX} s: {' '.join(command)}") from None
    if done.returncode:
        text = (done.stderr or done.stdout).strip()
        raise FailedError(f"fio, exit status {done.returncode}: {text[-1000:]}")
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if job["error"]:
        raise FailedError(f"fio reports error {job['error']} on {file}")
    return job


def prepare(file: Path, size: int) -> None:
    """A file of `size` bytes whose blocks are all allocated and written, as the journal's and
    the image's are after their first round."""
    if file.exists() and file.stat().st_size == size:
        return
    chunk = memoryview(bytes(range(256)) * 4096)
    with file.open("wb") as out:
        for at in range(0, size, len(chunk)):
            out.write(chunk[: size - at])
        out.flush()
        os.fsync(out.fileno())


def random_read_iops(
    file: Path, size: int, depth: int, seconds: float, cpus: Sequence[int] | None
) -> float:
    """4 KiB random reads a second."""
    job = run(
        file,
        cpus,
        rw="randread",
        bs="4k",
        iodepth=depth,
        ioengine="io_uring",
        size=size,
        time_based=1,
        runtime=f"{int(seconds * 1000)}ms",
        norandommap=1,
    )
    return float(job["read"]["iops"])


def sequential_write_mib_s(file: Path, size: int, cpus: Sequence[int] | None) -> float:
    """1 MiB sequential writes, eight in flight, and one fsync at the end: MiB/s over all."""
    job = run(
        file, cpus, rw="write", bs="1m", iodepth=8, ioengine="io_uring", size=size, end_fsync=1
    )
    return size / (1 << 20) / (float(job["write"]["runtime"]) / 1000)


def write_and_sync_s(file: Path, size: int, count: int, cpus: Sequence[int] | None) -> float:
    """Seconds of one write of `size` bytes and its fdatasync: the sum of the two medians."""
    job = run(
        file,
        cpus,
        rw="randwrite",
        bs=size,
        iodepth=1,
        ioengine="psync",
        fdatasync=1,
        number_ios=count,
        size=file.stat().st_size,
    )
    write = float(job["write"]["clat_ns"]["percentile"]["50.000000"])
    sync = float(job["sync"]["lat_ns"]["percentile"]["50.000000"])
    return (write + sync) / 1e9
