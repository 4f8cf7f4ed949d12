"""Random histories against a plain model of the disk.

Reads, writes of any size and layout, zeroes, discards, flushes, seals, commits, discards of
epochs, restarts, kill -9 with requests or commands in flight, and reboots of the host: after
each, every sector must be what the model says; at the end the images must be the committed
state. One test takes short histories from hypothesis, which shrinks a failure; the other runs
one long history for a time.

EPOCHD_TEST_SEED repeats a run (the seed is printed), EPOCHD_PROPERTY_SECONDS makes the long one
longer, EPOCHD_PROPERTY_EXAMPLES the number of short ones larger.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from conftest import running
from frontend import SECTOR, BlkRequest, Disk, Layout, Status, Type
from harness import ControlError, Daemon, DiskSpec
from hypothesis import strategies
from model import Model

SEED = int(os.environ.get("EPOCHD_TEST_SEED", random.randrange(1 << 32)))
SECONDS = float(os.environ.get("EPOCHD_PROPERTY_SECONDS", "25"))
EXAMPLES = int(os.environ.get("EPOCHD_PROPERTY_EXAMPLES", "12"))
SIZES = (3 << 20, (1 << 20) + 3 * SECTOR)
QUEUES = 2
ROOM = 3 << 20
"""Bytes written between two commits at most, so that the arena (8 MiB) never holds writes:
what is sealed, committed and being packed must fit together."""

LAYOUTS = (
    Layout(),
    Layout(indirect=0),
    Layout(out=[1] * 16, into=[512], indirect=0),
    Layout(out=[16, 700, 9], into=[5, 1000], regions=[1, 0], skew=5, indirect=0),
    Layout(out=[16 + 1536], into=[1537]),
)


class History:
    """A daemon, front ends on all its disks, and the model. Operations are methods; each takes
    its random numbers from the generator it is given."""

    def __init__(self, folder: Path) -> None:
        specs = [DiskSpec(f"disk{i}", size) for i, size in enumerate(SIZES)]
        self.daemon = Daemon(folder, specs, arena="8M")
        running.append(self.daemon)
        self.disks: list[Disk] = []
        self.trace: list[str] = []
        self.written = 0
        self.clusters = 0  # seen in the statistics of any agent so far
        self.extents: list[tuple[int, int]] = []  # of the last burst
        try:
            self.daemon.start()
            self.model = Model(SIZES, self.daemon.control.status()["open"])
            self.attach()
        except BaseException:
            self.close()
            raise

    def attach(self) -> None:
        """Fresh front ends."""
        for disk in self.disks:
            disk.close()
        self.disks = []
        for index in range(len(SIZES)):
            disk = Disk(self.daemon.socket(index))
            self.disks.append(disk)
            disk.start(QUEUES, 64, inflight=True)

    def close(self) -> None:
        for disk in self.disks:
            disk.close()
        self.daemon.close()
        running.remove(self.daemon)
        assert self.daemon.complaints() == []

    # ---- what is said about a failure ----------------------------------------------------

    def note(self, text: str) -> None:
        self.trace.append(text)

    def story(self) -> str:
        """The last operations."""
        return "\n".join(f"{i}: {text}" for i, text in enumerate(self.trace))[-6000:]

    # ---- requests ------------------------------------------------------------------------

    def extent(self, chance: random.Random, most: int = 256) -> tuple[int, int, int]:
        """A random disk and range: (disk, first sector, sectors). Small ones meet often."""
        disk = chance.randrange(len(SIZES))
        total = SIZES[disk] // SECTOR
        sectors = min(chance.choice([1, 1, 2, 3, 8, 8, 8, 9, 16, 64, most]), total)
        near = chance.choice([64, 64, 512, total])
        first = chance.randrange(min(near, total - sectors) + 1)
        if chance.random() < 0.4:
            first = first // 8 * 8
        if chance.random() < 0.05:
            first = total - sectors
        return disk, first, sectors

    def data(self, chance: random.Random, sectors: int) -> bytes:
        """Sectors that compress well, badly, or are zero."""
        kind = chance.randrange(5)
        if kind == 0:
            return bytes(sectors * SECTOR)
        if kind == 1:
            return chance.randbytes(sectors * SECTOR)
        return b"".join(
            chance.choice([chance.randbytes(8) * 64, bytes(SECTOR), chance.randbytes(SECTOR)])
            for _ in range(sectors)
        )

    def make_room(self, size: int) -> None:
        self.written += size
        if self.written > ROOM:
            self.written = size
            self.seal()
            self.commit(None)
            self.daemon.control.wait_applied()

    def write(self, chance: random.Random) -> None:
        disk, first, sectors = self.extent(chance)
        data = self.data(chance, sectors)
        self.make_room(len(data))
        self.note(f"write disk {disk} sectors {first}+{sectors}")
        layout, queue = chance.choice(LAYOUTS), chance.randrange(QUEUES)
        self.disks[disk].write(first, data, layout=layout, queue=queue)
        self.model.write(disk, first * SECTOR, data)

    def zero(self, chance: random.Random) -> None:
        disk, first, sectors = self.extent(chance, 4000 if chance.random() < 0.2 else 256)
        kind = chance.choice(["discard", "zero", "unmap"])
        self.note(f"{kind} disk {disk} sectors {first}+{sectors}")
        self.make_room(4096)
        if kind == "discard":
            self.disks[disk].discard(first, sectors)
        else:
            self.disks[disk].write_zeroes(first, sectors, unmap=kind == "unmap")
        self.model.write(disk, first * SECTOR, bytes(sectors * SECTOR))

    def read(self, chance: random.Random) -> None:
        disk, first, sectors = self.extent(chance)
        self.note(f"read disk {disk} sectors {first}+{sectors}")
        layout, queue = chance.choice(LAYOUTS), chance.randrange(QUEUES)
        data = self.disks[disk].read(first, sectors, layout=layout, queue=queue)
        self.compare(disk, first * SECTOR, data)

    def flush(self, chance: random.Random) -> None:
        self.note("flush")
        self.disks[chance.randrange(len(SIZES))].flush()

    def burst(self, chance: random.Random) -> None:
        """Many writes at once; of those that overlap the order is the ring's, so none do."""
        disk = chance.randrange(len(SIZES))
        self.make_room(32 * 4096)
        self.note(f"burst disk {disk}")
        self.disks[disk].wait(*self.submit_burst(disk, chance))

    def submit_burst(self, disk: int, chance: random.Random) -> list[BlkRequest]:
        requests = []
        self.extents = []
        for place in chance.sample(range(SIZES[disk] // 8192), 32):
            first = place * 16 + chance.randrange(8)
            data = self.data(chance, chance.randrange(1, 9))
            requests.append(
                self.disks[disk].submit(
                    Type.OUT, first, data, layout=Layout(indirect=0), queue=place % QUEUES
                )
            )
            self.extents.append((first, len(data)))
            self.model.write(disk, first * SECTOR, data)
        return requests

    def pack(self, chance: random.Random) -> None:
        """Blocks that shrink, sealed and compressed into clusters: what comes later overwrites,
        discards and reads some of their members."""
        disk, sectors = chance.randrange(len(SIZES)), 1024
        first = chance.randrange(64) * 8
        data = b"".join(chance.randbytes(8) * 64 for _ in range(sectors))
        self.make_room(len(data))
        self.note(f"pack disk {disk} sectors {first}+{sectors}")
        self.disks[disk].write(first, data)
        self.model.write(disk, first * SECTOR, data)
        if chance.random() < 0.7:
            self.seal()
        end = time.monotonic() + 5
        while self.compression()["pack-queue"] and time.monotonic() < end:
            time.sleep(0.002)

    def compression(self) -> dict[str, int]:
        """The agent's statistics of it."""
        stats: dict[str, int] = self.daemon.control.execute("query-stats")["compression"]
        self.clusters = max(self.clusters, stats["clusters"])
        return stats

    # ---- epochs --------------------------------------------------------------------------

    def seal(self, chance: random.Random | None = None) -> None:
        if len(self.model.sealed) >= 12:  # each takes a segment of the arena at least
            self.commit(None)
        epoch = self.daemon.control.seal()
        self.note(f"seal {epoch}")
        self.model.seal(epoch)

    def commit(self, chance: random.Random | None) -> None:
        """A sealed epoch, or all of them."""
        if chance is None or not self.model.sealed or chance.random() < 0.5:
            epoch = None
        else:
            epoch = chance.choice(self.model.sealed)[0]
        self.note(f"commit {epoch}")
        committed = self.daemon.control.commit(epoch)
        self.model.commit((1 << 64) if epoch is None else epoch)
        assert committed == max(self.model.committed_epoch, committed)
        assert self.daemon.control.status()["committed"] >= self.model.committed_epoch

    def refuse(self, chance: random.Random) -> None:
        """An epoch that cannot be committed."""
        epoch = self.model.open + chance.randrange(3)
        self.note(f"commit of {epoch} must be refused")
        with pytest.raises(ControlError):
            self.daemon.control.commit(epoch)

    def discard(self, chance: random.Random) -> None:
        gone = self.daemon.control.discard()
        self.note(f"discard of {gone}")
        assert self.model.discard(self.daemon.control.status()["open"]) == gone

    # ---- ends and beginnings -------------------------------------------------------------

    def restart(self, chance: random.Random) -> None:
        how = chance.choice(["quit", "term", "kill", "kill"])
        self.note(f"restart by {how}")
        self.daemon.restart(how)
        if chance.random() < 0.5:
            self.attach()
        else:
            for disk in self.disks:
                disk.reconnect()
        self.check_status()

    def stop_with_requests(self, chance: random.Random) -> None:
        """Requests in flight are finished by the next agent, each once."""
        disk = chance.randrange(len(SIZES))
        self.make_room(32 * 4096)
        how = chance.choice(["kill", "kill", "term", "quit"])
        self.note(f"{how} with writes in flight on disk {disk}")
        requests = self.submit_burst(disk, chance)
        self.daemon.restart(how)
        for front_end in self.disks:
            front_end.reconnect()
        self.disks[disk].wait(*requests)
        assert {request.status for request in requests} == {Status.OK}
        self.check_status()

    def hang_up_with_requests(self, chance: random.Random) -> None:
        """Of writes that nobody saw answered, each happened as a whole or not at all."""
        disk = chance.randrange(len(SIZES))
        self.make_room(32 * 4096)
        self.note(f"hang up with writes in flight on disk {disk}")
        before = bytes(self.model.now[disk])
        self.submit_burst(disk, chance)
        self.attach()
        for first, size in self.extents:
            start = first * SECTOR
            found = self.disks[disk].read(first, size // SECTOR)
            if found == before[start : start + size]:
                self.model.write(disk, start, found)
            self.compare(disk, start, found)
        self.write(chance)  # whatever happened before, the epoch is not empty now

    def kill_with_a_verb(self, chance: random.Random) -> None:
        """The verb happened as a whole or not at all; the status tells which."""
        verb = chance.choice(["epoch-seal", "epoch-commit", "epoch-commit", "epoch-discard"])
        if verb == "epoch-commit" and not self.model.sealed:
            self.seal()
        self.note(f"kill during {verb}")
        control = self.daemon.control
        control.begin(verb)
        if chance.random() < 0.7:
            time.sleep(chance.random() * 0.01)
        self.daemon.stop("kill")
        lost = chance.random() < 0.3
        if lost:
            self.note("the host rebooted, too")
            self.daemon.lose_shm()
        self.daemon.start()
        status = self.daemon.control.status()
        newest = self.model.sealed[-1][0] if self.model.sealed else None
        if verb == "epoch-commit" and status["committed"] > self.model.committed_epoch:
            assert status["committed"] == newest, "a part of a commit"
            self.model.commit(status["committed"])
        elif verb == "epoch-seal" and not lost and status["open"] > self.model.open:
            self.model.seal(self.model.open)
        elif verb == "epoch-discard" and not lost and status["open"] > self.model.open:
            self.model.discard(status["open"])
        if lost and status["open"] > self.model.open:
            self.model.discard(status["open"])
        self.attach()
        self.check_status()

    def reboot(self, chance: random.Random) -> None:
        """The host crashes: what is not committed is lost, and nothing else."""
        self.note("reboot")
        self.daemon.stop("kill")
        self.daemon.lose_shm()
        self.daemon.start()
        self.model.discard(self.daemon.control.status()["open"])
        self.attach()
        self.check_status()

    # ---- front end -----------------------------------------------------------------------

    def stop_ring(self, chance: random.Random) -> None:
        disk = self.disks[chance.randrange(len(SIZES))]
        queue = disk.queues[chance.randrange(QUEUES)]
        self.note("stop and start a ring")
        disk.start_queue(queue, base=disk.stop_queue(queue.index))

    def resend_memory(self, chance: random.Random) -> None:
        self.note("send the memory table again")
        self.disks[chance.randrange(len(SIZES))].share_memory()

    # ---- checks --------------------------------------------------------------------------

    def compare(self, disk: int, start: int, data: bytes) -> None:
        wanted = self.model.now[disk][start : start + len(data)]
        if data != wanted:
            self.differ(f"disk {disk}", start, data, wanted)

    def differ(self, what: str, start: int, got: bytes, wanted: bytes | bytearray) -> None:
        assert len(got) == len(wanted), f"{what}: {len(got)} bytes, not {len(wanted)}"
        bad = [
            (start + place) // SECTOR
            for place in range(0, len(got), SECTOR)
            if got[place : place + SECTOR] != wanted[place : place + SECTOR]
        ]
        raise AssertionError(f"{what} differs in {len(bad)} sectors, first ones {bad[:20]}")

    def check_status(self) -> None:
        status = self.daemon.control.status()
        assert status["sealed"] == [number for number, _ in self.model.sealed]
        assert status["open"] == self.model.open

    def check_all(self, chance: random.Random | None = None) -> None:
        """Every sector as the front end sees it."""
        self.note("check all")
        self.compression()
        for index, disk in enumerate(self.disks):
            for first in range(0, SIZES[index] // SECTOR, 2048):
                count = min(2048, SIZES[index] // SECTOR - first)
                self.compare(index, first * SECTOR, disk.read(first, count))

    def check_images(self, chance: random.Random | None = None) -> None:
        """Once applied, the images are the committed state while epochs go on."""
        self.note("check images")
        self.daemon.control.wait_applied()
        self.images_are_committed()

    def images_are_committed(self) -> None:
        for index in range(len(SIZES)):
            image = self.daemon.image_bytes(index)
            if image != self.model.committed[index]:
                self.differ(f"image {index}", 0, image, self.model.committed[index])

    def end(self) -> None:
        """The last word: everything read back, a clean stop, and the images."""
        self.check_all()
        self.daemon.stop("quit")
        self.images_are_committed()


WEIGHTS: dict[str, int] = {
    "write": 40,
    "zero": 12,
    "read": 16,
    "burst": 6,
    "pack": 4,
    "flush": 2,
    "seal": 9,
    "commit": 7,
    "discard": 3,
    "refuse": 1,
    "stop_ring": 2,
    "resend_memory": 1,
    "check_all": 2,
    "check_images": 2,
    "restart": 1,
    "stop_with_requests": 1,
    "hang_up_with_requests": 1,
    "kill_with_a_verb": 1,
    "reboot": 1,
}


def perform(history: History, name: str, seed: int) -> None:
    """One operation, with a generator of its own: removing others does not change it."""
    operation: Callable[[random.Random], None] = getattr(history, name)
    operation(random.Random(seed))


folders = itertools.count()


@pytest.mark.timeout(1800)
def test_short_histories_agree_with_the_model(tmp_path: Path) -> None:
    steps = strategies.lists(
        strategies.tuples(
            strategies.sampled_from([name for name, n in WEIGHTS.items() for _ in range(n)]),
            strategies.integers(0, 1 << 16),
        ),
        min_size=5,
        max_size=60,
    )

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(steps)
    def check(program: list[tuple[str, int]]) -> None:
        folder = tmp_path / f"h{next(folders)}"
        history = History(folder)
        try:
            for name, seed in program:
                perform(history, name, seed)
            history.end()
        except BaseException:
            print(f"EPOCHD_TEST_SEED={SEED}\n{history.story()}\n{history.daemon.log()[-3000:]}")
            raise
        finally:
            history.close()
            shutil.rmtree(folder)

    check()


@pytest.mark.timeout(SECONDS * 20 + 600)
def test_a_long_history_agrees_with_the_model(tmp_path: Path) -> None:
    print(f"EPOCHD_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    history = History(tmp_path)
    end = time.monotonic() + SECONDS
    steps = 0
    try:
        while time.monotonic() < end:
            name = chance.choices(names, weights)[0]
            perform(history, name, chance.randrange(1 << 48))
            steps += 1
        history.end()
    except BaseException:
        print(f"after {steps} steps:\n{history.story()}")
        raise
    finally:
        history.close()
    print(f"{steps} steps, {history.clusters} clusters")


@pytest.mark.timeout(600)
def test_a_survivor_keeps_what_was_flushed(tmp_path: Path) -> None:
    """Active mode: after each crash of the host every sector holds what the last flush covered
    or something newer."""
    print(f"EPOCHD_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    history = History(tmp_path)
    try:
        history.daemon.control.execute("promote")
        durable = [bytes(size) for size in SIZES]
        for _ in range(12):
            live = [bytearray(disk) for disk in durable]
            newer: dict[tuple[int, int], list[bytes]] = {}
            for _ in range(chance.randrange(5, 60)):
                disk, first, sectors = history.extent(chance)
                data = history.data(chance, sectors)
                history.disks[disk].write(first, data, queue=chance.randrange(QUEUES))
                live[disk][first * SECTOR : first * SECTOR + len(data)] = data
                for place in range(sectors):
                    version = data[place * SECTOR : (place + 1) * SECTOR]
                    newer.setdefault((disk, first + place), []).append(version)
                if chance.random() < 0.1:
                    history.disks[chance.randrange(len(SIZES))].flush()
                    durable = [bytes(contents) for contents in live]
                    newer.clear()
            history.daemon.stop("kill")
            if chance.random() < 0.7:
                history.daemon.lose_shm()
            history.daemon.start()
            history.attach()
            durable = survived(history, durable, newer)
    finally:
        history.close()


def survived(
    history: History, durable: list[bytes], newer: dict[tuple[int, int], list[bytes]]
) -> list[bytes]:
    """Check every sector after a crash; returns what is there, which is the new base."""
    found = []
    for index, disk in enumerate(history.disks):
        contents = b"".join(
            disk.read(first, min(2048, SIZES[index] // SECTOR - first))
            for first in range(0, SIZES[index] // SECTOR, 2048)
        )
        for first in range(SIZES[index] // SECTOR):
            here = slice(first * SECTOR, (first + 1) * SECTOR)
            allowed = [durable[index][here], *newer.get((index, first), [])]
            assert contents[here] in allowed, f"disk {index} sector {first}"
        found.append(contents)
    history.disks[0].flush()  # from here on it is durable as it is
    return found


def test_the_harness_sees_a_wrong_sector(tmp_path: Path) -> None:
    """A check that the check can fail: one sector of the model is spoilt."""
    history = History(tmp_path)
    try:
        perform(history, "write", 1)
        perform(history, "check_all", 0)
        history.model.now[1][5 * SECTOR] ^= 1
        with pytest.raises(AssertionError, match=r"disk 1 differs in 1 sectors, first ones \[5\]"):
            history.check_all()
        history.seal()
        history.commit(None)
        with pytest.raises(AssertionError, match="image 1 differs in 1 sectors"):
            history.check_images()
    finally:
        history.close()
