"""Plots of a run: latency distribution, throughput over queue depth, commit over size, arena
over time; those for which the run has data, in one picture.

From the JSON too: `python -m perf.runner plot results.json picture.png`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .failures import FailedError, MissingError
from .show import microseconds, rate, size

Panel = Callable[[Any], None]
OURS = "tab:blue"
OTHERS = {
    "null": "tab:orange",
    "image": "tab:brown",
    "spdk": "tab:red",
    "fio": "tab:green",
    "self": "tab:gray",
    "colo": "tab:purple",
}
NAMES = {
    "null": "storage daemon, null-co",
    "image": "storage daemon, image",
    "spdk": "SPDK vhost",
    "self": "without checkpoints",
}


def _style(name: str) -> dict[str, Any]:
    if name == "epochd":
        return {"color": OURS, "label": "epochd", "linewidth": 2.0}
    return {"color": OTHERS.get(name, "black"), "label": NAMES.get(name, name), "linestyle": "--"}


def _formatter(show: Callable[[float], str]) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: show(value))


def latency(bench: dict[str, Any]) -> Panel:
    """Share of requests that took longer than a time: both axes logarithmic."""

    def draw(axes: Any) -> None:
        for name, histogram in bench["curves"]["latency"].items():
            total = sum(count for _, count in histogram)
            left, times, shares = total, [], []
            for nanoseconds, count in histogram:
                left -= count
                times.append(nanoseconds / 1e3)
                shares.append(max(left, 0) / total)
            axes.step(times, shares, where="post", **_style(name))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(1e-5, 1)
        axes.xaxis.set_major_formatter(_formatter(microseconds))
        axes.set_yticks(
            [1, 0.5, 0.1, 0.01, 0.001, 0.0001], ["all", "50 %", "10 %", "1 %", "0.1 %", "0.01 %"]
        )
        axes.set_ylabel("requests that took longer")
        axes.set_title(f"Latency: {bench['title']}")
        axes.legend()

    return draw


def depths(bench: dict[str, Any]) -> Panel:
    def draw(axes: Any) -> None:
        curve = bench["curves"]["depths"]
        for name, values in curve.items():
            if name != "depth":
                axes.plot(curve["depth"], values, marker="o", **_style(name))
        axes.set_xscale("log", base=2)
        axes.set_xticks(curve["depth"], [str(depth) for depth in curve["depth"]])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(_formatter(rate))
        axes.set_xlabel("requests in flight")
        axes.set_title("Throughput: " + bench["title"].partition(" (")[0])
        axes.legend()

    return draw


def commits(bench: dict[str, Any]) -> Panel:
    def draw(axes: Any) -> None:
        curve = bench["curves"]["commits"]
        axes.scatter(curve["bytes"], curve["us"], color=OURS, alpha=0.6)
        sizes = sorted(set(curve["bytes"]))
        medians = []
        for one in sizes:
            times = sorted(t for n, t in zip(curve["bytes"], curve["us"], strict=True) if n == one)
            medians.append(times[len(times) // 2])
        axes.plot(sizes, medians, color=OURS)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [size(one) for one in sizes])
        axes.yaxis.set_major_formatter(_formatter(microseconds))
        axes.set_xlabel("size of the epoch, incompressible")
        axes.set_title("Commit, until acknowledged")

    return draw


def arena(bench: dict[str, Any]) -> Panel:
    def draw(axes: Any) -> None:
        curve = bench["curves"]["arena"]
        for name, colour in (("arena", OURS), ("journal", "tab:orange")):
            axes.plot(
                curve["s"], [value / (1 << 20) for value in curve[name]], color=colour, label=name
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds")
        axes.set_ylabel("MiB in use")
        axes.set_title("Arena and journal: random writes, 10 checkpoints a second")
        axes.legend()

    return draw


KINDS = {"latency": latency, "depths": depths, "commits": commits, "arena": arena}
LATENCY_BENCHES = ("write-qd1-latency", "write-qd32", "checkpoints-10")
"""Of all the runs with a histogram these are drawn, when they are there."""


def panels(benches: Sequence[dict[str, Any]]) -> list[Panel]:
    """What there is to draw."""
    found = []
    with_latency = [b for b in benches if "latency" in b["curves"]]
    chosen = [b for b in with_latency if b["name"] in LATENCY_BENCHES] or with_latency
    for kind, make in KINDS.items():
        for bench in chosen if kind == "latency" else benches:
            if bench["curves"].get(kind) and any(bench["curves"][kind].values()):
                found.append(make(bench))
    return found


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the picture; MissingError without matplotlib, FailedError without data."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise MissingError("matplotlib is not installed: run tools/setup") from None
    found = panels(document["benches"])
    if not found:
        raise FailedError("nothing to plot: no latency, depth, size or time data in this run")
    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(6.4 * columns, 4.2 * lines), squeeze=False, layout="constrained"
    )
    for place in axes.flat[len(found) :]:
        place.set_axis_off()
    for panel, place in zip(found, axes.flat, strict=False):
        place.grid(alpha=0.3)
        panel(place)
    figure.suptitle(
        f"{document['cpu']}, kernel {document['kernel']}, revision {document['revision'][:12]}",
        fontsize="small",
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
