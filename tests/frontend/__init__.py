"""A vhost-user-blk front end over shared memory, for tests and fuzzers.

    from frontend import Disk
    with Disk("v.sock").start(queues=2) as disk:
        disk.write(0, bytes(4096))
        assert disk.read(0, 8) == bytes(4096)

The parts: `wire` (messages), `memory` (guest memory), `virtqueue` (split rings), `device` (one
connection), `blk` (requests). It needs Python 3.11 and nothing else, and works against any
vhost-user-blk back end.
"""

from .blk import (
    INDIRECT,
    PLAIN,
    SECTOR,
    SEGMENT,
    UNMAP,
    UNTOUCHED,
    BlkConfig,
    BlkRequest,
    Disk,
    Layout,
    RequestFailed,
    Status,
    Type,
)
from .device import (
    VRING_F_LOG,
    WANTED_FEATURES,
    WANTED_PROTOCOL,
    DirtyLog,
    FrontEnd,
    Inflight,
    InflightQueue,
    highest_page,
)
from .memory import DEFAULT_REGIONS, MIB, PAGE, GuestMemory, Region, RegionSpec
from .virtqueue import (
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    BadUsed,
    Buffer,
    MissedCall,
    Used,
    VirtQueue,
)
from .wire import (
    DEADLINE_S,
    NEED_REPLY,
    NO_FD,
    VERSION,
    BadReply,
    Channel,
    Feature,
    FrontEndError,
    HungUp,
    Late,
    Message,
    Protocol,
    Refused,
    Request,
)

__all__ = [
    "DEADLINE_S",
    "DEFAULT_REGIONS",
    "DESC",
    "DESC_F_INDIRECT",
    "DESC_F_NEXT",
    "DESC_F_WRITE",
    "INDIRECT",
    "MIB",
    "NEED_REPLY",
    "NO_FD",
    "PAGE",
    "PLAIN",
    "SECTOR",
    "SEGMENT",
    "UNMAP",
    "UNTOUCHED",
    "VERSION",
    "VRING_F_LOG",
    "WANTED_FEATURES",
    "WANTED_PROTOCOL",
    "BadReply",
    "BadUsed",
    "BlkConfig",
    "BlkRequest",
    "Buffer",
    "Channel",
    "DirtyLog",
    "Disk",
    "Feature",
    "FrontEnd",
    "FrontEndError",
    "GuestMemory",
    "HungUp",
    "Inflight",
    "InflightQueue",
    "Late",
    "Layout",
    "Message",
    "MissedCall",
    "Protocol",
    "Refused",
    "Region",
    "RegionSpec",
    "Request",
    "RequestFailed",
    "Status",
    "Type",
    "Used",
    "VirtQueue",
    "highest_page",
]
