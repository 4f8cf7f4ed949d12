"""The runner of the benchmarks, perf/run: its figures, its results, and what it does when a
peer is missing, a daemon dies or data is wrong. No figure's size is judged here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from perf.runner import plot, profile, report, stats
from perf.runner.__main__ import all_benches
from perf.runner.data import fs_image
from perf.runner.result import Row, Target

ROOT = Path(__file__).resolve().parents[1]
TARGETS = [
    "write-qd32",
    "write-qd128",
    "write-qd1-latency",
    "read-arena",
    "read-image",
    "commit-1g",
    "commit-1g-compressed",
    "commit-64k",
    "seal",
    "discard-1g",
    "checkpoints-10",
    "checkpoints-100",
    "colo",
    "arena-ratio",
    "big-image",
    "big-epoch",
    "restart-1g",
]
QUICK = ("write-qd1-latency", "--quick", "--repeat", "1")

# Starts epochd as it was told and kills it, and itself, once it has served some writes.
DIES = """
import os, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from perf.runner.qmp import Qmp
from perf.runner.process import listens
child = subprocess.Popen([{epochd!r}, *sys.argv[1:]])
control = Path(sys.argv[sys.argv.index("--control") + 1])
while not listens(control):
    if child.poll() is not None:
        sys.exit(child.returncode)
    time.sleep(0.01)
qmp = Qmp(control)
while qmp.execute("query-stats")["disks"]["writes"] < 1000:
    time.sleep(0.001)
Path(__file__).with_name("arena").write_text(qmp.execute("query-status")["arena"]["name"])
child.kill()
child.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""

# Serves what forgets all writes where epochd's disk should be.
FORGETS = """
import signal, subprocess, sys
words = sys.argv[1:]
at = words.index("--socket-path") + 1
socket, words[at] = words[at], words[at] + ".real"
null = subprocess.Popen(["timeout", "60", "qemu-storage-daemon", "--blockdev",
    "null-co,node-name=disk,size=1073741824,read-zeroes=on", "--export",
    "vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path=" + socket])
real = subprocess.Popen(["timeout", "60", {epochd!r}, *words])
signal.signal(signal.SIGTERM, lambda *_: real.terminate())
status = real.wait()
null.terminate()
null.wait()
sys.exit(status)
"""


def run(
    *words: object, path: str | None = None, epochd: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["PATH"] = path or f"{environment['PATH']}:/usr/sbin"
    environment.pop("EPOCHD_COMMAND", None)
    if epochd:
        environment["EPOCHD_COMMAND"] = epochd
    return subprocess.run(
        [sys.executable, "-m", "perf.runner", *map(str, words)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def impostor(folder: Path, text: str) -> str:
    """EPOCHD_COMMAND of a program in epochd's place."""
    script = folder / "impostor.py"
    epochd = str(Path(sys.executable).parent / "epochd")
    script.write_text(text.format(epochd=epochd, root=str(ROOT)))
    return f"{sys.executable} {script}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of one real, short run against qemu-storage-daemon."""
    folder = tmp_path_factory.mktemp("perf")
    done = run(*QUICK, "--json", folder / "r.json", "--work", folder / "work")
    assert done.returncode == 0, done.stderr
    assert "write-qd1-latency" in done.stdout
    data: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return {**data, "stdout": done.stdout, "left": sorted(os.listdir(folder / "work"))}


# ---- the command line ----------------------------------------------------------------------


def test_every_target_is_a_benchmark_that_list_names() -> None:
    done = run("list")
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert set(TARGETS) <= set(listed)
    assert {bench.name for bench in all_benches() if bench.target} >= set(TARGETS)


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["no-such-thing"], 2, "no-such-thing"),
        (["seal", "--against", "nobody"], 2, "nobody"),
        (["seal", "--repeat", "0"], 2, "not a number from 1"),
        (["seal", "--agent-cpus", "9999"], 2, "numbers of CPUs"),
        (["seal", "--work", "/proc/nowhere"], 3, "work folder"),
        (["plot", "nothing.json", "x.png"], 2, "nothing.json"),
        (["plot"], 2, "RESULTS.json"),
    ],
)
def test_what_cannot_be_run_is_said(words: list[str], status: int, reason: str) -> None:
    done = run(*words)
    assert done.returncode == status, done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_there() -> None:
    done = run("--help")
    assert done.returncode == 0
    for option in ("--quick", "--against", "--repeat", "--json", "--plot", "--spdk-socket"):
        assert option in done.stdout


# ---- figures -------------------------------------------------------------------------------


def test_the_ratio_is_the_median_of_the_pairs_not_the_ratio_of_medians() -> None:
    row = Row("a", "A", "IOPS", "null", Target("ratio", "at least", 0.8))
    row.ours, row.theirs = [10.0, 50.0, 90.0], [10.0, 100.0, 30.0]
    assert row.pair_ratios() == [1.0, 0.5, 3.0]
    assert row.as_json()["ratio"]["median"] == 1.0
    assert row.met() is True


def test_quantiles_interpolate() -> None:
    assert stats.quantile([1, 2, 3, 4], 0.5) == 2.5
    assert stats.quantile([4, 1], 1.0) == 4
    assert stats.quantile([7], 0.99) == 7
    assert stats.quantile(list(range(101)), 0.99) == 99


def test_a_spread_is_the_distance_of_quartiles_as_share_of_the_median() -> None:
    summary = stats.summarize([8.0, 9.0, 10.0, 11.0, 12.0])
    assert (summary.median, summary.quartile_1, summary.quartile_3) == (10, 9, 11)
    assert summary.spread == pytest.approx(0.2)
    assert (summary.low, summary.high) == (8, 12)


def test_ratios_of_what_is_no_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        stats.ratios([1, 2], [1])
    with pytest.raises(ValueError, match="of 0"):
        stats.ratios([1], [0])


@pytest.mark.parametrize(
    ("target", "ours", "theirs", "met"),
    [
        (Target("ratio", "at least", 0.8), [8.0], [10.0], True),
        (Target("ratio", "at least", 0.8), [7.9], [10.0], False),
        (Target("ratio", "at most", 0.7), [7.1], [10.0], False),
        (Target("value", "at most", 50), [49.0], [], True),
        (Target("value", "at least", 3), [2.9], [], False),
        (Target("ratio", "at least", 0.8), [8.0], [], None),
        (None, [8.0], [10.0], None),
    ],
)
def test_targets_are_judged(
    target: Target | None, ours: list[float], theirs: list[float], met: bool | None
) -> None:
    row = Row("a", "A", "IOPS", "null", target, ours=ours, theirs=theirs)
    assert row.met() is met
    row.status = "skipped"
    assert row.met() is None


# ---- a real run ------------------------------------------------------------------------------


def test_the_json_names_machine_revision_options_and_pairs(results: dict[str, Any]) -> None:
    for key in ("schema", "revision", "host", "kernel", "cpu", "disk", "options", "started"):
        assert results[key], key
    assert results["options"]["quick"] is True
    assert results["disk"]["type"]
    (row,) = results["benches"]
    assert (row["name"], row["status"], row["against"]) == ("write-qd1-latency", "ok", "null")
    assert len(row["ours"]) == len(row["theirs"]) == len(row["ratios"]) == 1
    assert row["ratios"][0] == pytest.approx(row["ours"][0] / row["theirs"][0])
    assert isinstance(row["met"], bool)
    assert row["details"][0]["ours"]["ios"] == row["settings"]["ios"]
    for name in ("epochd", "null"):
        assert sum(count for _, count in row["curves"]["latency"][name]) > 0


def test_a_run_leaves_nothing_in_its_work_folder(results: dict[str, Any]) -> None:
    assert results["left"] == []


def test_a_run_can_be_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    source, picture = tmp_path / "r.json", tmp_path / "r.png"
    source.write_text(json.dumps(results))
    done = run("plot", source, picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_kind_of_plot_is_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    def bench(name: str, curves: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "title": name, "curves": curves}

    benches = [
        bench("d", {"depths": {"depth": [1, 2], "epochd": [5.0, 9.0], "null": [4.0, 8.0]}}),
        bench("c", {"commits": {"bytes": [4096, 4096, 8192], "us": [10.0, 12.0, 20.0]}}),
        bench("t", {"arena": {"s": [0.0, 0.1], "arena": [0, 1 << 20], "journal": [0, 4096]}}),
        bench("write-qd32", {"latency": {"epochd": [[1000, 5], [2000, 1]]}}),
    ]
    assert len(plot.panels(benches)) == 4
    plot.draw({**results, "benches": benches}, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_a_missing_peer_skips_its_comparison_only(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("taskset", "git", "sh", "readlink", "dirname"):
        found = shutil.which(name)
        assert found, name
        (tools / name).symlink_to(found)
    done = run(*QUICK, "--json", tmp_path / "r.json", "--work", tmp_path / "work", path=str(tools))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "r.json").read_text())["benches"]
    assert row["status"] == "skipped"
    assert "qemu-storage-daemon is not installed" in row["reason"]
    assert len(row["ours"]) == 1
    assert row["theirs"] == []
    assert row["met"] is None
    assert "skipped" in done.stdout
    assert "qemu-storage-daemon is not installed" in done.stdout


def test_without_its_socket_spdk_is_skipped(tmp_path: Path) -> None:
    words = ("write-qd32-spdk", "--quick", "--work", tmp_path / "work")
    for more in ((), ("--spdk-socket", tmp_path / "none.sock")):
        done = run(*words, *more, "--json", tmp_path / "r.json")
        assert done.returncode == 0, done.stderr
        (row,) = json.loads((tmp_path / "r.json").read_text())["benches"]
        assert row["status"] == "skipped"
        assert "SPDK" in row["reason"]


def test_a_daemon_that_dies_fails_the_run(tmp_path: Path) -> None:
    done = run(
        *QUICK,
        *("--json", tmp_path / "r.json", "--work", tmp_path / "work"),
        epochd=impostor(tmp_path, DIES),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "r.json").read_text())["benches"]
    assert row["status"] == "failed"
    assert "epochd died during the run, by signal SIGKILL" in row["reason"]
    assert "failed" in done.stdout
    arena = (tmp_path / "arena").read_text().removeprefix("/")
    assert arena.startswith("epochd-")
    assert list(Path("/dev/shm").glob(f"{arena}*")) == []


def test_wrong_data_fails_the_run(tmp_path: Path) -> None:
    done = run(
        *QUICK,
        *("--json", tmp_path / "r.json", "--work", tmp_path / "work"),
        epochd=impostor(tmp_path, FORGETS),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "r.json").read_text())["benches"]
    assert row["status"] == "failed"
    assert "load generator, exit status 1" in row["reason"]
    assert row["ours"] == []


# ---- parts -----------------------------------------------------------------------------------


def test_the_file_system_image_is_whole_and_the_same_again(tmp_path: Path) -> None:
    size, root = 16 << 20, Path(sys.prefix)
    first = fs_image(tmp_path / "a", size, root)
    again = fs_image(tmp_path / "b", size, root)
    one, two = first.path.read_bytes(), again.path.read_bytes()
    assert len(one) == size
    # The same but for the inodes' times.
    blocks = range(0, size, 4096)
    assert sum(one[at : at + 4096] != two[at : at + 4096] for at in blocks) < len(blocks) // 50
    assert first.digest == again.digest
    assert first.zero_share < 0.15
    check = subprocess.run(["e2fsck", "-f", "-n", first.path], capture_output=True, check=False)
    assert check.returncode == 0, check.stdout
    stamp = first.path.stat().st_mtime_ns
    assert fs_image(tmp_path / "a", size, root) == first
    assert first.path.stat().st_mtime_ns == stamp


def test_samples_of_the_busiest_thread_become_lists_and_flames() -> None:
    text = "\n".join(
        ["7", "\t55 memcpy", "\t66 epoch_write", "\t77 [unknown]", ""] * 3
        + ["7", "\t66 epoch_write", "\t77 [unknown]", ""]
        + ["8", "\t99 poll", ""]
    )
    counts = profile.collapse(text)
    assert counts == Counter(
        {("[unknown]", "epoch_write", "memcpy"): 3, ("[unknown]", "epoch_write"): 1}
    )
    lines = profile.top_list(counts).splitlines()
    assert "4 samples" in lines[0]
    assert lines[1].split() == ["75.0%", "75.0%", "memcpy"]
    assert lines[2].split() == ["25.0%", "100.0%", "epoch_write"]
    picture = profile.flame_graph({"writes <4 KiB>": counts})
    assert "writes &lt;4 KiB&gt;" in picture
    assert "memcpy: 75.0 %" in picture


def test_the_table_tells_reasons_and_remarks() -> None:
    row = Row("seal", "seal", "us", "none", Target("value", "at most", 50), ours=[10.0, 12.0])
    row.notes.append("a remark")
    other = Row("colo", "x", "IOPS", "colo", Target("ratio", "at least", 20), status="skipped")
    other.reason = "no QEMU"
    text = report.table([row, other])
    assert "met" in text
    assert "colo: skipped: no QEMU" in text
    assert "seal: a remark" in text
