"""Dictionary files: what zstd was taught of a group's images, kept beside the journal.

Contract: one file a dictionary, NAME.epochd-dictionary-ID, ID being zstd's own id in eight hex
digits, which every frame compressed with it names. A file is complete or not there: it is
written under another name, made durable, renamed. It is bound to one group by its UUID. The one
with the highest number is for compression; older ones stay until nothing names them.

Layout, little-endian: HEADER (mark, version, id, group, number, bytes, SHA-256 of all before it
and of the content), then the content, as `zstandard` made it.

Not done here: what the frames name (the core tells at each start), training (`train`).
"""

import contextlib
import glob
import hashlib
import logging
import os
import re
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import core
from .errors import DictionaryError

log = logging.getLogger("epochd.dictionary")

MARK = b"EPCDICT1"
VERSION = 1
HEADER = struct.Struct("<8sII16sQQ32s")
DIGEST_BYTES = 32
# zstd reserves ids below for a public register, and those of 2^31 and more.
ID_MIN, ID_MAX = 1 << 15, (1 << 31) - 1
KEPT = 4
"""The newest stay even when nothing names them. A start that has to do with an older superblock
than the newest reads records again that are in the images already, and they may name an older
dictionary."""


@dataclass(frozen=True)
class Dictionary:
    """One dictionary that is whole and this group's."""

    path: Path
    id: int
    number: int
    data: bytes


def path_of(folder: Path, name: str, identity: int) -> Path:
    """Where the dictionary of that id of the group called `name` is kept."""
    return folder / f"{name}.epochd-dictionary-{identity:08x}"


def paths(folder: Path, name: str) -> list[Path]:
    """All dictionary files of the group, whole or not."""
    pattern = re.compile(re.escape(f"{name}.epochd-dictionary-") + "[0-9a-f]{8}")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def load(path: Path, group: bytes) -> Dictionary:
    """Read and check one; DictionaryError says what is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(HEADER.size + core.DICTIONARY_BYTES_MAX + 1)
    except OSError as error:
        raise DictionaryError(path, f"cannot be read: {error.strerror}") from None
    if len(data) < HEADER.size or data[: len(MARK)] != MARK:
        raise DictionaryError(path, "is not a dictionary of epochd, or was cut")
    _, version, identity, owner, number, size, digest = HEADER.unpack_from(data)
    if version != VERSION:
        raise DictionaryError(path, f"has version {version}, this agent reads {VERSION}")
    if size > core.DICTIONARY_BYTES_MAX:
        raise DictionaryError(path, f"claims {size} bytes; at most {core.DICTIONARY_BYTES_MAX}")
    content = data[HEADER.size :]
    if len(content) != size or _digest(data[: HEADER.size - DIGEST_BYTES], content) != digest:
        raise DictionaryError(path, "is damaged: it does not fit its checksum")
    if owner != group:
        raise DictionaryError(path, "belongs to another group")
    if path.name[-8:] != f"{identity:08x}":
        raise DictionaryError(path, f"is dictionary {identity:08x} under another's name")
    return Dictionary(path, identity, number, content)


def load_all(folder: Path, name: str, group: bytes) -> list[Dictionary]:
    """All that are good, oldest first. What is wrong with others is logged: if a frame needs one
    of them the core will refuse to start."""
    found = []
    for path in paths(folder, name):
        try:
            found.append(load(path, group))
        except DictionaryError as error:
            log.error("%s; it is not used", error)
    found.sort(key=lambda one: (one.number, one.id))
    for one in found[: -core.DICTIONARIES_MAX]:
        log.error("dictionary %s: not used, %d newer ones are there", one.path,
                  core.DICTIONARIES_MAX)
    return found[-core.DICTIONARIES_MAX :]


def remove_unneeded(loaded: Sequence[Dictionary], named: int) -> None:
    """At a start: remove the files that no frame names, but for the newest. `named`: bit n is
    set when frames name loaded[n]."""
    for bit, one in enumerate(loaded[:-KEPT]):
        if not named & 1 << bit:
            with contextlib.suppress(OSError):
                one.path.unlink()
                log.info("dictionary %s: removed, nothing is compressed with it any more", one.path)


def store(folder: Path, name: str, group: bytes, identity: int, data: bytes,
          owner: os.stat_result) -> Path:
    """Write a new file, the newest from now on, durably; its user and group are `owner`'s.

    DictionaryError; then, as after a kill, there is the whole file or none.
    """
    path = path_of(folder, name, identity)
    half = folder / f"{path.name}.new"
    number = 1 + max((_number(one) for one in paths(folder, name)), default=0)
    number = max(number, time.time_ns())  # of two that are trained at once, too
    head = HEADER.pack(MARK, VERSION, identity, group, number, len(data), bytes(DIGEST_BYTES))
    head = head[:-DIGEST_BYTES]
    try:
        # What a killed one left; one that is writing just now fails, and may be repeated.
        for other in folder.glob(f"{glob.escape(name)}.epochd-dictionary-*.new"):
            other.unlink(missing_ok=True)
        fd = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            if os.geteuid() == 0:
                os.fchown(fd, owner.st_uid, owner.st_gid)
            file.write(head + _digest(head, data) + data)
            file.flush()
            os.fsync(fd)
        half.rename(path)
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)
    except OSError as error:
        raise DictionaryError(path, f"cannot be written: {error.strerror}") from None
    return path


def _digest(head: bytes, content: bytes) -> bytes:
    return hashlib.sha256(head + content).digest()


def _number(path: Path) -> int:
    """Of a file that may be anything."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(HEADER.size)
        if len(head) == HEADER.size and head.startswith(MARK):
            return int(HEADER.unpack(head)[4])
    return 0
