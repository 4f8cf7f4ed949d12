"""Kills the agent under a real guest: a pause for it, never an error.

Stock QEMU with `reconnect=1` runs the counting program (tests/guest/counter.c): it writes with
direct I/O, and before it overwrites a block it reads it and compares it with its memory. The
agent is killed with SIGKILL at random moments while the guest counts and while the
controller seals and commits; after each new start the guest must go on counting. At the end
every block is compared, the guest's kernel must not have seen an error, and after a clean
stop the image must be what the guest's memory says.

Errors: `Lost`, with the guest's words.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from guest import image
from guest.counter import Counter
from guest.machine import Disk, GuestError, Machine, MachineError
from harness import Daemon

from .campaign import Lost

STEPS_BETWEEN = 20
KILL_WITHIN_S = 0.3


class GuestCampaign:
    """One guest and one agent that is killed over and over. `close()` ends both."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.boot = image.build()
        self.daemon = Daemon(folder, arena="64M")
        self.machine = Machine(self.boot, folder, [Disk(self.daemon.socket())])
        self.counter = Counter(pause_us=0)
        self.progress: Callable[[int], None] = lambda done: None
        self.seals = self.commits = 0
        self.open = self.committed = 0

    def run(self, kills: int) -> list[str]:
        """The figures as lines; `Lost`."""
        self.daemon.start()
        self.machine.start()
        self.counter.start(self.machine)
        try:
            for done in range(kills):
                self._round()
                self.progress(done + 1)
            self._end()
        except (GuestError, MachineError, TimeoutError, RuntimeError) as error:
            raise Lost(f"{type(error).__name__}: {error}\n{self.daemon.log()[-2000:]}") from error
        reconnects = self.daemon.log().count("front end connected") - 1
        if reconnects < kills:
            raise Lost(f"{kills} kills, but the guest's disk came back {reconnects} times")
        return [
            f"kills = {kills}",
            f"reconnects = {reconnects}",
            f"seals = {self.seals}, commits = {self.commits}",
            f"steps that the guest counted and checked = {self.count}",
        ]

    def _round(self) -> None:
        """Some checkpoints, a kill in the middle, a new agent; the guest goes on."""
        until = time.monotonic() + self.random.uniform(0, KILL_WITHIN_S)
        while time.monotonic() < until:
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
        self.counter.advance(self.machine, STEPS_BETWEEN)
        errors = self.machine.guest_errors()
        if errors:
            raise Lost("the guest saw errors:\n" + "\n".join(errors))

    def _end(self) -> None:
        self.counter.stop(self.machine)
        self.counter.must_agree(self.machine)
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
        if errors := self.machine.guest_errors():
            raise Lost("the guest saw errors:\n" + "\n".join(errors))

    def close(self) -> None:
        """End both whatever their state."""
        self.machine.kill()
        self.daemon.close()
