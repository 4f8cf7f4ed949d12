"""Hostile front ends and control clients against the real daemon.

`vhost`: connections to disk 0 that send what no honest front end would: wrong sizes and
counts, messages out of order, regions that overlap, wrap or exceed their file, addresses
outside, memory that shrinks, descriptors of odd kinds, hang-ups at any byte. `control`:
bytes, nesting, numbers, partial frames, verbs with wrong arguments, clients that do not read.

After each round a front end of disk 1 that was there all the time reads back what it wrote,
and a control client is answered; the daemon has no more descriptors than before; every few
rounds an honest front end uses disk 0. At the end the daemon stops when asked. A sanitizer's
report, a traceback or a death is a finding, and ends the run; the daemon's log is kept.

A run is repeated by its seed, which each finding names with the round.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from frontend import PAGE, Disk, FrontEndError, GuestMemory, RegionSpec, Request
from frontend.wire import (
    CONFIG,
    HEADER,
    INFLIGHT,
    LOG,
    REGION,
    REGIONS,
    U64,
    VRING_ADDR,
    VRING_STATE,
)
from harness import Daemon, DiskSpec, until

EDGES = (0, 1, 2, 7, 16, 255, 256, 4095, 4096, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32,
         1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
HONEST_EVERY = 8
CLIENTS_MAX = 24


class Finding(Exception):
    """The daemon did what it must not."""


# ---- Descriptors of odd kinds ------------------------------------------------------------------


class Odd:
    """Makes descriptors that fit nowhere, and closes them all."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._folder = folder
        self._rng = rng
        self.open: list[int] = []

    def make(self) -> int:
        """One more."""
        kinds = (self._pipe, self._directory, self._file, self._socket, self._event, self._memory,
                 self._memory, self._event, self._null, self._path, self._read_only)
        fd = self._rng.choice(kinds)()
        self.open.append(fd)
        return fd

    def _pipe(self) -> int:
        ends = os.pipe()
        keep = self._rng.randrange(2)
        if self._rng.random() < 0.5:
            os.close(ends[1 - keep])
        else:
            self.open.append(ends[1 - keep])
        return ends[keep]

    def _directory(self) -> int:
        return os.open(self._folder, os.O_RDONLY)

    def _file(self) -> int:
        fd = os.open(self._folder / "odd", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, self._rng.choice((0, 1, PAGE, 1 << 20)))
        return fd

    def _socket(self) -> int:
        ends = socket.socketpair()
        self.open.append(ends[0].detach())
        return ends[1].detach()

    def _event(self) -> int:
        return os.eventfd(self._rng.choice((0, 1, (1 << 32) - 1)))

    def _memory(self) -> int:
        fd = os.memfd_create("odd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, self._rng.choice((0, 100, PAGE, 64 * PAGE, 1 << 30)))
        return fd

    def _null(self) -> int:
        return os.open(self._rng.choice(("/dev/null", "/dev/zero")), os.O_RDWR)

    def _path(self) -> int:
        return os.open(self._folder, os.O_PATH)

    def _read_only(self) -> int:
        fd = self._memory()
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        finally:
            os.close(fd)

    def close(self) -> None:
        for fd in self.open:
            os.close(fd)
        self.open.clear()


# ---- One hostile front end ---------------------------------------------------------------------


class Hostile:
    """A connection to disk 0 and what it sends."""

    def __init__(self, daemon: Daemon, rng: random.Random) -> None:
        self._rng = rng
        self._odd = Odd(daemon.folder, rng)
        self.sent = 0
        size = rng.choice((8, 64)) * PAGE
        self.memory = GuestMemory([RegionSpec(0, size, 0x7F0000000000),
                                   RegionSpec(1 << 32, 4 * PAGE, 0x7F1000000000, PAGE)])
        self.disk = Disk(daemon.socket(0), memory=self.memory)

    def close(self) -> None:
        self.disk.close()
        self.memory.close()
        self._odd.close()

    def run(self) -> None:
        """A session, from an honest or no beginning to a hang-up."""
        with contextlib.suppress(FrontEndError, OSError):
            self._begin()
            for _ in range(self._rng.randrange(1, 40)):
                self._rng.choice((self._message,) * 12 + (self._use, self._shrink, self._raw,
                                                          self._piecemeal))()
                self._drain()
            if self._rng.random() < 0.3:
                self.disk.channel.sock.shutdown(socket.SHUT_WR)
                self._drain()

    def _begin(self) -> None:
        steps = self._rng.randrange(5)
        if steps > 0:
            self.disk.negotiate()
        if steps > 1:
            self.disk.acknowledge()
        if steps > 2:
            if self._rng.random() < 0.5:
                self.disk.get_inflight(2, 16)
                self.disk.set_inflight()
            self.disk.share_memory()
        if steps > 3:
            for index in range(self._rng.randrange(1, 3)):
                self.disk.start_queue(self.disk.make_queue(index, 16))
        self.sent += 4 * steps

    def _drain(self) -> None:
        """Read what has come, keep nothing; never wait."""
        sock = self.disk.channel.sock
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.setblocking(False)
                try:
                    data, fds, _, _ = socket.recv_fds(sock, 65536, 64)
                finally:
                    sock.setblocking(True)
                for fd in fds:
                    os.close(fd)
                if not data:
                    raise OSError("hung up")

    def _number(self) -> int:
        rng = self._rng
        region = rng.choice(self.memory.regions)
        near = rng.choice((region.guest, region.spec.user, region.spec.size, region.end))
        value = rng.choice((rng.choice(EDGES), near, near + rng.randrange(-64, 4096),
                            rng.randrange(1 << 16), rng.getrandbits(64)))
        return value & (1 << 64) - 1

    def _small(self, bits: int) -> int:
        value = self._rng.choice((0, 1, 2, 3, 16, self._number()))
        return value & (1 << bits) - 1

    def _regions(self) -> bytes:
        count = self._rng.choice((0, 1, 2, 3, 8, 9, 300, self._small(32)))
        shown = self._rng.randrange(0, 9)
        rows = [self._region() for _ in range(shown)]
        return REGIONS.pack(count, self._small(32)) + b"".join(rows)

    def _region(self) -> bytes:
        if self._rng.random() < 0.5:
            return self._rng.choice(self.memory.regions).wire()
        return REGION.pack(*(self._number() for _ in range(4)))

    def _payload(self, request: int) -> bytes:
        number, small = self._number, self._small
        state = VRING_STATE.pack(small(32), small(32))
        makers: dict[int, Callable[[], bytes]] = {
            Request.SET_MEM_TABLE: self._regions,
            Request.ADD_MEM_REG: lambda: U64.pack(0) + self._region(),
            Request.REM_MEM_REG: lambda: U64.pack(0) + self._region(),
            Request.SET_LOG_BASE: lambda: LOG.pack(number(), number()),
            Request.SET_VRING_ADDR: lambda: VRING_ADDR.pack(
                small(32), small(32), number(), number(), number(), number()),
            Request.SET_VRING_NUM: lambda: state,
            Request.SET_VRING_BASE: lambda: state,
            Request.GET_VRING_BASE: lambda: state,
            Request.SET_VRING_ENABLE: lambda: state,
            Request.SET_VRING_KICK: lambda: U64.pack(small(9)),
            Request.SET_VRING_CALL: lambda: U64.pack(small(9)),
            Request.SET_VRING_ERR: lambda: U64.pack(small(9)),
            Request.GET_CONFIG: lambda: CONFIG.pack(small(32), small(32), 0) + bytes(small(9)),
            Request.SET_CONFIG: lambda: CONFIG.pack(small(32), small(32), 0) + bytes(small(9)),
            Request.GET_INFLIGHT_FD: lambda: INFLIGHT.pack(number(), number(), small(16),
                                                           small(16)),
            Request.SET_INFLIGHT_FD: lambda: INFLIGHT.pack(number(), number(), small(16),
                                                           small(16)),
            Request.SET_FEATURES: lambda: U64.pack(self._features()),
            Request.SET_PROTOCOL_FEATURES: lambda: U64.pack(
                self._rng.choice((self.disk.protocol, number()))),
        }
        maker = makers.get(request)
        if maker is None or self._rng.random() < 0.05:
            return self._rng.randbytes(self._rng.choice((0, 0, 4, 8, 12, 40, 300)))
        payload = maker()
        if self._rng.random() < 0.05:
            cut = self._rng.randrange(-8, 9)
            payload = payload + bytes(cut) if cut > 0 else payload[:cut]
        return payload

    def _features(self) -> int:
        offered = self.disk.offered
        return self._rng.choice((offered, offered & self._number(), self._number()))

    def _fds(self, request: int) -> list[int]:
        single = (Request.SET_LOG_BASE, Request.SET_VRING_KICK, Request.SET_VRING_CALL,
                  Request.SET_VRING_ERR, Request.SET_INFLIGHT_FD, Request.ADD_MEM_REG)
        count = int(request in single)
        if request == Request.SET_MEM_TABLE:
            count = self._rng.randrange(0, 10)
        if self._rng.random() < 0.1:
            count = self._rng.choice((0, 1, 2, 8, 33))
        good = [region.fd for region in self.memory.regions]
        if request in (Request.SET_MEM_TABLE, Request.ADD_MEM_REG) and self._rng.random() < 0.7:
            return [self._rng.choice(good) for _ in range(count)]
        return [self._odd.make() for _ in range(count)]

    def _message(self) -> None:
        request = self._rng.choice((int(self._rng.choice(list(Request))), self._small(32)))
        flags = self._rng.choice((1,) * 6 + (9,) * 6 + (0, 2, 5, 13, self._small(32)))
        payload = self._payload(request)
        size = None if self._rng.random() < 0.95 else self._small(32)
        self.sent += 1
        self.disk.channel.send(request, payload, self._fds(request), flags=flags, size=size)

    def _use(self) -> None:
        """Requests on whatever rings there are, well formed or not."""
        for queue in self.disk.queues.values():
            view = self.memory.regions[0].view
            if self._rng.random() < 0.5:
                at = self._rng.randrange(0, 2048)
                view[at : at + 16] = self._rng.randbytes(16)
            with contextlib.suppress(KeyError, FrontEndError, MemoryError, ValueError):
                self.disk.submit(self._rng.choice((0, 1, 4, 8, 11, 13, 99)), self._small(20),
                                 bytes(512), 512, queue=queue.index)
        self.sent += 1

    def _shrink(self) -> None:
        """The memory goes away under the daemon, and perhaps comes back."""
        if self._rng.random() < 0.3:
            region = self._rng.choice(self.memory.regions)
            os.ftruncate(region.fd, self._rng.choice((0, PAGE)))
            for queue in self.disk.queues.values():
                os.eventfd_write(queue.kick_fd, 1)
            time.sleep(self._rng.choice((0, 0.001)))
            os.ftruncate(region.fd, region.spec.offset + region.spec.size)
            self.sent += 1

    def _raw(self) -> None:
        if self._rng.random() < 0.2:
            self.sent += 1
            self.disk.channel.send_bytes(self._rng.randbytes(self._rng.randrange(1, 200)))

    def _piecemeal(self) -> None:
        """A message in pieces, each with a descriptor; perhaps not all of it."""
        request = int(self._rng.choice(list(Request)))
        payload = self._payload(request)
        data = HEADER.pack(request, 1, len(payload)) + payload
        for at in range(0, len(data), 7):
            fds = [self._odd.make()] if self._rng.random() < 0.2 else []
            self.disk.channel.send_bytes(data[at : at + 7], fds)
            if self._rng.random() < 0.02:
                raise OSError("hang up here")
        self.sent += 1


# ---- One hostile control client ----------------------------------------------------------------


class Babbler:
    """Connections to the control socket that send anything."""

    VERBS = ("query-status", "query-epochs", "query-disks", "query-stats", "query-version",
             "query-commands", "qmp_capabilities", "epoch-seal", "epoch-commit",
             "epoch-discard", "device_add", "")

    def __init__(self, daemon: Daemon, rng: random.Random) -> None:
        self._rng = rng
        self._path = str(daemon.control_path)
        self._sockets: list[socket.socket] = []
        self.sent = 0

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    def run(self) -> None:
        for _ in range(self._rng.choice((1, 1, 1, 2, CLIENTS_MAX))):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(5)
            self._sockets.append(sock)
            with contextlib.suppress(BlockingIOError):
                sock.connect(self._path)
        for _ in range(self._rng.randrange(1, 30)):
            sock = self._rng.choice(self._sockets)
            data = self._data()
            self.sent += 1
            with contextlib.suppress(OSError):
                sock.sendall(data)
            if self._rng.random() < 0.5:
                self._read(sock)

    def _read(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            while sock.recv(65536):
                pass
        except OSError:
            pass
        finally:
            sock.settimeout(5)

    def _value(self, depth: int = 0) -> object:
        rng = self._rng
        values: list[object] = [None, True, -1, 0, 1, 1 << 63, 1 << 64, 10 ** 400, 1e308, 0.5, "",
                                "x" * rng.randrange(2000), "\ud800", "\0", [], {}]
        if depth < 4:
            values += [[self._value(depth + 1)], {"epoch": self._value(depth + 1)}]
        return rng.choice(values)

    def _command(self) -> bytes:
        rng = self._rng
        message: dict[str, object] = {"execute": rng.choice((*self.VERBS, self._value()))}
        if rng.random() < 0.4:
            message["arguments"] = rng.choice(({"epoch": self._value()}, self._value()))
        if rng.random() < 0.4:
            message["id"] = self._value()
        if rng.random() < 0.1:
            message[rng.choice(("exec-oob", "x", "control"))] = self._value()
        return json.dumps(message, ensure_ascii=rng.random() < 0.8).encode(
            errors="surrogatepass") + rng.choice((b"", b"\n", b"\r\n"))

    def _data(self) -> bytes:
        rng = self._rng
        kind = rng.randrange(12)
        if kind == 0:
            return rng.randbytes(rng.randrange(1, 3000))
        if kind == 1:
            deep = rng.choice((30, 31, 32, 33, 1000, 60000))
            return rng.choice((b"[", b'{"a":', b'{"execute":[')) * deep
        if kind == 2:
            return b'{"execute":"epoch-commit","arguments":{"epoch":' + b"9" * rng.choice(
                (19, 20, 400, 5000, 60000)) + b"}}"
        if kind == 3:
            command = self._command()
            return command[: rng.randrange(len(command) + 1)]
        if kind == 4:
            broken = bytearray(self._command())
            for _ in range(rng.randrange(1, 4)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            return bytes(broken)
        if kind == 5:
            return b" \n" * rng.randrange(40000)
        if kind == 6:
            return b'"' + b"\\" * rng.randrange(1, 70000)
        if kind == 7:
            return b'{"execute":"qmp_capabilities"}' + self._command() * rng.choice((1, 200))
        return b'{"execute":"qmp_capabilities"}' * (kind == 8) + self._command()


# ---- Rounds ------------------------------------------------------------------------------------


class Scene:
    """The daemon, and those who must not be harmed."""

    def __init__(self, folder: Path) -> None:
        self.daemon = Daemon(folder, [DiskSpec("bad", 8 << 20), DiskSpec("good", 8 << 20)],
                             arena="16M")
        self.daemon.start()
        self.peaceful = Disk(self.daemon.socket(1)).start(1, 16)
        self._count = 0
        self.daemon.control.status()
        self._descriptors = self.descriptors()
        self.unharmed(honest=True)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.pid}/fd"))

    def unharmed(self, *, honest: bool) -> None:
        """Disk 1, control and, if asked for, disk 0 work; nothing was reported."""
        self._count += 1
        data = struct.pack("<I", self._count) * 128
        until("the daemon's descriptors to be closed",
              lambda: self.descriptors() <= self._descriptors)
        self.daemon.control.checkpoint()  # comes behind every verb that is under way still
        self.peaceful.write(self._count % 1000, data)
        if self.peaceful.read(self._count % 1000, 1) != data:
            raise Finding("disk 1 reads other bytes than were written")
        self.daemon.control.status()
        if honest:
            with Disk(self.daemon.socket(0)) as disk:
                disk.start(1, 16)
                disk.write(7, data)
                if disk.read(7, 1) != data:
                    raise Finding("disk 0 reads other bytes than were written")
        if complaints := self.daemon.complaints():
            raise Finding(complaints[0])

    def end(self) -> None:
        """The daemon stops when it is asked to."""
        self.peaceful.close()
        self.daemon.stop("quit")
        if complaints := self.daemon.complaints():
            raise Finding(complaints[0])


def _round(name: str, scene: Scene, rng: random.Random) -> int:
    hostile = Hostile(scene.daemon, rng) if name == "vhost" else Babbler(scene.daemon, rng)
    try:
        hostile.run()
    finally:
        hostile.close()
    return hostile.sent


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Short, because a socket's path is."""
    path = Path(tempfile.mkdtemp(prefix="epochd-fuzz-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def fuzz(name: str, seconds: float, seed: int | None, kept: Path) -> tuple[int, list[str]]:
    """Rounds of `name` until the time is over; (messages sent, findings)."""
    seed = random.randrange(1 << 32) if seed is None else seed
    end = time.monotonic() + seconds
    sent = number = 0
    with _folder() as folder:
        scene = Scene(folder)
        try:
            while time.monotonic() < end:
                sent += _round(name, scene, random.Random(f"{seed}:{number}"))
                scene.unharmed(honest=number % HONEST_EVERY == 0)
                number += 1
            scene.end()
        except Exception as error:  # a dead daemon shows in many ways
            log = kept / f"{name}-{seed}.log"
            kept.mkdir(parents=True, exist_ok=True)
            log.write_text(scene.daemon.log())
            said = (scene.daemon.complaints() or [str(error)])[0]
            where = f"seed {seed}, round {number}, log {log}"
            return sent, [f"{type(error).__name__}: {said} ({where})"]
        finally:
            with contextlib.suppress(Exception):
                scene.peaceful.close()
            with contextlib.suppress(Exception):
                scene.daemon.close()
    return sent, []
