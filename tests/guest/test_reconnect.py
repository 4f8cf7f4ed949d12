"""The agent goes and comes back under a guest that is writing: a pause, not an error."""

from __future__ import annotations

import os
import signal
import time

import pytest
from conftest import Attach, StartDaemon
from frontend import INDIRECT, Type
from harness import Control, DiskSpec

from .conftest import StartMachine
from .counter import Counter
from .machine import Disk


@pytest.mark.parametrize("how", ["term", "kill"])
def test_a_restarted_agent_goes_on_where_it_was(
    epochd: StartDaemon, machine: StartMachine, how: str
) -> None:
    daemon = epochd(arena="64M")
    vm = machine(daemon).start()
    counter = Counter(pause_us=0)
    counter.start(vm)
    daemon.control.checkpoint()
    for _ in range(3):
        counter.advance(vm, 50)
        before = daemon.control.status()
        daemon.restart(how)
        counter.advance(vm, 50)
        counter.must_agree(vm)
        after = daemon.control.status()
        assert (after["open"], after["committed"]) == (before["open"], before["committed"])
    counter.stop(vm)
    counter.must_agree(vm)
    epoch = daemon.control.checkpoint()
    daemon.control.wait_applied(epoch)
    counter.must_agree(vm)


def test_the_epoch_that_was_open_when_the_agent_died_can_be_discarded(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    daemon = epochd(arena="64M")
    vm = machine(daemon).start()
    vm.run("echo old | dd of=/dev/vda bs=4096 conv=sync oflag=direct status=none")
    daemon.control.checkpoint()
    vm.run("echo new | dd of=/dev/vda bs=4096 conv=sync oflag=direct status=none")
    daemon.restart("kill")
    read = "dd if=/dev/vda bs=4096 count=1 iflag=direct status=none | head -n 1"
    assert vm.run(read) == "new"
    vm.kill()
    daemon.control.discard()
    assert machine(daemon).start().run(read) == "old"


STOP_SECONDS = float(os.environ.get("EPOCHD_TEST_STOP_SECONDS", "20"))


@pytest.mark.timeout(120 + 2 * STOP_SECONDS)
def test_an_agent_that_stands_still_is_waited_for_by_all(
    epochd: StartDaemon, machine: StartMachine, attach: Attach
) -> None:
    """SIGSTOP under a guest that writes, a front end with requests in flight and a commit
    that waits for its answer. EPOCHD_TEST_STOP_SECONDS: for how long."""
    daemon = epochd(DiskSpec("disk0"), DiskSpec("disk1"), arena="64M")
    vm = machine(daemon, disks=[Disk(daemon.socket(0))]).start()
    counter = Counter(pause_us=0)
    counter.start(vm)
    disk = attach(daemon, 1, queues=2, inflight=True)
    data = [os.urandom(4096) for _ in range(64)]
    sealed = daemon.control.seal()
    status = daemon.control.status()
    requests = []
    for place, content in enumerate(data):
        if place == 32:
            os.kill(daemon.pid, signal.SIGSTOP)
        requests.append(
            disk.submit(Type.OUT, place * 8, content, layout=INDIRECT, queue=place % 2)
        )
    try:
        commit = daemon.control.begin("epoch-commit", epoch=sealed)
        stopped = counter.count(vm)  # the program waits for its disk, the guest answers
        time.sleep(STOP_SECONDS)
        assert counter.count(vm) <= stopped + 1
        assert not commit.done()
        disk.reap(1)
        assert not all(request.done for request in requests)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    disk.wait(*requests)
    assert commit.result(30) == {"committed": sealed}
    counter.advance(vm, 50)
    counter.stop(vm)
    counter.must_agree(vm)
    after = daemon.control.status()
    assert (after["open"], after["clients"]) == (status["open"], 2)
    late = Control(daemon.control_path)
    try:
        epoch = late.checkpoint()
    finally:
        late.close()
    daemon.control.wait_applied(epoch)
    assert disk.read(0, 8 * 64, layout=INDIRECT) == b"".join(data)
    assert daemon.image_bytes(1)[: 64 * 4096] == b"".join(data)
    counter.must_agree(vm)
    assert daemon.log().count("front end connected") == 2
