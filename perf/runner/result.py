"""What a benchmark found: one row of the table, one object in the JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .stats import Summary, ratios, summarize

Status = Literal["ok", "skipped", "failed"]


@dataclass(frozen=True)
class Target:
    """What is asked for: of the ratio to the peer, or of our own figure."""

    of: Literal["ratio", "value"]
    sense: Literal["at least", "at most"]
    value: float

    def met(self, figure: float) -> bool:
        return figure >= self.value if self.sense == "at least" else figure <= self.value

    def text(self) -> str:
        sign = "≥" if self.sense == "at least" else "≤"
        return f"{sign} {self.value:g}" + (" x" if self.of == "ratio" else "")


@dataclass
class Sample:
    """One measurement: its figure in the row's unit, and what else was seen."""

    value: float
    detail: dict[str, Any] = field(default_factory=dict)
    histogram: list[tuple[float, int]] = field(default_factory=list)


@dataclass
class Row:
    """A benchmark's outcome. `ours[i]` and `theirs[i]` are pair i; without a peer `theirs` is
    empty. `skipped`: the reason is in `reason`, and `ours` may hold what could be measured."""

    name: str
    title: str
    unit: str
    against: str
    target: Target | None
    status: Status = "ok"
    reason: str = ""
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curves: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def pair_ratios(self) -> list[float]:
        """Ours through theirs, pair by pair; empty without a peer."""
        if not self.theirs or len(self.theirs) != len(self.ours):
            return []
        return ratios(self.ours, self.theirs)

    def summaries(self) -> tuple[Summary | None, Summary | None]:
        return (
            summarize(self.ours) if self.ours else None,
            summarize(self.theirs) if self.theirs else None,
        )

    def met(self) -> bool | None:
        """Was the target met? None: nothing to judge, or nothing to judge by."""
        if self.target is None or self.status != "ok":
            return None
        values = self.pair_ratios() if self.target.of == "ratio" else self.ours
        return self.target.met(statistics.median(values)) if values else None

    def as_json(self) -> dict[str, Any]:
        """The row with its summaries; the shape is described in METHOD.md."""
        ours, theirs = self.summaries()
        pairs = self.pair_ratios()
        return {
            **asdict(self),
            "ratios": pairs,
            "ratio": asdict(summarize(pairs)) if pairs else None,
            "ours_summary": {**asdict(ours), "spread": ours.spread} if ours else None,
            "theirs_summary": {**asdict(theirs), "spread": theirs.spread} if theirs else None,
            "met": self.met(),
        }
