"""Requests in any descriptor layout, queue size and number of queues.

The virtio specification lets a driver cut a request into descriptors as it likes; nothing may
depend on the usual header/data/status framing. Where QEMU's server handles a layout too, the
test runs against both.
"""

from __future__ import annotations

import os
import random

import pytest
from conftest import Attach
from frontend import (
    MIB,
    PLAIN,
    SECTOR,
    Buffer,
    Disk,
    GuestMemory,
    Layout,
    RegionSpec,
    Status,
    Type,
)
from frontend.blk import HEADER
from harness import Daemon, StorageDaemon

Server = Daemon | StorageDaemon

LAYOUTS = {
    "usual": PLAIN,
    "usual, indirect": Layout(indirect=0),
    "header in single bytes": Layout(out=[1] * 16),
    "header in single bytes, indirect": Layout(out=[1] * 16, indirect=0),
    "header and data together": Layout(out=[16 + 4096]),
    "header ends inside a data descriptor": Layout(out=[10, 4000]),
    "status is the last byte of the data": Layout(into=[4097]),
    "status behind the last byte of cut data": Layout(into=[1000, 3097]),
    "two descriptors in all": Layout(out=[16 + 4096], into=[4097], indirect=0),
    "data in odd pieces": Layout(out=[16, 1, 511, 3, 700], into=[5, 512, 1, 1000]),
    "data in single sectors": Layout(out=[16] + [512] * 8, into=[512] * 8),
    "data over two regions": Layout(out=[16, 1024, 1024], into=[1024, 1024], regions=[0, 1]),
    "rings and data in different regions": Layout(regions=[1], indirect=0),
    "addresses off any alignment": Layout(out=[16, 511], into=[513], skew=3),
    "addresses off by a sector": Layout(out=[16, 2048], into=[2048], skew=512),
    "all of it": Layout(out=[1, 3, 12, 7, 509], into=[2, 1023], indirect=0, regions=[1, 0], skew=1),
}


@pytest.fixture(params=["epochd", "qemu"])
def server(request: pytest.FixtureRequest) -> Server:
    """Both servers, one after the other."""
    name = {"epochd": "shared", "qemu": "qemu"}[request.param]
    found: Server = request.getfixturevalue(name)
    return found


def exercise(disk: Disk, layout: Layout) -> None:
    """Write, read back, discard, read zeroes, get-id, flush: all in one layout."""
    disk.layout = layout
    data = os.urandom(4096)
    disk.write(24, data)
    assert disk.read(24, 8) == data
    assert disk.read(25, 2) == data[512:1536]
    disk.flush()
    disk.get_id()
    disk.write_zeroes(26, 3)
    assert disk.read(24, 8) == data[:1024] + bytes(1536) + data[2560:]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_works(server: Server, attach: Attach, name: str) -> None:
    exercise(attach(server), LAYOUTS[name])


@pytest.mark.parametrize("direct", [1, 2, 3])
def test_descriptors_may_precede_the_indirect_table(
    shared: Daemon, attach: Attach, direct: int
) -> None:
    exercise(attach(shared), Layout(indirect=direct))


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts_work(server: Server, attach: Attach, seed: int) -> None:
    chance = random.Random(seed)
    disk = attach(server)

    def pieces() -> list[int]:
        return [chance.choice([1, 2, 15, 16, 511, 512, 513, 4096]) for _ in range(20)]

    for _ in range(20):
        exercise(
            disk,
            Layout(
                out=pieces(),
                into=pieces(),
                indirect=chance.choice([None, 0]),
                regions=chance.choice([[0], [1], [0, 1], [1, 1, 0]]),
                skew=chance.choice([0, 0, 1, 16, 511]),
            ),
        )


@pytest.mark.parametrize("indirect", [None, 0])
def test_as_many_segments_as_advertised_work(
    server: Server, attach: Attach, indirect: int | None
) -> None:
    disk = attach(server, queue_size=128)
    count = disk.config().seg_max
    assert count >= 126
    data = os.urandom(SECTOR * count)
    sizes = [SECTOR] * count
    layout = Layout(out=[16, *sizes], into=sizes, indirect=indirect)
    disk.write(0, data, layout=layout)
    assert disk.read(0, count, layout=layout) == data


@pytest.mark.parametrize("write", [True, False])
def test_a_buffer_may_cross_adjacent_regions(server: Server, attach: Attach, write: bool) -> None:
    border = 4 * MIB
    specs = [
        RegionSpec(0, border, 0x7F10_0000_0000),
        RegionSpec(border, MIB, 0x7F50_0000_0000),
    ]
    with GuestMemory(specs) as memory:
        disk = attach(server, memory=memory)
        data = os.urandom(4096)
        header, status = memory.alloc(16), memory.alloc(1)
        memory.write(header, HEADER.pack(Type.OUT if write else Type.IN, 0, 8))
        memory.write(border - 1000, data if write else bytes(4096))
        if not write:
            disk.write(8, data)
        buffer = Buffer(border - 1000, 4096, not write)
        out = [Buffer(header, 16, False), *([buffer] if write else [])]
        into = [*([] if write else [buffer]), Buffer(status, 1, True)]
        request = disk.submit_buffers(out, into)
        disk.wait(request)
        assert request.status == Status.OK
        assert memory.read(border - 1000, 4096) == data
        assert disk.read(8, 8) == data
        disk.close()


# ---- queues -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4, 8, 64, 256, 512, 1024])
def test_a_queue_size_works_around_its_ring(server: Server, attach: Attach, size: int) -> None:
    disk = attach(server, queue_size=size)
    tight = Layout(out=[16 + 1024], into=[1025])
    data = [os.urandom(1024) for _ in range(16)]
    for turn in range(2 * size // 16 + 3):
        for place in range(0, 16, min(size // 2, 16)):
            batch = range(place, place + min(size // 2, 16))
            writes = [disk.submit(Type.OUT, 2 * i, data[i], layout=tight) for i in batch]
            disk.wait(*writes)
        picked = turn % 16
        assert disk.read(2 * picked, 2, layout=tight) == data[picked]


def test_a_full_queue_published_at_once_is_served(server: Server, attach: Attach) -> None:
    disk = attach(server, queue_size=128)
    data = [os.urandom(4096) for _ in range(128)]
    writes = [
        disk.submit(Type.OUT, 8 * i, data[i], layout=Layout(indirect=0), publish=False)
        for i in range(128)
    ]
    disk.queues[0].publish()
    disk.wait(*writes)
    assert {request.status for request in writes} == {Status.OK}
    reads = [
        disk.submit(Type.IN, 8 * i, room=4096, layout=Layout(indirect=0), publish=False)
        for i in range(128)
    ]
    disk.queues[0].publish()
    disk.wait(*reads)
    assert [request.data for request in reads] == data


def test_the_ring_indexes_wrap_around_16_bits(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared, start=False)
    disk.negotiate()
    disk.acknowledge()
    disk.share_memory()
    disk.start_queue(disk.make_queue(0, 128, base=65500), base=65500)
    for turn in range(20):
        batch = [disk.submit(Type.OUT, i, bytes([turn]) * 512) for i in range(16)]
        disk.wait(*batch)
        assert disk.read(7, 1) == bytes([turn]) * 512
    assert disk.queues[0].used_idx < 65500


def test_all_queues_serve_at_once(server: Server, attach: Attach) -> None:
    disk = attach(server, queue_size=64)
    count = disk.queue_count()
    assert count >= 4
    for index in range(1, count):
        disk.start_queue(disk.make_queue(index, 64))
    chance = random.Random(5)
    expected = {}
    for turn in range(10):
        requests = []
        for queue in range(count):
            for place in range(8):
                sector = 8 * (queue * 8 + place)
                expected[sector] = chance.randbytes(4096)
                requests.append(disk.submit(Type.OUT, sector, expected[sector], queue=queue))
        disk.wait(*requests)
        assert {request.status for request in requests} == {Status.OK}
        for sector, data in chance.sample(sorted(expected.items()), 16):
            assert disk.read(sector, 8, queue=turn % count) == data


def test_writes_of_one_block_in_flight_together_leave_one_of_them(
    server: Server, attach: Attach
) -> None:
    disk = attach(server, queues=2)
    versions = [bytes([value]) * 4096 for value in range(32)]
    requests = [
        disk.submit(Type.OUT, 0, version, queue=value % 2) for value, version in enumerate(versions)
    ]
    disk.wait(*requests)
    assert disk.read(0, 8) in versions
