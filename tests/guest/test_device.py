"""The device comes, goes and starts again under a running QEMU, and memory is added to it."""

from __future__ import annotations

import hashlib
import os

from conftest import StartDaemon
from harness import DiskSpec, until

from .conftest import StartMachine
from .counter import Counter

MIB = 1 << 20


def test_the_driver_lets_go_of_the_disk_and_takes_it_again(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    vm = machine(epochd(arena="64M")).start()
    counter = Counter()
    driver = "/sys/bus/virtio/drivers/virtio_blk"
    name = vm.run(f"ls {driver} | grep virtio")
    for _ in range(3):
        counter.start(vm)
        counter.advance(vm, 20)
        counter.stop(vm)
        vm.run(f"echo {name} > {driver}/unbind; test ! -e /dev/vda")
        vm.run(f"echo {name} > {driver}/bind; test -b /dev/vda")
        counter.must_agree(vm)
        vm.run(f"rm {counter.state}; blkdiscard /dev/vda")


def test_a_guest_that_resets_finds_its_disk_as_it_left_it(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    daemon = epochd(arena="64M")
    vm = machine(daemon, may_reboot=True).start()
    read = "dd if=/dev/vda bs=4096 count=1 iflag=direct status=none | head -n 1"
    for text in ("one", "two"):
        vm.run(f"echo {text} | dd of=/dev/vda bs=4096 conv=sync oflag=direct status=none")
        vm.monitor.execute("system_reset")
        vm.wait_boot()
        assert vm.run(read) == text
    daemon.control.checkpoint()
    assert vm.run(read) == "two"


def test_memory_added_while_it_runs_can_be_used_for_requests(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    daemon = epochd(DiskSpec(size=160 * MIB), arena="256M", start=False)
    content = os.urandom(160 * MIB)
    daemon.image().write_bytes(content)
    daemon.start()
    # With room for more memory Linux keeps 64 MiB aside for itself.
    vm = machine(daemon, memory_mib=256, memory_options=",slots=2,maxmem=1G").start()
    vm.run("echo online > /sys/devices/system/memory/auto_online_blocks")
    vm.monitor.execute(
        "object-add", qom_type="memory-backend-memfd", id="more", size=512 * MIB, share=True
    )
    vm.monitor.execute("device_add", driver="pc-dimm", id="dimm", memdev="more")
    total = "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"
    until("the guest to use its new memory", lambda: int(vm.run(total)) > 512 << 10)
    vm.run("mount -o remount,size=300m /run")
    # One buffer, larger than the memory that was there at first.
    vm.run("dd if=/dev/vda of=/run/copy bs=150M count=1 iflag=direct,fullblock status=none")
    sum_of = "dd if={0} bs=1M count=150 {1} status=none | md5sum | cut -d ' ' -f 1"
    expected = hashlib.md5(content[: 150 * MIB]).hexdigest()
    assert vm.run(sum_of.format("/run/copy", "")) == expected
    vm.run("dd if=/run/copy of=/dev/vda bs=150M count=1 iflag=fullblock oflag=direct status=none")
    assert vm.run(sum_of.format("/dev/vda", "iflag=direct")) == expected


def test_a_disk_can_be_unplugged_and_plugged_again(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    daemon = epochd(arena="64M")
    vm = machine(daemon, extra=["-device", "pcie-root-port,id=root1,chassis=1"], disks=[]).start()
    monitor = vm.monitor
    read = "dd if=/dev/vda bs=4096 count=1 iflag=direct status=none | head -n 1"
    for number in range(2):
        backend = {"type": "unix", "data": {"path": str(daemon.socket())}}
        monitor.execute(
            "chardev-add",
            id="plug",
            backend={"type": "socket", "data": {"addr": backend, "server": False}},
        )
        device = {"driver": "vhost-user-blk-pci", "id": "plugged", "bus": "root1"}
        monitor.execute("device_add", chardev="plug", **device)
        until("the guest to see the disk", lambda: vm.call("test -b /dev/vda")[1] == 0)
        if number:
            assert vm.run(read) == "kept"
        vm.run("echo kept | dd of=/dev/vda bs=4096 conv=sync oflag=direct status=none")
        monitor.execute("device_del", id="plugged")
        monitor.wait_event("DEVICE_DELETED", where=lambda data: data.get("device") == "plugged")
        monitor.events.clear()
        monitor.execute("chardev-remove", id="plug")
