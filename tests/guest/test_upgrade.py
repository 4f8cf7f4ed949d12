"""Upgrade in place: stop, install another version over the one that ran, start; and back again.

The agent runs from a folder of its own that holds the installed package. The other version is a
build of these sources with another version number and other compiler options, installed into
that folder by pip as a user would do it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon
from frontend import INDIRECT, Type
from harness import Daemon, DiskSpec

from .conftest import StartMachine
from .counter import Counter
from .machine import Disk

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / ".build" / "upgrade"
PARTS = ("agent", "native", "meson.build", "meson.options", "pyproject.toml", "README.md")
OLD = metadata.version("epochd")
NEW = "9.8.7"


class Installation:
    """A folder with one installed version of the package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install_old(self) -> None:
        """The version under test, as it is installed beside this interpreter."""
        shutil.rmtree(self.folder, ignore_errors=True)
        files = metadata.files("epochd")
        assert files is not None
        for file in files:
            if ".." not in file.parts and file.parts[0].startswith("epochd"):
                target = self.folder / str(file)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(str(file.locate()), target)

    def install_new(self) -> None:
        """The other version, over what is there."""
        BUILD.mkdir(parents=True, exist_ok=True)
        with (BUILD / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._pip(self._changed_sources())

    @staticmethod
    def _changed_sources() -> Path:
        """Their times stay, so that a second build has little to do."""
        source = BUILD / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        for part in PARTS:
            whole = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            whole(ROOT / part, source / part)
        recipe = source / "meson.build"
        text = recipe.read_text()
        assert text.count(f"version: '{OLD}'") == 1
        recipe.write_text(text.replace(f"version: '{OLD}'", f"version: '{NEW}'"))
        return source

    def _pip(self, source: Path) -> None:
        line = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        line += ["--no-deps", "--no-build-isolation", "--upgrade", "--target", str(self.folder)]
        line += [f"--config-settings=build-dir={BUILD / 'meson'}"]
        line += ["--config-settings=setup-args=-Doptimization=1", str(source)]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            line, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the other version cannot be installed:\n{done.stdout[-4000:]}")

    def program(self) -> list[str]:
        return ["env", f"PYTHONPATH={self.folder}", sys.executable, "-m", "epochd"]


def version(daemon: Daemon) -> str:
    text: str = daemon.control.execute("query-version")["package"]
    return text.removeprefix("epochd ")


@pytest.mark.timeout(300)  # the other version is compiled
def test_an_upgrade_in_place_is_a_pause_for_guests_and_keeps_every_epoch(
    epochd: StartDaemon, machine: StartMachine, attach: Attach, tmp_path: Path
) -> None:
    installed = Installation(tmp_path / "installed")
    installed.install_old()
    daemon = epochd(
        DiskSpec("disk0"), DiskSpec("disk1"), arena="64M", program=installed.program()
    )
    assert version(daemon) == OLD
    vm = machine(daemon, disks=[Disk(daemon.socket(0))]).start()
    counter = Counter(pause_us=0)
    counter.start(vm)
    disk = attach(daemon, 1, queues=2, inflight=True)
    expected = bytearray(64 * 4096)
    for number, install in enumerate([installed.install_new, installed.install_old]):
        counter.advance(vm, 50)
        sealed = daemon.control.seal()
        counter.advance(vm, 50)
        before = daemon.control.status()
        requests = []
        for place in range(64):
            data = os.urandom(4096)
            expected[place * 4096 : (place + 1) * 4096] = data
            requests.append(
                disk.submit(Type.OUT, place * 8, data, layout=INDIRECT, queue=place % 2)
            )
        daemon.stop()
        install()
        daemon.start()
        assert version(daemon) == [NEW, OLD][number]
        after = daemon.control.status()
        for key in ("open", "sealed", "committed", "generation", "mode"):
            assert after[key] == before[key], key
        disk.reconnect()
        disk.wait(*requests)
        assert disk.read(0, 512, layout=INDIRECT) == expected
        counter.advance(vm, 50)
        counter.must_agree(vm)
        assert daemon.control.commit(sealed) == sealed
        assert vm.guest_errors() == []
    counter.stop(vm)
    memory = tmp_path / "counter.state"
    memory.write_bytes(counter.memory(vm))
    epoch = daemon.control.checkpoint()
    vm.kill()
    disk.close()
    daemon.stop("quit")
    assert epoch > sealed
    check = subprocess.run([vm.boot.counter, "verify", daemon.image(0), memory],
                           stdout=subprocess.PIPE, text=True)
    assert check.returncode == 0, check.stdout
    assert daemon.image_bytes(1)[: 64 * 4096] == expected
