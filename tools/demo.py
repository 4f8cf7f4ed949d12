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
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from guest import image
from guest.counter import Counter
from guest.machine import Disk, Machine
from harness import ControlError, Daemon, DiskSpec

MIB = 1 << 20
DISK_MIB = 256
BLOCKS = 16384  # the 64 MiB of the disk that the guest's program uses
FAILURES = (ControlError, OSError, RuntimeError)


class DisagreementError(RuntimeError):
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
        self.boot = image.build()
        self.agent = Daemon(folder, [DiskSpec("disk", DISK_MIB * MIB)], arena="256M")
        self.disk = Disk(self.agent.socket())
        self.counter = Counter(blocks=BLOCKS)
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
            self.agent.close()
        say(f"\nEverything agreed. {time.monotonic() - started:.0f} seconds.")

    def start_agent(self) -> None:
        step(1, "The agent starts")
        self.agent.start()
        self.control = self.agent.control
        status = self.control.status()
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
        self.counter.start(self.vm)
        say("   Its program counts in memory and writes each count all over 64 MiB of the disk.")

    def take_checkpoints(self) -> Checkpoint:
        step(3, f"{self.checkpoints} checkpoints: stop, save, seal, continue, commit")
        say("   VM paused = save (a full copy of its memory) + seal, as the controller sees it.")
        say("")
        say("   epoch   count   written   journal  ratio  VM paused    save    seal   commit")
        last: Checkpoint | None = None
        for number in range(1, self.checkpoints + 1):
            time.sleep(self.interval)
            self.counter.wait(self.vm, last.count + 20 if last else 20)
            checkpoint = self.checkpoint(number, commit=True)
            if last is not None:
                last.state.unlink()
            last = checkpoint
        seal_us = self.stats()["seal-ns-last"] / 1000
        say(f"   Of a seal's time the agent itself needed {seal_us:.0f} us.")
        assert last is not None
        return last

    def checkpoint(self, number: int, *, commit: bool) -> Checkpoint:
        """One checkpoint; prints its figures when it is committed."""
        state = self.folder / f"state-{number}"
        count = self.counter.count(self.vm)
        started = time.monotonic()
        self.vm.stop()
        self.vm.save(state)
        saved = time.monotonic()
        epoch = self.control.seal()
        sealed = time.monotonic()
        self.vm.cont()
        resumed = time.monotonic()
        if commit:
            took, logical, stored = self.commit(epoch)
            say(
                f"   {epoch:5} {count:7} {mib(logical):>9} {mib(stored):>9}"
                f" {logical / max(stored, 1):6.1f} {ms(resumed - started):>10}"
                f" {ms(saved - started):>7} {ms(sealed - saved, 1):>7} {ms(took):>8}"
            )
        return Checkpoint(number, epoch, state, count)

    def commit(self, epoch: int) -> tuple[float, int, int]:
        """Seconds until it was durable, bytes that the guest wrote, bytes in the journal."""
        figures = next(e for e in self.control.execute("query-epochs") if e["epoch"] == epoch)
        journal = self.stats()["journal-bytes-written"]
        started = time.monotonic()
        committed = self.control.commit(epoch)
        took = time.monotonic() - started
        if committed != epoch:
            raise DisagreementError(f"epoch {epoch} was committed, the agent says {committed}")
        written = self.stats()["journal-bytes-written"] - journal
        return took, figures["logical-bytes"], written

    def stats(self) -> dict[str, int]:
        """The agent's counters."""
        group: dict[str, int] = self.control.execute("query-stats")["group"]
        return group

    def die_in_transit(self, committed: Checkpoint) -> None:
        step(4, "The primary dies while a checkpoint is in transit")
        lost = self.checkpoint(committed.number + 1, commit=False)
        lost.state.unlink()
        count = self.counter.wait(self.vm, lost.count + 100)
        status = self.control.status()
        self.vm.kill()
        say(f"   Epoch {lost.epoch} is sealed, but its state never arrived. The guest went on to")
        say(f"   count {count} in epoch {status['open']}; then QEMU was killed with SIGKILL.")
        say(f"   Committed is epoch {status['committed']}, sealed when the guest had counted to")
        say(f"   {committed.count} or a little more.")

    def restore_without_discard(self, checkpoint: Checkpoint) -> None:
        step(5, "Control: restored without discarding, does the guest notice?")
        self.vm = self.new_machine().restore(checkpoint.state)
        text, agrees = self.verify()
        if agrees or "MISMATCH" not in text:
            raise DisagreementError("the guest did not notice the newer blocks")
        say("   Yes, as it must: the disk is newer than its memory.")
        self.vm.kill()

    def verify(self) -> tuple[str, bool]:
        """The guest compares every block with its memory; what it says is printed."""
        text, agrees = self.counter.verify(self.vm)
        for line in text.splitlines():
            say(f"   guest: {line}")
        return text, agrees

    def must_agree(self) -> None:
        text, agrees = self.verify()
        if not agrees or "AGREES" not in text:
            raise DisagreementError("the guest's disk differs from its memory")
        if errors := self.vm.guest_errors():
            raise DisagreementError(f"the guest's kernel complains: {errors[0]}")

    def discard(self, checkpoint: Checkpoint) -> None:
        step(6, "The agent discards what was not committed")
        started = time.monotonic()
        answer = self.control.execute("epoch-discard")
        took = time.monotonic() - started
        if answer["committed"] != checkpoint.epoch:
            raise DisagreementError(f"committed is {answer['committed']}, not {checkpoint.epoch}")
        names = ", ".join(str(epoch) for epoch in answer["discarded"])
        say(
            f"   epochs {names} are gone, in {ms(took, 2)}; the disk is that of epoch"
            f" {checkpoint.epoch}."
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        step(7, f"The guest is restored from checkpoint {checkpoint.number}, on the same agent")
        started = time.monotonic()
        self.vm = self.new_machine().restore(checkpoint.state)
        say(f"   running again after {ms(time.monotonic() - started)}.")
        self.must_agree()
        count = self.counter.wait(self.vm, checkpoint.count + 200)
        say(f"   It goes on counting: {count}.")
        self.must_agree()

    def finish(self) -> None:
        step(8, "A last commit, and the image file is read without the agent")
        self.counter.stop(self.vm)
        memory = self.folder / "memory"
        memory.write_bytes(self.counter.memory(self.vm))
        self.vm.kill()
        self.control.checkpoint()
        self.agent.stop("quit")
        command = [str(self.boot.counter), "verify", str(self.agent.image()), str(memory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
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
    except FAILURES as error:
        say(f"\nFAILED: {type(error).__name__}: {error}\nThe files are in {folder}")
        return 1
    if not chosen.keep:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
