"""What the load writes: the blocks of an ext4 file system made of this machine's own files.

Made once, kept in the cache folder. The files are those of /usr in the order of the SHA-256 of
their paths: a fair mixture (programs, libraries, documents, headers, compressed files), the
same at every run on the same system. No journal and little free room, so that zero blocks do
not flatter the compression; how many are left is in the JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from .failures import FailedError, MissingError
from .process import find

BLOCK = 4096
FULL = 0.97  # share of the image that files get; the rest is for inodes and bitmaps
FILE_BYTES_MAX = 32 << 20  # no single file may dominate
ROOT = Path("/usr")
UUID = "7a1f3c5e-0000-4000-8000-000000000001"


@dataclass(frozen=True)
class FsImage:
    """The image and what is in it."""

    path: Path
    size: int
    files: int
    zero_share: float
    digest: str


def candidates(root: Path) -> list[tuple[str, Path, int]]:
    """(hash of the path, file, size) of regular files under `root`, in order of the hash."""
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            status = path.lstat()
            regular = (status.st_mode & 0o170000) == 0o100000
            if regular and 0 < status.st_size <= FILE_BYTES_MAX and os.access(path, os.R_OK):
                key = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()
                found.append((key, path, status.st_size))
    found.sort()
    return found


def _collect(tree: Path, size: int, root: Path) -> tuple[int, str]:
    """Copy files until the image will be full; returns their number and a digest of names."""
    left, count, digest = int(size * FULL), 0, hashlib.sha256()
    for key, path, length in candidates(root):
        need = -(-length // BLOCK) * BLOCK + 320  # its blocks, its inode, its directory entry
        if need > left:
            continue
        left -= need
        count += 1
        digest.update(key.encode())
        target = tree / f"{int(key[:2], 16):03d}" / key[2:16]
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        os.utime(target, (0, 0))
        if left < size // 500:
            break
    if left > size // 4:
        raise MissingError(f"{root} has too few files for an image of {size >> 20} MiB")
    return count, digest.hexdigest()


def _zero_share(path: Path) -> float:
    zero, blocks, zeroes = bytes(BLOCK), 0, 0
    with path.open("rb") as file:
        while chunk := file.read(256 * BLOCK):
            for at in range(0, len(chunk), BLOCK):
                blocks += 1
                zeroes += chunk[at : at + BLOCK] == zero
    return zeroes / max(blocks, 1)


def _make(path: Path, size: int, root: Path) -> FsImage:
    mke2fs = find("mke2fs", "e2fsprogs")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="tree-") as name:
        tree = Path(name)
        count, digest = _collect(tree, size, root)
        half = path.with_suffix(".part")
        half.unlink(missing_ok=True)
        command = [mke2fs, "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-m", "0"]
        command += ["-N", str(count + 1024), "-O", "^has_journal,^metadata_csum,^resize_inode"]
        command += ["-U", UUID, "-E", f"hash_seed={UUID},root_owner=0:0", "-d", name]
        command += [str(half), f"{size >> 10}k"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "E2FSPROGS_FAKE_TIME": "1", "SOURCE_DATE_EPOCH": "1"},
        )
        if done.returncode:
            raise FailedError(f"mke2fs: {done.stderr.strip()}")
    with half.open("r+b") as file:
        file.truncate(size)
    image = FsImage(path, size, count, _zero_share(half), digest)
    half.rename(path)
    return image


def fs_image(cache: Path, size: int, root: Path = ROOT) -> FsImage:
    """The image of `size` bytes, from the cache or made now."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"files-{size >> 20}M.ext4"
    note = path.with_suffix(".json")
    if path.exists() and note.exists():
        return FsImage(path, **json.loads(note.read_text()))
    image = _make(path, size, root)
    record = asdict(image)
    del record["path"]
    note.write_text(json.dumps(record))
    return image
