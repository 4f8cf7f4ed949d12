"""Starts, talks to and ends an epochd for a guest.

The command is `.venv/bin/epochd`, or what EPOCHD_COMMAND says (split as a shell does).
Errors: AgentError with the end of the daemon's log when it does not start or stop.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .image import ROOT
from .qmp import Qmp


class AgentError(RuntimeError):
    """The daemon did not start, or did not end as asked."""


class Agent:
    """One daemon, which may be stopped, killed and started again with the same options."""

    def __init__(self, folder: Path, *options: str | Path, name: str = "agent") -> None:
        """`options` are the daemon's, without --control and --state-dir."""
        self.folder = folder
        self.control_path = folder / f"{name}.ctl"
        self.log = folder / f"{name}.log"
        self._options = [str(option) for option in options]
        self._options += ["--control", str(self.control_path), "--state-dir", str(folder)]
        self.process: subprocess.Popen[bytes] | None = None
        self.control: Qmp

    def command_line(self) -> list[str]:
        """The command as it is run."""
        command = os.environ.get("EPOCHD_COMMAND") or str(ROOT / ".venv" / "bin" / "epochd")
        return shlex.split(command) + self._options

    def start(self) -> Self:
        """Starts the daemon and connects to its control socket."""
        guard = ["setpriv", "--pdeathsig", "KILL", "--"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                guard + self.command_line(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self.control = Qmp(self.control_path)
        except Exception as error:
            self.kill()
            raise AgentError(f"epochd did not start: {self.log_text()[-2000:]}") from error
        return self

    def execute(self, command: str, **arguments: Any) -> Any:
        """One control command, with its answer."""
        return self.control.execute(command, arguments or None)

    def wait_status(self, timeout: float = 60, **wanted: Any) -> dict[str, Any]:
        """Waits until these members of `query-status` have these values."""
        deadline = time.monotonic() + timeout
        while True:
            status: dict[str, Any] = self.execute("query-status")
            if all(status[key] == value for key, value in wanted.items()):
                return status
            if time.monotonic() > deadline:
                raise AgentError(f"status is not {wanted} after {timeout} s: {status}")
            time.sleep(0.01)

    def log_text(self) -> str:
        """Everything that the daemon has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def stop(self) -> None:
        """SIGTERM, and waits for the end. AgentError when the exit status is not 0."""
        self._end(signal.SIGTERM, expect=0)

    def quit(self) -> None:
        """The control command `quit`, and waits for the end."""
        self.execute("quit")
        self._end(None, expect=0)

    def kill(self) -> None:
        """SIGKILL; nothing happens if the daemon is gone."""
        self._end(signal.SIGKILL, expect=None)

    def _end(self, number: int | None, expect: int | None) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if number is not None and process.poll() is None:
            process.send_signal(number)
        try:
            status = process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AgentError(f"epochd did not end in 60 s: {self.log_text()[-2000:]}") from None
        finally:
            if hasattr(self, "control"):
                self.control.close()
        if expect is not None and status != expect:
            raise AgentError(f"epochd ended with {status}: {self.log_text()[-2000:]}")

    def __enter__(self) -> Self:
        return self if self.process else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
