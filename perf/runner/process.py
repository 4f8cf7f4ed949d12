"""A child process that serves: pinned to CPUs, with a log, watched, ended for certain.

`Server` is a context manager. `check()` raises FailedError once the process is gone before its
time: with the end of its log, so that a person sees why.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .failures import FailedError, MissingError

START_SECONDS = 120.0  # a first start reserves gigabytes
STOP_SECONDS = 120.0  # a clean stop brings committed epochs into the image


def find(program: str, package: str) -> str:
    """Path of a program; MissingError names Debian's package when there is none."""
    found = shutil.which(program)
    if found is None:
        raise MissingError(f"{program} is not installed (Debian: {package})")
    return found


def pinned(command: Sequence[str], cpus: Sequence[int] | None) -> list[str]:
    """The command, bound to these CPUs; None: to whichever."""
    if cpus is None:
        return list(command)
    return ["taskset", "-c", ",".join(map(str, cpus)), *command]


def listens(path: Path) -> bool:
    """True when somebody listens on this Unix socket; asks the kernel, connects to nobody."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        # Flags: __SO_ACCEPTCON, "listening".
        if len(words) == 8 and words[7] == str(path) and int(words[3], 16) & 0x10000:
            return True
    return False


class Server:
    """A process with a Unix socket of vhost-user-blk, NBD or the like."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.log_path = folder / f"{name}.log"
        # The names of Unix sockets have 107 bytes at most: they cannot be below any folder.
        self.sockets = Path(tempfile.mkdtemp(dir="/tmp", prefix="epochd-perf-"))
        self.process: subprocess.Popen[bytes] | None = None
        self.cpus: Sequence[int] | None = None

    def spawn(self, command: Sequence[str], cpus: Sequence[int] | None) -> None:
        """Start the command with output to the log. Its sockets are not there yet."""
        self.cpus = cpus
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                pinned(command, cpus), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def await_sockets(self, *paths: Path) -> None:
        """Wait until somebody listens on all of them."""
        self.await_that(f"{self.name}'s sockets", lambda: all(map(listens, paths)), START_SECONDS)

    def await_that(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for a condition, watching the process."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise FailedError(f"waited {seconds:g} s for {what}; log: {self.log_path}")
            time.sleep(0.002)

    @property
    def pid(self) -> int:
        if self.process is None:
            raise FailedError(f"{self.name} is not running")
        return self.process.pid

    def log_end(self, lines: int = 12) -> str:
        """The last lines that it printed."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def check(self) -> None:
        """FailedError when the process has ended."""
        if self.process is None:
            raise FailedError(f"{self.name} is not running")
        status = self.process.poll()
        if status is None:
            return
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        raise FailedError(f"{self.name} died during the run, {how}:\n{self.log_end()}")

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def terminate(self) -> None:
        """SIGTERM and wait; FailedError for a bad end."""
        if self.process is None:
            return
        self.check()
        self.process.terminate()
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise FailedError(f"{self.name} did not end in {STOP_SECONDS:g} s") from None
        self.process = None
        if status not in (0, -signal.SIGTERM):
            raise FailedError(f"{self.name} ended with status {status}:\n{self.log_end()}")

    def close(self) -> None:
        """End it however it is; nothing is reported any more."""
        try:
            with contextlib.suppress(FailedError):
                self.terminate()
            if self.process is not None:
                self.kill()
        finally:
            shutil.rmtree(self.sockets, ignore_errors=True)

    def cpu_seconds(self) -> float:
        """CPU time that all its threads have used so far, to the nanosecond."""
        threads = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(path.read_text().split()[0]) for path in threads) / 1e9


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Closes it at the end. When nothing else went wrong, a bad end is an error."""
    try:
        yield server
        server.terminate()
    finally:
        server.close()
