"""Requests as large as they come: a chain may name one page of memory many times."""

from __future__ import annotations

import pytest
from conftest import Attach, StartDaemon
from frontend import Status, Type
from frontend.blk import HEADER
from frontend.virtqueue import Buffer
from harness import DiskSpec

PIECE = 1 << 20
MOST = 64 << 20


@pytest.mark.parametrize(
    ("pieces", "status"),
    [(MOST // PIECE, Status.OK), (MOST // PIECE + 1, Status.IOERR), (900, Status.IOERR)],
)
def test_a_read_has_a_largest_size(
    epochd: StartDaemon, attach: Attach, pieces: int, status: int
) -> None:
    """Beyond it there is an error, not work without end for the reactor."""
    disk = attach(epochd(DiskSpec(size=4 << 30), arena="16M"))
    disk.write(0, b"\x5a" * 4096)
    header, answer = disk.memory.alloc(16, 16), disk.memory.alloc(1)
    data = disk.memory.alloc(PIECE, 4096)
    disk.memory.write(header, HEADER.pack(Type.IN, 0, 0))
    into = [Buffer(data, PIECE, True)] * pieces + [Buffer(answer, 1, True)]
    request = disk.submit_buffers([Buffer(header, 16, False)], into, indirect=0)
    disk.wait(request)
    assert request.status == status
    assert disk.read(0, 8) == b"\x5a" * 4096
