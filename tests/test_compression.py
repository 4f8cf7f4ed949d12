"""Compression behind the write path: what it saves, what it costs a reader, and that nobody
can tell the difference. Data are the blocks of a real ext4 file system with source text."""

from __future__ import annotations

import random
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon
from frontend import Disk, Layout, Type
from harness import Daemon, DiskSpec, until

BLOCK = 4096
SECTORS = BLOCK // 512
BLOCKS = 4096
INDIRECT = Layout(indirect=0)
CLUSTER_BLOCKS = 8  # native/format.h


@pytest.fixture(scope="module")
def file_system(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The blocks of a 16 MiB ext4 file system, filled with Python's own modules."""
    folder = tmp_path_factory.mktemp("fs")
    tree, image = folder / "tree", folder / "fs.img"
    tree.mkdir()
    left = BLOCKS * BLOCK * 9 // 10
    for number, source in enumerate(sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))):
        left -= -(-source.stat().st_size // BLOCK) * BLOCK + 512
        if left < 0:
            break
        shutil.copyfile(source, tree / f"{number}.py")
    with image.open("wb") as file:
        file.truncate(BLOCKS * BLOCK)
    options = ["-b", str(BLOCK), "-m", "0", "-O", "^has_journal", "-N", "2048"]
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", *options, "-d", tree, image], check=True)
    data = image.read_bytes()
    return [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]


def used(blocks: list[bytes]) -> list[int]:
    """The blocks that are not zero: a file system's own, and the files'."""
    return [number for number, data in enumerate(blocks) if data.strip(b"\0")]


def write_blocks(disk: Disk, order: list[int], blocks: list[bytes]) -> None:
    for start in range(0, len(order), 64):
        disk.wait(
            *(
                disk.submit(Type.OUT, number * SECTORS, blocks[number], layout=INDIRECT)
                for number in order[start : start + 64]
            )
        )


def check_blocks(disk: Disk, order: list[int], blocks: list[bytes]) -> None:
    for number in order:
        assert disk.read(number * SECTORS, SECTORS) == blocks[number], f"block {number}"


def compression(agent: Daemon) -> dict[str, int]:
    stats = agent.control.execute("query-stats")
    packed: dict[str, int] = stats["compression"]
    return packed


def packed(agent: Daemon, blocks: int) -> bool:
    """Has the packer been through as many blocks?"""
    stats = agent.control.execute("query-stats")["group"]
    return bool(stats["compressed-frames"] + stats["incompressible-frames"] >= blocks)


def memory(agent: Daemon) -> int:
    """Bytes of RAM for what the guest wrote: whole segments and the index."""
    status = agent.control.status()
    return int(status["arena"]["used"] + status["index-bytes"])


def start(epochd: StartDaemon, **settings: object) -> Daemon:
    return epochd(DiskSpec(size=BLOCKS * BLOCK), arena="32M", **settings)


def test_random_writes_of_a_file_system_take_a_third(
    epochd: StartDaemon, attach: Attach, file_system: list[bytes]
) -> None:
    agent = start(epochd)
    disk = attach(agent)
    order = used(file_system)
    assert len(order) > BLOCKS // 2
    random.Random(1).shuffle(order)
    write_blocks(disk, order, file_system)
    agent.control.seal()
    until("all of it to be packed", lambda: packed(agent, len(order)))
    until("a third of it", lambda: memory(agent) * 3 <= len(order) * BLOCK)
    check_blocks(disk, order[:200], file_system)
    assert compression(agent)["ratio"] > 2.5


def test_an_idle_guests_random_writes_are_merged(
    epochd: StartDaemon, attach: Attach, file_system: list[bytes]
) -> None:
    """Neighbours meet that were written far apart; nobody can tell, over a kill and a commit."""
    agent = start(epochd)
    disk = attach(agent)
    order = used(file_system)
    random.Random(5).shuffle(order)
    order = order[: len(order) * 3 // 4]  # the others are gaps
    write_blocks(disk, order, file_system)
    agent.control.seal()
    until("all of it to be packed", lambda: packed(agent, len(order)))
    until("neighbours to be merged", lambda: compression(agent)["merged-blocks"] > len(order) // 2)
    stats = compression(agent)
    assert stats["merges"] > 0
    assert stats["merge-bytes-out"] < stats["merge-bytes-in"]
    check_blocks(disk, order[:300], file_system)
    disk.close()
    agent.restart("kill")
    disk = attach(agent)
    before = compression(agent)
    check_blocks(disk, order[:300], file_system)
    after = compression(agent)
    wanted = after["wanted-bytes"] - before["wanted-bytes"]
    assert wanted > 0
    assert after["expanded-bytes"] - before["expanded-bytes"] <= wanted * CLUSTER_BLOCKS
    agent.control.commit()
    agent.control.wait_applied()
    image = agent.image_bytes()
    assert all(image[n * BLOCK : (n + 1) * BLOCK] == file_system[n] for n in order)


def test_a_pause_packs_the_open_epoch(
    epochd: StartDaemon, attach: Attach, file_system: list[bytes]
) -> None:
    agent = start(epochd)
    disk = attach(agent)
    write_blocks(disk, list(range(BLOCKS)), file_system)
    share = len(used(file_system)) * 9 // 10  # what is in the segment being written stays raw
    until("the open epoch to be packed", lambda: packed(agent, share))
    assert agent.control.status()["sealed"] == []


def test_a_cluster_is_expanded_once_for_its_readers(
    epochd: StartDaemon, attach: Attach, file_system: list[bytes]
) -> None:
    agent = start(epochd)
    disk = attach(agent)
    order = used(file_system)
    write_blocks(disk, order, file_system)
    agent.control.seal()
    until("all of it to be packed", lambda: packed(agent, len(order)))
    before = compression(agent)
    assert before["clusters"] > len(order) // CLUSTER_BLOCKS // 2
    check_blocks(disk, order, file_system)
    after = compression(agent)
    wanted = after["wanted-bytes"] - before["wanted-bytes"]
    assert after["expanded-bytes"] - before["expanded-bytes"] <= wanted * 11 // 10
    # Anywhere, one block at a time, the price is bounded.
    random.Random(2).shuffle(order)
    check_blocks(disk, order, file_system)
    last = compression(agent)
    wanted = last["wanted-bytes"] - after["wanted-bytes"]
    assert wanted > 0
    assert last["expanded-bytes"] - after["expanded-bytes"] <= wanted * CLUSTER_BLOCKS


def test_parts_of_clusters_are_overwritten_over_kills_and_commits(
    epochd: StartDaemon, attach: Attach, file_system: list[bytes]
) -> None:
    agent = start(epochd)
    disk = attach(agent, inflight=True)
    now = bytearray(b"".join(file_system))
    dice = random.Random(3)
    write_blocks(disk, list(range(BLOCKS)), file_system)
    until("some of it to be packed", lambda: compression(agent)["clusters"] > 20)
    for turn in range(400):
        if turn % 80 == 40:  # in the middle of packing, too
            agent.stop("kill")
            agent.start()
            disk.reconnect()
        first = dice.randrange(BLOCKS * SECTORS - 24)
        count = dice.randrange(1, 24)
        data = dice.choice((dice.randbytes(512), b"text of a sector".ljust(512, b".")))
        disk.write(first, data * count)
        now[first * 512 : (first + count) * 512] = data * count
        if turn % 100 == 60:
            agent.control.seal()
    expected = [bytes(now[at : at + BLOCK]) for at in range(0, len(now), BLOCK)]
    check_blocks(disk, dice.sample(range(BLOCKS), 1000), expected)
    agent.control.checkpoint()
    agent.control.wait_applied()
    assert agent.image_bytes() == bytes(now)


def test_incompressible_data_are_hardly_tried(epochd: StartDaemon, attach: Attach) -> None:
    agent = start(epochd)
    disk = attach(agent)
    noise = random.Random(4).randbytes(BLOCKS * BLOCK // 2)
    blocks = [noise[at : at + BLOCK] for at in range(0, len(noise), BLOCK)]
    write_blocks(disk, list(range(len(blocks))), blocks)
    agent.control.seal()
    until("all of it to be seen", lambda: packed(agent, len(blocks)))
    stats = compression(agent)
    assert stats["pack-bytes-in"] == stats["pack-bytes-out"]  # kept where it was written
    check_blocks(disk, list(range(0, len(blocks), 7)), blocks)
