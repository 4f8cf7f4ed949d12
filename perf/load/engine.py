"""A load on vhost-user-blk back ends, driven from Python.

    with Load(Target(sockets=["/run/disk.sock"], iodepth=32)) as load:
        load.start(Workload(mix={"write": 1}, pattern="rand", seconds=10))
        ...                           # checkpoints, say; load.mark("commit") begins a phase
        result = load.result()        # waits for the end; load.stop() brings it about

`Load(target)` connects, makes the guest memory and starts the rings; several runs may follow one
another, also on the same verified blocks. The loop runs in a thread of its own without the GIL and
uses a whole core. Errors of set-up are exceptions (errors.py); what goes wrong during a run is
in its Result. After a run that ended as "lost" only close() is left.

Methods belong to one thread. `close()` stops the rings and frees everything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import select
import threading
import time
from typing import Any

from .errors import LoadError, MissingError, UsageError
from .memory import PAGE, GuestMemory
from .options import OPS, Target, Workload
from .pool import compressible, from_file
from .report import Counts, Result, new_histogram
from .wire import Backend, Feature, Queue, Region, close_all

try:
    from epochd._blkload import ffi, lib
except ImportError:
    raise MissingError(
        "the load generator's C part is not built; run tools/setup and use .venv/bin/python"
    ) from None

SECTOR = 512
RING_SIZE_MIN, RING_SIZE_MAX = 128, 1024
BLOCK_BYTES_MAX = 64 << 20
ENDED = {
    lib.LOAD_ENDED: "ended",
    lib.LOAD_STOPPED: "stopped",
    lib.LOAD_FAILED: "failed",
    lib.LOAD_LOST: "lost",
}
PATTERNS = {"seq": lib.LOAD_SEQUENTIAL, "rand": lib.LOAD_RANDOM, "zipf": lib.LOAD_ZIPF}
INTERVALS_MAX = 1 << 20
NEEDED = {"zero": Feature.WRITE_ZEROES, "discard": Feature.DISCARD}


def counter_layout(config: Any) -> Any:
    """Fill in a `load_config`'s description of HdrHistogram's counters."""
    histogram = new_histogram()
    config.unit_magnitude = histogram.unit_magnitude
    config.half_magnitude = histogram.sub_bucket_half_count_magnitude
    config.sub_bucket_mask = histogram.sub_bucket_mask
    config.counts = histogram.counts_len
    return config


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class Load:
    """Back ends with running rings, and at most one run on them."""

    def __init__(self, target: Target, *, cpu: int | None = None) -> None:
        self.target = target
        self._cpu = cpu
        self._fds: list[int] = []
        self._backends: list[Backend] = []
        self._memory: GuestMemory | None = None
        self._load: Any = None
        self._thread: threading.Thread | None = None
        self._watcher: threading.Thread | None = None
        self._watched: dict[int, str] = {}
        self._lost = False
        _check_target(target)
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- set-up --------------------------------------------------------------------------

    def _set_up(self) -> None:
        target = self.target
        without = 0 if target.indirect else Feature.INDIRECT
        without |= 0 if target.event_idx else Feature.EVENT_IDX
        for path in target.sockets:
            self._backends.append(Backend(path, without=without))
        for backend in self._backends:
            self._check_backend(backend)
        self._direct = any(Feature.INDIRECT not in b.features for b in self._backends)
        self._ring_size = self._choose_ring_size()
        self._buffer_bytes = -(-target.bs // PAGE) * PAGE
        self._pool_blocks = max(target.pool // target.bs, 1)
        self._memory = GuestMemory(self._memory_bytes(), huge=target.hugepages)
        self._fill_pool(self._memory)
        self._create(self._memory)
        self._watch()

    def _check_backend(self, backend: Backend) -> None:
        target = self.target
        if target.queues > backend.queues:
            raise UsageError(
                f"{backend.path} has {backend.queues} queue(s), not {target.queues}: lower --queues"
            )
        if target.bs % backend.block_bytes or target.offset % backend.block_bytes:
            raise UsageError(
                f"{backend.path} has blocks of {backend.block_bytes} bytes: --bs {target.bs} and "
                f"--offset {target.offset} must be multiples"
            )
        if target.bs > backend.size_max:
            raise UsageError(f"{backend.path} takes {backend.size_max} bytes a segment: lower --bs")
        self._blocks_of(backend)

    def _blocks_of(self, backend: Backend) -> int:
        target = self.target
        room = backend.sectors * SECTOR - target.offset
        size = room if target.size is None else target.size
        if size > room or size < target.bs:
            raise UsageError(
                f"{backend.path} has {backend.sectors * SECTOR} bytes; {size} of them from "
                f"{target.offset} on hold no request of {target.bs} or do not exist"
            )
        return size // target.bs

    def _choose_ring_size(self) -> int:
        need = self.target.iodepth * (3 if self._direct else 1)
        size = self.target.ring_size or max(RING_SIZE_MIN, 1 << (need - 1).bit_length())
        if size < need or size & (size - 1) or size > RING_SIZE_MAX:
            raise UsageError(
                f"--iodepth {self.target.iodepth} needs a ring of {need} entries; a ring has a "
                f"power of two, {RING_SIZE_MAX} at most, and shall have {size}"
            )
        return size

    def _memory_bytes(self) -> int:
        depth = self.target.iodepth
        queue = 16 * self._ring_size + 6 + 2 * self._ring_size + 6 + 8 * self._ring_size
        queue += depth * (lib.LOAD_SLOT_BYTES + self._buffer_bytes) + 5 * PAGE
        queues = len(self._backends) * self.target.queues
        return queues * queue + self._pool_blocks * self.target.bs + PAGE

    def _fill_pool(self, memory: GuestMemory) -> None:
        target = self.target
        size = self._pool_blocks * target.bs
        self._pool = memory.place(size)
        if target.data is not None:
            data = from_file(target.data, size)
        else:
            data = compressible(size, target.compress, target.seed)
        memory.map[self._pool : self._pool + size] = data

    def _place_queue(self, memory: GuestMemory, disk: int, backend: Backend) -> dict[str, int]:
        kick, call = _eventfd(), _eventfd()
        self._fds += [kick, call]
        size, depth = self._ring_size, self.target.iodepth
        return {
            "disk": disk,
            "size": size,
            "event_idx": Feature.EVENT_IDX in backend.features,
            "indirect": not self._direct,
            "kick_fd": kick,
            "call_fd": call,
            "desc": memory.place(16 * size),
            "avail": memory.place(6 + 2 * size),
            "used": memory.place(6 + 8 * size),
            "slots": memory.place(depth * lib.LOAD_SLOT_BYTES),
            "buffers": memory.place(depth * self._buffer_bytes),
        }

    def _create(self, memory: GuestMemory) -> None:
        target = self.target
        queues = [
            self._place_queue(memory, disk, backend)
            for disk, backend in enumerate(self._backends)
            for _ in range(target.queues)
        ]
        disks = [
            {"sector": target.offset // SECTOR, "blocks": self._blocks_of(backend)}
            for backend in self._backends
        ]
        config = counter_layout(ffi.new("load_config *"))
        config.memory = ffi.cast("uint8_t *", memory.address())
        config.guest = memory.guest
        config.depth = target.iodepth
        config.block_bytes = target.bs
        config.buffer_bytes = self._buffer_bytes
        config.pool, config.pool_blocks = self._pool, self._pool_blocks
        config.in_place = target.in_place
        config.verify = target.verify
        config.run_id = int.from_bytes(os.urandom(4), "little")
        self._counters = config.counts
        text = ffi.new("char[]", lib.LOAD_TEXT_MAX)
        self._load = lib.load_create(
            config,
            ffi.new("load_disk_config[]", disks),
            len(disks),
            ffi.new("load_queue_config[]", queues),
            len(queues),
            text,
        )
        if not self._load:
            raise MissingError(ffi.string(text).decode())
        self._start_rings(memory, queues)

    def _start_rings(self, memory: GuestMemory, queues: list[dict[str, int]]) -> None:
        region = Region(memory.fd, memory.size, memory.guest)
        for disk, backend in enumerate(self._backends):
            mine = []
            for queue in (queue for queue in queues if queue["disk"] == disk):
                error = _eventfd()
                self._fds.append(error)
                self._watched[error] = f"{backend.path}: the back end reports a broken ring"
                mine.append(
                    Queue(
                        size=queue["size"],
                        desc=memory.guest + queue["desc"],
                        avail=memory.guest + queue["avail"],
                        used=memory.guest + queue["used"],
                        kick_fd=queue["kick_fd"],
                        call_fd=queue["call_fd"],
                        err_fd=error,
                    )
                )
            backend.start(region, mine)
            hung_up = f"{backend.path}: the back end hung up during the run"
            self._watched[backend.sock.fileno()] = hung_up

    # ---- watching the back ends ----------------------------------------------------------

    def _watch(self) -> None:
        self._wake = _eventfd()
        self._fds.append(self._wake)
        self._watcher = threading.Thread(target=self._watch_all, name="blkload-watch", daemon=True)
        self._watcher.start()

    def _watch_all(self) -> None:
        poller = select.poll()
        for fd in (*self._watched, self._wake):
            poller.register(fd, select.POLLIN)
        ready = [fd for fd, _events in poller.poll()]
        if self._wake not in ready:
            self._lost = True
            lib.load_abort(self._load, self._watched[ready[0]].encode())

    # ---- running -------------------------------------------------------------------------

    def start(self, work: Workload) -> None:
        """Begin a run. UsageError when it makes no sense on this target."""
        if self._thread is not None:
            raise UsageError("a run is going on: wait for its result first")
        self._check_workload(work)
        self._work = work
        self._ended = -1
        self._marks: list[tuple[str, float, dict[str, Counts]]] = []
        native = self._native(work)
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(native,), name="blkload-loop")
        self._thread.start()

    def _run(self, native: Any) -> None:
        if self._cpu is not None:
            os.sched_setaffinity(0, {self._cpu})  # of this thread alone
        self._ended = lib.load_run(self._load, native)

    def _check_workload(self, work: Workload) -> None:
        for backend in self._backends:
            for op, feature in NEEDED.items():
                if work.mix.get(op) and feature not in backend.features:
                    raise MissingError(f"{backend.path}: the back end does not offer {op} requests")
            if Feature.READ_ONLY in backend.features and set(work.mix) - {"read"}:
                raise UsageError(f"{backend.path} is read-only: only --rw read or randread")
        if work.written_only and not (work.once and self.target.verify):
            raise UsageError("written_only needs once and a verified target")
        if self._cpu is not None and self._cpu not in os.sched_getaffinity(0):
            raise UsageError(f"--cpu {self._cpu}: this process may not run there")

    def _native(self, work: Workload) -> Any:
        intervals = 1 + int((work.seconds or INTERVALS_MAX) / work.interval_s) + 1
        native = ffi.new("load_workload *")
        native.weight = [work.mix.get(op, 0) for op in OPS]
        native.pattern = PATTERNS["seq" if work.once else work.pattern]
        native.theta = work.theta
        native.seed = work.seed
        native.ios = work.ios or 0
        native.once = work.once
        native.written_only = work.written_only
        native.lockstep = work.lockstep
        native.sleep = work.sleep
        native.rate = work.rate or 0.0
        native.duration_ns = int((work.seconds or 0) * 1e9)
        native.ramp_ns = int(work.ramp * 1e9)
        native.stuck_ns = int(work.stuck_s * 1e9)
        native.interval_ns = max(int(work.interval_s * 1e9), 1)
        native.intervals = min(intervals, INTERVALS_MAX)
        native.errors_max = work.errors_max
        return native

    def running(self) -> bool:
        """Is the run still going on?"""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end of the run; False when it still runs after so long."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.running()

    def stop(self) -> None:
        """Let the run come to its end: what is in flight is waited for. Returns at once."""
        if self.running():
            lib.load_stop(self._load)

    def mark(self, name: str) -> None:
        """Begin a phase of the run, shown apart in the result. A glance: the requests of these
        microseconds may be counted on either side."""
        self._marks.append((name, time.monotonic() - self._began, self._counts(self._peek())))

    def progress(self) -> tuple[int, int, int]:
        """Requests done well, failed ones plus wrong blocks, and requests in flight, as of now."""
        state = self._peek()
        return sum(state.ios), state.errors + state.verify_errors, state.in_flight

    def result(self) -> Result:
        """Wait for the end of the run and return what it did."""
        if self._thread is None:
            raise UsageError("no run was started")
        self._thread.join()
        self._thread = None
        state = self._peek()
        text = ffi.string(state.text).decode(errors="replace")
        bad = self._ended in (lib.LOAD_FAILED, lib.LOAD_LOST) or state.errors or state.verify_errors
        result = Result(
            ended=ENDED[self._ended],
            failure=(text or "the run failed") if bad else None,
            seconds=state.ns / 1e9,
            errors=state.errors,
            verify_errors=state.verify_errors,
            verified=state.verified,
            unknown=state.unknown,
            kicks=state.kicks,
            calls=state.calls,
            by_op=self._counts(state),
            series=self._series(state.ns / 1e9),
            options={**dataclasses.asdict(self.target), **dataclasses.asdict(self._work)},
        )
        result.phases = self._phases(result)
        return result

    def run(self, work: Workload) -> Result:
        """start() and result()."""
        self.start(work)
        return self.result()

    def _peek(self) -> Any:
        state = ffi.new("load_state *")
        lib.load_peek(self._load, state)
        return state

    def _counts(self, state: Any) -> dict[str, Counts]:
        counters = ffi.unpack(lib.load_histogram(self._load), len(OPS) * self._counters)
        return {
            op: Counts(
                ios=state.ios[i],
                bytes=state.ios[i] * self.target.bs,
                min_ns=state.min_ns[i] if state.ios[i] else 0,
                max_ns=state.max_ns[i],
                sum_ns=state.sum_ns[i],
                counters=counters[i * self._counters : (i + 1) * self._counters],
            )
            for i, op in enumerate(OPS)
        }

    def _series(self, seconds: float) -> list[tuple[float, int]]:
        step = self._work.interval_s
        # One more than the division says: the loop counts in ticks.
        count = min(int(seconds / step) + 2, int(self._native(self._work).intervals))
        done = ffi.unpack(lib.load_series(self._load), count)
        while done and not done[-1]:
            done.pop()
        return [(index * step, ios) for index, ios in enumerate(done)]

    def _phases(self, result: Result) -> list[tuple[str, float, dict[str, Counts]]]:
        if not self._marks:
            return []
        end = ("", time.monotonic() - self._began, result.by_op)
        bounds = [*self._marks, end]
        return [
            (name, later[1] - at, {op: later[2][op].minus(counts[op]) for op in OPS})
            for (name, at, counts), later in itertools.pairwise(bounds)
        ]

    # ---- the end -------------------------------------------------------------------------

    def close(self) -> None:
        """Stop what runs, stop the rings, hang up, free. May be called twice."""
        if self._thread is not None:
            self.stop()
            self._thread.join()
            self._thread = None
        if self._watcher is not None:
            os.eventfd_write(self._wake, 1)
            self._watcher.join()
            self._watcher = None
        for backend in self._backends:
            if not self._lost and not backend.gone():
                # One that went away just now is owed nothing.
                with contextlib.suppress(LoadError):
                    backend.stop(self.target.queues)
            backend.close()
        self._backends.clear()
        if self._load is not None:
            lib.load_free(self._load)
            self._load = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        close_all(self._fds)


def _check_target(target: Target) -> None:
    if not target.sockets:
        raise UsageError("no --socket is given")
    if len(set(target.sockets)) < len(target.sockets):
        raise UsageError("a --socket is given twice; for several queues use --queues")
    if target.bs < SECTOR or target.bs % SECTOR or target.bs > BLOCK_BYTES_MAX:
        raise UsageError(
            f"--bs {target.bs}: give a multiple of {SECTOR}, at most {BLOCK_BYTES_MAX}"
        )
    if target.queues < 1 or target.iodepth < 1:
        raise UsageError("--queues and --iodepth must be at least 1")
    if target.offset < 0 or target.pool < 0:
        raise UsageError("--offset and --pool must not be negative")
