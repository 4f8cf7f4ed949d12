"""Disks that answer with errors: EIO on write and on fdatasync, writes that end short.

The daemon's files lie in a file system that fails when told to (tests/faultfs). Its failed
fdatasync loses what it should have made durable, and a power cut in it loses all that no good
fdatasync covers: who takes a flush for granted, or asks for it once more instead of writing
once more, loses data here. Every test ends with such a cut.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon
from faultfs import FaultFs
from frontend import INDIRECT, Disk, RequestFailed, Status, Type
from harness import ControlError, Daemon, DiskSpec, until

MIB = 1 << 20
PART = 64 << 10
EIO = os.strerror(errno.EIO)
SIZE = 16 * MIB


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[FaultFs]:
    """Ask for it before the daemons that use it."""
    with FaultFs(tmp_path / "faults") as faulty:
        yield faulty


@pytest.fixture
def daemon(faults: FaultFs, epochd: StartDaemon) -> Daemon:
    """One disk; image and journal in the faulty file system."""
    image = faults.root / "disk0.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    options = ["--state-dir", str(faults.root), "--compress-level", "0"]
    started: Daemon = epochd(DiskSpec(image=image, size=SIZE), arena="8M", options=options)
    return started


def write(disk: Disk, start: int, data: bytes) -> None:
    for at in range(0, len(data), PART):
        disk.write((start + at) // 512, data[at : at + PART], layout=INDIRECT)


def read(disk: Disk, start: int, size: int) -> bytes:
    parts = range(start, start + size, PART)
    return b"".join(disk.read(at // 512, PART // 512, layout=INDIRECT) for at in parts)


def told(daemon: Daemon, what: str, since: int = 0) -> None:
    """The reason is in an event, in the status and in the log."""
    event = daemon.control.wait_event(
        "IO_ERROR", since=since, where=lambda data: what in data["desc"]
    )
    assert EIO in event["data"]["desc"]
    assert EIO in daemon.control.status()["error"]
    lines = [line for line in daemon.log().splitlines() if EIO in line]
    assert any(what in line for line in lines), lines


def host_dies(daemon: Daemon, faults: FaultFs, disk: Disk) -> None:
    """A power cut: the agent, its arena and all that no fdatasync covers are gone."""
    disk.close()
    daemon.stop("kill")
    faults.power_cut()
    daemon.lose_shm()


# ---- The journal --------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["write", "sync"])
@pytest.mark.parametrize("agent_dies", [False, True], ids=["", "killed"])
def test_a_commit_that_the_journal_refuses_can_be_repeated(
    daemon: Daemon, faults: FaultFs, attach: Attach, op: str, agent_dies: bool
) -> None:
    disk = attach(daemon, inflight=True)
    first, second = os.urandom(MIB), os.urandom(MIB)
    write(disk, 0, first)
    done = daemon.control.checkpoint()
    daemon.control.wait_applied(done)
    write(disk, MIB // 2, second)
    epoch = daemon.control.seal()
    faults.fail(op, "journal")
    for _ in range(2):
        with pytest.raises(ControlError, match=EIO):
            daemon.control.commit(epoch)
    assert faults.hits() >= 2
    told(daemon, "journal")
    status = daemon.control.status()
    assert (status["committed"], status["sealed"]) == (done, [epoch])
    # The guest does not notice, and nothing of it reached the image.
    write(disk, 4 * MIB, first)
    expected = first[: MIB // 2] + second
    assert read(disk, 0, MIB + MIB // 2) == expected
    assert daemon.image_bytes()[: 2 * MIB] == first + bytes(MIB)
    faults.heal()
    if agent_dies:
        daemon.restart("kill")
        disk.reconnect()
        status = daemon.control.status()
        assert (status["committed"], status["sealed"]) == (done, [epoch])
    assert daemon.control.commit(epoch) == epoch
    until("the reason to go", lambda: daemon.control.status()["error"] == "")
    host_dies(daemon, faults, disk)
    daemon.start()
    assert daemon.control.status()["committed"] == epoch
    disk = attach(daemon)
    assert read(disk, 0, MIB + MIB // 2) == expected
    assert read(disk, 4 * MIB, MIB) == bytes(MIB)  # it was in the open epoch


def test_a_refused_commit_is_not_there_after_a_power_cut(
    daemon: Daemon, faults: FaultFs, attach: Attach
) -> None:
    disk = attach(daemon)
    write(disk, 0, b"\x11" * MIB)
    done = daemon.control.checkpoint()
    write(disk, 0, b"\x22" * MIB)
    faults.fail("sync", "journal")
    with pytest.raises(ControlError, match=EIO):
        daemon.control.checkpoint()
    host_dies(daemon, faults, disk)
    faults.heal()
    daemon.start()
    assert daemon.control.status()["committed"] == done
    assert read(attach(daemon), 0, MIB) == b"\x11" * MIB


def test_a_journal_write_that_ends_short_is_no_commit(
    daemon: Daemon, faults: FaultFs, attach: Attach
) -> None:
    disk = attach(daemon)
    data = os.urandom(MIB)
    write(disk, 0, data)
    epoch = daemon.control.seal()
    faults.fill_up("journal")
    # The kernel's FUSE makes EIO of a write that ends short.
    with pytest.raises(ControlError, match=f"{EIO}|{os.strerror(errno.ENOSPC)}"):
        daemon.control.commit(epoch)
    assert daemon.control.status()["sealed"] == [epoch]
    faults.heal()
    assert daemon.control.commit(epoch) == epoch
    host_dies(daemon, faults, disk)
    daemon.start()
    assert read(attach(daemon), 0, MIB) == data


def test_a_discard_after_a_refused_commit_leaves_nothing_of_it(
    daemon: Daemon, faults: FaultFs, attach: Attach
) -> None:
    """`keep`: the record is whole on the medium, though its commit was refused."""
    disk = attach(daemon)
    write(disk, 0, b"\x11" * MIB)
    done = daemon.control.checkpoint()
    write(disk, 0, b"\x22" * MIB)
    epoch = daemon.control.seal()
    faults.fail("sync", "journal", lose=False)
    with pytest.raises(ControlError, match=EIO):
        daemon.control.commit(epoch)
    with pytest.raises(ControlError, match=EIO):  # cannot be made void, so cannot be dropped
        daemon.control.discard()
    assert read(disk, 0, MIB) == b"\x22" * MIB
    faults.heal()
    assert epoch in daemon.control.discard()
    assert read(disk, 0, MIB) == b"\x11" * MIB
    host_dies(daemon, faults, disk)
    daemon.start()
    assert daemon.control.status()["committed"] == done
    assert read(attach(daemon), 0, MIB) == b"\x11" * MIB


def test_a_survivors_flush_waits_until_the_journal_takes_it(
    daemon: Daemon, faults: FaultFs, attach: Attach
) -> None:
    """After promote a flush is a commit; the guest gets no error but waits."""
    disk = attach(daemon)
    daemon.control.execute("promote")
    write(disk, 0, b"\x11" * MIB)
    faults.fail("sync", "journal")
    flush = disk.submit(Type.FLUSH)
    told(daemon, "journal")
    disk.reap()
    assert not flush.done
    assert read(disk, 0, MIB) == b"\x11" * MIB
    faults.heal()
    disk.wait(flush)
    assert flush.status == Status.OK
    host_dies(daemon, faults, disk)
    daemon.start()
    assert read(attach(daemon), 0, MIB) == b"\x11" * MIB


# ---- The image ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["write", "sync"])
def test_an_image_that_fails_gets_everything_once_it_works(
    daemon: Daemon, faults: FaultFs, attach: Attach, op: str
) -> None:
    disk = attach(daemon)
    first, second = os.urandom(MIB), os.urandom(MIB)
    write(disk, 0, first)
    faults.fail(op, "disk0.img")
    epoch = daemon.control.checkpoint()  # the journal has it
    told(daemon, "disk0")
    write(disk, MIB // 2, second)
    later = daemon.control.checkpoint()
    expected = first[: MIB // 2] + second
    assert read(disk, 0, MIB + MIB // 2) == expected
    status = daemon.control.status()
    assert (status["committed"], status["sealed"]) == (later, [])
    assert status["applied"] < epoch
    faults.heal()
    daemon.control.wait_applied(later)
    assert daemon.control.status()["error"] == ""
    # The journal's head has moved: the image must hold it by itself.
    host_dies(daemon, faults, disk)
    assert daemon.image_bytes()[: MIB + MIB // 2] == expected
    daemon.start()
    assert read(attach(daemon), 0, MIB + MIB // 2) == expected


@pytest.mark.parametrize("op", ["write", "sync"])
@pytest.mark.parametrize("how", ["killed", "power cut"])
def test_an_agent_starts_on_an_image_that_fails(
    daemon: Daemon, faults: FaultFs, attach: Attach, op: str, how: str
) -> None:
    disk = attach(daemon)
    data = os.urandom(2 * MIB)
    write(disk, 0, data)
    faults.fail(op, "disk0.img")
    epoch = daemon.control.checkpoint()
    told(daemon, "disk0")
    if how == "killed":
        disk.close()
        daemon.stop("kill")
    else:
        host_dies(daemon, faults, disk)
    daemon.start()
    assert daemon.control.commit(epoch) == epoch
    disk = attach(daemon)
    assert read(disk, 0, 2 * MIB) == data
    until("the error to be in the status", lambda: EIO in daemon.control.status()["error"])
    assert daemon.control.status()["applied"] < epoch
    faults.heal()
    daemon.control.wait_applied(epoch)
    host_dies(daemon, faults, disk)
    assert daemon.image_bytes()[: 2 * MIB] == data


def test_a_journal_head_that_cannot_be_written_stays_where_it_was(
    daemon: Daemon, faults: FaultFs, attach: Attach
) -> None:
    """The image is up to date, the superblock that would say so is lost."""
    disk = attach(daemon)
    data = os.urandom(MIB)
    write(disk, 0, data)
    faults.fail("write", "disk0.img")
    epoch = daemon.control.checkpoint()
    told(daemon, "disk0")
    faults.heal()
    faults.fail("sync", "journal")
    told(daemon, "journal")
    assert daemon.control.status()["applied"] < epoch
    assert daemon.control.commit(epoch) == epoch
    assert read(disk, 0, MIB) == data
    host_dies(daemon, faults, disk)
    faults.heal()
    daemon.start()
    assert daemon.control.status()["committed"] == epoch
    daemon.control.wait_applied(epoch)
    assert read(attach(daemon), 0, MIB) == data


def test_zeroes_that_an_image_refuses_come_later(
    daemon: Daemon, faults: FaultFs, attach: Attach
) -> None:
    disk = attach(daemon)
    sectors = MIB // 512  # many blocks at once: a small range is written as blocks
    write(disk, 0, b"\x11" * 3 * MIB)
    daemon.control.wait_applied(daemon.control.checkpoint())
    disk.write_zeroes(0, sectors)
    disk.discard(sectors, sectors)
    faults.fail("zero", "disk0.img")
    epoch = daemon.control.checkpoint()
    told(daemon, "disk0")
    assert read(disk, 0, 3 * MIB) == bytes(2 * MIB) + b"\x11" * MIB
    faults.heal()
    daemon.control.wait_applied(epoch)
    host_dies(daemon, faults, disk)
    assert daemon.image_bytes()[: 3 * MIB] == bytes(2 * MIB) + b"\x11" * MIB


def test_a_sector_that_cannot_be_read_is_an_error_of_that_request_alone(
    daemon: Daemon, faults: FaultFs, attach: Attach
) -> None:
    disk = attach(daemon)
    write(disk, 0, b"\x11" * PART)
    faults.fail("read", "disk0.img")
    with pytest.raises(RequestFailed, match="IOERR"):
        disk.read(8 * MIB // 512, 8)
    assert read(disk, 0, PART) == b"\x11" * PART  # in the epoch, needs no image
    until("the reason in the log", lambda: EIO in daemon.log())
    faults.heal()
    assert disk.read(8 * MIB // 512, 8) == bytes(4096)


# ---- The start ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["read", "write", "sync"])
def test_a_start_that_a_failing_journal_stops_can_be_repeated(
    daemon: Daemon, faults: FaultFs, attach: Attach, op: str
) -> None:
    disk = attach(daemon)
    data = os.urandom(MIB)
    write(disk, 0, data)
    faults.fail("write", "disk0.img")
    epoch = daemon.control.checkpoint()
    host_dies(daemon, faults, disk)
    faults.heal()
    faults.fail(op, "journal")
    with pytest.raises(RuntimeError, match=EIO):
        daemon.start()
    assert daemon.exit_status == 4
    assert "journal" in daemon.log().splitlines()[-1]
    faults.heal()
    daemon.start()
    assert daemon.control.status()["committed"] == epoch
    assert read(attach(daemon), 0, MIB) == data
