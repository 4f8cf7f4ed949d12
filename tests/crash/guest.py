"""Kills the agent under a real guest: a pause for it, never an error.

Stock QEMU with `reconnect=1` runs two programs on two disks of one group. The counting program
(tests/guest/counter.c) writes with direct I/O, and before it overwrites a block it reads it and
compares it with its memory. fio writes random blocks, many in flight, and verifies each by
checksum and count. The agent is killed with SIGKILL at random moments while both run and while
the controller seals and commits; after each new start both must go on. At the end every block
is compared, the guest's kernel must not have seen an error, and after a commit and a clean
stop the images must be what the guest says.

Errors: `Lost`, with the guest's words.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from guest import fio, image
from guest.counter import Counter
from guest.machine import Disk, GuestError, Machine, MachineError
from harness import Daemon, DiskSpec, until

from .campaign import Lost

DISKS = 2
STEPS_BETWEEN = 20
BLOCKS_BETWEEN = 100
KILL_WITHIN_S = 0.3


class GuestCampaign:
    """One guest and one agent that is killed over and over. `close()` ends both."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.boot = image.build()
        self.daemon = Daemon(folder, [DiskSpec(f"disk{i}") for i in range(DISKS)], arena="64M")
        disks = [Disk(self.daemon.socket(i)) for i in range(DISKS)]
        tools = fio.machine_options(fio.drive())
        self.machine = Machine(self.boot, folder, disks, memory_mib=256, extra=tools)
        self.counter = Counter("/dev/vda", pause_us=0)
        self.fio = fio.Fio("/dev/vdb", "/dev/vdc")
        self.blocks = (0, 0)
        self.progress: Callable[[int], None] = lambda done: None
        self.seals = self.commits = 0
        self.open = self.committed = 0

    def run(self, kills: int) -> list[str]:
        """The figures as lines; `Lost`."""
        self.daemon.start()
        self.machine.start()
        try:
            self.counter.start(self.machine)
            self.fio.start(self.machine)
            for done in range(kills):
                self._round()
                self.progress(done + 1)
            self._end()
        except (GuestError, MachineError, TimeoutError, RuntimeError) as error:
            raise Lost(f"{type(error).__name__}: {error}\n{self.daemon.log()[-2000:]}") from error
        reconnects = self.daemon.log().count("front end connected") - DISKS
        if reconnects < kills * DISKS:
            raise Lost(f"{kills} kills, but the guest's disks came back {reconnects} times")
        return [
            f"kills = {kills}",
            f"reconnects = {reconnects}",
            f"seals = {self.seals}, commits = {self.commits}",
            f"steps that the guest counted and checked = {self.count}",
            f"blocks that fio wrote = {self.blocks[1]}, verified = {self.blocks[0]}",
        ]

    def _round(self) -> None:
        """Some checkpoints, a kill in the middle, a new agent; the guest goes on."""
        end = time.monotonic() + self.random.uniform(0, KILL_WITHIN_S)
        while time.monotonic() < end:
            if self.random.random() < 0.5:
                self.daemon.control.seal()
                self.seals += 1
            elif self.daemon.control.status()["sealed"]:
                self.daemon.control.commit()
                self.commits += 1
        if self.random.random() < 0.5:
            self.daemon.control.begin("epoch-commit")  # dies with its answer under way
        self.daemon.restart("kill")
        status = self.daemon.control.status()
        if status["open"] < self.open or status["committed"] < self.committed:
            raise Lost(f"ids went back: {status}")
        self.open, self.committed = status["open"], status["committed"]
        self._go_on()
        errors = self.machine.guest_errors()
        if errors:
            raise Lost("the guest saw errors:\n" + "\n".join(errors))

    def _go_on(self, blocks: int = BLOCKS_BETWEEN) -> None:
        """Both programs get on; epochs are committed when the arena is full."""
        steps = self.counter.count(self.machine) + STEPS_BETWEEN
        reads, writes = self.fio.progress(self.machine)

        def further() -> bool:
            if self.daemon.control.status()["held"]:
                self.daemon.control.checkpoint()
            self.blocks = self.fio.progress(self.machine)
            fio_did = self.blocks[0] >= reads + blocks and self.blocks[1] >= writes + blocks
            return fio_did and self.counter.count(self.machine) >= steps

        until("the guest's programs to go on", further)

    def _end(self) -> None:
        # All of fio's blocks were written at least once then.
        self._go_on(max(BLOCKS_BETWEEN, 2 * self.fio.blocks - min(self.blocks)))
        self.daemon.control.checkpoint()  # room for what is under way
        self.fio.stop(self.machine)
        self.counter.stop(self.machine)
        self.counter.must_agree(self.machine)
        digest = self.fio.digest(self.machine)
        self.count = self.counter.count(self.machine)
        memory = self.daemon.folder / "counter.state"
        memory.write_bytes(self.counter.memory(self.machine))
        self.daemon.control.checkpoint()
        self.machine.kill()
        self.daemon.stop("quit")
        check = subprocess.run(
            [self.boot.counter, "verify", self.daemon.image(), memory],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        if check.returncode:
            raise Lost(f"the image differs from the guest's memory: {check.stdout}")
        try:
            self.fio.verify_image(self.daemon.image(1))
        except GuestError as error:
            raise Lost(str(error)) from error
        size = self.fio.blocks * fio.BLOCK_BYTES
        if hashlib.md5(self.daemon.image_bytes(1)[:size]).hexdigest() != digest:
            raise Lost("the image differs from what the guest read")
        if errors := self.machine.guest_errors():
            raise Lost("the guest saw errors:\n" + "\n".join(errors))

    def close(self) -> None:
        """End both whatever their state."""
        self.machine.kill()
        self.daemon.close()
