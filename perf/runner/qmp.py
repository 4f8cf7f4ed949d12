"""A blocking QMP client for measuring: epochd's control socket, QEMU's, the storage daemon's.

Why not `qemu.qmp`: it runs an asyncio loop, whose wake-ups cost about as much as the seal that
is being timed. One command at a time, one connection a thread.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from .failures import FailedError

ANSWER_SECONDS = 120.0


class Qmp:
    """A connection. FailedError when the other side refuses, is lost or does not answer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            raise FailedError(f"no control connection to {path}: {error.strerror}") from None
        self._buffer = b""
        self._line()  # the greeting
        self.execute("qmp_capabilities")

    def close(self) -> None:
        self._socket.close()

    def _line(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            try:
                data = self._socket.recv(65536)
            except OSError as error:
                raise FailedError(f"{self.path}: no answer: {error}") from None
            if not data:
                raise FailedError(f"{self.path}: the control connection was lost")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return its answer."""
        return self.timed(command, **arguments)[0]

    def timed(self, command: str, **arguments: object) -> tuple[Any, int]:
        """Run a command; return its answer and the nanoseconds until it was here."""
        words: dict[str, object] = {"execute": command}
        if arguments:
            words["arguments"] = {key.replace("_", "-"): arguments[key] for key in arguments}
        message = json.dumps(words).encode() + b"\n"
        begin = time.perf_counter_ns()
        try:
            self._socket.sendall(message)
        except OSError as error:
            raise FailedError(f"{self.path}: the control connection was lost: {error}") from None
        while True:
            answer = self._line()
            if "return" in answer:
                return answer["return"], time.perf_counter_ns() - begin
            if "error" in answer:
                raise FailedError(f"{command} was refused: {answer['error']['desc']}")
