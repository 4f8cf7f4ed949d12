"""vhost-user and virtio-blk on the wire: numbers, layouts, config space. No behaviour.

Sources: QEMU's docs/interop/vhost-user.rst (messages; native byte order), and the virtio
specification 1.2, sections 5.2 (block device; little-endian) and 6 (feature bits).
"""

import os
import struct
from dataclasses import dataclass, field
from enum import IntEnum

from . import core

HEADER = struct.Struct("=III")  # request, flags, payload bytes
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")  # index, num
VRING_ADDR = struct.Struct("=IIQQQQ")  # index, flags, descriptor, used, available, log
MEM_TABLE = struct.Struct("=II")  # regions, padding
MEM_REGION = struct.Struct("=QQQQ")  # guest address, size, user address, mmap offset
MEM_REGION_SINGLE = struct.Struct("=QQQQQ")  # padding, then as above
LOG_BASE = struct.Struct("=QQ")  # size, offset
CONFIG = struct.Struct("=III")  # offset, size, flags; payload follows
INFLIGHT = struct.Struct("=QQHH")  # size, offset, queues, queue size
INFLIGHT_PADDED = struct.Struct("=QQHH4x")  # what a compiler makes of it unpacked

VERSION = 1
FLAG_VERSION_MASK = 3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3

PAYLOAD_BYTES_MAX = 8192  # the longest legal one is a memory table
FDS_MAX = 253  # SCM_MAX_FD: the kernel passes no more in one message
VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 1 << 8


class Request(IntEnum):
    """Front-end message types that have a name here; others are answered as unknown."""

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
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


class Feature(IntEnum):
    """Virtio and vhost feature bits that we offer."""

    BLK_SEG_MAX = 2
    BLK_RO = 5
    BLK_BLK_SIZE = 6
    BLK_FLUSH = 9
    BLK_TOPOLOGY = 10
    BLK_MQ = 12
    BLK_DISCARD = 13
    BLK_WRITE_ZEROES = 14
    LOG_ALL = 26
    RING_INDIRECT_DESC = 28
    RING_EVENT_IDX = 29
    PROTOCOL_FEATURES = 30
    VERSION_1 = 32


class ProtocolFeature(IntEnum):
    """vhost-user protocol feature bits that we offer."""

    MQ = 0
    LOG_SHMFD = 1
    REPLY_ACK = 3
    CONFIG = 9
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    CONFIGURE_MEM_SLOTS = 15


PROTOCOL_FEATURES = sum(1 << bit for bit in ProtocolFeature)

_WRITING = (Feature.BLK_DISCARD, Feature.BLK_WRITE_ZEROES)


def device_features(read_only: bool) -> int:
    """The feature bits offered for a disk."""
    without = _WRITING if read_only else (Feature.BLK_RO,)
    return sum(1 << bit for bit in Feature if bit not in without)


def feature_names(kind: type[Feature] | type[ProtocolFeature], bits: int) -> str:
    """Names of set bits for a log line; unknown ones by number."""
    known = {int(bit): bit.name for bit in kind}
    return " ".join(known.get(bit, f"bit{bit}") for bit in range(64) if bits >> bit & 1) or "none"


# struct virtio_blk_config up to write_zeroes_may_unmap and its padding.
_BLK_CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
_PAGE_BYTES = 4096
_SECTOR_BYTES = 512
_SEGMENT_BYTES_MAX = 1 << 20


def blk_config(size_bytes: int, logical_block_bytes: int, read_only: bool) -> bytes:
    """The device's configuration space for an image of that size."""
    blocks_a_page = _PAGE_BYTES // logical_block_bytes
    discard = 0 if read_only else core.DISCARD_SECTORS_MAX
    return _BLK_CONFIG.pack(
        size_bytes // _SECTOR_BYTES,  # capacity
        # SIZE_MAX is not offered; some drivers read the field all the same, so never 0.
        _SEGMENT_BYTES_MAX,
        core.SEG_MAX,
        0, 0, 0,  # geometry: not offered
        logical_block_bytes,
        blocks_a_page.bit_length() - 1,  # a 4 KiB block is written whole without merging
        0,  # alignment_offset
        blocks_a_page,  # min_io_size
        0,  # opt_io_size
        0,  # writeback: CONFIG_WCE is not offered
        core.QUEUES_MAX,
        discard, 0 if read_only else 1,  # max_discard_sectors, max_discard_seg
        _PAGE_BYTES // _SECTOR_BYTES,  # discard_sector_alignment
        discard, 0 if read_only else 1,  # the same for write zeroes
        0 if read_only else 1,  # write_zeroes_may_unmap
    )


@dataclass
class Message:
    """A message as received; owns its descriptors until take_fd() or close()."""

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The request in words, for errors."""
        try:
            return Request(self.request).name
        except ValueError:
            return f"request {self.request}"

    def take_fd(self) -> int:
        """Hand the first descriptor to the caller."""
        return self.fds.pop(0)

    def close(self) -> None:
        """Close what nobody took."""
        while self.fds:
            os.close(self.fds.pop())


@dataclass(frozen=True)
class Reply:
    """The answer to a message; `fd` is only lent."""

    payload: bytes
    fd: int = -1


def pack_reply(request: int, payload: bytes) -> bytes:
    """A complete reply message."""
    return HEADER.pack(request, VERSION | FLAG_REPLY, len(payload)) + payload
