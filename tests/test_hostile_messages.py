"""vhost-user messages that no honest front end sends.

Each costs its author at most the connection (or a refusal), nobody else anything, and leaves
no descriptor behind in the daemon.
"""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from conftest import Attach, serving
from frontend import (
    DESC,
    MIB,
    NEED_REPLY,
    PAGE,
    VERSION,
    Channel,
    DirtyLog,
    Disk,
    FrontEndError,
    HungUp,
    Late,
    Protocol,
    Refused,
    RegionSpec,
    Request,
    highest_page,
)
from frontend.wire import (
    CONFIG,
    HEADER,
    INFLIGHT,
    LOG,
    REGION,
    REGIONS,
    U64,
    VRING_ADDR,
    VRING_STATE,
)
from harness import Daemon, DiskSpec, until

PAYLOAD = {
    Request.SET_FEATURES: U64.size,
    Request.SET_PROTOCOL_FEATURES: U64.size,
    Request.SET_MEM_TABLE: REGIONS.size + REGION.size,
    Request.SET_LOG_BASE: LOG.size,
    Request.SET_VRING_NUM: VRING_STATE.size,
    Request.SET_VRING_ADDR: VRING_ADDR.size,
    Request.SET_VRING_BASE: VRING_STATE.size,
    Request.GET_VRING_BASE: VRING_STATE.size,
    Request.SET_VRING_KICK: U64.size,
    Request.SET_VRING_CALL: U64.size,
    Request.SET_VRING_ERR: U64.size,
    Request.SET_VRING_ENABLE: VRING_STATE.size,
    Request.GET_CONFIG: CONFIG.size + 8,
    Request.SET_CONFIG: CONFIG.size + 8,
    Request.GET_INFLIGHT_FD: INFLIGHT.size,
    Request.SET_INFLIGHT_FD: INFLIGHT.size,
    Request.ADD_MEM_REG: U64.size + REGION.size,
    Request.REM_MEM_REG: U64.size + REGION.size,
}
"""Length of the payload of each message that has one."""

TAKES_FDS = {
    Request.SET_MEM_TABLE,
    Request.SET_LOG_BASE,
    Request.SET_LOG_FD,
    Request.SET_VRING_KICK,
    Request.SET_VRING_CALL,
    Request.SET_VRING_ERR,
    Request.SET_INFLIGHT_FD,
    Request.ADD_MEM_REG,
    Request.REM_MEM_REG,
}


class Scene:
    """A hostile connection to disk 0, a peaceful front end on disk 1."""

    def __init__(self, daemon: Daemon, attach: Attach) -> None:
        self.daemon = daemon
        self._attach = attach
        self._hostile: list[Disk] = []
        self.peaceful = attach(daemon, 1)
        self.peaceful.write(0, b"\x33" * 4096)

    def descriptors(self) -> int:
        """How many descriptors the daemon has open."""
        return len(os.listdir(f"/proc/{self.daemon.pid}/fd"))

    def hostile(self, *, negotiated: bool = True) -> Disk:
        """A new connection to disk 0."""
        disk = self._attach(self.daemon, 0, start=False)
        self._hostile.append(disk)
        if negotiated:
            disk.negotiate()
        return disk

    def unharmed(self) -> None:
        """The other disk is served, and so is an honest front end on this one."""
        while self._hostile:
            self._hostile.pop().close()
        assert self.peaceful.read(0, 8) == b"\x33" * 4096
        honest = self._attach(self.daemon, 0)
        honest.write(64, b"\x34" * 512)
        assert honest.read(64, 1) == b"\x34" * 512
        honest.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon with two disks for all tests here."""
    folder = tmp_path_factory.mktemp("pair")
    with serving(Daemon(folder, [DiskSpec("bad"), DiskSpec("good")])) as daemon:
        yield daemon


@pytest.fixture
def scene(pair: Daemon, attach: Attach) -> Iterator[Scene]:
    """Afterwards everybody is served and the daemon has as many descriptors as before."""
    scene = Scene(pair, attach)
    pair.control.status()
    scene.unharmed()
    until("one client", lambda: pair.control.status()["clients"] == 1)
    before = scene.descriptors()
    yield scene
    scene.unharmed()
    until("one client", lambda: pair.control.status()["clients"] == 1)
    until("all descriptors to be closed", lambda: scene.descriptors() <= before)


def outcome(disk: Disk) -> str:
    """What became of a connection: "closed", or "open" when it still answers."""
    try:
        disk.channel.send(Request.GET_QUEUE_NUM)
        while disk.channel.receive().request != Request.GET_QUEUE_NUM:
            pass
    except HungUp:
        return "closed"
    return "open"


# ---- frames -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, 2, 3, 0x4 | VERSION, 0xFFFFFFFF])
def test_a_wrong_version_or_a_reply_ends_the_connection(scene: Scene, flags: int) -> None:
    disk = scene.hostile()
    disk.channel.send(Request.GET_FEATURES, flags=flags)
    disk.channel.wait_hang_up()


@pytest.mark.parametrize("size", [8193, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_absurd_size_ends_the_connection(scene: Scene, size: int) -> None:
    disk = scene.hostile()
    disk.channel.send(Request.SET_FEATURES, bytes(8), size=size)
    disk.channel.wait_hang_up()


@pytest.mark.parametrize("request_", list(PAYLOAD), ids=lambda request: request.name)
@pytest.mark.parametrize("change", [-1, 1, -4, 4, None], ids=str)
def test_a_payload_of_the_wrong_length_is_never_obeyed(
    scene: Scene, request_: Request, change: int | None
) -> None:
    size = 0 if change is None else PAYLOAD[request_] + change
    lengths_that_may_be = {
        Request.GET_INFLIGHT_FD: {4},  # padded
        Request.SET_INFLIGHT_FD: {4},
        Request.GET_CONFIG: {-4, -1, 1, 4},  # what follows the header is only room
        Request.SET_MEM_TABLE: {1, 4},  # unused slots may follow
    }
    disk = scene.hostile()
    region = disk.memory.regions[0]
    payload = bytes(size)
    fds = [region.fd] if request_ in TAKES_FDS else []
    if request_ == Request.SET_MEM_TABLE:
        payload = (REGIONS.pack(1, 0) + region.wire() + bytes(8))[:size]
    try:
        disk.command(request_, payload, fds)
    except (FrontEndError, Late):
        return
    assert change in lengths_that_may_be.get(request_, set())


@pytest.mark.parametrize("cut", [1, 4, 11, 12, 13, 19])
def test_a_message_that_stops_in_the_middle(scene: Scene, cut: int) -> None:
    disk = scene.hostile()
    whole = HEADER.pack(Request.SET_FEATURES, VERSION, 8) + bytes(8)
    disk.channel.send_bytes(whole[:cut], [disk.memory.regions[0].fd])
    disk.close()


def test_a_message_in_single_bytes_is_understood(scene: Scene) -> None:
    disk = scene.hostile()
    for byte in HEADER.pack(Request.GET_QUEUE_NUM, VERSION, 0):
        disk.channel.send_bytes(bytes([byte]))
    assert disk.channel.reply_to(Request.GET_QUEUE_NUM).u64() == 16


@pytest.mark.parametrize(
    "request_", [0, 19, 20, 21, 22, 23, 26, 28, 31, 33, 35, 39, 41, 99, 1 << 31]
)
def test_a_message_that_is_not_supported(scene: Scene, request_: int) -> None:
    disk = scene.hostile()
    disk.channel.send(request_, bytes(8), flags=VERSION | NEED_REPLY)
    try:
        reply = disk.channel.receive()
        assert any(reply.payload)
        reply.close_fds()
    except HungUp:
        pass


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b'{"execute": "quit"}'])
def test_another_protocol_ends_the_connection(scene: Scene, junk: bytes) -> None:
    disk = scene.hostile(negotiated=False)
    disk.channel.send_bytes(junk)
    disk.channel.wait_hang_up()


def test_a_front_end_that_only_connects_blocks_nobody_else(scene: Scene) -> None:
    disk = scene.hostile(negotiated=False)
    assert scene.peaceful.read(0, 8) == b"\x33" * 4096
    disk.close()


def test_a_front_end_that_reads_no_reply_blocks_nobody_else(scene: Scene) -> None:
    disk = scene.hostile(negotiated=False)
    disk.channel.sock.setblocking(False)
    question = HEADER.pack(Request.GET_FEATURES, VERSION, 0)
    asked = 0
    try:
        while asked < 200_000:
            asked += disk.channel.sock.send(question * 100)
    except BlockingIOError:
        pass
    assert asked > 0
    for _ in range(20):
        assert scene.peaceful.read(0, 8) == b"\x33" * 4096
    assert scene.daemon.control.status()["mode"] == "standby"
    disk.close()


# ---- descriptors --------------------------------------------------------------------------


@pytest.mark.parametrize("request_", list(PAYLOAD), ids=lambda request: request.name)
@pytest.mark.parametrize("count", [0, 2, 9, 64])
def test_a_wrong_number_of_descriptors_is_never_obeyed_and_never_kept(
    scene: Scene, request_: Request, count: int
) -> None:
    disk = scene.hostile()
    region = disk.memory.regions[0]
    payload = bytes(PAYLOAD[request_])
    if request_ == Request.SET_MEM_TABLE:
        payload = REGIONS.pack(1, 0) + region.wire()
    if not count and request_ not in TAKES_FDS:
        return
    try:
        disk.command(request_, payload, [region.fd] * count)
    except FrontEndError:
        return
    raise AssertionError(f"{request_.name} was obeyed with {count} descriptors")


@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL])
def test_a_descriptor_though_the_flag_says_none(scene: Scene, request_: Request) -> None:
    disk = scene.hostile()
    with pytest.raises(FrontEndError):
        disk.command(request_, U64.pack(0x100), [disk.memory.regions[0].fd])


def odd_descriptors() -> Iterator[tuple[str, Callable[[], int]]]:
    """Descriptors of all kinds that are no eventfd."""
    yield "pipe", lambda: os.pipe()[0]
    yield "socket", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()
    yield "file", lambda: os.memfd_create("odd")
    yield "directory", lambda: os.open("/", os.O_RDONLY)
    yield "null", lambda: os.open("/dev/null", os.O_RDWR)
    yield "zero", lambda: os.open("/dev/zero", os.O_RDWR)
    yield "process", lambda: os.pidfd_open(os.getpid())


@pytest.mark.parametrize(("kind", "make"), list(odd_descriptors()), ids=lambda v: str(v)[:10])
def test_a_kick_call_or_err_that_is_no_eventfd(
    scene: Scene, kind: str, make: Callable[[], int]
) -> None:
    """Always readable, never writable, or blocking: no thread may spin or hang on it."""
    odd, said = make(), "the descriptor is no eventfd"
    before = scene.daemon.log().count(said)
    try:
        for put in (Disk.set_call, Disk.set_err, Disk.set_kick):
            disk = scene.hostile()
            disk.acknowledge()
            disk.share_memory()
            disk.start_queue(disk.make_queue(0, 64))
            disk.write(0, bytes(512))
            with pytest.raises((Refused, HungUp)):
                put(disk, 0, odd)
            disk.close()
    finally:
        os.close(odd)
    assert scene.daemon.log().count(said) == before + 3
    for _ in range(10):
        assert scene.peaceful.read(0, 8) == b"\x33" * 4096


def test_a_call_eventfd_that_is_full_blocks_nobody(scene: Scene) -> None:
    disk = scene.hostile()
    disk.acknowledge()
    disk.share_memory()
    queue = disk.make_queue(0, 64)
    disk.start_queue(queue)
    disk.write(0, bytes(512))
    full = os.eventfd(0)  # blocking, and at its highest value
    os.eventfd_write(full, 0xFFFFFFFFFFFFFFFE)
    disk.set_call(0, full)
    os.set_blocking(full, True)  # the flag is the open file's, whatever the agent set
    queue.polling = True
    for _ in range(20):
        queue.used_event = queue.used_seen
        disk.read(0, 1)
    assert scene.peaceful.read(0, 8) == b"\x33" * 4096
    os.close(full)


def test_an_err_eventfd_that_is_full_blocks_nobody(scene: Scene) -> None:
    disk = scene.hostile()
    disk.acknowledge()
    disk.share_memory()
    queue = disk.make_queue(0, 64)
    disk.start_queue(queue)
    full = os.eventfd(0)
    os.eventfd_write(full, 0xFFFFFFFFFFFFFFFE)
    disk.set_err(0, full)
    os.set_blocking(full, True)
    queue.push_raw(1000)  # a descriptor that there is not: the ring breaks and says so
    scene.daemon.wait_broken(disk=0)
    assert scene.peaceful.read(0, 8) == b"\x33" * 4096
    os.close(full)
    disk.close()


# ---- memory tables ------------------------------------------------------------------------


def table(*rows: tuple[int, int, int, int]) -> bytes:
    """A SET_MEM_TABLE payload of (guest, size, user, offset) rows."""
    return REGIONS.pack(len(rows), 0) + b"".join(REGION.pack(*row) for row in rows)


BAD_TABLES: dict[str, list[tuple[int, int, int, int]]] = {
    "no bytes": [(0, 0, 0x1000, 0)],
    "guest address wraps": [((1 << 64) - PAGE, 2 * PAGE, 0x1000, 0)],
    "user address wraps": [(0, 2 * PAGE, (1 << 64) - PAGE, 0)],
    "size of all memory": [(0, (1 << 64) - PAGE, 0, 0)],
    "offset wraps": [(0, 2 * PAGE, 0x1000, (1 << 64) - PAGE)],
    "offset and size wrap": [(0, 1 << 63, 0x1000, 1 << 63)],
    "behind the end of the file": [(0, 17 * MIB, 0x1000, 0)],
    "offset at the end of the file": [(0, PAGE, 0x1000, 16 * MIB)],
    "guest ranges overlap": [(0, 2 * MIB, 0x1000_0000, 0), (MIB, 2 * MIB, 0x2000_0000, 0)],
    "the same twice": [(0, MIB, 0x1000_0000, 0), (0, MIB, 0x1000_0000, 0)],
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_memory_table_is_refused_as_a_whole(scene: Scene, name: str) -> None:
    disk = scene.hostile()
    rows = BAD_TABLES[name]
    fd = disk.memory.regions[0].fd
    with pytest.raises((Refused, HungUp)):
        disk.command(Request.SET_MEM_TABLE, table(*rows), [fd] * len(rows))


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_leaves_the_good_one_in_force(scene: Scene, name: str) -> None:
    disk = scene.hostile()
    disk.acknowledge()
    disk.share_memory()
    disk.start_queue(disk.make_queue(0, 64))
    disk.write(0, b"\x35" * 512)
    rows = BAD_TABLES[name]
    try:
        disk.command(Request.SET_MEM_TABLE, table(*rows), [disk.memory.regions[0].fd] * len(rows))
    except Refused:
        assert disk.read(0, 1) == b"\x35" * 512
    except HungUp:
        pass


@pytest.mark.parametrize(
    ("user", "offset"), [(0x1000_0008, 0), (0x1000_0001, 0), (0x1000_0000, 8), (0x1000_0000, 1)]
)
def test_a_region_off_its_alignment_is_refused_or_works(
    scene: Scene, user: int, offset: int
) -> None:
    """Aligned user addresses may then be unaligned in the back end's own mapping."""
    disk = scene.hostile()
    disk.acknowledge()
    memory = disk.memory  # region 0: guest address and place in the file are the same
    base = 0x1000_1000
    at = base - user + offset
    header, status = 0x20000, 0x21000
    memory.write(header + offset, struct.pack("<IIQ", 4, 0, 0))
    memory.write(status + offset, b"\xee")
    memory.write(at, DESC.pack(header, 16, 1, 1) + DESC.pack(status, 1, 2, 0))
    memory.write(at + 4096, struct.pack("<HHH", 0, 1, 0))
    try:
        disk.command(Request.SET_MEM_TABLE, table((0, MIB, user, offset)), [memory.regions[0].fd])
        disk.set_size(0, 64)
        disk.set_raw_addresses(0, base, base + 4096, base + 8192)
        disk.set_kick(0, None)
        disk.enable(0)
    except (Refused, HungUp):
        return
    until(
        "an answer or a broken ring",
        lambda: memory.read(status + offset, 1) == b"\0" or scene.daemon.queue_info()["broken"],
    )


@pytest.mark.parametrize("count", [0, 2, 8, 255, 1 << 31, 0xFFFFFFFF])
def test_a_count_of_regions_that_is_not_what_follows(scene: Scene, count: int) -> None:
    disk = scene.hostile()
    region = disk.memory.regions[0]
    payload = REGIONS.pack(count, 0) + region.wire()
    with pytest.raises(FrontEndError):
        disk.command(Request.SET_MEM_TABLE, payload, [region.fd])


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "null", "read-only memory"])
def test_memory_that_cannot_be_mapped_is_refused(scene: Scene, kind: str) -> None:
    disk = scene.hostile()
    if kind == "read-only memory":
        fd = os.open(f"/proc/self/fd/{disk.memory.regions[0].fd}", os.O_RDONLY)
    else:
        fd = dict(odd_descriptors())[kind]()
    try:
        with pytest.raises((Refused, HungUp)):
            disk.command(Request.SET_MEM_TABLE, table((0, PAGE, 0x1000, 0)), [fd])
    finally:
        os.close(fd)


def test_more_regions_than_slots_are_refused(scene: Scene) -> None:
    disk = scene.hostile()
    slots = disk.channel.ask_u64(Request.GET_MAX_MEM_SLOTS)
    fd = disk.memory.regions[0].fd
    for number in range(slots):
        row = REGION.pack(number * 2 * PAGE, PAGE, 0x1000_0000 + number * 2 * PAGE, 0)
        disk.command(Request.ADD_MEM_REG, U64.pack(0) + row, [fd])
    row = REGION.pack(slots * 2 * PAGE, PAGE, 0x1000_0000 + slots * 2 * PAGE, 0)
    with pytest.raises((Refused, HungUp)):
        disk.command(Request.ADD_MEM_REG, U64.pack(0) + row, [fd])


def test_a_region_that_was_never_added_cannot_be_removed(scene: Scene) -> None:
    disk = scene.hostile()
    disk.share_memory()
    row = REGION.pack(0x5000_0000, PAGE, 0x1000, 0)
    with pytest.raises(Refused):
        disk.command(Request.REM_MEM_REG, U64.pack(0) + row)


def test_memory_that_is_cut_short_costs_only_its_front_end(scene: Scene, attach: Attach) -> None:
    """Reads and writes behind the end of the file raise SIGBUS in whoever does them."""
    disk = scene.hostile()
    region = disk.memory.add(RegionSpec(0x2_0000_0000, 4 * MIB, 0x7F60_0000_0000))
    disk.acknowledge()
    disk.share_memory()
    disk.start_queue(disk.make_queue(0, 64))
    disk.write(0, b"\x36" * 4096)
    status = disk.memory.alloc(1)
    header = disk.memory.alloc(16)
    for kind in (0, 1):
        disk.memory.write(header, struct.pack("<IIQ", kind, 0, 0))
        queue = disk.queues[0]
        queue.write_desc(0, header, 16, 1, 1)
        queue.write_desc(1, region.guest + MIB, 4096, 1 | (0 if kind else 2), 2)
        queue.write_desc(2, status, 1, 2, 0)
        os.ftruncate(region.fd, 0)
        queue.push_raw(0)
        disk.channel.wait_hang_up()
        disk.close()
        disk = scene.hostile()
        region = disk.memory.add(RegionSpec(0x2_0000_0000, 4 * MIB, 0x7F60_0000_0000))
        disk.acknowledge()
        disk.share_memory()
        disk.start_queue(disk.make_queue(0, 64))
        status = disk.memory.alloc(1)
        header = disk.memory.alloc(16)
        assert disk.read(0, 8) == b"\x36" * 4096


def test_rings_in_memory_that_is_cut_short(scene: Scene) -> None:
    disk = scene.hostile()
    region = disk.memory.add(RegionSpec(0x2_0000_0000, 4 * MIB, 0x7F60_0000_0000))
    disk.acknowledge()
    disk.share_memory()
    queue = disk.make_queue(0, 64, region=2)
    disk.start_queue(queue)
    disk.write(0, b"\x36" * 512)
    kick = os.dup(queue.kick_fd)
    os.ftruncate(region.fd, 0)
    os.eventfd_write(kick, 1)
    os.close(kick)
    disk.channel.wait_hang_up()


@pytest.mark.parametrize("which", ["log", "in-flight region"])
def test_a_log_or_region_that_is_cut_short_costs_only_its_front_end(
    scene: Scene, which: str
) -> None:
    disk = scene.hostile()
    disk.acknowledge()
    disk.get_inflight(1, 64)
    disk.set_inflight()
    disk.share_memory()
    disk.start_queue(disk.make_queue(0, 64))
    disk.start_log(DirtyLog(highest_page(disk.memory)))
    disk.write(0, b"\x37" * 512)
    assert disk.log is not None
    assert disk.inflight is not None
    os.ftruncate(disk.log.fd if which == "log" else disk.inflight.fd, 0)
    disk.submit(0, 0, room=512)
    disk.channel.wait_hang_up()


@pytest.mark.parametrize(
    ("size", "offset"),
    [(0, 0), (1 << 62, 0), (PAGE, 1 << 62), (PAGE, 1), (64 * PAGE, 0), ((1 << 64) - 1, PAGE)],
)
def test_a_bad_log_is_refused(scene: Scene, size: int, offset: int) -> None:
    disk = scene.hostile()
    fd = os.memfd_create("log")
    os.ftruncate(fd, PAGE)
    try:
        disk.channel.send(
            Request.SET_LOG_BASE, LOG.pack(size, offset), [fd], flags=VERSION | NEED_REPLY
        )
        assert disk.channel.receive().u64() != 0
    except HungUp:
        pass
    finally:
        os.close(fd)


# ---- order --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_random_messages_in_random_order(scene: Scene, seed: int) -> None:
    """Well-formed messages with half-plausible numbers, in any order."""
    chance = random.Random(seed)
    disk = scene.hostile(negotiated=chance.random() < 0.8)
    region = disk.memory.regions[0]
    try:
        for _ in range(60):
            send_random(disk, chance)
    except HungUp:
        pass
    except (OSError, Late) as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    del region
    disk.close()


def send_random(disk: Disk, chance: random.Random) -> None:
    """One random message; whatever comes back is read."""
    region = disk.memory.regions[0]
    base = region.spec.user
    number = chance.choice([0, 0, 1, 15, 16, 255, 0xFFFFFFFF])
    value = chance.choice([0, 1, 2, 64, 128, 1024, 65536, 0xFFFFFFFF])
    addr = chance.choice([base, base + 4096, base + 65536, base + 16 * MIB - 8, 0, 1 << 63])
    request = chance.choice([*PAYLOAD, Request.RESET_DEVICE, Request.SET_OWNER])
    fds = [region.fd] if request in TAKES_FDS else []
    payload = b""
    if request in PAYLOAD:
        payload = {
            U64.size: U64.pack(chance.choice([0, 1, 0x101, (1 << 33) - 1, disk.offered])),
            VRING_STATE.size: VRING_STATE.pack(number, value),
            VRING_ADDR.size: VRING_ADDR.pack(
                number, chance.choice([0, 1]), addr, addr + 8192, addr + 4096, value
            ),
        }.get(PAYLOAD[request], bytes(PAYLOAD[request]))
    if request == Request.SET_MEM_TABLE:
        payload = REGIONS.pack(1, 0) + region.wire()
    if request == Request.GET_INFLIGHT_FD:
        payload = INFLIGHT.pack(0, 0, number & 0xFFFF, value & 0xFFFF)
    acked = bool(disk.protocol & Protocol.REPLY_ACK)
    disk.channel.send(request, payload, fds, flags=VERSION | (NEED_REPLY if acked else 0))
    disk.channel.send(Request.GET_QUEUE_NUM)
    while True:
        message = disk.channel.receive()
        message.close_fds()
        if message.request == Request.GET_QUEUE_NUM:
            return


def test_a_storm_of_connections(scene: Scene, pair: Daemon) -> None:
    channels = []
    for _ in range(200):
        try:
            channels.append(Channel.connect(pair.socket(0)))
        except (BlockingIOError, ConnectionRefusedError):
            break
    for channel in channels:
        channel.close()
    assert scene.peaceful.read(0, 8) == b"\x33" * 4096
