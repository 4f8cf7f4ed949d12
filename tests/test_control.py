"""The control channel: QMP as its clients know it, the verbs, and clients that misbehave."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Attach, StartDaemon
from frontend import DEADLINE_S
from harness import Control, ControlError, Daemon, DiskSpec, until

NOBODY = 65534


class Raw:
    """A control client that can say anything. `feed` accepts what is received, in pieces."""

    def __init__(self, daemon: Daemon, *, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(daemon.control_path))
        self._buffer = b""
        self.greeting = self.receive()
        if negotiate:
            assert self.ask({"execute": "qmp_capabilities"}) == {"return": {}}

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        """The next message; EOFError when the agent hung up."""
        while b"\n" not in self._buffer:
            chunk = self.socket.recv(65536)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def reply(self) -> dict[str, Any]:
        """The next message that is no event."""
        while "event" in (message := self.receive()):
            pass
        return message

    def ask(self, command: object) -> dict[str, Any]:
        self.send(json.dumps(command).encode())
        return self.reply()

    def gone(self) -> bool:
        """Whether the agent has ended the connection, after reading what was left."""
        try:
            while True:
                self.receive()
        except (EOFError, ConnectionError):
            return True

    def close(self) -> None:
        self.socket.close()


Connect = Callable[..., Raw]


@pytest.fixture
def connect() -> Iterator[Connect]:
    clients: list[Raw] = []

    def make(daemon: Daemon, **settings: bool) -> Raw:
        clients.append(Raw(daemon, **settings))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def error(reply: dict[str, Any]) -> tuple[str, str]:
    return reply["error"]["class"], reply["error"]["desc"]


# ---- the wire -----------------------------------------------------------------------------


def test_the_greeting_is_qmps(shared: Daemon, connect: Connect) -> None:
    greeting = connect(shared, negotiate=False).greeting
    assert set(greeting) == {"QMP"}
    assert set(greeting["QMP"]) == {"version", "capabilities"}
    assert greeting["QMP"]["capabilities"] == []
    version = greeting["QMP"]["version"]
    assert set(version["qemu"]) == {"major", "minor", "micro"}
    assert version["package"].startswith("epochd ")


def test_nothing_goes_before_negotiation(shared: Daemon, connect: Connect) -> None:
    client = connect(shared, negotiate=False)
    kind, text = error(client.ask({"execute": "query-status", "id": 1}))
    assert kind == "CommandNotFound"
    assert "qmp_capabilities" in text
    assert client.ask({"execute": "qmp_capabilities"}) == {"return": {}}
    assert "return" in client.ask({"execute": "query-status"})


def test_negotiation_happens_once(shared: Daemon, connect: Connect) -> None:
    kind, text = error(connect(shared).ask({"execute": "qmp_capabilities"}))
    assert (kind, "already" in text) == ("CommandNotFound", True)


def test_a_capability_that_was_not_offered_is_refused(shared: Daemon, connect: Connect) -> None:
    client = connect(shared, negotiate=False)
    asked = {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
    assert error(client.ask(asked))[0] == "GenericError"
    asked["arguments"] = {"enable": []}
    assert client.ask(asked) == {"return": {}}


@pytest.mark.parametrize("mark", [0, "x", None, [1, {"a": 2}], {"deep": {"er": 1.5}}, "\ud800"])
def test_the_id_comes_back(shared: Daemon, connect: Connect, mark: object) -> None:
    client = connect(shared)
    assert client.ask({"execute": "query-version", "id": mark})["id"] == mark
    assert client.ask({"execute": "nonsense", "id": mark})["id"] == mark
    assert "id" not in client.ask({"execute": "query-version"})


def test_messages_need_no_newline_and_may_come_in_pieces(shared: Daemon, connect: Connect) -> None:
    client = connect(shared)
    data = b'{"execute":"query-version","id":"}\\"{"}  '
    data += b'{"execute" : "query-version", "id":"\xc3\xbc"}'
    for byte in data:
        client.send(bytes([byte]))
    assert client.reply()["id"] == '}"{'
    assert client.reply()["id"] == "ü"
    client.send(data * 20)
    assert [client.reply()["id"] for _ in range(40)] == ['}"{', "ü"] * 20


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\n",
        b"\x00\xff\xfe binary \x80\n",
        b'"a string"\n',
        b"}\n",
        b"[1, 2]\n",
        b"{]\n",
        b'{"execute": nonsense}\n',
        b'{"execute": "query-version", "execute": "quit"}\n',
        b'{"execute": NaN}\n',
        b"[" * 1000 + b"\n",
        b'{"a": ' * 100 + b"\n",
        b'{"execute": ' + b"9" * 5000 + b"}\n",
        b'{"execute": "query-version", "more": 1}\n',
        b'{"execute": 5}\n',
        b'{"arguments": {}}\n',
        b"{}\n",
        b'{"execute": "query-version", "arguments": []}\n',
    ],
    ids=lambda data: repr(data[:24]),
)
def test_garbage_gets_an_error_and_the_client_may_go_on(
    shared: Daemon, connect: Connect, garbage: bytes
) -> None:
    client = connect(shared)
    client.send(garbage + b'{"execute": "query-version", "id": 1}')
    kind, text = error(client.reply())
    assert kind == "GenericError"
    assert text
    assert client.reply()["id"] == 1


@pytest.mark.parametrize("data", [b"x", b'{"execute": "', b'{"a": [1, ', b"{"])
def test_a_command_without_end_costs_the_connection(
    shared: Daemon, connect: Connect, data: bytes
) -> None:
    client, other = connect(shared), connect(shared)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        client.send((data + b" " * 4096) * 1000)
    assert client.gone()
    assert "return" in other.ask({"execute": "query-status"})


def test_a_client_that_does_not_read_is_cut_off(shared: Daemon, connect: Connect) -> None:
    slow, other = connect(shared), connect(shared)
    # The sum of what the kernel and the agent hold for a client is far below this.
    commands = json.dumps({"execute": "query-commands"}).encode() * 100_000
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        slow.send(commands)
    assert "return" in other.ask({"execute": "query-status"})
    until("the reason in the log", lambda: "of output unread" in shared.log())


def test_a_client_that_reads_no_events_is_cut_off(epochd: StartDaemon, connect: Connect) -> None:
    agent = epochd()
    connect(agent)  # never reads
    other = connect(agent)
    # Each seal tells everybody; an epoch without a write costs nothing to discard.
    for _ in range(200):
        for _ in range(200):
            other.send(b'{"execute": "epoch-seal"}')
        for _ in range(200):
            other.reply()
        other.ask({"execute": "epoch-discard"})
        if "of output unread" in agent.log():
            break
    assert "of output unread" in agent.log()


def test_other_users_are_turned_away(agent: Daemon) -> None:
    """Even when the socket's mode would let them in."""
    agent.control_path.chmod(0o666)
    program = (
        "import os, socket, sys\n"
        "os.chdir(sys.argv[1])\n"
        f"os.setresgid({NOBODY}, {NOBODY}, {NOBODY})\n"
        f"os.setresuid({NOBODY}, {NOBODY}, {NOBODY})\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[2])\n"
        "try:\n"
        "    data = s.recv(100)\n"
        "except ConnectionResetError:\n"
        "    data = b''\n"
        "print(data)\n"
    )
    agent.folder.chmod(0o755)
    answer = subprocess.run(
        [sys.executable, "-c", program, str(agent.folder), agent.control_path.name],
        check=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert answer.stdout == "b''\n"
    until("the reason in the log", lambda: f"of user {NOBODY} turned away" in agent.log())
    assert agent.control.status()["open"] == 1


@pytest.mark.parametrize("mask", [0o000, 0o777])
def test_sockets_are_for_their_owner_whatever_the_umask(epochd: StartDaemon, mask: int) -> None:
    agent = epochd(start=False)
    agent.folder.chmod(0o755)
    before = os.umask(mask)
    try:
        # The harness appends to its log, which must exist with this mask.
        os.close(os.open(agent.log_path, os.O_CREAT | os.O_WRONLY, 0o600))
        agent.log_path.chmod(0o600)
        agent.start()
    finally:
        os.umask(before)
    for path in (agent.control_path, agent.socket()):
        assert path.stat().st_mode & 0o777 == 0o600
    (journal,) = agent.folder.glob("*.epochd-journal")
    assert journal.stat().st_mode & 0o777 == 0o600
    assert [path.stat().st_mode & 0o777 for path in agent.shm] == [0o600]


# ---- verbs --------------------------------------------------------------------------------


def test_commands_are_listed(shared: Daemon) -> None:
    names = {entry["name"] for entry in shared.control.execute("query-commands")}
    assert names == {
        "qmp_capabilities",
        "query-status",
        "query-epochs",
        "query-disks",
        "query-stats",
        "query-commands",
        "query-version",
        "epoch-seal",
        "epoch-commit",
        "epoch-discard",
        "promote",
        "dictionary-load",
        "quit",
    }


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("epoch-seal", {"epoch": 1}, "unknown argument 'epoch'"),
        ("epoch-commit", {"epochs": 1}, "unknown argument 'epochs'; known: epoch"),
        ("epoch-commit", {"epoch": "1"}, "not an integer"),
        ("epoch-commit", {"epoch": True}, "not an integer"),
        ("epoch-commit", {"epoch": 1.0}, "not an integer"),
        ("epoch-commit", {"epoch": None}, "not an integer"),
        ("epoch-commit", {"epoch": 0}, "from 1"),
        ("epoch-commit", {"epoch": -1}, "from 1"),
        ("epoch-commit", {"epoch": 1 << 64}, "from 1"),
        ("query-status", {"x": 1}, "unknown argument 'x'"),
        ("quit", {"now": True}, "unknown argument 'now'"),
    ],
)
def test_wrong_arguments_are_refused(
    shared: Daemon, verb: str, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ControlError) as caught:
        shared.control.execute(verb, **arguments)
    assert words in caught.value.text


def test_an_unknown_verb_is_not_found(shared: Daemon, connect: Connect) -> None:
    kind, text = error(connect(shared).ask({"execute": "epoch-undo"}))
    assert kind == "CommandNotFound"
    assert "epoch-undo" in text
    assert "query-commands" in text


def test_status_has_what_the_contract_says(agent: Daemon) -> None:
    status = agent.control.status()
    assert status["mode"] == "standby"
    assert (status["open"], status["sealed"]) == (1, [])
    assert (status["committed"], status["applied"], status["clients"]) == (0, 0, 0)
    assert isinstance(status["generation"], int)
    assert 15 << 20 < status["arena"]["size"] <= 16 << 20  # whole segments
    assert status["arena"]["used"] <= status["arena"]["size"]
    assert status["index"] == {"size": 4 << 20, "used": 0}  # a quarter of the arena
    assert status["journal"]["size"] >= status["arena"]["size"]
    assert status["journal"]["used"] == 0
    assert (status["held"], status["error"]) == (0, "")
    assert Path(status["journal"]["path"]).exists()
    assert Path("/dev/shm" + status["arena"]["name"]) in agent.shm


def test_seal_commit_and_repeat(agent: Daemon) -> None:
    control = agent.control
    assert control.seal() == 1
    status = control.status()
    assert (status["open"], status["sealed"]) == (2, [1])
    assert control.seal() == 2
    assert control.status()["sealed"] == [1, 2]
    assert control.commit(1) == 1
    assert control.commit(1) == 1
    assert control.status()["sealed"] == [2]
    assert control.commit() == 2
    assert control.commit() == 2
    assert control.commit(1) == 2
    assert control.status()["committed"] == 2


def test_discard_drops_all_after_the_last_commit(agent: Daemon) -> None:
    control = agent.control
    control.checkpoint()
    assert control.seal() == 2
    answer = control.execute("epoch-discard")
    assert answer == {"discarded": [2, 3], "committed": 1}
    status = control.status()
    assert (status["committed"], status["sealed"]) == (1, [])
    assert status["open"] > 3


def test_a_commit_of_what_cannot_be_says_why(agent: Daemon) -> None:
    control = agent.control
    control.checkpoint()
    control.seal()
    control.discard()
    open_epoch = control.status()["open"]
    texts = []
    for epoch in (2, open_epoch, open_epoch + 5):
        with pytest.raises(ControlError, match=rf"\b{epoch}\b") as caught:
            control.commit(epoch)
        texts.append(caught.value.text)
    assert "discard" in texts[0]
    assert len(set(texts)) == 3
    assert control.commit(1) == 1


def test_promote_discards_and_counts_a_generation(agent: Daemon) -> None:
    control = agent.control
    before = control.status()["generation"]
    control.seal()
    assert control.execute("promote") == {"mode": "active", "generation": before + 1}
    status = control.status()
    assert (status["mode"], status["sealed"]) == ("active", [])
    control.wait_event("EPOCH_DISCARDED")


def test_epochs_are_listed_oldest_first(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    disk.write(0, b"\x01" * 8192)
    agent.control.seal()
    disk.write(0, b"\x02" * 4096)
    first, second = agent.control.execute("query-epochs")
    assert (first["epoch"], first["state"], first["blocks"]) == (1, "sealed", 2)
    assert (second["epoch"], second["state"], second["blocks"]) == (2, "open", 1)
    assert (first["logical-bytes"], second["logical-bytes"]) == (8192, 4096)


def test_disks_are_listed_in_order(epochd: StartDaemon, attach: Attach) -> None:
    agent = epochd(DiskSpec("root"), DiskSpec("data", size=1 << 20, read_only=True))
    disk = attach(agent, disk=1)
    disk.read(0, 8)
    root, data = agent.control.disks()
    assert (root["name"], root["read-only"], root["connected"]) == ("root", False, False)
    assert (data["name"], data["read-only"], data["connected"]) == ("data", True, True)
    assert data["size"] == 1 << 20
    assert data["image"] == str(agent.image(1))
    assert data["socket"] == str(agent.socket(1))
    assert data["peer"] == f"process {os.getpid()} of user {os.getuid()}"
    assert (data["stats"]["reads"], data["stats"]["read-bytes"]) == (1, 4096)
    assert root["queues"] == []
    assert [queue["queue"] for queue in data["queues"]] == [0]
    assert data["queues"][0]["running"] is True


def test_stats_count(agent: Daemon, attach: Attach) -> None:
    disk = attach(agent)
    disk.write(0, b"\x01" * 4096)
    agent.control.checkpoint()
    stats = agent.control.execute("query-stats")
    assert (stats["group"]["seals"], stats["group"]["commits"]) == (1, 1)
    assert (stats["disks"]["writes"], stats["disks"]["write-bytes"]) == (1, 4096)
    assert stats["group"]["commit-ns-last"] > 0
    assert stats["group"]["journal-bytes-written"] > 0


def test_events_tell_the_story(agent: Daemon, attach: Attach) -> None:
    control = agent.control
    disk = attach(agent)
    control.wait_event("CLIENT_CONNECTED", where=lambda data: bool(data["disk"] == "disk0.img"))
    disk.write(0, b"\x01" * 4096)
    control.checkpoint()
    control.wait_event("EPOCH_SEALED", where=lambda data: bool(data["epoch"] == 1))
    control.wait_event("EPOCH_COMMITTED", where=lambda data: bool(data["epoch"] == 1))
    control.wait_event("EPOCH_APPLIED", where=lambda data: bool(data["epoch"] == 1))
    disk.write(0, b"\x02" * 4096)
    control.discard()
    event = control.wait_event("EPOCH_DISCARDED")
    assert event["data"] == {"epochs": [2], "committed": 1}
    assert set(event["timestamp"]) == {"seconds", "microseconds"}
    assert 0 <= event["timestamp"]["microseconds"] < 1_000_000
    disk.close()
    control.wait_event("CLIENT_DISCONNECTED")


def test_every_client_gets_the_events(agent: Daemon) -> None:
    watchers = [Control(agent.control_path) for _ in range(5)]
    try:
        agent.control.seal()
        for watcher in watchers:
            assert watcher.wait_event("EPOCH_SEALED")["data"] == {"epoch": 1}
    finally:
        for watcher in watchers:
            watcher.close()


def test_a_client_before_negotiation_gets_no_events(agent: Daemon, connect: Connect) -> None:
    client = connect(agent, negotiate=False)
    agent.control.seal()
    agent.control.wait_event("EPOCH_SEALED")
    client.send(b'{"execute": "qmp_capabilities"}')
    assert client.receive() == {"return": {}}


def test_quit_answers_says_goodbye_and_stops(agent: Daemon, connect: Connect) -> None:
    client = connect(agent)
    client.send(b'{"execute": "quit", "id": 1}')
    messages = [client.receive(), client.receive()]
    assert {"return": {}, "id": 1} in messages
    (event,) = (message for message in messages if "event" in message)
    assert (event["event"], event["data"]) == ("SHUTDOWN", {"reason": "quit"})
    assert agent.wait_exit() == 0
    assert client.gone()
    assert not agent.control_path.exists()
    assert not agent.socket().exists()


def test_the_public_shell_is_a_client(shared: Daemon) -> None:
    shell = Path(sys.executable).parent / "qmp-shell"
    answer = subprocess.run(
        [shell, str(shared.control_path)],
        input="query-version\nepoch-commit epoch=99999\n",
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert re.search(r"['\"]package['\"]: ['\"]epochd ", answer.stdout), answer
    assert "99999" in answer.stdout
