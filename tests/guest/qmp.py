"""A QMP client for straight-line code, over the public `qemu.qmp` package.

One thread runs the event loop of all connections, so that events are taken in while the
caller does something else. Works with QEMU's monitor and with epochd's control socket.

Errors: `qemu.qmp.ExecuteError` when the server refuses a command, TimeoutError when it does
not answer in time, `qemu.qmp.QMPError` or EOFError when the connection breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from qemu.qmp import EventListener, QMPClient

T = TypeVar("T")

_loop: asyncio.AbstractEventLoop | None = None
_loop_lock = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _loop_lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="qmp", daemon=True).start()
        return _loop


def _call(work: Coroutine[Any, Any, T], timeout: float) -> T:
    return asyncio.run_coroutine_threadsafe(
        asyncio.wait_for(work, timeout), _event_loop()
    ).result()


class Qmp:
    """One connection; usable as a context manager."""

    def __init__(self, path: Path, timeout: float = 20) -> None:
        """Connects, and tries again for `timeout` seconds while nobody listens."""
        _call(self._connect(path, time.monotonic() + timeout), timeout + 5)

    async def _connect(self, path: Path, deadline: float) -> None:
        while True:
            self._client = QMPClient(path.name)
            self._events = EventListener()
            self._client.register_listener(self._events)
            try:
                await self._client.connect(str(path))
                return
            except Exception:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.02)

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = 60
    ) -> Any:
        """Runs one command and returns what it returned."""
        return _call(self._client.execute(command, arguments), timeout)

    def wait_event(self, *names: str, timeout: float = 60) -> dict[str, Any]:
        """The next event of one of these names; events of other names are dropped."""
        return _call(self._wait_event(names), timeout)

    async def _wait_event(self, names: tuple[str, ...]) -> dict[str, Any]:
        while True:
            event = await self._events.get()
            if event["event"] in names:
                return dict(event)

    def forget_events(self) -> None:
        """Drops the events that have come so far."""
        _call(self._forget_events(), 5)

    async def _forget_events(self) -> None:
        self._events.clear()

    def close(self) -> None:
        """Disconnects; a connection that broke already is no error here."""
        with contextlib.suppress(Exception):
            _call(self._client.disconnect(), 5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
