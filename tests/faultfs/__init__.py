"""A folder that fails when told to: see faultfs.c.

`FaultFs` owns the mount and the process behind it; use it in a `with`. The files lie in
`backing`, where they can be looked at whatever the faults; daemons are given `root`.

Errors: RuntimeError when the program cannot be built or mounted; OSError of umount.
"""

from __future__ import annotations

import errno
import fcntl
import shlex
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from harness import until

SOURCE = Path(__file__).resolve().parent / "faultfs.c"
BUILD = SOURCE.parents[2] / ".build" / "faultfs"


def _program() -> Path:
    """The program, built when its source has changed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "faultfs"
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
            flags = shlex.split(subprocess.check_output(
                ["pkg-config", "--cflags", "--libs", "fuse3"], text=True
            ))
            warnings = ["-Wall", "-Wextra", "-Werror"]
            line = ["gcc", "-O1", "-g", "-std=gnu11", "-D_GNU_SOURCE", *warnings, str(SOURCE)]
            subprocess.run([*line, *flags, "-o", program], check=True)
    return program


class FaultFs:
    """One such file system below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.backing = folder / "backing"
        self.root = folder / "faulty"
        self.log = folder / "faultfs.log"
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.backing.mkdir(parents=True)
        self.root.mkdir()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [_program(), self.backing, self.root],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )
        if self._answer() != "mounted":
            self.process.wait()
            raise RuntimeError(f"faultfs: {self.log.read_text()}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.process is not None
        # A killed daemon's io_uring lets go of its files some time after the process.
        until("faultfs to be idle", lambda: subprocess.run(["umount", self.root]).returncode == 0)
        self.process.communicate(timeout=30)
        self.process = None

    def _answer(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _tell(self, line: str) -> str:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if answer == "wrong command" or not answer:
            raise RuntimeError(f"faultfs: {line!r}: {answer!r}, {self.log.read_text()}")
        return answer

    def fail(self, op: str, name: str, error: int = errno.EIO, *, lose: bool = True) -> None:
        """From now on `op` (read, write, sync, zero) on files whose name ends in `name`
        fails. `lose`: a failed sync loses what it should have made durable."""
        self._tell(f"{'fail' if lose else 'keep'} {op} {name} {error}")

    def fill_up(self, name: str) -> None:
        """From now on writes to these files end short, the rest of them with ENOSPC."""
        self._tell(f"short write {name} 0")

    def heal(self) -> None:
        """No faults any more."""
        self._tell("heal")

    def power_cut(self) -> None:
        """Lose all bytes that no successful sync covers."""
        self._tell("cut")

    def hits(self) -> int:
        """Operations that were made to fail so far."""
        return int(self._tell("hits"))

