"""The agent under measurement: one epochd with one disk or several, and its control verbs.

EPOCHD_COMMAND replaces the command, words as in a shell; default: the one beside this
interpreter. What it leaves in shared memory is removed at the end.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .failures import FailedError, MissingError
from .process import STOP_SECONDS, Server
from .qmp import Qmp

SHM = Path("/dev/shm")
SHM_SPARE_BYTES = 256 << 20


def command() -> list[str]:
    """The words that start epochd."""
    given = os.environ.get("EPOCHD_COMMAND")
    return shlex.split(given) if given else [str(Path(sys.executable).parent / "epochd")]


def memory_room(size: int) -> None:
    """MissingError when an arena of this size does not fit into memory."""
    space = os.statvfs(SHM)
    free = space.f_bavail * space.f_frsize
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    free = min(free, int(lines["MemAvailable"].split()[0]) << 10)
    if free < size + SHM_SPARE_BYTES:
        raise MissingError(
            f"an arena of {size >> 20} MiB does not fit: {free >> 20} MiB of memory are free"
        )


class Agent(Server):
    """Start with start(). `level` is the compression level, 0 for raw ingest. Each image of
    `more` is a disk of its own; `disks` are their sockets, `socket` the first."""

    def __init__(
        self,
        folder: Path,
        image: Path,
        *,
        arena: int,
        level: int = 1,
        cpus: Sequence[int] | None = None,
        more: Sequence[Path] = (),
        reactors: int = 1,
    ) -> None:
        super().__init__("epochd", folder)
        self.arena = arena
        self.level = level
        self._wanted_cpus = cpus
        self.images = [image, *more]
        self.reactors = reactors
        self.disks = [self.sockets / f"disk{number or ''}" for number in range(len(self.images))]
        self.socket = self.disks[0]
        self.control_path = self.sockets / "control"
        self._qmp: Qmp | None = None
        self._arena_name = ""

    def start(self) -> Agent:
        """Start and return once the sockets answer."""
        if not self._arena_name:
            memory_room(self.arena)
        arguments = ["--reactors", str(self.reactors)]
        if len(self.images) == 1:
            arguments += ["--blk-file", str(self.images[0]), "--socket-path", str(self.socket)]
        else:
            arguments += ["--config", str(self._config())]
        arguments += ["--control", str(self.control_path), "--state-dir", str(self.folder)]
        arguments += ["--arena-size", str(self.arena), "--compress-level", str(self.level)]
        self.spawn([*command(), *arguments], self._wanted_cpus)
        self.await_sockets(self.control_path, *self.disks)
        self._arena_name = self.status()["arena"]["name"].removeprefix("/")
        return self

    def _config(self) -> Path:
        """A configuration file that names the disks."""
        path = self.folder / "epochd.toml"
        path.write_text(
            "".join(
                f"[[disk]]\nname = {json.dumps(f'disk{number}')}\n"
                f"image = {json.dumps(str(image))}\nsocket = {json.dumps(str(socket))}\n"
                for number, (image, socket) in enumerate(zip(self.images, self.disks, strict=True))
            )
        )
        return path

    @property
    def qmp(self) -> Qmp:
        """The control connection, made at first use and again after each start."""
        if self._qmp is None:
            self._qmp = Qmp(self.control_path)
        return self._qmp

    def hang_up(self) -> None:
        """Close the control connection."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.qmp.execute("query-status")
        return answer

    def group_stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.qmp.execute("query-stats")["group"]
        return answer

    def compression(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.qmp.execute("query-stats")["compression"]
        return answer

    def held(self) -> int:
        """Writes that had to wait for room in the arena, since the start."""
        return int(self.qmp.execute("query-stats")["disks"]["held"])

    def seal(self) -> int:
        """Seal the open epoch and return its number."""
        return int(self.qmp.execute("epoch-seal")["epoch"])

    def commit(self) -> float:
        """Commit what is sealed; seconds until it was acknowledged."""
        return float(self.qmp.timed("epoch-commit")[1] / 1e9)

    def discard(self) -> float:
        """Drop what is not committed; seconds until that was acknowledged."""
        return float(self.qmp.timed("epoch-discard")[1] / 1e9)

    def await_applied(self) -> None:
        """Wait until the image holds all that is committed."""

        def applied() -> bool:
            status = self.status()
            return bool(status["applied"] == status["committed"])

        self.await_that("the image to be up to date", applied, STOP_SECONDS)

    def check(self) -> None:
        super().check()
        if "Traceback (most recent call last)" in self.log_end(200):
            raise FailedError(f"epochd reports a bug:\n{self.log_end(40)}")

    def kill(self) -> None:
        self.hang_up()
        super().kill()

    def terminate(self) -> None:
        """A clean stop with nothing uncommitted, which frees the arena."""
        if self.process is not None:
            self.check()
            self.discard()
            self.hang_up()
        super().terminate()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.hang_up()
            if self._arena_name:  # and what lies beside it
                for path in SHM.glob(f"{self._arena_name}*"):
                    path.unlink(missing_ok=True)
