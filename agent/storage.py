"""What a consistency group keeps: images, journal, arena, spill file; and the core on them.

Contract: open_group() acquires in a fixed order (images and their locks, journal and its
lock, arena, spill file, recovery by the core) and on any failure lets go of everything it took,
naming the step (errors.py). Group owns all of it until close(). The arena's shared memory stays
when the agent goes, cleanly or not, unless release_arena() finds that it holds nothing.

Beside the arena lies a note of the images and the journal that it goes with. While it is
there no other group may take one of these images: without the journal and the arena they
may be in the middle of being brought up to date.

The arena is allocated in full before use: a page that shared memory could not provide later
would kill the process with SIGBUS in the middle of a write. So is the spill file, so that
room that the status shows is there. It belongs to the arena: what it holds is known from there
alone, and it goes when the arena goes. One whose arena is gone (a reboot) is written over. It
needs no lock of its own: its name is the journal's, and that is locked.
"""

import contextlib
import errno
import json
import logging
import os
import stat
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import posix_ipc

from . import core, dictionary, locks, notify
from .config import Config
from .errors import (
    ArenaError,
    ArenaOrphaned,
    ArenaTooLarge,
    DictionaryMissing,
    EpochdError,
    JournalError,
    JournalInUse,
    JournalSpaceError,
    RecoveryError,
    SpillError,
    SpillSpaceError,
)
from .images import Image, birth_ns, close_images, open_images

log = logging.getLogger("epochd.storage")

SHM_DIR = Path("/dev/shm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SYS_BLOCK = Path("/sys/dev/block")
NOTE_SUFFIX = ".group"
LIVE_SUFFIX = ".live"
SPILL_MARK = b"EPCSPILL"  # SPILL_MAGIC of format.h
SEGMENT_BYTES = 256 << 10  # a spill file is so fine
WORKERS_MAX = 4
PAGE = 4096
ZERO_PIECE = 64 << 20
TELL_SECONDS = 2.0
EXTEND_USEC = 60_000_000  # for the service manager's patience; a piece never takes so long


@dataclass
class Journal:
    """The open and locked journal file."""

    path: Path
    fd: int
    direct: bool
    created: bool
    size_bytes: int


@dataclass
class Arena:
    """The shared-memory object, allocated in full; `name` begins with a slash."""

    name: str
    fd: int
    size_bytes: int
    created: bool

    def abandon(self) -> None:
        """Close it after a failed start; one that we just created goes away again."""
        os.close(self.fd)
        if self.created:
            self.unlink()

    def unlink(self) -> None:
        """Remove it and its note."""
        _note_path(self.name).unlink(missing_ok=True)
        posix_ipc.unlink_shared_memory(self.name)


@dataclass
class Spill:
    """The spill file, allocated in full; `size_bytes` is what epochs may use of it.

    `closed`: it is there only for what it holds already.
    """

    path: Path
    fd: int
    size_bytes: int
    created: bool
    closed: bool

    def abandon(self) -> None:
        """Close it after a failed start; one that we just created goes away again."""
        os.close(self.fd)
        if self.created:
            self.path.unlink(missing_ok=True)


def _note_path(name: str) -> Path:
    return SHM_DIR / f"{name[1:]}{NOTE_SUFFIX}"


def _image_ids(images: list[Image]) -> list[list[int]]:
    """What names an image whatever its path: device, inode and its birth, whether it is a
    block device. Only of those that are written to: any number of groups may read one.
    """
    return [
        [image.device, image.identity, 0 if image.block_device else birth_ns(image.fd),
         int(image.block_device)]
        for image in images if not image.config.read_only
    ]


def _write_note(arena: Arena, journal: Path, images: list[Image]) -> None:
    """Note what the arena goes with; see the module."""
    note = {"journal": str(journal.absolute()), "images": _image_ids(images)}
    path = _note_path(arena.name)
    fresh = path.with_name(f"{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(note, file)
        fresh.rename(path)
    except OSError as error:
        raise ArenaError(arena.name, f"its note cannot be written: {error.strerror}") from None


def refuse_orphans(images: list[Image], group: bytes | None) -> None:
    """ArenaOrphaned when the arena of another group goes with one of these images.

    `group`: ours, None when the journal is new. Notes without an arena are removed.
    """
    own = _arena_name(group) if group else ""
    wanted = _image_ids(images)
    for path in SHM_DIR.glob(f"epochd-*{NOTE_SUFFIX}"):
        name = f"/{path.name.removesuffix(NOTE_SUFFIX)}"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if name == own or path.stat().st_uid != os.geteuid():
                continue
            if not (SHM_DIR / name[1:]).exists():
                path.unlink()
                continue
            note = json.loads(path.read_text(encoding="utf-8"))
            if any(image in wanted for image in note["images"]):
                raise ArenaOrphaned(name, note["journal"], name)


def forced_unit_access(fd: int) -> bool:
    """True when the file's device makes single writes durable by itself: it has FUA, or no
    volatile cache. False where that cannot be told (a file system without a device)."""
    device = os.fstat(fd).st_dev
    node = SYS_BLOCK / f"{os.major(device)}:{os.minor(device)}"
    for queue in (node / "queue", node / ".." / "queue"):  # of a partition: the disk's
        with contextlib.suppress(OSError):
            return (queue / "fua").read_text().strip() == "1" or (
                queue / "write_cache"
            ).read_text().strip() == "write through"
    return False


def _open_journal_file(path: Path, create: bool) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    log.warning("journal %s: buffered, because the file system refuses O_DIRECT", path)
    # A refused O_DIRECT may leave the new file behind.
    return os.open(path, flags & ~os.O_EXCL, 0o600), False


def _write_once(journal: Journal) -> None:
    """Write zeroes all over it; seconds for gigabytes, so tell how far it is."""
    size = journal.size_bytes // PAGE * PAGE
    told = time.monotonic()
    for at in range(0, size, ZERO_PIECE):
        core.journal_zero(journal.fd, at, min(ZERO_PIECE, size - at))
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            done = f"writing the new journal: {at >> 20} of {size >> 20} MiB"
            log.info("journal %s: %s", journal.path, done)
            notify.tell(f"STATUS={done}", f"EXTEND_TIMEOUT_USEC={EXTEND_USEC}")


def _allocate_journal(journal: Journal) -> None:
    """Give a new journal its blocks now: a commit must not find the disk full later.

    And write them: the first flush after a write to a block that never was written takes the
    file system twice as long, and waits for others' changes to it.
    """
    try:
        os.posix_fallocate(journal.fd, 0, journal.size_bytes)
        _write_once(journal)
        os.fsync(journal.fd)
        folder = os.open(journal.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        # Nothing is in it yet; a half-sized file would only be in the way.
        journal.path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise JournalSpaceError(journal.path, journal.size_bytes, error.strerror) from None
        raise JournalError(journal.path, f"cannot be allocated: {error.strerror}") from None


def open_journal(path: Path, size_bytes: int) -> Journal:
    """Open the journal at `path`, or create it with `size_bytes`; lock it for us alone.

    An existing file keeps its size. JournalError and its kin.
    """
    try:
        exists = path.exists()
        if exists and not stat.S_ISREG(path.stat().st_mode):
            raise JournalError(path, "is not a regular file")
        fd, direct = _open_journal_file(path, create=not exists)
    except FileNotFoundError:
        raise JournalError(path, "its folder does not exist; see --state-dir") from None
    except OSError as error:
        raise JournalError(path, f"cannot be opened: {error.strerror}") from None
    journal = Journal(path, fd, direct, False, os.fstat(fd).st_size)
    try:
        try:
            locks.patiently(lambda: locks.lock_exclusive(fd))
        except locks.LockConflict:
            raise JournalInUse(path) from None
        os.fchmod(fd, 0o600)
        if journal.size_bytes == 0:
            journal.created, journal.size_bytes = True, size_bytes
            _allocate_journal(journal)
    except OSError as error:
        os.close(fd)
        raise JournalError(path, f"cannot be used: {error.strerror}") from None
    except BaseException:
        os.close(fd)
        raise
    return journal


def check_arena_room(size_bytes: int, name: str = "") -> None:
    """ArenaTooLarge when the arena cannot fit into memory, before any of it is taken.

    `name`: an object that may exist and have some of it already.
    """
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size_bytes > ram:
        raise ArenaTooLarge(size_bytes, "this machine's memory", ram)
    have = 0
    if name:
        have = os.stat(f"{SHM_DIR}{name}").st_blocks * 512
    space = os.statvfs(SHM_DIR)
    free = space.f_bavail * space.f_frsize + have
    if size_bytes > free:
        raise ArenaTooLarge(size_bytes, f"what is free in {SHM_DIR}", free)


def _open_shared_memory(name: str) -> tuple[int, int]:
    """Reattach or create; return (fd, current size in bytes, 0 when new)."""
    try:
        memory = posix_ipc.SharedMemory(name, flags=posix_ipc.O_CREAT, mode=0o600, size=0)
    except (posix_ipc.Error, OSError) as error:
        raise ArenaError(name, f"cannot be opened: {error}") from None
    status = os.fstat(memory.fd)
    if status.st_uid != os.geteuid():
        memory.close_fd()
        raise ArenaError(name, f"belongs to user {status.st_uid}; remove it or run as that user")
    os.fchmod(memory.fd, 0o600)
    return memory.fd, status.st_size


def _arena_name(group: bytes) -> str:
    return f"/epochd-{group.hex()[:16]}"


def open_arena(group: bytes, size_bytes: int) -> Arena:
    """Reattach the arena of `group` (16 bytes) or create it; allocate it in full.

    An arena that exists keeps its size: it may hold epochs. ArenaError, ArenaTooLarge.
    """
    name = _arena_name(group)
    fd, existing = _open_shared_memory(name)
    if existing not in (0, size_bytes):
        log.warning(
            "arena /dev/shm%s: keeps its size of %d bytes instead of %d, because it is left "
            "from before; a clean stop with nothing uncommitted removes it",
            name, existing, size_bytes,
        )
    arena = Arena(name, fd, existing or size_bytes, created=existing == 0)
    try:
        check_arena_room(arena.size_bytes, name)
        if arena.created:
            os.ftruncate(fd, arena.size_bytes)
            huge = core.arena_huge_pages(fd, arena.size_bytes)
            log.debug("arena /dev/shm%s: %d MiB in huge pages", name, huge >> 20)
        os.posix_fallocate(fd, 0, arena.size_bytes)
    except OSError as error:
        arena.abandon()
        raise ArenaError(name, f"cannot be allocated: {error.strerror}") from None
    except BaseException:
        arena.abandon()
        raise
    return arena


def open_live_view(opened: core.Core, arena: str, group_name: str, control: Path) -> str | None:
    """Make a new live view beside the arena and hand it to the core; return its name.

    None, with a warning, when it cannot be had: the agent serves all the same.
    """
    name = f"{arena}{LIVE_SUFFIX}"
    try:
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(name)  # what a killed agent left
        memory = posix_ipc.SharedMemory(name, flags=posix_ipc.O_CREX, mode=0o600, size=0)
        try:
            os.fchmod(memory.fd, 0o600)
            os.posix_fallocate(memory.fd, 0, core.metrics_bytes())
            opened.show(memory.fd, group_name, str(control))
        except BaseException:
            memory.unlink()
            raise
        finally:
            memory.close_fd()
    except (posix_ipc.Error, OSError, core.CoreError) as error:
        log.warning("no live view at /dev/shm%s: %s", name, error)
        return None
    return name


# Spill file.


def check_spill_room(path: Path, size_bytes: int, journal_bytes: int) -> None:
    """SpillSpaceError when the file and a new journal cannot both fit: before either is made."""
    try:
        space = os.statvfs(path.parent)
    except OSError:
        return  # whoever makes a file there says so
    free = space.f_bfree * space.f_frsize
    with contextlib.suppress(OSError):
        free += path.stat().st_blocks * 512
    if journal_bytes <= free < journal_bytes + core.spill_file_bytes(size_bytes):
        raise SpillSpaceError(
            path, size_bytes,
            f"{free} bytes are free, of which the journal takes {journal_bytes}",
        )


def _open_spill_file(path: Path, create: bool) -> int:
    """Open it past the page cache; where that is refused, writes go through it at once."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    try:
        try:
            fd = os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            log.warning("spill file %s: buffered, because the file system refuses O_DIRECT", path)
            fd = os.open(path, flags | os.O_DSYNC, 0o600)
    except FileNotFoundError:
        raise SpillError(path, "is gone, and epochs in the arena lie in it; give it back, or "
                         "remove the arena from /dev/shm to give up what is not committed"
                         if not create else "its folder does not exist; see --state-dir") from None
    except OSError as error:
        raise SpillError(path, f"cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SpillError(path, "is not a regular file")
    return fd


def _allocate_spill(spill: Spill) -> None:
    """Give it its blocks; whatever it held means nothing."""
    size = core.spill_file_bytes(spill.size_bytes)
    try:
        os.fchmod(spill.fd, 0o600)
        if os.fstat(spill.fd).st_size > size:
            os.ftruncate(spill.fd, size)
        os.posix_fallocate(spill.fd, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SpillSpaceError(spill.path, spill.size_bytes, error.strerror) from None
        raise SpillError(spill.path, f"cannot be allocated: {error.strerror}") from None


def _remove_stale_spill(path: Path) -> None:
    """One that nobody uses any more takes room for nothing; ours begin with a mark."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(8) == SPILL_MARK:
            path.unlink()
            log.info("spill file %s: removed, nothing is in it", path)


def open_spill(path: Path, wanted_bytes: int, arena: Arena) -> Spill | None:
    """Open or create the arena's spill file; None when there is to be none.

    An arena that exists keeps the size that it was laid out for. With `wanted_bytes` 0 a file
    that epochs lie in is opened all the same, and takes nothing more. SpillError and its kin;
    core.CoreError when the arena cannot be read.
    """
    info = core.arena_inspect(arena.fd)
    size = wanted_bytes if info.fresh else info.spill_bytes
    if wanted_bytes and wanted_bytes // SEGMENT_BYTES != size // SEGMENT_BYTES:
        log.warning(
            "arena /dev/shm%s: keeps %s instead of a spill file of %d bytes, because it is left "
            "from before; a clean stop with nothing uncommitted removes it",
            arena.name, f"its spill file of {size} bytes" if size else "having none", wanted_bytes,
        )
    if size == 0 or (wanted_bytes == 0 and info.spill_used == 0):
        _remove_stale_spill(path)
        return None
    existed = path.exists()
    fd = _open_spill_file(path, create=info.spill_used == 0)
    spill = Spill(path, fd, size, created=not existed, closed=wanted_bytes == 0)
    try:
        have, need = os.fstat(fd).st_size, core.spill_file_bytes(size)
        if info.spill_used == 0:
            _allocate_spill(spill)
        elif have < need:
            raise SpillError(path, f"has {have} bytes instead of {need}: it was cut, and epochs "
                             "in the arena lie in it; remove the arena from /dev/shm to give up "
                             "what is not committed")
    except BaseException:
        spill.abandon()
        raise
    return spill


class Group:
    """Images, journal, arena, spill file and the core on top; close() lets go of all.
    `live_view` is the name of the shared memory that `epochctl top` reads, None when there is
    none."""

    def __init__(self, images: list[Image], journal: Journal, arena: Arena, spill: Spill | None,
                 group: bytes, opened: core.Core, live_view: str | None) -> None:
        self.images = images
        self.journal = journal
        self.arena = arena
        self.spill = spill
        self.id = uuid.UUID(bytes=group)
        self.core = opened
        self.live_view = live_view

    def release_arena(self) -> bool:
        """After a clean stop: unlink the arena and its spill file if they hold nothing; True
        when unlinked."""
        if not self.core.arena_idle():
            return False
        self._unlink()
        return True

    def _unlink(self) -> None:
        self.arena.unlink()
        if self.spill is not None:
            self.spill.path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """close() after a start that failed before anything was served: an arena that this
        start created goes away again."""
        self.close()
        if self.arena.created:
            self._unlink()

    def close(self) -> None:
        """Close the core first, then what it worked on."""
        self.core.close()
        if self.live_view is not None:
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(self.live_view)
        if self.spill is not None:
            os.close(self.spill.fd)
        os.close(self.arena.fd)
        os.close(self.journal.fd)
        close_images(self.images)


def _setup(config: Config, images: list[Image], journal: Journal) -> core.GroupSetup:
    cpus = len(os.sched_getaffinity(0))
    return core.GroupSetup(
        disks=[image.setup() for image in images],
        workers=max(1, min(WORKERS_MAX, cpus - 1)),
        journal_fd=journal.fd,
        journal_direct=journal.direct,
        journal_fua=forced_unit_access(journal.fd),
        arena_fd=-1,
        arena_bytes=config.arena_bytes,
        index_bytes=config.index_bytes or 0,
        compress_level=config.compress_level,
        reactors=config.reactors,
        spin_us=config.spin_us,
        apply_rate=config.apply_rate or 0,
        boot_id=uuid.UUID(BOOT_ID.read_text(encoding="ascii").strip()).bytes,
    )


def _journal_bytes(config: Config) -> int:
    least = core.journal_bytes_min(config.arena_bytes + config.spill_bytes)
    if config.journal_bytes is None:
        return max(2 * config.arena_bytes + config.spill_bytes, least)
    if config.journal_bytes < least:
        spill = f" and a spill file of {config.spill_bytes}" if config.spill_bytes else ""
        raise JournalError(
            config.journal_path,
            f"{config.journal_bytes} bytes are too few: an arena of {config.arena_bytes} "
            f"bytes{spill} needs a --journal-size of at least {least}",
        )
    return config.journal_bytes


def _check_journal_room(journal: Journal, arena: Arena, spill: Spill | None) -> None:
    """JournalError when an epoch may grow in the spill file until no commit can take it."""
    if spill is None or spill.closed:
        return
    least = core.journal_bytes_min(arena.size_bytes + spill.size_bytes)
    if journal.size_bytes < least:
        raise JournalError(
            journal.path,
            f"its {journal.size_bytes} bytes are too few for an arena of {arena.size_bytes} bytes "
            f"and a spill file of {spill.size_bytes}, which need {least}; give a smaller "
            "--spill-size, or, after a clean stop with nothing uncommitted, remove the journal "
            "to have a larger one made",
        )


def _open_core(config: Config, setup: core.GroupSetup, images: list[Image], journal: Journal,
               arena: Arena, on_event: Callable[[core.Event], None],
               ) -> tuple[core.Core, Spill | None]:
    """The spill file, then recovery; both or none."""
    spill = open_spill(config.spill_path, config.spill_bytes, arena)
    try:
        _check_journal_room(journal, arena, spill)
        setup = replace(setup, arena_fd=arena.fd, arena_bytes=arena.size_bytes)
        if spill is not None:
            setup = replace(setup, spill_fd=spill.fd, spill_bytes=spill.size_bytes,
                            spill_closed=spill.closed)
        _write_note(arena, config.journal_path, images)
        return core.Core(setup, on_event), spill
    except BaseException:
        if spill is not None:
            spill.abandon()
        raise


def _identify(journal: Journal, setup: core.GroupSetup, images: list[Image]) -> bytes:
    """Return the group's identity; a new journal is formatted with a fresh one."""
    try:
        info = core.journal_inspect(journal.fd)
        refuse_orphans(images, info.group if info.formatted else None)
        if info.formatted:
            return info.group
        group = uuid.uuid4().bytes
        core.journal_format(setup, group)
    except core.CoreError as error:
        raise JournalError(journal.path, error) from None
    log.info("journal %s: created, %d bytes", journal.path, journal.size_bytes)
    return group


def _refused(config: Config, arena: Arena, error: core.CoreError) -> EpochdError:
    if error.errno == errno.ENOKEY:
        file = dictionary.path_of(config.state_dir, config.name, 0).name[:-8] + "ID"
        return DictionaryMissing(config.name, error, config.state_dir / file, arena.name)
    return RecoveryError(config.name, error)


def open_group(config: Config, on_event: Callable[[core.Event], None]) -> Group:
    """Open everything and recover; nothing serves yet (Core.start() begins that)."""
    images = open_images(config.disks)
    try:
        wanted = _journal_bytes(config)
        if not config.journal_path.exists():
            refuse_orphans(images, None)
            check_arena_room(config.arena_bytes)  # else a huge journal would come first
            if config.spill_bytes:
                check_spill_room(config.spill_path, config.spill_bytes, wanted)
        journal = open_journal(config.journal_path, wanted)
        try:
            if config.journal_bytes not in (None, journal.size_bytes):
                log.warning("journal %s: keeps its size of %d bytes instead of %d",
                            journal.path, journal.size_bytes, wanted)
            setup = _setup(config, images, journal)
            group = _identify(journal, setup, images)
            known = dictionary.load_all(config.state_dir, config.name, group)
            setup = replace(setup, dictionaries=[(one.id, one.data) for one in known])
            arena = open_arena(group, config.arena_bytes)
            try:
                opened, spill = _open_core(config, setup, images, journal, arena, on_event)
            except core.CoreError as error:
                arena.abandon()
                raise _refused(config, arena, error) from None
            except (ArenaError, JournalError, SpillError, SpillSpaceError):
                arena.abandon()
                raise
            dictionary.remove_unneeded(known, opened.dictionaries_named())
            live_view = open_live_view(opened, arena.name, config.name, config.control)
            return Group(images, journal, arena, spill, group, opened, live_view)
        except BaseException:
            os.close(journal.fd)
            raise
    except BaseException:
        close_images(images)
        raise
