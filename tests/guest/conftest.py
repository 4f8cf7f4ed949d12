"""Fixtures for tests with real guests: machines on the daemons of the `epochd` fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import StartDaemon
from harness import Daemon

from . import image
from .image import Boot
from .machine import Disk, Machine

LOG_LINES = 40
running: list[Machine] = []
StartMachine = Callable[..., Machine]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        for machine in running:
            for log in (machine.log, machine.console):
                text = log.read_text(errors="replace") if log.exists() else "(none)"
                tail = "\n".join(text.splitlines()[-LOG_LINES:])
                report.sections.append((f"{log.name} of the guest", tail))
    return report


@pytest.fixture(scope="session")
def boot() -> Boot:
    """Kernel and initramfs of the test guest."""
    return image.build()


@pytest.fixture
def machine(boot: Boot, epochd: StartDaemon) -> Iterator[StartMachine]:
    """Make machines with all disks of a daemon: `machine(daemon, cpus=2, ...)`.

    They are not started. At the end each is killed, and its guest must not have seen an
    error of a disk, unless `machine.errors_expected` was set.
    """
    machines: list[Machine] = []

    def make(daemon: Daemon, *, chardev: str = "reconnect=1", **settings: Any) -> Machine:
        disks = [Disk(daemon.socket(i), chardev=chardev) for i in range(len(daemon.specs))]
        name = f"vm{len(machines)}"
        made = Machine(boot, daemon.folder, **{"disks": disks, "name": name} | settings)
        machines.append(made)
        running.append(made)
        return made

    yield make
    errors = []
    for made in machines:
        made.kill()
        running.remove(made)
        if not made.errors_expected:
            errors += made.guest_errors()
    if errors:
        pytest.fail("the guest saw errors:\n" + "\n".join(errors), pytrace=False)
