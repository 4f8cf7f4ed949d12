"""Fixtures of all tests: daemons, front ends, and their logs in the report of a failure."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from frontend import Disk
from harness import Daemon, DiskSpec, StorageDaemon, loop_devices

LOG_LINES = 60
running: list[Daemon | StorageDaemon] = []
"""Daemons of the test that runs now; their logs are shown when it fails."""


def pytest_configure() -> None:
    """In the background of a shell without job control SIGINT is ignored, and by all that is
    started from there; the tests interrupt programs that are to end by it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        for daemon in running:
            tail = daemon.log().splitlines()[-LOG_LINES:]
            report.sections.append((f"log of {daemon.log_path}", "\n".join(tail)))
    return report


def _closed(daemons: Sequence[Daemon | StorageDaemon]) -> None:
    """End the daemons; fail if one ended badly or its log tells of a bug."""
    problems = []
    for daemon in daemons:
        try:
            daemon.close()
        except Exception as error:
            problems.append(f"{error}\n{daemon.log()[-4000:]}")
        problems += daemon.complaints()
        running.remove(daemon)
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@contextlib.contextmanager
def serving(daemon: Daemon) -> Iterator[Daemon]:
    """A daemon for a whole module: started, its log shown on failure, checked at the end."""
    running.append(daemon)
    try:
        yield daemon.start()
    finally:
        _closed([daemon])


StartDaemon = Callable[..., Daemon]
Attach = Callable[..., Disk]


@pytest.fixture
def epochd(tmp_path: Path) -> Iterator[StartDaemon]:
    """Start daemons: `epochd(*disk_specs, arena=..., options=..., start=True)`."""
    daemons: list[Daemon | StorageDaemon] = []

    def make(*disks: DiskSpec, start: bool = True, **settings: Any) -> Daemon:
        folder = tmp_path / f"d{len(daemons)}"
        daemon = Daemon(folder, disks or (DiskSpec(),), **settings)
        daemons.append(daemon)
        running.append(daemon)
        return daemon.start() if start else daemon

    yield make
    _closed(daemons)


@pytest.fixture
def agent(epochd: StartDaemon) -> Daemon:
    """One running daemon with one disk of 64 MiB and an arena of 16 MiB."""
    return epochd()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for a whole module of tests, none of which depends on what is on the disk."""
    with serving(Daemon(tmp_path_factory.mktemp("shared"), arena="64M")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def qemu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageDaemon]:
    """QEMU's own server, for a whole module of tests."""
    daemon = StorageDaemon(tmp_path_factory.mktemp("qemu"))
    running.append(daemon)
    yield daemon
    _closed([daemon])


@pytest.fixture
def attach() -> Iterator[Attach]:
    """Attach front ends: `attach(daemon, disk=0, queues=1, queue_size=128, **settings)`."""
    disks: list[Disk] = []

    def make(
        daemon: Daemon | StorageDaemon,
        disk: int = 0,
        queues: int = 1,
        queue_size: int = 128,
        *,
        start: bool = True,
        inflight: bool = False,
        **settings: Any,
    ) -> Disk:
        front_end = Disk(daemon.socket(disk), **settings)
        disks.append(front_end)
        return front_end.start(queues, queue_size, inflight=inflight) if start else front_end

    yield make
    for disk in disks:
        disk.close()


@pytest.fixture
def loop_4k(tmp_path: Path) -> Iterator[Path]:
    """A block device of 64 MiB with 4 KiB logical blocks."""
    image = tmp_path / "loop.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    yield from loop_devices(image, block=4096)


@pytest.fixture
def loop_512(tmp_path: Path) -> Iterator[Path]:
    """A block device of 64 MiB with 512-byte logical blocks."""
    image = tmp_path / "loop.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    yield from loop_devices(image)
