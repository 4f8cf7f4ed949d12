"""Crash states behind the disk seam: the real journal, apply and recovery on a simulated disk.

tests/sim/run does the work; native/RECOVERY.md says what is held against which fault.
EPOCHD_SIM_STATES sets how many crash states are explored (default 1000000), EPOCHD_SIM_SEED the
seed (default: a new one each time, printed).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "sim" / "run"


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.timeout(3600)
def test_no_crash_leaves_a_mix_of_epochs() -> None:
    states = os.environ.get("EPOCHD_SIM_STATES", "1000000")
    seed = os.environ.get("EPOCHD_SIM_SEED")
    result = simulate("--states", states, *(["--seed", seed] if seed else []))
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    explored = re.search(r"states explored = (\d+), failures = 0", result.stdout)
    assert explored, result.stdout
    assert int(explored[1]) >= int(states)
    assert re.search(r"\b[1-9]\d* clusters\b", result.stdout), result.stdout
    assert re.search(r"\b[1-9]\d* merges\b", result.stdout), result.stdout
    assert re.search(r"\b[1-9]\d* with dictionary\b", result.stdout), result.stdout
    assert re.search(r"\b[1-9]\d* spilled pages\b", result.stdout), result.stdout


@pytest.mark.timeout(3600)
def test_every_deliberate_bug_is_caught() -> None:
    result = simulate("--mutations")
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "caught = all" in result.stdout
