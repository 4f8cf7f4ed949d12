"""The guest: Debian's cloud kernel and an initramfs built for it.

The kernel and busybox are taken from the unpacked Debian packages that tools/setup leaves
under `.cache/guest/root`; the programs of e2fsprogs and util-linux come from this machine,
with their libraries. The result is cached beside them under a name that is a hash of every input.

Errors: FileNotFoundError when a part is missing, with the command that brings it.
Not done here: nothing is installed and nothing is fetched.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "guest"
HERE = Path(__file__).resolve().parent

# In the order in which they are loaded; ext4 and the rest are part of the kernel.
MODULES = (
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
)
HOST_PROGRAMS = ("mke2fs", "e2fsck", "blkdiscard")


@dataclass(frozen=True)
class Boot:
    """What QEMU loads: a kernel and its initramfs; and the guest's program, which runs
    on the host as well."""

    kernel: Path
    initrd: Path
    counter: Path


def _one(pattern: str) -> Path:
    found = sorted((CACHE / "root").glob(pattern))
    if not found:
        raise FileNotFoundError(f"{CACHE}/root/{pattern} is missing: run tools/setup")
    return found[-1]


def host_program(name: str) -> Path:
    """A program of this machine."""
    path = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        raise FileNotFoundError(f"{name} is missing: run tools/setup")
    return Path(path)


def libraries(program: Path) -> list[Path]:
    """Shared libraries of a program, its loader included."""
    text = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    return [Path(p) for p in re.findall(r"(/\S+) \(0x", text)]


def _contents() -> dict[str, Path]:
    """Path in the guest -> file here, in the order of the archive."""
    kernel = _one("boot/vmlinuz-*")
    modules = CACHE / "root" / "lib" / "modules" / kernel.name.removeprefix("vmlinuz-") / "kernel"
    files = {"init": HERE / "init", "bin/busybox": _one("bin/busybox")}
    files |= {f"modules/{Path(m).name}": modules / m for m in MODULES}
    for name in HOST_PROGRAMS:
        program = host_program(name)
        files[f"sbin/{name}"] = program
        files |= {str(lib).lstrip("/"): lib for lib in libraries(program)}
    return files


def _digest(files: dict[str, Path]) -> str:
    total = hashlib.sha256()
    for name, path in files.items():
        total.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    for source in (HERE / "counter.c", Path(__file__)):
        total.update(source.read_bytes())
    return total.hexdigest()[:16]


def _populate(tree: Path, files: dict[str, Path]) -> None:
    for name, path in files.items():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(0o755)
    (tree / "etc").mkdir()
    (tree / "etc" / "modules.list").write_text(
        "".join(f"/modules/{Path(m).name}\n" for m in MODULES)
    )
    (tree / "sbin" / "mkfs.ext4").symlink_to("mke2fs")
    subprocess.run(
        ["gcc", "-O2", "-static", "-o", tree / "bin" / "counter", HERE / "counter.c"], check=True
    )


def _archive(tree: Path, output: Path) -> None:
    names = sorted(str(p.relative_to(tree)) for p in tree.rglob("*"))
    with output.open("wb") as out:
        cpio = [str(tree / "bin" / "busybox"), "cpio", "-o", "-H", "newc"]
        text = "".join(f"{n}\n" for n in names).encode()
        quiet = subprocess.DEVNULL
        subprocess.run(cpio, cwd=tree, input=text, stdout=out, stderr=quiet, check=True)


def build() -> Boot:
    """The kernel and initramfs of the test guest, built when an input has changed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    files = _contents()
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = CACHE / f"built-{_digest(files)}"
        if not done.exists():
            for old in CACHE.glob("built-*"):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=CACHE, ignore_cleanup_errors=True) as name:
                built = Path(name)
                _populate(built / "tree", files)
                _archive(built / "tree", built / "initramfs.cpio")
                built.rename(done)
    return Boot(_one("boot/vmlinuz-*"), done / "initramfs.cpio", done / "tree" / "bin" / "counter")
