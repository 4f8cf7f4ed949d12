"""Several reactors: one consistency group, whose disks are served by different threads.

The daemon is real, with --reactors 2 or more. Each disk has a front end of its own; they are
driven from threads, so that rounds of the reactors meet each other and the group's own work.
"""

from __future__ import annotations

import os
import random
import shlex
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Attach, StartDaemon
from frontend import Disk, Layout, RegionSpec, Status, Type
from fuzz.run import sanitized_daemon
from harness import Daemon, DiskSpec, until

BLOCK = 4096
DISKS = [DiskSpec(name=f"disk{i}", size=64 << 20) for i in range(3)]
INDIRECT = Layout(indirect=0)
CHUNK = 64 << 10


def number(value: int) -> bytes:
    """A block that says which write it is of, and shrinks a little."""
    return value.to_bytes(8, "little") + random.Random(value).randbytes(1000) * 4 + bytes(88)


def value_of(data: bytes) -> int:
    """The write that a block is of; checks that it is whole. 0: none."""
    value = int.from_bytes(data[:8], "little")
    assert data == (number(value) if value else bytes(BLOCK))
    return value


class Chain:
    """Writes that depend on each other: the k-th to each disk begins when the k-th to the disk
    before it was answered. Block k % blocks of each disk holds k; sector 0 the newest one."""

    def __init__(self, disks: list[Disk], blocks: int = 500) -> None:
        self.disks = disks
        self.blocks = blocks
        self.written = 0

    def write(self) -> None:
        self.written += 1
        for disk in self.disks:
            disk.write(8 * (1 + self.written % self.blocks), number(self.written))
            disk.write(0, number(self.written))

    def newest(self) -> list[int]:
        """By what the disks have now."""
        return [value_of(disk.read(0, 8)) for disk in self.disks]

    def check_cut(self) -> None:
        """No disk has a write without what came before it; what one says is newest is there."""
        newest = self.newest()
        assert newest == sorted(newest, reverse=True), newest
        assert newest[0] - newest[-1] <= 1, newest
        for disk, last in zip(self.disks, newest, strict=True):
            for k in range(max(1, last - self.blocks + 2), last + 1):
                assert value_of(disk.read(8 * (1 + k % self.blocks), 8)) == k


def together(*work: Callable[[], None]) -> None:
    """Run all at once; an exception of any ends the test."""
    with ThreadPoolExecutor(len(work)) as pool:
        for future in [pool.submit(one) for one in work]:
            future.result()


@pytest.fixture
def two(epochd: StartDaemon) -> Daemon:
    """Three disks, two reactors: disks 0 and 2 share one."""
    return epochd(*DISKS, options=["--reactors", "2"])


def test_each_disk_is_served_and_the_group_is_one(two: Daemon, attach: Attach) -> None:
    disks = [attach(two, disk=i) for i in range(3)]
    for i, disk in enumerate(disks):
        disk.write(8 * i, number(i + 1))
    assert two.control.status()["reactors"] == 2
    epoch = two.control.checkpoint()
    two.control.wait_applied(epoch)
    for i in range(3):
        assert two.image_bytes(i)[i * BLOCK : (i + 1) * BLOCK] == number(i + 1)
        assert disks[i].read(8 * i, 8) == number(i + 1)
    for i, disk in enumerate(disks):
        disk.write(8 * i, number(100 + i))
    two.control.discard()
    assert [disk.read(8 * i, 8) for i, disk in enumerate(disks)] == [
        number(i + 1) for i in range(3)
    ]
    assert all(info["stats"]["errors"] == 0 for info in two.control.disks())


def storm(two: Daemon, attach: Attach, turns: int) -> list[Disk]:
    """Writes, discards and reads on all disks while epochs are sealed, committed and discarded;
    at the end the images are what is read."""
    disks = [attach(two, disk=i) for i in range(3)]
    stop = threading.Event()
    ended: list[int] = []

    def write(disk: Disk, seed: int) -> None:
        chance, turn = random.Random(seed), 0
        while not stop.is_set():
            requests = []
            for _ in range(16):
                turn += 1
                data = number(turn) * 4
                sector = 8 * chance.randrange(8000)
                requests.append(disk.submit(Type.OUT, sector, data, layout=INDIRECT))
            requests.append(disk.submit(Type.DISCARD, 0, _segment(chance), layout=INDIRECT))
            requests.append(
                disk.submit(Type.IN, 8 * chance.randrange(8000), room=BLOCK, layout=INDIRECT)
            )
            disk.wait(*requests)
            assert {request.status for request in requests} == {Status.OK}
        ended.append(seed)

    def verbs() -> None:
        chance = random.Random(5)
        try:
            for _ in range(turns):
                what = chance.randrange(10)
                if what < 5:
                    two.control.seal()
                elif what < 8:
                    two.control.checkpoint()
                elif what < 9:
                    two.control.discard()
                else:
                    two.control.status()
                    two.control.disks()
        finally:
            stop.set()
        until("writes that are held to go on", lambda: two.control.checkpoint() and len(ended) == 3)

    together(verbs, *[lambda i=i: write(disks[i], i) for i in range(3)])
    two.control.checkpoint()
    two.control.wait_applied()
    for i, disk in enumerate(disks):
        image = two.image_bytes(i)
        for sector in range(0, 8 * 8000, 8 * 16):
            at = sector * 512
            assert disk.read(sector, 128) == image[at : at + 16 * BLOCK]
    assert two.complaints() == []
    return disks


def test_writes_on_all_disks_while_epochs_are_sealed_committed_and_discarded(
    two: Daemon, attach: Attach
) -> None:
    storm(two, attach, 60)


@pytest.mark.timeout(300)
def test_thread_sanitizer_finds_nothing_in_that(epochd: StartDaemon, attach: Attach) -> None:
    program = shlex.split(sanitized_daemon("thread"))
    daemon = epochd(*DISKS, options=["--reactors", "2"], program=program)
    disks = storm(daemon, attach, 25)
    daemon.control.execute("promote")
    for disk in disks:
        disk.write(0, number(1))
        disk.flush()
    daemon.stop("quit")
    assert daemon.complaints() == []


def _segment(chance: random.Random) -> bytes:
    sector = 8 * chance.randrange(8000)
    return (
        sector.to_bytes(8, "little") + (8 * chance.randrange(1, 200)).to_bytes(4, "little")
    ) + bytes(4)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0), (2, 1)])
def test_a_seal_is_a_cut_through_all_disks(
    two: Daemon, attach: Attach, order: tuple[int, ...]
) -> None:
    chain = Chain([attach(two, disk=i) for i in order])
    stop = threading.Event()
    epochs: list[int] = []

    def write() -> None:
        while not stop.is_set():
            chain.write()

    def seal() -> None:
        try:
            for _ in range(30):
                epochs.append(two.control.seal())
        finally:
            stop.set()

    together(write, seal)
    # One epoch after the other becomes the truth; each is a cut.
    chance = random.Random(1)
    for epoch in sorted(chance.sample(epochs, 4)):
        two.control.commit(epoch)
        two.control.wait_applied(epoch)
        newest = []
        for i in order:
            image = two.image_bytes(i)
            newest.append(value_of(image[:BLOCK]))
            for k in range(max(1, newest[-1] - 400), newest[-1] + 1):
                at = (1 + k % chain.blocks) * BLOCK
                assert value_of(image[at : at + BLOCK]) == k
        assert newest == sorted(newest, reverse=True), newest
        assert newest[0] - newest[-1] <= 1, newest


@pytest.mark.parametrize("reboot", [False, True], ids=["killed", "rebooted"])
def test_after_a_crash_all_disks_are_of_one_moment(
    epochd: StartDaemon, attach: Attach, reboot: bool
) -> None:
    daemon = epochd(*DISKS, options=["--reactors", "3"])
    chain = Chain([attach(daemon, disk=i) for i in (0, 2, 1)])
    for _ in range(5):
        for _ in range(40):
            chain.write()
        daemon.control.checkpoint()
        chain.write()
    committed = daemon.control.status()["committed"]
    daemon.stop("kill")
    if reboot:
        daemon.lose_shm()
    for reactors in ("1", "2", "3"):
        daemon.options = ["--reactors", reactors]
        daemon.start()
        again = Chain([attach(daemon, disk=i) for i in (0, 2, 1)])
        again.check_cut()
        assert again.newest()[0] == (chain.written - 1 if reboot else chain.written)
        assert daemon.control.status()["committed"] == committed
        daemon.stop("kill")
        if reboot:
            daemon.lose_shm()


def test_a_restart_with_another_number_goes_on(epochd: StartDaemon, attach: Attach) -> None:
    daemon = epochd(*DISKS, options=["--reactors", "1"])
    wanted: list[dict[int, int]] = [{} for _ in DISKS]
    chance, turn = random.Random(9), 0
    for reactors in ("2", "3", "1", "2"):
        disks = [attach(daemon, disk=i) for i in range(3)]
        for _ in range(200):
            turn += 1
            i, place = chance.randrange(3), chance.randrange(150)
            disks[i].write(8 * place, number(turn))
            wanted[i][place] = turn
            if turn % 90 == 0:
                daemon.control.seal()
        for i, disk in enumerate(disks):
            for place, value in wanted[i].items():
                assert value_of(disk.read(8 * place, 8)) == value
        daemon.options = ["--reactors", reactors]
        daemon.restart("kill")
    disks = [attach(daemon, disk=i) for i in range(3)]
    daemon.control.checkpoint()
    daemon.control.wait_applied()
    for i in range(3):
        image = daemon.image_bytes(i)
        for place, value in wanted[i].items():
            assert value_of(image[place * BLOCK : (place + 1) * BLOCK]) == value


def test_a_front_end_may_go_while_the_other_reactor_is_busy(two: Daemon, attach: Attach) -> None:
    busy = attach(two, disk=0)
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not stop.is_set():
            written += 1
            busy.write(8 * (written % 100), number(written))

    def come_and_go() -> None:
        try:
            for turn in range(1, 15):
                coming = attach(two, disk=1)
                assert coming.read(8 * 50, 8) == number(turn - 1) or turn == 1
                coming.write(8 * 50, number(turn))
                requests = [
                    coming.submit(Type.OUT, 8 * i, number(turn), layout=INDIRECT) for i in range(20)
                ]
                if turn % 2:
                    coming.wait(*requests)
                coming.hang_up()
                coming.close()
        finally:
            stop.set()

    together(write, come_and_go)
    for k in range(max(1, written - 90), written + 1):
        assert value_of(busy.read(8 * (k % 100), 8)) == k


def test_memory_that_vanishes_under_one_reactor_is_no_affair_of_the_other(
    two: Daemon, attach: Attach
) -> None:
    """Who copies from memory behind the end of its file gets SIGBUS; the other reactor's writes
    meanwhile are whole, and are not taken for failed."""
    busy = attach(two, disk=0)
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not stop.is_set():
            requests = []
            for _ in range(32):
                written += 1
                data = number(written)
                requests.append(
                    busy.submit(Type.OUT, 8 * (written % 500), data, layout=INDIRECT)
                )
            busy.wait(*requests)
            assert {request.status for request in requests} == {Status.OK}

    def lose_memory() -> None:
        try:
            for _ in range(10):
                lost = attach(two, disk=1, start=False)
                region = lost.memory.add(RegionSpec(0x2_0000_0000, 4 << 20, 0x7F60_0000_0000))
                lost.start(1, 128)
                header, status = lost.memory.alloc(16), lost.memory.alloc(1)
                lost.memory.write(header, struct.pack("<IIQ", Type.OUT, 0, 0))
                queue = lost.queues[0]
                queue.write_desc(0, header, 16, 1, 1)
                queue.write_desc(1, region.guest, 1 << 20, 1, 2)
                queue.write_desc(2, status, 1, 2, 0)
                os.ftruncate(region.fd, 0)
                queue.push_raw(0)
                lost.channel.wait_hang_up()
                lost.close()
        finally:
            stop.set()

    together(write, lose_memory)
    for k in range(max(1, written - 480), written + 1):
        assert value_of(busy.read(8 * (k % 500), 8)) == k
    assert two.control.disks()[0]["stats"]["errors"] == 0


def test_a_full_arena_holds_both_reactors_and_lets_both_go_on(
    epochd: StartDaemon, attach: Attach
) -> None:
    daemon = epochd(*DISKS[:2], arena="8M", options=["--reactors", "2", "--compress-level", "0"])
    disks = [attach(daemon, disk=i) for i in range(2)]
    data = [random.Random(i).randbytes(CHUNK) for i in range(2)]
    requests = [
        disk.submit(Type.OUT, i * CHUNK // 512, data[n], layout=INDIRECT)
        for i in range(100)
        for n, disk in enumerate(disks)
    ]
    until("both rings to be held", lambda: daemon.control.status()["held"] == 2)
    assert daemon.control.status()["arena"]["percent"] >= 80
    done = 0
    while done < len(requests):
        daemon.control.checkpoint()
        for disk in disks:
            disk.reap()
        done = sum(request.done for request in requests)
    assert {request.status for request in requests} == {Status.OK}
    for n, disk in enumerate(disks):
        for i in range(100):
            assert disk.read(i * CHUNK // 512, CHUNK // 512) == data[n]
    assert all(info["stats"]["held"] >= 1 for info in daemon.control.disks())


def test_a_sleeping_reactor_is_woken_when_its_held_write_has_room(
    epochd: StartDaemon, attach: Attach
) -> None:
    daemon = epochd(*DISKS[:2], arena="8M", options=["--reactors", "2", "--compress-level", "0"])
    filler, other = attach(daemon, disk=0), attach(daemon, disk=1)
    fill = [
        filler.submit(Type.OUT, i * CHUNK // 512, random.randbytes(CHUNK), layout=INDIRECT)
        for i in range(124)
    ]
    until("the arena to be full", lambda: daemon.control.status()["held"] == 1)
    wait = [other.submit(Type.OUT, i * 128, random.randbytes(CHUNK)) for i in range(20)]
    until("the other ring to be held", lambda: daemon.control.status()["held"] == 2)
    time.sleep(0.05)  # both are asleep by now; if not, the test is only easier
    daemon.control.discard()
    other.wait(*wait)
    filler.wait(*fill)
    assert {request.status for request in (*wait, *fill)} == {Status.OK}


def test_flushes_of_an_active_group_are_answered_on_every_reactor(
    two: Daemon, attach: Attach
) -> None:
    disks = [attach(two, disk=i) for i in range(3)]
    two.control.execute("promote")

    def flush(disk: Disk) -> None:
        for turn in range(1, 15):
            disk.write(8 * turn, number(turn))
            disk.flush()

    together(*[lambda d=disk: flush(d) for disk in disks])
    two.stop("kill")
    two.lose_shm()
    two.start()
    for i in range(3):
        disk = attach(two, disk=i)
        assert [value_of(disk.read(8 * turn, 8)) for turn in range(1, 15)] == list(range(1, 15))


def test_more_reactors_than_disks_are_not_started(epochd: StartDaemon, attach: Attach) -> None:
    daemon = epochd(*DISKS[:2], options=["--reactors", "5"])
    assert daemon.control.status()["reactors"] == 2
    assert "5 reactors are more than the 2 disks" in daemon.log()
    disk = attach(daemon, disk=1)
    disk.write(0, number(1))
    assert disk.read(0, 8) == number(1)


def test_a_clean_stop_leaves_the_images_of_all_reactors_whole(two: Daemon, attach: Attach) -> None:
    disks = [attach(two, disk=i) for i in range(3)]
    for i, disk in enumerate(disks):
        for place in range(50):
            disk.write(8 * place, number(1 + i * 50 + place))
    two.control.checkpoint()
    for disk in disks:
        disk.hang_up()
    two.stop("term")
    for i in range(3):
        image = two.image_bytes(i)
        for place in range(50):
            at = place * BLOCK
            assert image[at : at + BLOCK] == number(1 + i * 50 + place)
