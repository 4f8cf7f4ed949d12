"""The write and the read path: rates and latencies of 4 KiB requests.

Raw ingest (compression off), the agent on its CPU, the load on another; each run into an epoch
that is dropped afterwards, so every run meets the same state. The first run is not counted: it
touches the arena's pages for the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import fio, peers, show
from .agent import Agent
from .bench import GIB, MIB, Bench, Context, of_load
from .load import job
from .result import Sample, Target

IMAGE_BYTES = GIB
VHOST_PEERS = ("null", "image", "spdk")


def _write_sample(context: Context, agent: Agent, depth: int, ios: int) -> Sample:
    result = context.random_writes(agent, iodepth=depth, ios=ios, size=IMAGE_BYTES)
    agent.discard()
    return of_load(result, result.iops)


def writes(context: Context, depth: int) -> None:
    """Random 4 KiB writes a second."""
    if context.against == "spdk":
        peers.spdk_socket(context.options.spdk_socket)
    # Room for all that a run writes: 4 KiB and a frame header each.
    arena = context.size("arena", 5 * GIB, 2 * GIB)
    ios = context.size("ios", 1_000_000, 300_000)
    image = context.sparse("disk.img", IMAGE_BYTES)
    agent = context.agent(image, arena=arena, level=0)
    context.trust(agent)
    _write_sample(context, agent, depth, ios)

    def ours() -> Sample:
        return _write_sample(context, agent, depth, ios)

    if context.against == "memcpy":
        context.pairs(
            ours,
            lambda: Sample(
                peers.memcpy_rate(
                    context.options.work / "cache", depth, ios, context.options.agent_cpus
                )
            ),
            show.rate,
        )
        return
    peer = context.vhost_peer(IMAGE_BYTES, image)

    def theirs() -> Sample:
        assert peer is not None
        result = context.load(
            *peer, rw="randwrite", bs="4k", iodepth=depth, ios=ios, size=IMAGE_BYTES
        )
        return of_load(result, result.iops)

    context.pairs(ours, theirs if peer else None, show.rate)


def write_latency(context: Context) -> None:
    """Median latency of single 4 KiB writes."""
    ios = context.size("ios", 200_000, 50_000)
    image = context.sparse("disk.img", IMAGE_BYTES)
    arena = context.size("arena", 2 * GIB, 512 * MIB)
    agent = context.agent(image, arena=arena, level=0)
    context.trust(agent)
    peer = context.vhost_peer(IMAGE_BYTES, image)
    options = job(rw="randwrite", bs="4k", iodepth=1, ios=ios, size=IMAGE_BYTES)

    def ours() -> Sample:
        result = context.random_writes(agent, iodepth=1, ios=ios, size=IMAGE_BYTES)
        agent.discard()
        return of_load(result, result.latency_ns["p50"] / 1e3)

    def theirs() -> Sample:
        assert peer is not None
        result = context.load(*peer, **options)
        return of_load(result, result.latency_ns["p50"] / 1e3)

    ours()
    context.pairs(ours, theirs if peer else None, show.microseconds)


def read_arena(context: Context) -> None:
    """Random 4 KiB reads of raw blocks that lie in the arena."""
    region = context.size("region", GIB, 256 * MIB)
    ios = context.size("ios", 800_000, 200_000)
    image = context.sparse("disk.img", IMAGE_BYTES)
    agent = context.agent(image, arena=region + region // 4, level=0)
    context.trust(agent)
    context.say("filling the arena")
    context.load(agent, agent.socket, rw="write", bs="4k", iodepth=32, bytes=region, size=region)
    peer = context.vhost_peer(IMAGE_BYTES, image)
    options = job(rw="randread", bs="4k", iodepth=32, ios=ios, size=region)

    def ours() -> Sample:
        result = context.load(agent, agent.socket, **options)
        return of_load(result, result.iops)

    def theirs() -> Sample:
        assert peer is not None
        result = context.load(*peer, **options)
        return of_load(result, result.iops)

    ours()
    context.pairs(ours, theirs if peer else None, show.rate)


def read_image(context: Context) -> None:
    """Random 4 KiB reads of blocks that lie on the disk only, against fio on the same file."""
    size = context.size("image", 4 * GIB, 512 * MIB)
    seconds = context.pick(4.0, 1.0)
    image = context.folder / "disk.img"
    context.say("writing the image")
    fio.prepare(image, size)
    agent = context.agent(image, arena=64 * MIB, level=0)
    if not agent.qmp.execute("query-disks")[0]["direct"]:
        context.row.notes.append("the file system refuses O_DIRECT: these are buffered reads")
    context.trust(agent)
    options = job(rw="randread", bs="4k", iodepth=32, seconds=seconds, ramp=0.2, size=size)

    def ours() -> Sample:
        result = context.load(agent, agent.socket, **options)
        return of_load(result, result.iops)

    def by_fio() -> Callable[[], Sample]:
        fio.available()
        cpus = context.options.agent_cpus
        return lambda: Sample(fio.random_read_iops(image, size, 32, seconds, cpus))

    if context.against == "fio":
        context.pairs(ours, context.peer(by_fio), show.rate)
        return
    peer = context.vhost_peer(size, image)

    def theirs() -> Sample:
        assert peer is not None
        result = context.load(*peer, **options)
        return of_load(result, result.iops)

    context.pairs(ours, theirs if peer else None, show.rate)


def benches() -> list[Bench]:
    """In the order of the table."""
    at_least = partial(Target, "ratio", "at least")
    write_peers = (*VHOST_PEERS, "memcpy")
    return [
        Bench(
            "write-qd32",
            "4 KiB random write, depth 32, raw",
            "IOPS",
            write_peers,
            at_least(0.8),
            partial(writes, depth=32),
        ),
        Bench(
            "write-qd128",
            "4 KiB random write, depth 128, raw",
            "IOPS",
            write_peers,
            at_least(0.8),
            partial(writes, depth=128),
        ),
        Bench(
            "write-qd32-spdk",
            "4 KiB random write, depth 32, raw",
            "IOPS",
            ("spdk",),
            at_least(1.0),
            partial(writes, depth=32),
        ),
        Bench(
            "write-qd128-spdk",
            "4 KiB random write, depth 128, raw",
            "IOPS",
            ("spdk",),
            at_least(1.0),
            partial(writes, depth=128),
        ),
        Bench(
            "write-qd1-latency",
            "4 KiB write, depth 1, median latency",
            "us",
            VHOST_PEERS,
            Target("ratio", "at most", 0.7),
            write_latency,
        ),
        Bench(
            "read-arena",
            "4 KiB random read of the arena, depth 32",
            "IOPS",
            VHOST_PEERS,
            at_least(0.8),
            read_arena,
        ),
        Bench(
            "read-image",
            "4 KiB random read of the image, depth 32",
            "IOPS",
            ("fio", "image", "null", "spdk"),
            at_least(0.9),
            read_image,
        ),
    ]
