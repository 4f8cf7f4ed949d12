"""The journal's file: allocated and written once, and what its device promises."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from epochd import storage
from harness import Daemon

MIB = 1 << 20


def test_a_new_journal_is_written_all_over(agent: Daemon) -> None:
    """Blocks that are only allocated count as a hole, and would make early commits slow."""
    (journal,) = agent.folder.glob("*.epochd-journal")
    with journal.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        assert size > 8 * MIB
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == size


def test_an_old_journal_keeps_its_contents(agent: Daemon) -> None:
    (journal,) = agent.folder.glob("*.epochd-journal")
    before = agent.control.checkpoint()
    agent.stop()
    contents = journal.read_bytes()
    agent.start()
    assert agent.control.status()["committed"] == before
    assert len(contents) == journal.stat().st_size
    assert contents[1 * MIB : 2 * MIB] == journal.read_bytes()[1 * MIB : 2 * MIB]


@pytest.mark.parametrize(
    ("fua", "cache", "partition", "expected"),
    [
        ("1", "write back", False, True),
        ("0", "write through", False, True),
        ("0", "write back", False, False),
        ("1", "write back", True, True),
        ("0", "write back", True, False),
        (None, None, False, False),
    ],
)
def test_durable_writes_where_the_device_has_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fua: str | None,
    cache: str | None,
    partition: bool,
    expected: bool,
) -> None:
    """As sysfs says it; a partition has its disk's queue, one folder up."""
    file = tmp_path / "journal"
    file.touch()
    device = file.stat().st_dev
    disk = tmp_path / "disk"
    place = disk / "part" if partition else disk
    (disk / "queue").mkdir(parents=True)
    place.mkdir(exist_ok=True)
    if fua is not None and cache is not None:
        (disk / "queue" / "fua").write_text(f"{fua}\n")
        (disk / "queue" / "write_cache").write_text(f"{cache}\n")
    (tmp_path / f"{os.major(device)}:{os.minor(device)}").symlink_to(place)
    monkeypatch.setattr(storage, "SYS_BLOCK", tmp_path)
    fd = os.open(file, os.O_RDONLY)
    try:
        assert storage.forced_unit_access(fd) is expected
    finally:
        os.close(fd)
