"""The live view and `epochctl top`: what they show of a real daemon, without asking it."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Attach, StartDaemon
from epochd.core import MetricsLayout
from epochd.live import Histogram, LiveError, Snapshot, View, find
from frontend import Type
from harness import Daemon, DiskSpec, until

BLOCK = 4096
EPOCHCTL = str(Path(sys.executable).parent / "epochctl")
BUCKETS = len(MetricsLayout.bucket_low)
WRITES = 500


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`epochctl ARGUMENTS`, whatever its end."""
    return subprocess.run(
        [EPOCHCTL, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "160"},
    )


def picture(daemon: Daemon, *arguments: str) -> dict[str, Any]:
    """All figures since the agent's start."""
    done = top(
        "-s", str(daemon.control_path), "top", "--once", "--json", "--interval", "0", *arguments
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def page(daemon: Daemon) -> Path:
    name: str = daemon.control.status()["live-view"]
    return Path(f"/dev/shm{name}")


def histogram(*durations: int) -> Histogram:
    buckets = [0] * BUCKETS
    for ns in durations:
        buckets[max(i for i, low in enumerate(MetricsLayout.bucket_low) if low <= ns)] += 1
    return Histogram(buckets)


# ---- histograms ---------------------------------------------------------------------------


def test_a_percentile_is_at_most_a_sixteenth_too_high() -> None:
    durations = sorted(random.Random(1).randint(1, 1 << 34) for _ in range(2000))
    measured = histogram(*durations)
    for percent in (1, 50, 90, 99, 99.9, 100):
        exact = durations[math.ceil(len(durations) * percent / 100) - 1]
        assert exact <= measured.percentile(percent) <= exact * 17 / 16


def test_percentiles_of_nothing_are_zero() -> None:
    nothing = histogram()
    assert nothing.summary() == {
        "count": 0,
        "mean-ns": 0,
        "p50-ns": 0,
        "p99-ns": 0,
        "p999-ns": 0,
        "max-ns": 0,
    }


def test_one_long_value_is_the_maximum_and_not_the_median() -> None:
    measured = histogram(*[100] * 999, 1_000_000)
    assert measured.percentile(50) < 110
    assert measured.percentile(99.9) < 110
    assert measured.percentile(100) >= 1_000_000
    assert measured.mean() == pytest.approx((99_900 + 1_000_000) / 1000, rel=0.04)


def test_the_difference_of_two_histograms_is_what_came_between() -> None:
    assert (histogram(5, 5, 900) - histogram(5)).buckets == histogram(5, 900).buckets
    assert (histogram() - histogram(5)).count == 0, "of another agent"


# ---- what is shown ------------------------------------------------------------------------


def test_requests_are_counted_each_in_its_stage(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    for number in range(WRITES):
        disk.write(8 * number, bytes([number % 255 + 1]) * BLOCK)
    for number in range(50):
        disk.read(8 * number, 8)
    disk.read(8 * 4000, 8)  # only the image has it
    disk.discard(0, 8)
    disk.write_zeroes(8, 8)
    now = until(
        "the picture to be whole",
        lambda: (p := picture(agent))["disks"][0]["totals"]["write-zeroes"] and p,
    )
    totals = {name: stage["total"]["count"] for name, stage in now["stages"].items()}
    assert totals["write"] == WRITES
    assert totals["read-hit"] == 50
    assert totals["read-miss"] == 1
    assert totals["zero"] == 2
    (shown,) = now["disks"]
    assert shown["totals"]["writes"] == WRITES
    assert shown["totals"]["reads"] == 51
    assert shown["totals"]["write-bytes"] == WRITES * BLOCK
    assert shown["connected"]
    assert shown["queues"] == 1
    for name in ("write", "read-hit", "read-miss"):
        stage = now["stages"][name]["total"]
        assert 0 < stage["p50-ns"] <= stage["p99-ns"] <= stage["max-ns"]
    assert now["reactor"]["requests-a-batch"] >= 1
    assert 0 < now["reactor"]["busy"] < 1


def test_arena_journal_and_epochs_are_those_of_query_status(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    for number in range(300):
        disk.write(8 * number, random.Random(number).randbytes(BLOCK))
    control.checkpoint()
    control.wait_applied()
    disk.write(0, b"x" * BLOCK)
    control.seal()

    def both() -> tuple[dict[str, Any], dict[str, Any]] | None:
        """One and the other, when nothing has moved between them."""
        before, now, after = control.status(), picture(agent), control.status()
        same = {**before, "uptime-seconds": 0} == {**after, "uptime-seconds": 0}
        return (after, now) if same and now["arena"]["used"] == after["arena"]["used"] else None

    pair = until("a quiet moment", both)
    assert pair is not None
    status, now = pair
    for name in ("mode", "generation", "open", "committed", "applied", "name", "uuid", "error"):
        assert now[name] == status[name]
    for name in ("logical-bytes", "stored-bytes", "index-bytes"):
        assert now[name] == status[name]
    assert now["arena"]["size"] == status["arena"]["size"]
    assert now["index"] == status["index"]
    assert now["journal"]["size"] == status["journal"]["size"]
    assert now["live-view"] == status["live-view"]
    assert now["control"] == str(agent.control_path)
    assert now["pid"] == agent.pid


def test_the_stages_of_a_commit_add_up(agent: Daemon, attach: Attach) -> None:
    disk, control = attach(agent), agent.control
    for number in range(64):
        disk.write(8 * number, random.Random(number).randbytes(BLOCK))
    control.checkpoint()
    control.wait_applied()
    control.seal()
    stages = until(
        "the second seal to be shown",
        lambda: (s := picture(agent)["stages"])["seal"]["total"]["count"] == 2 and s,
    )
    total = {name: stage["total"] for name, stage in stages.items()}
    for name in ("commit", "commit-prepare", "commit-write", "commit-flush", "apply-write"):
        assert total[name]["count"] == 1
    parts = ("commit-prepare", "commit-write", "commit-flush")
    assert sum(total[part]["p50-ns"] for part in parts) >= total["commit"]["p50-ns"] * 15 // 16
    assert total["apply"]["max-ns"] >= total["apply-flush"]["max-ns"] * 15 // 16


def test_a_flush_that_waits_for_the_disk_has_a_stage_of_its_own(
    agent: Daemon, attach: Attach
) -> None:
    disk = attach(agent)
    agent.control.execute("promote")
    disk.write(0, b"f" * BLOCK)
    disk.flush()
    stages = picture(agent)["stages"]
    assert stages["flush"]["total"]["count"] == 1
    assert stages["flush"]["total"]["p50-ns"] >= stages["commit-flush"]["total"]["p50-ns"]


def test_some_requests_are_traced_in_full(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    for number in range(WRITES):
        disk.write(8 * number, b"t" * BLOCK)
    traces = picture(agent, "--traces", "100")["traces"]
    assert len(traces) == WRITES // 61
    for trace in traces:
        assert trace["type"] == Type.OUT
        assert trace["status"] == 0
        assert trace["bytes"] == 16 + BLOCK + 1
        assert trace["begun-ns"] <= trace["copied-ns"] <= trace["published-ns"]
    numbers = [trace["number"] for trace in traces]
    assert numbers == list(range(1, len(traces) + 1))
    assert [trace["sector"] for trace in traces] == [8 * (61 * n - 1) for n in numbers]
    assert picture(agent, "--traces", "2")["traces"] == traces[-2:]


def test_rates_are_of_the_time_between_two_looks(agent: Daemon, attach: Attach) -> None:
    """Requests before the first look count in the totals alone."""
    disk = attach(agent)
    for number in range(100):
        disk.write(8 * number, b"r" * BLOCK)
    view = View(agent.control.status()["live-view"])

    def looked(writes: int) -> Snapshot:
        """The driver sees an answer before the view counts it."""
        until(f"{writes} writes counted", lambda: view.read().stages["write"].count >= writes)
        return view.read()

    try:
        before = looked(100)
        for number in range(40):
            disk.write(8 * number, b"s" * BLOCK)
        now = looked(140)
    finally:
        view.close()
    between = now.stages["write"] - before.stages["write"]
    assert between.count == 40
    assert now.stages["write"].count == 140


def test_the_table_for_people_names_disks_and_stages(epochd: StartDaemon, attach: Attach) -> None:
    daemon = epochd(DiskSpec("system"), DiskSpec("data"))
    disk = attach(daemon)
    disk.write(0, b"p" * BLOCK)
    done = top("-s", str(daemon.control_path), "top", "--once", "--interval", "0", "--traces", "5")
    assert done.returncode == 0, done.stderr
    for word in ("system", "data", "write", "arena", "journal", "epoch 1 open", "idle"):
        assert word in done.stdout


def test_a_picture_every_interval_until_interrupted(agent: Daemon) -> None:
    command = [EPOCHCTL, "-s", str(agent.control_path), "top", "--json", "--interval", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(30) == 0
    assert all(one["name"] == seen[0]["name"] for one in seen)
    assert seen[0]["uptime-seconds"] < seen[2]["uptime-seconds"]
    assert seen[1]["interval-seconds"] >= 0.05


# ---- without the agent --------------------------------------------------------------------


@pytest.fixture
def stopped(agent: Daemon, attach: Attach) -> Iterator[Daemon]:
    """A daemon that stands still and answers nobody."""
    attach(agent).write(0, b"h" * BLOCK)
    assert agent.control.status()["live-view"]
    os.kill(agent.pid, signal.SIGSTOP)
    yield agent
    os.kill(agent.pid, signal.SIGCONT)


def test_a_daemon_that_does_not_answer_is_shown(stopped: Daemon) -> None:
    now = until(
        "the process to be stopped", lambda: (p := picture(stopped))["health"] == "stopped" and p
    )
    assert now["stages"]["write"]["total"]["count"] == 1


def test_what_a_killed_agent_left_is_shown_as_dead(agent: Daemon, attach: Attach) -> None:
    attach(agent).write(0, b"k" * BLOCK)
    where = page(agent)
    agent.stop("kill")
    now = picture(agent)
    assert now["health"] == "dead"
    assert now["stages"]["write"]["total"]["count"] == 1
    agent.start()
    now = picture(agent)
    assert page(agent) == where
    assert now["health"] == "idle"
    assert now["pid"] == agent.pid
    assert now["stages"]["write"]["total"]["count"] == 0


def test_a_reader_notices_that_the_view_was_replaced(agent: Daemon) -> None:
    view = View(agent.control.status()["live-view"])
    try:
        assert not view.replaced()
        agent.restart("kill")
        assert view.replaced()
        assert view.read().header["pid"] != agent.pid, "the old one can still be read"
    finally:
        view.close()


# ---- the shared memory --------------------------------------------------------------------


def test_the_view_is_for_its_owner_alone(agent: Daemon) -> None:
    status = page(agent).stat()
    assert status.st_mode & 0o7777 == 0o600
    assert status.st_uid == os.geteuid()


@pytest.mark.parametrize("how", ["quit", "term"])
def test_a_clean_stop_removes_the_view(agent: Daemon, attach: Attach, how: str) -> None:
    attach(agent).write(0, b"c" * BLOCK)  # the arena stays
    where = page(agent)
    assert where.exists()
    agent.stop(how)
    assert not where.exists()
    assert all(path.exists() for path in agent.shm)


def test_what_others_put_in_its_place_is_replaced(agent: Daemon) -> None:
    where = page(agent)
    agent.stop()
    where.write_bytes(b"something else")
    where.chmod(0o666)
    agent.start()
    assert page(agent) == where
    assert where.stat().st_mode & 0o7777 == 0o600
    assert picture(agent)["pid"] == agent.pid


def test_without_room_for_the_view_the_agent_serves_all_the_same(
    agent: Daemon, attach: Attach
) -> None:
    where = page(agent)
    agent.stop()
    where.mkdir()
    try:
        agent.start()
        assert agent.control.status()["live-view"] is None
        assert f"no live view at {where}" in agent.log()
        disk = attach(agent)
        disk.write(0, b"n" * BLOCK)
        assert disk.read(0, 8) == b"n" * BLOCK
        agent.stop()
    finally:
        where.rmdir()


def test_a_page_of_another_version_is_refused(agent: Daemon, tmp_path: Path) -> None:
    copy = Path(f"/dev/shm/epochd-test-{os.getpid()}.live")
    data = bytearray(page(agent).read_bytes())
    data[8] += 1
    try:
        copy.write_bytes(data)
        with pytest.raises(LiveError, match="another version"):
            View(copy.name)
        copy.write_bytes(data[:100])
        with pytest.raises(LiveError, match="too few"):
            View(copy.name)
    finally:
        copy.unlink()


# ---- the command line ---------------------------------------------------------------------


def test_two_agents_have_to_be_told_apart(epochd: StartDaemon) -> None:
    one, two = epochd(), epochd()
    with pytest.raises(LiveError, match="choose one") as several:
        find()
    assert str(one.control_path) in str(several.value)
    assert str(two.control_path) in str(several.value)
    assert f"/dev/shm{find(two.control_path)}" == str(page(two))
    named = top("top", "--once", "--json", "--interval", "0", "--shm", page(one).name)
    assert json.loads(named.stdout)["pid"] == one.pid


def test_a_socket_without_agent_is_named(tmp_path: Path) -> None:
    done = top("-s", str(tmp_path / "no.sock"), "top", "--once")
    assert done.returncode == 3
    assert "no live view" in done.stderr
    assert "no.sock" in done.stderr


def test_a_view_that_is_not_there_is_named() -> None:
    done = top("top", "--shm", "/epochd-none.live", "--once")
    assert done.returncode == 3
    assert "/dev/shm/epochd-none.live" in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        ("--interval", "-1"),
        ("--interval", "soon"),
        ("--interval", "nan"),
        ("--interval", "0"),
        ("--traces", "-2"),
        ("--traces", "all"),
    ],
)
def test_wrong_usage_is_refused(wrong: tuple[str, str]) -> None:
    done = top("top", *wrong)
    assert done.returncode == 2
    assert wrong[0] in done.stderr


def test_the_other_verbs_need_a_socket_still() -> None:
    done = top("status")
    assert done.returncode == 2
    assert "--socket" in done.stderr
