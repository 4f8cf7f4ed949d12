"""The front end's half of vhost-user, as far as a load generator needs it.

Source of numbers, layouts and order: QEMU's docs/interop/vhost-user.rst; the configuration
space: virtio 1.2, 5.2.4. A `Backend` is one connection; its methods are called by one thread and
wait for answers, `REPLY_S` seconds at most. Every error is a `MissingError` that names the socket.

Not done here: migration, reconnection, in-flight tracking, anything after the rings run.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
import sys
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from .errors import MissingError

REPLY_S = 20.0
"""Longest wait for an answer."""

HEADER = struct.Struct("=III")  # request, flags, payload bytes
U64 = struct.Struct("=Q")
STATE = struct.Struct("=II")  # index, number
ADDRESSES = struct.Struct("=IIQQQQ")  # index, flags, descriptors, used, available, log
REGIONS = struct.Struct("=IIQQQQ")  # count, padding; guest, size, user, offset of the one region
CONFIG = struct.Struct("=III")  # offset, size, flags
CONFIG_BYTES = 60
BLK_CONFIG = struct.Struct("<QII4xI10xH")  # capacity, size max, segments max, block size, queues
VERSION = 1
REPLY = 1 << 2
NEED_REPLY = 1 << 3


class Request(IntEnum):
    """The messages that are sent."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24


class Protocol(IntFlag):
    """Protocol features."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    CONFIG = 1 << 9


class Feature(IntFlag):
    """Device and ring features that are acknowledged when they are offered."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    READ_ONLY = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    INDIRECT = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32


WANTED = Feature(sum(Feature))


@dataclass(frozen=True)
class Region:
    """Shared memory: its descriptor, bytes, and the address at which the guest has it."""

    fd: int
    size: int
    guest: int


@dataclass(frozen=True)
class Queue:
    """Where a queue's parts lie, as guest addresses, and its descriptors."""

    size: int
    desc: int
    avail: int
    used: int
    kick_fd: int
    call_fd: int
    err_fd: int


class Backend:
    """A connection to a vhost-user-blk back end, negotiated by the constructor.

    `features`: as acknowledged; `sectors`: the disk's capacity in units of 512 bytes;
    `block_bytes`: its logical blocks; `queues`: how many it has. Owns its socket."""

    def __init__(self, path: str, *, without: int = 0) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(REPLY_S)
        self._protocol = Protocol(0)
        try:
            self._connect()
            self._negotiate(WANTED & ~without)
        except BaseException:
            self.sock.close()
            raise

    def close(self) -> None:
        """Hang up: the back end stops the rings."""
        self.sock.close()

    # ---- messages ------------------------------------------------------------------------

    def _connect(self) -> None:
        try:
            self.sock.connect(self.path)
        except OSError as error:
            why = {
                errno.ENOENT: "there is no such socket; is the back end running?",
                errno.ECONNREFUSED: "nobody listens there; is the back end running?",
                errno.EACCES: "permission denied; run as the user who owns the socket",
                errno.EAGAIN: "the back end does not accept; has it another front end?",
            }.get(error.errno or 0, str(error))
            raise MissingError(f"cannot connect to {self.path}: {why}") from None

    def _send(
        self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 0
    ) -> None:
        data = HEADER.pack(request, VERSION | flags, len(payload)) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([data], rights)
        except OSError as error:
            raise MissingError(f"{self.path}: {request.name} could not be sent: {error}") from None

    def _receive(self, request: Request, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self.sock.recv(size - len(data))
            except TimeoutError:
                raise MissingError(
                    f"{self.path}: no answer to {request.name} within {REPLY_S:g} s; a back end "
                    "serves one front end at a time: has it another one?"
                ) from None
            except OSError as error:
                raise MissingError(f"{self.path}: {request.name}: {error}") from None
            if not piece:
                raise MissingError(f"{self.path}: the back end hung up at {request.name}")
            data += piece
        return data

    def _ask(self, request: Request, payload: bytes = b"") -> bytes:
        self._send(request, payload)
        return self._reply(request)

    def _reply(self, request: Request) -> bytes:
        answered, flags, size = HEADER.unpack(self._receive(request, HEADER.size))
        if answered != request or not flags & REPLY:
            raise MissingError(
                f"{self.path}: message {answered} with flags {flags:#x} came instead of the "
                f"answer to {request.name}; is this a vhost-user-blk socket?"
            )
        return self._receive(request, size)

    def _ask_u64(self, request: Request) -> int:
        payload = self._ask(request)
        if len(payload) != U64.size:
            raise MissingError(
                f"{self.path}: {request.name} was answered with {len(payload)} bytes"
            )
        return int(U64.unpack(payload)[0])

    def _command(self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        acked = Protocol.REPLY_ACK in self._protocol
        self._send(request, payload, fds, NEED_REPLY if acked else 0)
        if acked and (verdict := U64.unpack(self._reply(request))[0]):
            raise MissingError(f"{self.path}: the back end refused {request.name} ({verdict})")

    # ---- set-up --------------------------------------------------------------------------

    def _negotiate(self, wanted: Feature) -> None:
        offered = self._ask_u64(Request.GET_FEATURES)
        if not offered & Feature.VERSION_1 or not offered & Feature.PROTOCOL_FEATURES:
            raise MissingError(
                f"{self.path}: the back end offers features {offered:#x}, without VERSION_1 or "
                "protocol features; a modern vhost-user-blk back end is needed"
            )
        protocol = self._ask_u64(Request.GET_PROTOCOL_FEATURES)
        chosen = protocol & (Protocol.MQ | Protocol.REPLY_ACK | Protocol.CONFIG)
        if not chosen & Protocol.CONFIG:
            raise MissingError(
                f"{self.path}: the back end has no configuration space; is it a disk?"
            )
        # Acknowledgements may be asked for from here on.
        self._send(Request.SET_PROTOCOL_FEATURES, U64.pack(chosen))
        self._protocol = Protocol(chosen)
        self.queues = self._ask_u64(Request.GET_QUEUE_NUM) if chosen & Protocol.MQ else 1
        self._command(Request.SET_OWNER)
        self.features = Feature(offered & wanted)
        self._read_config()

    def _read_config(self) -> None:
        asked = CONFIG.pack(0, CONFIG_BYTES, 0) + bytes(CONFIG_BYTES)
        raw = self._ask(Request.GET_CONFIG, asked)[CONFIG.size :]
        if len(raw) < BLK_CONFIG.size:
            raise MissingError(f"{self.path}: the configuration space has {len(raw)} bytes only")
        self.sectors, size_max, _segments, block, queues = BLK_CONFIG.unpack_from(raw)
        self.block_bytes = block if Feature.BLK_SIZE in self.features and block else 512
        self.size_max = size_max if Feature.SIZE_MAX in self.features and size_max else sys.maxsize
        if Feature.MQ in self.features:
            self.queues = min(self.queues, queues) if self.queues > 1 else queues

    def start(self, region: Region, queues: list[Queue]) -> None:
        """Share the memory and start the queues."""
        self._command(Request.SET_FEATURES, U64.pack(self.features))
        # The user address is only a name for the memory, the same as the guest address.
        table = REGIONS.pack(1, 0, region.guest, region.size, region.guest, 0)
        self._command(Request.SET_MEM_TABLE, table, (region.fd,))
        for index, queue in enumerate(queues):
            self._command(Request.SET_VRING_NUM, STATE.pack(index, queue.size))
            self._command(Request.SET_VRING_BASE, STATE.pack(index, 0))
            addresses = ADDRESSES.pack(index, 0, queue.desc, queue.used, queue.avail, 0)
            self._command(Request.SET_VRING_ADDR, addresses)
            self._command(Request.SET_VRING_ERR, U64.pack(index), (queue.err_fd,))
            self._command(Request.SET_VRING_CALL, U64.pack(index), (queue.call_fd,))
            self._command(Request.SET_VRING_KICK, U64.pack(index), (queue.kick_fd,))
        for index in range(len(queues)):
            self._command(Request.SET_VRING_ENABLE, STATE.pack(index, 1))

    def stop(self, queues: int) -> None:
        """Stop the rings and wait until the back end has; it may touch them no more then."""
        for index in range(queues):
            self._ask(Request.GET_VRING_BASE, STATE.pack(index, 0))

    def gone(self) -> bool:
        """Has the back end hung up? Nothing else ever arrives while the rings run."""
        return bool(select.select([self.sock], [], [], 0)[0])


def close_all(fds: list[int]) -> None:
    """Close and forget."""
    while fds:
        os.close(fds.pop())
