"""Faults of the world, with real files: disks that fill up, files that go away, an agent that
stands still. Nothing acknowledged is lost, the reason is told, and commands can be repeated.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon
from frontend import INDIRECT, Disk, RequestFailed, Type
from harness import Control, ControlError, Daemon, DiskSpec, command, mounted, until

MIB = 1 << 20
BLOCK = 64 << 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system (ext4) of 64 MiB. Ask for it before the daemons that use it."""
    with mounted(tmp_path, 64) as root:
        yield root


def fill(root: Path) -> Path:
    """A file that takes all the room of a file system."""
    path = root / "filler"
    with path.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(BLOCK))
            file.flush()
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def write(disk: Disk, start: int, data: bytes) -> None:
    """Write at a byte offset, 64 KiB a request."""
    for at in range(0, len(data), BLOCK):
        disk.write((start + at) // 512, data[at : at + BLOCK], layout=INDIRECT)


def read(disk: Disk, start: int, size: int) -> bytes:
    parts = range(start, start + size, BLOCK)
    return b"".join(disk.read(at // 512, BLOCK // 512, layout=INDIRECT) for at in parts)


def journal_of(daemon: Daemon) -> Path:
    (path,) = daemon.folder.glob("*journal")
    return path


def refused(daemon: Daemon, *words: str) -> None:
    """The daemon must not start, with status 4 and these words."""
    with pytest.raises(RuntimeError):
        daemon.start()
    assert daemon.exit_status == 4
    last = daemon.log().splitlines()[-1]
    assert [word for word in words if word not in last] == [], last


# ---- full disks ---------------------------------------------------------------------------


def test_a_journal_that_finds_the_disk_full_is_made_once_there_is_room(
    small_disk: Path, epochd: StartDaemon, attach: Attach
) -> None:
    daemon = epochd(start=False, arena="8M", options=["--state-dir", str(small_disk)])
    filler = fill(small_disk)
    refused(daemon, "no room")
    assert list(small_disk.glob("*journal*")) == []
    filler.unlink()
    daemon.start()
    attach(daemon).write(0, b"\x11" * 4096)
    daemon.control.checkpoint()
    daemon.stop()
    assert daemon.image_bytes()[:4096] == b"\x11" * 4096


def test_a_full_disk_under_a_sparse_image_loses_nothing(
    small_disk: Path, epochd: StartDaemon, attach: Attach
) -> None:
    image = small_disk / "disk0.img"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    options = ["--compress-level", "0"]
    daemon = epochd(DiskSpec(size=32 * MIB, image=image), arena="32M", options=options)
    disk = attach(daemon)
    filler = fill(small_disk)
    first, second = os.urandom(4 * MIB), os.urandom(2 * MIB)
    write(disk, 0, first)
    epoch = daemon.control.checkpoint()
    event = daemon.control.wait_event("IO_ERROR")
    assert "disk0" in event["data"]["desc"]
    assert "No space left" in daemon.control.status()["error"]
    assert "No space left" in daemon.log()
    # Checkpoints go on; what is committed is read from the arena.
    write(disk, 2 * MIB, second)
    later = daemon.control.checkpoint()
    assert daemon.control.commit(epoch) == later
    expected = first[: 2 * MIB] + second
    assert read(disk, 0, 4 * MIB) == expected
    assert daemon.control.status()["applied"] < epoch
    # A kill and a reboot in this state: the journal has it all.
    disk.close()
    daemon.stop("kill")
    daemon.lose_shm()
    daemon.start()
    disk = attach(daemon)
    assert read(disk, 0, 4 * MIB) == expected
    filler.unlink()
    daemon.control.wait_applied(later)
    assert daemon.control.status()["error"] == ""
    daemon.stop()
    assert daemon.image_bytes()[: 4 * MIB] == expected


def test_full_shared_memory_is_told_and_a_start_can_be_repeated(tmp_path: Path) -> None:
    """/dev/shm of a mount namespace of its own is filled, then emptied again."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    words = [*command(), "--blk-file", str(image), "--socket-path", str(tmp_path / "v.sock")]
    words += ["--control", str(tmp_path / "c.sock"), "--arena-size", "16M"]
    script = """
        mount -t tmpfs -o size=24m none /dev/shm
        head -c 16M /dev/zero >/dev/shm/filler
        "$@"; echo "status $?"; ls /dev/shm
        rm /dev/shm/filler
        timeout --signal=TERM 3 "$@"; echo "status $?"
    """
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *words],
        check=False, text=True, timeout=60, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ).stdout
    before, after = answer.split("status 4\nfiller\n")
    assert "/dev/shm" in before
    assert "smaller --arena-size" in before
    assert "serves group" in after
    assert "status 124" in after  # timeout(1) says so; the daemon ended well
    assert "Traceback" not in answer


# ---- files that go away -------------------------------------------------------------------


def test_a_journal_removed_while_running_is_no_journal(agent: Daemon, attach: Attach) -> None:
    """What is written to it would be found by no start: no commit is acknowledged."""
    disk = attach(agent)
    disk.write(0, b"\x21" * 4096)
    done = agent.control.checkpoint()
    agent.control.wait_applied(done)
    disk.write(8, b"\x22" * 4096)
    epoch = agent.control.seal()
    journal_of(agent).unlink()
    for _ in range(2):
        with pytest.raises(ControlError, match="No such file"):
            agent.control.commit(epoch)
    assert agent.control.status()["committed"] == done
    assert agent.control.status()["sealed"] == [epoch]
    assert "journal" in agent.control.wait_event("IO_ERROR")["data"]["desc"]
    assert "No such file" in agent.control.status()["error"]
    assert "No such file" in agent.log()
    assert disk.read(0, 16) == b"\x21" * 4096 + b"\x22" * 4096
    # What was acknowledged is in the image; what was not stays in the arena.
    agent.stop()
    assert agent.image_bytes()[:8192] == b"\x21" * 4096 + bytes(4096)
    refused(agent, "which is gone", "remove /dev/shm/")
    assert all(path.exists() for path in agent.shm)
    agent.lose_shm()  # the user gives up what was not committed
    agent.start()
    assert attach(agent).read(0, 16) == b"\x21" * 4096 + bytes(4096)


@pytest.mark.parametrize("size", [0, 100_000, 3 * MIB])
def test_a_journal_that_is_cut_is_mended(agent: Daemon, attach: Attach, size: int) -> None:
    disk = attach(agent)
    first, second = os.urandom(MIB), os.urandom(MIB)
    write(disk, 0, first)
    done = agent.control.checkpoint()
    agent.control.wait_applied(done)
    write(disk, MIB, second)
    epoch = agent.control.seal()
    path = journal_of(agent)
    whole = path.stat().st_size
    os.truncate(path, size)
    assert agent.control.commit(epoch) == epoch
    assert "was cut" in agent.control.wait_event("IO_ERROR")["data"]["desc"]
    assert "was cut" in agent.log()
    assert path.stat().st_size == whole
    agent.stop("kill")
    agent.lose_shm()  # the mended journal alone must do
    disk.close()
    agent.start()
    assert agent.control.status()["committed"] == epoch
    assert read(attach(agent), 0, 2 * MIB) == first + second


def test_a_journal_that_is_gone_at_the_start_is_not_replaced_under_an_arena(
    agent: Daemon, attach: Attach, tmp_path: Path
) -> None:
    """The committed epoch is in the arena, and perhaps not in the image yet."""
    disk = attach(agent)
    disk.write(0, b"\x31" * 4096)
    epoch = agent.control.checkpoint()
    agent.stop("kill")
    path = journal_of(agent)
    aside = tmp_path / "aside"
    path.rename(aside)
    refused(agent, str(path), "which is gone")
    assert not path.exists()
    # Nor does another folder for the journal help, nor an empty file.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    agent.options = ["--state-dir", str(elsewhere)]
    refused(agent, str(path))
    agent.options = []
    path.touch()
    refused(agent, str(path))
    aside.rename(path)
    agent.start()
    assert agent.control.commit(epoch) == epoch
    disk.reconnect()
    assert disk.read(0, 8) == b"\x31" * 4096


def test_a_new_image_in_the_place_of_an_old_one_is_not_held_to_its_arena(
    agent: Daemon, attach: Attach
) -> None:
    """The new file may well get the old one's inode number."""
    attach(agent).write(0, b"\x51" * 4096)
    agent.stop("kill")
    journal_of(agent).unlink()
    refused(agent, "which is gone")
    for _ in range(3):
        agent.image().unlink()
        with agent.image().open("wb") as image:
            image.truncate(64 * MIB)
    agent.start()
    assert attach(agent).read(0, 8) == bytes(4096)


def test_an_image_that_is_cut_costs_only_what_was_cut(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    first = os.urandom(MIB)
    write(disk, 0, first)
    agent.control.wait_applied(agent.control.checkpoint())
    write(disk, 40 * MIB, first)
    epoch = agent.control.seal()
    os.truncate(agent.image(), 32 * MIB)
    agent.control.commit(epoch)
    agent.control.wait_applied(epoch)
    assert read(disk, 0, MIB) == first
    assert read(disk, 40 * MIB, MIB) == first  # applying made the image long enough for it
    with pytest.raises(RequestFailed, match="IOERR"):
        disk.read(60 * MIB // 512, 8)
    until("the reason in the log", lambda: "Input/output error" in agent.log())
    disk.close()
    agent.stop()
    refused(agent, "shrunk", "disk0")
    os.truncate(agent.image(), 64 * MIB)
    agent.start()
    disk = attach(agent)
    assert disk.read(60 * MIB // 512, 8) == bytes(4096)
    assert read(disk, 40 * MIB, MIB) == first


def test_a_socket_that_is_removed_comes_back(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent, inflight=True)
    before = agent.control
    for path in (agent.control_path, agent.socket()):
        path.unlink()
    until("the sockets to be there again", lambda: agent.socket().exists())
    until("the control socket to be there again", lambda: agent.control_path.exists())
    assert str(agent.control_path) in agent.log()
    assert agent.control_path.stat().st_mode & 0o777 == 0o600
    epoch = before.seal()  # the old connection serves on
    disk.write(0, b"\x41" * 512)
    other = Control(agent.control_path)
    try:
        assert other.commit(epoch) == epoch
    finally:
        other.close()
    disk.reconnect()
    assert disk.read(0, 1) == b"\x41" * 512
    agent.stop()
    assert not agent.control_path.exists()
    assert not agent.socket().exists()


# ---- an agent that is killed ---------------------------------------------------------------


def test_after_a_kill_in_the_middle_of_an_epoch_that_epoch_is_open_and_can_be_committed(
    agent: Daemon, attach: Attach
) -> None:
    disk = attach(agent, inflight=True)
    agent.control.wait_applied(agent.control.checkpoint())
    blocks = [os.urandom(4096) for _ in range(256)]
    write(disk, 0, b"".join(blocks))
    before = agent.control.status()
    flying = [
        disk.submit(Type.OUT, place * 8, block, layout=INDIRECT)
        for place, block in enumerate(reversed(blocks[:64]))
    ]
    agent.restart("kill")
    after = agent.control.status()
    for key in ("mode", "generation", "open", "sealed", "committed"):
        assert after[key] == before[key]
    disk.reconnect()
    disk.wait(*flying)
    expected = b"".join([*reversed(blocks[:64]), *blocks[64:]])
    assert read(disk, 0, MIB) == expected
    assert agent.image_bytes()[:MIB] == bytes(MIB)
    assert agent.control.seal() == before["open"]
    assert agent.control.commit(before["open"]) == before["open"]
    agent.control.wait_applied(before["open"])
    assert agent.image_bytes()[:MIB] == expected


# Where the arena's header (native/format.h) says what it is: offset, bytes, what is told.
FOREIGN = {
    "version": (8, struct.pack("<I", 1), "layout version 1"),
    "group": (32, bytes(16), "another consistency group"),
    "boot": (48, bytes(16), "another boot"),
}


@pytest.mark.parametrize("field", FOREIGN)
def test_an_arena_of_somebody_else_is_refused_and_left_alone(
    agent: Daemon, attach: Attach, field: str
) -> None:
    disk = attach(agent, inflight=True)
    disk.write(0, b"\x11" * 4096)
    agent.stop("kill")
    (arena,) = (path for path in agent.shm if path.suffix != ".group")
    before = arena.read_bytes()
    offset, value, words = FOREIGN[field]
    with arena.open("r+b") as file:
        file.seek(offset)
        file.write(value)
    changed = arena.read_bytes()
    refused(agent, words)
    assert arena.read_bytes() == changed
    with arena.open("r+b") as file:
        file.write(before[:4096])
    agent.start()
    disk.reconnect()
    assert disk.read(0, 8) == b"\x11" * 4096


# ---- an agent that stands still -----------------------------------------------------------


def test_a_stopped_agent_goes_on_where_it_was(agent: Daemon, attach: Attach) -> None:
    """For long, and with a guest: tests/guest/test_reconnect.py."""
    disk = attach(agent, inflight=True)
    data = [os.urandom(4096) for _ in range(64)]
    write(disk, 0, b"".join(data))
    sealed = agent.control.seal()
    requests = []
    for place, content in enumerate(reversed(data)):
        requests.append(disk.submit(Type.OUT, place * 8, content, layout=INDIRECT))
        if place == 32:
            os.kill(agent.pid, signal.SIGSTOP)
    commit = agent.control.begin("epoch-commit", epoch=sealed)
    try:
        time.sleep(2)
        assert not commit.done()
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    disk.wait(*requests)
    assert commit.result(30) == {"committed": sealed}
    assert disk.read(0, 8 * 64, layout=INDIRECT) == b"".join(reversed(data))
    agent.control.wait_applied(sealed)
    assert agent.image_bytes()[: 64 * 4096] == b"".join(data)
