"""Instructions a request costs the reactor, against the budget in tests/budget/budget.toml.

callgrind counts what tests/budget/hotpath does within one round of the reactor. Counts do not
depend on the machine's load; wall-clock time is perf/'s affair. A change that makes a request
cost a tenth more than its budget fails here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / ".build" / "budget"
REQUESTS = 4000
BATCHES = 5
BUDGET = tomllib.loads((Path(__file__).parent / "budget" / "budget.toml").read_text())


@pytest.fixture(scope="module")
def hotpath() -> Path:
    """The program, built with the flags of a release."""
    bin_dir = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"}
    steps = [["ninja", "-C", str(BUILD), "tests/budget/hotpath"]]
    if not (BUILD / "build.ninja").exists():
        steps.insert(0, ["meson", "setup", str(BUILD), str(ROOT), "-Dtests=true", "-Db_lto=true"])
    for step in steps:
        done = subprocess.run(step, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "tests" / "budget" / "hotpath"


def instructions(hotpath: Path, what: str, depth: int, waste: int = 0) -> float:
    """Instructions a request."""
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    collect = ["--collect-atstart=no", "--toggle-collect=measured"]
    program = [str(hotpath), what, *map(str, (REQUESTS, depth, BATCHES, waste))]
    done = subprocess.run(
        [*valgrind, *collect, *program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(r"Collected : (\d+)", done.stderr)
    assert counted, done.stderr
    return int(counted[1]) / (REQUESTS * BATCHES)


def within(count: float, budget: float) -> bool:
    return bool(count <= budget * (1 + BUDGET["tolerance"]))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", BUDGET["instructions"])
def test_a_request_stays_within_its_budget(hotpath: Path, name: str) -> None:
    what, _, depth = name.partition("-depth-")
    budget = BUDGET["instructions"][name]
    count = instructions(hotpath, what, int(depth or 32))
    print(f"{name}: {count:.0f} instructions a request, budget {budget}")
    assert within(count, budget), f"{name}: {count:.0f} instructions, the budget is {budget}"
    assert count > budget * 0.7, f"{name}: {count:.0f} instructions: lower the budget of {budget}"


@pytest.mark.timeout(600)
def test_a_tenth_more_would_be_noticed(hotpath: Path) -> None:
    plain = instructions(hotpath, "write", 32)
    slowed = instructions(hotpath, "write", 32, waste=round(plain * 0.11))
    print(f"{plain:.0f} instructions a write, {slowed:.0f} with the waste")
    assert slowed > plain * 1.1
    assert not within(slowed, plain)


def test_the_line_of_a_request_to_come_is_fetched(tmp_path: Path) -> None:
    """A compiler that sees no effect in a prefetch drops the function around it, and all is slower
    by a cache miss, with fewer instructions."""
    out = str(tmp_path / "epoch.o")
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O3"]
    subprocess.run(["gcc", *flags, "-c", str(ROOT / "native" / "epoch.c"), "-o", out], check=True)
    command = ["objdump", "--disassemble=epoch_expect", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "prefetch" in done.stdout, done.stdout
