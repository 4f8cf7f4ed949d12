"""A virtual machine under test: stock QEMU, a Linux guest, and a shell into it.

`Machine` starts QEMU with the plain options that a user would give, talks QMP to it and
runs commands in the guest over its second serial port (see `init`). A machine is ended by
the process id that was started here, at the latest when this process ends, however that
comes about. Every wait has a limit.

Errors: GuestError when a command in the guest fails, MachineError when QEMU ends or does
not answer; both carry the end of the log that tells why.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from frontend import DEADLINE_S
from harness import Control, listens, until

from .image import Boot

QEMU = os.environ.get("EPOCHD_QEMU", "qemu-system-x86_64")
CPU_SECONDS_MAX = 1200  # a machine that was forgotten ends by itself
# no_timer_check: on a busy host the kernel finds that "IO-APIC + timer does not work" and gives up.
CONSOLE = "console=ttyS0 loglevel=5 panic=-1 random.trust_cpu=on mitigations=off no_timer_check"


class MachineError(RuntimeError):
    """QEMU did not do what it was asked to."""


class GuestError(RuntimeError):
    """A command in the guest ended with another status than 0."""


@dataclass(frozen=True)
class Disk:
    """A vhost-user-blk device: the agent's socket, and options of the two QEMU objects."""

    socket: Path
    chardev: str = "reconnect=1"
    device: str = ""


@dataclass
class Machine:
    """One run of QEMU. Start it with `start` or `restore`, or use it in a `with`."""

    boot: Boot
    folder: Path
    disks: list[Disk]
    name: str = "vm"
    memory_mib: int = 128
    memory_options: str = ""
    cpus: int = 2
    extra: list[str] = field(default_factory=list)
    may_reboot: bool = False
    errors_expected: bool = False

    def __post_init__(self) -> None:
        self.console = self.folder / f"{self.name}.console"
        self.log = self.folder / f"{self.name}.log"
        self._monitor_path = self.folder / f"{self.name}.qmp"
        self._shell_path = self.folder / f"{self.name}.sh"
        self._commands = 0
        self._shell: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._monitor: Control | None = None

    def command_line(self) -> list[str]:
        """The QEMU command as it is run, for a machine that boots."""
        line = [QEMU, "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"]
        line += ["-smp", str(self.cpus), "-m", f"{self.memory_mib}M{self.memory_options}"]
        memory = f"memory-backend-memfd,id=mem,size={self.memory_mib}M,share=on"
        line += ["-object", memory, "-numa", "node,memdev=mem"]
        line += ["-nodefaults", "-no-user-config", "-display", "none"]
        line += [] if self.may_reboot else ["-no-reboot"]
        line += ["-kernel", str(self.boot.kernel), "-initrd", str(self.boot.initrd)]
        line += ["-append", CONSOLE]
        for number, disk in enumerate(self.disks):
            backend = f"socket,id=disk{number},path={disk.socket}"
            device = f"vhost-user-blk-pci,chardev=disk{number}"
            line += ["-chardev", ",".join(filter(None, [backend, disk.chardev]))]
            line += ["-device", ",".join(filter(None, [device, disk.device]))]
        line += ["-serial", f"file:{self.console}"]
        line += ["-chardev", f"socket,id=shell,path={self._shell_path},server=on,wait=off"]
        line += ["-serial", "chardev:shell"]
        line += ["-chardev", f"socket,id=qmp,path={self._monitor_path},server=on,wait=off"]
        line += ["-mon", "chardev=qmp,mode=control"]
        return line + self.extra

    def _launch(self, *more: str) -> None:
        for path in (self._monitor_path, self._shell_path):
            path.unlink(missing_ok=True)
        guard = ["prlimit", f"--cpu={CPU_SECONDS_MAX}", "setpriv", "--pdeathsig", "KILL", "--"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*guard, *self.command_line(), *more],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            until("QEMU's monitor", self._came_up)
            self._monitor = Control(self._monitor_path)
        except Exception as error:
            self.kill()
            raise MachineError(f"QEMU did not start: {self._log_end(self.log)}") from error

    def _came_up(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise MachineError("it ended")
        return listens(self._monitor_path) and listens(self._shell_path)

    @property
    def monitor(self) -> Control:
        """QEMU's monitor, while QEMU runs."""
        assert self._monitor is not None, "the machine is not running"
        return self._monitor

    def start(self, timeout: float = 90) -> Self:
        """Boots the guest and waits until its shell answers."""
        self._launch()
        try:
            self.wait_boot(timeout)
        except BaseException:
            self.kill()
            raise
        return self

    def wait_boot(self, timeout: float = 90) -> None:
        """Waits until the guest's shell is ready; for a guest that boots again."""
        self._receive(re.compile(rb"@@READY\n"), "the boot", timeout)

    def restore(self, state: Path, *, paused: bool = False) -> Self:
        """Starts from a file that `save` wrote, at the instruction where it was taken."""
        self._launch("-S", "-incoming", f"exec:cat {state}")
        try:
            self._wait_migration("incoming state")
            if not paused:
                self.cont()
        except BaseException:
            self.kill()
            raise
        return self

    def _wait_migration(self, what: str, timeout: float = 120) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                info: dict[str, Any] = self.monitor.execute("query-migrate")
            except Exception as error:
                raise MachineError(f"{what}: QEMU ended: {self._log_end(self.log)}") from error
            if info.get("status") == "completed":
                return info
            if info.get("status") in ("failed", "cancelled"):
                raise MachineError(f"{what}: {info.get('error-desc', self._log_end(self.log))}")
            time.sleep(0.002)
        raise MachineError(f"{what}: not complete after {timeout} s")

    def save(self, state: Path) -> dict[str, Any]:
        """Writes memory, vCPUs and devices to a file; the machine is stopped afterwards.

        A machine that runs is migrated live, as far as that goes, and stopped at the end.
        Returns the answer of `query-migrate`.
        """
        self.monitor.execute("migrate-set-parameters", max_bandwidth=1 << 34, downtime_limit=100)
        self.monitor.execute("migrate", uri=f"exec:cat > {state}")
        return self._wait_migration("save")

    def stop(self) -> None:
        """Pauses the vCPUs and the devices."""
        self.monitor.execute("stop")

    def cont(self) -> None:
        """Lets the machine run on."""
        self.monitor.execute("cont")

    def run(self, command: str, *, timeout: float = 60, check: bool = True) -> str:
        """Runs one shell line in the guest and returns its output (both streams).

        `check`: GuestError when the status is not 0. MachineError after `timeout` seconds.
        """
        output, status = self.call(command, timeout=timeout)
        if check and status:
            raise GuestError(f"{command!r} ended with {status} in the guest:\n{output}")
        return output

    def call(self, command: str, *, timeout: float = 60) -> tuple[str, int]:
        """Like `run`, and returns the exit status too."""
        self._commands += 1
        tag = f"{self.name}.{self._commands}"
        self._channel().sendall(f"{tag} {command}\n".encode())
        pattern = re.compile(rb"\n?@@END " + re.escape(tag.encode()) + rb" (\d+)\n")
        text, end = self._receive(pattern, repr(command), timeout)
        return text.decode(errors="replace").strip(), int(end[1])

    def _receive(
        self, pattern: re.Pattern[bytes], what: str, timeout: float
    ) -> tuple[bytes, re.Match[bytes]]:
        """What the guest's shell sends up to `pattern`, and the match."""
        channel = self._channel()
        deadline = time.monotonic() + timeout
        data = b""
        while (end := pattern.search(data)) is None:
            channel.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                piece = channel.recv(65536)
            except TimeoutError:
                raise MachineError(
                    f"no answer to {what} in {timeout} s; so far {data[-500:]!r}; "
                    f"console: {self._log_end(self.console)}"
                ) from None
            if not piece:
                raise MachineError(f"QEMU ended during {what}: {self._log_end(self.log)}")
            data += piece
        return data[: end.start()], end

    def _channel(self) -> socket.socket:
        if self._shell is None:
            self._shell = socket.socket(socket.AF_UNIX)
            self._shell.connect(str(self._shell_path))
        return self._shell

    def guest_errors(self) -> list[str]:
        """Lines of the guest's kernel that tell of a failed disk request or a stall."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        bad = re.compile(r"I/O error|EXT4-fs error|Buffer I/O|blocked for more than|Oops|BUG:")
        return [line for line in text.splitlines() if bad.search(line)]

    @staticmethod
    def _log_end(path: Path) -> str:
        return path.read_text(errors="replace")[-2000:].strip() if path.exists() else "(no log)"

    def kill(self) -> None:
        """SIGKILL, as a failing host would do it; nothing happens if QEMU is gone."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        self.process = None
        if self._shell is not None:
            self._shell.close()
            self._shell = None
        if self._monitor is not None:
            monitor, self._monitor = self._monitor, None
            monitor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
