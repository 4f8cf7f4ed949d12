"""Framing of vhost-user: whole messages with their descriptors in, whole replies out.

Contract. Owner: the asyncio loop; one reader and one writer at a time. Every descriptor that
arrives is in the Message that receive() returns, or closed. What a message means is `vhost`'s
business.
"""

import asyncio
import socket
import struct
from collections.abc import Callable

from . import rejections
from . import vhost_messages as wire
from .vhost_messages import Message, Reply


class ProtocolError(Exception):
    """The connection must end: the stream of messages cannot be trusted any more, or one was
    refused (`kind` of rejection) and the front end did not want to hear that."""

    def __init__(self, text: str, kind: str = rejections.FRONT_ENDS) -> None:
        super().__init__(text)
        self.kind = kind


class HungUp(Exception):
    """The front end closed its end."""


class Channel:
    """Framing: whole messages with their descriptors in, whole replies out."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._loop = asyncio.get_running_loop()

    async def _ready(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        ready = self._loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        add(self.socket.fileno(), wake)
        try:
            await ready
        finally:
            remove(self.socket.fileno())

    async def _receive(self, size: int, fds: list[int], started: bool) -> bytes:
        """Exactly `size` bytes; descriptors are appended to `fds`."""
        data = b""
        while len(data) < size:
            try:
                chunk, ancillary, flags, _ = self.socket.recvmsg(
                    size - len(data), socket.CMSG_SPACE(wire.FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
                continue
            except OSError as error:
                raise HungUp from error
            for level, kind, body in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    count = len(body) // 4
                    fds += struct.unpack(f"={count}i", body[: count * 4])
            # Several sends may make up one message, each with descriptors of its own.
            if flags & socket.MSG_CTRUNC or len(fds) > wire.FDS_MAX:
                raise ProtocolError("more file descriptors than can be received")
            if not chunk:
                if data or started:
                    raise ProtocolError("hung up in the middle of a message")
                raise HungUp
            data += chunk
        return data

    async def receive(self) -> Message:
        """The next message; HungUp at the end, ProtocolError when the frame is broken."""
        fds: list[int] = []
        try:
            header = await self._receive(wire.HEADER.size, fds, started=False)
            request, flags, size = wire.HEADER.unpack(header)
            if flags & wire.FLAG_VERSION_MASK != wire.VERSION:
                raise ProtocolError(f"message version {flags & wire.FLAG_VERSION_MASK}, not 1")
            if flags & wire.FLAG_REPLY:
                raise ProtocolError("a reply, though nothing was asked")
            if size > wire.PAYLOAD_BYTES_MAX:
                raise ProtocolError(f"a message of {size} bytes; {wire.PAYLOAD_BYTES_MAX} is "
                                    "the limit")
            payload = await self._receive(size, fds, started=True)
        except BaseException:
            Message(0, 0, b"", fds).close()
            raise
        return Message(request, flags, payload, fds)

    async def send(self, request: int, reply: Reply) -> None:
        """Send a reply with its descriptor, if it has one; HungUp."""
        data = wire.pack_reply(request, reply.payload)
        fds = [reply.fd] if reply.fd >= 0 else []
        while data:
            try:
                sent = socket.send_fds(self.socket, [data], fds)
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
                continue
            except OSError as error:
                raise HungUp from error
            data, fds = data[sent:], []


def peer_name(sock: socket.socket) -> str:
    """The front end in a log line."""
    try:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError:
        return "unknown process"
    pid, uid, _ = struct.unpack("=iII", credentials)
    return f"process {pid} of user {uid}"
