"""The real daemon, started, watched and stopped for tests; and its control channel.

A `Daemon` owns its folder's images, sockets and log, the process, and the shared memory that
the process leaves behind; `close()` ends and removes all of it. Nothing here waits for a fixed
time: every wait has a condition, and a deadline (EPOCHD_TEST_DEADLINE seconds) that fails the
test with what was waited for.

EPOCHD_COMMAND replaces the command that is run (words as in a shell), so that the same tests
run against builds with sanitizers:
    EPOCHD_COMMAND="env LD_PRELOAD=... .venv-asan/bin/epochd" pytest tests

`StorageDaemon` is QEMU's own vhost-user-blk server, for tests that compare with it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from frontend import DEADLINE_S
from qemu.qmp import ExecuteError, QMPClient, Runstate

T = TypeVar("T")

SANITIZER = re.compile(
    r"AddressSanitizer|LeakSanitizer|ThreadSanitizer|MemorySanitizer|runtime error:"
    r"|Traceback \(most recent call last\)|Assertion .* failed|check failed"
)
"""Lines of a log that no test may leave behind."""


def command() -> list[str]:
    """The daemon's command: EPOCHD_COMMAND, else the script beside this interpreter."""
    given = os.environ.get("EPOCHD_COMMAND")
    return shlex.split(given) if given else [str(Path(sys.executable).parent / "epochd")]


def until(what: str, condition: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """Wait until `condition` returns something true and return that."""
    deadline = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {deadline_s:g} s for {what}")
        time.sleep(0.005)


@contextlib.contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[Path]:
    """A small ext4 file system on a loop device, mounted in `folder`."""
    device, root = folder / "fs.img", folder / "mnt"
    with device.open("wb") as file:
        file.truncate(megabytes << 20)
    root.mkdir()
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", device], check=True)
    subprocess.run(["mount", "-o", "loop", device, root], check=True)
    try:
        yield root
    finally:
        # A killed daemon's io_uring lets go of its files some time after the process.
        until(
            "the file system to be idle", lambda: subprocess.run(["umount", root]).returncode == 0
        )


def listens(path: Path) -> bool:
    """True when somebody listens on this Unix socket; asks the kernel, connects to nobody."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        # Flags: __SO_ACCEPTCON, "listening".
        if len(words) == 8 and words[7] == str(path) and int(words[3], 16) & 0x10000:
            return True
    return False


class ControlError(Exception):
    """The daemon answered a command with an error; `text` is its description."""

    def __init__(self, verb: str, text: str) -> None:
        super().__init__(f"{verb}: {text}")
        self.text = text


class Control:
    """A synchronous QMP client. Its asyncio loop runs in a thread of its own.

    `events` grows by every event that arrives, in order; it may be read at any time.
    """

    def __init__(self, path: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = QMPClient("tests")
        self._listener: asyncio.Task[None] | None = None
        try:
            self._run(self._connect(path))
        except BaseException:
            self._stop_loop()
            raise

    def _run(self, work: Coroutine[Any, Any, T], deadline_s: float = DEADLINE_S) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(work, deadline_s)

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result()

    async def _connect(self, path: Path) -> None:
        await self._client.connect(str(path))
        self._listener = asyncio.ensure_future(self._listen())

    async def _listen(self) -> None:
        async for event in self._client.events:
            with self._news:
                self.events.append(dict(event))
                self._news.notify_all()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _disconnect(self) -> None:
        try:
            if self._client.runstate != Runstate.IDLE:
                await self._client.disconnect()
        except Exception:  # the daemon may be gone already: nothing is owed to it
            pass
        if self._listener is not None:
            self._listener.cancel()

    def close(self) -> None:
        """Disconnect, whatever the state of the other side."""
        try:
            self._run(self._disconnect())
        finally:
            self._stop_loop()

    def execute(self, verb: str, /, **arguments: Any) -> Any:
        """Run a command; `ControlError` when the daemon says no."""
        words = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return self._run(self._client.execute(verb, words or None))
        except ExecuteError as error:
            raise ControlError(verb, str(error)) from None

    def begin(self, verb: str, /, **arguments: Any) -> concurrent.futures.Future[Any]:
        """Send a command without waiting for its answer, which may never come."""
        return asyncio.run_coroutine_threadsafe(
            self._client.execute(verb, arguments or None), self._loop
        )

    def wait_event(
        self, name: str, *, since: int = 0, where: Callable[[dict[str, Any]], bool] | None = None
    ) -> dict[str, Any]:
        """The first event of that name at or after `events[since]`; waits for it."""

        def found() -> dict[str, Any] | None:
            for event in self.events[since:]:
                if event["event"] == name and (where is None or where(event["data"])):
                    return event
            return None

        with self._news:
            self._news.wait_for(lambda: found() is not None, DEADLINE_S)
        event = found()
        if event is None:
            seen = [event["event"] for event in self.events[since:]]
            raise TimeoutError(f"no {name} within {DEADLINE_S:g} s; came: {seen}")
        return event

    # ---- the verbs -----------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.execute("query-status")
        return answer

    def disks(self) -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = self.execute("query-disks")
        return answer

    def seal(self) -> int:
        """Seal the open epoch; returns its number."""
        return int(self.execute("epoch-seal")["epoch"])

    def commit(self, epoch: int | None = None) -> int:
        """Commit up to `epoch`, or up to the newest sealed one; returns the newest committed."""
        arguments = {} if epoch is None else {"epoch": epoch}
        return int(self.execute("epoch-commit", **arguments)["committed"])

    def checkpoint(self) -> int:
        """Seal and commit; returns the epoch."""
        epoch = self.seal()
        self.commit(epoch)
        return epoch

    def discard(self) -> list[int]:
        """Discard what is not committed; returns the numbers of the epochs that went."""
        answer: list[int] = self.execute("epoch-discard")["discarded"]
        return answer

    def wait_applied(self, epoch: int | None = None) -> None:
        """Wait until the images hold `epoch`, or all that is committed."""

        def applied() -> bool:
            status = self.status()
            return bool(status["applied"] >= (status["committed"] if epoch is None else epoch))

        until(f"epoch {epoch or 'committed'} to be applied", applied)


@dataclass
class DiskSpec:
    """One disk of a daemon. Without `image` a sparse file of `size` bytes is made."""

    name: str = "disk0"
    size: int = 64 << 20
    image: Path | None = None
    read_only: bool = False
    serial: str | None = None


class Daemon:
    """One epochd. Several disks, or a serial, make it use a configuration file. `program`
    replaces the words of `command()`."""

    def __init__(
        self,
        folder: Path,
        disks: Sequence[DiskSpec] = (DiskSpec(),),
        *,
        arena: str = "16M",
        options: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        program: Sequence[str] | None = None,
    ) -> None:
        self.folder = folder
        self.program = list(program) if program else command()
        self.specs = [replace(spec) for spec in disks]
        self.arena = arena
        self.options = list(options)
        self.environment = dict(environment or {})
        self.log_path = folder / "epochd.log"
        self.control_path = folder / "control.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.exit_status: int | None = None
        self.shm: set[Path] = set()
        self._control: Control | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for spec in self.specs:
            if spec.image is None:
                spec.image = folder / f"{spec.name}.img"
                if not spec.image.exists():
                    with spec.image.open("wb") as image:
                        image.truncate(spec.size)

    # ---- where things are ----------------------------------------------------------------

    def socket(self, disk: int = 0) -> Path:
        """The vhost-user socket of a disk."""
        return self.folder / f"{self.specs[disk].name}.sock"

    def image(self, disk: int = 0) -> Path:
        path = self.specs[disk].image
        assert path is not None
        return path

    def image_bytes(self, disk: int = 0) -> bytes:
        """The whole image as it is now, past any cache of the daemon's."""
        return self.image(disk).read_bytes()

    def log(self) -> str:
        """All that the daemon printed, over all its runs."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def pid(self) -> int:
        assert self.process is not None, "the daemon is not running"
        return self.process.pid

    def arguments(self) -> list[str]:
        """The command line, without the command itself."""
        common = ["--control", str(self.control_path), "--state-dir", str(self.folder)]
        common += ["--arena-size", self.arena, *self.options]
        if len(self.specs) == 1 and self.specs[0].serial is None:
            spec = self.specs[0]
            single = ["--blk-file", str(spec.image), "--socket-path", str(self.socket())]
            return single + ["--read-only"] * spec.read_only + common
        lines = []
        for index, spec in enumerate(self.specs):
            lines += ["[[disk]]", f'name = "{spec.name}"', f'image = "{spec.image}"']
            lines += [f'socket = "{self.socket(index)}"']
            lines += ["read-only = true"] * spec.read_only
            lines += [f'serial = "{spec.serial}"'] * (spec.serial is not None)
        config = self.folder / "epochd.toml"
        config.write_text("\n".join(lines) + "\n")
        return ["--config", str(config), *common]

    # ---- life ----------------------------------------------------------------------------

    def start(self) -> Daemon:
        """Start and return once all sockets answer."""
        assert self.process is None, "the daemon runs already"
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.program, *self.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        sockets = [self.control_path, *(self.socket(i) for i in range(len(self.specs)))]
        until("the daemon's sockets", lambda: self._came_up(sockets))
        self._note_shm()
        return self

    def _came_up(self, sockets: Sequence[Path]) -> bool:
        assert self.process is not None
        status = self.process.poll()
        if status is not None:
            self.process, self.exit_status = None, status
            raise RuntimeError(f"epochd ended with status {status}:\n{self.log()[-4000:]}")
        # A stale socket of a killed run does not listen.
        return all(listens(path) for path in sockets)

    def _note_shm(self) -> None:
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                target = entry.readlink()
            except FileNotFoundError:
                continue
            if target.parent == Path("/dev/shm") and not target.name.endswith(" (deleted)"):
                self.shm.add(target)

    @property
    def control(self) -> Control:
        """A control connection, made at first use and again after each start."""
        if self._control is None:
            self._control = Control(self.control_path)
        return self._control

    def _close_control(self) -> None:
        if self._control is not None:
            control, self._control = self._control, None
            control.close()

    def wait_exit(self, deadline_s: float = DEADLINE_S) -> int:
        """Wait for the end of the process and return its status (negative: the signal)."""
        assert self.process is not None
        try:
            self.exit_status = self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"epochd still runs after {deadline_s:g} s") from None
        self.process = None
        self._close_control()
        return self.exit_status

    def stop(self, how: str = "term") -> None:
        """End the process by "quit" (control), "term" or "kill"; check the exit status."""
        assert self.process is not None
        if how == "quit":
            self.control.execute("quit")
        else:
            self.process.send_signal({"term": signal.SIGTERM, "kill": signal.SIGKILL}[how])
        status = self.wait_exit()
        wanted = -signal.SIGKILL if how == "kill" else 0
        if status != wanted:
            raise RuntimeError(f"epochd ended by {how} with {status}:\n{self.log()[-4000:]}")

    def restart(self, how: str = "term") -> None:
        """Stop and start with the same options."""
        self.stop(how)
        self.start()

    def lose_shm(self) -> None:
        """Forget the arena, as a reboot of the host does. Only while stopped."""
        assert self.process is None
        for path in self.shm:
            path.unlink(missing_ok=True)
            for note in (".group", ".live"):
                path.with_name(f"{path.name}{note}").unlink(missing_ok=True)

    def complaints(self) -> list[str]:
        """Lines of the log that tell of a bug: sanitizer reports, tracebacks, assertions."""
        return [line for line in self.log().splitlines() if SANITIZER.search(line)]

    def close(self) -> None:
        """End it whatever happens and remove what it leaves in shared memory."""
        try:
            if self.process is not None:
                self._end()
        finally:
            self._close_control()
            self.lose_shm()

    def _end(self) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                self.process = None
                raise TimeoutError(f"SIGTERM did not end epochd in {DEADLINE_S:g} s") from None
        status, self.process = self.process.returncode, None
        self.exit_status = status
        if status:
            raise RuntimeError(f"epochd ended with status {status}")

    # ---- what the daemon says ------------------------------------------------------------

    def disk_info(self, disk: int = 0) -> dict[str, Any]:
        """One disk's part of `query-disks`."""
        info: dict[str, Any] = self.control.disks()[disk]
        return info

    def queue_info(self, queue: int = 0, disk: int = 0) -> dict[str, Any]:
        """One queue's part of `query-disks`."""
        for info in self.disk_info(disk)["queues"]:
            if info["queue"] == queue:
                found: dict[str, Any] = info
                return found
        raise LookupError(f"query-disks shows no queue {queue} of disk {disk}")

    def wait_broken(self, queue: int = 0, disk: int = 0) -> str:
        """Wait until a ring is broken and return the reason."""
        info = until(
            f"queue {queue} of disk {disk} to be broken",
            lambda: (now := self.queue_info(queue, disk))["broken"] and now,
        )
        reason: str = info["reason"]
        return reason


class StorageDaemon:
    """qemu-storage-daemon's vhost-user-blk export of a raw file."""

    def __init__(
        self, folder: Path, *, size: int = 64 << 20, read_only: bool = False, queues: int = 4
    ) -> None:
        self.path = folder / "qemu.sock"
        self.image = folder / "qemu.img"
        self.log_path = folder / "qemu-storage-daemon.log"
        with self.image.open("wb") as image:
            image.truncate(size)
        mode = "off" if read_only else "on"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "qemu-storage-daemon",
                    "--blockdev",
                    f"file,node-name=file,filename={self.image},discard=unmap",
                    "--export",
                    f"vhost-user-blk,id=export,node-name=file,writable={mode},"
                    f"addr.type=unix,addr.path={self.path},num-queues={queues}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until("qemu-storage-daemon's socket", lambda: listens(self.path))

    def socket(self, disk: int = 0) -> Path:
        assert disk == 0
        return self.path

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def complaints(self) -> list[str]:
        return []

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE_S)


def loop_devices(image: Path, *, block: int = 512) -> Iterator[Path]:
    """A loop device over `image` with `block` bytes a logical block; use with `yield from`."""
    device = Path(
        subprocess.run(
            ["losetup", "--find", "--show", "--sector-size", str(block), str(image)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()
    )
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)
