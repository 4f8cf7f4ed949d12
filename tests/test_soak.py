"""The agent's memory stays within its limits; tests/soak/run is the long form.

EPOCHD_SOAK_SECONDS: for how long (default 12).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import running
from soak import soak

SECONDS = float(os.environ.get("EPOCHD_SOAK_SECONDS", "12"))


@pytest.mark.timeout(240 + SECONDS)
def test_memory_stays_within_its_limits_under_mixed_load(tmp_path: Path) -> None:
    load = soak.Soak(tmp_path, seed=7)
    running.append(load.daemon)
    try:
        load.run(SECONDS)
    finally:
        print(*load.lines(), sep="\n")
        load.close()
    running.remove(load.daemon)
    assert load.index_max > 6 << 20
    assert load.peak < soak.LIMIT
    assert min(load.done[what] for what in ("seal", "commit", "discard", "restart")) > 0
    assert not load.daemon.complaints()


def test_a_limit_that_is_passed_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "LIMIT", 4 << 20)
    load = soak.Soak(tmp_path, seed=7)
    try:
        with pytest.raises(soak.Exceeded, match="private memory"):
            load.run(1)
    finally:
        load.close()
