"""Thin binding layer over the C core: the only module that imports `_core`.

Contract. Owner: one asyncio loop and its thread; nothing here is thread-safe. `Core` turns
tokens into futures: a command is awaited and either returns its value or raises CoreError.
Events that answer no command go to the callback given to `Core`, from the loop.

File descriptors: those given to ring_kick(), ring_call() and ring_err() become the core's,
also when the call fails; all others stay the caller's. Images and journal must stay open
until close().

Cancelling an await does not cancel the command: the core finishes it, its answer is dropped.

Not done here: checks of what is passed in. Numbers from a front end are checked by `vhost`
for what the C signatures need (queue index, width) and by the core for everything else.
"""

import asyncio
import contextlib
import dataclasses
import errno
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

from ._core import ffi, lib

DISKS_MAX: int = lib.CORE_DISKS_MAX
REACTORS_MAX: int = lib.CORE_REACTORS_MAX
QUEUES_MAX: int = lib.CORE_QUEUES_MAX
QUEUE_SIZE_MAX: int = lib.CORE_QUEUE_SIZE_MAX
REGIONS_MAX: int = lib.CORE_REGIONS_MAX
EPOCHS_MAX: int = lib.CORE_EPOCHS_MAX
SEG_MAX: int = lib.CORE_SEG_MAX
DISCARD_SECTORS_MAX: int = lib.CORE_DISCARD_SECTORS_MAX
ARENA_BYTES_MIN: int = lib.CORE_ARENA_BYTES_MIN
INDEX_BYTES_MIN: int = lib.CORE_INDEX_BYTES_MIN
NAME_BYTES_MAX: int = lib.CORE_NAME_MAX - 1
DICTIONARIES_MAX: int = lib.CORE_DICTIONARIES_MAX
DICTIONARY_BYTES_MAX: int = lib.CORE_DICTIONARY_BYTES_MAX
SERIAL_BYTES_MAX: int = lib.CORE_SERIAL_BYTES
NO_DISK: int = lib.CORE_NO_DISK


class CoreError(Exception):
    """A refusal of the core: `errno` (positive) and `text`, one English sentence."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(number, text)
        self.errno = number
        self.text = text or os.strerror(number)

    def __str__(self) -> str:
        return self.text


class EventType(IntEnum):
    """enum core_event_type."""

    DONE = lib.CORE_EVENT_DONE
    SEALED = lib.CORE_EVENT_SEALED
    COMMITTED = lib.CORE_EVENT_COMMITTED
    APPLIED = lib.CORE_EVENT_APPLIED
    DISCARDED = lib.CORE_EVENT_DISCARDED
    PRESSURE = lib.CORE_EVENT_PRESSURE
    SPILL = lib.CORE_EVENT_SPILL
    IO_ERROR = lib.CORE_EVENT_IO_ERROR
    RING_BROKEN = lib.CORE_EVENT_RING_BROKEN
    MEMORY_LOST = lib.CORE_EVENT_MEMORY_LOST
    LOG = lib.CORE_EVENT_LOG
    REJECTED = lib.CORE_EVENT_REJECTED


MODE_NAMES = {lib.CORE_STANDBY: "standby", lib.CORE_ACTIVE: "active"}
EPOCH_STATE_NAMES = {
    lib.CORE_EPOCH_OPEN: "open",
    lib.CORE_EPOCH_SEALED: "sealed",
    lib.CORE_EPOCH_COMMITTING: "committing",
    lib.CORE_EPOCH_COMMITTED: "committed",
}


@dataclass(frozen=True)
class Event:
    """core_event; which fields count for which type is said in core.h."""

    type: int
    disk: int
    token: int
    result: int
    value: int
    first: int
    last: int
    text: str


@dataclass(frozen=True)
class Status:
    """core_status: one consistent picture of the group; sizes in bytes, times in ns."""

    mode: int
    clients: int
    generation: int
    open: int
    sealed_first: int
    sealed_last: int
    committed: int
    applied: int
    arena_size: int
    arena_used: int
    spill_size: int
    spill_used: int
    spill_fault: int
    journal_size: int
    journal_used: int
    index_size: int
    index_used: int
    index_bytes: int
    logical_bytes: int
    stored_bytes: int
    held_requests: int
    pressure: int
    reactors: int
    direct_journal: int
    commits: int
    applies: int
    discards: int
    seals: int
    compressed_frames: int
    incompressible_frames: int
    zero_frames: int
    dropped_frames: int
    compress_ns: int
    pack_bytes_in: int
    pack_bytes_out: int
    clusters: int
    wanted_bytes: int
    expanded_bytes: int
    cluster_hits: int
    cluster_misses: int
    pack_queue: int
    pack_level: int
    merges: int
    merged_blocks: int
    merge_bytes_in: int
    merge_bytes_out: int
    merge_queue: int
    dictionary: int
    dictionary_bytes: int
    dictionaries: int
    dictionary_frames: int
    commit_ns_last: int
    seal_ns_last: int
    apply_ns_last: int
    journal_bytes_written: int
    image_bytes_written: int
    spill_bytes_written: int
    error: str


@dataclass(frozen=True)
class EpochInfo:
    """core_epoch_info: one epoch that is alive."""

    id: int
    state: int
    segments: int
    blocks: int
    logical_bytes: int
    stored_bytes: int
    index_bytes: int


@dataclass(frozen=True)
class QueueInfo:
    """core_queue_info: one virtqueue; `reason` says why it is broken."""

    size: int
    configured: int
    enabled: int
    running: int
    broken: int
    requests: int
    kicks: int
    calls: int
    inflight: int
    reason: str


@dataclass(frozen=True)
class DiskInfo:
    """core_disk_info: counters of a disk since start."""

    size_bytes: int
    reads: int
    writes: int
    flushes: int
    discards: int
    write_zeroes: int
    get_ids: int
    read_bytes: int
    write_bytes: int
    errors: int
    unsupported: int
    rejected: int
    broken: int
    held: int
    queues: tuple[QueueInfo, ...]


@dataclass(frozen=True)
class JournalInfo:
    """core_journal_info: what a journal file says about itself."""

    formatted: bool
    group: bytes
    size_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class ArenaInfo:
    """core_arena_info: what an arena's shared memory says of its spill file, in bytes."""

    spill_bytes: int
    spill_used: int
    fresh: bool


@dataclass(frozen=True)
class DiskSetup:
    """core_disk_config: an image that is open and locked."""

    fd: int
    direct: bool
    read_only: bool
    block_device: bool
    size_bytes: int
    identity: int
    logical_block_bytes: int
    memory_align: int
    name: str
    serial: str


@dataclass(frozen=True)
class GroupSetup:
    """core_config: everything that core_open() needs. `index_bytes` 0: by the arena's size;
    `dictionaries`: (id, zstd's dictionary), oldest first."""

    disks: Sequence[DiskSetup]
    workers: int
    reactors: int
    journal_fd: int
    journal_direct: bool
    journal_fua: bool
    arena_fd: int
    arena_bytes: int
    index_bytes: int
    compress_level: int
    spin_us: int
    apply_rate: int
    boot_id: bytes
    spill_fd: int = -1
    spill_bytes: int = 0
    spill_closed: bool = False
    dictionaries: Sequence[tuple[int, bytes]] = ()


@dataclass(frozen=True)
class Region:
    """core_region: guest memory; `fd` stays the caller's."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int
    fd: int


_Record = TypeVar("_Record")


def _text(array: Any) -> str:
    return ffi.string(array).decode("utf-8", "replace")


def _record(kind: type[_Record], struct: Any, **given: object) -> _Record:
    """Copy a C struct into the dataclass `kind`: same field names, char arrays as str."""
    values = dict(given)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in values:
            value = getattr(struct, field.name)
            values[field.name] = value if isinstance(value, int) else _text(value)
    return kind(**values)


def _check(result: int, text: Any) -> int:
    if result < 0:
        raise CoreError(-result, _text(text))
    return result


def _text_buffer() -> Any:
    return ffi.new("char[]", lib.CORE_TEXT_MAX)


def _c_config(setup: GroupSetup) -> Any:
    config = ffi.new("core_config *")
    config.disks = len(setup.disks)
    for name in ("workers", "reactors", "journal_fd", "arena_fd", "arena_bytes", "index_bytes",
                 "compress_level", "spin_us", "apply_rate", "spill_fd", "spill_bytes",
                 "spill_closed"):
        setattr(config, name, getattr(setup, name))
    config.journal_direct = setup.journal_direct
    config.journal_fua = setup.journal_fua
    ffi.memmove(config.boot_id, setup.boot_id, 16)
    for disk, c_disk in zip(setup.disks, config.disk, strict=False):
        for name in ("fd", "direct", "read_only", "block_device", "size_bytes", "identity",
                     "logical_block_bytes", "memory_align"):
            setattr(c_disk, name, getattr(disk, name))
        c_disk.name = disk.name.encode()
        serial = disk.serial.encode()
        ffi.memmove(c_disk.serial, serial, len(serial))
    return config


def journal_bytes_min(arena_and_spill_bytes: int) -> int:
    """Smallest journal, in bytes, that can take a full arena and spill file."""
    return int(lib.core_journal_bytes_min(arena_and_spill_bytes))


def spill_file_bytes(spill_bytes: int) -> int:
    """Least size of a spill file for `spill_bytes` of segments."""
    return int(lib.core_spill_file_bytes(spill_bytes))


def arena_inspect(fd: int) -> ArenaInfo:
    """Read what an arena says of its spill file; CoreError when it cannot be read."""
    info = ffi.new("core_arena_info *")
    text = _text_buffer()
    _check(lib.core_arena_inspect(fd, info, text), text)
    return ArenaInfo(info.spill_bytes, info.spill_used, bool(info.fresh))


def arena_huge_pages(fd: int, size_bytes: int) -> int:
    """Put a new arena's pages into huge ones; return how many bytes the kernel gave."""
    return int(lib.core_arena_huge_pages(fd, size_bytes))


def inflight_bytes(queues: int, queue_size: int) -> int:
    """Size in bytes of the in-flight region of `queues` rings of `queue_size` entries."""
    return int(lib.core_inflight_bytes(queues, queue_size))


def journal_inspect(fd: int) -> JournalInfo:
    """Read a journal's identity; CoreError when it is not ours, broken or of another version."""
    info = ffi.new("core_journal_info *")
    text = _text_buffer()
    _check(lib.core_journal_inspect(fd, info, text), text)
    return JournalInfo(
        formatted=bool(info.formatted),
        group=bytes(ffi.buffer(info.group, 16)),
        size_bytes=info.size_bytes,
        used_bytes=info.used_bytes,
    )


def journal_format(setup: GroupSetup, group: bytes) -> None:
    """Write a fresh journal for `group` (16 bytes) into setup.journal_fd; CoreError."""
    text = _text_buffer()
    config = _c_config(setup)
    _check(lib.core_journal_format(config, ffi.from_buffer("uint8_t[]", group), text), text)


def journal_zero(fd: int, offset: int, size: int) -> None:
    """Write `size` zero bytes (whole pages) at `offset` of a new journal; OSError."""
    error = lib.core_journal_zero(fd, offset, size)
    if error < 0:
        raise OSError(-error, os.strerror(-error))


def metrics_bytes() -> int:
    """Size in bytes of a live view's shared memory."""
    return int(lib.core_metrics_bytes())


def _plain(value: Any) -> Any:
    """A C struct, array or number as dicts, lists, str (char arrays), bytes (uint8_t arrays)
    and int."""
    kind = ffi.typeof(value) if not isinstance(value, int) else None
    if kind is None:
        return value
    if kind.kind == "struct":
        return {name: _plain(getattr(value, name)) for name, _ in kind.fields}
    if kind.item.cname == "char":
        return _text(value)
    if kind.item.cname in ("uint8_t", "unsigned char"):
        return bytes(ffi.buffer(value))
    return [_plain(item) for item in value]


class MetricsLayout:
    """Where things are in a live view (struct metrics_page in format.h).

    Works on bytes: the reader copies what it wants out of the shared memory first.
    """

    magic: int = lib.METRICS_MAGIC
    version: int = lib.METRICS_VERSION
    header_bytes = ffi.offsetof("struct metrics_page", "state")
    state = (header_bytes, ffi.offsetof("struct metrics_page", "stage"))
    stages = (state[1], ffi.offsetof("struct metrics_page", "trace"))
    traces = (stages[1], ffi.sizeof("struct metrics_page"))
    trace_bytes = ffi.sizeof("struct metrics_trace")
    stage_names = [
        name.removeprefix("METRICS_").lower().replace("_", "-")
        for number, name in sorted(ffi.typeof("enum metrics_stage").elements.items())
    ][:-1]
    bucket_low = [lib.core_metrics_bucket_low(i) for i in range(lib.METRICS_BUCKETS)]

    @staticmethod
    def parse_header(data: bytes) -> dict[str, Any]:
        """Fields of metrics_page before `state`."""
        page = ffi.new("struct metrics_page *")
        ffi.memmove(page, data, len(data))
        names = [name for name, _ in ffi.typeof("struct metrics_page").fields]
        return {name: _plain(getattr(page, name)) for name in names[: names.index("state")]}

    @staticmethod
    def parse_state(data: bytes) -> dict[str, Any]:
        """struct metrics_state, nested."""
        return dict(_plain(ffi.from_buffer("struct metrics_state[]", data)[0]))

    @staticmethod
    def parse_trace(data: bytes) -> dict[str, Any]:
        """struct metrics_trace."""
        return dict(_plain(ffi.from_buffer("struct metrics_trace[]", data)[0]))


class Core:
    """The C core of one consistency group, from core_open() to core_close().

    The constructor recovers (CoreError with the reason when it cannot); start() begins to
    serve and must be called from the running loop.
    """

    def __init__(self, setup: GroupSetup, on_event: Callable[[Event], None]) -> None:
        self._config = _c_config(setup)
        # The core copies them; until then somebody has to hold them.
        contents = [ffi.from_buffer("uint8_t[]", data) for _, data in setup.dictionaries]
        self._config.dictionaries = len(contents)
        for index, (identity, data) in enumerate(setup.dictionaries):
            self._config.dictionary[index] = (contents[index], len(data), identity)
        self._on_event = on_event
        self._tokens = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._c_event = ffi.new("core_event *")
        out = ffi.new("core **")
        text = _text_buffer()
        _check(lib.core_open(self._config, out, text), text)
        self._core = out[0]

    def show(self, fd: int, name: str, control: str) -> None:
        """Before start(): keep the live view in the shared memory `fd`, of metrics_bytes() zero
        bytes; name of the group and path of the control socket are noted there. CoreError."""
        text = _text_buffer()
        _check(lib.core_metrics(self._live(), fd, name.encode(), control.encode(), text), text)

    def dictionaries_named(self) -> int:
        """Before start(): bit n is set when a frame names setup.dictionaries[n]."""
        return int(lib.core_dictionaries_named(self._live()))

    def add_dictionary(self, identity: int, data: bytes) -> None:
        """Compress with this one from now on; CoreError. EEXIST: it is loaded already."""
        content = ffi.from_buffer("uint8_t[]", data)
        c_dictionary = ffi.new("core_dictionary *", (content, len(data), identity))
        text = _text_buffer()
        _check(lib.core_dictionary_add(self._live(), c_dictionary, text), text)

    def start(self) -> None:
        """Start the reactor and the delivery of events; CoreError."""
        text = _text_buffer()
        _check(lib.core_start(self._live(), text), text)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(lib.core_event_fd(self._core), self._deliver)

    async def stop(self) -> None:
        """Bring committed epochs into the images and end the reactor; CoreError when an
        image or the journal would not take them (they stay in arena and journal)."""
        await self._command(lib.core_stop)

    def arena_idle(self) -> bool:
        """After stop(): True when the arena holds no guest data."""
        return bool(lib.core_arena_idle(self._live()))

    def close(self) -> None:
        """Free everything; without stop() before, this is a crash that was asked for."""
        if self._core is None:
            return
        if self._loop is not None:
            self._deliver()
            self._loop.remove_reader(lib.core_event_fd(self._core))
        lib.core_close(self._core)
        self._core = None
        for future in self._pending.values():
            if not future.done():
                future.set_exception(self._gone())
                future.exception()  # nobody may be left to read it
        self._pending.clear()

    # Control verbs.

    async def seal(self) -> int:
        """Close the open epoch and open the next; return the sealed id."""
        return (await self._command(lib.core_epoch_seal)).value

    async def commit(self, epoch: int | None = None) -> int:
        """Make sealed epochs up to `epoch` (None: the newest sealed) durable; return the
        newest committed id."""
        newest = epoch is None
        return (await self._command(lib.core_epoch_commit, epoch or 0, newest)).value

    async def discard(self) -> tuple[range, int]:
        """Drop what is newer than the last commit; return (dropped ids, committed)."""
        event = await self._command(lib.core_epoch_discard)
        dropped = range(event.first, event.last + 1) if event.first else range(0)
        return dropped, event.value

    async def promote(self) -> int:
        """Discard what is not committed and go to active mode; return the generation."""
        return (await self._command(lib.core_promote)).value

    # Queries.

    def status(self) -> Status:
        """The group's state now; CoreError."""
        out = ffi.new("core_status *")
        self._query(lib.core_query_status(self._live(), out))
        return _record(Status, out)

    def epochs(self) -> list[EpochInfo]:
        """All epochs alive, oldest first; CoreError."""
        out = ffi.new("core_epoch_info[]", EPOCHS_MAX)
        count = self._query(lib.core_query_epochs(self._live(), out, EPOCHS_MAX))
        return [_record(EpochInfo, out[i]) for i in range(count)]

    def disk(self, disk: int) -> DiskInfo:
        """Counters and rings of disk number `disk`; CoreError."""
        out = ffi.new("core_disk_info *")
        self._query(lib.core_query_disk(self._live(), disk, out))
        queues = tuple(_record(QueueInfo, queue) for queue in out.queue)
        return _record(DiskInfo, out, queues=queues)

    # vhost-user; `disk` and `queue` are indices.

    async def vhost_memory(self, disk: int, regions: Sequence[Region]) -> None:
        """Replace the whole memory table of a front end; CoreError when it does not map."""
        table = ffi.new("core_region[]", len(regions))
        for c_region, region in zip(table, regions, strict=True):
            for name in ("guest_addr", "size", "user_addr", "mmap_offset", "fd"):
                setattr(c_region, name, getattr(region, name))
        await self._checked_command(lib.core_vhost_memory, disk, table, len(regions))

    async def vhost_log(self, disk: int, fd: int, size: int, offset: int) -> None:
        """Map the dirty log: `size` bytes at `offset` of `fd`; CoreError."""
        await self._checked_command(lib.core_vhost_log, disk, fd, size, offset)

    async def vhost_inflight(
        self, disk: int, fd: int, size: int, offset: int, queues: int, queue_size: int
    ) -> None:
        """Map the in-flight region and take over what it says is unfinished; CoreError."""
        await self._checked_command(
            lib.core_vhost_inflight, disk, fd, size, offset, queues, queue_size
        )

    async def vhost_features(self, disk: int, features: int) -> None:
        """Feature bits that the front end acknowledged."""
        await self._command(lib.core_vhost_features, disk, features)

    async def ring_size(self, disk: int, queue: int, size: int) -> None:
        """Number of descriptors."""
        await self._command(lib.core_vring_size, disk, queue, size)

    async def ring_addr(
        self, disk: int, queue: int, flags: int, desc: int, avail: int, used: int, log: int
    ) -> None:
        """Front-end user addresses of the ring's parts; `log` is a guest address."""
        await self._command(lib.core_vring_addr, disk, queue, flags, desc, avail, used, log)

    async def ring_base(self, disk: int, queue: int, base: int) -> None:
        """Next available index to process."""
        await self._command(lib.core_vring_base, disk, queue, base)

    async def ring_kick(self, disk: int, queue: int, fd: int) -> None:
        """Eventfd of the driver's notifications; -1: poll. `fd` is given away;
        CoreError when it is none."""
        await self._give(lib.core_vring_kick, disk, queue, fd)

    async def ring_call(self, disk: int, queue: int, fd: int) -> None:
        """Eventfd for our notifications; -1: none. `fd` is given away;
        CoreError when it is none."""
        await self._give(lib.core_vring_call, disk, queue, fd)

    async def ring_err(self, disk: int, queue: int, fd: int) -> None:
        """Eventfd for errors; -1: none. `fd` is given away;
        CoreError when it is none."""
        await self._give(lib.core_vring_err, disk, queue, fd)

    async def ring_enable(self, disk: int, queue: int, on: bool) -> None:
        """Enable or disable the ring."""
        await self._command(lib.core_vring_enable, disk, queue, on)

    async def ring_stop(self, disk: int, queue: int) -> int:
        """Drain and stop the ring; return the next available index."""
        return (await self._command(lib.core_vring_stop, disk, queue)).value

    async def vhost_reset(self, disk: int) -> None:
        """Stop all rings of the disk and let go of everything of its front end."""
        await self._command(lib.core_vhost_reset, disk)

    # Tokens and events.

    def _live(self) -> Any:
        if self._core is None:
            raise self._gone()
        return self._core

    @staticmethod
    def _gone() -> CoreError:
        return CoreError(errno.ESHUTDOWN, "the agent is shutting down")

    def _query(self, result: int) -> int:
        if result < 0:
            raise CoreError(-result, "")
        return result

    def _expect(self) -> tuple[int, "asyncio.Future[Event]"]:
        token = next(self._tokens)
        future: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._pending[token] = future
        return token, future

    async def _command(self, function: Callable[..., None], *args: object) -> Event:
        core = self._live()
        token, future = self._expect()
        function(core, token, *args)
        return await future

    async def _checked_command(self, function: Callable[..., int], *args: object) -> Event:
        """For the commands that can fail before they are queued: then no DONE comes."""
        core = self._live()
        text = _text_buffer()
        token, future = self._expect()
        try:
            _check(function(core, token, *args, text), text)
        except CoreError:
            del self._pending[token]
            raise
        return await future

    async def _give(self, function: Callable[..., int], disk: int, queue: int, fd: int) -> None:
        if self._core is None and fd >= 0:
            os.close(fd)
        await self._checked_command(function, disk, queue, fd)

    def _deliver(self) -> None:
        # close() calls without a wake-up; events may wait all the same.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(lib.core_event_fd(self._core))
        while self._core is not None and lib.core_next_event(self._core, self._c_event):
            event = _record(Event, self._c_event)
            if event.type == EventType.DONE:
                self._settle(event)
            else:
                self._on_event(event)

    def _settle(self, event: Event) -> None:
        future = self._pending.pop(event.token, None)
        if future is None or future.done():
            return
        if event.result < 0:
            future.set_exception(CoreError(-event.result, event.text))
        else:
            future.set_result(event)
