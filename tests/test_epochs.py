"""Epochs: what the front end reads, what the image holds, and what survives.

The daemon is real, so is its journal; a `kill` is SIGKILL. "The image" is the file as another
program reads it.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon
from frontend import SECTOR, Disk, Feature, Layout, Type
from frontend.device import WANTED_FEATURES
from harness import ControlError, Daemon, DiskSpec, until

BLOCK = 4096
ENDINGS = pytest.mark.parametrize("how", ["quit", "term", "kill"])


def block(value: int) -> bytes:
    """A block that tells which it is and does not compress."""
    return random.Random(value).randbytes(BLOCK)


def image_block(daemon: Daemon, number: int, disk: int = 0) -> bytes:
    """A block of the image file as it is now."""
    with daemon.image(disk).open("rb") as image:
        image.seek(number * BLOCK)
        return image.read(BLOCK)


# ---- read your writes ---------------------------------------------------------------------


def test_a_read_finds_the_newest_write_wherever_it_is(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    for place in range(5):
        disk.write(8 * place, block(place))
    control.checkpoint()
    control.wait_applied()  # 0 stays in the image
    for place in range(1, 5):
        disk.write(8 * place, block(10 + place))
    control.checkpoint()  # 1 is committed
    for place in range(2, 5):
        disk.write(8 * place, block(20 + place))
    control.seal()  # 2 is sealed
    for place in range(3, 5):
        disk.write(8 * place, block(30 + place))
    control.seal()
    disk.write(8 * 4, block(44))  # 4 is open
    wanted = [block(0), block(11), block(22), block(33), block(44)]
    assert [disk.read(8 * place, 8) for place in range(5)] == wanted
    assert disk.read(0, 40) == b"".join(wanted)


def test_reads_agree_before_and_after_seal_commit_and_apply(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    chance = random.Random(3)
    blocks = {chance.randrange(16384): block(value) for value in range(400)}
    for number, data in blocks.items():
        disk.write(8 * number, data)

    def check() -> None:
        for number, data in blocks.items():
            assert disk.read(8 * number, 8) == data

    check()
    epoch = control.seal()
    check()
    control.commit(epoch)
    check()
    control.wait_applied(epoch)
    check()
    for number, data in blocks.items():
        assert image_block(agent, number) == data


def test_nothing_reaches_the_image_before_the_commit(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    disk.write(0, block(1))
    disk.flush()
    epoch = control.seal()
    disk.write(8, block(2))
    disk.flush()
    assert not any(agent.image_bytes())
    control.commit(epoch)
    control.wait_applied(epoch)
    assert image_block(agent, 0) == block(1)
    assert not any(image_block(agent, 1))


def test_discard_returns_to_the_committed_state(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    disk.write(0, block(1) + block(2))
    committed = control.checkpoint()
    disk.write(0, block(3))
    sealed = control.seal()
    disk.write(8, block(4))
    disk.write(16, block(5))
    opened = control.status()["open"]
    assert control.discard() == [sealed, opened]
    assert disk.read(0, 24) == block(1) + block(2) + bytes(BLOCK)
    status = control.status()
    assert status["committed"] == committed
    assert status["sealed"] == []
    assert status["open"] > opened


def test_discard_while_committed_epochs_are_not_applied_keeps_them(
    agent: Daemon, attach: Attach
) -> None:
    disk, control = attach(agent), agent.control
    for turn in range(20):
        disk.write(0, block(turn))
        disk.write(8 * (1 + turn), block(100 + turn))
        control.checkpoint()
        disk.write(0, block(1000))
        control.discard()
        assert disk.read(0, 8) == block(turn)
    assert disk.read(8, 8 * 20) == b"".join(block(100 + turn) for turn in range(20))


def test_epoch_numbers_rise_and_are_never_used_again(agent: Daemon) -> None:
    control = agent.control
    seen: set[int] = set()
    for turn in range(12):
        with Disk(agent.socket()).start() as disk:
            disk.write(0, block(turn))
        number = control.status()["open"]
        assert number not in seen
        assert number > max(seen, default=0)
        seen.add(number)
        if turn % 3 == 0:
            control.discard()
        elif turn % 3 == 1:
            control.checkpoint()
        else:
            control.seal()
        if turn in (4, 8):
            agent.restart("kill" if turn == 4 else "term")
            control = agent.control


def test_numbers_are_not_used_again_after_the_arena_is_lost(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    used = {agent.control.checkpoint()}
    for _ in range(3):
        disk.write(0, block(1))
        used.add(agent.control.seal())
    used.add(agent.control.status()["open"])
    agent.stop("kill")
    agent.lose_shm()
    agent.start()
    assert agent.control.status()["open"] > max(used)


def test_a_seal_falls_between_requests(agent: Daemon, attach: Attach) -> None:
    """Whatever is in flight: the sealed epoch has a prefix of each ring's writes, each whole."""
    disk, control = attach(agent, queues=2), agent.control
    for turn in range(1, 31):
        data = turn.to_bytes(2, "big") * (2 * BLOCK)  # four blocks a write
        requests = [
            disk.submit(Type.OUT, 32 * place, data, layout=Layout(indirect=0), queue=place % 2)
            for place in range(64)
        ]
        answer = control.begin("epoch-seal")
        disk.wait(*requests)
        epoch = answer.result()["epoch"]
        control.commit(epoch)
        control.discard()
        seen = [disk.read(32 * place, 32) for place in range(64)]
        for queue in (0, 1):
            new = [contents == data for contents in seen[queue::2]]
            assert new == sorted(new, reverse=True), f"turn {turn}: not a prefix"
        old = (turn - 1).to_bytes(2, "big") * (2 * BLOCK)
        assert set(seen) <= {data, old}, f"turn {turn}: half a write"
        for place in range(64):  # the same base for the next turn
            disk.write(32 * place, data)
        control.checkpoint()


# ---- the verbs' rules ---------------------------------------------------------------------


def test_commit_is_idempotent(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    disk.write(0, block(1))
    epoch = control.checkpoint()
    for _ in range(3):
        assert control.commit(epoch) == epoch
    assert control.commit() == epoch
    agent.restart("kill")
    assert agent.control.commit(epoch) == epoch


def test_commit_of_an_older_epoch_says_what_is_committed(agent: Daemon, attach: Attach) -> None:
    control = agent.control
    first = control.checkpoint()
    second = control.checkpoint()
    assert control.commit(first) == second


def test_commit_takes_all_older_epochs_along(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    epochs = []
    for turn in range(4):
        disk.write(8 * turn, block(turn))
        disk.write(64, block(50 + turn))
        epochs.append(control.seal())
    assert control.commit(epochs[2]) == epochs[2]
    assert control.status()["sealed"] == [epochs[3]]
    control.discard()
    assert disk.read(0, 32) == block(0) + block(1) + block(2) + bytes(BLOCK)
    assert disk.read(64, 8) == block(52)


def test_commit_without_a_number_takes_all_sealed_epochs(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    disk.write(0, block(1))
    control.seal()
    disk.write(8, block(2))
    newest = control.seal()
    disk.write(16, block(3))
    assert control.commit() == newest
    control.discard()
    assert disk.read(0, 24) == block(1) + block(2) + bytes(BLOCK)


def test_commit_of_the_open_epoch_is_refused(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    disk.write(0, block(1))
    opened = control.status()["open"]
    with pytest.raises(ControlError) as refused:
        control.commit(opened)
    assert str(opened) in refused.value.text
    assert "open" in refused.value.text
    assert control.seal() == opened
    assert control.commit(opened) == opened


def test_commit_of_an_epoch_that_is_yet_to_come_is_refused(agent: Daemon) -> None:
    control = agent.control
    with pytest.raises(ControlError) as refused:
        control.commit(control.status()["open"] + 5)
    assert str(control.status()["open"] + 5) in refused.value.text


def test_commit_of_a_discarded_epoch_is_refused_also_after_a_restart(
    agent: Daemon, attach: Attach
) -> None:
    disk, control = attach(agent), agent.control
    control.checkpoint()
    disk.write(0, block(1))
    gone = control.seal()
    control.discard()
    with pytest.raises(ControlError) as refused:
        control.commit(gone)
    assert "discard" in refused.value.text
    agent.restart("kill")
    with pytest.raises(ControlError):
        agent.control.commit(gone)


def test_commit_with_nothing_sealed_ever_is_answered(agent: Daemon) -> None:
    status = agent.control.status()
    assert agent.control.commit() == status["committed"]


def test_discard_may_be_repeated(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    disk.write(0, block(1))
    control.checkpoint()
    disk.write(0, block(2))
    gone = control.status()["open"]
    assert control.discard() == [gone]
    for _ in range(3):
        assert control.discard() == []
        assert control.status()["open"] == gone + 1
    assert disk.read(0, 8) == block(1)


def test_empty_epochs_can_be_sealed_and_committed(agent: Daemon) -> None:
    control = agent.control
    numbers = [control.seal() for _ in range(10)]
    assert numbers == sorted(set(numbers))
    assert control.commit() == numbers[-1]
    control.wait_applied(numbers[-1])


def test_events_tell_each_step(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    disk.write(0, block(1))
    epoch = control.seal()
    assert control.wait_event("EPOCH_SEALED")["data"]["epoch"] == epoch
    control.commit(epoch)
    assert control.wait_event("EPOCH_COMMITTED")["data"]["epoch"] == epoch
    control.wait_event("EPOCH_APPLIED", where=lambda data: bool(data["epoch"] >= epoch))
    disk.write(0, block(2))
    dropped = control.discard()
    event = control.wait_event("EPOCH_DISCARDED")
    assert event["data"]["epochs"] == dropped
    assert event["data"]["committed"] == epoch


def test_query_epochs_lists_what_is_alive(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    disk.write(0, block(1) + block(2))
    sealed = control.seal()
    disk.write(0, block(3))
    listed = control.execute("query-epochs")
    states = {entry["epoch"]: entry["state"] for entry in listed}
    assert states == {sealed: "sealed", sealed + 1: "open"}
    assert [entry["blocks"] for entry in listed] == [2, 1]


# ---- exact contents -----------------------------------------------------------------------


def test_sub_block_writes_are_exact_across_epochs(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    expected = bytearray(block(1))
    disk.write(0, bytes(expected))
    control.checkpoint()
    control.wait_applied()
    for sector in range(8):  # each sector of one block comes from an epoch of its own
        data = bytes([0xA0 + sector]) * SECTOR
        disk.write(sector, data)
        expected[sector * SECTOR : (sector + 1) * SECTOR] = data
        assert disk.read(0, 8) == expected
        control.seal()
        if sector == 3:
            control.commit()
    assert disk.read(0, 8) == expected
    assert disk.read(2, 3) == expected[2 * SECTOR : 5 * SECTOR]
    control.commit()
    control.wait_applied()
    assert disk.read(0, 8) == expected
    assert image_block(agent, 0) == expected


def test_a_partly_written_block_keeps_the_rest_of_the_image(
    epochd: StartDaemon, attach: Attach, tmp_path: Path
) -> None:
    image = tmp_path / "full.img"
    old = random.Random(8).randbytes(1 << 20)
    image.write_bytes(old)
    daemon = epochd(DiskSpec(image=image))
    disk, control = attach(daemon), daemon.control
    disk.write(3, b"\x01" * 512)
    disk.write(13, b"\x02" * 1536)
    disk.write_zeroes(30, 4)
    new = bytearray(old)
    new[3 * 512 : 4 * 512] = b"\x01" * 512
    new[13 * 512 : 16 * 512] = b"\x02" * 1536
    new[30 * 512 : 34 * 512] = bytes(2048)
    assert disk.read(0, 2048) == new
    control.checkpoint()
    assert disk.read(0, 2048) == new
    daemon.stop("quit")
    assert image.read_bytes() == new


@pytest.mark.parametrize("kind", [Type.DISCARD, Type.WRITE_ZEROES])
def test_zeroes_go_through_epochs_like_data(agent: Daemon, attach: Attach, kind: Type) -> None:
    disk, control = attach(agent), agent.control

    def clear(sector: int, sectors: int) -> None:
        if kind == Type.DISCARD:
            disk.discard(sector, sectors)
        else:
            disk.write_zeroes(sector, sectors, unmap=True)

    old = b"".join(block(value) for value in range(16))
    disk.write(0, old)
    control.checkpoint()
    clear(4, 100)
    first = old[: 4 * 512] + bytes(100 * 512) + old[104 * 512 :]
    assert disk.read(0, 128) == first
    control.seal()
    disk.write(50, b"\x77" * 512)
    second = first[: 50 * 512] + b"\x77" * 512 + first[51 * 512 :]
    assert disk.read(0, 128) == second
    control.discard()
    assert disk.read(0, 128) == old
    clear(4, 100)
    control.checkpoint()
    control.wait_applied()
    assert disk.read(0, 128) == first
    agent.stop("quit")
    assert agent.image_bytes()[: len(old)] == first


def test_writing_zeroes_takes_no_room_in_the_arena(agent: Daemon, attach: Attach) -> None:
    """40 MiB of zero blocks go through an arena of 16 MiB in one epoch."""
    disk, control = attach(agent), agent.control
    disk.write(0, block(9))
    control.checkpoint()
    for place in range(40):
        disk.write_zeroes(2048 * place, 2048)
    assert disk.read(0, 8) == bytes(BLOCK)
    control.discard()
    assert disk.read(0, 8) == block(9)


def test_large_and_small_writes_mix(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    expected = bytearray(4 << 20)
    chance = random.Random(12)
    for turn in range(150):
        size = chance.choice([512, 512, 1024, 4096, 4608, 65536, 300 * 512])
        start = chance.randrange(0, len(expected) - size, 512)
        data = chance.randbytes(size)
        disk.write(start // 512, data)
        expected[start : start + size] = data
        if turn % 30 == 29:
            control.checkpoint()
            assert disk.read(0, 8192) == expected
    agent.stop("quit")
    assert agent.image_bytes()[: len(expected)] == expected


# ---- the end of a daemon ------------------------------------------------------------------


@ENDINGS
def test_open_and_sealed_epochs_survive(agent: Daemon, attach: Attach, how: str) -> None:
    disk, control = attach(agent), agent.control
    disk.write(0, block(1))
    committed = control.checkpoint()
    disk.write(8, block(2))
    disk.write(17, b"\x55" * 512)
    sealed = control.seal()
    disk.write(24, block(3))
    disk.write_zeroes(0, 4)
    disk.discard(8, 1)
    wanted = disk.read(0, 64)
    before = control.status()
    agent.restart(how)
    control = agent.control
    after = control.status()
    assert (after["committed"], after["sealed"], after["open"]) == (
        committed,
        [sealed],
        before["open"],
    )
    again = attach(agent)
    assert again.read(0, 64) == wanted
    again.write(32, block(4))
    opened = control.seal()
    assert control.commit(opened) == opened
    control.wait_applied(opened)
    assert agent.image_bytes()[: 64 * 512] == wanted[: 32 * 512] + block(4) + wanted[40 * 512 :]


@ENDINGS
def test_what_the_epochs_hold_is_counted_the_same_after_the_end(
    agent: Daemon, attach: Attach, how: str
) -> None:
    disk, control = attach(agent), agent.control
    for value in range(40):
        disk.write(8 * (value % 30), block(value))
    disk.write(8 * 50 + 3, b"\x55" * 512)
    control.seal()
    disk.write(8 * 5, block(9))

    def counted() -> list[tuple[int, int, int]]:
        epochs = agent.control.execute("query-epochs")
        return [(e["epoch"], e["blocks"], e["logical-bytes"]) for e in epochs]

    before = counted()
    assert [held for _, _, held in before] == [30 * 4096 + 512, 4096]
    agent.restart(how)
    assert counted() == before


@ENDINGS
def test_the_image_equals_the_committed_state_after_the_end(
    agent: Daemon, attach: Attach, how: str
) -> None:
    disk, control = attach(agent), agent.control
    for value in range(64):
        disk.write(8 * value, block(value))
    control.checkpoint()
    for value in range(32, 96):
        disk.write(8 * value, block(200 + value))
    control.seal()
    disk.write(0, block(999))
    agent.stop(how)
    if how == "kill":  # the journal may be ahead of the image: a start brings it up to date
        agent.start()
        agent.control.wait_applied()
        agent.stop("quit")
    wanted = b"".join(block(value) for value in range(64))
    assert agent.image_bytes() == wanted.ljust(64 << 20, b"\0")


def test_uncommitted_epochs_are_gone_after_a_reboot_and_nothing_else(
    agent: Daemon, attach: Attach
) -> None:
    disk, control = attach(agent), agent.control
    disk.write(0, block(1) + block(2))
    committed = control.checkpoint()
    disk.write(8, block(3))
    control.seal()
    disk.write(16, block(4))
    agent.stop("kill")
    agent.lose_shm()
    agent.start()
    status = agent.control.status()
    assert (status["committed"], status["sealed"]) == (committed, [])
    disk = attach(agent)
    assert disk.read(0, 24) == block(1) + block(2) + bytes(BLOCK)


def test_a_commit_survives_a_reboot_at_once(epochd: StartDaemon, attach: Attach) -> None:
    """The acknowledgement of a commit means the journal has it, whatever the image has."""
    daemon = epochd()
    for turn in range(5):
        disk = attach(daemon)
        data = b"".join(block(64 * turn + value) for value in range(64))
        disk.write(0, data)
        daemon.control.checkpoint()
        daemon.stop("kill")
        daemon.lose_shm()
        daemon.start()
        with Disk(daemon.socket()).start() as again:
            assert again.read(0, 512) == data
        disk.close()


def test_a_stopped_daemon_without_epochs_leaves_no_shared_memory(
    agent: Daemon, attach: Attach
) -> None:
    disk = attach(agent)
    disk.write(0, block(1))
    agent.control.checkpoint()
    assert agent.shm
    assert all(path.exists() for path in agent.shm)
    agent.stop("quit")
    assert not any(path.exists() for path in agent.shm)


def test_requests_go_on_over_a_restart_when_the_front_end_reconnects(
    agent: Daemon, attach: Attach
) -> None:
    disk = attach(agent, inflight=True)
    for turn, how in enumerate(["term", "kill", "quit", "kill"]):
        disk.write(8 * turn, block(turn))
        agent.restart(how)
        disk.reconnect()
        for place in range(turn + 1):
            assert disk.read(8 * place, 8) == block(place)


# ---- several disks ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["quit", "kill"])
def test_disks_of_a_group_commit_and_discard_together(
    epochd: StartDaemon, attach: Attach, how: str
) -> None:
    daemon = epochd(DiskSpec("one"), DiskSpec("two", size=32 << 20), DiskSpec("three"))
    disks = [attach(daemon, index) for index in range(3)]
    for index, disk in enumerate(disks):
        disk.write(0, block(index))
    epoch = daemon.control.seal()
    for index, disk in enumerate(disks):
        disk.write(0, block(10 + index))
    daemon.control.commit(epoch)
    daemon.control.discard()
    for index, disk in enumerate(disks):
        assert disk.read(0, 8) == block(index)
        disk.write(8, block(20 + index))
    daemon.control.seal()
    daemon.restart(how)
    for index in range(3):
        with Disk(daemon.socket(index)).start() as disk:
            assert disk.read(0, 16) == block(index) + block(20 + index)
    daemon.control.commit()
    daemon.stop("quit")
    for index in range(3):
        assert daemon.image_bytes(index)[: 2 * BLOCK] == block(index) + block(20 + index)


# ---- active mode --------------------------------------------------------------------------


def test_promote_discards_what_is_not_committed(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    disk.write(0, block(1))
    control.checkpoint()
    disk.write(0, block(2))
    control.seal()
    disk.write(8, block(3))
    before = control.status()["generation"]
    answer = control.execute("promote")
    assert answer["mode"] == "active"
    assert answer["generation"] == before + 1
    assert control.status()["mode"] == "active"
    assert disk.read(0, 16) == block(1) + bytes(BLOCK)


def test_a_flush_is_durable_once_active(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    agent.control.execute("promote")
    disk.write(0, block(1))
    disk.flush()
    disk.write(8, block(2))  # not flushed: free to vanish
    agent.stop("kill")
    agent.lose_shm()
    agent.start()
    assert agent.control.status()["mode"] == "active"
    again = attach(agent)
    assert again.read(0, 8) == block(1)
    assert again.read(8, 8) in (block(2), bytes(BLOCK))


def test_a_flush_of_a_standby_is_not_a_commit(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    disk.write(0, block(1))
    disk.flush()
    agent.stop("kill")
    agent.lose_shm()
    agent.start()
    with Disk(agent.socket()).start() as again:
        assert again.read(0, 8) == bytes(BLOCK)


@pytest.mark.parametrize("kind", [Type.OUT, Type.WRITE_ZEROES, Type.DISCARD])
def test_a_front_end_without_flush_writes_through_once_active(
    agent: Daemon, attach: Attach, kind: Type
) -> None:
    disk = attach(agent, features=WANTED_FEATURES & ~Feature.BLK_FLUSH)
    disk.write(0, block(1) * 2)
    agent.control.checkpoint()
    agent.control.execute("promote")
    if kind == Type.OUT:
        disk.write(0, block(2))
    elif kind == Type.DISCARD:
        disk.discard(0, 8)
    else:
        disk.write_zeroes(0, 8)
    agent.stop("kill")
    agent.lose_shm()
    agent.start()
    again = attach(agent)
    wanted = block(2) if kind == Type.OUT else bytes(BLOCK)
    assert again.read(0, 16) == wanted + block(1)


def test_many_flushes_while_active(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent, queues=2)
    agent.control.execute("promote")
    for turn in range(60):
        disk.write(8 * turn, block(turn), queue=turn % 2)
        disk.flush(queue=(turn + 1) % 2)
    agent.stop("quit")
    wanted = b"".join(block(turn) for turn in range(60))
    assert agent.image_bytes()[: len(wanted)] == wanted


def test_a_ring_stops_with_its_flushes_answered(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    agent.control.execute("promote")
    queue = disk.queues[0]
    for turn in range(20):
        for place in range(16):
            disk.submit(Type.OUT, 8 * place, block(turn), layout=Layout(indirect=0))
            disk.submit(Type.FLUSH, layout=Layout(indirect=0))
        base = disk.stop_queue(0)
        assert queue.used_idx == base
        disk.reap()
        disk.start_queue(queue, base=base)
        disk.wait(*disk.requests.values())


def test_a_front_end_may_hang_up_while_its_flushes_wait(agent: Daemon, attach: Attach) -> None:
    agent.control.execute("promote")
    for turn in range(20):
        disk = attach(agent, queues=2)
        for place in range(16):
            disk.submit(Type.OUT, 8 * place, block(turn), layout=Layout(indirect=0))
            disk.submit(Type.FLUSH, layout=Layout(indirect=0), queue=1)
        disk.close()
    disk = attach(agent)
    disk.write(0, block(100))
    disk.flush()
    assert disk.read(0, 8) == block(100)


def test_an_active_agent_takes_more_than_its_arena(agent: Daemon, attach: Attach) -> None:
    """A full arena commits by itself once active: 48 MiB go through 16 MiB."""
    disk = attach(agent)
    agent.control.execute("promote")
    piece = [random.Random(turn).randbytes(1 << 20) for turn in range(48)]
    for turn in range(48):
        disk.write(2048 * turn, piece[turn])
    disk.flush()
    for turn in range(48):
        assert disk.read(2048 * turn, 2048) == piece[turn]
    agent.stop("quit")
    assert agent.image_bytes()[: 48 << 20] == b"".join(piece)


def test_an_active_agent_comes_up_active_with_its_data(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    agent.control.execute("promote")
    generation = agent.control.status()["generation"]
    disk.write(0, block(1))
    for how in ("kill", "term"):
        agent.restart(how)
        status = agent.control.status()
        assert (status["mode"], status["generation"]) == ("active", generation)
        with Disk(agent.socket()).start() as again:
            assert again.read(0, 8) == block(1)


# ---- images -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["loop_512", "loop_4k"])
def test_a_block_device_is_an_image(
    epochd: StartDaemon, attach: Attach, request: pytest.FixtureRequest, device: str
) -> None:
    path: Path = request.getfixturevalue(device)
    daemon = epochd(DiskSpec(image=path))
    disk, control = attach(daemon), daemon.control
    assert disk.config().capacity == (64 << 20) // 512
    chance = random.Random(4)
    blocks = {chance.randrange(16384): block(value) for value in range(100)}
    for number, data in blocks.items():
        disk.write(8 * number, data)
    for number, data in blocks.items():
        assert disk.read(8 * number, 8) == data
    control.checkpoint()
    disk.discard(0, 131072)
    control.seal()
    assert disk.read(8 * min(blocks), 8) == bytes(BLOCK)
    control.discard()
    control.wait_applied()
    for number, data in blocks.items():
        assert disk.read(8 * number, 8) == data
    daemon.restart("kill")
    daemon.stop("quit")
    contents = path.read_bytes()
    assert len(contents) == 64 << 20
    for number, data in blocks.items():
        assert contents[number * BLOCK : (number + 1) * BLOCK] == data


def test_a_4k_device_serves_single_sectors_too(
    epochd: StartDaemon, attach: Attach, loop_4k: Path
) -> None:
    """The protocol counts in 512 bytes whatever the block size: it is only a hint."""
    daemon = epochd(DiskSpec(image=loop_4k))
    disk, control = attach(daemon), daemon.control
    assert disk.config().blk_size == 4096
    expected = bytearray(block(1) * 4)
    disk.write(0, bytes(expected))
    control.checkpoint()
    control.wait_applied()
    for sector, sectors in [(1, 1), (6, 4), (15, 9), (31, 1)]:
        data = bytes([sector]) * (sectors * 512)
        disk.write(sector, data)
        expected[sector * 512 : (sector + sectors) * 512] = data
    disk.write_zeroes(17, 2)
    expected[17 * 512 : 19 * 512] = bytes(1024)
    for sector in range(32):
        assert disk.read(sector, 1) == expected[sector * 512 : (sector + 1) * 512]
    control.checkpoint()
    control.wait_applied()
    assert disk.read(3, 20) == expected[3 * 512 : 23 * 512]
    daemon.stop("quit")
    assert loop_4k.read_bytes()[: len(expected)] == expected


def test_an_image_of_an_odd_number_of_sectors(epochd: StartDaemon, attach: Attach) -> None:
    """The last block of the image is not whole."""
    sectors = 2048 + 3
    daemon = epochd(DiskSpec(size=sectors * 512))
    disk, control = attach(daemon), daemon.control
    assert disk.config().capacity == sectors
    tail = os.urandom(11 * 512)
    disk.write(sectors - 11, tail)
    assert disk.read(sectors - 11, 11) == tail
    control.checkpoint()
    control.wait_applied()
    assert disk.read(sectors - 11, 11) == tail
    disk.write(sectors - 1, b"\x66" * 512)
    disk.write_zeroes(sectors - 2, 1)
    control.checkpoint()
    daemon.stop("quit")
    wanted = tail[: 9 * 512] + bytes(512) + b"\x66" * 512
    assert daemon.image_bytes() == bytes((sectors - 11) * 512) + wanted


def test_an_applied_discard_gives_the_space_back(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    for turn in range(8):
        disk.write(2048 * turn, os.urandom(1 << 20))
    control.checkpoint()
    control.wait_applied()
    allocated = agent.image().stat().st_blocks
    disk.discard(0, 16384)
    control.checkpoint()
    agent.stop("quit")
    assert agent.image().stat().st_blocks <= allocated - 16384 + 2048
    assert not any(agent.image_bytes())


def test_the_journal_says_when_it_is_not_direct(agent: Daemon) -> None:
    status = agent.control.status()
    assert isinstance(status["journal"]["direct"], bool)
    filesystem = subprocess.run(
        ["stat", "--file-system", "--format=%T", str(agent.folder)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    if "ext" in filesystem or "xfs" in filesystem:
        assert status["journal"]["direct"]


# ---- many epochs --------------------------------------------------------------------------


def test_a_thousand_checkpoints(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    for turn in range(1000):
        disk.write(8 * (turn % 500), turn.to_bytes(4, "big") * 128)
        control.checkpoint()
    agent.stop("quit")
    contents = agent.image_bytes()
    for place in range(500):
        assert contents[place * BLOCK : place * BLOCK + 4] == (500 + place).to_bytes(4, "big")


def test_many_sealed_epochs_at_once(agent: Daemon, attach: Attach) -> None:
    """As many as are alive at once without the arena being full: one segment each."""
    disk, control = attach(agent), agent.control
    for turn in range(40):
        disk.write(8 * turn, block(turn), layout=Layout(indirect=0))
        disk.write(8 * 100, block(turn))
        control.seal()
    assert len(control.status()["sealed"]) == 40
    assert disk.read(0, 8 * 40) == b"".join(block(turn) for turn in range(40))
    agent.restart("kill")
    assert len(agent.control.status()["sealed"]) == 40
    epochs = agent.control.status()["sealed"]
    agent.control.commit(epochs[19])
    agent.control.discard()
    with Disk(agent.socket()).start() as again:
        assert again.read(0, 8 * 20) == b"".join(block(turn) for turn in range(20))
        assert again.read(8 * 20, 8) == bytes(BLOCK)
        assert again.read(8 * 100, 8) == block(19)


def test_the_first_event_of_a_client_is_in_the_status(agent: Daemon, attach: Attach) -> None:
    control = agent.control
    control.status()
    disk = attach(agent)
    assert control.wait_event("CLIENT_CONNECTED")["data"]["disk"] == "disk0.img"
    disk.close()
    control.wait_event("CLIENT_DISCONNECTED")
    until("no client", lambda: control.status()["clients"] == 0)
