"""The driver's side of a split virtqueue, in guest memory.

Source: virtio 1.2, "Split Virtqueues" (2.7). A `VirtQueue` belongs to one thread; the back end
works on the same memory at the same time. It owns its ring memory, its kick, call and err
eventfds, and the descriptors it hands out, until `close()`.

Two levels. `add`, `publish`, `kick`, `reap` and `wait` are an honest driver. `write_desc`,
`set_avail_entry`, `set_avail_idx` and `write_table` write what they are given, to build
hostile rings; a queue that was misused like that must not be used honestly again.

Ordering: Python stores the 16-bit index fields with single aligned stores, and `_barrier()` is
a locked instruction on x86-64, where stores are not reordered with each other. On other
machines the interpreter's own locking is what orders the stores.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .memory import GuestMemory
from .wire import DEADLINE_S, FrontEndError, HungUp, Late

DESC = struct.Struct("<QIHH")  # address, length, flags, next
USED_ELEM = struct.Struct("<II")  # head, length written
DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

_fence = threading.Lock()


def gone(connection: socket.socket) -> bool:
    """True when the peer of a stream socket has hung up."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def _barrier() -> None:
    with _fence:
        pass


class MissedCall(FrontEndError):
    """Buffers were used, the driver had asked to be told, and no call came."""


class BadUsed(FrontEndError):
    """The used ring names a chain that is not in flight, or jumped."""


@dataclass(frozen=True)
class Buffer:
    """One descriptor's worth of guest memory."""

    addr: int
    size: int
    writable: bool


@dataclass(frozen=True)
class Used:
    """One used element: head descriptor and the bytes that the device says it wrote."""

    head: int
    written: int


@dataclass
class _Chain:
    descs: list[int]
    table: int | None  # guest address of the indirect table


class VirtQueue:
    """One queue. `size` is a power of two; `base` is the index it starts from."""

    def __init__(
        self,
        memory: GuestMemory,
        index: int,
        size: int,
        *,
        event_idx: bool = True,
        region: int = 0,
        base: int = 0,
    ) -> None:
        self.memory = memory
        self.index = index
        self.size = size
        self.event_idx = event_idx
        self.region = region
        self.desc_bytes = DESC.size * size
        self.avail_bytes = 6 + 2 * size
        self.used_bytes = 6 + 8 * size
        self.desc = memory.alloc(self.desc_bytes, 4096, region)
        self.avail = memory.alloc(self.avail_bytes, 2, region)
        # A page of its own, so that a dirty log shows used-ring writes alone.
        self.used = memory.alloc(-(-self.used_bytes // 4096) * 4096, 4096, region)
        self._desc = memory.view(self.desc, self.desc_bytes)
        self._avail = memory.view(self.avail, self.avail_bytes).cast("H")
        self._used = memory.view(self.used, self.used_bytes)
        self._used16 = self._used.cast("H")
        self._desc[:] = bytes(self.desc_bytes)
        for view in (self._avail, self._used16):
            for place in range(len(view)):
                view[place] = 0
        self._avail[1] = base & 0xFFFF
        self._used16[1] = base & 0xFFFF
        self.avail_next = base & 0xFFFF  # what avail.idx will be once published
        self.used_seen = base & 0xFFFF
        self.free = list(range(size - 1, -1, -1))
        self.chains: dict[int, _Chain] = {}
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.polling = False  # True: completions are found by looking, not by the call
        if event_idx:
            self.used_event = base & 0xFFFF

    def close(self) -> None:
        """Free ring memory and descriptors. The back end must have let go of them."""
        for view in (self._used16, self._used, self._avail, self._desc):
            view.release()
        for addr in (self.desc, self.avail, self.used):
            self.memory.free(addr)
        for chain in self.chains.values():
            if chain.table is not None:
                self.memory.free(chain.table)
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    # ---- fields of the rings -------------------------------------------------------------

    @property
    def avail_flags(self) -> int:
        return self._avail[0]

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._avail[0] = value

    @property
    def avail_idx(self) -> int:
        return self._avail[1]

    @property
    def used_event(self) -> int:
        """The driver's wish: call when used.idx moves past this."""
        return self._avail[2 + self.size]

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._avail[2 + self.size] = value & 0xFFFF

    @property
    def used_flags(self) -> int:
        return self._used16[0]

    @property
    def used_idx(self) -> int:
        return self._used16[1]

    @property
    def avail_event(self) -> int:
        """The device's wish: kick when avail.idx moves past this."""
        return self._used16[2 + 4 * self.size]

    def used_elem(self, index: int) -> Used:
        """Element of the used ring at a free-running index."""
        return Used(*USED_ELEM.unpack_from(self._used, 4 + 8 * (index % self.size)))

    # ---- raw writes ----------------------------------------------------------------------

    def write_desc(self, place: int, addr: int, size: int, flags: int, following: int = 0) -> None:
        """Write one descriptor of the table as given."""
        DESC.pack_into(self._desc, DESC.size * place, addr, size, flags, following)

    def write_table(self, addr: int, descs: Sequence[tuple[int, int, int, int]]) -> None:
        """Write (address, length, flags, next) descriptors at a guest address."""
        self.memory.write(addr, b"".join(DESC.pack(*desc) for desc in descs))

    def set_avail_entry(self, index: int, head: int) -> None:
        """Write one entry of the available ring at a free-running index."""
        self._avail[2 + index % self.size] = head

    def set_avail_idx(self, value: int) -> None:
        """Publish an available index as given."""
        _barrier()
        self._avail[1] = value & 0xFFFF
        _barrier()

    def push_raw(self, head: int, *, kick: bool = True) -> None:
        """Make `head` available whatever it is, and kick."""
        self.set_avail_entry(self.avail_next, head)
        self.avail_next = (self.avail_next + 1) & 0xFFFF
        self.set_avail_idx(self.avail_next)
        if kick:
            self.force_kick()

    def force_kick(self) -> None:
        """Kick whether the device asked for it or not."""
        os.eventfd_write(self.kick_fd, 1)

    # ---- an honest driver ----------------------------------------------------------------

    def add(self, buffers: Sequence[Buffer], *, indirect: int | None = None) -> int:
        """Build a chain and put it in the available ring, unpublished; returns its head.

        `indirect` None uses only the queue's own descriptors. A number n uses n of them for the
        first n buffers and one more that points to an indirect table with the rest.
        """
        direct = len(buffers) if indirect is None else min(indirect, len(buffers) - 1)
        wanted = direct + (indirect is not None)
        if not wanted or len(self.free) < wanted:
            raise FrontEndError(f"queue {self.index}: {len(self.free)} free, {wanted} wanted")
        descs = [self.free.pop() for _ in range(wanted)]
        for place, buffer in enumerate(buffers[:direct]):
            flags = DESC_F_WRITE if buffer.writable else 0
            following = descs[place + 1] if place + 1 < wanted else 0
            flags |= DESC_F_NEXT if place + 1 < wanted else 0
            self.write_desc(descs[place], buffer.addr, buffer.size, flags, following)
        table = None
        if indirect is not None:
            table = self._indirect_table(buffers[direct:])
            size = DESC.size * (len(buffers) - direct)
            self.write_desc(descs[-1], table, size, DESC_F_INDIRECT)
        self.chains[descs[0]] = _Chain(descs, table)
        self.set_avail_entry(self.avail_next, descs[0])
        self.avail_next = (self.avail_next + 1) & 0xFFFF
        return descs[0]

    def _indirect_table(self, buffers: Sequence[Buffer]) -> int:
        table = self.memory.alloc(DESC.size * len(buffers), 16, self.region)
        rows = []
        for place, buffer in enumerate(buffers):
            last = place + 1 == len(buffers)
            flags = (DESC_F_WRITE if buffer.writable else 0) | (0 if last else DESC_F_NEXT)
            rows.append((buffer.addr, buffer.size, flags, 0 if last else place + 1))
        self.write_table(table, rows)
        return table

    def publish(self, *, kick: bool = True) -> bool:
        """Show what was added; kick if the device wants it. Returns whether it kicked."""
        old = self.avail_idx
        self.set_avail_idx(self.avail_next)
        if not kick or not self._wants_kick(old):
            return False
        self.force_kick()
        return True

    def _wants_kick(self, old: int) -> bool:
        if not self.event_idx:
            return not self.used_flags & USED_F_NO_NOTIFY
        new = self.avail_next
        return ((new - self.avail_event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)

    def reap(self) -> list[Used]:
        """Take what is new in the used ring; frees the chains' descriptors."""
        done = []
        idx = self.used_idx
        if (idx - self.used_seen) & 0xFFFF > len(self.chains):
            raise BadUsed(
                f"queue {self.index}: used.idx went from {self.used_seen} to {idx} "
                f"with {len(self.chains)} chains in flight"
            )
        while self.used_seen != idx:
            used = self.used_elem(self.used_seen)
            chain = self.chains.pop(used.head, None)
            if chain is None:
                raise BadUsed(f"queue {self.index}: head {used.head} is used but not in flight")
            if chain.table is not None:
                self.memory.free(chain.table)
            self.free.extend(reversed(chain.descs))
            self.used_seen = (self.used_seen + 1) & 0xFFFF
            done.append(used)
        return done

    def forget_calls(self) -> int:
        """Empty the call eventfd; returns how often the device called."""
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0

    def wait_used(
        self, deadline_s: float = DEADLINE_S, *, connection: socket.socket | None = None
    ) -> list[Used]:
        """Wait until something is used and take it.

        Waits on the call eventfd as an honest driver does, or looks at used.idx when `polling`
        is set. With `connection` the wait ends with `HungUp` when the back end is gone.
        """
        deadline = time.monotonic() + deadline_s
        while True:
            if self.event_idx and not self.polling:
                self.used_event = self.used_seen
                _barrier()
            done = self.reap()
            if done:
                return done
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._late(deadline_s)
            if not self._sleep(left, connection):
                done = self.reap()
                if done:
                    return done
                raise HungUp(f"the back end is gone with {len(self.chains)} requests in flight")

    def _sleep(self, left: float, connection: socket.socket | None) -> bool:
        """Sleep until there may be news; False when the connection is gone."""
        if self.polling:
            time.sleep(0.0002)
            return connection is None or not gone(connection)
        watched: list[int] = [self.call_fd]
        if connection is not None:
            watched.append(connection.fileno())
        ready = select.select(watched, [], [], left)[0]
        if not ready:
            raise self._late(left)
        self.forget_calls()
        return connection is None or not gone(connection)

    def _late(self, deadline_s: float) -> FrontEndError:
        if self.used_idx != self.used_seen:
            return MissedCall(
                f"queue {self.index}: used.idx is {self.used_idx}, seen {self.used_seen}, "
                f"and no call came within {deadline_s:g} s"
            )
        return Late(
            f"queue {self.index}: nothing was used within {deadline_s:g} s "
            f"(EPOCHD_TEST_DEADLINE); in flight: {len(self.chains)}, avail.idx "
            f"{self.avail_idx}, used.idx {self.used_idx}"
        )

    def broken(self) -> bool:
        """True when the device has signalled the err eventfd; empties it."""
        try:
            return os.eventfd_read(self.err_fd) > 0
        except BlockingIOError:
            return False
