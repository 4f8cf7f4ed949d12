"""How cost and memory grow: the arena's ratio, huge images and epochs, restart."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import fio, show
from .agent import Agent
from .bench import GIB, KIB, MIB, Bench, Context, of_load
from .failures import FailedError, MissingError
from .load import blocks_of
from .process import Server
from .result import Sample, Target
from .stats import quantile

TIB = 1 << 40
SETTLE_SECONDS = 60.0
QUIET_SECONDS = 1.0
COMPRESSION = ("ratio", "pack-ns", "clusters", "merges", "merged-blocks", "dictionary")
WAKES = 1000


def arena_ratio(context: Context) -> None:
    """Bytes of the guest through bytes of memory, whole segments and index counted, after
    random 4 KiB writes of a file system's blocks, once compression has nothing more to do."""
    data = context.fs_image()
    arena = data.size + data.size // 4
    blocks = data.size // 4096
    image = context.sparse("disk.img", data.size)
    agent = context.agent(image, arena=arena, pinned=False)
    context.trust(agent)

    def ours() -> Sample:
        context.load(
            agent,
            agent.socket,
            rw="randwrite",
            bs="4k",
            iodepth=32,
            ios=blocks,
            size=data.size,
            **blocks_of(data.path, data.size),
        )
        status = settle(agent)
        compression = agent.compression()
        memory = status["arena"]["used"] + status["index-bytes"]
        sample = Sample(
            status["logical-bytes"] / memory,
            {
                "logical_bytes": status["logical-bytes"],
                "arena_bytes": status["arena"]["used"],
                "frame_bytes": status["stored-bytes"],
                "index_bytes": status["index-bytes"],
                **{name: compression[name] for name in COMPRESSION},
            },
        )
        agent.discard()
        return sample

    context.pairs(ours, None, show.times)


def settle(agent: Agent) -> dict[str, Any]:
    """Wait until the packer has had nothing to do for a second; returns the status."""
    deadline = time.monotonic() + SETTLE_SECONDS
    last, since = agent.compression(), time.monotonic()
    while time.monotonic() < deadline and time.monotonic() - since < QUIET_SECONDS:
        time.sleep(0.05)
        now = agent.compression()
        if now != last or now["pack-queue"] > 0 or now["merge-queue"] > 0:
            last, since = now, time.monotonic()
    return agent.status()


def _write_cost(context: Context, agent: Agent, ios: int, region: int) -> Sample:
    """Nanoseconds a write, at depth 32 in a region."""
    result = context.random_writes(agent, iodepth=32, ios=ios, size=region)
    return of_load(result, result.seconds * 1e6 / result.ios)


def big_image(context: Context) -> None:
    """Cost of a write to a sparse image of 16 TiB, against one of 1 GiB."""
    # ext4 ends one block before 16 TiB.
    size = context.size("image", 16 * TIB - MIB, 16 * TIB - MIB)
    ios = context.size("ios", 1_000_000, 300_000)
    arena = context.size("arena", 5 * GIB, 2 * GIB)
    large = context.agent(context.sparse("large.img", size), arena=arena, level=0, folder="large")
    small = context.agent(context.sparse("small.img", GIB), arena=arena, level=0, folder="small")

    def cost(agent: Agent, region: int) -> Callable[[], Sample]:
        def measure() -> Sample:
            sample = _write_cost(context, agent, ios, region)
            agent.discard()
            return sample

        return measure

    ours, theirs = cost(large, size), cost(small, GIB)
    ours()
    theirs()
    context.pairs(ours, theirs, show.microseconds)


def big_epoch(context: Context) -> None:
    """Cost of a write into an epoch of 8 GiB, against one into an epoch of 1 MiB."""
    size = context.size("epoch", 8 * GIB, 2 * GIB)
    ios = context.size("ios", 1_000_000, 300_000)
    arena = size + context.size("spare", 5 * GIB, 2 * GIB)
    if context.quick:
        context.row.notes.append("epoch of 2 GiB instead of 8 GiB")
    agent = context.agent(context.sparse("disk.img", size), arena=arena, level=0)

    def ours() -> Sample:
        context.load(agent, agent.socket, rw="write", bs="64k", iodepth=8, bytes=size, size=size)
        sample = _write_cost(context, agent, ios, size)
        agent.discard()
        return sample

    def theirs() -> Sample:
        sample = _write_cost(context, agent, ios, MIB)
        agent.discard()
        return sample

    context.say("touching the arena's pages")
    ours()
    context.pairs(ours, theirs, show.microseconds)


def restart(context: Context) -> None:
    """Time of a start after kill -9, until the sockets answer, with an arena full of raw 4 KiB
    frames. All of it counts, the interpreter's start too; the start with an empty arena is
    beside it in the figures, the difference is the re-indexing."""
    arena = GIB
    fill = int(arena * 0.9) // (4 * KIB) * (4 * KIB)
    image = context.sparse("disk.img", GIB)
    agent = context.agent(image, arena=arena, level=0)

    def start() -> float:
        agent.kill()
        begin = time.perf_counter()
        agent.start()
        return time.perf_counter() - begin

    def ours() -> Sample:
        agent.discard()
        empty = start()
        context.load(agent, agent.socket, rw="write", bs="4k", iodepth=32, bytes=fill, size=fill)
        before = agent.status()["logical-bytes"]
        full = start()
        after = agent.status()["logical-bytes"]
        if after != before or after < fill:
            raise FailedError(f"{before} bytes before the kill, {after} after the restart")
        return Sample(full * 1e6, {"full_s": full, "empty_s": empty})

    context.pairs(ours, None, show.microseconds)
    differences = [d["ours"]["full_s"] - d["ours"]["empty_s"] for d in context.row.details]
    context.row.figures["more_than_empty_s"] = round(quantile(differences, 0.5), 4)


def idle(context: Context) -> None:
    """Share of a core that an attached but idle agent uses, in percent."""
    seconds = context.pick(10.0, 2.0)
    image = context.folder / "disk.img"
    fio.prepare(image, 64 * MIB)
    agent = context.agent(image, arena=64 * MIB)
    context.trust(agent)

    def ours() -> Sample:
        with context.background(
            agent,
            agent.socket,
            rw="randwrite",
            bs="4k",
            iodepth=1,
            rate=1,
            seconds=seconds + 1.5,
            size=MIB,
            eventfd=True,
        ):
            time.sleep(1)
            before = agent.cpu_seconds()
            time.sleep(seconds)
            return Sample(100 * (agent.cpu_seconds() - before) / seconds)

    context.pairs(ours, None, lambda value: f"{value:.2f} %")


def wake(context: Context) -> None:
    """Median latency of single writes that come a millisecond apart, driver and server both
    asleep in between; what that costs of a core is told beside it."""
    seconds = context.pick(5.0, 2.0)
    context.row.settings["rate"] = WAKES
    image = context.sparse("disk.img", GIB)
    agent = context.agent(image, arena=64 * MIB, level=0)
    context.trust(agent)
    peer = context.vhost_peer(GIB, image)
    shares: dict[str, list[float]] = {"ours": [], "theirs": []}

    def sample(side: str, server: Server | None, socket: Path) -> Sample:
        before = server.cpu_seconds() if server else 0.0
        result = context.load(
            server,
            socket,
            rw="randwrite",
            bs="4k",
            iodepth=1,
            rate=WAKES,
            seconds=seconds,
            size=16 * MIB,
            eventfd=True,
        )
        if server:
            shares[side].append(100 * (server.cpu_seconds() - before) / seconds)
        return of_load(result, result.latency_ns["p50"] / 1e3)

    def ours() -> Sample:
        taken = sample("ours", agent, agent.socket)
        agent.discard()
        return taken

    context.pairs(ours, partial(sample, "theirs", *peer) if peer else None, show.microseconds)
    for side, percent in shares.items():
        if percent:
            context.row.figures[f"{side}_cpu_percent"] = round(quantile(percent, 0.5), 2)


def reactors(context: Context) -> None:
    """Random writes to two disks at once, a reactor for each, against one for both."""
    cpus = context.options.agent_cpus
    if cpus is not None and len(cpus) < 2:
        raise MissingError(
            "two reactors want a CPU each, and the load another: see --agent-cpus and --load-cpus"
        )
    arena = context.size("arena", 5 * GIB, 2 * GIB)
    ios = context.size("ios", 1_000_000, 300_000)

    def started(count: int) -> Agent:
        folder = f"reactors-{count}"
        images = [context.sparse(f"{folder}.{number}.img", GIB) for number in range(2)]
        return context.agent(
            images[0], more=images[1:], arena=arena, level=0, reactors=count, folder=folder
        )

    two, one = started(2), started(1)
    context.trust(two)

    def sample(agent: Agent) -> Sample:
        result = context.random_writes(
            agent, iodepth=32, bytes=ios * 4 * KIB, size=GIB, socket=agent.disks[1:]
        )
        agent.discard()
        return of_load(result, result.iops)

    for agent in (two, one):
        sample(agent)
    context.pairs(lambda: sample(two), lambda: sample(one), show.rate)


def benches() -> list[Bench]:
    """In the order of the table."""
    cost = Target("ratio", "at most", 1.2)
    return [
        Bench(
            "arena-ratio",
            "guest's bytes through arena's, random 4 KiB of a file system",
            "x",
            ("none",),
            Target("value", "at least", 3.0),
            arena_ratio,
        ),
        Bench(
            "big-image",
            "time a write: image of 16 TiB to one of 1 GiB",
            "us",
            ("self",),
            cost,
            big_image,
        ),
        Bench(
            "big-epoch",
            "time a write: epoch of 8 GiB to one of 1 MiB",
            "us",
            ("self",),
            cost,
            big_epoch,
        ),
        Bench(
            "restart-1g",
            "start after kill -9 with a full arena of 1 GiB",
            "us",
            ("none",),
            Target("value", "at most", 500_000),
            restart,
        ),
        Bench(
            "idle",
            "CPU of an attached, idle agent",
            "%",
            ("none",),
            Target("value", "at most", 0.5),
            idle,
        ),
        Bench(
            "wake",
            "median latency of 1000 single writes a second",
            "us",
            ("null", "image", "spdk"),
            Target("ratio", "at most", 1.0),
            wake,
        ),
        Bench(
            "reactors",
            "4 KiB random write, two disks, --reactors 2 to 1",
            "IOPS",
            ("self",),
            None,
            reactors,
        ),
    ]
