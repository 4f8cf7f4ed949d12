"""fio in a guest, writing with checksums and verifying what it wrote, for as long as wanted.

fio is this machine's, with its libraries: far too many for an initramfs, so they come as a small
read-only disk that the guest mounts (`drive`, `mount`). It writes random blocks of random data
with direct I/O, many in flight, each with a CRC32C, its place and a count in its header, and
reads each back soon after: a block that is lost, torn, old or in the wrong place ends it.
Flushes come in between.

Errors: GuestError with fio's own words.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import tempfile
from pathlib import Path

from harness import until

from . import image
from .machine import GuestError, Machine

LOADER = "lib64/ld-linux-x86-64.so.2"
ROOM_MIB = 40  # of the disk, beside the files themselves
BLOCK_BYTES = 8192


def drive() -> Path:
    """An ext4 file system with fio and its libraries, made anew when one of them changes."""
    program = image.host_program("fio")
    files = {"fio": program}
    for library in image.libraries(program):
        files[LOADER if library.name.startswith("ld-linux") else f"lib/{library.name}"] = library
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(name.encode() + path.read_bytes())
    image.CACHE.mkdir(parents=True, exist_ok=True)
    with (image.CACHE / "fio.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = image.CACHE / f"fio-{digest.hexdigest()[:16]}.img"
        if not done.exists():
            for old in image.CACHE.glob("fio-*.img"):
                old.unlink()
            _make(done, files)
    return done


def _make(done: Path, files: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory(dir=image.CACHE) as name:
        tree, made = Path(name) / "tree", Path(name) / "fio.img"
        total = 0
        for target, source in files.items():
            (tree / target).parent.mkdir(parents=True, exist_ok=True)
            (tree / target).write_bytes(source.read_bytes())
            (tree / target).chmod(0o755)
            total += source.stat().st_size
        with made.open("wb") as file:
            file.truncate(total + (ROOM_MIB << 20))
        mke2fs = image.host_program("mke2fs")
        subprocess.run([mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, made],
                       check=True)
        made.rename(done)


def machine_options(disk: Path) -> list[str]:
    """What QEMU needs for it. It comes after the machine's own disks."""
    return ["-drive", f"file={disk},if=none,id=fio,format=raw,readonly=on,file.locking=off",
            "-device", "virtio-blk-pci,drive=fio"]


class Fio:
    """One run of it on a whole disk, from `start` to `stop`."""

    def __init__(self, device: str, drive_device: str, *, mib: int = 4, jobs: int = 2) -> None:
        """`mib`: of the disk that each job writes to; `drive_device`: where fio itself is."""
        self.device = device
        self.drive_device = drive_device
        self.mib = mib
        self.jobs = jobs
        self.blocks = (mib << 20) // BLOCK_BYTES * jobs

    def _options(self, filename: str, kind: str) -> list[str]:
        words = ["--name=load", f"--filename={filename}", f"--rw={kind}", f"--bs={BLOCK_BYTES}"]
        words += [f"--size={self.mib}m", f"--offset_increment={self.mib}m", "--thread"]
        words += [f"--numjobs={self.jobs}", "--group_reporting", "--direct=1"]
        return [*words, "--verify=crc32c", "--verify_fatal=1"]

    def start(self, machine: Machine) -> None:
        """Mounts it and lets it run; returns once it has verified something."""
        machine.run(f"mkdir -p /fio && mount -o ro {self.drive_device} /fio")
        words = [f"/fio/{LOADER}", "--library-path", "/fio/lib", "/fio/fio"]
        words += self._options(self.device, "randwrite")
        words += ["--ioengine=libaio", "--iodepth=16", "--fsync=256", "--loops=1000000"]
        words += ["--verify_backlog=128", "--gtod_reduce=1"]
        run = f"({' '.join(words)}) >/run/fio.out 2>&1; echo $? >/run/fio.status"
        machine.run(f"({run}) >/dev/null 2>&1 &")
        until("fio to verify its first blocks", lambda: self.progress(machine)[0] > 0)

    def progress(self, machine: Machine) -> tuple[int, int]:
        """Reads and writes that the disk has done; GuestError when fio has ended."""
        if machine.run("cat /run/fio.status 2>/dev/null", check=False):
            raise GuestError(f"fio ended: {machine.run('tail -n 30 /run/fio.out')}")
        fields = machine.run(f"cat /sys/block/{Path(self.device).name}/stat").split()
        return int(fields[0]), int(fields[4])

    def stop(self, machine: Machine) -> None:
        """Ends it between two requests; GuestError when it saw an error."""
        machine.run("kill -INT $(pidof ld-linux-x86-64.so.2 || pidof fio)")
        until("fio to end", lambda: machine.run("cat /run/fio.status 2>/dev/null", check=False))
        text = machine.run("cat /run/fio.out")
        if "err= 0" not in text or "verify:" in text or "error" in text:
            raise GuestError(f"fio: {text}")

    def digest(self, machine: Machine) -> str:
        """MD5 of what its part of the disk holds, read past the guest's cache."""
        count = self.mib * self.jobs
        line = f"dd if={self.device} bs=1M count={count} iflag=direct status=none | md5sum"
        return machine.run(line).split()[0]

    def verify_image(self, image_path: Path) -> None:
        """On the host, with the agent stopped: every block's checksum, and that it is in its
        place. All blocks must have been written."""
        line = [str(image.host_program("fio")), *self._options(str(image_path), "read")]
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or "err= 0" not in done.stdout:
            raise GuestError(f"fio finds the image wrong: {done.stdout}")
