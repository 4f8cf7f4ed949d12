"""Facts about this machine and this checkout, for the results; and whether it is quiet."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUSY_SHARE = 0.10
VERSIONS = {
    "qemu-storage-daemon": ["qemu-storage-daemon", "--version"],
    "qemu-system-x86_64": ["qemu-system-x86_64", "--version"],
    "fio": ["fio", "--version"],
}


def _output(command: list[str]) -> str | None:
    """First line of what a command prints; None when it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else None


def revision() -> str:
    """The commit of this checkout, with "-dirty" when files differ from it."""
    head = _output(["git", "rev-parse", "HEAD"])
    if not head:
        return "unknown (no git checkout)"
    return head + ("-dirty" if _output(["git", "status", "--porcelain", "-uno"]) else "")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(folder: Path) -> dict[str, Any]:
    """Type and device of the file system that a folder is on, and if it has O_DIRECT."""
    best, kind, device = "", "?", "?"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, point, fs, *_ = line.split()
        if str(folder).startswith(point) and len(point) >= len(best):
            best, kind, device = point, fs, source
    return {
        "folder": str(folder),
        "type": kind,
        "device": device,
        "o_direct": _has_direct(folder),
        "free_bytes": shutil.disk_usage(folder).free,
    }


def _has_direct(folder: Path) -> bool:
    probe = folder / ".direct"
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def _ticks() -> tuple[int, int, int]:
    """(busy, stolen, all) clock ticks of all CPUs since boot."""
    values = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = values[3] + values[4]
    return sum(values) - idle, values[7], sum(values)


class Ticks:
    """Share of CPU time that was busy, and that the hypervisor took, since this was made."""

    def __init__(self) -> None:
        self._start = _ticks()

    def shares(self) -> tuple[float, float]:
        now = _ticks()
        whole = max(now[2] - self._start[2], 1)
        return (now[0] - self._start[0]) / whole, (now[1] - self._start[1]) / whole


def foreign_load(seconds: float = 0.5) -> float:
    """Share of all CPU time that others use now, measured before anything of ours runs."""
    ticks = Ticks()
    time.sleep(seconds)
    return ticks.shares()[0]


def facts(work: Path) -> dict[str, Any]:
    """For the head of the JSON."""
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = dict(line.split(":", 1) for line in file)
    return {
        "revision": revision(),
        "host": platform.node(),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory["MemTotal"].split()[0]) << 10,
        "locked_memory_limit": _locked_limit(),
        "disk": _file_system(work),
        "versions": {name: _output(command) for name, command in VERSIONS.items()},
        "python": platform.python_version(),
    }


def _locked_limit() -> int | str:
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if soft == resource.RLIM_INFINITY else soft
