"""vhost-user messages on a Unix socket, as the front end sends and reads them.

Source of every number and layout: QEMU's docs/interop/vhost-user.rst (7.2), and for the
feature bits the virtio 1.2 specification. One `Channel` belongs to one thread. It never
retries: a peer that is late raises `Late`, one that hung up raises `HungUp`, an answer that
breaks the protocol raises `BadReply`. File descriptors that are sent stay the caller's;
those that arrive become the caller's.

Not done here: any policy about order or negotiation (see device.py), and any check of what is
sent, so that tests can send what no honest front end would.
"""

from __future__ import annotations

import array
import enum
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

DEADLINE_S = float(os.environ.get("EPOCHD_TEST_DEADLINE", "30"))
"""Seconds that any wait in the tests may take. Never reached when things work."""

VERSION = 0x1
REPLY = 0x4
NEED_REPLY = 0x8
NO_FD = 0x100
"""Bit of the SET_VRING_KICK/CALL/ERR payload: no descriptor comes with the message."""
FDS_MAX = 64

HEADER = struct.Struct("=III")  # request, flags, payload size
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")  # index, num
VRING_ADDR = struct.Struct("=IIQQQQ")  # index, flags, descriptor, used, available, log
REGION = struct.Struct("=QQQQ")  # guest address, size, user address, mmap offset
REGIONS = struct.Struct("=II")  # number of regions, padding
LOG = struct.Struct("=QQ")  # size, offset
CONFIG = struct.Struct("=III")  # offset, size, flags
INFLIGHT = struct.Struct("=QQHH")  # mmap size, mmap offset, queues, queue size


class Request(enum.IntEnum):
    """Messages of the front end."""

    NONE = 0
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
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
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class Protocol(enum.IntFlag):
    """VHOST_USER_PROTOCOL_F_*, as masks."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


class Feature(enum.IntFlag):
    """Device and ring features, as masks."""

    BLK_SIZE_MAX = 1 << 1
    BLK_SEG_MAX = 1 << 2
    BLK_GEOMETRY = 1 << 4
    BLK_RO = 1 << 5
    BLK_BLK_SIZE = 1 << 6
    BLK_FLUSH = 1 << 9
    BLK_TOPOLOGY = 1 << 10
    BLK_CONFIG_WCE = 1 << 11
    BLK_MQ = 1 << 12
    BLK_DISCARD = 1 << 13
    BLK_WRITE_ZEROES = 1 << 14
    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    IOMMU_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34


class FrontEndError(Exception):
    """Something in the conversation with the back end went wrong."""


class HungUp(FrontEndError):
    """The back end closed the connection."""


class Late(FrontEndError):
    """The back end did not answer or complete within the deadline."""


class BadReply(FrontEndError):
    """The back end sent something that the protocol does not allow here."""


class Refused(FrontEndError):
    """The back end acknowledged a message with a value that is not zero."""

    def __init__(self, request: int, value: int) -> None:
        super().__init__(f"{name_of(request)} was refused with {value:#x}")
        self.request = request
        self.value = value


def name_of(request: int) -> str:
    """Name of a message for texts."""
    try:
        return Request(request).name
    except ValueError:
        return f"message {request}"


@dataclass
class Message:
    """One message as it came in."""

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    def u64(self) -> int:
        """The payload as one 64-bit number."""
        if len(self.payload) != U64.size:
            raise BadReply(f"{name_of(self.request)}: {len(self.payload)} bytes, not a u64")
        return int(U64.unpack(self.payload)[0])

    def close_fds(self) -> None:
        """Close the descriptors that came along."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


class Channel:
    """The front end's end of a vhost-user connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._arrived = b""
        self._fds: list[int] = []

    @classmethod
    def connect(cls, path: str | os.PathLike[str]) -> Channel:
        """Connect to a listening back end."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(os.fspath(path))
        except OSError:
            sock.close()
            raise
        return cls(sock)

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        """Hang up. May be called twice."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self.sock.close()

    # ---- sending -------------------------------------------------------------------------

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send raw bytes, with descriptors attached to the first of them."""
        ancillary = []
        if fds:
            ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)))
        try:
            sent = self.sock.sendmsg([data], ancillary)
            if sent < len(data):
                self.sock.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise HungUp("the back end hung up while a message was sent") from error

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = VERSION,
        size: int | None = None,
    ) -> None:
        """Send one message. `size` replaces the true payload size in the header."""
        header = HEADER.pack(request, flags, len(payload) if size is None else size)
        self.send_bytes(header + payload, fds)

    # ---- receiving -----------------------------------------------------------------------

    def _take(self, count: int, deadline: float) -> bytes:
        while len(self._arrived) < count:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.sock], [], [], left)[0]:
                raise Late(f"no answer within {DEADLINE_S:g} s (EPOCHD_TEST_DEADLINE)")
            try:
                data, fds, _flags, _peer = socket.recv_fds(self.sock, 65536, FDS_MAX)
            except ConnectionResetError as error:
                raise HungUp("the back end reset the connection") from error
            self._fds.extend(fds)
            if not data:
                raise HungUp("the back end closed the connection")
            self._arrived += data
        taken, self._arrived = self._arrived[:count], self._arrived[count:]
        return taken

    def receive(self, deadline_s: float = DEADLINE_S) -> Message:
        """Wait for one message."""
        deadline = time.monotonic() + deadline_s
        request, flags, size = HEADER.unpack(self._take(HEADER.size, deadline))
        payload = self._take(size, deadline)
        fds, self._fds = self._fds, []
        return Message(request, flags, payload, fds)

    def reply_to(self, request: int) -> Message:
        """Wait for the reply to `request` and check its header."""
        message = self.receive()
        if message.request != request:
            message.close_fds()
            raise BadReply(f"{name_of(message.request)} came in reply to {name_of(request)}")
        if message.flags & 0x3 != VERSION or not message.flags & REPLY:
            message.close_fds()
            raise BadReply(f"reply to {name_of(request)} has the flags {message.flags:#x}")
        return message

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """Send a message that is always replied to and return the reply."""
        self.send(request, payload, fds)
        return self.reply_to(request)

    def ask_u64(self, request: int) -> int:
        """Send a message without payload and return its 64-bit reply."""
        return self.ask(request).u64()

    def command(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, acked: bool = True
    ) -> None:
        """Send a message that has no reply of its own.

        With `acked` (REPLY_ACK must be negotiated) wait for the back end's verdict and raise
        `Refused` when it is not zero.
        """
        if not acked:
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, flags=VERSION | NEED_REPLY)
        value = self.reply_to(request).u64()
        if value:
            raise Refused(request, value)

    def wait_hang_up(self, deadline_s: float = DEADLINE_S) -> None:
        """Wait until the back end closes; raise `Late` or `BadReply` if it does otherwise."""
        try:
            message = self.receive(deadline_s)
        except HungUp:
            return
        raise BadReply(f"{name_of(message.request)} came where a hang-up was expected")

    def quiet(self, seconds: float) -> bool:
        """True when nothing arrives for `seconds`: no byte, no hang-up."""
        return not self._arrived and not select.select([self.sock], [], [], seconds)[0]
