"""The table at the end, the list of benchmarks, the JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import peers, show
from .bench import Bench
from .result import Row
from .stats import summarize

SCHEMA = 1
HEAD = ("benchmark", "median", "spread", "against", "its median", "spread", "ratio", "target", "")


def _value(unit: str, value: float) -> str:
    if unit == "%":
        return f"{value:.2f} %"
    return show.UNITS[unit](value)


def _verdict(row: Row) -> str:
    if row.status != "ok":
        return row.status
    met = row.met()
    return "" if met is None else "met" if met else "missed"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    if row.target.of == "ratio":
        return row.target.text()
    sign = row.target.text().split()[0]
    return f"{sign} {_value(row.unit, row.target.value)}"


def cells(row: Row) -> tuple[str, ...]:
    """A row as texts, in the order of HEAD."""
    ours, theirs = row.summaries()
    pairs = row.pair_ratios()
    ratio = ""
    if pairs:
        summary = summarize(pairs)
        ratio = f"{summary.median:.2f}"
        if summary.count > 1:
            ratio += f" ({summary.low:.2f}..{summary.high:.2f})"
    return (
        row.name,
        _value(row.unit, ours.median) if ours else "-",
        f"{100 * ours.spread:.0f} %" if ours and ours.count > 1 else "",
        "" if row.against == "none" else row.against,
        _value(row.unit, theirs.median) if theirs else "",
        f"{100 * theirs.spread:.0f} %" if theirs and theirs.count > 1 else "",
        ratio,
        _target(row),
        _verdict(row),
    )


def table(rows: Sequence[Row]) -> str:
    """All rows for a terminal, then the reasons and remarks."""
    lines = [HEAD, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = []
    for number, line in enumerate(lines):
        text.append("  ".join(cell.ljust(widths[i]) for i, cell in enumerate(line)).rstrip())
        if number == 0:
            text.append("  ".join("-" * width for width in widths))
    for row in rows:
        if row.reason:
            text.append(f"{row.name}: {row.status}: {row.reason}")
        text += [f"{row.name}: {note}" for note in row.notes]
    return "\n".join(text)


def listing(benches: Sequence[Bench]) -> str:
    """`perf/run list`."""
    rows = [("name", "what", "peers", "target")]
    for bench in benches:
        goal = bench.target
        row = Row(bench.name, bench.title, bench.unit, bench.peers[0], goal)
        who = "" if bench.peers == ("none",) else ", ".join(bench.peers)
        rows.append((bench.name, bench.title, who, _target(row)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    text = ["  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows]
    text.append("")
    text += [f"{name:<8}{meaning}" for name, meaning in peers.NAMES.items() if name != "none"]
    return "\n".join(text)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no paths."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def document(head: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The whole result; `head` is the machine, the options and the times."""
    whole = {"schema": SCHEMA, **head, "benches": [row.as_json() for row in rows]}
    return {key: _finite(value) for key, value in whole.items()}


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")
