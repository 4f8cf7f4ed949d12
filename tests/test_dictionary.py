"""Dictionaries: trained on the images of a running agent, kept with the group, needed for what
was compressed with them, and never silently wrong."""

from __future__ import annotations

import functools
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Attach, StartDaemon
from frontend import Disk
from harness import ControlError, Daemon, DiskSpec, until

BLOCK = 4096
SECTORS = BLOCK // 512
BLOCKS = 1024
LEVEL = ["--compress-level", "6"]  # with a dictionary also when the packer is behind
WORDS = ["seal", "commit", "journal", "epoch", "frame", "cluster", "apply", "waits", "holds", "of"]


def sentence(dice: random.Random) -> str:
    return " ".join(dice.choice(WORDS) for _ in range(16))


SENTENCES = [sentence(random.Random(number)) for number in range(300)]


@functools.cache
def text(number: int) -> bytes:
    """A block such as many programs write: its lines are in other blocks, too, hardly twice in
    the same."""
    dice = random.Random(number)
    lines = ""
    while len(lines) < BLOCK:
        lines += f"[{dice.randrange(10**6):6}] {dice.choice(SENTENCES)}\n"
    return lines.encode()[:BLOCK]


@pytest.fixture
def agent(epochd: StartDaemon) -> Daemon:
    """One whose image holds text."""
    daemon = epochd(DiskSpec(size=BLOCKS * BLOCK), options=LEVEL, start=False)
    daemon.image().write_bytes(b"".join(text(number) for number in range(BLOCKS)))
    return daemon.start()


def train(agent: Daemon, *options: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).parent / "epochctl")
    words = [program, "-s", str(agent.control_path), "train-dictionary", *options]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


def trained(agent: Daemon, *options: str) -> Path:
    """Train one and return its file."""
    done = train(agent, *options)
    assert done.returncode == 0, done.stderr
    return files(agent)[-1]


def files(agent: Daemon) -> list[Path]:
    found = agent.folder.glob("disk0.img.epochd-dictionary-*")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def compression(agent: Daemon) -> dict[str, Any]:
    stats: dict[str, Any] = agent.control.execute("query-stats")["compression"]
    return stats


def write(disk: Disk, start: int, count: int, step: int = 2) -> None:
    """New text into every other block: none has a neighbour."""
    for number in range(start, start + count * step, step):
        disk.write(number * SECTORS, text(number + 10_000))


def check(disk: Disk, start: int, count: int, step: int = 2) -> None:
    for number in range(start, start + count * step, step):
        assert disk.read(number * SECTORS, SECTORS) == text(number + 10_000), f"block {number}"


def write_packed(agent: Daemon, disk: Disk, start: int = 0, count: int = 200) -> None:
    """Write, seal, and wait until it is compressed with a dictionary."""
    before = compression(agent)["dictionary-frames"]
    write(disk, start, count)
    agent.control.seal()
    until(
        "blocks to be compressed with the dictionary",
        lambda: compression(agent)["dictionary-frames"] >= before + count,
    )


def refused(agent: Daemon, *words: str) -> None:
    """It must not start, with status 4 and these words in its last line."""
    with pytest.raises(RuntimeError):
        agent.start()
    assert agent.exit_status == 4
    last = agent.log().splitlines()[-1]
    assert [word for word in words if word not in last] == [], last


def test_training_on_a_running_agent_makes_blocks_smaller(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    write(disk, 0, 200)
    agent.control.seal()
    until("all to be packed", lambda: compression(agent)["pack-bytes-in"] >= 200 * BLOCK)
    before = compression(agent)
    assert (before["dictionary"], before["dictionaries"]) == (None, 0)
    path = trained(agent)
    write_packed(agent, disk, 1)
    now = compression(agent)
    assert path.name.endswith(f"-{now['dictionary']}")
    assert 4096 <= now["dictionary-bytes"] <= 112 << 10
    assert path.stat().st_mode & 0o777 == 0o600
    assert now["pack-ns"] > before["pack-ns"] > 0
    assert now["pack-bytes-out"] - before["pack-bytes-out"] < before["pack-bytes-out"] * 9 // 10
    check(disk, 0, 400, 1)
    agent.control.checkpoint()
    agent.control.wait_applied()
    expected = b"".join(text(n + 10_000) for n in range(400))
    assert agent.image_bytes()[: len(expected)] == expected


def test_it_is_there_after_a_kill_and_a_reboot(agent: Daemon, attach: Attach) -> None:
    trained(agent)
    disk = attach(agent)
    write_packed(agent, disk)
    disk.close()
    agent.stop("kill")
    agent.start()
    disk = attach(agent)
    check(disk, 0, 200)
    write_packed(agent, disk, 1)  # the next one compresses with it, too
    agent.control.commit()
    disk.close()
    agent.stop("kill")
    agent.lose_shm()
    agent.start()
    check(attach(agent), 0, 400, 1)


def test_without_its_file_the_start_is_refused(agent: Daemon, attach: Attach) -> None:
    path = trained(agent)
    disk = attach(agent)
    write_packed(agent, disk)
    disk.close()
    agent.stop("kill")
    aside = path.rename(path.with_suffix(".aside"))
    words = (path.name[-8:], str(agent.folder), "epochd-dictionary-", "give its file back")
    refused(agent, *words)
    refused(agent, *words)  # the first one has changed nothing
    aside.rename(path)
    agent.start()
    check(attach(agent), 0, 200)


def test_the_journal_alone_needs_it_too(
    epochd: StartDaemon, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = epochd(DiskSpec(size=BLOCKS * BLOCK), start=False)
    daemon.image().write_bytes(b"".join(text(number) for number in range(BLOCKS)))
    config = daemon.folder / "slow.toml"  # nothing is applied for now
    config.write_text(
        f'apply-rate = 4096\n[[disk]]\nname = "disk0.img"\n'
        f'image = "{daemon.image()}"\nsocket = "{daemon.socket()}"\n'
    )
    words = ["--config", str(config), "--control", str(daemon.control_path), *LEVEL]
    monkeypatch.setattr(daemon, "arguments", lambda: [*words, "--arena-size", "16M"])
    daemon.start()
    path = trained(daemon)
    disk = attach(daemon)
    write_packed(daemon, disk, count=300)
    epoch = daemon.control.commit()
    assert daemon.control.status()["applied"] < epoch
    disk.close()
    daemon.stop("kill")
    daemon.lose_shm()
    data = path.read_bytes()
    path.unlink()
    refused(daemon, path.name[-8:], "was compressed with it")
    path.write_bytes(data)
    daemon.start()
    assert daemon.control.status()["committed"] == epoch
    check(attach(daemon), 0, 300)


def flip(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


DAMAGES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda data: data[:-1], "does not fit its checksum"),
    (lambda data: data[:50], "was cut"),
    (lambda data: data + bytes(2 << 20), "does not fit its checksum"),
    (lambda data: data[:8] + b"\x09" + data[9:], "version 9"),
    (lambda data: data[:40] + (2 << 20).to_bytes(8, "little") + data[48:], "at most"),
    (flip, "does not fit its checksum"),
]


def test_a_damaged_file_is_not_used(agent: Daemon, attach: Attach) -> None:
    """Nor in the way, where no frame names it."""
    path = trained(agent)
    good = path.read_bytes()
    for damage, why in DAMAGES:
        path.write_bytes(damage(good))
        with pytest.raises(ControlError, match=why):
            agent.control.execute("dictionary-load", id=path.name[-8:])
        agent.restart()
        assert compression(agent)["dictionaries"] == 0
        assert why in agent.log().splitlines()[-2]
    path.write_bytes(good)
    agent.control.execute("dictionary-load", id=path.name[-8:])
    disk = attach(agent)
    write_packed(agent, disk)
    disk.close()
    path.write_bytes(flip(good))
    agent.stop("kill")
    refused(agent, path.name[-8:])
    path.write_bytes(good)
    agent.start()
    check(attach(agent), 0, 200)


def test_another_groups_file_is_not_used(agent: Daemon, epochd: StartDaemon) -> None:
    other = epochd(DiskSpec(size=BLOCKS * BLOCK))
    path = trained(agent)
    shutil.copy(path, other.folder / path.name)
    with pytest.raises(ControlError, match="belongs to another group"):
        other.control.execute("dictionary-load", id=path.name[-8:])
    other.restart()
    assert "belongs to another group; it is not used" in other.log()
    assert compression(other)["dictionary"] is None


def test_loading_one_can_be_repeated_and_needs_an_id(agent: Daemon) -> None:
    path = trained(agent)
    for _ in range(2):
        answer = agent.control.execute("dictionary-load", id=path.name[-8:])
        assert answer["dictionary"] == path.name[-8:]
    for wrong in ("", "../../x", 7, "0123456G", None):
        with pytest.raises(ControlError, match="eight hex digits"):
            agent.control.execute("dictionary-load", id=wrong)
    with pytest.raises(ControlError, match="cannot be read"):
        agent.control.execute("dictionary-load", id="00012345")


def test_older_ones_stay_as_long_as_something_names_them(agent: Daemon, attach: Attach) -> None:
    first = trained(agent)
    disk = attach(agent)
    write_packed(agent, disk)
    second = trained(agent)
    write_packed(agent, disk, 1)
    later = [trained(agent, "--size", "8K") for _ in range(4)]
    disk.close()
    agent.restart("kill")
    assert files(agent) == [first, second, *later]
    assert compression(agent)["dictionary"] == later[-1].name[-8:]
    check(attach(agent), 0, 400, 1)
    agent.control.checkpoint()
    agent.control.wait_applied()
    agent.restart()
    assert files(agent) == later, "but for the newest, what nothing names is removed"
    assert "nothing is compressed with it any more" in agent.log()


@pytest.mark.parametrize("what", ["holes", "zeroes", "small", "noise"])
def test_what_cannot_be_trained_on_is_refused(epochd: StartDaemon, what: str) -> None:
    daemon = epochd(DiskSpec(size=BLOCKS * BLOCK), start=False)
    image = {
        "holes": None,
        "zeroes": bytes(BLOCKS * BLOCK),
        "small": b"".join(text(number) for number in range(200)),
        "noise": random.Random(1).randbytes(BLOCKS * BLOCK),
    }[what]
    if image is not None:
        with daemon.image().open("r+b") as file:
            file.write(image)
    daemon.start()
    done = train(daemon)
    assert done.returncode == 1
    expected = "gains nothing" if what == "noise" else "training takes at least 256"
    assert expected in done.stderr or (what == "noise" and "no dictionary" in done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert files(daemon) == []
    assert compression(daemon)["dictionary"] is None


def test_a_sparse_image_is_sampled_where_it_has_data(epochd: StartDaemon) -> None:
    daemon = epochd(DiskSpec(size=64 << 30), start=False)
    with daemon.image().open("r+b") as file:
        for place in range(64):
            file.seek(place << 30)
            file.write(b"".join(text(place * 16 + number) for number in range(16)))
    daemon.start()
    done = train(daemon, "--size", "16K")
    assert done.returncode == 0, done.stderr
    assert 4096 < compression(daemon)["dictionary-bytes"] <= 16 << 10


@pytest.mark.parametrize("size", ["1K", "2M", "many"])
def test_a_size_that_cannot_be(agent: Daemon, size: str) -> None:
    assert train(agent, "--size", size).returncode == 2


def test_a_killed_training_leaves_nothing_that_counts(agent: Daemon) -> None:
    """What is left of one killed in the middle of its file is taken away by the next."""
    half = agent.folder / "disk0.img.epochd-dictionary-0000abcd.new"
    half.write_bytes(b"EPCDICT1 and no more")
    agent.restart()
    assert compression(agent)["dictionaries"] == 0
    path = trained(agent)
    assert files(agent) == [path]


def test_one_that_was_written_but_not_loaded_is_found_at_the_next_start(agent: Daemon) -> None:
    """Killed between the two steps of training."""
    path = trained(agent)
    agent.stop()
    data = path.read_bytes()
    path.unlink()
    agent.start()
    path.write_bytes(data)
    assert compression(agent)["dictionary"] is None
    agent.restart()
    assert compression(agent)["dictionary"] == path.name[-8:]
