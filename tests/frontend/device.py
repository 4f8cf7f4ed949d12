"""A vhost-user front end: one connection, its guest memory and its virtqueues.

`FrontEnd` does what QEMU does, in QEMU's order, as separate steps that tests can leave out,
repeat or reorder. It is device-independent; blk.py adds the block requests.

It owns the memory it made itself (not one passed in), the queues, the in-flight descriptor and
the dirty log, until `close()`. `hang_up()` only closes the connection, as the death of a front
end's socket does; `reconnect()` goes on with the same memory, queues and in-flight region, as
QEMU does with `reconnect=`.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from .memory import PAGE, GuestMemory, Region
from .virtqueue import VirtQueue
from .wire import (
    CONFIG,
    INFLIGHT,
    LOG,
    NO_FD,
    REGIONS,
    U64,
    VRING_ADDR,
    VRING_STATE,
    BadReply,
    Channel,
    Feature,
    FrontEndError,
    Message,
    Protocol,
    Request,
)

VRING_F_LOG = 1

WANTED_FEATURES = (
    Feature.VERSION_1
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.BLK_SEG_MAX
    | Feature.BLK_RO
    | Feature.BLK_BLK_SIZE
    | Feature.BLK_FLUSH
    | Feature.BLK_TOPOLOGY
    | Feature.BLK_MQ
    | Feature.BLK_DISCARD
    | Feature.BLK_WRITE_ZEROES
)
"""What a Linux guest acknowledges, when it is offered."""

WANTED_PROTOCOL = (
    Protocol.MQ
    | Protocol.LOG_SHMFD
    | Protocol.REPLY_ACK
    | Protocol.CONFIG
    | Protocol.INFLIGHT_SHMFD
    | Protocol.RESET_DEVICE
    | Protocol.CONFIGURE_MEM_SLOTS
)


@dataclass(frozen=True)
class InflightDesc:
    """State of one head descriptor in the in-flight region."""

    inflight: int
    following: int
    counter: int


@dataclass(frozen=True)
class InflightQueue:
    """One queue's region, as "Inflight I/O tracking" in vhost-user.rst lays it out."""

    features: int
    version: int
    desc_num: int
    last_batch_head: int
    used_idx: int
    desc: list[InflightDesc]

    def heads(self) -> list[int]:
        """Heads that are in flight, in the order in which they were fetched."""
        marked = [head for head, state in enumerate(self.desc) if state.inflight]
        return sorted(marked, key=lambda head: self.desc[head].counter)


class Inflight:
    """The shared region in which the back end notes requests in flight. Owns its descriptor."""

    HEADER = struct.Struct("<QHHHH")
    DESC = struct.Struct("<B5xHQ")

    def __init__(self, fd: int, size: int, offset: int, queues: int, queue_size: int) -> None:
        self.fd = fd
        self.size = size
        self.offset = offset
        self.queues = queues
        self.queue_size = queue_size

    def wire(self) -> bytes:
        """The payload that describes the region."""
        return INFLIGHT.pack(self.size, self.offset, self.queues, self.queue_size)

    def queue(self, index: int) -> InflightQueue:
        """Read one queue's part. Queue regions are equally long, one after the other."""
        each = self.size // self.queues
        start = self.offset + each * index
        with mmap.mmap(self.fd, self.offset + self.size) as mapping:
            features, version, desc_num, head, used = self.HEADER.unpack_from(mapping, start)
            start += self.HEADER.size
            desc = [
                InflightDesc(*self.DESC.unpack_from(mapping, start + self.DESC.size * place))
                for place in range(desc_num)
            ]
        return InflightQueue(features, version, desc_num, head, used, desc)

    def close(self) -> None:
        os.close(self.fd)


class DirtyLog:
    """A dirty bitmap over guest physical pages of 4 KiB. Owns its descriptor."""

    def __init__(self, pages: int, offset: int = 0) -> None:
        self.bytes = -(-pages // 64) * 8
        self.offset = offset
        self.fd = os.memfd_create("dirty-log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, offset + self.bytes)

    def wire(self) -> bytes:
        """The SET_LOG_BASE payload."""
        return LOG.pack(self.bytes, self.offset)

    def pages(self) -> set[int]:
        """Numbers of the pages that are marked."""
        bitmap = os.pread(self.fd, self.bytes, self.offset)
        return {
            8 * place + bit
            for place, byte in enumerate(bitmap)
            if byte
            for bit in range(8)
            if byte >> bit & 1
        }

    def clear(self) -> None:
        """Unmark all. Only while the back end is quiet."""
        os.pwrite(self.fd, bytes(self.bytes), self.offset)

    def close(self) -> None:
        os.close(self.fd)


class FrontEnd:
    """One front end. Nothing is sent before the first method is called."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        memory: GuestMemory | None = None,
        features: int = WANTED_FEATURES,
        protocol: int = WANTED_PROTOCOL,
    ) -> None:
        self.path = os.fspath(path)
        self.wanted_features = int(features)
        self.wanted_protocol = int(protocol)
        self._own_memory = memory is None
        self.memory = GuestMemory() if memory is None else memory
        self.queues: dict[int, VirtQueue] = {}
        self.inflight: Inflight | None = None
        self.log: DirtyLog | None = None
        self.log_ring = False
        self.offered = 0
        self.features = 0
        self.protocol = 0
        self.channel = Channel.connect(path)

    # ---- life ----------------------------------------------------------------------------

    def hang_up(self) -> None:
        """Close the connection; memory and queues stay."""
        self.channel.close()

    def close(self) -> None:
        """Hang up and free everything. May be called twice."""
        self.hang_up()
        for queue in self.queues.values():
            queue.close()
        self.queues.clear()
        if self.inflight is not None:
            self.inflight.close()
            self.inflight = None
        if self.log is not None:
            self.log.close()
            self.log = None
        if self._own_memory:
            self.memory.close()

    def reconnect(self) -> None:
        """Connect again and go on with the same memory, queues and in-flight region.

        Each ring goes on at its used index: what was in flight is known from the in-flight
        region, and without one the back end does it again.
        """
        self.hang_up()
        self.channel = Channel.connect(self.path)
        self.negotiate()
        self.acknowledge()
        if self.log is not None:
            self.set_log()
        if self.inflight is not None:
            self.set_inflight()
        self.share_memory()
        for queue in self.queues.values():
            self.start_queue(queue, base=queue.used_idx)

    # ---- messages ------------------------------------------------------------------------

    def command(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A message without a reply; waits for the acknowledgement when there are such."""
        acked = bool(self.protocol & Protocol.REPLY_ACK)
        self.channel.command(request, payload, fds, acked=acked)

    def settle(self) -> None:
        """Return once the back end has read all that was sent before."""
        self.channel.ask_u64(Request.GET_FEATURES)

    def negotiate(self) -> None:
        """Features and protocol features, as far as both sides want them; then SET_OWNER."""
        self.offered = self.channel.ask_u64(Request.GET_FEATURES)
        if self.wanted_protocol and self.offered & Feature.PROTOCOL_FEATURES:
            offered = self.channel.ask_u64(Request.GET_PROTOCOL_FEATURES)
            chosen = offered & self.wanted_protocol
            self.channel.send(Request.SET_PROTOCOL_FEATURES, U64.pack(chosen))
            self.protocol = chosen
        self.command(Request.SET_OWNER)

    def acknowledge(self, extra: int = 0) -> None:
        """SET_FEATURES with what is offered and wanted, plus `extra` as it is."""
        chosen = self.offered & self.wanted_features
        if self.protocol:
            chosen |= Feature.PROTOCOL_FEATURES
        if self.log is not None:
            chosen |= Feature.LOG_ALL
        self.features = chosen | extra
        self.command(Request.SET_FEATURES, U64.pack(self.features))

    def get_config(self, offset: int, size: int) -> Message:
        """GET_CONFIG; the reply's payload is 12 bytes of header and the contents."""
        payload = CONFIG.pack(offset, size, 0) + bytes(size)
        return self.channel.ask(Request.GET_CONFIG, payload)

    def queue_count(self) -> int:
        """How many queues the back end has."""
        return self.channel.ask_u64(Request.GET_QUEUE_NUM)

    # ---- memory --------------------------------------------------------------------------

    def share_memory(self, regions: Sequence[Region] | None = None) -> None:
        """SET_MEM_TABLE with all regions of the guest, or with those given."""
        shown = self.memory.regions if regions is None else regions
        payload = REGIONS.pack(len(shown), 0) + b"".join(region.wire() for region in shown)
        self.command(Request.SET_MEM_TABLE, payload, [region.fd for region in shown])

    def add_region(self, region: Region) -> None:
        """ADD_MEM_REG."""
        self.command(Request.ADD_MEM_REG, U64.pack(0) + region.wire(), [region.fd])

    def remove_region(self, region: Region) -> None:
        """REM_MEM_REG."""
        self.command(Request.REM_MEM_REG, U64.pack(0) + region.wire())

    # ---- log and in-flight region --------------------------------------------------------

    def set_log(self) -> None:
        """SET_LOG_BASE with the log in `self.log`. Its reply has no defined payload."""
        assert self.log is not None
        self.channel.ask(Request.SET_LOG_BASE, self.log.wire(), [self.log.fd])

    def start_log(self, log: DirtyLog, *, ring: bool = True) -> None:
        """Turn dirty logging on while the rings run, in QEMU's order."""
        self.log = log
        self.log_ring = ring
        self.set_log()
        self.acknowledge()
        for queue in self.queues.values():
            self.set_addresses(queue)

    def stop_log(self) -> None:
        """Turn dirty logging off. The log's descriptor stays open in `self.log` no more."""
        log, self.log, self.log_ring = self.log, None, False
        self.acknowledge()
        for queue in self.queues.values():
            self.set_addresses(queue)
        if log is not None:
            log.close()

    def get_inflight(self, queues: int, queue_size: int) -> Inflight:
        """GET_INFLIGHT_FD: a fresh region from the back end, kept in `self.inflight`."""
        reply = self.channel.ask(Request.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, queue_size))
        if len(reply.payload) != INFLIGHT.size or len(reply.fds) != 1:
            reply.close_fds()
            raise BadReply(
                f"GET_INFLIGHT_FD: {len(reply.payload)} bytes and {len(reply.fds)} descriptors"
            )
        size, offset, count, each = INFLIGHT.unpack(reply.payload)
        if self.inflight is not None:
            self.inflight.close()
        self.inflight = Inflight(reply.fds[0], size, offset, count, each)
        return self.inflight

    def set_inflight(self) -> None:
        """SET_INFLIGHT_FD with `self.inflight`."""
        assert self.inflight is not None
        self.command(Request.SET_INFLIGHT_FD, self.inflight.wire(), [self.inflight.fd])

    # ---- queues --------------------------------------------------------------------------

    def make_queue(self, index: int, size: int, *, region: int = 0, base: int = 0) -> VirtQueue:
        """Lay out a queue in guest memory; the back end does not know of it yet."""
        if index in self.queues:
            raise FrontEndError(f"queue {index} exists already")
        event_idx = bool(self.features & Feature.EVENT_IDX)
        queue = VirtQueue(self.memory, index, size, event_idx=event_idx, region=region, base=base)
        self.queues[index] = queue
        return queue

    def set_size(self, index: int, size: int) -> None:
        self.command(Request.SET_VRING_NUM, VRING_STATE.pack(index, size))

    def set_base(self, index: int, base: int) -> None:
        self.command(Request.SET_VRING_BASE, VRING_STATE.pack(index, base))

    def set_addresses(self, queue: VirtQueue) -> None:
        """SET_VRING_ADDR, with the used ring's logging as `log_ring` says."""
        user = self.memory.user
        flags = VRING_F_LOG if self.log_ring else 0
        self.set_raw_addresses(
            queue.index, user(queue.desc), user(queue.avail), user(queue.used), flags, queue.used
        )

    def set_raw_addresses(
        self, index: int, desc: int, avail: int, used: int, flags: int = 0, log: int = 0
    ) -> None:
        """SET_VRING_ADDR with user addresses as given and a guest address for the log."""
        payload = VRING_ADDR.pack(index, flags, desc, used, avail, log)
        self.command(Request.SET_VRING_ADDR, payload)

    def set_kick(self, index: int, fd: int | None) -> None:
        self._set_fd(Request.SET_VRING_KICK, index, fd)

    def set_call(self, index: int, fd: int | None) -> None:
        self._set_fd(Request.SET_VRING_CALL, index, fd)

    def set_err(self, index: int, fd: int | None) -> None:
        self._set_fd(Request.SET_VRING_ERR, index, fd)

    def _set_fd(self, request: Request, index: int, fd: int | None) -> None:
        if fd is None:
            self.command(request, U64.pack(index | NO_FD))
        else:
            self.command(request, U64.pack(index), [fd])

    def enable(self, index: int, value: int = 1) -> None:
        """SET_VRING_ENABLE, legal only with protocol features."""
        self.command(Request.SET_VRING_ENABLE, VRING_STATE.pack(index, value))

    def start_queue(self, queue: VirtQueue, base: int = 0) -> None:
        """Hand a queue to the back end. The kick comes last but one: it starts the ring."""
        self.set_size(queue.index, queue.size)
        self.set_base(queue.index, base)
        self.set_addresses(queue)
        self.set_err(queue.index, queue.err_fd)
        self.set_call(queue.index, queue.call_fd)
        self.set_kick(queue.index, queue.kick_fd)
        if self.features & Feature.PROTOCOL_FEATURES:
            self.enable(queue.index)

    def stop_queue(self, index: int) -> int:
        """GET_VRING_BASE: stops the ring, returns the next available index."""
        reply = self.channel.ask(Request.GET_VRING_BASE, VRING_STATE.pack(index, 0))
        if len(reply.payload) != VRING_STATE.size:
            raise BadReply(f"GET_VRING_BASE: {len(reply.payload)} bytes")
        answered, base = VRING_STATE.unpack(reply.payload)
        if answered != index:
            raise BadReply(f"GET_VRING_BASE of queue {index} was answered for {answered}")
        return int(base)

    def reset(self) -> None:
        """RESET_DEVICE: the back end forgets rings and their state."""
        self.command(Request.RESET_DEVICE)


def highest_page(memory: GuestMemory) -> int:
    """Number of guest pages that a log must cover, holes included."""
    return max(region.end for region in memory.regions) // PAGE
