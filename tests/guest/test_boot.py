"""What a Linux guest sees of its disks, attached by QEMU's ordinary command line."""

from __future__ import annotations

from conftest import StartDaemon
from harness import DiskSpec

from .conftest import StartMachine
from .counter import Counter

MIB = 1 << 20


def test_linux_sees_the_disk_with_all_its_properties(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    vm = machine(epochd(DiskSpec(size=96 * MIB, serial="serial-of-20-bytes.."))).start()

    def attribute(name: str) -> str:
        return vm.run(f"cat /sys/block/vda/{name}")

    assert int(attribute("size")) * 512 == 96 * MIB
    assert attribute("serial") == "serial-of-20-bytes.."
    assert attribute("ro") == "0"
    assert vm.run("ls /sys/block/vda/mq").split() == ["0", "1"]
    assert attribute("queue/logical_block_size") == "512"
    assert attribute("queue/write_cache") == "write back"
    assert int(attribute("queue/discard_max_bytes")) > 0
    assert int(attribute("queue/write_zeroes_max_bytes")) > 0
    assert int(attribute("queue/max_segments")) > 1


def test_four_processors_use_four_queues_at_once(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    daemon = epochd(arena="64M")
    vm = machine(daemon, cpus=4).start()
    assert len(vm.run("ls /sys/block/vda/mq").split()) == 4
    counters = [Counter(name=f"count{cpu}", first=cpu * 4096, blocks=2048) for cpu in range(4)]
    for cpu, counter in enumerate(counters):
        counter.start(vm, cpu)
    for _ in range(3):
        for counter in counters:
            counter.advance(vm, 20)
        daemon.control.checkpoint()
    for counter in counters:
        counter.stop(vm)
        counter.must_agree(vm)
    requests = [queue["requests"] for queue in daemon.control.disks()[0]["queues"][:4]]
    assert min(requests) > 0


def test_a_read_only_disk_can_be_read_and_refuses_writes(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    daemon = epochd(DiskSpec(read_only=True), start=False)
    with daemon.image().open("r+b") as image:
        image.write(b"written before".ljust(4096, b"."))
    daemon.start()
    vm = machine(daemon).start()
    assert vm.run("cat /sys/block/vda/ro") == "1"
    assert vm.run("dd if=/dev/vda bs=4096 count=1 status=none").rstrip(".") == "written before"
    _, status = vm.call("dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync")
    assert status != 0
    assert vm.run("dd if=/dev/vda bs=14 count=1 iflag=direct bs=4096 status=none | head -c 7")


def test_two_disks_commit_and_vanish_together(epochd: StartDaemon, machine: StartMachine) -> None:
    daemon = epochd(DiskSpec("first"), DiskSpec("second", size=32 * MIB), arena="64M")
    vm = machine(daemon).start()
    write = "echo {0} | dd of=/dev/{1} bs=4096 conv=sync oflag=direct status=none"
    read = "dd if=/dev/{0} bs=4096 count=1 iflag=direct status=none | head -n 1"
    assert int(vm.run("cat /sys/block/vdb/size")) * 512 == 32 * MIB
    for disk in ("vda", "vdb"):
        vm.run(write.format(f"old-{disk}", disk))
    daemon.control.checkpoint()
    for disk in ("vda", "vdb"):
        vm.run(write.format(f"new-{disk}", disk))
        assert vm.run(read.format(disk)) == f"new-{disk}"
    vm.kill()
    daemon.control.discard()
    vm = machine(daemon).start()
    for disk in ("vda", "vdb"):
        assert vm.run(read.format(disk)) == f"old-{disk}"
