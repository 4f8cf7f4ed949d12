"""Random 4 KiB writes to an NBD server, a set number in flight, that can pause.

COLO's secondary takes its disk's writes over NBD, and its QEMU aborts when one is in flight at
a checkpoint; fio and qemu-img cannot pause for that. Protocol: NetworkBlockDevice/nbd,
doc/proto.md: fixed newstyle handshake, NBD_OPT_GO, simple replies.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from .failures import FailedError

IHAVEOPT = 0x49484156454F5054
OPTION_REPLY = 0x0003E889045565A9
OPT_GO, REP_ACK, REP_INFO, INFO_EXPORT = 7, 1, 3, 0
FIXED_NEWSTYLE_NO_ZEROES = 3
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC, CMD_WRITE, CMD_DISC = 0x25609513, 0x67446698, 1, 2
BLOCK = 4096
SECONDS_MAX = 60.0


class NbdWriter:
    """One connection. `blocks` are the contents that it writes in turn, 4 KiB each, at random
    block-aligned places below `region` bytes."""

    def __init__(
        self, path: Path, export: str, *, region: int, blocks: Sequence[bytes], seed: int = 1
    ) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS_MAX)
        try:
            self._socket.connect(str(path))
            self.size = self._go(export)
        except OSError as error:
            raise FailedError(f"NBD server at {path}: {error}") from None
        region = min(region, self.size)
        source = random.Random(seed)
        self._places = [source.randrange(region // BLOCK) * BLOCK for _ in range(1 << 16)]
        self._blocks = blocks
        self._sent = self._done = 0
        self._input = b""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(REQUEST.pack(REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
        self._socket.close()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise FailedError("the NBD server closed the connection")
            data += part
        return data

    def _go(self, export: str) -> int:
        """The handshake; returns the size of the export in bytes."""
        if self._read(8) != b"NBDMAGIC" or self._read(8) != b"IHAVEOPT":
            raise FailedError("the other side is no NBD server of the newstyle protocol")
        self._read(2)
        name = export.encode()
        body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        option = struct.pack(">IQII", FIXED_NEWSTYLE_NO_ZEROES, IHAVEOPT, OPT_GO, len(body))
        self._socket.sendall(option + body)
        size = 0
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._read(20))
            payload = self._read(length)
            if magic != OPTION_REPLY or kind & 0x80000000:
                raise FailedError(f"the NBD server refused export {export!r}: {payload!r}")
            if kind == REP_INFO and struct.unpack_from(">H", payload)[0] == INFO_EXPORT:
                size = int(struct.unpack_from(">Q", payload, 2)[0])
            elif kind == REP_ACK:
                return size

    def _send(self, count: int) -> None:
        parts = []
        for number in range(self._sent, self._sent + count):
            place = self._places[number % len(self._places)]
            parts.append(REQUEST.pack(REQUEST_MAGIC, 0, CMD_WRITE, number, place, BLOCK))
            parts.append(self._blocks[number % len(self._blocks)])
        self._sent += count
        self._socket.sendall(b"".join(parts))

    def _reap(self) -> int:
        """Wait for answers; returns how many came."""
        data = self._socket.recv(1 << 16)
        if not data:
            raise FailedError("the NBD server closed the connection during the run")
        self._input += data
        whole = len(self._input) // REPLY.size * REPLY.size
        for magic, error, _ in REPLY.iter_unpack(self._input[:whole]):
            if magic != REPLY_MAGIC or error:
                raise FailedError(f"a write over NBD failed with error {error}")
        self._input = self._input[whole:]
        self._done += whole // REPLY.size
        return whole // REPLY.size

    def write_until(self, deadline: float, depth: int) -> int:
        """Write with `depth` in flight until time.monotonic() is `deadline`, then wait for all
        answers. Returns the number of writes."""
        before = self._done
        try:
            self._send(depth)
            while time.monotonic() < deadline:
                if come := self._reap():
                    self._send(come)
            while self._done < self._sent:
                self._reap()
        except OSError as error:
            raise FailedError(f"the NBD connection was lost: {error}") from None
        return self._done - before
