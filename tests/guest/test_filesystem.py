"""A file system on the disk, across commits, lost epochs and failover."""

from __future__ import annotations

import os

from conftest import StartDaemon
from harness import Daemon

from .conftest import StartMachine
from .machine import Machine

MIB = 1 << 20
MAKE = "mkfs.ext4 -q -F /dev/vda && mount -t ext4 /dev/vda /mnt"


def fail_over(daemon: Daemon, vm: Machine, machine: StartMachine) -> Machine:
    """QEMU dies, the open epoch goes, the guest boots again from the committed disk."""
    vm.kill()
    daemon.control.discard()
    return machine(daemon).start()


def test_a_lost_epoch_leaves_the_old_files_and_a_clean_file_system(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    daemon = epochd(arena="64M")
    vm = machine(daemon).start()
    vm.run(f"{MAKE} && mkdir /mnt/d && seq 1 200000 > /mnt/d/numbers && echo old > /mnt/file")
    sums = vm.run("cd /mnt && md5sum file d/numbers")
    vm.run("umount /mnt")
    daemon.control.checkpoint()
    vm.run("mount -t ext4 /dev/vda /mnt && echo new > /mnt/file && rm -r /mnt/d && umount /mnt")

    vm = fail_over(daemon, vm, machine)
    vm.run("e2fsck -fn /dev/vda")
    vm.run("mount -t ext4 /dev/vda /mnt")
    assert vm.run("cd /mnt && md5sum file d/numbers") == sums
    assert vm.run("cat /mnt/file") == "old"


def test_an_epoch_sealed_in_the_middle_of_writing_is_a_crash_consistent_file_system(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    daemon = epochd(arena="64M")
    vm = machine(daemon).start()
    vm.run(f"{MAKE} && echo kept > /mnt/kept && sync")
    writer = "i=0; while :; do i=$((i + 1)); seq 1 $i > /mnt/file$((i % 50)); done"
    vm.run(f"({writer}) >/dev/null 2>&1 &")
    for _ in range(3):
        blocks = daemon.control.status()["open"]
        vm.run("sync; usleep 100000")
        assert daemon.control.checkpoint() == blocks
    vm.run("usleep 100000")

    vm = fail_over(daemon, vm, machine)
    text, status = vm.call("e2fsck -fy /dev/vda")  # replays the file system's own journal
    assert status in (0, 1), text
    vm.run("e2fsck -fn /dev/vda")
    vm.run("mount -t ext4 /dev/vda /mnt")
    assert vm.run("cat /mnt/kept") == "kept"


def test_trimmed_files_give_their_space_back(epochd: StartDaemon, machine: StartMachine) -> None:
    daemon = epochd(arena="64M")
    vm = machine(daemon).start()
    vm.run(f"{MAKE} && dd if=/dev/urandom of=/mnt/big bs=1M count=24 conv=fsync status=none")
    daemon.control.checkpoint()
    daemon.control.wait_applied()
    full = os.stat(daemon.image()).st_blocks * 512
    assert full > 24 * MIB
    vm.run("rm /mnt/big && sync && fstrim /mnt && umount /mnt")
    daemon.control.checkpoint()
    daemon.control.wait_applied()
    assert os.stat(daemon.image()).st_blocks * 512 < full - 20 * MIB
    vm.run("e2fsck -fn /dev/vda")


def test_discarded_and_zeroed_ranges_read_as_zeroes(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    daemon = epochd(arena="64M")
    vm = machine(daemon).start()
    zeroes = "dd if=/dev/zero bs=64k count=16 status=none | md5sum"
    read = "dd if=/dev/vda bs=64k count=16 skip={0} iflag=direct status=none | md5sum"
    vm.run("dd if=/dev/urandom of=/dev/vda bs=64k count=64 oflag=direct status=none")
    kept = vm.run(read.format(32))
    daemon.control.checkpoint()
    vm.run("blkdiscard -o 0 -l 1M /dev/vda && /sbin/blkdiscard -z -o 1M -l 1M /dev/vda")
    for _ in ("in the open epoch", "in the image"):
        assert vm.run(read.format(0)) == vm.run(zeroes)
        assert vm.run(read.format(16)) == vm.run(zeroes)
        assert vm.run(read.format(32)) == kept
        daemon.control.checkpoint()
        daemon.control.wait_applied()
    info = daemon.control.disks()[0]["stats"]
    assert info["discards"] > 0
    assert info["write-zeroes"] > 0
