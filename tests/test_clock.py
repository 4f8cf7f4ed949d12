"""Steps of the real-time clock: set back by years, set forward by weeks, again and again.

libfaketime gives the daemon a clock of its own, so that this machine's stays as it is; it is
stepped while the daemon runs by a line in a file. The monotonic clock goes on, as the kernel's
does. A sanitizer's library and this one cannot both come first, so this is always the
installed daemon.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon
from faultfs import FaultFs
from frontend import INDIRECT
from harness import Daemon, DiskSpec, until

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
DAY_S = 86400
YEAR_S = 365 * DAY_S
STEPS = [-10 * YEAR_S, 3 * 7 * DAY_S, -1, 20 * YEAR_S, 0]
"""Seconds from the true time."""


class Clock:
    """The daemon's clock."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.step(0)

    def step(self, seconds: int) -> None:
        """Put it that far from the true time, at once."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{seconds:+d}\n")
        fresh.rename(self._file)

    def environment(self) -> dict[str, str]:
        assert LIBRARY is not None, "libfaketime is missing: run tools/setup"
        return {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


def own_program() -> list[str]:
    return [str(Path(sys.executable).parent / "epochd")]


def seen(daemon: Daemon, since: int) -> float:
    """How far the daemon's clock is from ours, by the time of its next event."""
    event = daemon.control.wait_event("EPOCH_SEALED", since=since)
    return float(event["timestamp"]["seconds"]) - time.time()


def test_a_clock_that_jumps_changes_only_the_time_of_events(
    epochd: StartDaemon, attach: Attach, clock: Clock
) -> None:
    daemon = epochd(program=own_program(), environment=clock.environment())
    disk = attach(daemon, inflight=True)
    before = daemon.control.checkpoint()
    for number, step in enumerate(STEPS):
        data = os.urandom(65536)
        disk.write(128 * number, data, layout=INDIRECT)
        clock.step(step)
        since = len(daemon.control.events)
        epoch = daemon.control.checkpoint()
        assert seen(daemon, since) == pytest.approx(step, abs=60)
        assert epoch == before + 1
        daemon.control.wait_applied(epoch)
        assert disk.read(128 * number, 128, layout=INDIRECT) == data
        assert daemon.image_bytes()[65536 * number : 65536 * (number + 1)] == data
        before = epoch
    assert daemon.control.status()["error"] == ""


def test_what_is_done_every_second_goes_on_after_the_clock_was_set_back(
    tmp_path: Path, epochd: StartDaemon, attach: Attach, clock: Clock
) -> None:
    """An image is tried again, and a socket that was removed comes back."""
    with FaultFs(tmp_path / "faults") as faults:
        image = faults.root / "disk0.img"
        with image.open("wb") as file:
            file.truncate(16 << 20)
        daemon = epochd(
            DiskSpec(image=image, size=16 << 20),
            program=own_program(), environment=clock.environment(),
        )
        disk = attach(daemon)
        disk.write(0, b"\x11" * 4096)
        faults.fail("write", "disk0.img")
        epoch = daemon.control.checkpoint()
        daemon.control.wait_event("IO_ERROR")
        clock.step(-10 * YEAR_S)
        tried = faults.hits()
        until("the image to be tried again", lambda: faults.hits() > tried + 1)
        daemon.socket().unlink()
        until("the socket to be there again", daemon.socket().exists)
        faults.heal()
        daemon.control.wait_applied(epoch)
        disk.close()
        daemon.stop()
        assert daemon.image_bytes()[:4096] == b"\x11" * 4096


@pytest.mark.parametrize("step", [-10 * YEAR_S, 10 * YEAR_S], ids=["back", "forward"])
def test_an_agent_goes_on_with_an_arena_of_another_time(
    epochd: StartDaemon, attach: Attach, clock: Clock, step: int
) -> None:
    daemon = epochd(program=own_program(), environment=clock.environment())
    disk = attach(daemon, inflight=True)
    disk.write(0, b"\x11" * 4096)
    done = daemon.control.checkpoint()
    disk.write(8, b"\x22" * 4096)
    sealed = daemon.control.seal()
    disk.write(16, b"\x33" * 4096)
    before = daemon.control.status()
    daemon.stop("kill")
    clock.step(step)
    daemon.start()
    after = daemon.control.status()
    assert (after["open"], after["sealed"]) == (before["open"], [sealed])
    assert after["committed"] == done
    disk.reconnect()
    assert disk.read(0, 24) == b"\x11" * 4096 + b"\x22" * 4096 + b"\x33" * 4096
    assert daemon.control.commit(sealed) == sealed
