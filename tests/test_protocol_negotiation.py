"""What is offered, how it is negotiated, and the configuration space.

The law is vhost-user.rst; the tests are those freedoms of it that front ends other than QEMU
(libblkio, SPDK, crosvm) make use of.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest
from conftest import Attach, StartDaemon
from frontend import (
    NEED_REPLY,
    VERSION,
    BlkConfig,
    Disk,
    Feature,
    Protocol,
    Refused,
    Request,
    Type,
)
from frontend.wire import CONFIG, U64, VRING_STATE
from harness import Daemon, DiskSpec

ALWAYS = (
    Feature.VERSION_1
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.PROTOCOL_FEATURES
    | Feature.LOG_ALL
    | Feature.BLK_SEG_MAX
    | Feature.BLK_BLK_SIZE
    | Feature.BLK_FLUSH
    | Feature.BLK_TOPOLOGY
    | Feature.BLK_MQ
)
PROTOCOL = (
    Protocol.MQ
    | Protocol.LOG_SHMFD
    | Protocol.REPLY_ACK
    | Protocol.CONFIG
    | Protocol.INFLIGHT_SHMFD
    | Protocol.CONFIGURE_MEM_SLOTS
)


@pytest.fixture
def bare(shared: Daemon, attach: Attach) -> Disk:
    """A connection on which nothing has been said yet."""
    return attach(shared, start=False)


# ---- features -----------------------------------------------------------------------------


def test_the_promised_features_are_offered(bare: Disk) -> None:
    offered = bare.channel.ask_u64(Request.GET_FEATURES)
    wanted = ALWAYS | Feature.BLK_DISCARD | Feature.BLK_WRITE_ZEROES
    assert Feature(offered & wanted) == wanted


def test_nothing_is_offered_that_is_not_there(bare: Disk) -> None:
    offered = bare.channel.ask_u64(Request.GET_FEATURES)
    never = (
        Feature.BLK_RO
        | Feature.BLK_SIZE_MAX  # with a size of 0 it would stop a driver that believes it
        | Feature.BLK_GEOMETRY
        | Feature.BLK_CONFIG_WCE
        | Feature.RING_PACKED
        | Feature.IOMMU_PLATFORM
    )
    assert Feature(offered & never) == 0


def test_a_read_only_disk_offers_ro(epochd: StartDaemon, attach: Attach) -> None:
    disk = attach(epochd(DiskSpec(read_only=True)))
    assert disk.offered & Feature.BLK_RO
    assert Feature(disk.offered & ALWAYS) == ALWAYS


def test_the_promised_protocol_features_are_offered(bare: Disk) -> None:
    offered = bare.channel.ask_u64(Request.GET_PROTOCOL_FEATURES)
    assert Protocol(offered & PROTOCOL) == PROTOCOL
    assert not offered & (Protocol.INBAND_NOTIFICATIONS | Protocol.HOST_NOTIFIER)


def test_a_feature_that_was_not_offered_is_refused(bare: Disk) -> None:
    bare.negotiate()
    with pytest.raises(Refused):
        bare.acknowledge(extra=Feature.RING_PACKED)
    bare.acknowledge()


def test_a_protocol_feature_that_was_not_offered_is_refused(bare: Disk) -> None:
    bare.negotiate()
    with pytest.raises(Refused):
        bare.command(
            Request.SET_PROTOCOL_FEATURES,
            U64.pack(bare.protocol | Protocol.INBAND_NOTIFICATIONS),
        )


def test_features_may_be_set_before_protocol_features_are_asked_for(bare: Disk) -> None:
    channel = bare.channel
    bare.offered = channel.ask_u64(Request.GET_FEATURES)
    bare.features = bare.offered & bare.wanted_features | Feature.PROTOCOL_FEATURES
    channel.send(Request.SET_FEATURES, U64.pack(bare.features))
    bare.protocol = channel.ask_u64(Request.GET_PROTOCOL_FEATURES) & bare.wanted_protocol
    channel.send(Request.SET_PROTOCOL_FEATURES, U64.pack(bare.protocol))
    bare.share_memory()
    bare.start_queue(bare.make_queue(0, 64))
    bare.write(0, b"\x11" * 512)
    assert bare.read(0, 1) == b"\x11" * 512


def test_features_may_be_set_again_while_rings_run(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared)
    disk.write(0, b"\x12" * 512)
    disk.acknowledge()
    assert disk.read(0, 1) == b"\x12" * 512


def test_a_front_end_without_protocol_features_is_served(shared: Daemon, attach: Attach) -> None:
    """Its rings start enabled, as SET_VRING_ENABLE does not exist for it."""
    disk = attach(shared, protocol=0)
    assert not disk.features & Feature.PROTOCOL_FEATURES
    disk.write(8, b"\x13" * 4096)
    assert disk.read(8, 8) == b"\x13" * 4096
    assert disk.stop_queue(0) == 2


@pytest.mark.parametrize(
    "without",
    [
        Feature.EVENT_IDX,
        Feature.INDIRECT_DESC,
        Feature.BLK_MQ,
        Feature.BLK_SEG_MAX | Feature.BLK_BLK_SIZE | Feature.BLK_TOPOLOGY,
        Feature.EVENT_IDX | Feature.INDIRECT_DESC | Feature.BLK_FLUSH | Feature.BLK_MQ,
    ],
    ids=lambda mask: str(Feature(mask).name),
)
def test_a_front_end_may_leave_features_out(
    shared: Daemon, attach: Attach, without: Feature
) -> None:
    disk = attach(shared, features=(ALWAYS & ~without) & ~Feature.LOG_ALL)
    assert not disk.features & without
    for turn in range(300):
        disk.write(turn % 64, bytes([turn % 251]) * 512)
    assert disk.read(299 % 64, 1) == bytes([299 % 251]) * 512


# ---- acknowledgements ---------------------------------------------------------------------


def test_every_message_is_acknowledged_once_when_asked_for(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared)  # all its commands were acknowledged one by one
    assert disk.protocol & Protocol.REPLY_ACK
    assert disk.channel.quiet(0)


def test_messages_with_a_reply_of_their_own_get_no_second_one(bare: Disk) -> None:
    bare.negotiate()
    for request in (Request.GET_FEATURES, Request.GET_QUEUE_NUM, Request.GET_MAX_MEM_SLOTS):
        bare.channel.send(request, flags=VERSION | NEED_REPLY)
        assert bare.channel.reply_to(request).u64() > 0
    bare.channel.send(
        Request.GET_CONFIG, CONFIG.pack(0, 8, 0) + bytes(8), flags=VERSION | NEED_REPLY
    )
    assert len(bare.channel.reply_to(Request.GET_CONFIG).payload) == CONFIG.size + 8
    bare.channel.send(Request.GET_VRING_BASE, VRING_STATE.pack(0, 0), flags=VERSION | NEED_REPLY)
    bare.channel.reply_to(Request.GET_VRING_BASE)
    assert bare.channel.ask_u64(Request.GET_QUEUE_NUM) > 0
    assert bare.channel.quiet(0)


def test_without_reply_ack_nothing_is_acknowledged(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared, start=False, protocol=Protocol.CONFIG | Protocol.MQ)
    disk.negotiate()
    disk.channel.send(Request.SET_OWNER, flags=VERSION | NEED_REPLY)
    # The next thing to arrive answers the next question.
    assert disk.channel.ask(Request.GET_QUEUE_NUM).u64() > 0


def test_a_refusal_without_reply_ack_ends_the_connection(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared, start=False, protocol=Protocol.CONFIG)
    disk.negotiate()
    disk.channel.send(Request.SET_FEATURES, U64.pack(1 << 63))
    disk.channel.wait_hang_up()


def test_reset_owner_is_taken_without_effect(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared)
    disk.command(Request.RESET_OWNER)
    disk.command(Request.SET_OWNER)
    disk.write(0, bytes(512))


# ---- queues and slots ---------------------------------------------------------------------


def test_the_number_of_queues_is_told_without_negotiating_mq(
    shared: Daemon, attach: Attach
) -> None:
    disk = attach(shared, start=False, protocol=Protocol.CONFIG)
    assert disk.queue_count() == 16
    disk.negotiate()
    assert not disk.protocol & Protocol.MQ
    assert disk.queue_count() == 16


def test_the_number_of_memory_slots_is_told(bare: Disk) -> None:
    bare.negotiate()
    assert bare.channel.ask_u64(Request.GET_MAX_MEM_SLOTS) >= 32


def test_a_queue_that_does_not_exist_is_refused(bare: Disk) -> None:
    bare.negotiate()
    for request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE):
        for queue in (16, 17, 255, 1 << 31):
            with pytest.raises(Refused):
                bare.command(request, VRING_STATE.pack(queue, 2))
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        with pytest.raises(Refused):
            bare.command(request, U64.pack(16), [bare.memory.regions[0].fd])
    assert bare.queue_count() == 16


# ---- configuration space ------------------------------------------------------------------


def test_the_configuration_describes_the_disk(bare: Disk) -> None:
    bare.negotiate()
    config = bare.config()
    assert config.capacity == (64 << 20) // 512
    assert config.blk_size == 512
    assert config.seg_max == 126
    assert config.size_max != 0
    assert config.num_queues == 16
    assert 1 << config.physical_block_exp == 4096 // 512
    assert config.min_io_size == 8
    assert config.max_discard_seg == 1
    assert config.max_write_zeroes_seg == 1
    assert config.max_discard_sectors == config.max_write_zeroes_sectors == 4194304
    assert config.discard_sector_alignment > 0
    assert config.write_zeroes_may_unmap == 1


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 8), (0, 60), (0, 96), (0, 256), (20, 4), (3, 7), (59, 1), (59, 40), (60, 4), (200, 56)],
)
def test_any_part_of_the_configuration_can_be_read(bare: Disk, offset: int, size: int) -> None:
    bare.negotiate()
    whole = bare.get_config(0, BlkConfig.SIZE).payload[CONFIG.size :]
    reply = bare.get_config(offset, size)
    assert CONFIG.unpack(reply.payload[: CONFIG.size])[:2] == (offset, size)
    padded = whole + bytes(offset + size)
    assert reply.payload[CONFIG.size :] == padded[offset : offset + size]


def test_the_configuration_far_outside_reads_as_zeroes(bare: Disk) -> None:
    bare.negotiate()
    reply = bare.get_config(0xFFFFFFF0, 16)
    assert reply.payload[CONFIG.size :] == bytes(16)


def test_an_absurd_length_of_configuration_is_answered_with_an_empty_reply(bare: Disk) -> None:
    bare.negotiate()
    bare.channel.send(Request.GET_CONFIG, CONFIG.pack(0, 0xFFFFFFFF, 0))
    assert bare.channel.reply_to(Request.GET_CONFIG).payload == b""
    assert bare.queue_count() == 16


def test_the_configuration_cannot_be_written(bare: Disk) -> None:
    bare.negotiate()
    with pytest.raises(Refused):
        bare.command(Request.SET_CONFIG, CONFIG.pack(32, 1, 0) + b"\x01")
    assert bare.config().writeback == 0


def test_the_configuration_of_a_4k_device_says_so(
    epochd: StartDaemon, attach: Attach, loop_4k: Path
) -> None:
    disk = attach(epochd(DiskSpec(image=loop_4k)))
    config = disk.config()
    assert config.blk_size == 4096
    assert config.physical_block_exp == 0
    assert config.min_io_size == 1
    assert config.discard_sector_alignment % 8 == 0


# ---- enabling of rings --------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 2, 0x100, 0xFFFFFFFF])
def test_a_ring_may_be_enabled_before_it_is_set_up(bare: Disk, value: int) -> None:
    bare.negotiate()
    for index in range(16):
        bare.enable(index, value)
    bare.acknowledge()
    bare.share_memory()
    queue = bare.make_queue(2, 64)
    bare.set_size(2, 64)
    bare.set_base(2, 0)
    bare.set_addresses(queue)
    bare.set_call(2, queue.call_fd)
    bare.set_kick(2, queue.kick_fd)
    bare.write(0, b"\x21" * 512, queue=2)
    assert bare.read(0, 1, queue=2) == b"\x21" * 512


def test_a_disabled_ring_waits_until_it_is_enabled(shared: Daemon, attach: Attach) -> None:
    disk = attach(shared, queues=2)
    disk.enable(0, 0)
    waiting = disk.submit(Type.OUT, 0, b"\x22" * 512, kick=False)
    disk.queues[0].force_kick()
    for _ in range(20):  # the other ring goes round, this one does not
        disk.write(64, bytes(512), queue=1)
    assert disk.queues[0].used_idx == 0
    disk.enable(0, 1)
    disk.wait(waiting)
    assert disk.read(0, 1, queue=1) == b"\x22" * 512


def test_memory_may_be_shared_after_the_ring_addresses(bare: Disk) -> None:
    """libblkio and others: only the order "everything, then kick" is needed."""
    bare.negotiate()
    bare.acknowledge()
    queue = bare.make_queue(0, 64)
    bare.set_size(0, 64)
    bare.set_call(0, queue.call_fd)
    bare.share_memory()
    bare.set_addresses(queue)
    bare.set_base(0, 0)
    bare.enable(0)
    bare.set_kick(0, queue.kick_fd)
    bare.write(0, b"\x23" * 512)


def test_a_size_that_is_no_power_of_two_or_too_large_is_refused(bare: Disk) -> None:
    bare.negotiate()
    for size in (0, 3, 100, 1025, 2048, 32768, 65536, 0xFFFFFFFF):
        with pytest.raises(Refused):
            bare.set_size(0, size)
    bare.set_size(0, 1024)


def test_a_refused_message_leaves_the_session_usable(bare: Disk) -> None:
    bare.negotiate()
    with pytest.raises(Refused):
        bare.set_size(0, 7)
    bare.acknowledge()
    bare.share_memory()
    bare.start_queue(bare.make_queue(0, 64))
    bare.write(0, b"\x24" * 512)


def test_the_feature_word_is_answered_to_a_front_end_that_never_goes_on(
    shared: Daemon, attach: Attach
) -> None:
    """QEMU probes like this: connect, GET_FEATURES, hang up."""
    for _ in range(20):
        probe = attach(shared, start=False)
        assert probe.channel.ask_u64(Request.GET_FEATURES) & Feature.VERSION_1
        probe.close()
    disk = attach(shared)
    disk.write(0, bytes(512))


def test_a_reply_is_never_sent_to_a_wrong_message(bare: Disk) -> None:
    """Many questions at once are answered in their order."""
    requests = [Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM] * 40
    one = struct.Struct("=III")
    bare.channel.send_bytes(b"".join(one.pack(request, VERSION, 0) for request in requests))
    for request in requests:
        bare.channel.reply_to(request)
    assert bare.channel.quiet(0)
    bare.channel.sock.shutdown(socket.SHUT_WR)
    bare.channel.wait_hang_up()
