"""Those that are compared with: QEMU's storage daemon, SPDK's vhost target, plain memcpy.

A peer that is not there raises MissingError with what to install; only its comparison is
skipped. COLO is in colo.py, fio in fio.py.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .failures import FailedError, MissingError
from .process import Server, find, listens, pinned

NAMES = {
    "null": "qemu-storage-daemon over null-co, which stores nothing",
    "image": "qemu-storage-daemon over the same image, io_uring, O_DIRECT",
    "spdk": "SPDK's vhost target, by --spdk-socket",
    "fio": "fio with io_uring, O_DIRECT, same file system",
    "colo": "QEMU's COLO replication driver, secondary, over NBD",
    "memcpy": "copies of 4 KiB into memory, nothing else",
    "self": "the agent itself under other conditions",
    "none": "nothing: the target is a figure",
}


class StorageDaemon(Server):
    """qemu-storage-daemon's vhost-user-blk export: over null-co, or over a raw image with
    io_uring and O_DIRECT. One I/O thread, as the agent has one reactor."""

    def __init__(
        self, folder: Path, image: Path | None, size: int, cpus: Sequence[int] | None
    ) -> None:
        super().__init__("qemu-storage-daemon", folder)
        self.socket = self.sockets / "disk"
        self._image = image
        self._size = size
        self._wanted_cpus = cpus

    def _export(self, *options: str) -> None:
        program = find("qemu-storage-daemon", "qemu-system-common or qemu-storage-daemon")
        if self._image is None:
            node = [f"null-co,node-name=disk,size={self._size}"]
        else:
            node = [
                f"file,node-name=file,filename={self._image},aio=io_uring,"
                "cache.direct=on,locking=off",
                "raw,node-name=disk,file=file",
            ]
        command = [program, "--object", "iothread,id=thread"]
        for text in node:
            command += ["--blockdev", text]
        self.spawn([*command, *options], self._wanted_cpus)
        self.await_sockets(self.socket)

    def start(self) -> StorageDaemon:
        """Serve vhost-user-blk."""
        self._export(
            "--export",
            "vhost-user-blk,id=export,node-name=disk,writable=on,"
            f"iothread=thread,addr.type=unix,addr.path={self.socket},num-queues=1",
        )
        return self

    def start_nbd(self) -> StorageDaemon:
        """Serve NBD instead, as export "disk". In the main thread: QEMU 7.2 aborts when a client
        of an export in an I/O thread leaves."""
        self._export(
            "--nbd-server",
            f"addr.type=unix,addr.path={self.socket}",
            "--export",
            "nbd,id=export,node-name=disk,name=disk,writable=on",
        )
        return self


def spdk_socket(path: Path | None) -> Path:
    """The socket that was given; MissingError when it was not, or nobody listens."""
    if path is None:
        raise MissingError("no SPDK vhost socket was given (--spdk-socket PATH)")
    if not listens(path):
        raise MissingError(f"nobody listens on the SPDK socket {path}")
    return path


def memcpy_rate(cache: Path, depth: int, copies: int, cpus: Sequence[int] | None) -> float:
    """Copies of 4 KiB a second, from `depth` buffers into a gigabyte, one after the other:
    what is left of a write when all but its copy is taken away."""
    source = Path(__file__).resolve().parents[1] / "memcpy.c"
    program = cache / "memcpy"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        compiler = shutil.which("cc") or find("gcc", "gcc")
        cache.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [compiler, "-std=gnu11", "-O3", "-o", str(program), str(source)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise FailedError(f"memcpy.c does not compile: {done.stderr}")
    done = subprocess.run(
        pinned([str(program), str(depth), str(copies)], cpus),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FailedError(f"memcpy: {done.stderr}")
    return float(done.stdout)
