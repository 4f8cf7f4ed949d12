"""The counting program in a guest (counter.c), as tests and the demo use it."""

from __future__ import annotations

import base64
import gzip
import time

from harness import until

from .machine import GuestError, Machine


class Counter:
    """One run of the program: a region of a disk and the memory that knows its content."""

    def __init__(
        self,
        device: str = "/dev/vda",
        *,
        name: str = "count",
        first: int = 256,
        blocks: int = 8192,
        pause_us: int = 1000,
    ) -> None:
        """`first`, `blocks`: the region in 4 KiB blocks. `name`: a file in the guest's memory."""
        self.device = device
        self.state = f"/run/{name}"
        self.output = f"/run/{name}.out"
        self._run = f"counter run {device} {self.state} {first} {blocks} {pause_us}"

    def start(self, machine: Machine, cpu: int | None = None) -> None:
        """Starts counting, on one CPU only if that is given; returns after the first count."""
        bound = "" if cpu is None else f"taskset {1 << cpu:x} "
        machine.run(f"{bound}{self._run} >{self.output} 2>&1 &")
        machine.run(f"until [ -s {self.state} ]; do usleep 1000; done")
        self.wait(machine, 1)

    def count(self, machine: Machine) -> int:
        """How far it has counted."""
        return int(machine.run(f"counter status {self.state}").split()[1])

    def wait(self, machine: Machine, least: int) -> int:
        """Waits until it has counted that far; GuestError when it has stopped."""

        def far_enough() -> int:
            count = self.count(machine)
            if count >= least:
                return count
            if output := machine.run(f"cat {self.output}"):
                raise GuestError(f"the program ended at {count}: {output}")
            time.sleep(0.02)
            return 0

        return until(f"the guest to count to {least}", far_enough)

    def advance(self, machine: Machine, steps: int) -> int:
        """Waits until it has counted that much further."""
        return self.wait(machine, self.count(machine) + steps)

    def verify(self, machine: Machine) -> tuple[str, bool]:
        """The guest compares all its blocks with its memory: what it says, and the outcome."""
        text, status = machine.call(f"counter verify {self.device} {self.state}")
        if status not in (0, 1):
            raise GuestError(text)
        return text, status == 0

    def must_agree(self, machine: Machine) -> None:
        """GuestError when the disk and the guest's memory differ."""
        text, agrees = self.verify(machine)
        if not agrees:
            raise GuestError(text)

    def stop(self, machine: Machine) -> None:
        """Ends the program after the step that it is in."""
        machine.run(f"counter stop {self.state}")

    def memory(self, machine: Machine) -> bytes:
        """The program's memory; `counter verify` on the host takes it too. Stop it first."""
        packed = machine.run(f"gzip -c {self.state} | base64")
        return gzip.decompress(base64.b64decode(packed))
