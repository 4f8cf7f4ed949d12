"""The agent dies by SIGKILL under load, at random and at named points; nothing is lost.

EPOCHD_TEST_KILLS sets how often under a front end (default 40), EPOCHD_TEST_GUEST_KILLS how
often under a real guest (5); `tests/crash/run` is the long form.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon, running
from crash import build
from crash.campaign import Campaign
from crash.guest import GuestCampaign
from crash.points import MERGE_POINTS, POINTS, SPILL_POINTS
from frontend import INDIRECT, Disk, GuestMemory, RegionSpec, Status, Type
from harness import DiskSpec, until

KILLS = int(os.environ.get("EPOCHD_TEST_KILLS", "40"))
GUEST_KILLS = int(os.environ.get("EPOCHD_TEST_GUEST_KILLS", "5"))
SOURCES = build.ROOT / "native"


@pytest.mark.timeout(max(240, KILLS * 4))
def test_nothing_is_lost_when_the_agent_is_killed(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, seed=KILLS, command=build.command())
    running.append(campaign.daemon)
    try:
        figures = campaign.run(KILLS)
    finally:
        campaign.close()
    running.remove(campaign.daemon)
    print(*figures.lines(), sep="\n")
    assert figures.kills >= KILLS
    assert figures.reconnects >= KILLS
    assert figures.finished_later > 0
    # Half of the kills go round the points in turn; a few are not reached in their round.
    assert len(figures.at_points) > min(len(POINTS), KILLS // 2) // 2
    assert not campaign.daemon.complaints()


@pytest.mark.timeout(240 + GUEST_KILLS * 10)
def test_a_guest_sees_no_error_when_the_agent_is_killed(tmp_path: Path) -> None:
    campaign = GuestCampaign(tmp_path, seed=GUEST_KILLS)
    running.append(campaign.daemon)
    try:
        print(*campaign.run(GUEST_KILLS), sep="\n")
    finally:
        campaign.close()
    running.remove(campaign.daemon)
    assert campaign.daemon.log().count("front end connected") >= 2 * (GUEST_KILLS + 1)
    assert min(campaign.blocks) >= campaign.fio.blocks
    assert not campaign.daemon.complaints()


@pytest.mark.parametrize("point", SPILL_POINTS)
def test_nothing_is_lost_when_the_agent_dies_over_a_move_to_the_spill_file(
    epochd: StartDaemon, attach: Attach, point: str
) -> None:
    dice = random.Random(point)
    size, chunk = 16 << 20, 256 << 10
    options = ["--on-full", "spill", "--spill-size", "24M", "--compress-level", "0"]
    daemon = epochd(start=False, arena="8M", options=options, program=build.command())
    daemon.environment = {"EPOCHD_CRASH_POINT": f"{point}:{dice.randint(1, SPILL_POINTS[point])}"}
    daemon.start()
    memory = GuestMemory([RegionSpec(guest=0, size=32 << 20, user=0x7F10_0000_0000)])
    disk = attach(daemon, memory=memory, inflight=True)
    data = dice.randbytes(size)
    requests = [
        disk.submit(Type.OUT, at // 512, data[at : at + chunk], layout=INDIRECT)
        for at in range(0, size, chunk)
    ]
    assert daemon.wait_exit() == -signal.SIGKILL
    daemon.environment = {}
    daemon.start()
    disk.reconnect()
    disk.wait(*requests)
    assert {request.status for request in requests} == {Status.OK}
    read = [disk.read(at // 512, chunk // 512, layout=INDIRECT) for at in range(0, size, chunk)]
    assert b"".join(read) == data
    daemon.control.checkpoint()
    daemon.control.wait_applied()
    assert daemon.image_bytes()[:size] == data


@pytest.mark.parametrize("point", MERGE_POINTS)
def test_nothing_is_lost_when_the_agent_dies_over_a_merge(
    epochd: StartDaemon, attach: Attach, point: str
) -> None:
    """Of two disks with a reactor each, whose blocks the packer sorts together."""
    dice = random.Random(point)
    words = [dice.randbytes(64) for _ in range(200)]
    blocks = [[b"".join(dice.choices(words, k=64)) for _ in range(1024)] for _ in range(2)]
    daemon = epochd(
        *[DiskSpec(name=name, size=4 << 20) for name in ("a", "b")],
        start=False,
        arena="32M",
        options=["--reactors", "2"],
        program=build.command(),
    )
    daemon.environment = {"EPOCHD_CRASH_POINT": f"{point}:{dice.randint(1, MERGE_POINTS[point])}"}
    daemon.start()
    disks = [attach(daemon, disk=number, inflight=True) for number in range(2)]

    def write(disk: Disk, data: list[bytes]) -> None:
        order = list(range(1024))
        dice.shuffle(order)
        for start in range(0, 1024, 64):
            disk.wait(
                *[
                    disk.submit(Type.OUT, 8 * at, data[at], layout=INDIRECT)
                    for at in order[start : start + 64]
                ]
            )

    def check() -> None:
        for disk, data in zip(disks, blocks, strict=True):
            read = [disk.read(8 * at, 8, layout=INDIRECT) for at in range(1024)]
            assert read == data

    for disk, data in zip(disks, blocks, strict=True):
        write(disk, data)
    assert daemon.wait_exit() == -signal.SIGKILL
    daemon.environment = {}
    daemon.start()
    for disk in disks:
        disk.reconnect()
    check()

    def merged() -> int:
        stats = daemon.control.execute("query-stats")["compression"]
        return int(stats["merged-blocks"])

    until("the next one to go on with it", lambda: merged() > 512)
    check()
    daemon.control.checkpoint()
    daemon.control.wait_applied()
    for number, data in enumerate(blocks):
        assert daemon.image_bytes(number) == b"".join(data)


def test_every_point_is_in_the_core() -> None:
    points = POINTS | SPILL_POINTS | MERGE_POINTS
    text = "".join(path.read_text() for path in SOURCES.glob("*.c"))
    assert {name for name in points if f'crash_point("{name}")' not in text} == set()
    assert text.count('crash_point("') == len(points)


def test_the_installed_agent_has_no_points(tmp_path: Path) -> None:
    import epochd._core

    assert epochd._core.__file__ is not None
    installed = tmp_path / "core.so"
    shutil.copyfile(epochd._core.__file__, installed)
    assert b"EPOCHD_CRASH_POINT" not in installed.read_bytes()
