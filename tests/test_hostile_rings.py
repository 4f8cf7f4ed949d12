"""Rings and descriptor chains that no honest driver makes.

After each: the author is told (a status, or a broken ring with the reason in `query-disks` and
in the log), the daemon lives, and the front end of another disk is unharmed.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator

import pytest
from conftest import Attach, StartDaemon, serving
from frontend import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    PAGE,
    Disk,
    Feature,
    HungUp,
    Refused,
    Status,
    Type,
    VirtQueue,
)
from frontend.blk import HEADER
from frontend.device import WANTED_FEATURES
from harness import Daemon, DiskSpec, until

IN, OUT = DESC_F_WRITE, 0
NEXT, INDIRECT = DESC_F_NEXT, DESC_F_INDIRECT
NOWHERE = 0x7_0000_0000
"""A guest address in no region."""


class Scene:
    """A hostile front end on disk 0, a peaceful one on disk 1."""

    def __init__(self, daemon: Daemon, attach: Attach) -> None:
        self.daemon = daemon
        self._attach = attach
        self.peaceful = attach(daemon, 1)
        self.peaceful.write(0, b"\x33" * 4096)
        self.hostile = attach(daemon, 0, queues=2)
        self.prepare()

    def prepare(self) -> None:
        """Good memory to build bad chains from."""
        memory = self.hostile.memory
        self.queue: VirtQueue = self.hostile.queues[0]
        self.header = memory.alloc(16, 16)
        self.data = memory.alloc(64 << 10, PAGE)
        self.status = memory.alloc(1)
        self.table = memory.alloc(64 << 10, 16)
        self.set_header(Type.OUT)
        memory.write(self.status, b"\xee")
        self.rejected: int = self.daemon.disk_info()["stats"]["rejected"]

    def set_header(self, kind: int, sector: int = 0) -> None:
        self.hostile.memory.write(self.header, HEADER.pack(kind, 0, sector))

    def descs(self, *descs: tuple[int, int, int, int]) -> None:
        """Write (address, length, flags, next) from descriptor 0 on and make 0 available."""
        for place, desc in enumerate(descs):
            self.queue.write_desc(place, *desc)
        self.queue.push_raw(0)

    def indirect(self, *descs: tuple[int, int, int, int], size: int | None = None) -> None:
        """One descriptor that points to a table of these."""
        self.queue.write_table(self.table, descs)
        self.descs((self.table, 16 * len(descs) if size is None else size, INDIRECT, 0))

    def broken(self, *words: str) -> str:
        """The ring must break, with one of `words` in the reason, told everywhere."""
        reason = self.daemon.wait_broken()
        assert any(word in reason.lower() for word in words), reason
        until("the reason in the log", lambda: reason in self.daemon.log())
        until("the err eventfd", self.queue.broken)
        return reason

    def failed(self) -> None:
        """The request must end with an error, and be counted as rejected."""
        before = self.rejected
        until("the answer", lambda: self.queue.used_idx == 1)
        assert self.hostile.memory.read(self.status, 1)[0] == Status.IOERR
        assert self.daemon.disk_info()["stats"]["rejected"] == before + 1

    def unharmed(self) -> None:
        """Everyone else goes on, also the hostile front end's other queue."""
        assert self.peaceful.read(0, 8) == b"\x33" * 4096
        self.peaceful.write(8, os.urandom(4096))
        assert self.hostile.read(0, 8, queue=1) is not None
        assert self.daemon.control.status()["clients"] == 2

    def again(self) -> None:
        """The author may come back and behave."""
        self.hostile.close()
        self.hostile = self._attach(self.daemon, 0, queues=2)
        self.hostile.write(64, b"\x34" * 512)
        assert self.hostile.read(64, 1) == b"\x34" * 512
        self.prepare()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon with two disks for all tests here: what one test breaks, the next would see."""
    folder = tmp_path_factory.mktemp("pair")
    with serving(Daemon(folder, [DiskSpec("bad"), DiskSpec("good")])) as daemon:
        yield daemon


@pytest.fixture
def scene(pair: Daemon, attach: Attach) -> Iterator[Scene]:
    """The scene; afterwards everything must work as if nothing had been."""
    scene = Scene(pair, attach)
    yield scene
    scene.unharmed()
    scene.again()
    scene.unharmed()


# ---- chains -------------------------------------------------------------------------------


def test_a_chain_that_loops_onto_itself(scene: Scene) -> None:
    scene.descs((scene.header, 16, NEXT, 0))
    scene.broken("loop", "long", "chain")


def test_a_chain_that_loops_through_three(scene: Scene) -> None:
    scene.descs((scene.header, 16, NEXT, 1), (scene.data, 512, NEXT, 2), (scene.data, 512, NEXT, 1))
    scene.broken("loop", "long", "chain")


def test_a_table_that_loops(scene: Scene) -> None:
    scene.indirect((scene.header, 16, NEXT, 1), (scene.data, 512, NEXT, 0))
    scene.broken("loop", "long", "chain")


def test_a_next_index_outside_the_table_of_the_queue(scene: Scene) -> None:
    for place in (128, 4096, 0xFFFF):
        scene.descs((scene.header, 16, NEXT, place))
        scene.broken("descriptor", "index", "outside")
        scene.again()


def test_a_head_outside_the_table_of_the_queue(scene: Scene) -> None:
    for head in (128, 0x8000, 0xFFFF):
        scene.queue.push_raw(head)
        scene.broken("descriptor", "head", "index", "outside")
        scene.again()


def test_a_next_index_outside_the_indirect_table(scene: Scene) -> None:
    scene.indirect((scene.header, 16, NEXT, 2), (scene.status, 1, IN, 0))
    scene.broken("descriptor", "index", "outside")


def test_an_indirect_table_in_an_indirect_table(scene: Scene) -> None:
    scene.indirect((scene.header, 16, NEXT, 1), (scene.table, 32, INDIRECT, 0))
    scene.broken("indirect")


def test_an_indirect_descriptor_with_a_next(scene: Scene) -> None:
    scene.queue.write_table(scene.table, [(scene.header, 16, NEXT, 1), (scene.status, 1, IN, 0)])
    scene.descs((scene.table, 32, INDIRECT | NEXT, 1), (scene.status, 1, IN, 0))
    scene.broken("indirect")


@pytest.mark.parametrize("size", [0, 1, 15, 17, 31, 0xFFFFFFFF])
def test_an_indirect_table_of_a_size_that_is_no_multiple_of_16(scene: Scene, size: int) -> None:
    scene.indirect((scene.header, 16, NEXT, 1), (scene.status, 1, IN, 0), size=size)
    scene.broken("indirect")


@pytest.mark.parametrize("size", [0xFFFFFFF0, 16 * 65536, 16 * 1000000])
def test_an_indirect_table_longer_than_any_chain(scene: Scene, size: int) -> None:
    """Long tables are not wrong as such; this one leads through all of it."""
    table = [(scene.data, 1, NEXT, (place + 1) % 4000) for place in range(4000)]
    scene.queue.write_table(scene.table, table)
    scene.descs((scene.table, size, INDIRECT, 0))
    scene.broken("indirect", "long", "memory", "loop", "chain")


@pytest.mark.parametrize(
    "addr", [NOWHERE, 16 << 20, (16 << 20) - 16, (1 << 64) - 16, 0x1_0000_0000 - 16]
)
def test_an_indirect_table_outside_memory(scene: Scene, addr: int) -> None:
    scene.descs((addr, 48, INDIRECT, 0))
    scene.broken("memory", "wraps")


def test_an_indirect_table_though_the_feature_was_not_negotiated(
    pair: Daemon, scene: Scene, attach: Attach
) -> None:
    scene.hostile.close()
    scene.hostile = attach(pair, 0, queues=2, features=WANTED_FEATURES & ~Feature.INDIRECT_DESC)
    scene.prepare()
    scene.indirect((scene.header, 16, NEXT, 1), (scene.status, 1, IN, 0))
    scene.broken("indirect")


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_of_more_segments_than_advertised(scene: Scene, indirect: bool) -> None:
    """Refused or served, but never trusted: 1000 descriptors of which the last is a status."""
    if indirect:
        rows = [(scene.header, 16, NEXT, 1)]
        rows += [(scene.data, 512, NEXT, place) for place in range(2, 1000)]
        rows += [(scene.status, 1, IN, 0)]
        scene.indirect(*rows)
    else:
        rows = [(scene.header, 16, NEXT, 1)]
        rows += [(scene.data, 1, NEXT, place) for place in range(2, 128)]
        rows += [(scene.status, 1, IN, 0)]
        scene.descs(*rows)

    def told() -> bool:
        status = scene.hostile.memory.read(scene.status, 1)[0]
        return bool(status != 0xEE or scene.daemon.queue_info()["broken"])

    until("a status or a broken ring", told)


# ---- buffers ------------------------------------------------------------------------------

OUTSIDE = pytest.mark.parametrize(
    ("addr", "size"),
    [
        (NOWHERE, 512),
        (0, 0xFFFFFE00),
        ((16 << 20) - 512, 1024),
        ((16 << 20) - 1, 512),
        (16 << 20, 512),
        (0x1_0000_0000 - 1, 512),
        (0x1_0000_0000 + (8 << 20) - 256, 512),
        ((1 << 64) - 1, 512),
        ((1 << 64) - 512, 512),
        ((1 << 64) - 512, 1024),
        ((1 << 63), 512),
    ],
)


@OUTSIDE
def test_data_to_write_outside_memory(scene: Scene, addr: int, size: int) -> None:
    scene.descs((scene.header, 16, NEXT, 1), (addr, size, NEXT, 2), (scene.status, 1, IN, 0))
    scene.broken("memory", "wraps")


@OUTSIDE
def test_room_to_read_outside_memory(scene: Scene, addr: int, size: int) -> None:
    scene.set_header(Type.IN)
    scene.descs((scene.header, 16, NEXT, 1), (addr, size, NEXT | IN, 2), (scene.status, 1, IN, 0))
    scene.broken("memory", "wraps")


@pytest.mark.parametrize("addr", [NOWHERE, (16 << 20) - 8, (1 << 64) - 8])
def test_a_header_outside_memory(scene: Scene, addr: int) -> None:
    scene.descs((addr, 16, NEXT, 1), (scene.status, 1, IN, 0))
    scene.broken("memory", "wraps")


@pytest.mark.parametrize("addr", [NOWHERE, 16 << 20, (1 << 64) - 1])
def test_a_status_outside_memory(scene: Scene, addr: int) -> None:
    scene.descs((scene.header, 16, NEXT, 1), (addr, 1, IN, 0))
    scene.broken("memory", "wraps")


def test_a_request_of_many_gigabytes(scene: Scene) -> None:
    """The same good megabyte over and over: legal memory, absurd length."""
    scene.set_header(Type.IN)
    rows = [(scene.header, 16, NEXT, 1)]
    rows += [(0, 16 << 20, NEXT | IN, place) for place in range(2, 127)]
    rows += [(scene.status, 1, IN, 0)]
    scene.indirect(*rows)

    def told() -> bool:
        info = scene.daemon.queue_info()
        used = scene.queue.used_idx
        return bool(info["broken"] or used)

    until("an error or a broken ring", told)


# ---- shape of a request -------------------------------------------------------------------


def test_a_request_without_status(scene: Scene) -> None:
    scene.descs((scene.header, 16, NEXT, 1), (scene.data, 512, OUT, 0))
    scene.broken("status")


def test_a_request_whose_only_writable_descriptor_is_empty(scene: Scene) -> None:
    scene.descs((scene.header, 16, NEXT, 1), (scene.status, 0, IN, 0))
    scene.broken("status", "empty", "length")


def test_a_status_descriptor_that_is_empty_behind_data(scene: Scene) -> None:
    """The last writable byte is then the last byte of the data: no descriptor is special."""
    scene.set_header(Type.IN)
    scene.descs(
        (scene.header, 16, NEXT, 1), (scene.data, 513, NEXT | IN, 2), (scene.status, 0, IN, 0)
    )

    def told() -> bool:
        return scene.queue.used_idx == 1 or scene.daemon.queue_info()["broken"]

    until("an answer or a broken ring", told)


@pytest.mark.parametrize("size", [0, 1, 8, 15])
def test_a_header_that_is_too_short(scene: Scene, size: int) -> None:
    scene.descs((scene.header, size, NEXT, 1), (scene.status, 1, IN, 0))
    scene.failed()


def test_a_header_that_is_writable(scene: Scene) -> None:
    scene.descs((scene.header, 16, NEXT | IN, 1), (scene.status, 1, IN, 0))
    scene.failed()


def test_readable_behind_writable(scene: Scene) -> None:
    scene.descs(
        (scene.header, 16, NEXT, 1), (scene.status, 1, NEXT | IN, 2), (scene.data, 512, OUT, 0)
    )
    scene.broken("readable", "writable", "order")


def test_a_write_whose_data_is_writable_only(scene: Scene) -> None:
    """The data is then not part of the write; it must not be read, nor written."""
    memory = scene.hostile.memory
    before = scene.hostile.read(0, 1, queue=1)
    memory.write(scene.data, b"\x99" * 512)
    scene.descs(
        (scene.header, 16, NEXT, 1), (scene.data, 512, NEXT | IN, 2), (scene.status, 1, IN, 0)
    )
    until("the answer", lambda: scene.queue.used_idx == 1)
    assert memory.read(scene.status, 1)[0] in (Status.OK, Status.IOERR)
    assert memory.read(scene.data, 512) == b"\x99" * 512
    assert scene.hostile.read(0, 1, queue=1) == before


def test_a_read_without_room(scene: Scene) -> None:
    scene.set_header(Type.IN)
    memory = scene.hostile.memory
    memory.write(scene.data, b"\x99" * 512)
    scene.descs((scene.header, 16, NEXT, 1), (scene.data, 512, NEXT, 2), (scene.status, 1, IN, 0))
    until("the answer", lambda: scene.queue.used_idx == 1)
    assert memory.read(scene.data, 512) == b"\x99" * 512


def test_unknown_descriptor_flags_are_ignored(scene: Scene) -> None:
    scene.set_header(Type.FLUSH)
    scene.descs((scene.header, 16, NEXT | 0xFFF8, 1), (scene.status, 1, IN | 0xFFF0, 0))
    until("the answer", lambda: scene.queue.used_idx == 1)
    assert scene.hostile.memory.read(scene.status, 1)[0] == Status.OK


# ---- rings --------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [129, 1000, 0x8000, 0xFFFF])
def test_an_available_index_that_jumps_further_than_the_queue_is_long(
    scene: Scene, jump: int
) -> None:
    scene.queue.set_avail_idx(jump)
    scene.queue.force_kick()
    scene.broken("avail")


def test_an_available_index_that_goes_back(scene: Scene) -> None:
    scene.hostile.write(0, bytes(512))
    scene.queue.set_avail_idx(0)
    scene.queue.force_kick()
    scene.broken("avail")


def test_the_same_head_available_many_times(scene: Scene) -> None:
    """One request asked for again while it runs: each is served, or the ring breaks."""
    scene.set_header(Type.IN)
    scene.queue.write_desc(0, scene.header, 16, NEXT, 1)
    scene.queue.write_desc(1, scene.data, 4096, NEXT | IN, 2)
    scene.queue.write_desc(2, scene.status, 1, IN, 0)
    for _ in range(64):
        scene.queue.push_raw(0, kick=False)
    scene.queue.force_kick()

    def told() -> bool:
        return scene.queue.used_idx == 64 or scene.daemon.queue_info()["broken"]

    until("64 answers or a broken ring", told)


BAD_RINGS = pytest.mark.parametrize(
    "which", ["desc", "avail", "used", "all"], ids=lambda which: f"{which} ring"
)


@BAD_RINGS
@pytest.mark.parametrize(
    "addr",
    [
        0,
        0x7F10_0000_0000 - 16,
        0x7F10_0000_0000 + (16 << 20) - 16,
        0x7F10_0000_0000 + (16 << 20),
        (1 << 64) - 16,
        1 << 63,
    ],
    ids=hex,
)
def test_a_ring_outside_memory(pair: Daemon, scene: Scene, which: str, addr: int) -> None:
    refused_or_broken(pair, scene, lambda queue: moved(scene, queue, which, addr))


@pytest.mark.parametrize(("which", "by"), [("desc", 8), ("desc", 1), ("avail", 1), ("used", 2)])
def test_a_ring_off_its_alignment(pair: Daemon, scene: Scene, which: str, by: int) -> None:
    user = scene.hostile.memory.user
    addr = {"desc": scene.queue.desc, "avail": scene.queue.avail, "used": scene.queue.used}[which]
    refused_or_broken(pair, scene, lambda queue: moved(scene, queue, which, user(addr) + by))


def moved(scene: Scene, queue: VirtQueue, which: str, addr: int) -> None:
    """SET_VRING_ADDR with one address (or all) replaced."""
    user = scene.hostile.memory.user
    good = {"desc": queue.desc, "avail": queue.avail, "used": queue.used}
    place = {name: user(guest) for name, guest in good.items()}
    for name in good if which == "all" else [which]:
        place[name] = addr
    scene.hostile.set_raw_addresses(queue.index, place["desc"], place["avail"], place["used"])


def refused_or_broken(daemon: Daemon, scene: Scene, spoil: Callable[[VirtQueue], None]) -> None:
    """Stop ring 0, set it up with something spoilt, start it: somebody must say no."""
    disk, queue = scene.hostile, scene.queue
    base = disk.stop_queue(0)
    try:
        disk.set_size(0, queue.size)
        disk.set_base(0, base)
        spoil(queue)
        disk.set_kick(0, queue.kick_fd)
        disk.set_call(0, queue.call_fd)
        disk.enable(0)
        queue.force_kick()
    except Refused:
        return
    assert daemon.wait_broken()


def test_a_used_ring_over_the_descriptor_table(scene: Scene, pair: Daemon) -> None:
    """Our own writes then change the descriptors: served or broken, never a crash."""
    disk, queue = scene.hostile, scene.queue
    base = disk.stop_queue(0)
    user = disk.memory.user
    disk.set_base(0, base)
    try:
        disk.set_raw_addresses(0, user(queue.desc), user(queue.avail), user(queue.desc) + 64)
        disk.set_kick(0, queue.kick_fd)
        disk.enable(0)
    except Refused:
        return
    scene.set_header(Type.FLUSH)
    for _ in range(200):
        scene.descs((scene.header, 16, NEXT, 1), (scene.status, 1, IN, 0))
    pair.control.status()


def test_data_of_a_read_over_the_rings(scene: Scene, pair: Daemon) -> None:
    """The device overwrites its own ring with what it read from the disk."""
    scene.hostile.write(0, random.Random(1).randbytes(64 << 10), queue=1)
    scene.set_header(Type.IN)
    scene.descs(
        (scene.header, 16, NEXT, 1),
        (scene.queue.desc, scene.queue.desc_bytes // 512 * 512, NEXT | IN, 2),
        (scene.status, 1, IN, 0),
    )
    scene.queue.force_kick()
    until(
        "an answer or a broken ring",
        lambda: scene.queue.used_idx or pair.queue_info()["broken"],
    )


def test_a_ring_that_is_not_set_up_and_gets_a_kick(pair: Daemon, attach: Attach) -> None:
    disk = attach(pair, 0, start=False)
    disk.negotiate()
    disk.acknowledge()
    queue = disk.make_queue(0, 64)
    queue.force_kick()
    try:
        disk.set_kick(0, queue.kick_fd)
        disk.enable(0)
        disk.share_memory()
        disk.set_call(0, queue.call_fd)
        queue.force_kick()
    except Refused:
        pass
    assert disk.queue_count() == 16
    assert disk.stop_queue(0) == 0


# ---- memory that changes under the device --------------------------------------------------


def test_descriptors_that_change_all_the_time(scene: Scene, pair: Daemon) -> None:
    """A writer spoils descriptors, header and indirect table while requests are served. The
    device must take what it checked; what it answers does not matter here."""
    memory, queue = scene.hostile.memory, scene.queue
    stop = threading.Event()
    spoilt = [(NOWHERE, 512), ((1 << 64) - 8, 512), (scene.data, 0xFFFFFFFF), (scene.data, 512)]

    def spoil() -> None:
        chance = random.Random(7)
        while not stop.is_set():
            addr, size = chance.choice(spoilt)
            flags = chance.choice([NEXT, NEXT | IN, INDIRECT, 0, 0xFFFF])
            queue.write_desc(1, addr, size, flags, chance.choice([0, 1, 2, 500]))
            memory.write(scene.header, chance.randbytes(16))
            queue.write_table(scene.table, [(addr, size, flags, chance.randrange(5))] * 4)

    thread = threading.Thread(target=spoil)
    thread.start()
    try:
        for _ in range(300):
            queue.write_desc(0, scene.header, 16, NEXT, 1)
            queue.write_desc(2, scene.status, 1, IN, 0)
            queue.write_desc(3, scene.table, 64, INDIRECT, 0)
            queue.push_raw(0, kick=False)
            queue.push_raw(3)
            until(
                "the ring to go on or break",
                lambda: queue.used_idx == queue.avail_idx or pair.queue_info()["broken"],
            )
            if pair.queue_info()["broken"]:
                base = scene.hostile.stop_queue(0)
                queue.avail_next = base
                queue.set_avail_idx(base)
                scene.hostile.start_queue(queue, base=base)
    finally:
        stop.set()
        thread.join()


def test_a_broken_ring_can_be_stopped_and_set_up_again(scene: Scene) -> None:
    scene.descs((NOWHERE, 16, NEXT, 1), (scene.status, 1, IN, 0))
    scene.broken("memory", "wraps")
    base = scene.hostile.stop_queue(0)
    queue = scene.queue
    queue.avail_next = base
    queue.set_avail_idx(base)
    scene.hostile.start_queue(queue, base=base)
    scene.set_header(Type.FLUSH)
    queue.write_desc(0, scene.header, 16, NEXT, 1)
    queue.write_desc(1, scene.status, 1, IN, 0)
    before = queue.used_idx
    queue.push_raw(0)
    until("the answer", lambda: queue.used_idx == (before + 1) & 0xFFFF)
    assert not scene.daemon.queue_info()["broken"]


@pytest.mark.parametrize("seed", range(10))
def test_random_descriptor_tables(epochd: StartDaemon, attach: Attach, seed: int) -> None:
    """Whole tables of half-plausible noise. Print of the seed: the test's number."""
    daemon = epochd(DiskSpec("bad"), DiskSpec("good"), arena="8M")
    peaceful = attach(daemon, 1)
    peaceful.write(0, b"\x35" * 4096)
    chance = random.Random(seed)
    for _ in range(30):
        hostile = attach(daemon, 0, queue_size=64)
        noise(hostile, chance)
        try:
            hostile.settle()
            hostile.stop_queue(0)
        except HungUp:
            pass
        hostile.close()
        assert peaceful.read(0, 8) == b"\x35" * 4096
    good = attach(daemon, 0)
    good.write(0, b"\x36" * 512)
    assert good.read(0, 1) == b"\x36" * 512


def noise(disk: Disk, chance: random.Random) -> None:
    """Fill table and available ring and kick."""
    memory, queue = disk.memory, disk.queues[0]
    places = [memory.alloc(4096) for _ in range(8)]
    table = memory.alloc(16 * 64, 16)

    def desc() -> tuple[int, int, int, int]:
        addr = chance.choice([*places, *places, *places, table, queue.desc, NOWHERE, 0])
        addr += chance.choice([0, 0, 0, 1, 512, 4095])
        size = chance.choice([0, 1, 16, 16, 32, 512, 512, 4096, 16 << 20, 0xFFFFFFFF])
        flags = chance.choice([0, NEXT, NEXT, NEXT | IN, NEXT | IN, IN, INDIRECT, 0xFFFF])
        return addr, size, flags, chance.choice([chance.randrange(64), 64, 0xFFFF])

    for place in places:
        header = HEADER.pack(chance.choice([0, 1, 4, 8, 11, 13, 99]), 0, chance.randrange(1000))
        memory.write(place, header)
    for place in range(64):
        queue.write_desc(place, *desc())
    queue.write_table(table, [desc() for _ in range(64)])
    for place in range(64):
        queue.set_avail_entry(place, chance.choice([chance.randrange(64), 64, 0xFFFF, 0]))
    queue.set_avail_idx(chance.choice([1, 8, 64, 65, 0xFFFF]))
    queue.force_kick()
