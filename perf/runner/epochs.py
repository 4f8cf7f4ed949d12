"""Commits, seals, discards, and writes under a stream of checkpoints.

Commit: time from sending `epoch-commit` until the answer is here, measured at the control
socket; filling and sealing the epoch is not counted. The next one begins when apply is done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from . import fio, show
from .agent import Agent
from .bench import GIB, KIB, MIB, Bench, Context
from .colo import Colo
from .failures import FailedError
from .load import blocks_of, job
from .nbd import NbdWriter
from .peers import StorageDaemon
from .qmp import Qmp
from .result import Sample, Target
from .stats import quantile

WORKING_SET = 64 * MIB
COLO_DISK = GIB
NBD_BLOCKS = 512


def fio_peer(
    context: Context, size: int, measure: Callable[[], float]
) -> Callable[[], Sample] | None:
    """A measurement with fio on a file of `size` bytes beside the image; None: skipped."""

    def start() -> Callable[[], Sample]:
        fio.available()
        context.say("preparing fio's file")
        fio.prepare(context.folder / "fio.dat", size)
        return lambda: Sample(measure())

    return context.peer(start)


# ---- commit ------------------------------------------------------------------------------


def commit(context: Context, compressed: bool) -> None:
    """Bandwidth of a commit in MiB of the guest's data a second, against fio's of the same
    amount. Compressed: the guest fills the epoch at a rate at which a VM may write, while the
    helper compresses; the commit comes right behind the last write."""
    size = context.size("epoch", GIB, 256 * MIB)
    image = context.sparse("disk.img", size)
    agent = context.agent(image, arena=size + size // 2, pinned=False)
    context.trust(agent)
    fill = job(rw="write", bs="64k", iodepth=8, bytes=size, size=size)
    if compressed:
        rate = context.size("fill_mib_s", 128, 128)
        fill |= job(rate=rate * MIB // (64 * KIB), eventfd=True)
        fill |= blocks_of(context.fs_image().path, size)
    else:
        fill |= job(compress=0)
    file = context.folder / "fio.dat"
    theirs = fio_peer(context, size, lambda: fio.sequential_write_mib_s(file, size, None))

    def ours() -> Sample:
        before = agent.group_stats()["journal-bytes-written"]
        context.load(agent, agent.socket, **fill)
        agent.seal()
        seconds = agent.commit()
        stats = agent.group_stats()
        agent.await_applied()
        return Sample(
            size / MIB / seconds,
            {
                "seconds": seconds,
                "core_seconds": stats["commit-ns-last"] / 1e9,
                "journal_bytes": stats["journal-bytes-written"] - before,
                "apply_seconds": agent.group_stats()["apply-ns-last"] / 1e9,
            },
        )

    context.say("first round: the journal's blocks are written for the first time")
    rounds = 1 if context.quick else 3
    for _ in range(rounds):
        ours()
    context.pairs(ours, theirs, show.bandwidth)


def small_commit(context: Context) -> None:
    """Time of the commit of an epoch of 64 KiB, against one write of as much and fdatasync."""
    count = context.size("commits", 60, 12)
    image = context.sparse("disk.img", GIB)
    agent = context.agent(image, arena=64 * MIB, pinned=False)
    context.trust(agent)
    file = context.folder / "fio.dat"
    theirs = fio_peer(
        context, 256 * MIB, lambda: 1e6 * fio.write_and_sync_s(file, 64 * KIB, count * 4, None)
    )

    def ours() -> Sample:
        times, core = [], []
        for number in range(count):
            context.load(
                agent,
                agent.socket,
                rw="randwrite",
                bs="4k",
                iodepth=16,
                ios=16,
                size=GIB,
                seed=number + 1,
            )
            agent.seal()
            times.append(1e6 * agent.commit())
            core.append(agent.group_stats()["commit-ns-last"] / 1e3)
            agent.await_applied()
        return Sample(
            quantile(times, 0.5),
            {
                "p99_us": quantile(times, 0.99),
                "core_p50_us": quantile(core, 0.5),
                "core_p99_us": quantile(core, 0.99),
            },
        )

    ours()
    context.pairs(ours, theirs, show.microseconds)


# ---- seal and discard --------------------------------------------------------------------


def seal(context: Context) -> None:
    """The 99th percentile of what a seal takes in the agent, under load and of all sizes.

    The core's own clock, from the arrival of the command to the new open epoch: that is how
    long writes stand still. The time at the control socket is beside it in the figures."""
    count = context.size("seals", 1000, 200)
    large = context.size("large_epoch", GIB, 256 * MIB)
    image = context.sparse("disk.img", GIB)
    agent = context.agent(image, arena=2 * large, level=0)
    context.trust(agent)
    socket_times: list[float] = []

    def one() -> float:
        answer, nanoseconds = agent.qmp.timed("epoch-seal")
        socket_times.append(nanoseconds / 1e3)
        assert answer["epoch"]
        return float(agent.group_stats()["seal-ns-last"]) / 1e3

    def under_load() -> list[float]:
        times = []
        seconds = count * 0.004 + 1
        with context.background(
            agent,
            agent.socket,
            rw="randwrite",
            bs="4k",
            iodepth=32,
            rate=20000,
            seconds=seconds,
            size=GIB,
        ) as load:
            time.sleep(0.3)
            for number in range(count):
                times.append(one())
                if number % 50 == 49:
                    agent.discard()
                time.sleep(0.002)
                load.running()
            load.result()
        agent.discard()
        return times

    def of_size(size: int) -> list[float]:
        context.load(agent, agent.socket, rw="write", bs="64k", iodepth=8, bytes=size, size=size)
        times = [one()]
        agent.discard()
        return times

    def ours() -> Sample:
        socket_times.clear()
        times = under_load()
        large_times = {show.size(n): of_size(n) for n in (64 * KIB, 16 * MIB, large)}
        for extra in large_times.values():
            times += extra
        return Sample(
            quantile(times, 0.99),
            {
                "p50_us": quantile(times, 0.5),
                "max_us": max(times),
                "seals": len(times),
                "of_size_us": {name: values[0] for name, values in large_times.items()},
                "socket_p50_us": quantile(socket_times, 0.5),
                "socket_p99_us": quantile(socket_times, 0.99),
            },
        )

    context.pairs(ours, None, show.microseconds)
    context.row.figures["socket_p99_us"] = context.row.details[-1]["ours"]["socket_p99_us"]


def discard(context: Context) -> None:
    """Time until the discard of a large epoch is answered, at the control socket."""
    size = context.size("epoch", GIB, 256 * MIB)
    image = context.sparse("disk.img", GIB)
    agent = context.agent(image, arena=size + size // 2, level=0)
    context.trust(agent)

    def ours() -> Sample:
        context.load(agent, agent.socket, rw="write", bs="4k", iodepth=32, bytes=size, size=size)
        return Sample(1e6 * agent.discard())

    ours()
    context.pairs(ours, None, show.microseconds)


# ---- a stream of checkpoints ---------------------------------------------------------------


@dataclass
class Checkpoints:
    """Takes checkpoints on time, as a controller does: one thread seals at its ticks, another
    commits whatever is sealed, so that a slow commit makes the next one larger, not the tick
    later. Times in us."""

    agent: Agent
    a_second: float
    seal_us: list[float] = field(default_factory=list)
    commit_us: list[float] = field(default_factory=list)
    late: int = 0
    error: FailedError | None = None

    def __enter__(self) -> Checkpoints:
        self._over = threading.Event()
        self._sealed = threading.Semaphore(0)
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,))
            for work in (self._seal, self._commit)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._sealed.release()
        for thread in self._threads:
            thread.join()

    def _guarded(self, work: Callable[[Qmp], None]) -> None:
        try:
            qmp = Qmp(self.agent.control_path)
            try:
                work(qmp)
            finally:
                qmp.close()
        except FailedError as error:
            self.error = error
            self._over.set()
            self._sealed.release()

    def _seal(self, qmp: Qmp) -> None:
        period = 1 / self.a_second
        tick = time.monotonic() + period
        while not self._over.wait(max(0.0, tick - time.monotonic())):
            self.seal_us.append(qmp.timed("epoch-seal")[1] / 1e3)
            self._sealed.release()
            tick += period
            while tick < time.monotonic():  # we were not run in time
                tick += period
                self.late += 1

    def _commit(self, qmp: Qmp) -> None:
        while True:
            self._sealed.acquire()
            if self._over.is_set():
                return
            while self._sealed.acquire(blocking=False):
                pass
            self.commit_us.append(qmp.timed("epoch-commit")[1] / 1e3)

    def detail(self, seconds: float) -> dict[str, float]:
        return {
            "seals_a_second": len(self.seal_us) / seconds,
            "commits_a_second": len(self.commit_us) / seconds,
            "late": self.late,
            "commit_p50_us": quantile(self.commit_us, 0.5),
            "commit_p99_us": quantile(self.commit_us, 0.99),
            "seal_p99_us": quantile(self.seal_us, 0.99),
        }


def checkpointed(context: Context, agent: Agent, a_second: float) -> Sample:
    """The working set under random writes for a while, with checkpoints or (0) without."""
    seconds = context.pick(5.0, 2.0)
    before = agent.group_stats()
    options = job(
        rw="randwrite",
        bs="4k",
        iodepth=32,
        seconds=seconds,
        ramp=0.5,
        size=WORKING_SET,
        **blocks_of(context.fs_image().path, WORKING_SET),
    )
    with context.background(agent, agent.socket, **options) as load:
        if a_second:
            with Checkpoints(agent, a_second) as checkpoints:
                while load.running() and checkpoints.error is None:
                    time.sleep(0.01)
            if checkpoints.error is not None:
                agent.check()
                raise checkpoints.error
        result = load.result()
    after = agent.group_stats()
    agent.discard()
    agent.await_applied()
    detail = result.short()
    for name in ("journal-bytes-written", "image-bytes-written"):
        detail[name.replace("-", "_")] = after[name] - before[name]
    if a_second:
        detail |= checkpoints.detail(seconds + 0.5)
    return Sample(result.iops, detail, result.histogram)


def checkpoint_agent(context: Context) -> Agent:
    """The agent for a stream of checkpoints: all as it comes out of the box, but for room."""
    context.row.settings["working_set_bytes"] = WORKING_SET
    image = context.folder / "disk.img"
    fio.prepare(image, WORKING_SET)
    agent = context.agent(image, arena=GIB, pinned=False)
    context.trust(agent)
    context.fs_image()
    return agent


def checkpoints(context: Context, a_second: int) -> None:
    """Writes a second under checkpoints, against the same without."""
    agent = checkpoint_agent(context)
    checkpointed(context, agent, a_second)
    context.pairs(
        lambda: checkpointed(context, agent, a_second),
        lambda: checkpointed(context, agent, 0),
        show.rate,
    )
    reached = [d["ours"]["seals_a_second"] for d in context.row.details]
    lowest = min(reached)
    context.row.figures["checkpoints_a_second_reached"] = lowest
    if lowest < 0.9 * a_second:
        context.row.notes.append(f"only {lowest:.0f} of {a_second} checkpoints a second")


def colo(context: Context) -> None:
    """Writes a second with ten checkpoints in each, against COLO's secondary."""
    agent = checkpoint_agent(context)
    seconds = context.pick(5.0, 2.0)
    with context.fs_image().path.open("rb") as file:
        file.seek(context.row.settings["data_image_bytes"] // 2)
        blocks = [file.read(4096) for _ in range(NBD_BLOCKS)]

    def start() -> Colo:
        disk = context.folder / "colo.raw"
        context.say("writing COLO's disk")
        fio.prepare(disk, COLO_DISK)
        peer = context.serving(Colo(context.folder, disk, context.options.agent_cpus)).start()
        context.row.figures["nbd_client_limit_iops"] = client_limit(context, blocks)
        return peer

    peer = context.peer(start)

    def theirs() -> Sample:
        assert peer is not None
        result = peer.run(seconds=seconds, a_second=10, depth=32, region=WORKING_SET, blocks=blocks)
        return Sample(
            result.iops,
            {
                "checkpoints_a_second": result.checkpoints / seconds,
                "paused_seconds": result.paused_s,
            },
        )

    checkpointed(context, agent, 10)
    context.pairs(lambda: checkpointed(context, agent, 10), theirs if peer else None, show.rate)


def client_limit(context: Context, blocks: list[bytes]) -> float:
    """What our NBD client reaches against a server that stores nothing: COLO, not the client,
    has to be the limit."""
    server = StorageDaemon(context.folder, None, COLO_DISK, context.options.agent_cpus)
    try:
        server.start_nbd()
        writer = NbdWriter(server.socket, "disk", region=WORKING_SET, blocks=blocks)
        count = writer.write_until(time.monotonic() + 0.5, 32)
        writer.close()
        server.terminate()
    finally:
        server.close()
    return count / 0.5


def benches() -> list[Bench]:
    """In the order of the table."""
    ratio = partial(Target, "ratio")
    return [
        Bench(
            "commit-1g",
            "commit of 1 GiB, incompressible",
            "MiB/s",
            ("fio",),
            ratio("at least", 0.9),
            partial(commit, compressed=False),
        ),
        Bench(
            "commit-1g-compressed",
            "commit of 1 GiB of a file system, compressed meanwhile",
            "MiB/s",
            ("fio",),
            ratio("at least", 2.0),
            partial(commit, compressed=True),
        ),
        Bench(
            "commit-64k", "commit of 64 KiB", "us", ("fio",), ratio("at most", 1.3), small_commit
        ),
        Bench(
            "seal",
            "seal, any size, 99th percentile",
            "us",
            ("none",),
            Target("value", "at most", 50),
            seal,
        ),
        Bench(
            "discard-1g",
            "discard of 1 GiB",
            "us",
            ("none",),
            Target("value", "at most", 1000),
            discard,
        ),
        Bench(
            "checkpoints-10",
            "random writes with 10 checkpoints a second",
            "IOPS",
            ("self",),
            ratio("at least", 0.8),
            partial(checkpoints, a_second=10),
        ),
        Bench(
            "checkpoints-100",
            "random writes with 100 checkpoints a second",
            "IOPS",
            ("self",),
            ratio("at least", 0.8),
            partial(checkpoints, a_second=100),
        ),
        Bench(
            "colo",
            "the same with 10 checkpoints a second",
            "IOPS",
            ("colo",),
            ratio("at least", 20),
            colo,
        ),
    ]
