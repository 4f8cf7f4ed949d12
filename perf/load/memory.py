"""Guest memory: one piece of POSIX shared memory (or of huge pages), mapped here and shown to back
ends; a bump allocator in it. Its name is gone as soon as it is open, so that nothing is left behind
whatever happens to this process."""

from __future__ import annotations

import ctypes
import mmap
import os

import posix_ipc

from .errors import MissingError

PAGE = 4096
REGION_UNIT = 2 << 20
"""Regions are multiples of a huge page: some back ends map nothing else."""
GUEST_BASE = 1 << 30


def _plain(size: int) -> int:
    name = f"/blkload-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
        fd: int = shm.fd
        shm.unlink()
    except (posix_ipc.Error, OSError) as error:
        raise MissingError(f"no POSIX shared memory can be made: {error}") from None
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        raise MissingError(
            f"/dev/shm has no room for {size >> 20} MiB of guest memory ({error.strerror}); "
            "lower --iodepth, --queues, --bs or --pool"
        ) from None
    return fd


def _huge(size: int) -> int:
    try:
        fd = os.memfd_create("blkload", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    except OSError as error:
        raise MissingError(f"this kernel gives no huge pages: {error.strerror}") from None
    os.ftruncate(fd, size)
    return fd


class GuestMemory:
    """`size` bytes (rounded up to whole huge pages), zeroed. `fd` is what back ends get; `map`
    is the memory here; `guest` the guest address of its first byte."""

    def __init__(self, size: int, *, huge: bool = False) -> None:
        self.size = -(-size // REGION_UNIT) * REGION_UNIT
        self.guest = GUEST_BASE
        self.fd = _huge(self.size) if huge else _plain(self.size)
        try:
            self.map = mmap.mmap(self.fd, self.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(self.fd)
            need = f"{self.size // REGION_UNIT} free huge pages of 2 MiB are needed"
            raise MissingError(
                f"the guest memory cannot be mapped: {error.strerror}"
                + (f"; {need}: see /proc/sys/vm/nr_hugepages" if huge else "")
            ) from None
        self._used = 0

    def place(self, size: int, align: int = PAGE) -> int:
        """Offset of `size` bytes that nobody else gets."""
        start = -(-self._used // align) * align
        assert start + size <= self.size, "the caller has planned too little memory"
        self._used = start + size
        return start

    def address(self) -> int:
        """Where the mapping begins in this process; valid until close()."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def close(self) -> None:
        """Free it. Back ends that have it mapped keep it until they hang up."""
        self.map.close()
        os.close(self.fd)
