"""`epochctl top`: what an agent is doing, from its live view, without asking it.

Contract. report() turns two snapshots into one plain dictionary: that is the JSON, a contract
for scripts; show() draws the same dictionary for a person and may change. Rates and
percentiles are of the time between the two snapshots, with `total` since the agent's start.
Exit status as epochctl's: 0, or 3 with the reason on stderr when there is no live view.
"""

import argparse
import json
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from . import core
from .live import Histogram, LiveError, Snapshot, View, find

Json = dict[str, Any]

EXIT_OK = 0
EXIT_NO_AGENT = 3
ROUND_STAGES = ("write", "read-hit", "zero")  # answered within the round that fetched them
COUNTERS = ("reads", "writes", "flushes", "discards", "write_zeroes", "read_bytes", "write_bytes")
FAULTS = ("errors", "unsupported", "rejected", "held")
GROUP_COUNTERS = ("seals", "commits", "applies", "discards", "journal_written", "image_written",
                  "compressed_frames", "incompressible_frames", "zero_frames", "dropped_frames",
                  "compress_ns")


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `top` to epochctl's command line."""
    text = "show rates, depths, latencies, arena and journal, without asking the agent"
    parser = verbs.add_parser("top", help=text, description=text + ": it may hang, or be dead. "
                              "Without -s and --shm, of the only agent there is.",
                              parents=[common])
    parser.add_argument("--shm", metavar="NAME", help="name of the live view (query-status has it)")
    parser.add_argument("--interval", metavar="SECONDS", type=_seconds, default=1.0,
                        help="time between two looks (default: 1); with --once, 0 is allowed: "
                        "all figures are since the agent's start then")
    parser.add_argument("--once", action="store_true", help="print one picture and end")
    parser.add_argument("--traces", metavar="N", type=_count, default=0,
                        help="also the newest N traced requests (1 of 61 is traced)")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time of 0 to 3600 seconds")
    return value


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return int(text)


# What is so.


def beginning(now: Snapshot) -> Snapshot:
    """The agent's start as a snapshot: nothing had been counted."""
    disks = [{**dict.fromkeys(disk, 0), "name": disk["name"], "queue": disk["queue"]}
             for disk in now.state["disk"]]
    state = dict.fromkeys(now.state, 0) | {"disk": disks}
    state["updated_ns"] = now.header["started_ns"]
    empty = {name: Histogram([0] * len(h.buckets)) for name, h in now.stages.items()}
    return Snapshot(now.header["started_ns"], now.header | {"sleeping": 0}, state, empty)


def report(view: View, before: Snapshot, now: Snapshot, traces: int = 0) -> Json:
    """Everything that is shown, as plain data."""
    seconds = max(now.as_of_ns - before.as_of_ns, 1) / 1e9
    state, header = now.state, now.header
    health, sentence = view.health(now)
    stages = {name: now.stages[name] - before.stages[name] for name in now.stages}
    answered = sum(stages[name].count for name in ROUND_STAGES)
    batches = state["batches"] - before.state["batches"]
    reactors = max(1, header["reactors"])
    result: Json = {
        "name": header["name"],
        "uuid": str(uuid.UUID(bytes=header["group"])),
        "pid": header["pid"],
        "control": header["control"],
        "live-view": view.name,
        "health": health,
        "health-text": sentence,
        "uptime-seconds": (now.read_ns - header["started_ns"]) / 1e9,
        "age-seconds": (now.read_ns - now.as_of_ns) / 1e9,
        "interval-seconds": seconds,
        "reactor": {
            "count": header["reactors"],
            "busy": (state["busy_ns"] - before.state["busy_ns"]) / 1e9 / seconds / reactors,
            "asleep": _asleep(before, now) / seconds / reactors,
            "requests-a-batch": answered / batches if batches > 0 else 0.0,
        },
        "mode": core.MODE_NAMES.get(state["mode"], "unknown"),
        **{name: state[name] for name in ("generation", "open", "committed", "applied", "epochs")},
        "arena": {"size": state["arena_bytes"], "used": state["arena_used"],
                  "percent": state["arena_percent"]},
        "index": {"size": state["index_size"], "used": state["index_used"]},
        "journal": {"size": state["journal_bytes"], "used": state["journal_used"]},
        **{_dash(name): state[name] for name in ("logical_bytes", "stored_bytes", "index_bytes")},
        "error": state["error"],
        "rates": _rates(before.state, state, GROUP_COUNTERS, seconds),
        "totals": {_dash(name): state[name] for name in GROUP_COUNTERS},
        "disks": [_disk(old, new, seconds) for old, new in zip(
            before.state["disk"], state["disk"][: state["disks"]], strict=False)],
        "stages": {
            name: {"rate": stages[name].count / seconds, **stages[name].summary(),
                   "total": now.stages[name].summary()}
            for name in stages
        },
    }
    if traces:
        result["traces"] = [
            {_dash(name): value for name, value in trace.items()} for trace in view.traces(traces)
        ]
    return result


def _asleep(before: Snapshot, now: Snapshot) -> float:
    """Seconds of all reactors; a sleep is counted in the page when it ends, so the present one
    is added."""
    counted: int = now.state["asleep_ns"] - before.state["asleep_ns"]
    for snapshot, sign in ((before, -1), (now, 1)):
        if snapshot.header["sleeping"]:
            each = snapshot.read_ns - snapshot.state["updated_ns"]
            counted += sign * each * max(1, snapshot.header["reactors"])
    return max(0, counted) / 1e9


def _dash(name: str) -> str:
    return name.replace("_", "-")


def _rates(before: Json, now: Json, names: tuple[str, ...], seconds: float) -> Json:
    return {_dash(name): max(0, now[name] - before[name]) / seconds for name in names}


def _disk(before: Json, now: Json, seconds: float) -> Json:
    queues = [queue for queue in now["queue"] if queue["running"]]
    return {
        "name": now["name"],
        "connected": bool(now["connected"]),
        "rates": _rates(before, now, COUNTERS, seconds),
        "totals": {_dash(name): now[name] for name in COUNTERS + FAULTS},
        "queues": len(queues),
        "inflight": sum(queue["inflight"] for queue in queues),
        "holding": sum(queue["held"] for queue in queues),
        "calls": sum(queue["calls"] for queue in queues),
    }


# For a person.


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _number(value: float) -> str:
    if value == 0:
        return "-"
    for unit in ("", "k", "M"):
        if value < 10_000:
            return f"{value:.0f}{unit}" if value >= 10 or unit == "" else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.0f}G"


def _time(ns: float) -> str:
    if ns < 1:
        return "-"
    for unit in ("ns", "us", "ms"):
        if ns < 1000:
            return f"{ns:.0f} {unit}" if ns >= 100 or unit == "ns" else f"{ns:.1f} {unit}"
        ns /= 1000
    return f"{ns:.2f} s"


def _bar(name: str, part: Json, more: str) -> Table:
    line = Table.grid(padding=(0, 1))
    full = part["used"] / part["size"] if part["size"] else 0.0
    style = "red" if full >= 0.9 else "yellow" if full >= 0.5 else "green"
    line.add_row(Text(f"{name:<7}"),
                 ProgressBar(total=max(part["size"], 1), completed=part["used"], width=30,
                             complete_style=style, finished_style=style),
                 Text(f"{_size(part['used'])} of {_size(part['size'])} ({full:.0%}){more}"))
    return line


def _head(now: Json) -> Text:
    text = Text()
    style = {"idle": "green", "busy": "green"}.get(now["health"], "bold red")
    text.append(f"{now['name']}", style="bold")
    text.append(f"  process {now['pid']}, up {now['uptime-seconds']:.0f} s, ")
    text.append(now["health"], style=style)
    text.append(f": {now['health-text']}\n")
    text.append(f"{now['mode']}, generation {now['generation']}; epoch {now['open']} open, "
                f"{now['committed']} committed, {now['applied']} applied, {now['epochs']} alive\n")
    reactor = now["reactor"]
    polling = max(0.0, 1 - reactor["busy"] - reactor["asleep"])
    name = "reactor" if reactor["count"] == 1 else f"{reactor['count']} reactors"
    text.append(f"{name} {reactor['busy']:.0%} working, {polling:.0%} polling, "
                f"{min(1.0, reactor['asleep']):.0%} asleep; "
                f"{reactor['requests-a-batch']:.1f} requests a batch; "
                f"{_number(now['rates']['seals'])} seals, {_number(now['rates']['commits'])} "
                "commits a second")
    if now["error"]:
        text.append(f"\n{now['error']}", style="bold red")
    return text


def _disks(now: Json) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("disk")
    for title in ("reads/s", "read", "writes/s", "written", "flush/s", "discard/s", "in flight",
                  "held", "errors", "rejected"):
        table.add_column(title, justify="right")
    for disk in now["disks"]:
        rates, totals = disk["rates"], disk["totals"]
        table.add_row(
            Text(disk["name"], style="" if disk["connected"] else "dim"),
            _number(rates["reads"]), f"{_size(rates['read-bytes'])}/s",
            _number(rates["writes"]), f"{_size(rates['write-bytes'])}/s",
            _number(rates["flushes"]), _number(rates["discards"] + rates["write-zeroes"]),
            _number(disk["inflight"]), _number(disk["holding"]),
            _number(totals["errors"] + totals["unsupported"]), _number(totals["rejected"]),
        )
    return table


def _stages(now: Json) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("stage")
    for title in ("a second", "p50", "p99", "p99.9", "max", "", "since start", "p50", "p99", "max"):
        table.add_column(title, justify="right")
    for name, stage in now["stages"].items():
        total = stage["total"]
        if not total["count"]:
            continue
        table.add_row(
            name.replace("-", " "), _number(stage["rate"]),
            *(_time(stage[f"{part}-ns"]) for part in ("p50", "p99", "p999", "max")), "",
            _number(total["count"]),
            *(_time(total[f"{part}-ns"]) for part in ("p50", "p99", "max")),
        )
    return table


REQUEST_NAMES = {0: "read", 1: "write", 4: "flush", 8: "get id", 11: "discard", 13: "zero"}


def _traces(now: Json) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("trace", "request", "disk", "queue", "sector", "bytes", "begun", "copied",
                  "published", "status"):
        table.add_column(title, justify="left" if title == "request" else "right")
    for trace in now["traces"]:
        table.add_row(
            str(trace["number"]), REQUEST_NAMES.get(trace["type"], f"type {trace['type']}"),
            str(trace["disk"]), str(trace["queue"]), str(trace["sector"]), str(trace["bytes"]),
            *(_time(trace[f"{part}-ns"]) for part in ("begun", "copied", "published")),
            str(trace["status"]),
        )
    return table


def show(now: Json) -> RenderableType:
    """The report as a screen."""
    ratio = ""
    if now["stored-bytes"]:
        ratio = (f", {_size(now['logical-bytes'])} in blocks, "
                 f"{now['logical-bytes'] / now['stored-bytes']:.2f} : 1")
    parts: list[RenderableType] = [
        _head(now), _bar("arena", now["arena"], ratio), _bar("index", now["index"], ""),
        _bar("journal", now["journal"], ""), Text(), _disks(now), Text(), _stages(now),
    ]
    if now.get("traces"):
        parts += [Text(), _traces(now)]
    return Group(*parts)


# The command.


def _reports(view: View, options: argparse.Namespace) -> Iterator[Json]:
    """One report an interval; follows to the agent that comes after a restart."""
    before = view.read()
    if options.interval == 0:
        yield report(view, beginning(before), before, options.traces)
    else:
        yield from _later_reports(view, before, options)


def _later_reports(view: View, before: Snapshot, options: argparse.Namespace) -> Iterator[Json]:
    while True:
        time.sleep(options.interval)
        if view.replaced():
            try:
                fresh = View(view.name)
            except LiveError:
                continue  # it is being made
            view.close()
            view, before = fresh, beginning(fresh.read())
        now = view.read()
        yield report(view, before, now, options.traces)
        before = now


def run(options: argparse.Namespace) -> int:
    """The verb; returns epochctl's exit status."""
    try:
        view = View(options.shm or find(Path(options.socket) if options.socket else None))
    except LiveError as error:
        print(f"epochctl: {error}", file=sys.stderr)
        return EXIT_NO_AGENT
    reports = _reports(view, options)
    console = Console()
    if options.json or options.once or not console.is_terminal:
        for now in reports:
            print(json.dumps(now), flush=True) if options.json else console.print(show(now))
            if options.once:
                break
        return EXIT_OK
    with Live(console=console, screen=True, auto_refresh=False) as screen:
        for now in reports:
            screen.update(show(now), refresh=True)
    return EXIT_OK
