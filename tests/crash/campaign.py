"""Kills the agent under a front end's load, again and again, and misses nothing.

A `Campaign` runs the real daemon with two disks and a front end over shared memory with an
in-flight region, two queues a disk. The load: writes of any whole sectors, zeroes, discards,
reads, flushes, and the verbs seal, commit and discard, on a plain model (sectors that are in
flight are never touched twice, so that each has one expected value). A round ends with the
death of the agent: SIGKILL at a random moment from another thread, or by itself at a named
point (points.py). Then it is started again with the same options, and the round is checked:

- every request in flight is answered OK, once (an answer too many is `BadUsed`);
- ids only grow; open, sealed and committed are what the verbs left, or what the verb whose
  answer was lost would have left;
- the disks read back as the model says, sector by sector;
- a commit asked for again gives the same answer;
- an epoch that was discarded is gone, and what was sealed is whole: discards and commits
  after the restart, and the images, show it;
- now and then the arena is removed, as a reboot does: the committed state is there.

A sector whose write was in flight when an epoch was sealed may be in that epoch or in the
next: the model keeps both for it, and no other.

Errors: `Lost` names the round, its seed and what is wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frontend import (
    DEADLINE_S,
    INDIRECT,
    PLAIN,
    SECTOR,
    SEGMENT,
    UNMAP,
    BlkRequest,
    Disk,
    FrontEndError,
    GuestMemory,
    HungUp,
    RegionSpec,
    Status,
    Type,
)
from harness import ControlError, Daemon, DiskSpec, until

from .points import POINTS

DISKS = 2
DISK_BYTES = 2 << 20
QUEUES = 2
INFLIGHT_MAX = 24
SECTORS_MAX = 64
CHECK_SECTORS = 128
ROUND_STEPS = 4000
"""A round whose point is not reached by then ends at a random moment."""
KILL_WITHIN_S = 0.08
ARENA = "16M"
NOISE = random.Random(0).randbytes(1 << 20)


class Lost(AssertionError):
    """The agent broke a promise."""


class Gone(Exception):
    """The agent died while it was asked something."""


DEAD = (HungUp, ConnectionError, Gone)
VERB_POINTS = ("seal", "commit", "discard", "apply", "super", "pack")



@dataclass(frozen=True)
class Change:
    """Bytes of a disk that a request changes."""

    disk: int
    start: int
    data: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def overlaps(self, disk: int, start: int, end: int) -> bool:
        return disk == self.disk and start < self.end and self.start < end


@dataclass
class Snapshot:
    """The disks at a moment; `maybe`: changes that were in flight then, so they may be in it."""

    state: list[bytearray]
    maybe: list[Change] = field(default_factory=list)

    def copy(self) -> Snapshot:
        return Snapshot([bytearray(disk) for disk in self.state], list(self.maybe))

    def settle(self, found: list[bytes]) -> None:
        """`found` must be this state; after that the state is exactly what was found."""
        for change in self.maybe:
            part = found[change.disk][change.start : change.end]
            old = self.state[change.disk][change.start : change.end]
            # The parts of one write may only be cut at sectors if it was never acknowledged.
            for at in range(0, len(part), SECTOR):
                piece = part[at : at + SECTOR]
                if piece not in (old[at : at + SECTOR], change.data[at : at + SECTOR]):
                    raise Lost(f"disk {change.disk} sector {(change.start + at) // SECTOR}: "
                               "neither the old nor the new content")
            self.state[change.disk][change.start : change.end] = part
        self.maybe = []
        for disk, (wanted, got) in enumerate(zip(self.state, found, strict=True)):
            if wanted != got:
                bad = [at // SECTOR for at in range(0, len(got), SECTOR)
                       if wanted[at : at + SECTOR] != got[at : at + SECTOR]]
                raise Lost(f"disk {disk}: {len(bad)} sectors are wrong, the first is {bad[0]}")


@dataclass
class Pending:
    """A request on its way and what it does or must return."""

    request: BlkRequest
    disk: int
    change: Change | None
    expected: bytes | None
    start: int


@dataclass
class Figures:
    """What a campaign did."""

    kills: int = 0
    at_points: dict[str, int] = field(default_factory=dict)
    reboots: int = 0
    reconnects: int = 0
    requests: int = 0
    finished_later: int = 0
    commits: int = 0
    discards: int = 0
    seals: int = 0
    images_checked: int = 0

    def lines(self) -> list[str]:
        reached = sum(self.at_points.values())
        return [
            f"kills = {self.kills} ({reached} at {len(self.at_points)} of {len(POINTS)} named "
            f"points, {self.reboots} with the arena lost)",
            f"reconnects = {self.reconnects}",
            f"requests = {self.requests}, {self.finished_later} of them finished after a kill",
            f"seals = {self.seals}, commits = {self.commits}, discards = {self.discards}, "
            f"images compared = {self.images_checked}",
        ]


class Campaign:
    """One daemon that is killed over and over. `close()` ends it."""

    def __init__(self, folder: Path, seed: int, command: list[str] | None = None) -> None:
        """`command`: the words of a build with crash points; without it kills are random."""
        self.seed = seed
        self.random = random.Random(seed)
        self.points = POINTS if command else {}
        self._reactors = itertools.cycle(self.random.sample((1, 1, 2, 2, 2), 5))
        specs = [DiskSpec(f"disk{i}", DISK_BYTES) for i in range(DISKS)]
        options = ["--journal-size", "48M"]
        self.daemon = Daemon(folder, specs, arena=ARENA, options=options, program=command)
        self.figures = Figures()
        self.progress: Callable[[int], None] = lambda done: None
        self.disks: list[Disk] = []
        self.pending: list[Pending] = []
        self.now = Snapshot([bytearray(DISK_BYTES) for _ in range(DISKS)])
        self.committed = self.now.copy()
        self.sealed: list[tuple[int, Snapshot]] = []
        self.open = 0
        self.committed_id = 0
        self.verb: tuple[str, int, Snapshot] | None = None
        self.point: str | None = None  # where the agent that runs now is to die
        self.reverted = False  # the disks were put back to the committed state
        self._due = self._order_of_points()

    def _order_of_points(self) -> Iterator[str | None]:
        """Half of the kills at named points, all of them in turn; the others at random."""
        names = list(self.points)
        self.random.shuffle(names)
        choice: list[str | None] = [*names] or [None]
        for name in itertools.cycle(choice):
            yield name
            if names:
                yield None

    # ---- life ----------------------------------------------------------------------------

    def run(self, kills: int) -> Figures:
        """Start, kill `kills` times, end well; `Lost` when anything is missing."""
        self.daemon.start()
        self._attach()
        self.open = self._status()["open"]
        try:
            while self.figures.kills < kills:
                self._round()
                if self.random.random() < 0.04:
                    self._reboot()
                else:
                    self._come_back()
            self._end()
        except (FrontEndError, ControlError, AssertionError, TimeoutError, RuntimeError) as error:
            where = f"seed {self.seed}, kill {self.figures.kills}"
            raise Lost(f"{where}: {type(error).__name__}: {error}") from error
        return self.figures

    def close(self) -> None:
        """End the daemon and the front ends whatever their state."""
        self._detach()
        self.daemon.close()

    def _attach(self) -> None:
        for index in range(DISKS):
            memory = GuestMemory([RegionSpec(0, 16 << 20, 0x7F10_0000_0000)])
            disk = Disk(self.daemon.socket(index), memory=memory)
            self.disks.append(disk)
            disk.start(QUEUES, 64, inflight=True)

    def _detach(self) -> None:
        while self.disks:
            disk = self.disks.pop()
            disk.close()
            disk.memory.close()

    def _end(self) -> None:
        """A clean end: what is committed is in the images, nothing else is."""
        if self.point is not None:
            self._due = itertools.repeat(None)
            self._kill()
            self.point = None
            self._count_death()
            self._come_back()
        self._drain()
        self._seal()
        self._commit()
        self._detach()
        self.daemon.stop("quit")
        self.committed.settle([self.daemon.image_bytes(i) for i in range(DISKS)])

    # ---- one round -----------------------------------------------------------------------

    def _round(self) -> None:
        """Load until the agent is dead."""
        killer = threading.Timer(self.random.uniform(0, KILL_WITHIN_S), self._kill)
        if self.point is None:
            killer.start()
        try:
            for _ in range(ROUND_STEPS):
                self._step()
            self.point = None  # not reached
        except DEAD:
            pass
        finally:
            if killer.is_alive():
                killer.join()
        self._kill()
        self._count_death()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, AssertionError):
            os.kill(self.daemon.pid, signal.SIGKILL)

    def _count_death(self) -> None:
        """The agent is dying or dead; of our doing it must be."""
        status = self.daemon.exit_status
        if self.daemon.process is not None:
            status = self.daemon.wait_exit()
        if status != -signal.SIGKILL:
            raise Lost(f"the agent ended by itself with {status}:\n{self.daemon.log()[-3000:]}")
        self.figures.kills += 1
        self.progress(self.figures.kills)
        if self.point is not None:
            self.figures.at_points[self.point] = self.figures.at_points.get(self.point, 0) + 1

    def _arm(self, point: str | None) -> None:
        """The next agent dies at this point, at a visit chosen here."""
        self.point = point
        self.daemon.environment = {}
        if point is not None:
            visit = self.random.randint(1, self.points[point])
            self.daemon.environment = {"EPOCHD_CRASH_POINT": f"{point}:{visit}"}

    def _start(self) -> None:
        """DEAD when the agent comes to its point before it serves."""
        self.daemon.exit_status = None
        try:
            self.daemon.start()
        except RuntimeError:
            if self.point is None or self.daemon.exit_status != -signal.SIGKILL:
                raise
            raise Gone from None

    def _next_reactors(self) -> None:
        """Each agent may serve the disks with another number of threads than the one before."""
        self.daemon.options = ["--journal-size", "48M", "--reactors", str(next(self._reactors))]

    def _come_back(self) -> None:
        """The next agent on the same arena: everything is as it was. It may die over the
        requests that it finds, or in its start; then there is another."""
        waiting = len(self.pending)
        while True:
            self._arm(next(self._due))
            self._next_reactors()
            try:
                self._start()
                for disk in self.disks:
                    disk.reconnect()
                    self.figures.reconnects += 1
                self._check_ids()
                self._drain()
                self._check_disks()
                break
            except DEAD:
                self._count_death()
        self.figures.finished_later += waiting

    def _reboot(self) -> None:
        """The host went down: the arena and the guest are gone, what is committed is not."""
        self.figures.reboots += 1
        self._detach()
        self.pending.clear()
        self.daemon.lose_shm()
        self._arm(None)
        self.daemon.start()
        status = self._status()
        self._settle_commit(status["committed"])
        if status["open"] <= self.open or status["sealed"]:
            raise Lost(f"after a reboot: {status}, {self.open} was open before")
        self.open = status["open"]
        self.verb = None
        self.sealed = []
        self.now = self.committed.copy()
        self.reverted = True
        self._attach()
        self._check_disks()

    # ---- load ----------------------------------------------------------------------------

    def _step(self) -> None:
        self._alive()
        self._reap()
        often = 4.0 if self.point and self.point.startswith(VERB_POINTS) else 1.0
        dice = self.random.random() / often
        if dice < 0.008:
            self._seal()
        elif dice < 0.015:
            self._commit()
        elif dice < 0.018:
            self._discard()
        elif dice < 0.021:
            self._repeat_commit()
        elif dice < 0.023:
            self._check_image()
        elif len(self.pending) >= INFLIGHT_MAX:
            self._wait_some()
        else:
            self._submit()

    def _place(self) -> tuple[int, int, int] | None:
        """Disk, first sector and sectors that no request in flight touches."""
        disk = self.random.randrange(DISKS)
        sectors = self.random.choice([1, 1, 3, 8, 8, 8, 16, self.random.randint(1, SECTORS_MAX)])
        sector = self.random.randrange(DISK_BYTES // SECTOR - sectors)
        if self.random.random() < 0.5 and sectors >= 8:
            sector -= sector % 8
        start, end = sector * SECTOR, (sector + sectors) * SECTOR
        for other in self.pending:
            if other.change is not None and other.change.overlaps(disk, start, end):
                return None
            if other.expected is not None and other.disk == disk:
                low = other.start
                if low < end and start < low + len(other.expected):
                    return None
        return disk, sector, sectors

    def _submit(self) -> None:
        place = self._place()
        if place is None:
            return
        disk, sector, sectors = place
        bytes_ = sectors * SECTOR
        dice = self.random.random()
        change: Change | None = None
        expected: bytes | None = None
        if dice < 0.7:
            data = self._content(bytes_)
            change = Change(disk, sector * SECTOR, data)
            request = self._send(disk, Type.OUT, sector, data)
        elif dice < 0.78:
            change = Change(disk, sector * SECTOR, bytes(bytes_))
            kind = self.random.choice([Type.WRITE_ZEROES, Type.DISCARD])
            flags = self.random.choice([0, UNMAP]) if kind == Type.WRITE_ZEROES else 0
            request = self._send(disk, kind, 0, SEGMENT.pack(sector, sectors, flags))
        elif dice < 0.97:
            expected = bytes(self.now.state[disk][sector * SECTOR : sector * SECTOR + bytes_])
            request = self._send(disk, Type.IN, sector, room=bytes_)
        else:
            request = self._send(disk, Type.FLUSH)
        self.pending.append(Pending(request, disk, change, expected, sector * SECTOR))
        self.figures.requests += 1

    def _content(self, count: int) -> bytes:
        """Noise, text-like data or nothing, so that all kinds of frames come about."""
        dice = self.random.random()
        if dice < 0.05:
            return bytes(count)
        at = self.random.randrange(len(NOISE) - count)
        if dice < 0.5:
            return NOISE[at : at + count]
        return (NOISE[at : at + 64] * (count // 64 + 1))[:count]

    def _send(
        self, disk: int, kind: int, sector: int = 0, payload: bytes = b"", room: int = 0
    ) -> BlkRequest:
        return self.disks[disk].submit(
            kind,
            sector,
            payload,
            room,
            layout=self.random.choice([PLAIN, INDIRECT]),
            queue=self.random.randrange(QUEUES),
        )

    def _reap(self) -> None:
        for disk in self.disks:
            for queue in range(QUEUES):
                disk.reap(queue)
                # A head that is used again at once would hide a second answer.
                self.random.shuffle(disk.queues[queue].free)
        left = []
        for entry in self.pending:
            if entry.request.done:
                self._check_answer(entry)
            else:
                left.append(entry)
        self.pending = left

    def _check_answer(self, entry: Pending) -> None:
        if entry.request.status != Status.OK:
            raise Lost(f"disk {entry.disk}: a request ended with {entry.request.status.name}")
        if entry.change is not None:
            self.now.state[entry.disk][entry.change.start : entry.change.end] = entry.change.data
        if entry.expected is not None and entry.request.data != entry.expected:
            raise Lost(f"disk {entry.disk} at byte {entry.start}: a read returned other data")

    def _wait_some(self) -> None:
        """Until something is answered; room in the arena is made when nothing is."""
        before = len(self.pending)
        deadline = time.monotonic() + DEADLINE_S
        since = time.monotonic()
        while len(self.pending) == before:
            self._alive()
            self._reap()
            if time.monotonic() - since > 0.1 and self._status()["held"]:
                self._seal()
                self._commit()
                since = time.monotonic()
            if time.monotonic() > deadline:
                raise Lost(f"{before} requests are not answered")
            time.sleep(0.0002)

    def _alive(self) -> None:
        process = self.daemon.process
        if process is None or process.poll() is not None:
            raise Gone

    def _drain(self) -> None:
        while self.pending:
            self._wait_some()

    # ---- verbs ---------------------------------------------------------------------------

    def _execute(self, verb: str, **arguments: Any) -> Any:
        """A verb's answer; `Gone` when the agent dies over it."""
        try:
            answer: Future[Any] = self.daemon.control.begin(verb, **arguments)
            return answer.result(DEADLINE_S)
        except TimeoutError:
            raise
        except Exception as error:
            if not self._dies():
                raise Lost(f"{verb} {arguments}: {error}") from error
            raise Gone from None

    def _dies(self) -> bool:
        """True when the agent is gone within a moment."""
        process = self.daemon.process
        for _ in range(200):
            if process is None or process.poll() is not None:
                return True
            time.sleep(0.005)
        return False

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = self._execute("query-status")
        return status

    def _snapshot(self) -> Snapshot:
        shot = self.now.copy()
        shot.maybe += [entry.change for entry in self.pending if entry.change is not None]
        return shot

    def _seal(self) -> None:
        if len(self.sealed) > 20:
            return
        self._reap()
        self.verb = ("seal", self.open, self._snapshot())
        epoch = self._execute("epoch-seal")["epoch"]
        if epoch != self.open:
            raise Lost(f"epoch {epoch} was sealed, {self.open} was open")
        self._sealed()

    def _sealed(self) -> None:
        assert self.verb is not None
        self.sealed.append((self.open, self.verb[2]))
        self.open += 1
        self.verb = None
        self.figures.seals += 1

    def _commit(self) -> None:
        if not self.sealed:
            return
        epoch = self.random.choice(self.sealed)[0]
        self.verb = ("commit", epoch, self.now)
        committed = self._execute("epoch-commit", epoch=epoch)["committed"]
        if committed != epoch:
            raise Lost(f"commit of {epoch} answered {committed}")
        self._settle_commit(committed)
        self.verb = None
        self.figures.commits += 1

    def _settle_commit(self, committed: int) -> None:
        """`committed` is what the agent says: what was, or what was asked for last."""
        allowed = {self.committed_id}
        if self.verb is not None and self.verb[0] == "commit":
            allowed.add(self.verb[1])
        if committed not in allowed:
            raise Lost(f"committed is {committed}, expected one of {sorted(allowed)}")
        for epoch, shot in self.sealed:
            if epoch <= committed:
                self.committed = shot
        self.sealed = [(epoch, shot) for epoch, shot in self.sealed if epoch > committed]
        self.committed_id = committed

    def _repeat_commit(self) -> None:
        if not self.committed_id:
            return
        answer = self._execute("epoch-commit", epoch=self.committed_id)["committed"]
        if answer != self.committed_id:
            raise Lost(f"commit of {self.committed_id} again answered {answer}")

    def _discard(self) -> None:
        """The primary died: nothing is in flight any more, what is not committed goes."""
        self._drain()
        self.verb = ("discard", self.open, self.now)
        answer = self._execute("epoch-discard")
        wanted = [epoch for epoch, _ in self.sealed] + [self.open]
        if answer["discarded"] not in ([], wanted) or answer["committed"] != self.committed_id:
            raise Lost(f"discard answered {answer}, expected {wanted}")
        if answer["discarded"]:
            self._discarded()
        elif self.sealed:
            raise Lost("sealed epochs were not discarded")
        self.verb = None
        self._check_disks()

    def _discarded(self) -> None:
        self.now = self.committed.copy()
        self.reverted = True
        self.sealed = []
        self.open += 1
        self.verb = None
        self.figures.discards += 1

    # ---- checks --------------------------------------------------------------------------

    def _check_ids(self) -> None:
        """After a restart: ids as they were, or as the verb without an answer leaves them."""
        status = self._status()
        verb = self.verb[0] if self.verb else None
        self._settle_commit(status["committed"])
        if status["open"] == self.open + 1 and verb == "seal":
            self._sealed()
        elif status["open"] == self.open + 1 and verb == "discard":
            self._discarded()
        self.verb = None
        wanted = [epoch for epoch, _ in self.sealed]
        if status["open"] != self.open or status["sealed"] != wanted:
            raise Lost(f"after a restart open is {status['open']}, sealed {status['sealed']}; "
                       f"expected {self.open} and {wanted}")

    def _check_disks(self) -> None:
        """Read everything back. Nothing may be in flight."""
        self.now.settle([self._read_all(index) for index in range(DISKS)])
        if self.reverted:  # what the committed state is where it was not sure is known now
            self.committed = self.now.copy()
            self.reverted = False

    def _read_all(self, index: int) -> bytes:
        disk, sectors = self.disks[index], DISK_BYTES // SECTOR
        requests: list[BlkRequest] = []
        for sector in range(0, sectors, CHECK_SECTORS):
            requests.append(disk.submit(Type.IN, sector, room=CHECK_SECTORS * SECTOR,
                                        layout=INDIRECT, queue=len(requests) % QUEUES))
        disk.wait(*requests)
        if any(request.status != Status.OK for request in requests):
            raise Lost(f"disk {index} cannot be read back")
        return b"".join(request.data for request in requests)

    def _check_image(self) -> None:
        """The images, when all that is committed is applied, are the committed state."""

        def applied() -> bool:
            status = self._status()
            return bool(status["applied"] == status["committed"])

        until("all that is committed to be applied", applied)
        self.committed.settle([self.daemon.image_bytes(i) for i in range(DISKS)])
        self.figures.images_checked += 1

