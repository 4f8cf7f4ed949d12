"""The agent goes and comes back under a guest that is writing: a pause, not an error."""

from __future__ import annotations

import pytest
from conftest import StartDaemon

from .conftest import StartMachine
from .counter import Counter


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
