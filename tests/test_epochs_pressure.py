"""A full arena or index: writes wait, nothing fails, and room lets them go on."""

from __future__ import annotations

import os

import pytest
from conftest import Attach, StartDaemon
from frontend import BlkRequest, Disk, Layout, Status, Type
from harness import Daemon, DiskSpec, until

INDIRECT = Layout(indirect=0)
CHUNK = 64 << 10
ZEROES = 512 << 10


@pytest.fixture
def small(epochd: StartDaemon) -> Daemon:
    """The smallest arena, 8 MiB, without compression."""
    return epochd(arena="8M", options=["--compress-level", "0"])


class Filler:
    """Writes incompressible chunks one after the other until they are held.

    A ring is served in order: what does not fit stays in the ring with all that is behind it.
    """

    def __init__(self, daemon: Daemon, disk: Disk) -> None:
        self.daemon = daemon
        self.disk = disk
        self.data: dict[int, bytes] = {}
        self.requests: dict[int, BlkRequest] = {}

    def fill(self) -> None:
        """Write until the daemon says that it holds the ring; then a dozen more."""
        while not self.daemon.control.status()["held"]:
            self.write()
            assert len(self.data) < 512, "the arena never fills"
        for _ in range(12):
            self.write()
        self.disk.reap()

    def write(self) -> None:
        sector = len(self.data) * CHUNK // 512
        self.data[sector] = os.urandom(CHUNK)
        self.requests[sector] = self.disk.submit(
            Type.OUT, sector, self.data[sector], layout=INDIRECT
        )
        self.disk.reap()

    def held(self) -> list[BlkRequest]:
        return [request for request in self.requests.values() if not request.done]

    def finish(self) -> None:
        """All writes end well and read back."""
        self.disk.wait(*self.requests.values())
        assert {request.status for request in self.requests.values()} == {Status.OK}
        self.check()

    def check(self) -> None:
        for sector, data in self.data.items():
            assert self.disk.read(sector, CHUNK // 512) == data


def test_writes_are_held_without_error_and_go_on_after_a_commit(
    small: Daemon, attach: Attach
) -> None:
    filler = Filler(small, attach(small))
    filler.fill()
    assert len(filler.held()) >= 12
    small.control.checkpoint()
    filler.finish()
    small.control.checkpoint()
    small.control.wait_applied()
    filler.check()
    assert small.disk_info()["stats"]["errors"] == 0
    assert small.disk_info()["stats"]["held"] >= 1
    small.stop("quit")
    contents = small.image_bytes()
    for sector, data in filler.data.items():
        assert contents[512 * sector : 512 * sector + CHUNK] == data


def test_writes_go_on_after_a_discard(small: Daemon, attach: Attach) -> None:
    filler = Filler(small, attach(small))
    filler.fill()
    held = {sector for sector, request in filler.requests.items() if not request.done}
    small.control.discard()
    filler.disk.wait(*filler.requests.values())
    assert {request.status for request in filler.requests.values()} == {Status.OK}
    for sector, data in filler.data.items():
        read = filler.disk.read(sector, CHUNK // 512)
        # What was answered before the discard is gone; what was held came after it.
        assert read == (data if sector in held else bytes(CHUNK))


def test_pressure_is_told_before_writes_are_held_and_when_they_are(
    small: Daemon, attach: Attach
) -> None:
    control = small.control
    control.status()
    filler = Filler(small, attach(small))
    filler.fill()
    control.wait_event("ARENA_PRESSURE", where=lambda data: bool(data["held"]))
    events = [event["data"] for event in control.events if event["event"] == "ARENA_PRESSURE"]
    assert events[0]["held"] is False
    assert events[0]["percent"] < 100
    percents = [event["percent"] for event in events]
    assert percents == sorted(percents)


def test_other_rings_are_served_while_one_is_held(small: Daemon, attach: Attach) -> None:
    filler = Filler(small, attach(small, queues=2))
    filler.disk.write(100_000, b"\x17" * 512)
    filler.fill()
    assert filler.disk.read(100_000, 1, queue=1) == b"\x17" * 512
    assert filler.disk.read(0, CHUNK // 512, queue=1) == filler.data[0]
    filler.disk.flush(queue=1)
    assert filler.disk.request(Type.GET_ID, room=20, queue=1).status == Status.OK
    late = filler.disk.submit(Type.IN, 0, room=512)  # behind the writes
    assert len(filler.held()) >= 12
    small.control.checkpoint()
    filler.finish()
    filler.disk.wait(late)
    assert late.status == Status.OK


def test_a_ring_stopped_while_writes_are_held_keeps_them(small: Daemon, attach: Attach) -> None:
    disk = attach(small)
    filler = Filler(small, disk)
    filler.fill()
    queue = disk.queues[0]
    base = disk.stop_queue(0)
    disk.reap()
    held = filler.held()
    assert held
    assert queue.used_idx == base
    assert (queue.avail_idx - base) & 0xFFFF == len(held)
    assert small.control.status()["held"] == 0
    small.control.checkpoint()
    small.control.wait_applied()
    assert queue.used_idx == base
    disk.start_queue(queue, base=base)
    filler.finish()


def test_a_front_end_may_hang_up_while_its_writes_are_held(small: Daemon, attach: Attach) -> None:
    first = attach(small)
    filler = Filler(small, first)
    filler.fill()
    done = [sector for sector, request in filler.requests.items() if request.done]
    first.close()
    until("no write to be held", lambda: small.control.status()["held"] == 0)
    second = attach(small)
    for sector in done:
        assert second.read(sector, CHUNK // 512) == filler.data[sector]
    small.control.checkpoint()
    second.write(0, b"\x18" * 512)
    assert second.read(0, 1) == b"\x18" * 512


@pytest.mark.parametrize("how", ["quit", "term", "kill"])
def test_the_daemon_ends_and_starts_with_a_full_arena(
    small: Daemon, attach: Attach, how: str
) -> None:
    disk = attach(small, inflight=True)
    filler = Filler(small, disk)
    filler.fill()
    small.restart(how)
    disk.reconnect()
    until("the writes to be held again", lambda: small.control.status()["held"] > 0)
    small.control.checkpoint()
    filler.finish()


def test_committing_the_oldest_of_several_epochs_makes_room(small: Daemon, attach: Attach) -> None:
    disk = attach(small)
    filler = Filler(small, disk)
    epochs = []
    for _ in range(3):
        for _ in range(24):
            filler.write()
        disk.wait(*filler.held())
        epochs.append(small.control.seal())
    filler.fill()
    small.control.commit(epochs[0])
    small.control.wait_applied(epochs[0])
    assert small.control.status()["sealed"] == epochs[1:]
    disk.wait(filler.held()[0])
    small.control.checkpoint()
    filler.finish()


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("repeat", [1, 8])
def test_what_was_overwritten_in_an_epoch_makes_room(
    epochd: StartDaemon, attach: Attach, level: int, repeat: int
) -> None:
    """Only 1 MiB is ever alive. Held writes would wait for a commit that frees nothing."""
    daemon = epochd(arena="8M", options=["--compress-level", str(level)])
    disk = attach(daemon)
    data = b""
    for _ in range(50):
        data = b"".join(os.urandom(512 // repeat) * repeat for _ in range(2048))
        disk.write(0, data)
    assert disk.read(0, 2048) == data


def test_compression_puts_more_into_the_arena_than_its_size(
    epochd: StartDaemon, attach: Attach
) -> None:
    daemon = epochd(arena="8M")
    disk = attach(daemon)
    for place in range(24):
        disk.write(2048 * place, (bytes([place + 1]) * 64 + os.urandom(64)) * 8192)
    status = daemon.control.status()
    assert status["logical-bytes"] == 24 << 20
    assert status["arena"]["used"] <= 8 << 20
    assert disk.read(2048 * 23, 1)[:64] == b"\x18" * 64


def test_an_active_agent_frees_its_arena_by_itself(small: Daemon, attach: Attach) -> None:
    disk = attach(small)
    filler = Filler(small, disk)
    filler.fill()
    small.control.execute("promote")
    filler.disk.wait(*filler.requests.values())
    for _ in range(200):
        filler.write()
    filler.disk.wait(*filler.requests.values())
    assert {request.status for request in filler.requests.values()} == {Status.OK}
    assert small.control.status()["held"] == 0


def test_zero_blocks_are_taken_by_a_full_arena_after_room_is_made(
    small: Daemon, attach: Attach
) -> None:
    filler = Filler(small, attach(small))
    filler.fill()
    zeroing = filler.disk.submit(
        Type.WRITE_ZEROES, payload=b"\0" * 8 + (64).to_bytes(4, "little") + bytes(4)
    )
    small.control.checkpoint()
    filler.disk.wait(zeroing, *filler.requests.values())
    assert zeroing.status == Status.OK
    assert filler.disk.read(0, 64) == bytes(64 * 512)


# The index: blocks of zeroes take hardly any room in the arena, but a place in it each.


@pytest.fixture
def sparse(epochd: StartDaemon) -> Daemon:
    """The smallest index, 2 MiB, and an arena that has room for far more zero blocks."""
    return epochd(DiskSpec(size=1 << 30), arena="32M", options=["--index-size", "2M"])


def fill_index(daemon: Daemon, disk: Disk) -> tuple[list[BlkRequest], list[BlkRequest]]:
    """Write zeroes until they are held: the requests that were answered, and those held."""
    done: list[BlkRequest] = []
    batch: list[BlkRequest] = []
    place = 0
    while not daemon.control.status()["held"]:
        assert place < 1 << 30, "the index never fills"
        for _ in range(8 - len(batch)):
            batch.append(disk.submit(Type.OUT, place // 512, bytes(ZEROES), layout=INDIRECT))
            place += ZEROES
        disk.reap()
        done += [request for request in batch if request.done]
        batch = [request for request in batch if not request.done]
    disk.reap()
    return done, batch


def test_a_full_index_holds_writes_until_a_commit(sparse: Daemon, attach: Attach) -> None:
    control, disk = sparse.control, attach(sparse)
    disk.write(8, b"\x21" * 512)
    done, held = fill_index(sparse, disk)
    assert held
    assert len(done) * ZEROES > 128 << 20
    status = control.status()
    assert status["index"]["size"] == 2 << 20
    assert status["index-bytes"] <= status["index"]["used"] <= status["index"]["size"]
    assert status["arena"]["percent"] < 50
    control.wait_event("ARENA_PRESSURE", where=lambda data: bool(data["held"]))
    told = [event["data"] for event in control.events if event["event"] == "ARENA_PRESSURE"]
    assert (told[0]["held"], told[-1]["held"]) == (False, True)
    assert 50 <= told[0]["percent"] < 90
    control.checkpoint()
    disk.wait(*held)
    assert {request.status for request in (*done, *held)} == {Status.OK}
    control.checkpoint()
    control.wait_applied()
    assert control.status()["index"]["used"] <= 64 << 10
    assert disk.read(8, 1) == bytes(512)


def test_a_full_index_is_taken_by_the_next_agent(sparse: Daemon, attach: Attach) -> None:
    disk = attach(sparse, inflight=True)
    done, held = fill_index(sparse, disk)
    sparse.restart("kill")
    disk.reconnect()
    until("the writes to be held again", lambda: sparse.control.status()["held"] > 0)
    sparse.control.discard()
    disk.wait(*held)
    assert {request.status for request in (*done, *held)} == {Status.OK}


def test_an_index_above_a_lower_limit_is_taken_and_drains(
    epochd: StartDaemon, attach: Attach
) -> None:
    daemon = epochd(DiskSpec(size=1 << 30), arena="32M", options=["--index-size", "8M"])
    disk = attach(daemon, inflight=True)
    for place in range(0, 512 << 20, ZEROES):
        disk.write(place // 512, bytes(ZEROES))
    assert daemon.control.status()["index-bytes"] > 2 << 20
    daemon.options = ["--index-size", "2M"]
    daemon.restart("kill")
    disk.reconnect()
    status = daemon.control.status()
    assert status["index"]["size"] == 2 << 20
    assert status["index-bytes"] > 2 << 20
    late = disk.submit(Type.OUT, 0, b"\x22" * 512, layout=INDIRECT)
    until("the write to be held", lambda: daemon.control.status()["held"] == 1)
    daemon.control.discard()
    disk.wait(late)
    assert late.status == Status.OK
    assert disk.read(0, 1) == b"\x22" * 512


def test_an_active_agent_frees_its_index_by_itself(sparse: Daemon, attach: Attach) -> None:
    disk = attach(sparse)
    _, held = fill_index(sparse, disk)
    sparse.control.execute("promote")
    disk.wait(*held)
    for place in range(0, 384 << 20, ZEROES):
        disk.write(place // 512, bytes(ZEROES))
    assert sparse.control.status()["held"] == 0
    assert {request.status for request in held} == {Status.OK}


def test_scattered_discards_are_held_by_the_index_and_not_by_errors(
    sparse: Daemon, attach: Attach
) -> None:
    """Every second run of two blocks: nothing of it can be joined."""
    disk = attach(sparse)
    for place in range(6000):
        disk.discard(32 * place, 16)
    status = sparse.control.status()
    assert status["index-bytes"] <= 17 * 6000 + (64 << 10)
    sparse.control.checkpoint()
    sparse.control.wait_applied()
    assert disk.read(0, 64) == bytes(64 * 512)
