"""Starting, stopping, notifying and moving of rings, and connections that come and go."""

from __future__ import annotations

import os

import pytest
from conftest import Attach, StartDaemon
from frontend import (
    MIB,
    Feature,
    FrontEndError,
    HungUp,
    Layout,
    RegionSpec,
    Status,
    Type,
)
from frontend.device import WANTED_FEATURES
from frontend.virtqueue import AVAIL_F_NO_INTERRUPT, USED_F_NO_NOTIFY
from harness import Daemon, DiskSpec, StorageDaemon, until

Server = Daemon | StorageDaemon
NO_EVENT_IDX = WANTED_FEATURES & ~Feature.EVENT_IDX


@pytest.fixture(params=["epochd", "qemu"])
def server(request: pytest.FixtureRequest) -> Server:
    """Both servers, one after the other."""
    name = {"epochd": "shared", "qemu": "qemu"}[request.param]
    found: Server = request.getfixturevalue(name)
    return found


# ---- calls --------------------------------------------------------------------------------


def test_the_call_eventfd_is_signalled_once_when_it_is_set(server: Server, attach: Attach) -> None:
    """A driver whose call got lost between two eventfds looks at its ring then."""
    disk = attach(server)
    disk.write(0, bytes(512))
    queue = disk.queues[0]
    queue.forget_calls()
    disk.set_call(0, queue.call_fd)
    disk.settle()
    until("the call", lambda: queue.forget_calls() > 0)


def test_a_driver_that_asks_for_no_call_gets_none(server: Server, attach: Attach) -> None:
    disk = attach(server)
    queue = disk.queues[0]
    disk.settle()
    disk.read(0, 1)
    queue.polling = True
    queue.used_event = queue.used_seen + 1000
    queue.forget_calls()
    for _ in range(2):  # a call for the first batch would come before the second is done
        disk.wait(*[disk.submit(Type.IN, 0, room=512) for _ in range(20)])
    assert queue.forget_calls() == 0


def test_a_driver_is_called_when_the_used_event_is_reached(server: Server, attach: Attach) -> None:
    disk = attach(server)
    queue = disk.queues[0]
    disk.read(0, 1)
    queue.polling = True
    queue.used_event = queue.used_seen + 9  # the tenth
    queue.forget_calls()
    requests = [disk.submit(Type.IN, 0, room=512) for _ in range(9)]
    disk.wait(*requests)
    one_more = disk.submit(Type.IN, 0, room=512)
    until("the call", lambda: queue.forget_calls() > 0)
    disk.wait(one_more)


def test_no_interrupt_flag_keeps_calls_away(server: Server, attach: Attach) -> None:
    disk = attach(server, features=NO_EVENT_IDX)
    queue = disk.queues[0]
    disk.read(0, 1)
    queue.polling = True
    queue.avail_flags = AVAIL_F_NO_INTERRUPT
    disk.wait(disk.submit(Type.IN, 0, room=512))
    queue.forget_calls()
    for _ in range(2):
        disk.wait(*[disk.submit(Type.IN, 0, room=512) for _ in range(20)])
    assert queue.forget_calls() == 0
    queue.avail_flags = 0
    disk.wait(disk.submit(Type.IN, 0, room=512))
    until("the call", lambda: queue.forget_calls() > 0)


def test_a_driver_may_poll_without_any_call_eventfd(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared)
    disk.set_call(0, None)
    disk.queues[0].polling = True
    for _ in range(20):
        assert disk.request(Type.IN, 0, room=512).status == Status.OK


# ---- kicks --------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [WANTED_FEATURES, NO_EVENT_IDX], ids=["event-idx", "flag"])
def test_an_idle_back_end_asks_for_a_kick_and_wakes_up(
    shared: Daemon, attach: Attach, features: Feature
) -> None:
    disk = attach(shared, features=features)
    queue = disk.queues[0]
    for _ in range(20):
        disk.read(0, 1)
        if queue.event_idx:
            until("kicks to be wanted", lambda: queue.avail_event == queue.avail_idx)
        else:
            until("kicks to be wanted", lambda: not queue.used_flags & USED_F_NO_NOTIFY)
        request = disk.submit(Type.IN, 0, room=512, publish=False)
        assert queue.publish()
        disk.wait(request)


def test_a_kick_without_a_request_harms_nothing(server: Server, attach: Attach) -> None:
    disk = attach(server)
    for _ in range(50):
        disk.queues[0].force_kick()
    disk.write(0, bytes(512))


def test_a_ring_without_kick_eventfd_is_polled(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared)
    disk.set_kick(0, None)
    for _ in range(20):
        request = disk.submit(Type.IN, 0, room=512, kick=False)
        disk.wait(request)


def test_the_kick_eventfd_can_be_replaced_at_run_time(server: Server, attach: Attach) -> None:
    disk = attach(server)
    queue = disk.queues[0]
    disk.write(0, bytes(512))
    fresh = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    os.dup2(fresh, queue.kick_fd, inheritable=False)
    os.close(fresh)
    disk.set_kick(0, queue.kick_fd)
    disk.write(0, bytes(512))


def test_requests_that_wait_in_the_ring_are_served_when_it_starts(
    server: Server, attach: Attach
) -> None:
    disk = attach(server, start=False)
    disk.negotiate()
    disk.acknowledge()
    disk.share_memory()
    queue = disk.make_queue(0, 64)
    requests = [disk.submit(Type.OUT, i, bytes([i]) * 512, kick=False) for i in range(8)]
    queue.force_kick()
    disk.start_queue(queue)
    disk.wait(*requests)
    assert disk.read(7, 1) == b"\x07" * 512


# ---- stopping and resuming ----------------------------------------------------------------


def test_a_stopped_ring_says_where_it_goes_on(server: Server, attach: Attach) -> None:
    disk = attach(server)
    for _ in range(5):
        disk.write(0, bytes(512))
    assert disk.stop_queue(0) == 5
    disk.start_queue(disk.queues[0], base=5)
    disk.write(0, bytes(512))
    assert disk.stop_queue(0) == 6


def test_a_ring_that_never_ran_stops_at_its_base(server: Server, attach: Attach) -> None:
    disk = attach(server, start=False)
    disk.negotiate()
    disk.acknowledge()
    disk.set_base(0, 4711)
    assert disk.stop_queue(0) == 4711


@pytest.mark.parametrize("rounds", [20])
def test_stopping_finishes_what_was_fetched_and_keeps_the_rest(
    shared: Daemon, attach: Attach, rounds: int
) -> None:
    """Nothing is lost and nothing is done twice, wherever the stop falls."""
    disk = attach(shared, queue_size=256)
    queue = disk.queues[0]
    for turn in range(rounds):
        data = bytes([turn + 1]) * 4096
        requests = [
            disk.submit(Type.OUT, 8 * i, data, layout=Layout(indirect=0)) for i in range(64)
        ]
        base = disk.stop_queue(0)
        # Everything fetched is answered by now, everything else is still the ring's.
        assert queue.used_idx == base
        disk.reap()
        done = sum(request.done for request in requests)
        assert (queue.avail_idx - base) & 0xFFFF == 64 - done
        disk.start_queue(queue, base=base)
        disk.wait(*requests)
        assert {request.status for request in requests} == {Status.OK}
        assert disk.read(8 * (turn % 64), 8) == data


def test_a_stopped_ring_is_left_alone(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared, queues=2)
    disk.write(0, bytes(512))
    base = disk.stop_queue(0)
    waiting = disk.submit(Type.OUT, 0, b"\x31" * 512, kick=False)
    disk.queues[0].force_kick()
    for _ in range(20):
        assert disk.read(0, 1, queue=1) == bytes(512)
    assert disk.queues[0].used_idx == base
    disk.start_queue(disk.queues[0], base=base)
    disk.wait(waiting)
    assert disk.read(0, 1, queue=1) == b"\x31" * 512


def test_one_ring_stops_while_the_others_go_on(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared, queues=3)
    for turn in range(10):
        busy = [disk.submit(Type.OUT, 8 * i, bytes(4096), queue=1) for i in range(32)]
        base = disk.stop_queue(0)
        disk.wait(*busy)
        disk.start_queue(disk.queues[0], base=base)
        disk.write(0, bytes([turn]) * 512)


def test_a_ring_can_move_to_another_place_and_size(server: Server, attach: Attach) -> None:
    disk = attach(server, queue_size=64)
    disk.write(0, b"\x32" * 512)
    disk.stop_queue(0)
    disk.queues.pop(0).close()
    disk.start_queue(disk.make_queue(0, 256, region=1))
    assert disk.read(0, 1) == b"\x32" * 512


def test_after_a_reset_the_device_can_be_set_up_again(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared, queues=2)
    disk.write(0, b"\x33" * 512, queue=1)
    disk.reset()
    for index in (0, 1):
        disk.queues.pop(index).close()
    disk.acknowledge()
    disk.share_memory()
    disk.start_queue(disk.make_queue(0, 32))
    assert disk.read(0, 1) == b"\x33" * 512


def test_memory_is_known_also_after_a_reset(shared: Daemon, attach: Attach) -> None:
    """A front end that tells only differences of its memory tells nothing again."""
    disk = attach(shared)
    disk.write(0, b"\x34" * 512)
    disk.reset()
    disk.queues.pop(0).close()
    disk.acknowledge()
    disk.start_queue(disk.make_queue(0, 32))
    assert disk.read(0, 1) == b"\x34" * 512


def test_a_reset_with_requests_in_flight(shared: Daemon, attach: Attach) -> None:
    for _ in range(10):
        disk = attach(shared, queues=2)
        for place in range(32):
            disk.submit(Type.IN, 8 * place, room=4096, queue=place % 2)
        disk.reset()
        before = [disk.queues[index].used_idx for index in (0, 1)]
        disk.settle()
        assert [disk.queues[index].used_idx for index in (0, 1)] == before
        disk.close()


# ---- the memory table ---------------------------------------------------------------------


def test_the_memory_table_may_be_sent_again_at_any_time(server: Server, attach: Attach) -> None:
    disk = attach(server, queue_size=256)
    for turn in range(20):
        data = bytes([turn + 1]) * 4096
        requests = [
            disk.submit(Type.OUT, 8 * i, data, layout=Layout(indirect=0)) for i in range(32)
        ]
        disk.share_memory()
        disk.wait(*requests)
        assert disk.read(8 * turn, 8) == data


def test_memory_added_at_run_time_can_be_used(server: Server, attach: Attach) -> None:
    disk = attach(server)
    disk.write(0, b"\x41" * 4096)
    disk.memory.add(RegionSpec(0x2_0000_0000, 2 * MIB, 0x7F60_0000_0000, offset=MIB))
    disk.share_memory()
    assert disk.read(0, 8, layout=Layout(regions=[2])) == b"\x41" * 4096


def test_memory_taken_away_at_run_time_is_not_touched_any_more(
    agent: Daemon, attach: Attach
) -> None:
    disk = attach(agent)
    region = disk.memory.add(RegionSpec(0x2_0000_0000, 2 * MIB, 0x7F60_0000_0000))
    disk.share_memory()
    disk.write(0, b"\x42" * 4096)
    assert disk.read(0, 8, layout=Layout(regions=[2])) == b"\x42" * 4096
    disk.share_memory(disk.memory.regions[:2])
    disk.submit(Type.IN, 0, room=4096, layout=Layout(regions=[2]), publish=False)
    before = bytes(region.view)
    disk.queues[0].publish()
    assert "memory" in agent.wait_broken()
    assert region.view == before


def test_regions_can_be_added_and_removed_one_by_one(server: Server, attach: Attach) -> None:
    disk = attach(server, start=False)
    disk.negotiate()
    disk.acknowledge()
    for region in disk.memory.regions:
        disk.add_region(region)
    disk.start_queue(disk.make_queue(0, 64))
    disk.write(0, b"\x43" * 4096, layout=Layout(regions=[1]))
    for turn in range(5):
        fresh = disk.memory.add(RegionSpec(0x2_0000_0000, MIB, 0x7F60_0000_0000))
        disk.add_region(fresh)
        assert disk.read(0, 8, layout=Layout(regions=[2, 1])) == b"\x43" * 4096, turn
        disk.remove_region(fresh)
        disk.memory.remove(fresh)
    assert disk.read(0, 8) == b"\x43" * 4096


def test_many_regions_work(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared, start=False)
    disk.negotiate()
    disk.acknowledge()
    for number in range(30):
        disk.memory.add(
            RegionSpec((2 << 32) + number * 4 * MIB, MIB, 0x7F60_0000_0000 + number * 8 * MIB)
        )
    for region in disk.memory.regions:
        disk.add_region(region)
    disk.start_queue(disk.make_queue(0, 128))
    layout = Layout(out=[16] + [512] * 31, into=[512] * 31, regions=range(32))
    data = os.urandom(32 * 512)
    disk.write(0, data, layout=layout)
    assert disk.read(0, 32, layout=layout) == data


# ---- connections --------------------------------------------------------------------------


def test_a_second_front_end_is_turned_away_and_the_first_goes_on(
    agent: Daemon, attach: Attach
) -> None:
    first = attach(agent)
    first.write(0, b"\x51" * 512)
    for _ in range(5):
        second = attach(agent, start=False)
        with pytest.raises(FrontEndError):
            second.start()
        assert first.read(0, 1) == b"\x51" * 512
    assert "second front end" in agent.log()
    assert agent.control.status()["clients"] == 1


def test_front_ends_may_follow_each_other_at_once(agent: Daemon, attach: Attach) -> None:
    """A hang-up that the back end has not read yet must not count as a front end."""
    for turn in range(60):
        disk = attach(agent, queues=2)
        disk.write(turn, bytes([turn]) * 512)
        disk.close()
    disk = attach(agent)
    assert disk.read(59, 1) == b"\x3b" * 512


def test_a_front_end_that_hangs_up_with_requests_in_flight_leaves_no_trace(
    agent: Daemon, attach: Attach
) -> None:
    for turn in range(20):
        disk = attach(agent, queues=4)
        for queue in range(4):
            for place in range(16):
                disk.submit(Type.OUT, 8 * place, bytes([turn]) * 4096, queue=queue)
                disk.submit(Type.IN, 8 * place, room=4096, queue=queue)
        disk.close()
    disk = attach(agent)
    disk.write(0, b"\x52" * 4096)
    assert disk.read(0, 8) == b"\x52" * 4096
    until("one client", lambda: agent.control.status()["clients"] == 1)


def test_no_descriptor_is_kept_after_a_hang_up(agent: Daemon, attach: Attach) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{agent.pid}/fd"))

    agent.control.status()
    attach(agent, queues=4, inflight=True).close()
    until("the front end to be gone", lambda: agent.control.status()["clients"] == 0)
    before = descriptors()
    for _ in range(10):
        attach(agent, queues=8, inflight=True).close()
    until("the front ends to be gone", lambda: agent.control.status()["clients"] == 0)
    until("all descriptors to be closed", lambda: descriptors() <= before)


def test_disks_of_a_group_have_front_ends_of_their_own(epochd: StartDaemon, attach: Attach) -> None:
    daemon = epochd(DiskSpec("alpha"), DiskSpec("beta"), DiskSpec("gamma", read_only=True))
    disks = [attach(daemon, index, queues=2) for index in range(3)]
    requests = []
    for turn in range(32):
        for index in (0, 1):
            data = bytes([16 * (index + 1) + turn % 16]) * 4096
            requests.append(disks[index].submit(Type.OUT, 8 * turn, data, queue=turn % 2))
    for index in (0, 1):
        disks[index].wait(*requests[index::2])
    for turn in range(32):
        for index in (0, 1):
            assert disks[index].read(8 * turn, 1)[0] == 16 * (index + 1) + turn % 16
    assert disks[2].read(0, 8) == bytes(4096)
    assert daemon.control.status()["clients"] == 3
    disks[0].close()
    until("two clients", lambda: daemon.control.status()["clients"] == 2)
    assert disks[1].read(0, 1)[0] == 32


def test_a_front_end_learns_of_the_end_of_the_daemon(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    agent.stop("term")
    with pytest.raises(HungUp):
        disk.read(0, 1)
