"""The fuzzers, for some seconds each: `tests/fuzz/run` is the command, and the longer run.

Here they show that the targets build and run, and that what was found once stays fixed: the
inputs in tests/fuzz/corpus are carried out first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
SECONDS = float(os.environ.get("EPOCHD_FUZZ_SECONDS", "15"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The runner, in this environment."""
    return subprocess.run(
        [sys.executable, str(FUZZ / "run.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(FUZZ.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_short_run_of_all_targets_finds_nothing(sanitize: str) -> None:
    """`address` has UBSan with it."""
    done = run("--seconds", str(SECONDS), "--sanitize", sanitize)
    assert done.returncode == 0, done.stdout
    rows = re.findall(r"^(\w+) +(\d+) +\d+ +0$", done.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["ring", "journal", "arena", "vhost", "control"]
    assert all(int(executions) > 0 for _, executions in rows), done.stdout
    assert "findings = 0" in done.stdout


@pytest.mark.timeout(900)
def test_a_finding_is_named_and_fails_the_run(tmp_path: Path) -> None:
    """A daemon that dies under its first client is a finding, with the seed."""
    done = subprocess.run(
        [sys.executable, str(FUZZ / "run.py"), "--seconds", "5", "--seed", "7", "control"],
        env={
            **os.environ,
            "PYTHONPATH": str(FUZZ.parent),
            "EPOCHD_COMMAND": f"{sys.executable} {dying(tmp_path)}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "findings = 1" in done.stdout
    assert "seed 7, round" in done.stdout


def dying(folder: Path) -> Path:
    """The daemon, with a bug in it: an answer to query-version ends the process."""
    script = folder / "dying.py"
    script.write_text(
        "import os, sys\n"
        "from epochd import qmp\n"
        "from epochd.__main__ import main\n"
        "qmp.version = lambda: os._exit(1) if os.path.exists(MARK) else VERSION\n"
        .replace("MARK", repr(str(folder / "mark")))
        .replace("VERSION", "open(" + repr(str(folder / "mark")) + ", 'w') and {}")
        + "sys.exit(main())\n"
    )
    return script


def test_unknown_target_is_refused() -> None:
    done = run("nosuch")
    assert done.returncode == 2
    assert "there is no target 'nosuch'" in done.stdout
