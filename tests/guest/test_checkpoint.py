"""Checkpoints of a running guest: memory saved by QEMU, the disk by epochs, and failover."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import StartDaemon
from harness import DiskSpec

from .conftest import StartMachine
from .counter import Counter
from .image import ROOT


@pytest.mark.timeout(300)
def test_the_demo_tells_its_story_and_all_agrees(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--checkpoints", "3"]
    command += ["--interval", "0.2", "--keep", str(tmp_path / "demo")]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("MISMATCH") == 1
    assert done.stdout.count("AGREES") == 3
    assert "Everything agreed" in done.stdout


def test_a_live_migration_learns_of_every_page_that_the_agent_wrote(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    """Saved while it runs: QEMU depends on the agent's log of the pages it dirties."""
    daemon = epochd(arena="128M")
    vm = machine(daemon).start()
    counter = Counter(pause_us=0)
    counter.start(vm)
    for round_number in range(3):
        counter.advance(vm, 50)
        state = daemon.folder / f"state{round_number}"
        vm.save(state)
        daemon.control.checkpoint()
        vm.kill()
        vm = machine(daemon).restore(state)
        counter.must_agree(vm)
    counter.advance(vm, 50)
    counter.must_agree(vm)


def test_after_promotion_a_flush_survives_the_loss_of_the_host(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    daemon = epochd(arena="64M")
    vm = machine(daemon).start()
    write = "echo {0} | dd of=/dev/vda bs=4096 seek={1} conv=sync,fsync status=none"
    read = "dd if=/dev/vda bs=4096 skip={0} count=1 iflag=direct status=none | head -n 1"
    vm.run(write.format("committed", 0))
    vm.stop()
    vm.save(daemon.folder / "state")
    daemon.control.checkpoint()
    vm.cont()
    vm.run(write.format("lost", 0))
    vm.kill()

    assert daemon.control.execute("promote")["mode"] == "active"
    vm = machine(daemon).restore(daemon.folder / "state")
    assert vm.run(read.format(0)) == "committed"
    vm.run(write.format("flushed", 1))
    vm.kill()
    daemon.stop("kill")
    daemon.lose_shm()
    daemon.start()
    vm = machine(daemon).start()
    assert vm.run(read.format(0)) == "committed"
    assert vm.run(read.format(1)) == "flushed"


def test_two_disks_with_a_reactor_each_are_one_checkpoint(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    """Both count; the guest's memory and both disks are put back to one moment."""
    disks = [DiskSpec(f"disk{i}", size=128 << 20) for i in range(2)]
    daemon = epochd(*disks, arena="128M", options=["--reactors", "2"])
    assert daemon.control.status()["reactors"] == 2
    vm = machine(daemon).start()
    counters = [Counter(f"/dev/vd{'ab'[i]}", name=f"count{i}", pause_us=0) for i in range(2)]
    for counter in counters:
        counter.start(vm)
    for counter in counters:
        counter.advance(vm, 50)
    vm.stop()
    vm.save(daemon.folder / "state")
    daemon.control.checkpoint()
    vm.cont()
    for counter in counters:
        counter.advance(vm, 50)
    vm.kill()
    daemon.control.discard()
    vm = machine(daemon).restore(daemon.folder / "state")
    for counter in counters:
        counter.must_agree(vm)
        counter.advance(vm, 20)
    daemon.restart("kill")
    for counter in counters:
        counter.advance(vm, 20)
        counter.must_agree(vm)
