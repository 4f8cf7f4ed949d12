"""The dirty log: every guest page that the back end wrote is marked, and no other.

A checkpointing VMM copies the pages that its devices wrote; one page missing here is a
checkpoint that differs from the machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import Attach
from frontend import (
    MIB,
    PAGE,
    Buffer,
    DirtyLog,
    Disk,
    GuestMemory,
    Layout,
    RegionSpec,
    Status,
    Type,
    VirtQueue,
    highest_page,
)
from frontend.blk import HEADER
from frontend.device import VRING_F_LOG
from harness import Daemon

REGIONS = (
    RegionSpec(guest=0, size=8 * MIB, user=0x7F10_0000_0000),
    RegionSpec(guest=0x1000_0000, size=8 * MIB, user=0x7F30_0000_0000, offset=MIB),
)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Low memory only: a log of a few KiB covers it."""
    with GuestMemory(REGIONS) as memory:
        yield memory


@pytest.fixture
def disk(shared: Daemon, memory: GuestMemory, attach: Attach) -> Iterator[Disk]:
    """A running front end with logging on."""
    disk = attach(shared, memory=memory)
    disk.write(0, b"\x61" * MIB)
    disk.start_log(DirtyLog(highest_page(memory)))
    disk.read(0, 1)  # whatever the back end did late is behind us
    yield disk
    disk.close()


def pages(*buffers: Buffer) -> set[int]:
    """The pages that the writable ones of these touch."""
    return {
        page
        for buffer in buffers
        if buffer.writable and buffer.size
        for page in range(buffer.addr // PAGE, (buffer.addr + buffer.size - 1) // PAGE + 1)
    }


def ring_page(queue: VirtQueue) -> set[int]:
    """The used ring of a queue of up to 511 entries is one page."""
    return {queue.used // PAGE}


def log(disk: Disk) -> DirtyLog:
    assert disk.log is not None
    return disk.log


@pytest.mark.parametrize("size", [512, 4096, 65536])
def test_a_read_marks_its_buffers_its_status_and_the_used_ring(disk: Disk, size: int) -> None:
    log(disk).clear()
    request = disk.request(Type.IN, 0, room=size)
    assert request.status == Status.OK
    assert log(disk).pages() == pages(*request.into) | ring_page(disk.queues[0])


def test_pages_in_high_regions_are_marked_by_guest_address(disk: Disk) -> None:
    log(disk).clear()
    request = disk.request(Type.IN, 0, room=16384, layout=Layout(regions=[1]))
    wanted = pages(*request.into)
    assert min(wanted) >= 0x1000_0000 // PAGE
    assert log(disk).pages() == wanted | ring_page(disk.queues[0])


def test_a_write_marks_its_status_and_the_used_ring_only(disk: Disk) -> None:
    log(disk).clear()
    request = disk.request(Type.OUT, 0, bytes(65536), layout=Layout(indirect=0))
    assert log(disk).pages() == pages(*request.into) | ring_page(disk.queues[0])


@pytest.mark.parametrize("kind", [Type.FLUSH, Type.GET_ID, 99])
def test_every_kind_marks_what_it_answers(disk: Disk, kind: int) -> None:
    log(disk).clear()
    request = disk.request(kind, room=20 if kind == Type.GET_ID else 0)
    assert log(disk).pages() == pages(*request.into) | ring_page(disk.queues[0])


def test_a_failed_read_marks_its_status(disk: Disk) -> None:
    log(disk).clear()
    request = disk.request(Type.IN, 1 << 40, room=4096)
    assert request.status == Status.IOERR
    marked = log(disk).pages()
    assert pages(request.into[-1]) | ring_page(disk.queues[0]) <= marked
    assert marked <= pages(*request.into) | ring_page(disk.queues[0])


def test_a_page_is_marked_though_only_its_last_byte_is_written(
    disk: Disk, memory: GuestMemory
) -> None:
    block = memory.alloc(3 * PAGE, PAGE)
    header = memory.alloc(16)
    status = memory.alloc(1, region=1)
    memory.write(header, HEADER.pack(Type.IN, 0, 0))
    into = [Buffer(block + PAGE - 1, PAGE + 1, True), Buffer(block + 2 * PAGE, 511, True)]
    log(disk).clear()
    request = disk.submit_buffers(
        [Buffer(header, 16, False)], [*into, Buffer(status, 1, True)], indirect=0
    )
    disk.wait(request)
    assert request.status == Status.OK
    wanted = pages(*request.into)
    assert len(wanted) == 4
    assert log(disk).pages() == wanted | ring_page(disk.queues[0])


def test_reads_from_epochs_and_from_the_image_are_marked_alike(shared: Daemon, disk: Disk) -> None:
    for _ in range(2):
        log(disk).clear()
        request = disk.request(Type.IN, 0, room=16384)
        assert request.data == b"\x61" * 16384
        assert log(disk).pages() == pages(*request.into) | ring_page(disk.queues[0])
        shared.control.checkpoint()
        shared.control.wait_applied()


def test_many_reads_at_once_lose_no_mark(disk: Disk) -> None:
    log(disk).clear()
    wanted = ring_page(disk.queues[0])
    for _ in range(20):
        requests = [
            disk.submit(Type.IN, 8 * i, room=4096, layout=Layout(indirect=0)) for i in range(64)
        ]
        disk.wait(*requests)
        wanted |= pages(*[buffer for request in requests for buffer in request.into])
    assert log(disk).pages() == wanted


def test_the_used_ring_is_marked_at_its_log_address(disk: Disk) -> None:
    """The address for the log may differ from where the ring is, and need not be memory."""
    queue = disk.queues[0]
    elsewhere = 0x0C00_0000  # in the hole between the regions
    user = disk.memory.user
    disk.set_raw_addresses(
        0, user(queue.desc), user(queue.avail), user(queue.used), VRING_F_LOG, elsewhere
    )
    log(disk).clear()
    request = disk.request(Type.IN, 0, room=512)
    assert log(disk).pages() == pages(*request.into) | {elsewhere // PAGE}


def test_the_used_ring_is_not_marked_when_only_buffers_are_logged(disk: Disk) -> None:
    disk.log_ring = False
    disk.set_addresses(disk.queues[0])
    log(disk).clear()
    request = disk.request(Type.IN, 0, room=512)
    assert log(disk).pages() == pages(*request.into)


def test_a_large_used_ring_marks_the_pages_that_changed(
    shared: Daemon, memory: GuestMemory, attach: Attach
) -> None:
    disk = attach(shared, memory=memory, queue_size=1024)
    disk.start_log(DirtyLog(highest_page(memory)))
    queue = disk.queues[0]
    first, second, third = (queue.used // PAGE + place for place in range(3))
    for turn in range(1024):
        log(disk).clear()
        request = disk.request(Type.IN, 0, room=512)
        marked = log(disk).pages() - pages(*request.into)
        element = first + (4 + 8 * turn) // PAGE
        # used.idx lies in the first page, avail_event in the third.
        assert {first, element} <= marked <= {first, second, third}


def test_logging_stops_and_starts_again(disk: Disk) -> None:
    bitmap = DirtyLog(highest_page(disk.memory))
    disk.stop_log()
    disk.request(Type.IN, 0, room=4096)
    disk.start_log(bitmap)
    request = disk.request(Type.IN, 0, room=4096)
    assert pages(*request.into) <= bitmap.pages()


def test_nothing_is_marked_after_logging_was_stopped(disk: Disk) -> None:
    bitmap = log(disk)
    disk.log = None
    disk.log_ring = False
    disk.acknowledge()
    disk.set_addresses(disk.queues[0])
    bitmap.clear()
    disk.wait(*[disk.submit(Type.IN, 0, room=512) for _ in range(20)])
    assert bitmap.pages() == set()
    bitmap.close()


def test_a_log_at_an_offset_in_its_file(disk: Disk) -> None:
    bitmap = DirtyLog(highest_page(disk.memory), offset=PAGE)
    old, disk.log = log(disk), bitmap
    disk.set_log()
    old.close()
    request = disk.request(Type.IN, 0, room=4096)
    assert bitmap.pages() == pages(*request.into) | ring_page(disk.queues[0])


def test_the_log_can_be_replaced_while_requests_are_in_flight(disk: Disk) -> None:
    """A VMM that adds memory during a migration sends a larger log."""
    union: set[int] = set()
    wanted: set[int] = set()
    for _ in range(20):
        requests = [
            disk.submit(Type.IN, 8 * i, room=4096, layout=Layout(indirect=0)) for i in range(32)
        ]
        old, disk.log = log(disk), DirtyLog(highest_page(disk.memory))
        disk.set_log()
        disk.wait(*requests)
        union |= old.pages()
        wanted |= pages(*[buffer for request in requests for buffer in request.into])
        old.close()
    union |= log(disk).pages()
    assert wanted <= union


def test_a_log_too_short_for_a_buffer_is_never_overrun(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent, queues=2)
    disk.start_log(DirtyLog(64), ring=False)  # covers the first 256 KiB only
    high = disk.memory.alloc(PAGE, PAGE, 1)
    status = disk.memory.alloc(1, region=1)
    header = disk.memory.alloc(16)
    disk.memory.write(header, HEADER.pack(Type.IN, 0, 0))
    disk.submit_buffers(
        [Buffer(header, 16, False)], [Buffer(high, PAGE, True), Buffer(status, 1, True)]
    )
    assert "log" in agent.wait_broken()
    assert agent.control.status()["clients"] == 1
