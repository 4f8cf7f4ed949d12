"""Raw image files and block devices: open, check, lock, and find their alignment.

Contract: open_image() returns an open, locked image or raises an ImageError (or a kin of it)
that names the path, and then nothing stays open. The Image owns its descriptor until
close(); the lock goes with it.

The image is opened with O_DIRECT. Where the file system refuses that, or asks for an
alignment that the image's size does not have, it is opened buffered, with a warning: slower,
and committed data stays correct because apply ends with fdatasync all the same.
"""

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from . import core, locks
from .config import DiskConfig
from .errors import ImageError, ImageInUse, ImageMissing, ImageSizeError, ImageTwice

log = logging.getLogger("epochd.images")

SECTOR_BYTES = 512
PAGE_BYTES = 4096
BLKSSZGET = 0x1268
BLKROGET = 0x125E

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BTIME = 0x800
_STATX_BYTES = 256
_BTIME_OFFSET = 0x50  # seconds s64, then nanoseconds u32
_DIO_ALIGN_OFFSET = 152  # stx_dio_mem_align, then stx_dio_offset_align, both u32


@dataclass(frozen=True)
class Image:
    """An open, locked image. Sizes in bytes; `logical_block_bytes` is 512 or 4096."""

    config: DiskConfig
    fd: int
    direct: bool
    block_device: bool
    size_bytes: int
    device: int
    identity: int
    logical_block_bytes: int
    memory_align: int

    def setup(self) -> core.DiskSetup:
        """What the core needs to know of it."""
        return core.DiskSetup(
            fd=self.fd,
            direct=self.direct,
            read_only=self.config.read_only,
            block_device=self.block_device,
            size_bytes=self.size_bytes,
            identity=0 if self.block_device else self.identity,
            logical_block_bytes=self.logical_block_bytes,
            memory_align=self.memory_align,
            name=self.config.name,
            serial=self.config.serial,
        )

    def close(self) -> None:
        """Close the descriptor and with it drop the lock."""
        os.close(self.fd)


def birth_ns(fd: int) -> int:
    """When the inode behind `fd` came to be, in ns; 0 where the file system does not tell.

    With the inode's number it names a file for good: the number alone is used again.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer) != 0:
        return 0
    (mask,) = struct.unpack_from("=I", buffer, 0)
    if not mask & _STATX_BTIME:
        return 0
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, _BTIME_OFFSET)
    return int(seconds) * 10**9 + int(nanoseconds)


def dio_alignment(fd: int) -> tuple[int, int] | None:
    """(memory, offset) alignment in bytes that O_DIRECT needs on `fd`, by statx(2).

    (0, 0): O_DIRECT is not supported; None: the kernel or file system does not tell.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return None
    (mask,) = struct.unpack_from("=I", buffer, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("=II", buffer, _DIO_ALIGN_OFFSET)
    return memory, offset


def _probe_alignment(fd: int) -> tuple[int, int]:
    """For kernels that do not tell: does a direct read of one sector work?"""
    with mmap.mmap(-1, PAGE_BYTES) as page, memoryview(page) as view:
        try:
            os.preadv(fd, [view[:SECTOR_BYTES]], 0)
        except OSError:
            return PAGE_BYTES, PAGE_BYTES
    return SECTOR_BYTES, SECTOR_BYTES


def _sector_bytes(fd: int, block_device: bool) -> int:
    """Logical sector size that the device demands; 512 for a file."""
    if not block_device:
        return SECTOR_BYTES
    answer = fcntl.ioctl(fd, BLKSSZGET, struct.pack("=i", 0))
    return int(struct.unpack("=i", answer)[0])


def _open(path: Path, flags: int) -> int:
    """os.open with the errors that a user can do something about put in words."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ImageMissing(path) from None
    except PermissionError as error:
        how = "read" if flags & os.O_ACCMODE == os.O_RDONLY else "read and write"
        reason = f"no permission to {how} it ({error.strerror})"
        raise ImageError(path, reason) from None
    except OSError as error:
        if error.errno == errno.EROFS:
            reason = "is on a read-only file system; give --read-only or mount it writable"
            raise ImageError(path, reason) from None
        if error.errno == errno.EBUSY:
            raise ImageInUse(path, "the device is mounted or part of another device") from None
        raise


def _open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """Open with O_DIRECT when the file system has it; return (fd, direct)."""
    try:
        # An exclusive device may still be in the hands of a killed agent, as a lock may.
        return locks.patiently(lambda: _open(path, flags | os.O_DIRECT), ImageInUse), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise ImageError(path, f"cannot be opened: {error.strerror}") from None
    return _open(path, flags), False


def _check_writable(path: Path, fd: int) -> None:
    """open(2) lets a write-protected device be opened for writing; writes would fail later."""
    answer = fcntl.ioctl(fd, BLKROGET, struct.pack("=i", 0))
    if struct.unpack("=i", answer)[0]:
        raise ImageError(path, "the device is write-protected; give --read-only")


def _inspect(path: Path) -> os.stat_result:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageMissing(path) from None
    except OSError as error:
        raise ImageError(path, f"cannot be looked at: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(path, "is a directory, not an image")
    # Before open(2): opening a FIFO would wait for a writer.
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise ImageError(path, "is neither a regular file nor a block device")
    return status


def _lock(path: Path, fd: int, read_only: bool) -> None:
    held, unshared = locks.CONSISTENT_READ, locks.WRITE | locks.RESIZE
    if not read_only:
        # While epochs are applied the image is of no point in time: nobody may rely on it.
        held, unshared = held | locks.WRITE, unshared | locks.CONSISTENT_READ
    try:
        locks.patiently(lambda: locks.lock_image(fd, held, unshared))
    except locks.LockConflict as conflict:
        raise ImageInUse(path, conflict) from None
    except OSError as error:
        raise ImageError(path, f"cannot be locked: {error.strerror}") from None


def _alignment(fd: int, path: Path, size: int, sector: int) -> tuple[bool, int, int]:
    """Return (direct usable, logical block bytes, memory alignment)."""
    memory, offset = dio_alignment(fd) or _probe_alignment(fd)
    block = max(offset, sector)
    if offset == 0:
        reason = "the file system does not support O_DIRECT"
    elif block > PAGE_BYTES or memory > PAGE_BYTES:
        reason = f"O_DIRECT needs an alignment of {max(block, memory)} bytes here"
    elif size % block:
        reason = f"its size is not a multiple of {block} bytes, as O_DIRECT needs here"
    else:
        return True, block, max(memory, 1)
    log.warning("image %s: buffered, because %s", path, reason)
    return False, sector, 1


def _clear_direct(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def _examine(config: DiskConfig, fd: int, direct: bool) -> Image:
    """Lock the image behind `fd` and find out its geometry."""
    path, status = config.image, os.fstat(fd)
    block_device = stat.S_ISBLK(status.st_mode)
    if block_device and not config.read_only:
        _check_writable(path, fd)
    _lock(path, fd, config.read_only)
    size = os.lseek(fd, 0, os.SEEK_END)
    sector = _sector_bytes(fd, block_device)
    if size == 0:
        raise ImageError(path, "is empty; a disk needs at least one sector")
    if sector not in (SECTOR_BYTES, PAGE_BYTES):
        raise ImageError(path, f"has sectors of {sector} bytes; only 512 and 4096 are served")
    if size % sector:
        raise ImageSizeError(path, size, sector)
    block, memory = sector, 1
    if direct:
        direct, block, memory = _alignment(fd, path, size, sector)
        if not direct:
            _clear_direct(fd)
    else:
        log.warning("image %s: buffered, because the file system refuses O_DIRECT", path)
    return Image(
        config=config,
        fd=fd,
        direct=direct,
        block_device=block_device,
        size_bytes=size,
        device=status.st_rdev if block_device else status.st_dev,
        identity=0 if block_device else status.st_ino,
        logical_block_bytes=block,
        memory_align=memory,
    )


def open_image(config: DiskConfig) -> Image:
    """Open, lock and examine the image of one disk; see the module for the errors."""
    path = config.image
    status = _inspect(path)
    flags = os.O_RDONLY if config.read_only else os.O_RDWR
    if stat.S_ISBLK(status.st_mode) and not config.read_only:
        flags |= os.O_EXCL  # refused while the kernel itself uses the device
    fd, direct = _open_direct(path, flags)
    try:
        return _examine(config, fd, direct)
    except OSError as error:
        os.close(fd)
        raise ImageError(path, f"cannot be used: {error.strerror}") from None
    except BaseException:
        os.close(fd)
        raise


def open_images(disks: tuple[DiskConfig, ...]) -> list[Image]:
    """Open the images of all disks, or none; ImageTwice when two paths are one file."""
    images: list[Image] = []
    try:
        for disk in disks:
            # Looked for before opening: our own lock would refuse the second path.
            status = _inspect(disk.image)
            block = stat.S_ISBLK(status.st_mode)
            key = (status.st_rdev, 0) if block else (status.st_dev, status.st_ino)
            for other in images:
                if (other.device, other.identity) == key and other.block_device == block:
                    raise ImageTwice(disk.image, other.config.image)
            images.append(open_image(disk))
    except BaseException:
        close_images(images)
        raise
    return images


def close_images(images: list[Image]) -> None:
    """Close all of them; the locks go with the descriptors."""
    while images:
        images.pop().close()
