"""Open-file-description locks on images and journal.

Contract: a lock lives as long as the open file description of `fd`; closing the last
descriptor drops it. A killed agent's io_uring keeps its files open until the kernel has
taken it down, some time after the process is gone; patiently() waits for that, nothing else
here blocks.

Images are locked the way QEMU does it (block/file-posix.c), so that QEMU's tools and we
refuse each other: each permission bit owns two bytes of the file. A read lock on byte
100 + bit says "I have this permission", on byte 200 + bit "I do not share it with others".
Having taken our own locks, we look for a lock of somebody else that contradicts them; taking
first and looking then means that of two racing openers at least one sees the other.
"""

import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

CONSISTENT_READ = 1
WRITE = 2
WRITE_UNCHANGED = 4
RESIZE = 8

_NAMES = {CONSISTENT_READ: "read", WRITE: "write", WRITE_UNCHANGED: "rewrite", RESIZE: "resize"}
_HELD_BASE = 100
_UNSHARED_BASE = 200
_FLOCK = "hhqqi0q"  # struct flock: type, whence, start, length, pid


PATIENCE_S = 3.0
_RETRY_S = 0.02

Taken = TypeVar("Taken")


class LockConflict(Exception):
    """Somebody else holds the file; the text says what they do with it."""


def _flock(kind: int, start: int, length: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)


def _bits(permissions: int) -> Iterator[tuple[int, str]]:
    for bit, (value, name) in enumerate(_NAMES.items()):
        if permissions & value:
            yield bit, name


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another open file description holds any lock on that byte."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte, 1))
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def lock_image(fd: int, held: int, unshared: int) -> None:
    """Take QEMU's permissions `held` and forbid others `unshared` (bits above).

    LockConflict when another program's permissions contradict; OSError when the file system
    has no such locks. The bytes locked stay locked then until `fd` is closed.
    """
    try:
        for base, permissions in ((_HELD_BASE, held), (_UNSHARED_BASE, unshared)):
            for bit, _ in _bits(permissions):
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, base + bit, 1))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise LockConflict("another program has locked all of it") from None
        raise
    for permissions, base, what in (
        (unshared, _HELD_BASE, "has {} access to it"),
        (held, _UNSHARED_BASE, "does not share {} access to it"),
    ):
        names = [name for bit, name in _bits(permissions) if _is_locked(fd, base + bit)]
        if names:
            raise LockConflict("another program " + what.format(" and ".join(names)))


def lock_exclusive(fd: int) -> None:
    """Lock the whole file against everybody; LockConflict when it is taken."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise LockConflict("locked") from None
        raise


def patiently(take: Callable[[], Taken], conflict: type[Exception] = LockConflict) -> Taken:
    """Call `take` until it succeeds; after PATIENCE_S its `conflict` comes through.

    A service manager restarts a killed agent at once: earlier than the kernel lets go of the
    files that writes in flight still use.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return take()
        except conflict:
            if time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_S)
