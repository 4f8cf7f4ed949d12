"""Requests of no sectors at all: legal, done at once, and nothing is stored for them."""

from __future__ import annotations

import pytest
from conftest import Attach
from frontend import Status, Type
from frontend.blk import SEGMENT
from harness import Daemon

KINDS = [
    pytest.param(Type.OUT, id="write"),
    pytest.param(Type.DISCARD, id="discard"),
    pytest.param(Type.WRITE_ZEROES, id="zeroes"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sector", [0, 1, 7])
def test_no_sectors(agent: Daemon, attach: Attach, kind: int, sector: int) -> None:
    """Not even where the sector is not the first of a block: a frame of no sectors would end
    the next start, which takes it for damage."""
    disk = attach(agent)
    payload = b"" if kind == Type.OUT else SEGMENT.pack(sector, 0, 0)
    place = sector if kind == Type.OUT else 0
    assert disk.request(kind, place, payload).status == Status.OK
    disk.write(16, b"\x55" * 512)
    assert disk.request(kind, place, payload).status == Status.OK
    agent.restart("kill")
    disk.reconnect()
    assert disk.read(16, 1) == b"\x55" * 512
