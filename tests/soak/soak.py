"""Mixed load for a time, with the agent's memory held against its limit at every step.

What counts is the private memory (RssAnon in /proc/PID/status). The arena and the guests' memory
are shared memory and have sizes of their own; that the arena keeps its own is checked too, and
so are the journal's size and the numbers of descriptors and threads. The limit is the
README's, whatever is written: FIXED_MIB and --index-size.

Between the loads all is committed and applied, and memory is looked at again: what a rest takes
may not grow with the number of requests that went before (LEAK_MIB).

Errors: `Exceeded`, with the figures.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from frontend import (
    INDIRECT,
    PLAIN,
    SEGMENT,
    UNMAP,
    BlkRequest,
    Disk,
    GuestMemory,
    RegionSpec,
    Status,
    Type,
)
from harness import Control, Daemon, DiskSpec, until

MIB = 1 << 20
DISKS = 2
QUEUES = 2
DISK_BYTES = 64 << 30
HOT_BYTES = 256 * MIB
"""Where most requests go; the rest of the disk is for epochs of very many blocks."""
ARENA_MIB = 32
INDEX_MIB = 8
FIXED_MIB = 40
LEAK_MIB = 4
ROUND_REQUESTS = 1000
DENSE_EVERY = 20
DENSE_BYTES = 256 << 10
DENSE_RANGES = 4000
INFLIGHT_MAX = 48
LIMIT = (FIXED_MIB + INDEX_MIB) * MIB
NOISE = random.Random(0).randbytes(2 * MIB)


class Exceeded(AssertionError):
    """The agent takes more than it may."""


def private_bytes(pid: int) -> int:
    """Resident private memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise LookupError("no RssAnon in /proc")


def own_thread(task: Path) -> bool:
    """False for a worker of the kernel's io_uring, and for one that has just ended."""
    try:
        return not (task / "comm").read_text().startswith("iou-wrk")
    except FileNotFoundError:
        return False


class Soak:
    """One agent under load. `close()` ends it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        specs = [DiskSpec(f"disk{i}", DISK_BYTES) for i in range(DISKS)]
        self.daemon = Daemon(folder, specs, arena=f"{ARENA_MIB}M")
        self.disks: list[Disk] = []
        self.pending: list[BlkRequest] = []
        self.rests: list[int] = []  # private memory at rest, since the last restart
        self.first: dict[str, int] = {}
        self.peak = 0
        self.requests = self.written = self.rounds = 0
        self.index_max = 0
        self.done = {"seal": 0, "commit": 0, "discard": 0, "hang-up": 0, "client": 0, "restart": 0}

    def lines(self) -> list[str]:
        """The figures."""
        return [
            f"requests = {self.requests}, {self.written >> 20} MiB written, rounds = {self.rounds}",
            ", ".join(f"{name}s = {count}" for name, count in self.done.items()),
            f"index: most {self.index_max / MIB:.1f} of {INDEX_MIB} MiB",
            f"private memory: most {self.peak / MIB:.1f} MiB (limit {LIMIT / MIB:.1f}), "
            f"at rest {', '.join(self._rests())} MiB",
        ]

    def _rests(self) -> list[str]:
        shown = self.rests[:2] + self.rests[2:][-3:]
        return [f"{bytes_ / MIB:.1f}" for bytes_ in shown]

    def run(self, seconds: float) -> None:
        """`Exceeded` as soon as it takes too much."""
        self.daemon.start()
        self._attach()
        self.journal_bytes = self._journal_bytes()
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(self.rests) < 4:
            for _ in range(ROUND_REQUESTS):
                self._step()
            if self.rounds % DENSE_EVERY == 1:
                self._dense()
            self._between()
            self._rest()
            self.rounds += 1
        self._detach()
        self.daemon.stop("quit")

    def close(self) -> None:
        """End all, whatever the state."""
        self._detach()
        self.daemon.close()

    def _attach(self) -> None:
        for index in range(DISKS):
            memory = GuestMemory([RegionSpec(0, 32 * MIB, 0x7F10_0000_0000)])
            disk = Disk(self.daemon.socket(index), memory=memory)
            self.disks.append(disk)
            disk.start(QUEUES, 128, inflight=True)

    def _detach(self) -> None:
        while self.disks:
            disk = self.disks.pop()
            disk.close()
            disk.memory.close()

    # ---- load ----------------------------------------------------------------------------

    def _step(self) -> None:
        dice = self.random.random()
        if dice < 0.02:
            self._verb()
        elif len(self.pending) >= INFLIGHT_MAX:
            self._wait()
        else:
            self._submit()

    def _submit(self) -> None:
        disk = self.random.choice(self.disks)
        kinds = [Type.OUT] * 12 + [Type.IN] * 4 + [Type.WRITE_ZEROES, Type.DISCARD, Type.FLUSH]
        kind = self.random.choice(kinds)
        sectors = self.random.choice([1, 8, 8, 16, 128, 512])
        sector = self.random.randrange(HOT_BYTES // 512 - sectors)
        sector -= sector % 8 if sectors >= 8 else 0
        queue, payload, room = self.random.randrange(QUEUES), b"", 0
        if kind == Type.OUT:
            payload = self._content(sectors * 512)
            self.written += len(payload)
        elif kind == Type.IN:
            room = sectors * 512
        elif kind in (Type.WRITE_ZEROES, Type.DISCARD):
            flags = UNMAP if kind == Type.WRITE_ZEROES and sectors == 8 else 0
            payload, sector = SEGMENT.pack(sector, sectors * 4 % 2048, flags), 0
        layout = self.random.choice([PLAIN, INDIRECT])
        self.pending.append(disk.submit(kind, sector, payload, room, layout=layout, queue=queue))
        self.requests += 1

    def _content(self, count: int) -> bytes:
        """Noise, what can be compressed well, or zeroes."""
        dice = self.random.random()
        at = self.random.randrange(len(NOISE) - count)
        if dice < 0.5:
            return NOISE[at : at + count]
        if dice < 0.9:
            return (NOISE[at : at + 64] * (count // 64 + 1))[:count]
        return bytes(count)

    def _wait(self) -> None:
        """For some answers; with room made in the arena where it is full."""
        before = len(self.pending)

        def some() -> bool:
            for disk in self.disks:
                for queue in range(QUEUES):
                    disk.reap(queue)
            self.pending = [request for request in self.pending if not self._finished(request)]
            if len(self.pending) < before:
                return True
            if self.daemon.control.status()["held"]:
                self._checkpoint()
            return False

        until("requests to be answered", some)

    def _finished(self, request: BlkRequest) -> bool:
        if request.done and request.status != Status.OK:
            raise Exceeded(f"a request ended with {request.status.name}")
        return request.done

    def _checkpoint(self) -> None:
        self.daemon.control.seal()
        self._look()  # the most is there now
        self.daemon.control.commit()
        self.done["seal"] += 1
        self.done["commit"] += 1

    def _verb(self) -> None:
        dice = self.random.random()
        if dice < 0.6:
            self.daemon.control.seal()
            self.done["seal"] += 1
        elif dice < 0.9:
            self._checkpoint()
        else:
            self.daemon.control.discard()
            self.done["discard"] += 1
        self._look()

    def _between(self) -> None:
        """Front ends and clients come and go, and sometimes the agent does."""
        dice = self.random.random()
        if dice < 0.4:
            for disk in self.disks:
                disk.reconnect()
            self.done["hang-up"] += 1
        elif dice < 0.8:
            client = Control(self.daemon.control_path)
            client.status()
            client.close()
            self.done["client"] += 1
        while self.pending:
            self._wait()

    def _dense(self) -> None:
        """As many blocks and zero ranges as one can get quickly: they take hardly any room in the
        arena, but a place in the index each. When that is full and holds writes, the agent
        dies, and all is dropped."""
        for number in range(DENSE_RANGES):
            place = (self.random.randrange(DISK_BYTES // 4096 // 4) * 4 + number % 2) * 8
            self._push(Type.WRITE_ZEROES, 0, SEGMENT.pack(place, 16, 0))
        while not self.daemon.control.status()["held"]:
            for _ in range(INFLIGHT_MAX):
                place = self.random.randrange(DISK_BYTES // DENSE_BYTES) * DENSE_BYTES
                self._push(Type.OUT, place // 512, bytes(DENSE_BYTES))
            self._look()
        if self._index()["used"] < INDEX_MIB * MIB * 3 // 4:
            raise Exceeded(f"held with {self._index()} of the index used")
        self._restart()
        self._look()
        self.daemon.control.discard()
        self.done["discard"] += 1

    def _push(self, kind: Type, sector: int, payload: bytes) -> None:
        """One request more, when there is room in the rings; what is held stays there."""
        while len(self.pending) >= INFLIGHT_MAX:
            for disk in self.disks:
                for queue in range(QUEUES):
                    disk.reap(queue)
            self.pending = [request for request in self.pending if not self._finished(request)]
            if self.daemon.control.status()["held"]:
                return
        disk = self.random.choice(self.disks)
        self.pending.append(disk.submit(kind, sector, payload, layout=INDIRECT))
        self.requests += 1

    def _restart(self) -> None:
        """SIGKILL, and the next agent on the same arena: its memory is looked at anew."""
        self.daemon.restart("kill")
        for disk in self.disks:
            disk.reconnect()
        while self.pending:
            self._wait()
        self.rests.clear()
        self.first.clear()
        self.done["restart"] += 1

    # ---- looks ---------------------------------------------------------------------------

    def _look(self) -> int:
        taken = private_bytes(self.daemon.pid)
        index = self._index()
        self.index_max = max(self.index_max, index["used"])
        self.peak = max(self.peak, taken)
        if taken > LIMIT:
            raise Exceeded(f"{taken} bytes of private memory, the limit is {LIMIT}; index: {index}")
        if index["used"] > index["size"] or index["size"] != INDEX_MIB * MIB:
            raise Exceeded(f"the index: {index}")
        arena = self.daemon.control.status()["arena"]
        if arena["used"] > arena["size"] or arena["size"] > ARENA_MIB * MIB:
            raise Exceeded(f"the arena: {arena}")
        return taken

    def _index(self) -> dict[str, int]:
        index: dict[str, int] = self.daemon.control.status()["index"]
        return index

    def _rest(self) -> None:
        """Nothing is in flight, nothing waits: what remains is fixed."""
        self._checkpoint()
        self.daemon.control.wait_applied()
        self.rests.append(self._look())
        if self._journal_bytes() != self.journal_bytes:
            raise Exceeded(f"the journal has {self._journal_bytes()} bytes")
        if len(self.rests) > 2 and self.rests[-1] > self.rests[1] + LEAK_MIB * MIB:
            raise Exceeded(f"at rest it takes {self.rests[-1]} bytes, first {self.rests[1]}")
        process = Path(f"/proc/{self.daemon.pid}")
        self._same("descriptors", len(os.listdir(process / "fd")))
        self._same("threads", sum(own_thread(task) for task in (process / "task").iterdir()))

    def _same(self, what: str, count: int) -> None:
        first = self.first.setdefault(what, count)
        if count > first + 4:
            raise Exceeded(f"{count} {what}, {first} in the beginning")

    def _journal_bytes(self) -> int:
        (path,) = self.daemon.folder.glob("*journal")
        return path.stat().st_size
