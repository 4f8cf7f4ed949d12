"""An arena that is too small for what the guest writes: it waits, and sees no error."""

from __future__ import annotations

from collections.abc import Callable

from conftest import StartDaemon
from harness import until

from .conftest import StartMachine


def test_a_full_arena_holds_the_guest_and_a_commit_lets_it_go_on(
    epochd: StartDaemon, machine: StartMachine
) -> None:
    daemon = epochd(arena="8M")
    vm = machine(daemon).start()
    vm.run("dd if=/dev/urandom of=/run/data bs=1M count=24 status=none")
    expected = vm.run("md5sum < /run/data")
    vm.run(
        "(dd if=/run/data of=/dev/vda bs=256k oflag=direct status=none; echo $? > /run/done)"
        " >/dev/null 2>&1 &"
    )

    def written() -> int:
        return int(daemon.control.disks()[0]["stats"]["write-bytes"])

    def written_since(before: int) -> Callable[[], bool]:
        return lambda: written() > before

    for _ in range(2):  # 24 MiB of noise do not fit into 8 MiB, nor into twice that
        until("writes to be held", lambda: daemon.control.status()["held"] > 0)
        assert vm.run("ls /run/done", check=False) != "/run/done"
        before = written()
        daemon.control.checkpoint()
        until("the guest to write more", written_since(before))
    daemon.control.wait_event("ARENA_PRESSURE", where=lambda data: data["held"])

    def finished() -> bool:
        daemon.control.checkpoint()
        return vm.run("cat /run/done", check=False) == "0"

    until("the guest's writes to end", finished)
    read = "dd if=/dev/vda bs=1M count=24 iflag=direct status=none | md5sum"
    assert vm.run(read) == expected
