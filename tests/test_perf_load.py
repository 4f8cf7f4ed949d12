"""The load generator: it sends what was asked for, counts what came back, and sees what is
wrong."""

from __future__ import annotations

import collections
import itertools
import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from conftest import Attach, StartDaemon
from epochd._blkload import ffi, lib
from harness import Daemon, DiskSpec, StorageDaemon
from hypothesis import given
from hypothesis import strategies as st

from perf.load import Load, MissingError, Result, Target, UsageError, Workload, parse_size
from perf.load.__main__ import main
from perf.load.engine import counter_layout
from perf.load.options import OPS, parse_mix, parse_pattern
from perf.load.pool import compressible, from_file
from perf.load.report import HIGHEST_NS, new_histogram, total

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
BLOCK = 4096
MIX = {"read": 5, "write": 3, "zero": 1, "discard": 1}


@pytest.fixture(scope="module", params=["epochd", "qemu-storage-daemon"])
def peer(request: pytest.FixtureRequest) -> Daemon | StorageDaemon:
    """A back end of 64 MiB with several queues, for a whole module of tests."""
    name = "shared" if request.param == "epochd" else "qemu"
    daemon: Daemon | StorageDaemon = request.getfixturevalue(name)
    return daemon


def target(daemon: Daemon | StorageDaemon, **settings: Any) -> Target:
    return Target(**{"sockets": [str(daemon.socket())], "size": MIB, **settings})


def blkload(*words: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run(
        [ROOT / "perf" / "blkload", *map(str, words)],
        text=True,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )


def check_sums(result: Result, ios: int, bs: int = BLOCK) -> None:
    """All views of a result tell of the same requests."""
    assert result.failure is None
    assert result.ios == ios
    now = result.as_dict()
    assert now["bytes"] == ios * bs
    assert sum(count for _ns, count in now["histogram"]) == ios
    assert sum(count for _at, count in now["series"]) == ios
    assert sum(part["ios"] for part in now["by_op"].values()) == ios
    for part in now["by_op"].values():
        assert sum(count for _ns, count in part["histogram"]) == part["ios"]
    latency = now["latency_ns"]
    order = [latency[name] for name in ("min", "p50", "p90", "p99", "p999", "max")]
    assert order == sorted(order)
    assert latency["min"] <= latency["mean"] <= latency["max"]


# ---- Requests -------------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
@pytest.mark.parametrize("event_idx", [True, False], ids=["event-idx", "flags"])
@pytest.mark.parametrize("sleep", [False, True], ids=["poll", "eventfd"])
def test_every_operation_is_done_and_checked(
    peer: Daemon | StorageDaemon, indirect: bool, event_idx: bool, sleep: bool
) -> None:
    goal = target(
        peer, queues=2, iodepth=8, verify=True, indirect=indirect, event_idx=event_idx, compress=50
    )
    with Load(goal) as load:
        check_sums(load.run(Workload(mix={"write": 1}, once=True, sleep=sleep)), MIB // BLOCK)
        result = load.run(Workload(mix=MIX, ios=3001, sleep=sleep))
        check_sums(result, 3001)
        assert set(result.as_dict()["by_op"]) == set(OPS)
        # All was written before: nothing that is read is unknown.
        assert result.verified == result.by_op["read"].ios
        assert result.unknown == 0
        back = load.run(Workload(mix={"read": 1}, once=True, written_only=True, sleep=sleep))
        check_sums(back, MIB // BLOCK)
        assert back.verified == MIB // BLOCK
        assert bool(result.calls) == sleep


def test_every_request_reaches_the_back_end(epochd: StartDaemon) -> None:
    daemon = epochd()
    goal = target(daemon, queues=3, iodepth=5, bs=8192)
    with Load(goal) as load:
        mixed = load.run(Workload(mix=MIX, ios=1000))
        check_sums(mixed, 1000, 8192)
        check_sums(load.run(Workload(mix={"write": 1}, ios=500, pattern="zipf")), 500, 8192)
    seen = daemon.disk_info()["stats"]
    counted = [seen[name] for name in ("reads", "writes", "write-zeroes", "discards")]
    assert counted == [mixed.by_op[op].ios + 500 * (op == "write") for op in OPS]
    assert seen["write-bytes"] == seen["writes"] * 8192


def test_sequential_writes_carry_the_pool_in_order(
    peer: Daemon | StorageDaemon, attach: Attach
) -> None:
    with Load(target(peer, offset=2 * MIB, pool=MIB, compress=30, seed=9)) as load:
        check_sums(load.run(Workload(mix={"write": 1}, once=True)), MIB // BLOCK)
    disk = attach(peer)
    assert disk.read(2 * MIB // 512, MIB // 512) == compressible(MIB, 30, 9)


@pytest.mark.parametrize("op", ["zero", "discard"])
def test_zero_and_discard_cover_the_region_and_no_more(
    peer: Daemon | StorageDaemon, attach: Attach, op: str
) -> None:
    with Load(target(peer, offset=4 * MIB, size=2 * MIB)) as load:
        load.run(Workload(mix={"write": 1}, once=True))
    with Load(target(peer, offset=4 * MIB + 65536, size=MIB, bs=65536)) as load:
        check_sums(load.run(Workload(mix={op: 1}, once=True)), 16, 65536)
    data = attach(peer).read(4 * MIB // 512, 2 * MIB // 512)
    before, inside, after = data[:65536], data[65536 : 65536 + MIB], data[65536 + MIB :]
    assert inside == bytes(MIB)
    assert all(
        any(part[at : at + BLOCK]) for part in (before, after) for at in range(0, len(part), BLOCK)
    )


def test_several_disks_are_loaded_alike(epochd: StartDaemon, attach: Attach) -> None:
    daemon = epochd(DiskSpec("one"), DiskSpec("two", size=32 * MIB))
    sockets = [str(daemon.socket(i)) for i in range(2)]
    with Load(Target(sockets=sockets, queues=2, size=MIB, verify=True)) as load:
        check_sums(load.run(Workload(mix={"write": 1}, once=True)), 2 * MIB // BLOCK)
        check_sums(load.run(Workload(mix={"read": 1}, ios=400)), 400)
    for disk in range(2):
        data = attach(daemon, disk).read(0, MIB // 512)
        assert all(any(data[at : at + 512]) for at in range(0, MIB, BLOCK))


def test_a_seed_fixes_order_and_number(peer: Daemon | StorageDaemon, attach: Attach) -> None:
    def blocks(seed: int) -> set[int]:
        with Load(target(peer, size=4 * MIB, iodepth=4)) as load:
            load.run(Workload(mix={"zero": 1}, once=True))
            check_sums(load.run(Workload(ios=300, seed=seed, lockstep=True)), 300)
        with attach(peer) as disk:
            data = disk.read(0, 4 * MIB // 512)
        return {at for at in range(0, len(data), BLOCK) if any(data[at : at + BLOCK])}

    first = blocks(1)
    assert blocks(1) == first
    assert blocks(2) != first


# ---- Verification ---------------------------------------------------------------------------


def _other_sector(image: bytearray, _old: bytes) -> None:
    image[BLOCK * 7 : BLOCK * 8] = image[BLOCK * 3 : BLOCK * 4]


def _flipped(image: bytearray, _old: bytes) -> None:
    image[BLOCK * 8 - 1] ^= 1


def _stale(image: bytearray, old: bytes) -> None:
    image[BLOCK * 7 : BLOCK * 8] = old[BLOCK * 7 : BLOCK * 8]


def _gone(image: bytearray, _old: bytes) -> None:
    image[BLOCK * 7 : BLOCK * 8] = bytes(BLOCK)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (_other_sector, "another sector's block"),
        (_flipped, "its checksum is wrong"),
        (_stale, "another generation"),
        (_gone, "all zeroes"),
    ],
)
def test_a_planted_block_is_found(
    qemu: StorageDaemon, plant: Callable[[bytearray, bytes], None], words: str
) -> None:
    whole = Workload(mix={"write": 1}, once=True)
    back = Workload(mix={"read": 1}, once=True, written_only=True, errors_max=1000)
    with Load(target(qemu, verify=True)) as load:
        load.run(whole)
        old = qemu.image.read_bytes()[:MIB]
        load.run(whole)
        assert load.run(back).ok
        with qemu.image.open("r+b") as file:
            image = bytearray(file.read(MIB))
            plant(image, old)
            file.seek(0)
            file.write(image)
        result = load.run(back)
        assert result.verify_errors == 1
        assert result.verified == MIB // BLOCK - 1
        assert result.failure is not None
        assert words in result.failure
        assert f"sector {7 * BLOCK // 512} of disk 0" in result.failure


def test_what_was_zeroed_or_discarded_must_not_come_back(qemu: StorageDaemon) -> None:
    back = Workload(mix={"read": 1}, once=True, written_only=True, errors_max=1000)
    with Load(target(qemu, verify=True)) as load:
        load.run(Workload(mix={"write": 1}, once=True))
        old = qemu.image.read_bytes()[:MIB]
        for op, wrong in (("discard", 0), ("zero", MIB // BLOCK)):
            load.run(Workload(mix={op: 1}, once=True))
            assert load.run(back).ok
            with qemu.image.open("r+b") as file:
                file.write(old)
            # A discarded block may keep its data; a zeroed one may not.
            assert load.run(back).verify_errors == wrong


def test_a_later_process_checks_what_an_earlier_one_wrote(agent: Daemon, attach: Attach) -> None:
    common = ["--socket", agent.socket(), "--size", "1M", "--verify", "--ios", MIB // BLOCK]
    assert blkload(*common, "--rw", "write").returncode == 0
    again = blkload(*common, "--rw", "read", "--json", "-")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["verified"] == MIB // BLOCK
    disk = attach(agent)
    disk.write(5 * 8, disk.read(6 * 8, 8))
    disk.close()
    wrong = blkload(*common, "--rw", "read")
    assert wrong.returncode == 1
    assert "wrong data at sector 40 of disk 0: it is another sector's block" in wrong.stderr


# ---- Limits and phases ----------------------------------------------------------------------


def test_a_rate_is_never_exceeded(peer: Daemon | StorageDaemon) -> None:
    with Load(target(peer, queues=2)) as load:
        result = load.run(Workload(rate=2000, seconds=0.3))
        assert 0 < result.ios <= 0.3 * 2000 + 1
        result = load.run(Workload(rate=1000, ios=100))
        check_sums(result, 100)
        assert result.seconds >= 0.098


def test_a_ramp_is_not_counted(peer: Daemon | StorageDaemon) -> None:
    with Load(target(peer)) as load:
        result = load.run(Workload(rate=400, ios=200, ramp=0.25))
        check_sums(result, result.ios)
        # Half of them were due after the ramp.
        assert 100 <= result.ios < 200


def test_marks_cut_a_run_into_phases(peer: Daemon | StorageDaemon) -> None:
    with Load(target(peer)) as load:
        load.start(Workload(mix={"write": 1}))
        load.mark("first")
        before, _bad, _flying = load.progress()
        while load.progress()[0] < before + 1000:
            pass
        load.mark("second")
        load.stop()
        result = load.result()
        assert result.ended == "stopped"
        assert [name for name, _seconds, _ops in result.phases] == ["first", "second"]
        first, second = (total(list(ops.values())) for _name, _seconds, ops in result.phases)
        assert 0 <= result.ios - first.ios - second.ios < result.ios
        assert first.ios >= 1000
        assert [phase["ios"] for phase in result.as_dict()["phases"]] == [first.ios, second.ios]
        check_sums(result, result.ios)


# ---- Choice of blocks -----------------------------------------------------------------------


def draw(pattern: int, blocks: int, count: int, *, theta: float = 0.99, seed: int = 1) -> list[int]:
    out = ffi.new("uint64_t[]", count)
    lib.load_draw(pattern, theta, seed, blocks, out, count)
    return ffi.unpack(out, count)


@pytest.mark.parametrize("theta", [0.5, 0.99, 1.0, 1.5])
def test_zipf_falls_off_as_its_exponent_says(theta: float) -> None:
    blocks, count = 1000, 400_000
    seen = collections.Counter(draw(lib.LOAD_ZIPF, blocks, count, theta=theta))
    assert all(0 <= block < blocks for block in seen)
    ranked = [number for _block, number in seen.most_common()]
    norm = sum(rank**-theta for rank in range(1, blocks + 1))
    for rank in (1, 2, 4, 16):
        assert ranked[rank - 1] / count == pytest.approx(rank**-theta / norm, rel=0.08)
    # Hot blocks are no neighbours.
    hottest = sorted(block for block, _number in seen.most_common(8))
    assert min(b - a for a, b in itertools.pairwise(hottest)) > 1


@given(st.integers(1, 1 << 45), st.floats(0.01, 8), st.integers(0, (1 << 64) - 1))
def test_any_zipf_stays_inside(blocks: int, theta: float, seed: int) -> None:
    drawn = draw(lib.LOAD_ZIPF, blocks, 50, theta=theta, seed=seed)
    assert all(0 <= block < blocks for block in drawn)
    assert drawn == draw(lib.LOAD_ZIPF, blocks, 50, theta=theta, seed=seed)


def test_random_blocks_are_spread_evenly() -> None:
    blocks, count = 64, 64_000
    seen = collections.Counter(draw(lib.LOAD_RANDOM, blocks, count))
    assert len(seen) == blocks
    # The seed is fixed; 4 per cent is one standard deviation.
    assert all(abs(number - 1000) < 160 for number in seen.values())
    assert draw(lib.LOAD_RANDOM, blocks, 50, seed=2) != draw(lib.LOAD_RANDOM, blocks, 50)
    assert draw(lib.LOAD_SEQUENTIAL, 3, 7) == [0, 1, 2, 0, 1, 2, 0]


@given(st.integers(0, HIGHEST_NS))
def test_latencies_land_where_hdrhistogram_counts_them(ns: int) -> None:
    histogram = new_histogram()
    histogram.record_value(ns)
    assert histogram.counts[lib.load_counter_of(counter_layout(ffi.new("load_config *")), ns)] == 1


# ---- Data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [0, 25, 50, 90, 100])
def test_data_compresses_as_asked(percent: int) -> None:
    data = compressible(MIB, percent, 1)
    assert len(data) == MIB
    assert data == compressible(MIB, percent, 1)
    assert data != compressible(MIB, percent, 2)
    packed = sum(len(zstandard.compress(data[at : at + BLOCK], 3)) for at in range(0, MIB, BLOCK))
    assert 1 - packed / MIB == pytest.approx(percent / 100, abs=0.05)


def test_blocks_of_a_file_go_to_their_places(
    peer: Daemon | StorageDaemon, attach: Attach, tmp_path: Path
) -> None:
    file = tmp_path / "image"
    contents = compressible(MIB, 0, 7)
    file.write_bytes(contents)
    goal = target(peer, data=str(file), pool=MIB, in_place=True)
    with Load(goal) as load:
        assert load.run(Workload(once=True, pattern="seq")).failure is None
        assert load.run(Workload(ios=500)).failure is None
    assert attach(peer).read(0, MIB // 512) == contents


def test_data_comes_from_all_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"".join(number.to_bytes(4, "big") * 1024 for number in range(1024)))
    data = from_file(str(file), MIB)
    numbers = {int.from_bytes(data[at : at + 4], "big") for at in range(0, MIB, BLOCK)}
    assert len(data) == MIB
    assert min(numbers) == 0
    assert max(numbers) == 1023
    file.write_bytes(b"short")
    assert from_file(str(file), 12) == b"shortshortsh"


# ---- What goes wrong ------------------------------------------------------------------------


def test_a_killed_back_end_ends_the_run(epochd: StartDaemon) -> None:
    daemon = epochd()
    with Load(target(daemon)) as load:
        load.start(Workload(mix={"read": 1}))
        while load.progress()[0] < 100:
            pass
        daemon.stop("kill")
        result = load.result()
        assert result.ended == "lost"
        assert result.failure == f"{daemon.socket()}: the back end hung up during the run"
        assert load.run(Workload()).ended == "lost"


def test_the_command_fails_when_the_back_end_dies(qemu_alone: StorageDaemon) -> None:
    words = ["--socket", qemu_alone.socket(), "--size", "1M", "--seconds", "60", "--progress"]
    with subprocess.Popen(
        [ROOT / "perf" / "blkload", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert "in flight" in process.stderr.readline()
        qemu_alone.process.kill()
        rest = process.stderr.read()
    assert process.returncode == 1
    assert "hung up during the run" in rest


@pytest.fixture
def qemu_alone(tmp_path: Path) -> Iterator[StorageDaemon]:
    """One that the test may kill."""
    daemon = StorageDaemon(tmp_path)
    yield daemon
    daemon.close()


def test_missing_things_are_told_plainly(
    agent: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(status: int, words: str, *options: object, socket: Path | None = None) -> None:
        command = ["--socket", socket or agent.socket(), "--ios", 1, *options]
        try:
            ended = main([str(word) for word in command])
        except SystemExit as error:
            ended = int(error.code or 0)
        told = capsys.readouterr()
        assert (ended, told.out) == (status, "")
        assert words in told.err

    nowhere = tmp_path / "none.sock"
    refused(3, f"cannot connect to {nowhere}: there is no such socket", socket=nowhere)
    refused(3, "is this a vhost-user-blk socket?", socket=agent.control_path)
    refused(2, "is given twice", "--socket", agent.socket())
    refused(2, "lower --queues", "--queues", 99)
    refused(2, "needs a ring of 2000 entries", "--iodepth", 2000)
    refused(2, "--bs 1000: give a multiple of 512", "--bs", 1000)
    refused(2, "hold no request", "--offset", "64M")
    refused(2, "hold no request", "--size", "1T")
    refused(2, "not OPERATION=WEIGHT", "--rw", "mix", "--mix", "read=1,format=2")
    refused(2, "--mix belongs to --rw mix", "--mix", "read=1")
    refused(2, "is no size", "--bs", "4q")
    refused(2, "give seq, rand, zipf", "--pattern", "zipf:-1")
    refused(3, "No such file", "--data", tmp_path / "none")
    refused(2, "give per cent", "--compress", 101)


def test_a_read_only_disk_takes_reads_only(epochd: StartDaemon) -> None:
    daemon = epochd(DiskSpec(read_only=True))
    with Load(target(daemon)) as load:
        check_sums(load.run(Workload(mix={"read": 1}, ios=100)), 100)
        with pytest.raises(UsageError, match="read-only"):
            load.start(Workload(mix={"read": 1, "write": 1}))


class Device:
    """The other side of one ring, played by the test: a back end that breaks the rules, as no real
    one does. `answer(heads)` gets the heads that are available and returns (head, status) pairs
    to be used, or an index by which the used index shall jump."""

    SIZE = 8
    DEPTH = 4
    DESC, AVAIL, USED, SLOTS, BUFFERS, POOL = (MIB // 8 * place for place in range(6))

    def __init__(self, answer: Callable[[list[int]], list[tuple[int, int]] | int]) -> None:
        self.answer = answer
        self.memory = mmap.mmap(-1, MIB)
        self.kick = os.eventfd(0)
        config = counter_layout(ffi.new("load_config *"))
        config.memory = ffi.cast("uint8_t *", ffi.from_buffer("char[]", self.memory))
        config.depth, config.block_bytes, config.buffer_bytes = self.DEPTH, 512, 512
        config.pool, config.pool_blocks = self.POOL, 1
        queue = {
            "size": self.SIZE,
            "indirect": 1,
            "kick_fd": self.kick,
            "call_fd": -1,
            "desc": self.DESC,
            "avail": self.AVAIL,
            "used": self.USED,
            "slots": self.SLOTS,
            "buffers": self.BUFFERS,
        }
        text = ffi.new("char[]", lib.LOAD_TEXT_MAX)
        disks = ffi.new("load_disk_config[]", [{"sector": 0, "blocks": 100}])
        queues = ffi.new("load_queue_config[]", [queue])
        self.load = lib.load_create(config, disks, 1, queues, 1, text)
        assert self.load

    def _word(self, at: int) -> int:
        return int.from_bytes(self.memory[at : at + 2], "little")

    def _serve(self) -> None:
        os.eventfd_read(self.kick)
        heads = [self._word(self.AVAIL + 4 + 2 * i) for i in range(self._word(self.AVAIL + 2))]
        used = self.answer(heads)
        if isinstance(used, list):
            for place, (head, status) in enumerate(used):
                at = self.USED + 4 + 8 * place
                self.memory[at : at + 8] = head.to_bytes(4, "little") + bytes(4)
                if head < self.DEPTH:
                    self.memory[self.SLOTS + lib.LOAD_SLOT_BYTES * head + 112] = status
            used = len(used)
        self.memory[self.USED + 2 : self.USED + 4] = used.to_bytes(2, "little")

    def run(self) -> tuple[int, Any, str]:
        """Four requests: how the run ended, its state, its text."""
        device = threading.Thread(target=self._serve)
        device.start()
        work = ffi.new("load_workload *")
        work.weight[lib.LOAD_WRITE] = 1
        work.ios, work.intervals, work.interval_ns, work.errors_max = self.DEPTH, 1, 1, 3
        work.stuck_ns = 200_000_000
        ended = lib.load_run(self.load, work)
        device.join()
        state = ffi.new("load_state *")
        lib.load_peek(self.load, state)
        lib.load_free(self.load)
        os.close(self.kick)
        return ended, state, ffi.string(state.text).decode()


def test_a_device_that_plays_by_the_rules() -> None:
    ended, state, text = Device(lambda heads: [(head, 0) for head in reversed(heads)]).run()
    assert (ended, text) == (lib.LOAD_ENDED, "")
    assert state.ios[lib.LOAD_WRITE] == Device.DEPTH


def test_failed_requests_are_counted_and_end_the_run() -> None:
    ended, state, text = Device(lambda heads: [(head, head and 1) for head in heads]).run()
    assert ended == lib.LOAD_FAILED
    assert (state.errors, sum(state.ios)) == (3, 1)
    assert text == "write of 512 bytes at sector 1 of disk 0 ended with status 1 (IOERR)"


@pytest.mark.parametrize(
    ("used", "words"),
    [
        ([(99, 0)], "was not in flight"),
        ([(0, 0), (0, 0)], "was not in flight"),
        (5, "more is used than was available"),
        (65535, "more is used than was available"),
        ([], "no request was done for 0.2 s, 4 are in flight"),
    ],
)
def test_a_device_that_breaks_the_rules(used: list[tuple[int, int]] | int, words: str) -> None:
    ended, _state, text = Device(lambda _heads: used).run()
    assert ended == lib.LOAD_LOST
    assert words in text


def test_a_status_that_was_never_written_is_an_error() -> None:
    ended, _state, text = Device(lambda heads: [(head, 0xFF) for head in heads]).run()
    assert ended == lib.LOAD_FAILED
    assert "status 255 (not a status)" in text


# ---- Words ----------------------------------------------------------------------------------


def test_words_of_the_command_line() -> None:
    assert [parse_size(text) for text in ("512", "4k", "4KiB", "1M", "2g")] == [
        512,
        4096,
        4096,
        MIB,
        2 << 30,
    ]
    assert parse_mix("read=70,discard=30") == {"read": 70, "discard": 30}
    assert parse_pattern("zipf:1.2") == ("zipf", 1.2)
    for parse, text in ((parse_mix, "read=0"), (parse_mix, "read=1,read=2"), (parse_size, "-1")):
        with pytest.raises(UsageError):
            parse(text)


def test_json_is_written_with_what_was_asked_for(agent: Daemon, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = blkload("--socket", agent.socket(), "--ios", 64, "--seed", 3, "--json", out)
    assert done.returncode == 0
    assert "write" in done.stdout
    data = json.loads(out.read_text())
    assert (data["ios"], data["options"]["seed"], data["kernel"]) == (64, 3, os.uname().release)
    missing = blkload("--socket", agent.socket(), "--ios", 1, "--json", tmp_path / "no" / "x")
    assert missing.returncode == 3


def test_without_its_c_part_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "epochd").mkdir()
    (tmp_path / "epochd" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "perf.load", "--socket", "x"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3
    assert "run tools/setup" in done.stderr


def test_shared_memory_without_room_is_told(agent: Daemon) -> None:
    with pytest.raises(MissingError, match=r"no room for|cannot be mapped"):
        Load(target(agent, pool=1 << 50))
