"""The in-flight region: requests survive the agent.

The region belongs to the front end, which hands it to the next agent. What it says must be
exact whenever the agent may die, that is always.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon
from frontend import Disk, HungUp, Layout, Refused, Request, Status, Type
from frontend.wire import INFLIGHT, U64
from harness import Daemon, until

FULL = Layout(indirect=0)


def fill_arena(disk: Disk, daemon: Daemon) -> None:
    """Write incompressible chunks until the ring is held."""
    sector = 0
    while not daemon.control.status()["held"]:
        disk.submit(Type.OUT, sector, os.urandom(65536), layout=FULL)
        disk.reap()
        sector += 128
        assert sector < (32 << 20) // 512, "the arena never fills"


def stopped(pid: int) -> bool:
    """True when all threads of a process have stopped."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)


def test_a_fresh_region_has_the_layout_of_the_specification(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared, queues=3, queue_size=64, inflight=True)
    region = disk.inflight
    assert region is not None
    assert (region.queues, region.queue_size) == (3, 64)
    assert region.size >= 3 * (16 + 64 * 16)
    assert region.size % 3 == 0
    for index in range(3):
        disk.write(0, bytes(512), queue=index)
        queue = region.queue(index)
        assert (queue.features, queue.version, queue.desc_num) == (0, 1, 64)
        assert queue.used_idx == 1
        assert queue.heads() == []


def test_the_region_follows_the_used_ring(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared, inflight=True)
    assert disk.inflight is not None
    for turn in range(5):
        disk.wait(*[disk.submit(Type.IN, 0, room=512) for _ in range(20)])
        queue = disk.inflight.queue(0)
        assert queue.used_idx == disk.queues[0].used_idx == 20 * (turn + 1)
        assert queue.heads() == []


def test_a_padded_description_is_understood(shared: Daemon, attach: Attach) -> None:
    """QEMU sends the structure with the padding its compiler adds."""
    disk = attach(shared, start=False)
    disk.negotiate()
    reply = disk.channel.ask(Request.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, 2, 128) + bytes(4))
    assert len(reply.payload) == INFLIGHT.size + 4
    size, offset, queues, each = INFLIGHT.unpack(reply.payload[: INFLIGHT.size])
    assert (offset % 4096, queues, each) == (0, 2, 128)
    disk.command(Request.SET_INFLIGHT_FD, INFLIGHT.pack(size, offset, 2, 128) + bytes(4), reply.fds)
    reply.close_fds()


def test_bad_regions_are_refused(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared, start=False)
    disk.negotiate()
    region = disk.get_inflight(2, 64)
    for size, offset, queues, each in [
        (region.size, 0, 0, 64),
        (region.size, 0, 17, 64),
        (region.size, 0, 2, 0),
        (region.size, 0, 2, 128),
        (region.size, 0, 2, 2048),
        (16, 0, 2, 64),
        (region.size, 1 << 63, 2, 64),
        (region.size, 123, 2, 64),
        (1 << 62, 0, 2, 64),
    ]:
        payload = INFLIGHT.pack(size, offset, queues, each)
        with pytest.raises(Refused):
            disk.command(Request.SET_INFLIGHT_FD, payload, [region.fd])
    assert disk.channel.ask(Request.GET_FEATURES).u64()


def test_at_any_moment_the_region_tells_what_is_in_flight(agent: Daemon, attach: Attach) -> None:
    """Stopped in the middle of its work, the agent has marked only what it took and has not
    answered, in the order in which it took it."""
    disk = attach(agent, inflight=True)
    disk.write(0, os.urandom(1 << 20))
    agent.control.checkpoint()
    agent.control.wait_applied()  # reads now go to the disk and take their time
    region = disk.inflight
    assert region is not None
    queue = disk.queues[0]
    seen = turn = 0
    while turn < 20 or seen < 5:  # reads caught on their way to the disk
        turn += 1
        for place in range(48):
            disk.submit(Type.IN, 8 * ((place * 37 + turn) % 256), room=4096, layout=FULL)
        os.kill(agent.pid, signal.SIGSTOP)
        until("all threads to stop", lambda: stopped(agent.pid))
        state = region.queue(0)
        heads = state.heads()
        # The last batch may be in the used ring already and still be marked.
        late = (queue.used_idx - state.used_idx) & 0xFFFF
        batch = {queue.used_elem(queue.used_idx - 1 - i).head for i in range(late)}
        disk.reap()
        waiting = [request.head for request in disk.requests.values()]
        assert [head for head in heads if head not in batch] == waiting[: len(set(heads) - batch)]
        seen += bool(set(heads) - batch)
        os.kill(agent.pid, signal.SIGCONT)
        disk.wait(*disk.requests.values())
        assert region.queue(0).heads() == []


@pytest.mark.parametrize("how", ["kill", "term"])
def test_held_writes_are_finished_by_the_next_agent(
    epochd: StartDaemon, attach: Attach, how: str
) -> None:
    daemon = epochd(arena="8M", options=["--compress-level", "0"])
    disk = attach(daemon, inflight=True)
    fill_arena(disk, daemon)
    mine = [disk.submit(Type.OUT, 100_000 + i, bytes([i + 1]) * 512) for i in range(8)]
    daemon.stop(how)
    with pytest.raises(HungUp):
        disk.wait(*mine)
    daemon.start()
    disk.reconnect()
    daemon.control.checkpoint()
    disk.wait(*list(disk.requests.values()), *mine)
    assert {request.status for request in mine} == {Status.OK}
    for place in range(8):
        assert disk.read(100_000 + place, 1) == bytes([place + 1]) * 512


def test_requests_of_a_killed_agent_are_each_answered_once(
    epochd: StartDaemon, attach: Attach
) -> None:
    daemon = epochd()
    disk = attach(daemon, queues=2, inflight=True)
    expected: dict[int, bytes] = {}
    for turn in range(6):
        requests = []
        for place in range(64):
            sector = 8 * place
            expected[sector] = bytes([64 * (turn % 3) + place + 1]) * 4096
            requests.append(
                disk.submit(Type.OUT, sector, expected[sector], layout=FULL, queue=place % 2)
            )
        daemon.stop("kill")
        daemon.start()
        disk.reconnect()
        disk.wait(*requests)  # an answer given twice raises BadUsed
        assert {request.status for request in requests} == {Status.OK}
        for sector, data in expected.items():
            assert disk.read(sector, 8) == data
        assert not disk.requests


def test_without_a_region_the_ring_goes_on_at_its_used_index(
    epochd: StartDaemon, attach: Attach
) -> None:
    daemon = epochd()
    disk = attach(daemon)
    disk.write(0, b"\x71" * 4096)
    daemon.restart("kill")
    disk.reconnect()
    assert disk.read(0, 8) == b"\x71" * 4096


def test_a_region_of_an_agent_that_died_between_two_steps_is_repaired(
    shared: Daemon, attach: Attach
) -> None:
    """used.idx was moved, the region's marks and its used_idx were not: see vhost-user.rst,
    "Inflight I/O tracking", when reconnecting."""
    disk = attach(shared, inflight=True)
    region = disk.inflight
    assert region is not None
    for _ in range(3):
        disk.write(0, bytes(512))
    request = disk.submit(Type.OUT, 8, b"\x72" * 512)
    disk.wait(request)
    done = request.head
    disk.hang_up()
    # Put the region back to the moment before the last two steps of a batch of one.
    os.pwrite(region.fd, b"\x01", region.offset + 16 + 16 * done)
    os.pwrite(region.fd, (3).to_bytes(2, "little"), region.offset + 14)
    os.pwrite(region.fd, done.to_bytes(2, "little"), region.offset + 12)
    disk.reconnect()
    assert disk.read(8, 1) == b"\x72" * 512
    # Answered again, the head would have come out of the ring as not in flight.
    state = region.queue(0)
    assert (state.heads(), state.used_idx) == ([], 5)


def test_a_marked_request_is_submitted_again(shared: Daemon, attach: Attach) -> None:
    """The front end is as after the death of an agent that had fetched but not answered."""
    disk = attach(shared, inflight=True)
    disk.write(0, bytes(8192))
    region = disk.inflight
    assert region is not None
    disk.hang_up()
    requests = [disk.submit(Type.OUT, 8 * i, bytes([i + 1]) * 512, kick=False) for i in range(3)]
    for order, request in enumerate(requests):
        at = region.offset + 16 + 16 * request.head
        os.pwrite(region.fd, b"\x01", at)
        os.pwrite(region.fd, U64.pack(1000 + order), at + 8)
    disk.reconnect()
    disk.wait(*requests)
    assert [disk.read(8 * i, 1) for i in range(3)] == [bytes([i + 1]) * 512 for i in range(3)]
    assert not disk.requests


@pytest.mark.parametrize("junk", [b"\xff", b"\x01", b"\xa7"])
def test_a_region_full_of_junk_costs_only_its_author(
    epochd: StartDaemon, attach: Attach, junk: bytes
) -> None:
    daemon = epochd()
    disk = attach(daemon, inflight=True)
    disk.write(0, bytes(512))
    region = disk.inflight
    assert region is not None
    disk.hang_up()
    os.pwrite(region.fd, junk * region.size, region.offset)
    try:
        disk.reconnect()
        disk.submit(Type.IN, 0, room=512)
    except (Refused, HungUp):
        pass
    disk.close()
    healthy = attach(daemon)
    healthy.write(0, b"\x73" * 512)
    assert healthy.read(0, 1) == b"\x73" * 512
