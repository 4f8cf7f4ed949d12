"""epochd as a system service: what it tells systemd, as an ordinary user, under the unit.

The unit's system call filter is held against the calls of a real run (strace), and the unit
itself against systemd-analyze.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon, running
from frontend import INDIRECT, Type
from harness import Daemon, command, until

UNIT = Path(__file__).resolve().parents[1] / "agent" / "epochd@.service.in"
NOBODY = 65534


def settings(name: str) -> list[str]:
    """The values of one setting of the unit, in order."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


# ---- sd_notify ----------------------------------------------------------------------------


class Manager:
    """The service manager's side of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.heard: list[str] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind("\0" + address[1:] if address[0] == "@" else address)
        self._sock.setblocking(False)

    def lines(self) -> list[str]:
        """All assignments heard so far."""
        while True:
            try:
                self.heard += self._sock.recv(65536).decode().splitlines()
            except BlockingIOError:
                return self.heard

    def status(self) -> str:
        """The newest STATUS."""
        return [line for line in self.lines() if line.startswith("STATUS=")][-1]

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Manager, str]]:
    address = str(tmp_path / "notify")
    if request.param == "abstract":
        address = f"@epochd-test-{os.getpid()}"
    listener = Manager(address)
    yield listener, address
    listener.close()


def test_the_service_manager_hears_of_start_state_and_stop(
    manager: tuple[Manager, str], epochd: StartDaemon, attach: Attach
) -> None:
    listener, address = manager
    daemon = epochd(environment={"NOTIFY_SOCKET": address})
    until("READY", lambda: "READY=1" in listener.lines())
    assert "0 of 1 disks attached" in listener.status()
    attach(daemon).write(0, b"\x01" * 4096)
    epoch = daemon.control.checkpoint()
    until("the new state", lambda: f"{epoch} committed" in listener.status())
    assert "1 of 1 disks attached" in listener.status()
    assert "STOPPING=1" not in listener.lines()
    daemon.stop()
    assert listener.lines()[-2:] == ["STOPPING=1", "STATUS=stopping (SIGTERM)"]
    assert listener.lines().count("READY=1") == 1


def test_an_agent_that_cannot_start_is_never_ready(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    listener = Manager(address)
    words = [*command(), "--blk-file", "none", "--socket-path", "v.sock"]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "NOTIFY_SOCKET": address},
                          check=False, capture_output=True)
    assert done.returncode == 3
    assert listener.lines() == []
    listener.close()


@pytest.mark.parametrize("address", ["/nowhere/notify", "relative", ""])
def test_a_manager_that_is_not_there_is_its_own_loss(epochd: StartDaemon, address: str) -> None:
    daemon = epochd(environment={"NOTIFY_SOCKET": address})
    assert daemon.control.status()["open"] == 1


# ---- an ordinary user ---------------------------------------------------------------------

AS_NOBODY = f"""
import encodings.ascii, encodings.idna, os, resource, sys
import epochd.__main__  # the interpreter may lie where only root can read
resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
sys.exit(epochd.__main__.main())
"""


@pytest.fixture
def as_nobody() -> Iterator[StartDaemon]:
    """Daemons of user nobody, in a folder of that user, with 8 MiB of locked memory."""
    # pytest's folders are for root only.
    folder = Path(f"/tmp/epochd-nobody-{os.getpid()}")
    folder.mkdir(mode=0o700)
    daemons: list[Daemon] = []

    def make(**options: object) -> Daemon:
        daemon = Daemon(folder, program=[sys.executable, "-c", AS_NOBODY], arena="16M")
        daemons.append(daemon)
        running.append(daemon)
        for path in (folder, daemon.image()):
            os.chown(path, NOBODY, NOBODY)
        return daemon

    try:
        yield make
        for daemon in daemons:
            daemon.close()
            assert daemon.complaints() == []
    finally:
        for daemon in daemons:
            running.remove(daemon)
        shutil.rmtree(folder)


def test_an_ordinary_user_can_run_it(as_nobody: StartDaemon, attach: Attach) -> None:
    daemon = as_nobody().start()
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    assert f"Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}" in status
    assert "CapEff:\t0000000000000000" in status
    until("the log to say what it would like", lambda: "locked memory" in daemon.log())
    files = [daemon.control_path, daemon.socket(), *daemon.folder.glob("*journal")]
    for path in [*files, *daemon.shm]:
        assert path.stat().st_uid == NOBODY
        assert path.stat().st_mode & 0o777 == 0o600
    disk = attach(daemon, inflight=True)
    disk.write(0, b"\x01" * 65536, layout=INDIRECT)
    daemon.control.checkpoint()
    disk.write(8, b"\x02" * 4096)
    daemon.restart("kill")
    disk.reconnect()
    assert disk.read(0, 16) == b"\x01" * 4096 + b"\x02" * 4096
    daemon.control.wait_applied(daemon.control.checkpoint())
    disk.close()
    daemon.stop()
    assert daemon.image_bytes()[:12288] == b"\x01" * 4096 + b"\x02" * 4096 + b"\x01" * 4096
    assert not any(path.exists() for path in daemon.shm)


def test_an_ordinary_user_is_told_which_permission_is_missing(as_nobody: StartDaemon) -> None:
    daemon = as_nobody()
    os.chown(daemon.image(), 0, 0)
    daemon.image().chmod(0o600)
    with pytest.raises(RuntimeError, match="no permission to read and write"):
        daemon.start()
    assert daemon.exit_status == 3
    os.chown(daemon.image(), NOBODY, NOBODY)
    os.chown(daemon.folder, 0, 0)
    daemon.folder.chmod(0o755)
    with pytest.raises(RuntimeError, match="Permission denied"):
        daemon.start()
    assert daemon.exit_status in (4, 5)


# ---- the unit -----------------------------------------------------------------------------


def allowed_calls() -> set[str]:
    """The unit's SystemCallFilter as names, the groups taken apart by systemd itself."""

    def expand(word: str) -> set[str]:
        if not word.startswith("@"):
            return {word}
        text = subprocess.run(["systemd-analyze", "syscall-filter", word], check=True,
                              stdout=subprocess.PIPE, text=True).stdout
        words = [line.split()[0] for line in text.splitlines()[1:] if line.strip()]
        return set().union(*(expand(w) for w in words if not w.startswith("#")))

    allowed: set[str] = set()
    for line in settings("SystemCallFilter"):
        words = line.removeprefix("~").split()
        names = set().union(*(expand(word) for word in words))
        allowed = allowed - names if line.startswith("~") else allowed | names
    return allowed


def test_the_unit_is_what_systemd_understands(tmp_path: Path) -> None:
    unit = tmp_path / "epochd@vm1.service"
    text = UNIT.read_text().replace("@BINARY@", "/bin/true")
    unit.write_text(re.sub("^(User|Group)=.*$", r"\1=root", text, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    mine = [line for line in done.stdout.splitlines() if unit.name in line]
    assert (done.returncode, mine) == (0, []), done.stdout


def test_systemd_finds_little_that_the_unit_leaves_open(tmp_path: Path) -> None:
    """Of 10; what is left is needed, or is a matter of where the images are."""
    unit = tmp_path / "epochd@vm1.service"
    unit.write_text(UNIT.read_text().replace("@BINARY@", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=12", unit],
        check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    assert "Overall exposure level" in done.stdout
    assert done.returncode == 0, done.stdout


def test_the_unit_has_what_the_design_needs() -> None:
    assert settings("Type") == ["notify"]
    assert settings("Restart") == ["on-failure"]
    assert settings("RemoveIPC") == ["no"]  # yes would take the arena away
    assert settings("LimitMEMLOCK") == ["infinity"]
    assert settings("CapabilityBoundingSet") == [""]
    assert "/run/epochd/" in settings("ExecStart")[0]


def test_a_real_run_stays_inside_of_the_units_filter(
    epochd: StartDaemon, attach: Attach, tmp_path: Path
) -> None:
    """Start, load, verbs, a hang-up, a restart on the arena, a clean end: every system call."""
    trace = tmp_path / "calls"
    program = ["strace", "-f", "-qq", "-A", "-e", "signal=none", "-o", str(trace), *command()]
    daemon = epochd(program=program)
    disk = attach(daemon, queues=2, inflight=True)
    for turn in range(3):
        disk.write(8 * turn, os.urandom(65536), layout=INDIRECT, queue=turn % 2)
        disk.discard(1024, 4096)
        disk.flush()
        daemon.control.checkpoint()
    daemon.control.wait_applied()
    disk.read(0, 128, layout=INDIRECT)
    disk.write(0, b"\x01" * 4096)
    daemon.control.seal()
    disk.hang_up()
    daemon.stop("quit")
    daemon.start()
    disk.reconnect()
    requests = [disk.submit(Type.OUT, 8 * place, bytes(4096)) for place in range(32)]
    disk.wait(*requests)
    daemon.control.discard()
    daemon.control.execute("promote")
    disk.write(0, b"\x02" * 4096)
    disk.flush()
    disk.close()
    daemon.stop("quit")
    calls = set(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)", trace.read_text(), re.MULTILINE))
    assert {"io_uring_enter", "io_uring_setup", "fallocate", "sendto"} & calls
    assert calls - allowed_calls() == {"execve"} - allowed_calls()
