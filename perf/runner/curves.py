"""Benchmarks for the plots: no targets, but how a figure runs over another."""

from __future__ import annotations

import threading
import time
from functools import partial

from . import show
from .bench import GIB, KIB, MIB, Bench, Context, not_held
from .epochs import WORKING_SET, checkpoint_agent, checkpointed
from .failures import FailedError
from .load import job
from .qmp import Qmp
from .result import Sample

SAMPLE_SECONDS = 0.02


def depths(context: Context, rw: str) -> None:
    """Throughput over queue depth, ours and the peer's. The row's value: at depth 128."""
    image = context.sparse("disk.img", GIB)
    region = 256 * MIB
    ios = context.size("ios", 200_000, 60_000)
    agent = context.agent(image, arena=2 * GIB, level=0)
    context.trust(agent)
    if rw == "randread":
        context.load(
            agent, agent.socket, rw="write", bs="4k", iodepth=32, bytes=region, size=region
        )
    peer = context.vhost_peer(GIB, image)
    points = (1, 4, 16, 64, 128) if context.quick else (1, 2, 4, 8, 16, 32, 64, 128)
    curve = context.row.curves.setdefault("depths", {})
    curve["depth"] = list(points)
    for name in ("epochd", context.against) if peer else ("epochd",):
        curve[name] = []
    last: tuple[float, float | None] = (0.0, None)
    for depth in points:
        options = job(
            rw=rw,
            bs="4k",
            iodepth=depth,
            ios=max(ios // (3 if depth < 4 else 1), 1),
            size=region,
        )
        before = agent.held()
        ours = context.load(agent, agent.socket, **options)
        not_held(agent, before)
        if rw == "randwrite":
            agent.discard()
        curve["epochd"].append(ours.iops)
        text = f"depth {depth}: {show.rate(ours.iops)}"
        last = (ours.iops, None)
        if peer:
            theirs = context.load(*peer, **options)
            curve[context.against].append(theirs.iops)
            text += f", {context.against}: {show.rate(theirs.iops)}"
            last = (ours.iops, theirs.iops)
        context.say(text)
    context.row.ours.append(last[0])
    if last[1] is not None:
        context.row.theirs.append(last[1])


def commit_sizes(context: Context) -> None:
    """Commit time over the epoch's size. The row's value: of the largest."""
    sizes = [64 * KIB, MIB, 16 * MIB, 64 * MIB]
    sizes += [] if context.quick else [256 * MIB, GIB]
    repeat = 3 if context.quick else 5
    image = context.sparse("disk.img", GIB)
    agent = context.agent(image, arena=sizes[-1] * 3 // 2, pinned=False)
    context.trust(agent)
    curve = context.row.curves.setdefault("commits", {"bytes": [], "us": []})
    for size in sizes:
        times = []
        for _ in range(repeat):
            context.load(
                agent,
                agent.socket,
                rw="write",
                bs="64k",
                iodepth=8,
                bytes=size,
                size=size,
                compress=0,
            )
            agent.seal()
            times.append(1e6 * agent.commit())
            agent.await_applied()
        curve["bytes"] += [size] * repeat
        curve["us"] += times
        context.say(f"{show.size(size)}: {show.microseconds(sorted(times)[repeat // 2])}")
    context.row.ours += times


def arena_time(context: Context) -> None:
    """Arena and journal use over time under random writes with 10 checkpoints a second. The
    row's value: the writes a second meanwhile."""
    agent = checkpoint_agent(context)
    curve = context.row.curves.setdefault("arena", {"s": [], "arena": [], "journal": []})
    over = threading.Event()
    errors: list[FailedError] = []

    def watch() -> None:
        begin = time.monotonic()
        try:
            qmp = Qmp(agent.control_path)
            while not over.wait(SAMPLE_SECONDS):
                status = qmp.execute("query-status")
                curve["s"].append(round(time.monotonic() - begin, 4))
                curve["arena"].append(status["arena"]["used"])
                curve["journal"].append(status["journal"]["used"])
            qmp.close()
        except FailedError as error:
            errors.append(error)

    def ours() -> Sample:
        for values in curve.values():
            values.clear()
        watcher = threading.Thread(target=watch)
        over.clear()
        watcher.start()
        try:
            return checkpointed(context, agent, 10)
        finally:
            over.set()
            watcher.join()

    sample = ours()
    if errors:
        raise errors[0]
    context.row.ours.append(sample.value)
    context.row.details.append({"ours": sample.detail})
    context.row.figures["arena_peak_bytes"] = max(curve["arena"], default=0)
    context.row.settings["working_set_bytes"] = WORKING_SET
    context.say(show.rate(sample.value))


def benches() -> list[Bench]:
    """In the order of the table."""
    peers = ("null", "image", "spdk")
    return [
        Bench(
            "write-depths",
            "4 KiB random write over queue depth (here: 128)",
            "IOPS",
            peers,
            None,
            partial(depths, rw="randwrite"),
        ),
        Bench(
            "read-depths",
            "4 KiB random read of the arena over depth (here: 128)",
            "IOPS",
            peers,
            None,
            partial(depths, rw="randread"),
        ),
        Bench(
            "commit-sizes",
            "commit over the epoch's size (here: the largest)",
            "us",
            ("none",),
            None,
            commit_sizes,
        ),
        Bench(
            "arena-time",
            "arena over time, 10 checkpoints a second",
            "IOPS",
            ("none",),
            None,
            arena_time,
        ),
    ]
