"""`on-full = "spill"`: what the arena has no room for goes on in a file."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon
from frontend import (
    INDIRECT,
    BlkRequest,
    Disk,
    GuestMemory,
    RegionSpec,
    RequestFailed,
    Status,
    Type,
)
from harness import ControlError, Daemon, DiskSpec, mounted, until

MIB = 1 << 20
CHUNK = 256 << 10
SPILL = ["--on-full", "spill", "--spill-size", "40M"]
RAW = ["--compress-level", "0"]
ARENA = "8M"
FILLED = 24 * MIB  # three times the arena


def noise(seed: int, size: int = FILLED) -> bytes:
    """Bytes that do not compress."""
    return random.Random(seed).randbytes(size)


def write(disk: Disk, data: bytes, start: int = 0) -> None:
    for at in range(0, len(data), CHUNK):
        disk.write((start + at) // 512, data[at : at + CHUNK], layout=INDIRECT)


def read(disk: Disk, size: int = FILLED, start: int = 0) -> bytes:
    parts = range(start, start + size, CHUNK)
    return b"".join(disk.read(at // 512, CHUNK // 512, layout=INDIRECT) for at in parts)


def submit_all(disk: Disk, data: bytes, start: int = 0) -> list[BlkRequest]:
    """Write without waiting."""
    return [
        disk.submit(Type.OUT, (start + at) // 512, data[at : at + CHUNK], layout=INDIRECT)
        for at in range(0, len(data), CHUNK)
    ]


def roomy() -> GuestMemory:
    """Guest memory that holds many requests at once."""
    return GuestMemory([RegionSpec(guest=0, size=64 * MIB, user=0x7F10_0000_0000)])


def fill(root: Path) -> Path:
    """A file that takes all the room of a file system."""
    path = root / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def spill_path(daemon: Daemon) -> Path:
    return daemon.folder / "disk0.img.epochd-spill"


def used(daemon: Daemon) -> int:
    return int(daemon.control.status()["spill"]["used"])


def refused(daemon: Daemon, *words: str) -> None:
    """The daemon must not start, with status 4 and these words."""
    with pytest.raises(RuntimeError):
        daemon.start()
    assert daemon.exit_status == 4
    last = daemon.log().splitlines()[-1]
    assert [word for word in words if word not in last] == [], last


@pytest.fixture
def spilling(epochd: StartDaemon) -> Daemon:
    return epochd(arena=ARENA, options=[*SPILL, *RAW])


# ---- an epoch larger than the arena ---------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1])
def test_an_epoch_far_larger_than_the_arena_is_taken_read_back_and_committed(
    epochd: StartDaemon, attach: Attach, level: int
) -> None:
    daemon = epochd(arena=ARENA, options=[*SPILL, "--compress-level", str(level)])
    disk = attach(daemon)
    data = noise(1)
    write(disk, data)
    status = daemon.control.status()
    assert status["arena"]["used"] <= status["arena"]["size"] < 8 * MIB
    assert FILLED - 8 * MIB <= status["spill"]["used"] <= status["spill"]["size"] <= 40 * MIB
    assert status["held"] == 0
    assert read(disk) == data
    epoch = daemon.control.seal()
    disk.write(8, b"\x55" * 4096)
    assert daemon.control.commit(epoch) == epoch
    daemon.control.wait_applied(epoch)
    assert daemon.image_bytes()[:FILLED] == data
    assert read(disk) == data[:4096] + b"\x55" * 4096 + data[8192:]
    until("the spill file to be empty", lambda: used(daemon) == 0)
    assert daemon.disk_info()["stats"]["errors"] == 0


def test_what_was_committed_from_the_spill_file_is_in_the_journal(
    tmp_path: Path, epochd: StartDaemon, attach: Attach
) -> None:
    """After a reboot the journal gives it back, more than the arena can take alone."""
    with mounted(tmp_path, 64) as root:
        image = root / "disk0.img"
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        filler = fill(root)  # nothing can be applied
        daemon = epochd(DiskSpec(image=image), arena=ARENA, options=[*SPILL, *RAW])
        disk = attach(daemon)
        data = noise(2)
        write(disk, data)
        epoch = daemon.control.checkpoint()
        daemon.control.wait_event("IO_ERROR")
        disk.close()
        daemon.stop("kill")
        daemon.lose_shm()
        daemon.start()
        status = daemon.control.status()
        assert status["committed"] == epoch
        assert status["applied"] < epoch
        assert status["spill"]["used"] > 0
        disk = attach(daemon)
        assert read(disk) == data
        filler.unlink()
        daemon.control.wait_applied(epoch)
        assert used(daemon) == 0
        disk.close()
        daemon.stop()
        assert daemon.image_bytes()[:FILLED] == data


def test_a_discard_empties_it_and_ram_is_taken_first_again(
    spilling: Daemon, attach: Attach
) -> None:
    disk = attach(spilling)
    write(disk, noise(3))
    assert used(spilling) > 0
    spilling.control.discard()
    until("the spill file to be empty", lambda: used(spilling) == 0)
    assert read(disk) == bytes(FILLED)
    before = spilling.control.execute("query-stats")["group"]["spill-bytes-written"]
    data = noise(4, 4 * MIB)
    write(disk, data)
    status = spilling.control.status()
    assert status["spill"]["used"] == 0
    assert status["arena"]["used"] >= 4 * MIB
    after = spilling.control.execute("query-stats")["group"]["spill-bytes-written"]
    assert after == before > 0
    assert read(disk, 4 * MIB) == data


def test_blocks_that_spilled_can_be_overwritten_in_part_and_zeroed(
    spilling: Daemon, attach: Attach
) -> None:
    disk = attach(spilling)
    data = bytearray(noise(5))
    write(disk, bytes(data))
    for sector in range(3, 4096, 97):  # sub-block writes merge with what has spilled
        piece = bytes([sector % 251]) * 512
        disk.write(sector, piece)
        data[sector * 512 : sector * 512 + 512] = piece
    assert read(disk) == bytes(data)
    spilling.control.checkpoint()
    spilling.control.wait_applied()
    assert spilling.image_bytes()[:FILLED] == bytes(data)


def test_beginning_and_end_are_told(spilling: Daemon, attach: Attach) -> None:
    control = spilling.control
    control.status()
    write(attach(spilling), noise(6))
    begin = control.wait_event("ARENA_SPILL")["data"]
    assert begin["active"] is True
    assert begin["used"] > 0
    assert "go on in the spill file" in spilling.log()
    pressure = [event["data"] for event in control.events if event["event"] == "ARENA_PRESSURE"]
    assert pressure, "the arena's own use is told as ever"
    assert not any(data["held"] for data in pressure)
    control.discard()
    end = control.wait_event("ARENA_SPILL", where=lambda data: not data["active"])["data"]
    assert end == {"active": False, "used": 0}
    until("the log", lambda: "the spill file is empty again" in spilling.log())


def test_a_guest_is_held_once_ram_and_file_are_full(epochd: StartDaemon, attach: Attach) -> None:
    options = ["--on-full", "spill", "--spill-size", "8M", *RAW]
    daemon = epochd(arena=ARENA, options=options)
    daemon.control.status()
    disk = attach(daemon, queue_size=256, memory=roomy())
    data = noise(7, 24 * MIB)
    requests = submit_all(disk, data)
    event = daemon.control.wait_event("ARENA_PRESSURE", where=lambda data: bool(data["held"]))
    assert event["data"]["percent"] > 75
    status = daemon.control.status()
    assert status["held"] > 0
    assert status["spill"]["used"] == status["spill"]["size"] == 8 * MIB
    daemon.control.checkpoint()
    disk.wait(*requests)
    assert {request.status for request in requests} == {Status.OK}
    assert read(disk, len(data)) == data


def test_a_large_request_finds_room_by_spilling(spilling: Daemon, attach: Attach) -> None:
    """More room than is kept free for ordinary writes."""
    disk = attach(spilling)
    write(disk, noise(8, 16 * MIB))
    data = noise(9, 3 * MIB)
    disk.write(20 * MIB // 512, data, layout=INDIRECT)
    assert read(disk, 3 * MIB, 20 * MIB) == data
    assert spilling.control.status()["held"] == 0


def test_without_it_a_full_arena_holds_the_guest(epochd: StartDaemon, attach: Attach) -> None:
    daemon = epochd(arena=ARENA, options=RAW)
    daemon.control.status()
    disk = attach(daemon, queue_size=256, memory=roomy())
    assert daemon.control.status()["spill"] is None
    assert not spill_path(daemon).exists()
    data = noise(10, 12 * MIB)
    requests = submit_all(disk, data)
    daemon.control.wait_event("ARENA_PRESSURE", where=lambda data: bool(data["held"]))
    assert not all(request.done for request in requests)
    daemon.control.checkpoint()
    disk.wait(*requests)
    assert read(disk, len(data)) == data


@pytest.mark.parametrize("level", [0, 1])
def test_what_was_overwritten_makes_room_in_the_file(
    epochd: StartDaemon, attach: Attach, level: int
) -> None:
    """24 MiB are alive, in 8 and 32 MiB. Held writes would wait for a commit for ever."""
    options = ["--on-full", "spill", "--spill-size", "32M", "--compress-level", str(level)]
    daemon = epochd(arena=ARENA, options=options)
    disk = attach(daemon)
    for turn in range(4):
        write(disk, noise(30 + turn, 24 * MIB))
    data = bytearray(noise(33, 24 * MIB))
    dice = random.Random(34)
    for _ in range(4000):  # scattered: no segment is wholly dead
        block = dice.randrange(len(data) // 4096)
        data[block * 4096 : block * 4096 + 4096] = dice.randbytes(4096)
        disk.write(block * 8, bytes(data[block * 4096 : block * 4096 + 4096]))
    assert read(disk, len(data)) == data
    assert daemon.control.status()["held"] == 0
    daemon.control.checkpoint()
    daemon.control.wait_applied()
    assert daemon.image_bytes()[: len(data)] == data


# ---- death and restart ----------------------------------------------------------------------


def test_killed_in_the_middle_of_spilling_nothing_is_lost(spilling: Daemon, attach: Attach) -> None:
    """What was asked for is there after each of several kills, wherever they hit."""
    dice = random.Random(11)
    disk = attach(spilling, queue_size=256, memory=roomy(), inflight=True)
    data = b""
    for turn in range(5):
        data = noise(100 + turn)
        requests = submit_all(disk, data)
        for request in requests[: dice.randrange(40, 90)]:
            disk.wait(request)
        assert used(spilling) > 0
        spilling.restart("kill")
        disk.reconnect()
        disk.wait(*requests)
        assert {request.status for request in requests} == {Status.OK}
        assert read(disk) == data
        if turn % 2:
            spilling.control.checkpoint()
    spilling.control.checkpoint()
    spilling.control.wait_applied()
    assert spilling.image_bytes()[:FILLED] == data


@pytest.mark.parametrize("how", ["kill", "term"])
def test_spilled_epochs_are_there_after_a_restart(
    spilling: Daemon, attach: Attach, how: str
) -> None:
    disk = attach(spilling, inflight=True)
    data = noise(12)
    write(disk, data[: FILLED // 2])
    sealed = spilling.control.seal()
    write(disk, data[FILLED // 2 :], FILLED // 2)
    before = used(spilling)
    spilling.restart(how)
    assert spilling.control.status()["sealed"] == [sealed]
    assert used(spilling) == before > 0
    disk.reconnect()
    assert read(disk) == data
    spilling.control.commit(sealed)
    spilling.control.wait_applied(sealed)
    assert spilling.image_bytes()[:FILLED] == data[: FILLED // 2] + bytes(FILLED // 2)
    spilling.control.checkpoint()
    disk.close()
    spilling.stop()
    assert spilling.image_bytes()[:FILLED] == data
    # With nothing left in it, the file has gone with the arena.
    assert not spill_path(spilling).exists()


def test_after_a_reboot_the_file_is_stale_and_means_nothing(
    spilling: Daemon, attach: Attach
) -> None:
    disk = attach(spilling)
    write(disk, noise(13))
    spilling.stop("kill")
    disk.close()
    spilling.lose_shm()
    assert spill_path(spilling).exists()
    spilling.start()
    assert used(spilling) == 0
    disk = attach(spilling)
    assert read(disk) == bytes(FILLED)
    data = noise(14)
    write(disk, data)
    assert read(disk) == data


def test_a_file_with_nothing_in_use_is_made_anew(spilling: Daemon, attach: Attach) -> None:
    disk = attach(spilling, inflight=True)
    data = noise(15, 2 * MIB)
    write(disk, data)
    spilling.stop("kill")
    spill_path(spilling).unlink()
    spilling.start()
    assert spill_path(spilling).stat().st_mode & 0o777 == 0o600
    disk.reconnect()
    assert read(disk, 2 * MIB) == data
    data += noise(16, FILLED - 2 * MIB)
    write(disk, data)
    assert used(spilling) > 0
    assert read(disk) == data


def test_a_missing_cut_or_foreign_file_is_refused_with_the_reason(
    spilling: Daemon, attach: Attach, tmp_path: Path
) -> None:
    disk = attach(spilling, inflight=True)
    data = noise(17)
    write(disk, data)
    spilling.stop("kill")
    path, aside = spill_path(spilling), tmp_path / "aside"
    path.rename(aside)
    refused(spilling, str(path), "is gone", "remove the arena")
    assert not path.exists()
    path.write_bytes(bytes(100))
    refused(spilling, str(path), "was cut")
    with path.open("r+b") as file:
        file.truncate(aside.stat().st_size)
    refused(spilling, "spill file", "is no spill file")
    header = bytearray(aside.read_bytes()[:4096])
    for place, words in ((24, "another consistency group"), (40, "not the one that the arena")):
        wrong = bytearray(header)
        wrong[place] ^= 1
        with path.open("r+b") as file:
            file.write(wrong)
        refused(spilling, "spill file", words)
    # Without the file's options the epochs in it are served all the same.
    path.unlink()
    shutil.copyfile(aside, path)
    spilling.options = RAW
    spilling.start()
    disk.reconnect()
    assert spilling.control.status()["spill"]["closed"] is True
    assert read(disk) == data
    spilling.control.checkpoint()
    disk.close()
    spilling.stop()
    assert spilling.image_bytes()[:FILLED] == data
    assert not path.exists()


# ---- faults of the world ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10 * MIB + 77])
def test_a_file_that_is_cut_while_running_is_an_error_not_a_crash(
    spilling: Daemon, attach: Attach, size: int
) -> None:
    disk = attach(spilling)
    base = noise(18, MIB)
    write(disk, base, 50 * MIB)
    done = spilling.control.checkpoint()
    spilling.control.wait_applied(done)
    data = noise(19)
    write(disk, data)
    epoch = spilling.control.seal()
    os.truncate(spill_path(spilling), size)
    with pytest.raises(ControlError, match="the spill file has lost part of it"):
        spilling.control.commit(epoch)
    assert "spill file" in spilling.control.wait_event("IO_ERROR")["data"]["desc"]
    assert "spill file" in spilling.control.status()["error"]
    assert spilling.control.status()["spill"]["error"]
    assert "takes no more" in spilling.log()
    with pytest.raises(RequestFailed, match="IOERR"):
        read(disk)
    assert spilling.control.status()["committed"] == done
    assert read(disk, MIB, 50 * MIB) == base
    # Discarding makes it whole again; without the file a full arena holds the guest.
    spilling.control.discard()
    assert read(disk) == bytes(FILLED)
    write(disk, data[: 2 * MIB])
    spilling.control.checkpoint()
    spilling.control.wait_applied()
    disk.close()
    spilling.stop()
    assert spilling.image_bytes()[: 2 * MIB] == data[: 2 * MIB]
    spilling.start()
    disk = attach(spilling)
    write(disk, data)
    assert spilling.control.status()["spill"]["error"] == ""
    assert read(disk) == data


def test_a_file_that_was_changed_is_noticed(spilling: Daemon, attach: Attach) -> None:
    disk = attach(spilling)
    write(disk, noise(20))
    epoch = spilling.control.seal()
    with spill_path(spilling).open("r+b") as file:
        file.seek(5 * MIB + 1000)
        file.write(b"\0" * 64)
    with pytest.raises(ControlError, match="the spill file has lost part of it"):
        spilling.control.commit(epoch)
    assert spilling.control.status()["sealed"] == [epoch]


def test_a_file_that_is_removed_while_running_takes_no_more(
    spilling: Daemon, attach: Attach
) -> None:
    """What is in it can be committed still: it is open."""
    spilling.control.status()
    disk = attach(spilling, queue_size=256, memory=roomy())
    data = noise(21, 20 * MIB)
    write(disk, data)
    spill_path(spilling).unlink()
    more = noise(22, 7 * MIB)
    requests = submit_all(disk, more, 20 * MIB)
    event = spilling.control.wait_event("IO_ERROR")
    assert "was removed" in event["data"]["desc"]
    epoch = spilling.control.seal()
    spilling.control.commit(epoch)
    disk.wait(*requests)
    assert read(disk, 27 * MIB) == data + more
    spilling.control.checkpoint()
    spilling.control.wait_applied()
    disk.close()
    spilling.stop()
    assert spilling.image_bytes()[: 27 * MIB] == data + more


def test_a_disk_without_room_for_the_file_is_told_at_the_start(
    tmp_path: Path, epochd: StartDaemon, attach: Attach
) -> None:
    with mounted(tmp_path, 64) as root:
        options = ["--state-dir", str(root), "--on-full", "spill", "--journal-size", "42M"]
        daemon = epochd(start=False, arena=ARENA, options=[*options, "--spill-size", "32M"])
        refused(daemon, "spill file", "no room", "smaller --spill-size")
        assert list(root.glob("*epochd*")) == []
        daemon.options = [*options, "--spill-size", "8M", *RAW]
        daemon.start()
        disk = attach(daemon)
        data = noise(23, 12 * MIB)
        write(disk, data)
        assert used(daemon) > 0
        assert read(disk, 12 * MIB) == data
        disk.close()
        daemon.control.discard()
        daemon.stop()


def test_a_disk_that_fills_up_after_the_start_does_not_matter(
    tmp_path: Path, epochd: StartDaemon, attach: Attach
) -> None:
    """The file has all its blocks from the start."""
    with mounted(tmp_path, 64) as root:
        options = ["--state-dir", str(root), "--on-full", "spill", "--spill-size", "16M"]
        options += ["--journal-size", "28M", *RAW]
        daemon = epochd(DiskSpec(), arena=ARENA, options=options)
        disk = attach(daemon)
        fill(root)
        data = noise(24, 20 * MIB)
        write(disk, data)
        assert read(disk, 20 * MIB) == data
        disk.close()
        daemon.control.discard()
        daemon.stop()


def test_a_journal_too_small_for_arena_and_file_is_refused(
    epochd: StartDaemon, attach: Attach
) -> None:
    daemon = epochd(arena=ARENA, options=RAW)  # a journal for the arena alone
    attach(daemon).write(0, b"\x01" * 512)
    daemon.control.checkpoint()
    daemon.control.wait_applied()
    daemon.stop()
    daemon.options = [*SPILL, *RAW]
    refused(daemon, "journal", "too few", "smaller --spill-size")
    assert not spill_path(daemon).exists()
    daemon.options = [*SPILL, "--journal-size", "45M"]
    refused(daemon, "journal", "--journal-size of at least")
    (daemon.folder / "disk0.img.epochd-journal").unlink()
    daemon.options = [*SPILL, *RAW]
    daemon.start()
    assert attach(daemon).read(0, 1) == b"\x01" * 512
