"""The demo: a guest is checkpointed, dies in the middle of an epoch, and is restored; its
disk then agrees with its memory to the last block.

Stock QEMU runs a Linux guest whose disk is served by epochd. A program in the guest counts
in memory, and writes each count to blocks all over the disk. Checkpoints are taken as
micro-checkpointing takes them: stop; save memory, vCPUs and devices; seal; continue; commit
once the state is complete. All checks are made by the guest itself, of all its blocks.

Exit status: 0 when everything agreed, 1 when something did not (the files are kept then).
"""

from __future__ import annotations

import argparse
import base64
import gzip
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from guest import image
from guest.agent import Agent, AgentError
from guest.machine import Disk, GuestError, Machine, MachineError

MIB = 1 << 20
DISK_MIB = 256
FIRST_BLOCK, BLOCKS = 256, 16384  # the 64 MiB of the disk that the guest's program uses
PAUSE_US = 1000  # between two steps of the program
STATE = "/run/count"  # in the guest's memory


class DisagreementError(Exception):
    """Something is not as it must be."""


@dataclass
class Checkpoint:
    """A saved machine and the epoch of the disk that belongs to it."""

    number: int
    epoch: int
    state: Path
    count: int


def say(text: str = "") -> None:
    """One line of the story."""
    print(text, flush=True)


def step(number: int, text: str) -> None:
    """The headline of a chapter."""
    say(f"\n{number}. {text}")


class Demo:
    """The story, one method a chapter."""

    def __init__(self, folder: Path, checkpoints: int, interval: float) -> None:
        self.folder = folder
        self.checkpoints = checkpoints
        self.interval = interval
        self.image = folder / "disk.img"
        self.socket = folder / "disk.sock"
        self.boot = image.build()
        self.agent = Agent(
            folder, "--blk-file", self.image, "--socket-path", self.socket, "--arena-size", "256M"
        )
        self.disk = Disk(self.socket)
        self.machines = 0
        self.vm = self.new_machine()

    def new_machine(self) -> Machine:
        self.machines += 1
        return Machine(self.boot, self.folder, [self.disk], name=f"vm{self.machines}")

    def run(self) -> None:
        """Tells the story. DisagreementError when the disk and memory differ at any point."""
        started = time.monotonic()
        try:
            self.start_agent()
            self.boot_guest()
            committed = self.take_checkpoints()
            self.die_in_transit(committed)
            self.restore_without_discard(committed)
            self.discard(committed)
            self.restore(committed)
            self.finish()
        finally:
            self.vm.kill()
            self.agent.kill()
        say(f"\nEverything agreed. {time.monotonic() - started:.0f} seconds.")

    def start_agent(self) -> None:
        step(1, "The agent starts")
        with self.image.open("wb") as image:
            image.truncate(DISK_MIB * MIB)
        self.agent.start()
        status = self.agent.execute("query-status")
        say(f"   epochd serves a disk of {DISK_MIB} MiB; epoch {status['open']} is open.")
        say(f"   What the guest writes stays in shared memory ({mib(status['arena']['size'])})")
        say("   until its epoch is committed.")

    def boot_guest(self) -> None:
        step(2, "A Linux guest boots off stock QEMU, with its disk at the agent")
        started = time.monotonic()
        self.vm.start()
        took = time.monotonic() - started
        queues = self.vm.run("ls /sys/block/vda/mq | wc -l")
        sectors = int(self.vm.run("cat /sys/block/vda/size"))
        say(f"   up in {took:.1f} s; /dev/vda has {mib(sectors * 512)} and {queues} queues.")
        self.vm.run(
            f"counter run /dev/vda {STATE} {FIRST_BLOCK} {BLOCKS} {PAUSE_US} >/run/log 2>&1 &"
        )
        self.wait_count(1)
        say("   Its program counts in memory and writes each count all over 64 MiB of the disk.")

    def count(self) -> int:
        """The guest's counter now."""
        return int(self.vm.run(f"counter status {STATE}").split()[1])

    def wait_count(self, least: int, timeout: float = 60) -> int:
        """Waits until the guest has counted that far."""
        deadline = time.monotonic() + timeout
        while (count := self.count()) < least:
            if time.monotonic() > deadline:
                raise DisagreementError(
                    f"the guest stopped counting at {count}: {self.vm.run('cat /run/log')}"
                )
            time.sleep(0.05)
        return count

    def take_checkpoints(self) -> Checkpoint:
        step(3, f"{self.checkpoints} checkpoints: stop, save, seal, continue, commit")
        say("   epoch   count   written  in arena  ratio   VM paused   save  seal    commit")
        last: Checkpoint | None = None
        for number in range(1, self.checkpoints + 1):
            time.sleep(self.interval)
            self.wait_count(last.count + 20 if last else 20)
            checkpoint = self.checkpoint(number, commit=True)
            if last is not None:
                last.state.unlink()
            last = checkpoint
        assert last is not None
        return last

    def checkpoint(self, number: int, *, commit: bool) -> Checkpoint:
        """One checkpoint; prints its figures when it is committed."""
        state = self.folder / f"state-{number}"
        count = self.count()
        started = time.monotonic()
        self.vm.stop()
        self.vm.save(state)
        saved = time.monotonic()
        epoch = self.agent.execute("epoch-seal")["epoch"]
        sealed = time.monotonic()
        self.vm.cont()
        resumed = time.monotonic()
        if commit:
            figures = next(e for e in self.agent.execute("query-epochs") if e["id"] == epoch)
            committing = time.monotonic()
            committed = self.agent.execute("epoch-commit", epoch=epoch)["committed"]
            took = time.monotonic() - committing
            if committed != epoch:
                raise DisagreementError(f"epoch {epoch} was committed, the agent says {committed}")
            logical, stored = figures["logical-bytes"], figures["stored-bytes"]
            say(
                f"   {epoch:5} {count:7} {mib(logical):>9} {mib(stored):>9}"
                f" {logical / max(stored, 1):6.1f} {ms(resumed - started):>11}"
                f" {ms(saved - started):>6} {ms(sealed - saved, 2):>7} {ms(took):>7}"
            )
        return Checkpoint(number, epoch, state, count)

    def die_in_transit(self, committed: Checkpoint) -> None:
        step(4, "The primary dies while a checkpoint is in transit")
        lost = self.checkpoint(committed.number + 1, commit=False)
        lost.state.unlink()
        count = self.wait_count(lost.count + 100)
        status = self.agent.execute("query-status")
        self.vm.kill()
        say(f"   Epoch {lost.epoch} is sealed, but its state never arrived. The guest went on to")
        say(f"   count {count} in epoch {status['open']}; then QEMU was killed with SIGKILL.")
        say(f"   Committed is epoch {status['committed']}, sealed when the guest had counted to")
        say(f"   {committed.count} or a little more.")

    def restore_without_discard(self, checkpoint: Checkpoint) -> None:
        step(5, "Control: restored without discarding, does the guest notice?")
        self.vm = self.new_machine().restore(checkpoint.state)
        text, status = self.verify()
        if status != 1 or "MISMATCH" not in text:
            raise DisagreementError(f"the guest did not notice the newer blocks (status {status})")
        say("   Yes, as it must: the disk is newer than its memory.")
        self.vm.kill()

    def verify(self) -> tuple[str, int]:
        """The guest compares every block with its memory; what it says is printed."""
        text, status = self.vm.call(f"counter verify /dev/vda {STATE}")
        for line in text.splitlines():
            say(f"   guest: {line}")
        return text, status

    def must_agree(self) -> None:
        text, status = self.verify()
        if status or "AGREES" not in text:
            raise DisagreementError("the guest's disk differs from its memory")
        if errors := self.vm.guest_errors():
            raise DisagreementError(f"the guest's kernel complains: {errors[0]}")

    def discard(self, checkpoint: Checkpoint) -> None:
        step(6, "The agent discards what was not committed")
        started = time.monotonic()
        answer = self.agent.execute("epoch-discard")
        took = time.monotonic() - started
        if answer["committed"] != checkpoint.epoch:
            raise DisagreementError(f"committed is {answer['committed']}, not {checkpoint.epoch}")
        names = ", ".join(str(epoch) for epoch in answer["discarded"])
        say(f"   epochs {names} are gone, in {ms(took, 2)}; the disk is that of epoch"
            f" {checkpoint.epoch}.")

    def restore(self, checkpoint: Checkpoint) -> None:
        step(7, f"The guest is restored from checkpoint {checkpoint.number}, on the same agent")
        started = time.monotonic()
        self.vm = self.new_machine().restore(checkpoint.state)
        say(f"   running again after {ms(time.monotonic() - started)}.")
        self.must_agree()
        count = self.wait_count(checkpoint.count + 200)
        say(f"   It goes on counting: {count}.")
        self.must_agree()

    def finish(self) -> None:
        step(8, "A last commit, and the image file is read without the agent")
        self.vm.run(f"counter stop {STATE}")
        memory = self.folder / "memory"
        packed = self.vm.run(f"gzip -c {STATE} | base64")
        memory.write_bytes(gzip.decompress(base64.b64decode(packed)))
        self.vm.kill()
        self.agent.execute("epoch-seal")
        self.agent.execute("epoch-commit")
        self.agent.quit()
        counter = self.boot.counter
        done = subprocess.run(
            [counter, "verify", self.image, memory], capture_output=True, text=True, check=False
        )
        for line in (done.stdout + done.stderr).splitlines():
            say(f"   host: {line}")
        if done.returncode:
            raise DisagreementError("the image differs from the guest's memory")


def mib(count: int) -> str:
    """Bytes as MiB, for people."""
    return f"{count / MIB:.0f} MiB" if count >= 10 * MIB else f"{count / MIB:.1f} MiB"


def ms(seconds: float, digits: int = 0) -> str:
    """Seconds as milliseconds, for people."""
    return f"{seconds * 1000:.{digits}f} ms"


def arguments() -> argparse.Namespace:
    """The command line; tools/demo documents it."""
    parser = argparse.ArgumentParser(prog="tools/demo", add_help=False)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--interval", type=float, default=1.0)
    parser.add_argument("--keep", type=Path)
    chosen = parser.parse_args()
    if chosen.checkpoints < 1 or not 0 <= chosen.interval <= 60:
        parser.error("at least one checkpoint, and an interval of 0 to 60 seconds")
    if chosen.keep and chosen.keep.exists() and any(chosen.keep.iterdir()):
        parser.error(f"{chosen.keep} is not empty; name another directory")
    return chosen


def main() -> int:
    """Runs the demo and cleans up."""
    chosen = arguments()
    if chosen.keep:
        chosen.keep.mkdir(parents=True, exist_ok=True)
    folder = (chosen.keep or Path(tempfile.mkdtemp(prefix="epochd-demo."))).resolve()
    try:
        Demo(folder, chosen.checkpoints, chosen.interval).run()
    except (DisagreementError, AgentError, GuestError, MachineError) as error:
        say(f"\nFAILED: {error}\nThe files are in {folder}")
        return 1
    if not chosen.keep:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
