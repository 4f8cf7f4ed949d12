"""What is refused is counted by kind in query-stats, and told in one line of the log that says
who, what and why; and no flood of it floods the log."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from conftest import Attach, StartDaemon
from frontend import (
    DEADLINE_S,
    Disk,
    FrontEndError,
    Request,
    Status,
    Type,
)
from frontend.wire import REGION, REGIONS
from harness import ControlError, Daemon, DiskSpec, until

ME = f"process {os.getpid()} of user {os.getuid()}"
ZEROES = struct.Struct("<QII")
SECTORS = (64 << 20) // 512
NOBODY = 65534


def counts(agent: Daemon) -> dict[str, int]:
    answer: dict[str, int] = agent.control.execute("query-stats")["rejections"]
    return answer


def counted(agent: Daemon, **wanted: int) -> None:
    """These and no others."""
    nonzero = {kind.replace("-", "_"): count for kind, count in counts(agent).items() if count}
    assert nonzero == wanted


def told(agent: Daemon, *words: str, times: int = 1) -> None:
    """In so many lines of the log, and of no lower level than a warning."""

    def lines() -> list[str]:
        return [line for line in agent.log().splitlines() if all(word in line for word in words)]

    until(f"a line with {words}", lambda: len(lines()) >= times)
    assert len(lines()) == times
    assert all(" WARNING: " in line or " ERROR: " in line for line in lines())


# ---- front ends ---------------------------------------------------------------------------


def test_nothing_is_rejected_of_those_that_behave(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    disk.write(0, b"g" * 4096)
    assert disk.read(0, 8) == b"g" * 4096
    disk.close()
    agent.control.checkpoint()
    counted(agent)


def test_a_second_front_end(agent: Daemon, attach: Attach) -> None:
    attach(agent)
    with pytest.raises(FrontEndError):
        attach(agent)
    counted(agent, second_front_ends=1)
    told(agent, "disk disk0.img", "second front end was turned away", f"{ME}: {ME} has the disk")


def test_a_frame_that_cannot_be_trusted(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent, start=False)
    disk.channel.send(Request.GET_FEATURES, flags=0)
    disk.channel.wait_hang_up()
    until("the connection to be counted", lambda: counts(agent)["front-ends"])
    counted(agent, front_ends=1)
    told(agent, "disk disk0.img", ME, "disconnected", "message version 0, not 1")


def test_a_message_that_is_refused(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    with pytest.raises(FrontEndError):
        disk.set_size(0, 3)
    counted(agent, messages=1)
    told(agent, "disk disk0.img", ME, "SET_VRING_NUM", "power of two")


def add_nowhere(disk: Disk) -> None:
    """A memory region beyond the end of its file."""
    region = disk.memory.regions[0]
    wire = REGION.pack(1 << 40, 1 << 40, 1 << 40, 1 << 40)
    disk.command(Request.ADD_MEM_REG, bytes(8) + wire, [region.fd])


def overlap(disk: Disk) -> None:
    """A table of twice the same region."""
    region = disk.memory.regions[0]
    table = REGIONS.pack(2, 0) + 2 * region.wire()
    disk.command(Request.SET_MEM_TABLE, table, [region.fd, region.fd])


@pytest.mark.parametrize(
    ("put", "message"), [(add_nowhere, "ADD_MEM_REG"), (overlap, "SET_MEM_TABLE")]
)
def test_memory_that_cannot_be(
    agent: Daemon, attach: Attach, put: Callable[[Disk], None], message: str
) -> None:
    disk = attach(agent)
    with pytest.raises(FrontEndError):
        put(disk)
    counted(agent, memory=1)
    told(agent, "disk disk0.img", ME, message)


# ---- rings and requests -------------------------------------------------------------------


def test_a_broken_ring(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    disk.queues[0].push_raw(9999)
    reason = agent.wait_broken()
    counted(agent, rings=1)
    told(agent, "disk disk0.img", f"queue 0 of {ME} is broken and stopped", reason)


@pytest.mark.parametrize(
    ("kind", "sector", "payload", "room", "status", "why"),
    [
        (99, 0, b"", 0, Status.UNSUPP, "unknown type 99"),
        (Type.IN, SECTORS, b"", 512, Status.IOERR, "beyond the disk's end"),
        (Type.OUT, SECTORS - 1, bytes(1024), 0, Status.IOERR, "beyond the disk's end"),
        (Type.OUT, 0, bytes(100), 0, Status.IOERR, "not made of whole sectors"),
        (Type.DISCARD, 0, ZEROES.pack(0, 8, 0)[:-1], 0, Status.IOERR, "15 bytes of ranges"),
        (Type.DISCARD, 0, 2 * ZEROES.pack(0, 8, 0), 0, Status.UNSUPP, "32 bytes of ranges"),
        (Type.DISCARD, 0, ZEROES.pack(0, 8, 1), 0, Status.UNSUPP, "unknown flags 0x1"),
        (Type.WRITE_ZEROES, 0, ZEROES.pack(SECTORS, 8, 0), 0, Status.IOERR, "beyond the disk"),
    ],
)
def test_a_request_for_what_cannot_be(
    agent: Daemon,
    attach: Attach,
    kind: int,
    sector: int,
    payload: bytes,
    room: int,
    status: Status,
    why: str,
) -> None:
    disk = attach(agent, queues=2)
    assert disk.request(kind, sector, payload, room, queue=1).status == status
    counted(agent, requests=1)
    told(agent, "disk disk0.img", f"queue 1 of {ME}", why)


def test_a_write_to_a_read_only_disk(epochd: StartDaemon, attach: Attach) -> None:
    agent = epochd(DiskSpec(read_only=True))
    disk = attach(agent)
    assert disk.request(Type.OUT, 0, bytes(512)).status == Status.IOERR
    counted(agent, requests=1)
    told(agent, ME, "512 bytes at sector 0", "read-only")


def test_a_flood_of_bad_requests_is_counted_in_full_and_told_in_a_few_lines(
    agent: Daemon, attach: Attach
) -> None:
    disk, flood = attach(agent), 3000
    began = time.monotonic()
    for _ in range(flood // 50):
        disk.wait(*[disk.submit(99) for _ in range(50)])
    counted(agent, requests=flood)
    assert disk.request(99).status == Status.UNSUPP
    until("the closing line", lambda: "(requests) before this one" in agent.log())
    told_of = agent.log().count("unknown type 99")
    assert told_of <= 101 + 5 * (time.monotonic() - began)
    assert disk.read(0, 8) == bytes(4096)


# ---- control ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind", "why"),
    [
        ("hello", "control_json", "not JSON"),
        ('{"execute": nul}', "control_json", "invalid JSON"),
        ("[1]", "control_json", "is a JSON object"),
        ("[" * 40, "control_json", "nested"),
        ('{"execute": "fly"}', "control_commands", "'fly'"),
        ('{"execute": 7}', "control_commands", "not a string"),
        ('{"execute": "quit", "when": 1}', "control_commands", "'when'"),
        (
            '{"execute": "epoch-commit", "arguments": {"epoch": "x"}}',
            "control_arguments",
            "not an integer",
        ),
        (
            '{"execute": "epoch-seal", "arguments": {"a": 1}}',
            "control_arguments",
            "unknown argument 'a'",
        ),
        (
            '{"execute": "epoch-commit", "arguments": {"epoch": 77}}',
            "control_refusals",
            "epoch 77 does not exist",
        ),
    ],
)
def test_a_bad_command(agent: Daemon, line: str, kind: str, why: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(str(agent.control_path))
        with client.makefile("rb") as replies:
            replies.readline()  # the greeting
            client.sendall(b'{"execute": "qmp_capabilities"}\n')
            replies.readline()
            client.sendall(line.encode() + b"\n")
            assert "error" in json.loads(replies.readline())
    counted(agent, **{kind: 1})
    told(agent, "rejected a command", ME, why)


def test_a_client_that_sends_too_much(agent: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(str(agent.control_path))
        client.sendall(b'{"' + b"x" * 100_000)
        with contextlib.suppress(ConnectionResetError):
            while client.recv(65536):
                pass
    counted(agent, control_clients=1)
    told(agent, ME, "65536 characters")


def test_another_user(agent: Daemon) -> None:
    agent.folder.chmod(0o755)
    agent.control_path.chmod(0o666)
    program = (
        "import os, socket, sys\n"
        "os.chdir(sys.argv[1])\n"
        f"os.setresgid({NOBODY}, {NOBODY}, {NOBODY})\n"
        f"os.setresuid({NOBODY}, {NOBODY}, {NOBODY})\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[2])\n"
        "try:\n"
        "    s.recv(100)\n"
        "except ConnectionResetError:\n"
        "    pass\n"
        "print(os.getpid())\n"
    )
    command = [sys.executable, "-c", program, str(agent.folder), agent.control_path.name]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE_S)
    counted(agent, control_peers=1)
    told(agent, f"process {done.stdout.strip()} of user {NOBODY}", "only root and user")


# ---- floods -------------------------------------------------------------------------------


def refuse(agent: Daemon) -> None:
    with pytest.raises(ControlError):
        agent.control.execute("no-such-verb")


def test_a_flood_of_rejections_does_not_flood_the_log(agent: Daemon) -> None:
    began = time.monotonic()
    count = 0
    while count < 300 or "were not logged" not in agent.log():  # the next line that is due tells
        refuse(agent)
        count += 1
    assert counts(agent)["control-commands"] == count
    lines = agent.log().count("no-such-verb")
    assert 100 <= lines <= 101 + 5 * (time.monotonic() - began)
    assert lines < count


def test_a_flood_that_has_ended_is_summed_up(agent: Daemon) -> None:
    """Nobody is refused any more, and still the log tells how many were."""
    for _ in range(150):
        refuse(agent)

    def all_told() -> bool:
        lines = agent.log().splitlines()
        sums = [line.split("WARNING: ")[1] for line in lines if "were not logged" in line]
        silent = sum(int(line.split()[0]) for line in sums)
        return sum("no-such-verb" in line for line in lines) + silent == 150

    until("all to be told", all_told)


def test_a_front_end_that_comes_and_goes_does_not_flood_the_log(agent: Daemon) -> None:
    began = time.monotonic()
    for _ in range(300):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE_S)
            client.connect(str(agent.socket()))
            client.sendall(b"x")
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
    lines = agent.log().count("front end connected")
    assert lines <= 101 + 5 * (time.monotonic() - began)
    assert agent.control.status()["clients"] == 0
