"""The daemon with crash points (native/crash.h), built in a folder of its own.

`command()` gives the words that start it, for EPOCHD_COMMAND or `harness.Daemon`. The build
is made at first use and when a source has changed; a lock keeps two runs apart.

Errors: RuntimeError with the end of the compiler's output.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / ".build" / "crash"
SITE = BUILD / "site"


def _run(*command: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-4000:]}")


def command() -> list[str]:
    """The words that run the daemon with crash points; builds it when that is due."""
    BUILD.mkdir(parents=True, exist_ok=True)
    meson = str(Path(sys.executable).parent / "meson")
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILD / "meson" / "build.ninja").exists():
            purelib = [f"-Dpython.{kind}dir={SITE}" for kind in ("purelib", "platlib")]
            options = ["-Dcrash_points=true", "-Dbuildtype=debugoptimized", *purelib]
            prefix = f"--prefix={BUILD}/root"
            _run(meson, "setup", str(BUILD / "meson"), *options, prefix)
        _run(meson, "install", "--quiet", "-C", str(BUILD / "meson"))
    return ["env", f"PYTHONPATH={SITE}", sys.executable, "-m", "epochd"]
