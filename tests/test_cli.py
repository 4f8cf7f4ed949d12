"""The two commands as scripts see them: files, sockets, messages, exit statuses.

Exit statuses of epochd: 0 stopped, 1 failure, 2 usage, 3 image, 4 journal or arena, 5 socket.
Of epochctl: 0 done, 1 refused, 2 usage, 3 no agent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest
from conftest import Attach, StartDaemon
from frontend import DEADLINE_S, Disk, FrontEndError
from harness import Control, Daemon, DiskSpec, StorageDaemon, command, listens, mounted, until

MIB = 1 << 20
EPOCHCTL = str(Path(sys.executable).parent / "epochctl")


def run(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the daemon's command to its end."""
    words = [*command(), *map(str, arguments)]
    settings = {"timeout": DEADLINE_S, "capture_output": True, "text": True, **settings}
    return subprocess.run(words, check=False, **settings)


def refused(
    folder: Path, status: int, *words: str, image: object = None, options: tuple[object, ...] = ()
) -> str:
    """Start on an image and expect the refusal: its status, and words of its one line."""
    if image is None:
        image = make_image(folder)
    answer = run(
        "--blk-file",
        image,
        "--socket-path",
        folder / "v.sock",
        "--control",
        folder / "c.sock",
        "--arena-size",
        "16M",
        *options,
    )
    assert answer.returncode == status, answer
    message = answer.stderr.splitlines()[-1]
    for word in words:
        assert word in message, answer.stderr
    assert "Traceback" not in answer.stderr
    return message


def make_image(folder: Path, size: int = MIB, name: str = "disk.img") -> Path:
    image = folder / name
    with image.open("wb") as file:
        file.truncate(size)
    return image


def ctl(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EPOCHCTL, "-s", str(path), *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


# ---- what is printed ----------------------------------------------------------------------


def test_capabilities_are_json_and_nothing_else() -> None:
    answer = run("--print-capabilities")
    assert answer.returncode == 0
    assert json.loads(answer.stdout) == {"type": "block", "features": ["read-only", "blk-file"]}


def test_help_explains_every_flag_and_status() -> None:
    answer = run("--help")
    assert answer.returncode == 0
    for flag in (
        "--config",
        "--blk-file",
        "--socket-path",
        "--fd",
        "--read-only",
        "--control",
        "--state-dir",
        "--arena-size",
        "--journal-size",
        "--compress-level",
        "--log-level",
        "--print-capabilities",
        "--version",
    ):
        assert flag in answer.stdout
    assert "Exit status" in answer.stdout


def test_versions_agree() -> None:
    version = run("--version").stdout.split()[1]
    told = subprocess.run([EPOCHCTL, "--version"], check=True, capture_output=True, text=True)
    assert told.stdout == f"epochctl {version}\n"


def test_the_description_file_says_what_qemu_asks_for() -> None:
    path = Path(sys.prefix) / "share/qemu/vhost-user/50-epochd.json"
    description = json.loads(path.read_text())
    assert description["type"] == "block"
    assert Path(description["binary"]).is_absolute()
    assert set(description) <= {"type", "binary", "description", "tags"}


def test_usage_is_status_2(tmp_path: Path) -> None:
    answer = run("--nonsense")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "--nonsense" in answer.stderr
    (tmp_path / "bad.toml").write_text("colour = 1\n")
    answer = run("--config", tmp_path / "bad.toml")
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"epochd: {tmp_path}/bad.toml: colour: unknown key")


# ---- images -------------------------------------------------------------------------------


def test_a_missing_image(tmp_path: Path) -> None:
    refused(tmp_path, 3, f"{tmp_path}/no.img", "no such file", image=tmp_path / "no.img")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    refused(tmp_path, 3, str(tmp_path), "directory", image=tmp_path)


def test_a_fifo_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path, 3, "neither a regular file", image=tmp_path / "fifo")


@pytest.mark.parametrize("size", [1, 511, 513, MIB + 100])
def test_an_image_is_whole_sectors(tmp_path: Path, size: int) -> None:
    message = refused(tmp_path, 3, f"{size} bytes", image=make_image(tmp_path, size))
    assert "not a multiple of 512" in message


def test_an_empty_image(tmp_path: Path) -> None:
    refused(tmp_path, 3, "is empty", image=make_image(tmp_path, 0))


def test_an_image_that_may_not_be_written(tmp_path: Path, loop_512: Path) -> None:
    subprocess.run(["blockdev", "--setro", loop_512], check=True)
    try:
        options = ("--state-dir", tmp_path)
        refused(tmp_path, 3, str(loop_512), "write-protected", image=loop_512, options=options)
    finally:  # the kernel keeps this setting for the device's next user
        subprocess.run(["blockdev", "--setrw", loop_512], check=True)


def test_a_file_on_a_read_only_file_system(tmp_path: Path) -> None:
    with mounted(tmp_path, 8) as root:
        image = make_image(root)
        subprocess.run(["mount", "-o", "remount,ro", root], check=True)
        options = ("--state-dir", tmp_path)
        refused(tmp_path, 3, "read-only file system", image=image, options=options)


def test_a_mounted_block_device(tmp_path: Path, loop_512: Path) -> None:
    subprocess.run(["mke2fs", "-q", loop_512], check=True)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", loop_512, tmp_path / "mnt"], check=True)
    try:
        options = ("--state-dir", tmp_path)
        refused(tmp_path, 3, "in use", "mounted", image=loop_512, options=options)
    finally:
        subprocess.run(["umount", tmp_path / "mnt"], check=True)


@pytest.mark.parametrize("loop", ["loop_512", "loop_4k"])
def test_a_block_device_is_served(
    epochd: StartDaemon, attach: Attach, loop: str, request: pytest.FixtureRequest
) -> None:
    device: Path = request.getfixturevalue(loop)
    block = 4096 if loop == "loop_4k" else 512
    agent = epochd(DiskSpec(image=device))
    info = agent.disk_info()
    assert (info["size"], info["logical-block-size"]) == (64 * MIB, block)
    assert info["direct"] is True
    disk = attach(agent)
    disk.write(8, b"\x07" * 4096)
    agent.control.checkpoint()
    agent.stop("quit")
    assert device.read_bytes()[4096:8192] == b"\x07" * 4096


def test_an_image_that_qemu_has_is_refused(tmp_path: Path) -> None:
    holder = StorageDaemon(tmp_path)
    try:
        refused(tmp_path, 3, str(holder.image), "already in use", "write", image=holder.image)
    finally:
        holder.close()


def test_our_image_is_refused_to_qemus_tools(agent: Daemon, tmp_path: Path) -> None:
    image = str(agent.image())
    for words in (
        ["qemu-img", "convert", "-f", "raw", image, str(tmp_path / "copy")],
        ["qemu-img", "resize", "-f", "raw", image, "128M"],
        ["qemu-io", "-f", "raw", "-c", "write 0 512", image],
        ["qemu-io", "-f", "raw", "-r", "-c", "read 0 512", image],
    ):
        answer = subprocess.run(
            words, check=False, capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert answer.returncode != 0, words
        assert "Is another process using the image" in answer.stderr
    agent.stop()
    words = ["qemu-io", "-f", "raw", "-c", "write 0 512", image]
    subprocess.run(words, check=True, capture_output=True, timeout=DEADLINE_S)


def test_a_second_agent_is_refused_and_the_first_unharmed(agent: Daemon, tmp_path: Path) -> None:
    refused(tmp_path, 3, str(agent.image()), "already in use", image=agent.image())
    assert agent.control.seal() == 1


def test_readers_share_a_read_only_image(epochd: StartDaemon, attach: Attach) -> None:
    first = epochd(DiskSpec(read_only=True))
    first.image()
    second = epochd(DiskSpec(image=first.image(), read_only=True))
    assert attach(first).read(0, 8) == attach(second).read(0, 8) == bytes(4096)


def test_one_image_may_not_be_two_disks(tmp_path: Path) -> None:
    image = make_image(tmp_path)
    os.link(image, tmp_path / "other.img")
    (tmp_path / "vm.toml").write_text(
        '[[disk]]\nimage = "disk.img"\nsocket = "a"\n[[disk]]\nimage = "other.img"\nsocket = "b"\n'
    )
    answer = run("--config", tmp_path / "vm.toml", "--arena-size", "16M")
    assert answer.returncode == 2
    assert "same file" in answer.stderr


# ---- journal and arena --------------------------------------------------------------------


def test_an_arena_larger_than_memory(tmp_path: Path) -> None:
    refused(tmp_path, 4, "memory", "--arena-size", options=("--arena-size", "1T"))
    assert [path.name for path in tmp_path.iterdir()] == ["disk.img"]


def test_an_arena_larger_than_shared_memory(tmp_path: Path) -> None:
    """In a mount namespace of its own, /dev/shm has 32 MiB."""
    image = make_image(tmp_path)
    words = [
        *command(),
        "--blk-file",
        str(image),
        "--socket-path",
        str(tmp_path / "v.sock"),
        "--arena-size",
        "64M",
    ]
    script = 'mount -t tmpfs -o size=32m none /dev/shm && exec "$@"'
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert answer.returncode == 4
    assert "/dev/shm" in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["disk.img"]


def test_no_room_for_the_journal(tmp_path: Path) -> None:
    with mounted(tmp_path, 16) as root:
        options = ("--state-dir", root)
        refused(tmp_path, 4, str(root), "no room", "--journal-size", options=options)
        assert not list(root.glob("*.epochd-journal"))


def test_a_journal_too_small_for_the_arena(tmp_path: Path) -> None:
    message = refused(tmp_path, 4, "too few", options=("--journal-size", "1M"))
    assert "--journal-size of at least" in message


def test_a_state_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path, 4, "--state-dir", options=("--state-dir", tmp_path / "no"))


@pytest.mark.parametrize("content", [b"something else\n" * 5000, b"\xff" * MIB])
def test_a_journal_of_something_else(tmp_path: Path, content: bytes) -> None:
    journal = tmp_path / "disk.img.epochd-journal"
    journal.write_bytes(content)
    refused(tmp_path, 4, str(journal))
    assert journal.read_bytes() == content


def test_a_journal_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "disk.img.epochd-journal").mkdir()
    refused(tmp_path, 4, "not a regular file")


def test_one_agent_a_journal(agent: Daemon, tmp_path: Path) -> None:
    """Another image of the same name does not give a way to the first one's epochs."""
    image = make_image(tmp_path, name=agent.image().name)
    options = ("--state-dir", agent.folder)
    refused(tmp_path, 4, "another epochd holds it", image=image, options=options)


def test_a_journal_of_another_image(agent: Daemon, tmp_path: Path) -> None:
    agent.stop("quit")
    image = make_image(tmp_path, 64 * MIB, agent.image().name)
    options = ("--state-dir", agent.folder)
    refused(tmp_path, 4, agent.image().name, image=image, options=options)
    agent.start()


def test_sizes_of_an_old_group_stay(epochd: StartDaemon, attach: Attach) -> None:
    agent = epochd()
    attach(agent).write(0, b"\x05" * 4096)
    agent.stop()
    agent.arena, agent.options = "32M", ["--journal-size", "128M"]
    agent.start()
    status = agent.control.status()
    assert 15 * MIB < status["arena"]["size"] <= 16 * MIB  # whole segments
    assert agent.log().count("keeps its size") == 2
    assert attach(agent).read(0, 8) == b"\x05" * 4096


# ---- start and stop -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["term", "int", "quit"])
def test_a_clean_stop_leaves_nothing_behind(agent: Daemon, how: str) -> None:
    agent.control.checkpoint()
    if how == "int":
        os.kill(agent.pid, signal.SIGINT)
        assert agent.wait_exit() == 0
    else:
        agent.stop(how)
    assert not agent.socket().exists()
    assert not agent.control_path.exists()
    assert not any(path.exists() for path in agent.shm)


def test_a_clean_stop_keeps_what_is_not_committed(agent: Daemon, attach: Attach) -> None:
    attach(agent).write(0, b"\x01" * 4096)
    agent.control.seal()
    attach_again = agent.control.status()
    agent.stop()
    assert all(path.exists() for path in agent.shm)
    assert agent.image_bytes()[:4096] == bytes(4096)
    agent.start()
    status = agent.control.status()
    assert status["sealed"] == attach_again["sealed"] == [1]
    assert status["open"] == attach_again["open"]
    assert attach(agent).read(0, 8) == b"\x01" * 4096


def signalled(agent: Daemon, words: str) -> bool:
    """Send one more SIGTERM and see whether the log has `words` by now."""
    os.kill(agent.pid, signal.SIGTERM)
    return words in agent.log()


def test_signals_at_once_are_one_wish(agent: Daemon, attach: Attach) -> None:
    """timeout(1) sends two: the images are up to date all the same."""
    attach(agent).write(0, b"\x01" * 4096)
    agent.control.checkpoint()
    for _ in range(3):
        os.kill(agent.pid, signal.SIGTERM)
    assert agent.wait_exit() == 0
    assert agent.image_bytes()[:4096] == b"\x01" * 4096
    assert "not waiting" not in agent.log()


def test_a_second_signal_does_not_wait_for_the_images(
    epochd: StartDaemon, attach: Attach, tmp_path: Path
) -> None:
    """The image's file system is frozen: applying waits. The next start does the rest."""
    with mounted(tmp_path, 64) as root:
        image = make_image(root, 16 * MIB)
        agent = epochd(DiskSpec(image=image))
        disk = attach(agent)
        content = b"".join(block.to_bytes(2, "little") * 2048 for block in range(500))
        disk.write(0, content[: 250 * 4096])
        disk.write(2000, content[250 * 4096 :])
        subprocess.run(["fsfreeze", "--freeze", root], check=True)
        try:
            agent.control.checkpoint()
            until("the agent to hurry", lambda: signalled(agent, "not waiting"))
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", root], check=True)
        assert agent.wait_exit() == 0
        agent.start()
        agent.control.wait_applied()
        assert agent.image_bytes()[: len(content)] == content
        agent.stop()


def test_a_stop_does_not_wait_for_room_in_the_arena(epochd: StartDaemon, attach: Attach) -> None:
    agent = epochd(arena="8M")
    disk = attach(agent)

    def fill() -> None:
        for block in range(4096):
            disk.write(block * 8, os.urandom(4096))

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(fill)
        until("a write to be held", lambda: agent.control.status()["held"])
        agent.stop()
        assert isinstance(writer.exception(DEADLINE_S), FrontEndError)
    agent.start()
    assert agent.control.status()["arena"]["percent"] > 50


def test_a_socket_of_a_killed_agent_is_replaced(agent: Daemon) -> None:
    agent.stop("kill")
    assert agent.socket().exists()
    agent.start()
    assert listens(agent.socket())
    assert listens(agent.control_path)


@pytest.mark.parametrize("option", ["--socket-path", "--control"])
def test_a_socket_that_answers_is_refused(tmp_path: Path, option: str) -> None:
    path = tmp_path / "taken.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        refused(tmp_path, 5, str(path), "listening", options=(option, path))
        assert path.exists()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


@pytest.mark.parametrize("option", ["--socket-path", "--control"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, option: str) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("precious")
    refused(tmp_path, 5, str(path), "not a socket", options=(option, path))
    assert path.read_text() == "precious"


def test_a_start_that_fails_leaves_no_arena(tmp_path: Path) -> None:
    """The sockets come last. In a mount namespace of its own, /dev/shm shows what is left."""
    (tmp_path / "v.sock").write_text("no socket")
    words = [
        *command(),
        "--blk-file",
        str(make_image(tmp_path)),
        "--socket-path",
        str(tmp_path / "v.sock"),
        "--arena-size",
        "16M",
    ]
    script = 'mount -t tmpfs none /dev/shm && { "$@"; echo "status $?"; ls /dev/shm; }'
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert answer.stdout == "status 5\n", answer
    assert not (tmp_path / "disk.img.control").exists()


def test_a_socket_path_too_long_or_in_no_folder(tmp_path: Path) -> None:
    refused(tmp_path, 5, "longer than", options=("--socket-path", tmp_path / ("x" * 120)))
    refused(tmp_path, 5, "folder", options=("--socket-path", tmp_path / "no" / "v.sock"))


def test_a_replaced_socket_file_is_not_ours_to_remove(agent: Daemon) -> None:
    agent.socket().unlink()
    agent.socket().write_text("of somebody else")
    agent.stop()
    assert agent.socket().read_text() == "of somebody else"


def test_a_second_front_end_is_turned_away(agent: Daemon, attach: Attach) -> None:
    first = attach(agent)
    with socket.socket(socket.AF_UNIX) as second:
        second.settimeout(DEADLINE_S)
        second.connect(str(agent.socket()))
        assert second.recv(1) == b""
    first.write(0, b"\x01" * 512)
    assert first.read(0, 1) == b"\x01" * 512
    assert "second front end was turned away" in agent.log()


def test_a_front_end_that_comes_back_is_served(agent: Daemon, attach: Attach) -> None:
    """However fast: nobody may have noticed yet that the first one is gone."""
    for value in range(50):
        disk = attach(agent)
        disk.write(value, bytes([value]) * 512)
        disk.close()
    disk = attach(agent)
    assert disk.read(0, 50) == b"".join(bytes([value]) * 512 for value in range(50))


def test_an_inherited_socket_that_listens(tmp_path: Path) -> None:
    path = tmp_path / "inherited.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(4)
        with inherited(tmp_path, listener) as control:
            for value in (b"\x01", b"\x02"):
                with contextlib.closing(Disk(path).start(1, 64)) as disk:
                    disk.write(0, value * 512)
                    assert disk.read(0, 1) == value * 512
            assert control.disks()[0]["socket"] is None
    assert path.exists()


def test_an_inherited_socket_that_is_connected(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with inherited(tmp_path, theirs) as control:
        theirs.close()
        ours.sendall(bytes.fromhex("010000000100000000000000"))  # GET_FEATURES
        ours.settimeout(DEADLINE_S)
        reply = ours.recv(100)
        assert len(reply) == 20
        assert reply[:4] == bytes.fromhex("01000000")
        ours.close()
        control.wait_event("CLIENT_DISCONNECTED")
        assert control.status()["clients"] == 0


@contextlib.contextmanager
def inherited(folder: Path, sock: socket.socket) -> Iterator[Control]:
    """A daemon that was given `sock` as its vhost-user socket; yields its control channel."""
    path = folder / "c.sock"
    process = subprocess.Popen(
        [
            *command(),
            "--blk-file",
            str(make_image(folder)),
            "--fd",
            str(sock.fileno()),
            "--control",
            str(path),
            "--arena-size",
            "16M",
        ],
        pass_fds=[sock.fileno()],
    )
    try:
        until("the control socket", lambda: listens(path))
        control = Control(path)
        try:
            yield control
            control.discard()  # nothing is left in the arena, so it goes with the daemon
        finally:
            control.close()
    finally:
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("what", ["closed", "file", "pipe"])
def test_an_inherited_thing_that_is_no_socket(tmp_path: Path, what: str) -> None:
    read, write = os.pipe()
    fd = {"closed": 900, "pipe": read, "file": os.open("/dev/null", os.O_RDONLY)}[what]
    answer = run(
        "--blk-file",
        make_image(tmp_path),
        "--fd",
        fd,
        "--control",
        tmp_path / "c.sock",
        "--arena-size",
        "16M",
        pass_fds=[] if what == "closed" else [fd],
    )
    os.close(read)
    os.close(write)
    assert answer.returncode == 2
    assert f"--fd {fd}: not an open socket" in answer.stderr


# ---- epochctl -----------------------------------------------------------------------------


def test_status_for_people_and_for_scripts(agent: Daemon) -> None:
    answer = ctl(agent.control_path, "status")
    assert answer.returncode == 0
    words = {line.split()[0] for line in answer.stdout.splitlines()}
    assert {"mode", "open", "sealed", "committed", "applied", "arena", "journal"} <= words
    for arguments in (("status", "--json"), ("--json", "status")):
        answer = ctl(agent.control_path, *arguments)
        assert answer.stdout.count("\n") == 1
        assert json.loads(answer.stdout)["open"] == 1


def test_every_verb_is_a_word(agent: Daemon) -> None:
    path = agent.control_path
    assert ctl(path, "seal").stdout == "sealed 1\n"
    assert ctl(path, "commit", "1").stdout == "committed 1\n"
    assert json.loads(ctl(path, "seal", "--json").stdout) == {"epoch": 2}
    assert json.loads(ctl(path, "commit", "--json").stdout) == {"committed": 2}
    ctl(path, "seal")
    assert ctl(path, "discard").stdout == "discarded 3..4 (2); committed is 2\n"
    assert ctl(path, "discard").stdout == "discarded none; committed is 2\n"
    assert "journal-bytes-written" in ctl(path, "stats").stdout
    assert "group" in json.loads(ctl(path, "stats", "--json").stdout)
    assert ctl(path, "promote").stdout.startswith("mode active, generation ")
    assert ctl(path, "quit").returncode == 0
    assert agent.wait_exit() == 0


def test_a_refusal_is_status_1(agent: Daemon) -> None:
    answer = ctl(agent.control_path, "commit", "77")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("epochctl: commit: ")
    assert "77" in answer.stderr


@pytest.mark.parametrize(
    "words", [(), ("undo",), ("commit", "0"), ("commit", "x"), ("seal", "1"), ("status", "--yaml")]
)
def test_wrong_usage_is_status_2(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert ctl(tmp_path / "c.sock", *words).returncode == 2


def test_no_agent_is_status_3(tmp_path: Path) -> None:
    stale, plain = tmp_path / "stale.sock", tmp_path / "file"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    plain.touch()
    for path in (tmp_path / "missing.sock", stale, plain):
        answer = ctl(path, "status")
        assert (answer.returncode, answer.stdout) == (3, "")
        assert answer.stderr.startswith(f"epochctl: no agent answers at {path}: ")
        assert answer.stderr.count("\n") == 1


def first_event(agent: Daemon, stream: IO[str]) -> str:
    """Watching begins some time after the start: seal until the first event arrives."""
    os.set_blocking(stream.fileno(), False)
    line = until("the first event", lambda: agent.control.seal() and stream.readline())
    os.set_blocking(stream.fileno(), True)
    return str(line)


def test_watch_streams_until_the_agent_stops(agent: Daemon) -> None:
    with subprocess.Popen(
        [EPOCHCTL, "-s", str(agent.control_path), "watch", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    ) as watch:
        assert watch.stdout is not None
        first_event(agent, watch.stdout)
        agent.stop("quit")
        events = [json.loads(line) for line in watch.stdout]
        assert watch.wait(DEADLINE_S) == 0
    assert events[-1]["event"] == "SHUTDOWN"
    assert all(set(event) == {"event", "data", "timestamp"} for event in events)


def test_watch_ends_well_when_interrupted_and_badly_when_cut_off(agent: Daemon) -> None:
    for end, status in (("interrupt", 0), ("kill", 3)):
        with subprocess.Popen(
            [EPOCHCTL, "-s", str(agent.control_path), "watch"], stdout=subprocess.PIPE, text=True
        ) as watch:
            assert watch.stdout is not None
            assert "EPOCH_SEALED epoch=" in first_event(agent, watch.stdout)
            if end == "interrupt":
                watch.send_signal(signal.SIGINT)
            else:
                agent.stop("kill")
            assert watch.wait(DEADLINE_S) == status
