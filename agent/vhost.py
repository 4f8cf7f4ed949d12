"""vhost-user: one front end of one disk, from its first message to its hang-up.

Contract. Owner: the asyncio loop. A Session takes over a connected socket, handles its
messages one after the other (each waits for the core before the next is read), and when
run() returns the core has let go of everything of that front end and all descriptors are
closed. No message, however broken, raises out of run(): the author's connection ends with
one log line, nobody else notices.

Two kinds of fault. A frame that cannot be trusted (version, length, number of descriptors)
ends the connection. A well-formed message that cannot be obeyed is answered with a failure
where the front end asked for an answer (REPLY_ACK), and ends the connection where it did
not: going on would leave both sides with different ideas.

Guest memory is never mapped here: its descriptors go to the core, which checks all
addresses. Not offered, on purpose: BACKEND_REQ (the size of a disk never changes while a
front end is there), postcopy, in-band notifications, packed rings.
"""

import asyncio
import contextlib
import logging
import os
import select
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from . import core, rejections
from . import vhost_messages as wire
from .vhost_channel import Channel, HungUp, ProtocolError, peer_name
from .vhost_messages import Feature, Message, ProtocolFeature, Reply, Request

log = logging.getLogger("epochd.vhost")

DRAIN_SECONDS = 2.0


class Refused(Exception):
    """A well-formed message that cannot be obeyed; the text says why."""


@dataclass(frozen=True)
class Disk:
    """What a session needs to know of the disk it serves."""

    index: int
    name: str
    features: int
    config_space: bytes


Handler = Callable[["Session", Message], Awaitable[Reply | None]]


@dataclass(frozen=True)
class Rule:
    """What a request must look like: payload size range and number of descriptors."""

    handler: Handler
    size: tuple[int, int]
    fds: tuple[int, int]


def _rule(handler: Handler, payload: struct.Struct | int = 0, *, most: int | None = None,
          fds: tuple[int, int] = (0, 0)) -> Rule:
    size = payload if isinstance(payload, int) else payload.size
    return Rule(handler, (size, size if most is None else most), fds)


class Session:
    """One connected front end."""

    def __init__(self, engine: core.Core, disk: Disk, sock: socket.socket) -> None:
        self._core = engine
        self.disk = disk
        self._channel = Channel(sock)
        self._socket = sock
        self._regions: list[core.Region] = []
        self._protocol_features = 0
        self.features = 0
        self._ring_queues: set[int] = set()
        self._worker: asyncio.Task[None] | None = None
        self._end = "hung up"
        self.fault = rejections.FRONT_ENDS
        self._dropped = False
        self.peer = peer_name(sock)

    async def run(self) -> str:
        """Serve until the front end hangs up, breaks the protocol, or drop(); say why."""
        # Watches only for the hang-up (EPOLLHUP needs no asking): the worker may be waiting
        # for the core, with messages unread, when the front end dies.
        hangup = select.epoll()
        hangup.register(self._socket.fileno(), 0)
        loop = asyncio.get_running_loop()
        self._worker = asyncio.create_task(self._messages())

        def hung_up() -> None:
            loop.remove_reader(hangup.fileno())
            self.drop("hung up")

        loop.add_reader(hangup.fileno(), hung_up)
        if self._dropped:
            self._worker.cancel()
        try:
            await asyncio.wait({self._worker})
        finally:
            self._worker.cancel()
            loop.remove_reader(hangup.fileno())
            hangup.close()
            await self._let_go()
        return self._end

    def drop(self, why: str) -> None:
        """End the session from outside; run() then cleans up and returns `why`."""
        if self._dropped or (self._worker is not None and self._worker.done()):
            return
        self._dropped, self._end = True, why
        if self._worker is not None:
            self._worker.cancel()

    def has_hung_up(self) -> bool:
        """Whether the front end is gone, even if nobody noticed yet."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    async def drain(self) -> None:
        """Before a clean stop: let the requests that were taken finish; bounded in time."""
        stops = [self._core.ring_stop(self.disk.index, queue) for queue in self._ring_queues]
        with contextlib.suppress(TimeoutError, core.CoreError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await asyncio.gather(*stops)

    async def _let_go(self) -> None:
        try:
            await self._core.vhost_reset(self.disk.index)
        except core.CoreError as error:
            log.error("disk %s: front end could not be reset: %s", self.disk.name, error)
        self._forget_regions()
        self._socket.close()

    def _forget_regions(self) -> None:
        for region in self._regions:
            os.close(region.fd)
        self._regions = []

    async def _messages(self) -> None:
        try:
            while True:
                message = await self._channel.receive()
                try:
                    await self._handle(message)
                finally:
                    message.close()
                await asyncio.sleep(0)  # a flood of messages must not starve the others
        except HungUp:
            pass
        except ProtocolError as error:
            self._end, self.fault = f"protocol error: {error}", error.kind
        except Exception as error:
            log.exception("disk %s: bug while serving the front end", self.disk.name)
            self._end = f"internal error: {error}"

    async def _handle(self, message: Message) -> None:
        need_reply = bool(
            message.flags & wire.FLAG_NEED_REPLY
            and self._protocol_features >> ProtocolFeature.REPLY_ACK & 1
        )
        try:
            reply = await self._obey(message)
        except (Refused, core.CoreError) as error:
            kind = rejections.MEMORY if message.request in OF_MEMORY else rejections.MESSAGES
            if not need_reply:
                raise ProtocolError(f"{message.name}: {error}", kind) from None
            rejections.note(log, kind, "disk %s: refused %s of %s: %s",
                            self.disk.name, message.name, self.peer, error)
            reply = Reply(wire.U64.pack(1))
        if reply is None and need_reply:
            reply = Reply(wire.U64.pack(0))
        if reply is not None:
            try:
                await self._channel.send(message.request, reply)
            finally:
                if reply.fd >= 0:
                    os.close(reply.fd)

    async def _obey(self, message: Message) -> Reply | None:
        rule = RULES.get(message.request)
        if rule is None:
            raise Refused("not supported by this back end")
        low, high = rule.size
        if not low <= len(message.payload) <= high:
            raise ProtocolError(f"{message.name}: {len(message.payload)} bytes of payload, "
                                f"not {low if low == high else f'{low}..{high}'}")
        few, many = rule.fds
        if not few <= len(message.fds) <= many:
            raise ProtocolError(f"{message.name}: {len(message.fds)} file descriptors, "
                                f"not {few if few == many else f'{few}..{many}'}")
        log.debug("disk %s: %s", self.disk.name, message.name)
        return await rule.handler(self, message)

    # Features.

    async def _get_features(self, message: Message) -> Reply:
        return Reply(wire.U64.pack(self.disk.features))

    async def _set_features(self, message: Message) -> None:
        (features,) = wire.U64.unpack(message.payload)
        if unknown := features & ~self.disk.features:
            raise Refused(f"features not offered: {wire.feature_names(Feature, unknown)}")
        await self._core.vhost_features(self.disk.index, features)
        self.features = features

    async def _get_protocol_features(self, message: Message) -> Reply:
        return Reply(wire.U64.pack(wire.PROTOCOL_FEATURES))

    async def _set_protocol_features(self, message: Message) -> None:
        (features,) = wire.U64.unpack(message.payload)
        if unknown := features & ~wire.PROTOCOL_FEATURES:
            names = wire.feature_names(ProtocolFeature, unknown)
            raise Refused(f"protocol features not offered: {names}")
        self._protocol_features = features

    async def _ignore(self, message: Message) -> None:
        """SET_OWNER marks the start of a session; RESET_OWNER is best ignored (so the
        specification); SET_LOG_FD is an offer that we need not take."""

    async def _reset_device(self, message: Message) -> None:
        await self._core.vhost_reset(self.disk.index)
        self._ring_queues.clear()
        self.features = 0
        if self._regions:  # the front end sends only differences, so what it sent still counts
            await self._core.vhost_memory(self.disk.index, self._regions)

    # Memory.

    async def _set_mem_table(self, message: Message) -> None:
        count, _ = wire.MEM_TABLE.unpack_from(message.payload)
        expected = wire.MEM_TABLE.size + count * wire.MEM_REGION.size
        # Eight slots may be sent whatever the count says: only the first `count` matter.
        if len(message.payload) < expected or len(message.fds) != count:
            raise ProtocolError(
                f"SET_MEM_TABLE: {count} regions with {len(message.payload)} bytes of payload "
                f"and {len(message.fds)} file descriptors"
            )
        if count > core.REGIONS_MAX:
            raise Refused(f"{count} memory regions; at most {core.REGIONS_MAX}")
        table = wire.MEM_REGION.iter_unpack(message.payload[wire.MEM_TABLE.size : expected])
        regions = [_region(numbers, fd) for numbers, fd in zip(table, message.fds, strict=True)]
        await self._core.vhost_memory(self.disk.index, regions)
        message.fds.clear()
        self._forget_regions()
        self._regions = regions

    async def _get_max_mem_slots(self, message: Message) -> Reply:
        return Reply(wire.U64.pack(core.REGIONS_MAX))

    async def _add_mem_reg(self, message: Message) -> None:
        if len(self._regions) >= core.REGIONS_MAX:
            raise Refused(f"more than {core.REGIONS_MAX} memory regions")
        _, *numbers = wire.MEM_REGION_SINGLE.unpack(message.payload)
        region = _region(numbers, message.fds[0])
        await self._core.vhost_memory(self.disk.index, [*self._regions, region])
        message.take_fd()
        self._regions.append(region)

    async def _rem_mem_reg(self, message: Message) -> None:
        _, guest_addr, size, user_addr, _ = wire.MEM_REGION_SINGLE.unpack(message.payload)
        key = (guest_addr, size, user_addr)
        for gone in self._regions:
            if (gone.guest_addr, gone.size, gone.user_addr) == key:
                break
        else:
            raise Refused(f"no memory region of {size:#x} bytes at {guest_addr:#x}")
        rest = [region for region in self._regions if region is not gone]
        await self._core.vhost_memory(self.disk.index, rest)
        self._regions = rest
        os.close(gone.fd)

    async def _set_log_base(self, message: Message) -> Reply:
        size, offset = wire.LOG_BASE.unpack(message.payload)
        await self._core.vhost_log(self.disk.index, message.fds[0], size, offset)
        return Reply(wire.U64.pack(0))

    # Rings.

    def _queue(self, index: int) -> int:
        if index >= core.QUEUES_MAX:
            raise Refused(f"queue {index}; there are {core.QUEUES_MAX}")
        return index

    def _ring_state(self, message: Message) -> tuple[int, int]:
        index, number = wire.VRING_STATE.unpack(message.payload)
        return self._queue(index), number

    async def _get_queue_num(self, message: Message) -> Reply:
        return Reply(wire.U64.pack(core.QUEUES_MAX))

    async def _set_vring_num(self, message: Message) -> None:
        await self._core.ring_size(self.disk.index, *self._ring_state(message))

    async def _set_vring_base(self, message: Message) -> None:
        await self._core.ring_base(self.disk.index, *self._ring_state(message))

    async def _set_vring_addr(self, message: Message) -> None:
        index, flags, desc, used, avail, dirty = wire.VRING_ADDR.unpack(message.payload)
        await self._core.ring_addr(
            self.disk.index, self._queue(index), flags, desc, avail, used, dirty
        )

    async def _get_vring_base(self, message: Message) -> Reply:
        queue, _ = self._ring_state(message)
        base = await self._core.ring_stop(self.disk.index, queue)
        self._ring_queues.discard(queue)
        return Reply(wire.VRING_STATE.pack(queue, base))

    async def _set_vring_enable(self, message: Message) -> None:
        queue, number = self._ring_state(message)
        await self._core.ring_enable(self.disk.index, queue, number != 0)

    def _ring_fd(self, message: Message) -> tuple[int, int]:
        """(queue, descriptor or -1) of SET_VRING_KICK, _CALL and _ERR."""
        (value,) = wire.U64.unpack(message.payload)
        queue = self._queue(value & wire.VRING_INDEX_MASK)
        if bool(value & wire.VRING_NO_FD) == bool(message.fds):
            what = "both a descriptor and the no-descriptor flag" if message.fds else (
                "neither a descriptor nor the no-descriptor flag")
            raise ProtocolError(f"{message.name}: {what}")
        return queue, message.take_fd() if message.fds else -1

    async def _set_vring_kick(self, message: Message) -> None:
        queue, fd = self._ring_fd(message)
        self._ring_queues.add(queue)
        await self._core.ring_kick(self.disk.index, queue, fd)

    async def _set_vring_call(self, message: Message) -> None:
        await self._core.ring_call(self.disk.index, *self._ring_fd(message))

    async def _set_vring_err(self, message: Message) -> None:
        await self._core.ring_err(self.disk.index, *self._ring_fd(message))

    # Configuration space.

    async def _get_config(self, message: Message) -> Reply:
        offset, size, flags = wire.CONFIG.unpack_from(message.payload)
        if size > wire.PAYLOAD_BYTES_MAX - wire.CONFIG.size:
            rejections.note(log, rejections.MESSAGES,
                            "disk %s: refused GET_CONFIG of %s: %d bytes are too many",
                            self.disk.name, self.peer, size)
            return Reply(b"")  # the specification's way to say no
        data = self.disk.config_space[offset : offset + size].ljust(size, b"\0")
        return Reply(wire.CONFIG.pack(offset, size, flags) + data)

    async def _set_config(self, message: Message) -> None:
        offset, size, _ = wire.CONFIG.unpack_from(message.payload)
        raise Refused(f"{size} bytes at {offset}: no configuration field is writable")

    # Requests in flight.

    async def _get_inflight_fd(self, message: Message) -> Reply:
        _, _, queues, queue_size = wire.INFLIGHT.unpack_from(message.payload)
        padding = bytes(len(message.payload) - wire.INFLIGHT.size)
        if not (0 < queues <= core.QUEUES_MAX and 0 < queue_size <= core.QUEUE_SIZE_MAX):
            rejections.note(log, rejections.MEMORY,
                            "disk %s: refused GET_INFLIGHT_FD of %s: %d queues of %d entries",
                            self.disk.name, self.peer, queues, queue_size)
            return Reply(wire.INFLIGHT.pack(0, 0, queues, queue_size) + padding)
        size = core.inflight_bytes(queues, queue_size)
        fd = os.memfd_create(f"epochd-inflight-{self.disk.name}", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            os.close(fd)
            raise Refused(f"no memory for the in-flight region: {error.strerror}") from None
        return Reply(wire.INFLIGHT.pack(size, 0, queues, queue_size) + padding, fd)

    async def _set_inflight_fd(self, message: Message) -> None:
        size, offset, queues, queue_size = wire.INFLIGHT.unpack_from(message.payload)
        await self._core.vhost_inflight(
            self.disk.index, message.fds[0], size, offset, queues, queue_size
        )


OF_MEMORY = (
    Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG, Request.SET_LOG_BASE,
    Request.GET_INFLIGHT_FD, Request.SET_INFLIGHT_FD,
)

_ONE_FD = (1, 1)
_MAYBE_FD = (0, 1)
_MOST = wire.PAYLOAD_BYTES_MAX

RULES: dict[int, Rule] = {
    Request.GET_FEATURES: _rule(Session._get_features),
    Request.SET_FEATURES: _rule(Session._set_features, wire.U64),
    Request.GET_PROTOCOL_FEATURES: _rule(Session._get_protocol_features),
    Request.SET_PROTOCOL_FEATURES: _rule(Session._set_protocol_features, wire.U64),
    Request.SET_OWNER: _rule(Session._ignore),
    Request.RESET_OWNER: _rule(Session._ignore),
    Request.RESET_DEVICE: _rule(Session._reset_device),
    Request.SET_MEM_TABLE: _rule(
        Session._set_mem_table, wire.MEM_TABLE, most=_MOST, fds=(0, wire.FDS_MAX)
    ),
    Request.GET_MAX_MEM_SLOTS: _rule(Session._get_max_mem_slots),
    Request.ADD_MEM_REG: _rule(Session._add_mem_reg, wire.MEM_REGION_SINGLE, fds=_ONE_FD),
    # Some front ends send a descriptor here; the specification lets us close it.
    Request.REM_MEM_REG: _rule(Session._rem_mem_reg, wire.MEM_REGION_SINGLE, fds=_MAYBE_FD),
    Request.SET_LOG_BASE: _rule(Session._set_log_base, wire.LOG_BASE, fds=_ONE_FD),
    Request.SET_LOG_FD: _rule(Session._ignore, 0, most=8, fds=_MAYBE_FD),
    Request.GET_QUEUE_NUM: _rule(Session._get_queue_num),
    Request.SET_VRING_NUM: _rule(Session._set_vring_num, wire.VRING_STATE),
    Request.SET_VRING_ADDR: _rule(Session._set_vring_addr, wire.VRING_ADDR),
    Request.SET_VRING_BASE: _rule(Session._set_vring_base, wire.VRING_STATE),
    Request.GET_VRING_BASE: _rule(Session._get_vring_base, wire.VRING_STATE),
    Request.SET_VRING_KICK: _rule(Session._set_vring_kick, wire.U64, fds=_MAYBE_FD),
    Request.SET_VRING_CALL: _rule(Session._set_vring_call, wire.U64, fds=_MAYBE_FD),
    Request.SET_VRING_ERR: _rule(Session._set_vring_err, wire.U64, fds=_MAYBE_FD),
    Request.SET_VRING_ENABLE: _rule(Session._set_vring_enable, wire.VRING_STATE),
    Request.GET_CONFIG: _rule(Session._get_config, wire.CONFIG, most=_MOST),
    Request.SET_CONFIG: _rule(Session._set_config, wire.CONFIG, most=_MOST),
    Request.GET_INFLIGHT_FD: _rule(
        Session._get_inflight_fd, wire.INFLIGHT, most=wire.INFLIGHT_PADDED.size
    ),
    Request.SET_INFLIGHT_FD: _rule(
        Session._set_inflight_fd, wire.INFLIGHT, most=wire.INFLIGHT_PADDED.size, fds=_ONE_FD
    ),
}


def _region(numbers: Sequence[int], fd: int) -> core.Region:
    guest_addr, size, user_addr, mmap_offset = numbers
    return core.Region(guest_addr, size, user_addr, mmap_offset, fd)
