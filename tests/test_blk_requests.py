"""Every kind of block request and its edge cases: the status each of them ends with.

Most tests run against epochd and against QEMU's own vhost-user-blk server. Where both must
agree, QEMU shows that the test asks for what the field does, not for what epochd happens to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon
from frontend import (
    SECTOR,
    SEGMENT,
    UNMAP,
    UNTOUCHED,
    BlkRequest,
    Disk,
    Feature,
    Status,
    Type,
)
from harness import Daemon, DiskSpec, StorageDaemon

SECTORS = (64 << 20) // SECTOR
Server = Daemon | StorageDaemon


@pytest.fixture(params=["epochd", "qemu"])
def server(request: pytest.FixtureRequest) -> Server:
    """Both servers, one after the other."""
    name = {"epochd": "shared", "qemu": "qemu"}[request.param]
    found: Server = request.getfixturevalue(name)
    return found


@pytest.fixture
def disk(server: Server, attach: Attach) -> Disk:
    return attach(server)


@pytest.fixture
def own(shared: Daemon, attach: Attach) -> Disk:
    """A front end on epochd only."""
    return attach(shared)


@pytest.fixture(scope="module", params=["epochd", "qemu"])
def read_only(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of a read-only disk."""
    folder = tmp_path_factory.mktemp("ro")
    made: Server
    if request.param == "qemu":
        made = StorageDaemon(folder, read_only=True)
    else:
        made = Daemon(folder, [DiskSpec(read_only=True)]).start()
    yield made
    made.close()
    assert made.complaints() == []


def segment(disk: Disk, kind: Type, sector: int, sectors: int, flags: int = 0) -> BlkRequest:
    """A DISCARD or WRITE_ZEROES with one segment."""
    return disk.request(kind, payload=SEGMENT.pack(sector, sectors, flags))


# ---- reads and writes ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [512, 1024, 3584, 4096, 4608, 65536, 1 << 20, 4 << 20])
def test_what_is_written_is_read_back(disk: Disk, size: int) -> None:
    data = os.urandom(size)
    disk.write(3, data)
    assert disk.read(3, size // SECTOR) == data


def test_a_write_changes_no_neighbour(disk: Disk) -> None:
    around = os.urandom(16 * SECTOR)
    disk.write(100, around)
    disk.write(105, b"\xee" * SECTOR)
    assert disk.read(100, 16) == around[: 5 * SECTOR] + b"\xee" * SECTOR + around[6 * SECTOR :]


def test_a_fresh_image_reads_as_zeroes(epochd: StartDaemon, attach: Attach) -> None:
    disk = attach(epochd())
    assert disk.read(SECTORS - 256, 256) == bytes(256 * SECTOR)


def test_the_last_sector_can_be_written_and_read(disk: Disk) -> None:
    data = os.urandom(SECTOR)
    disk.write(SECTORS - 1, data)
    assert disk.read(SECTORS - 1, 1) == data


def test_used_length_is_what_the_device_wrote(own: Disk) -> None:
    read = own.request(Type.IN, 0, room=4096)
    assert (read.status, read.written) == (Status.OK, 4097)
    write = own.request(Type.OUT, 0, bytes(4096))
    assert (write.status, write.written) == (Status.OK, 1)
    flush = own.request(Type.FLUSH)
    assert (flush.status, flush.written) == (Status.OK, 1)


@pytest.mark.parametrize(
    ("sector", "sectors"),
    [
        (SECTORS, 1),
        (SECTORS - 1, 2),
        (SECTORS - 7, 8),
        (SECTORS + 1, 1),
        (1 << 32, 1),
        (1 << 54, 8),
        ((1 << 55) - 1, 1),
        (1 << 55, 8),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 8, 16),
    ],
)
def test_a_request_beyond_the_end_is_an_io_error(disk: Disk, sector: int, sectors: int) -> None:
    last = disk.read(SECTORS - 8, 8)
    for kind in (Type.DISCARD, Type.WRITE_ZEROES):
        assert segment(disk, kind, sector, sectors).status == Status.IOERR
    assert disk.request(Type.OUT, sector, bytes(sectors * SECTOR)).status == Status.IOERR
    assert disk.request(Type.IN, sector, room=sectors * SECTOR).status == Status.IOERR
    assert disk.read(SECTORS - 8, 8) == last


@pytest.mark.parametrize("size", [1, 100, 511, 513, 4095])
def test_a_length_that_is_no_multiple_of_512_is_an_io_error(disk: Disk, size: int) -> None:
    before = disk.read(0, 16)
    assert disk.request(Type.OUT, 0, b"\xee" * size).status == Status.IOERR
    assert disk.request(Type.IN, 0, room=size).status == Status.IOERR
    assert disk.read(0, 16) == before


def test_a_request_without_data_is_fine_within_the_disk(disk: Disk) -> None:
    for sector in (0, 17, SECTORS):
        assert disk.request(Type.IN, sector).status == Status.OK
        assert disk.request(Type.OUT, sector).status == Status.OK
    assert disk.request(Type.IN, SECTORS + 1).status == Status.IOERR
    assert disk.request(Type.OUT, SECTORS + 1).status == Status.IOERR


def test_a_failed_read_leaves_no_foreign_bytes_and_says_how_much_it_wrote(own: Disk) -> None:
    request = own.request(Type.IN, SECTORS, room=4096)
    assert request.status == Status.IOERR
    assert set(request.data) <= {0, UNTOUCHED}
    assert request.written is not None
    assert 1 <= request.written <= 4097


def test_the_reserved_field_of_the_header_is_ignored(disk: Disk) -> None:
    request = disk.submit(Type.IN, 0, room=SECTOR, reserved=0xFFFFFFFF)
    disk.wait(request)
    assert request.status == Status.OK


def test_a_write_with_room_beside_the_status_leaves_the_room_alone(disk: Disk) -> None:
    data = os.urandom(4096)
    request = disk.request(Type.OUT, 40, data, room=64)
    assert (request.status, request.data) == (Status.OK, bytes([UNTOUCHED]) * 64)
    assert disk.read(40, 8) == data


def test_a_read_with_readable_bytes_behind_the_header_ignores_them(disk: Disk) -> None:
    data = os.urandom(4096)
    disk.write(48, data)
    request = disk.request(Type.IN, 48, b"\xee" * 512, room=4096)
    assert (request.status, request.data) == (Status.OK, data)


# ---- other kinds --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [2, 3, 5, 6, 7, 9, Type.GET_LIFETIME, 12, Type.SECURE_ERASE, 15, 99, 0x7FFFFFFF]
)
def test_an_unknown_request_is_unsupported(disk: Disk, kind: int) -> None:
    before = disk.read(0, 8)
    assert disk.request(kind, 0, b"\xee" * 512, room=512).status == Status.UNSUPP
    assert disk.read(0, 8) == before


def test_flush_ends_well_whatever_its_sector(disk: Disk) -> None:
    assert disk.request(Type.FLUSH, 0).status == Status.OK
    assert disk.request(Type.FLUSH, (1 << 64) - 1).status == Status.OK


def test_get_id_gives_the_serial_padded_to_20_bytes(epochd: StartDaemon, attach: Attach) -> None:
    disk = attach(epochd(DiskSpec(serial="S3RIAL-7")))
    assert disk.get_id() == b"S3RIAL-7".ljust(20, b"\0")


def test_get_id_of_20_characters_has_no_terminator(epochd: StartDaemon, attach: Attach) -> None:
    disk = attach(epochd(DiskSpec(serial="0123456789abcdefghij")))
    assert disk.get_id() == b"0123456789abcdefghij"


@pytest.mark.parametrize("room", [0, 1, 8, 20, 21, 512])
def test_get_id_fits_any_room(disk: Disk, room: int) -> None:
    whole = disk.get_id()
    request = disk.request(Type.GET_ID, room=room)
    assert request.status == Status.OK
    assert request.data[:20] == whole[:room]
    assert set(request.data[20:]) <= {UNTOUCHED}


# ---- DISCARD and WRITE_ZEROES -------------------------------------------------------------

RANGES = pytest.mark.parametrize("kind", [Type.DISCARD, Type.WRITE_ZEROES])


@RANGES
@pytest.mark.parametrize(("first", "count"), [(64, 64), (65, 3), (71, 10), (64, 1)])
def test_a_range_reads_as_zeroes_afterwards(own: Disk, kind: Type, first: int, count: int) -> None:
    around = os.urandom(128 * SECTOR)
    own.write(32, around)
    assert segment(own, kind, first, count).status == Status.OK
    start, end = (first - 32) * SECTOR, (first - 32 + count) * SECTOR
    assert own.read(32, 128) == around[:start] + bytes(end - start) + around[end:]


def test_write_zeroes_may_unmap(disk: Disk) -> None:
    disk.write(64, os.urandom(8192))
    assert segment(disk, Type.WRITE_ZEROES, 64, 16, UNMAP).status == Status.OK
    assert disk.read(64, 16) == bytes(8192)


@RANGES
def test_a_range_of_no_sectors_is_fine(disk: Disk, kind: Type) -> None:
    data = os.urandom(512)
    disk.write(9, data)
    assert segment(disk, kind, 9, 0).status == Status.OK
    assert disk.read(9, 1) == data


@RANGES
@pytest.mark.parametrize("count", [2, 3, 16])
def test_more_than_one_segment_is_unsupported(disk: Disk, kind: Type, count: int) -> None:
    data = os.urandom(4096)
    disk.write(0, data)
    assert disk.request(kind, payload=SEGMENT.pack(0, 1, 0) * count).status == Status.UNSUPP
    assert disk.read(0, 8) == data


@RANGES
@pytest.mark.parametrize("size", [0, 1, 8, 15])
def test_a_short_segment_is_an_io_error(disk: Disk, kind: Type, size: int) -> None:
    payload = SEGMENT.pack(0, 1, 0)[:size]
    assert disk.request(kind, payload=payload).status == Status.IOERR


@RANGES
@pytest.mark.parametrize("flags", [2, 3, 4, 0x80000000, 0xFFFFFFFE])
def test_unknown_flags_of_a_segment_are_unsupported(disk: Disk, kind: Type, flags: int) -> None:
    data = os.urandom(512)
    disk.write(0, data)
    assert segment(disk, kind, 0, 1, flags).status == Status.UNSUPP
    assert disk.read(0, 1) == data


def test_the_unmap_flag_on_a_discard_is_unsupported(disk: Disk) -> None:
    assert segment(disk, Type.DISCARD, 0, 8, UNMAP).status == Status.UNSUPP


@RANGES
def test_more_sectors_than_advertised_are_an_io_error(disk: Disk, kind: Type) -> None:
    config = disk.config()
    limit = {
        Type.DISCARD: config.max_discard_sectors,
        Type.WRITE_ZEROES: config.max_write_zeroes_sectors,
    }[kind]
    assert limit > 0
    assert segment(disk, kind, 0, limit + 1).status == Status.IOERR
    assert segment(disk, kind, 0, 0xFFFFFFFF).status == Status.IOERR


@RANGES
def test_the_whole_disk_can_be_zeroed_at_once(
    epochd: StartDaemon, attach: Attach, kind: Type
) -> None:
    daemon = epochd(arena="8M")
    disk = attach(daemon)
    for sector in (0, 8000, SECTORS - 8):
        disk.write(sector, os.urandom(4096))
    assert segment(disk, kind, 0, SECTORS).status == Status.OK
    for sector in (0, 8000, SECTORS - 8):
        assert disk.read(sector, 8) == bytes(4096)
    daemon.control.checkpoint()
    daemon.stop("quit")
    assert not any(daemon.image_bytes())


# ---- read-only disks ----------------------------------------------------------------------


def test_a_read_only_disk_says_so_and_refuses_to_change(read_only: Server, attach: Attach) -> None:
    disk = attach(read_only)
    assert disk.features & Feature.BLK_RO
    assert disk.request(Type.OUT, 0, bytes(512)).status == Status.IOERR
    for kind in (Type.DISCARD, Type.WRITE_ZEROES):
        assert segment(disk, kind, 0, 8).status == Status.IOERR
    assert disk.read(0, 8) == bytes(4096)
    assert disk.request(Type.FLUSH).status == Status.OK
    assert disk.request(Type.GET_ID, room=20).status == Status.OK
    assert disk.request(99).status == Status.UNSUPP


def test_a_read_only_image_is_not_written(epochd: StartDaemon, tmp_path: Path) -> None:
    image = tmp_path / "ro.img"
    image.write_bytes(b"\x5a" * (1 << 20))
    image.chmod(0o444)
    before = image.stat().st_mtime_ns
    daemon = epochd(DiskSpec(image=image, read_only=True))
    with Disk(daemon.socket()).start() as disk:
        assert disk.read(0, 8) == b"\x5a" * 4096
        assert disk.request(Type.OUT, 0, bytes(512)).status == Status.IOERR
    daemon.control.checkpoint()
    daemon.stop("quit")
    assert image.stat().st_mtime_ns == before
    assert image.read_bytes() == b"\x5a" * (1 << 20)


# ---- counters -----------------------------------------------------------------------------


def test_statistics_count_requests_by_kind(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    disk.write(0, bytes(8192))
    disk.write(0, bytes(512))
    disk.read(0, 8)
    disk.flush()
    disk.discard(0, 8)
    disk.write_zeroes(0, 8)
    disk.get_id()
    disk.request(99)
    disk.request(Type.IN, SECTORS, room=512)
    counted = agent.disk_info()["stats"]
    assert counted["writes"] == 2
    assert counted["write-bytes"] == 8704
    assert counted["reads"] >= 1
    assert counted["read-bytes"] >= 4096
    assert counted["flushes"] == 1
    assert counted["discards"] == 1
    assert counted["write-zeroes"] == 1
    assert counted["get-ids"] == 1
    assert counted["unsupported"] == 1
    assert counted["errors"] == 1
