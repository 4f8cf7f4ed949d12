"""QEMU's COLO secondary: the `replication` block driver, fed over NBD, as in QEMU's
docs/block-replication.txt.

A paused QEMU without guest exports the secondary disk over NBD. What the primary would write
goes there; a backup job first copies the block's old content to the hidden disk; at a
checkpoint the active and the hidden disk are emptied. As that document advises, these two
live in memory (/dev/shm); the secondary disk is a raw file, io_uring, O_DIRECT.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .failures import FailedError
from .nbd import NbdWriter
from .process import Server, find
from .qmp import Qmp

RAM_DISK = Path("/dev/shm")


@dataclass(frozen=True)
class ColoResult:
    """Writes a second with everything counted, and the checkpoints."""

    iops: float
    checkpoints: int
    paused_s: float


class Colo(Server):
    """The secondary. start(), then run()."""

    def __init__(self, folder: Path, disk: Path, cpus: Sequence[int] | None) -> None:
        super().__init__("qemu-colo", folder)
        self.disk = disk
        self._wanted_cpus = cpus
        self._ram: Path | None = None
        self.nbd_path = self.sockets / "nbd"
        self._qmp_path = self.sockets / "qmp"
        self._qmp: Qmp | None = None

    def start(self) -> Colo:
        """Start QEMU, the NBD server and the replication."""
        program = find("qemu-system-x86_64", "qemu-system-x86")
        tool = find("qemu-img", "qemu-utils")
        self._ram = Path(tempfile.mkdtemp(dir=RAM_DISK, prefix="epochd-perf-colo-"))
        for name in ("active", "hidden"):
            subprocess.run(
                [
                    tool,
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    str(self._ram / name),
                    str(self.disk.stat().st_size),
                ],
                check=True,
            )
        nodes = [
            f"driver=file,node-name=disk-file,filename={self.disk},cache.direct=on,aio=io_uring",
            "driver=raw,node-name=disk,file=disk-file,cache.direct=on",
            f"driver=qcow2,node-name=hidden,file.driver=file,"
            f"file.filename={self._ram / 'hidden'},backing=disk",
            f"driver=qcow2,node-name=active,file.driver=file,"
            f"file.filename={self._ram / 'active'},backing=hidden",
            "driver=replication,node-name=colo,mode=secondary,top-id=colo,file=active",
        ]
        command = [program, "-machine", "none", "-accel", "tcg", "-nodefaults", "-display", "none"]
        command += ["-S", "-m", "32", "-qmp", f"unix:{self._qmp_path},server=on,wait=off"]
        for node in nodes:
            command += ["-blockdev", node]
        self.spawn(command, self._wanted_cpus)
        self.await_sockets(self._qmp_path)
        self._qmp = Qmp(self._qmp_path)
        address = {"type": "unix", "data": {"path": str(self.nbd_path)}}
        self._qmp.execute("nbd-server-start", addr=address)
        self._qmp.execute("nbd-server-add", device="disk", writable=True)
        self._qmp.execute("xen-set-replication", enable=True, primary=False)
        return self

    def checkpoint(self) -> None:
        """Nothing may be in flight."""
        assert self._qmp is not None
        self._qmp.execute("xen-colo-do-checkpoint")

    def run(
        self, *, seconds: float, a_second: float, depth: int, region: int, blocks: Sequence[bytes]
    ) -> ColoResult:
        """Write for `seconds`, with `a_second` checkpoints in each second."""
        writer = NbdWriter(self.nbd_path, "disk", region=region, blocks=blocks)
        try:
            begin = time.monotonic()
            writes = checkpoints = 0
            paused = 0.0
            while (now := time.monotonic()) < begin + seconds:
                writes += writer.write_until(min(now + 1 / a_second, begin + seconds), depth)
                stop = time.monotonic()
                self.checkpoint()
                paused += time.monotonic() - stop
                checkpoints += 1
                self.check()
            return ColoResult(writes / (time.monotonic() - begin), checkpoints, paused)
        except FailedError:
            self.check()  # its death is the better explanation
            raise
        finally:
            writer.close()

    def terminate(self) -> None:
        """QEMU ends by `quit`; stopping the replication first is refused while the backup
        job runs."""
        if self.process is not None and self._qmp is not None:
            self.check()
            self._qmp.execute("quit")
            self._qmp.close()
            self._qmp = None
            self.process.wait(60)
            self.process = None
        super().terminate()

    def close(self) -> None:
        try:
            super().close()
        finally:
            if self._qmp is not None:
                self._qmp.close()
            if self._ram is not None:
                shutil.rmtree(self._ram, ignore_errors=True)
