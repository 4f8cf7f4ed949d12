"""virtio-blk requests on a front end, in any descriptor layout.

Source: virtio 1.2, "Block Device" (5.2). A request is a string of readable bytes (16 bytes of
header, then the data to write) and a string of writable bytes (room for the data that is read,
then the status byte). A `Layout` says how both are cut into descriptors and where these lie.

A `Request` owns its guest memory until it is done. Writable memory is filled with a pattern
before, so that bytes which the device did not write are seen as such.
"""

from __future__ import annotations

import enum
import itertools
import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .device import WANTED_FEATURES, WANTED_PROTOCOL, FrontEnd
from .memory import GuestMemory
from .virtqueue import Buffer, Used, VirtQueue
from .wire import CONFIG, DEADLINE_S, FrontEndError

SECTOR = 512
HEADER = struct.Struct("<IIQ")  # type, reserved, sector
SEGMENT = struct.Struct("<QII")  # sector, sectors, flags
UNTOUCHED = 0xA5
"""What writable memory holds before the device writes to it."""


class Type(enum.IntEnum):
    """VIRTIO_BLK_T_*"""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class Status(enum.IntEnum):
    """VIRTIO_BLK_S_*, and what the status byte holds when the device never wrote it."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    UNTOUCHED = UNTOUCHED


UNMAP = 1
"""The one flag of a WRITE_ZEROES segment."""


@dataclass(frozen=True)
class Layout:
    """How a request lies in memory.

    `out` and `into` are the sizes of the descriptors for the readable and the writable bytes;
    what they do not cover goes into one more, and None means the usual cut (header and data
    apart, data and status apart). `indirect` is None for the queue's own descriptors only, or
    the number of these before the one that points to an indirect table. `regions` are used in
    turn, one a descriptor. `skew` moves buffers off their alignment by that many bytes.
    """

    out: Sequence[int] | None = None
    into: Sequence[int] | None = None
    indirect: int | None = None
    regions: Sequence[int] = (0,)
    skew: int = 0


PLAIN = Layout()
INDIRECT = Layout(indirect=0)


def _cut(total: int, sizes: Sequence[int]) -> list[int]:
    pieces = []
    for size in sizes:
        if total <= 0:
            break
        pieces.append(min(size, total))
        total -= size
    if total > 0:
        pieces.append(total)
    return pieces


@dataclass
class BlkRequest:
    """One request on its way or done."""

    queue: VirtQueue
    head: int
    out: list[Buffer]
    into: list[Buffer]
    owned: list[int] = field(default_factory=list)  # guest memory to free when done
    written: int | None = None
    status: Status = Status.UNTOUCHED
    data: bytes = b""

    @property
    def done(self) -> bool:
        return self.written is not None

    def finish(self, written: int) -> None:
        """Take the result out of guest memory and free it."""
        memory = self.queue.memory
        answer = b"".join(memory.read(buffer.addr, buffer.size) for buffer in self.into)
        self.data = answer[:-1]
        try:
            self.status = Status(answer[-1])
        except ValueError as error:
            raise FrontEndError(f"the status byte holds {answer[-1]:#x}") from error
        self.written = written
        while self.owned:
            memory.free(self.owned.pop())


class RequestFailed(FrontEndError):
    """A request that should have worked ended with another status."""


@dataclass(frozen=True)
class BlkConfig:
    """virtio_blk_config as far as it is used here; sizes in the units of the specification."""

    capacity: int
    size_max: int
    seg_max: int
    blk_size: int
    physical_block_exp: int
    alignment_offset: int
    min_io_size: int
    opt_io_size: int
    writeback: int
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: int

    LAYOUT = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
    SIZE = 60

    @classmethod
    def parse(cls, raw: bytes) -> BlkConfig:
        """From the first 60 bytes of the configuration space."""
        fields = cls.LAYOUT.unpack(raw[: cls.SIZE])
        # 3, 4, 5: geometry (cylinders, heads, sectors), not offered.
        return cls(*fields[:3], *fields[6:])


class Disk(FrontEnd):
    """A front end with block requests. Synchronous calls use queue 0 unless told otherwise."""

    layout: Layout = PLAIN
    """Used where a call gives none."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        memory: GuestMemory | None = None,
        features: int = WANTED_FEATURES,
        protocol: int = WANTED_PROTOCOL,
    ) -> None:
        super().__init__(path, memory=memory, features=features, protocol=protocol)
        self.requests: dict[tuple[int, int], BlkRequest] = {}

    def start(self, queues: int = 1, queue_size: int = 128, *, inflight: bool = False) -> Disk:
        """Negotiate and start `queues` queues, as QEMU does when the guest's driver is ready."""
        self.negotiate()
        self.acknowledge()
        if inflight:
            self.get_inflight(queues, queue_size)
            self.set_inflight()
        self.share_memory()
        for index in range(queues):
            self.start_queue(self.make_queue(index, queue_size))
        return self

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def config(self) -> BlkConfig:
        """The configuration space, parsed."""
        reply = self.get_config(0, BlkConfig.SIZE)
        return BlkConfig.parse(reply.payload[CONFIG.size :])

    # ---- asynchronous --------------------------------------------------------------------

    def submit(
        self,
        kind: int,
        sector: int = 0,
        payload: bytes = b"",
        room: int = 0,
        *,
        layout: Layout | None = None,
        queue: int = 0,
        publish: bool = True,
        kick: bool = True,
        reserved: int = 0,
    ) -> BlkRequest:
        """Send a request: `payload` follows the header, `room` bytes precede the status."""
        layout = self.layout if layout is None else layout
        out_sizes = _cut(16 + len(payload), (16,) if layout.out is None else layout.out)
        into_sizes = _cut(room + 1, (room,) if layout.into is None else layout.into)
        regions = itertools.cycle(layout.regions)
        readable = HEADER.pack(kind, reserved, sector) + payload
        out, owned = self._buffers([n for n in out_sizes if n], regions, False, layout.skew)
        into, more = self._buffers([n for n in into_sizes if n], regions, True, layout.skew)
        for buffer in out:
            self.memory.write(buffer.addr, readable[: buffer.size])
            readable = readable[buffer.size :]
        for buffer in into:
            self.memory.write(buffer.addr, bytes([UNTOUCHED]) * buffer.size)
        request = self.submit_buffers(
            out, into, indirect=layout.indirect, queue=queue, publish=publish, kick=kick
        )
        request.owned = owned + more
        return request

    def submit_buffers(
        self,
        out: list[Buffer],
        into: list[Buffer],
        *,
        indirect: int | None = None,
        queue: int = 0,
        publish: bool = True,
        kick: bool = True,
    ) -> BlkRequest:
        """Send a request whose bytes lie in guest memory already; that stays the caller's."""
        ring = self.queues[queue]
        head = ring.add([*out, *into], indirect=indirect)
        request = BlkRequest(ring, head, out, into)
        self.requests[queue, head] = request
        if publish:
            ring.publish(kick=kick)
        return request

    def _buffers(
        self, sizes: Iterable[int], regions: Iterator[int], writable: bool, skew: int
    ) -> tuple[list[Buffer], list[int]]:
        buffers = []
        owned = []
        for size in sizes:
            addr = self.memory.alloc(size + skew, SECTOR if size >= SECTOR else 1, next(regions))
            owned.append(addr)
            buffers.append(Buffer(addr + skew, size, writable))
        return buffers, owned

    def reap(self, queue: int = 0) -> list[BlkRequest]:
        """Finish what the used ring shows now, without waiting."""
        return self._finish(queue, self.queues[queue].reap())

    def _finish(self, queue: int, used: Iterable[Used]) -> list[BlkRequest]:
        done = []
        for element in used:
            request = self.requests.pop((queue, element.head))
            request.finish(element.written)
            done.append(request)
        return done

    def wait_any(self, queue: int = 0, deadline_s: float = DEADLINE_S) -> list[BlkRequest]:
        """Wait until at least one request of a queue is done."""
        used = self.queues[queue].wait_used(deadline_s, connection=self.channel.sock)
        return self._finish(queue, used)

    def wait(self, *requests: BlkRequest, deadline_s: float = DEADLINE_S) -> None:
        """Wait until all of these are done; others may get done too."""
        deadline = time.monotonic() + deadline_s
        for request in requests:
            while not request.done:
                self.wait_any(request.queue.index, max(deadline - time.monotonic(), 0.001))

    # ---- synchronous ---------------------------------------------------------------------

    def request(
        self,
        kind: int,
        sector: int = 0,
        payload: bytes = b"",
        room: int = 0,
        *,
        layout: Layout | None = None,
        queue: int = 0,
    ) -> BlkRequest:
        """Send one request and wait for it, whatever its status."""
        request = self.submit(kind, sector, payload, room, layout=layout, queue=queue)
        self.wait(request)
        return request

    def _expect_ok(self, what: str, request: BlkRequest) -> BlkRequest:
        if request.status != Status.OK:
            raise RequestFailed(f"{what} ended with {request.status.name}")
        return request

    def read(
        self, sector: int, sectors: int, *, layout: Layout | None = None, queue: int = 0
    ) -> bytes:
        """Read sectors; raises `RequestFailed` on any other status than OK."""
        request = self.request(Type.IN, sector, room=SECTOR * sectors, layout=layout, queue=queue)
        return self._expect_ok(f"read of {sectors} sectors at {sector}", request).data

    def write(
        self, sector: int, data: bytes, *, layout: Layout | None = None, queue: int = 0
    ) -> None:
        """Write whole sectors."""
        request = self.request(Type.OUT, sector, data, layout=layout, queue=queue)
        self._expect_ok(f"write of {len(data)} bytes at sector {sector}", request)

    def flush(self, *, queue: int = 0) -> None:
        self._expect_ok("flush", self.request(Type.FLUSH, queue=queue))

    def discard(self, sector: int, sectors: int, *, queue: int = 0) -> None:
        segment = SEGMENT.pack(sector, sectors, 0)
        request = self.request(Type.DISCARD, payload=segment, queue=queue)
        self._expect_ok(f"discard of {sectors} sectors at {sector}", request)

    def write_zeroes(
        self, sector: int, sectors: int, *, unmap: bool = False, queue: int = 0
    ) -> None:
        segment = SEGMENT.pack(sector, sectors, UNMAP if unmap else 0)
        request = self.request(Type.WRITE_ZEROES, payload=segment, queue=queue)
        self._expect_ok(f"write-zeroes of {sectors} sectors at {sector}", request)

    def get_id(self) -> bytes:
        """The serial, 20 bytes with their padding."""
        return self._expect_ok("get-id", self.request(Type.GET_ID, room=20)).data
