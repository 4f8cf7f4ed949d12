"""The wire of the control channel: QMP as a server (QEMU's docs/interop/qmp-spec).

Contract. Owner: the asyncio loop. Greeting, capabilities negotiation, commands, errors and
events as in QEMU, so that clients of the field work as they are. Several clients at once;
each one's commands run in the order sent, clients do not wait for each other (a controller
that must seal while a commit runs opens a second connection). Only root and the agent's own
user may come in.

Limits, each of which costs only its author: a command longer than MESSAGE_CHARS_MAX, or
output that stays unread beyond OUTPUT_BYTES_MAX, ends the connection; with COMMANDS_MAX
commands waiting, reading pauses. What is not JSON gets an error reply, and reading goes on
after the next newline.

Not offered: out-of-band commands (the list of capabilities is empty).
"""

import asyncio
import codecs
import json
import logging
import os
import re
import socket
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, NoReturn

from . import __version__, rejections
from .listener import Listener

log = logging.getLogger("epochd.control")

MESSAGE_CHARS_MAX = 64 << 10
OUTPUT_BYTES_MAX = 4 << 20
COMMANDS_MAX = 64
LOGGED_CHARACTERS = 300  # of a refusal: clients choose some of its words
NESTING_MAX = 32
CLOSE_SECONDS = 1.0

_STRUCTURE = re.compile(r'["\\{}\[\]]')


class QmpError(Exception):
    """An error reply: its class and one sentence; and the kind of `rejections` it counts as."""

    def __init__(self, text: str, kind: str = "GenericError",
                 rejection: str = rejections.CONTROL_COMMANDS) -> None:
        super().__init__(text)
        self.kind = kind
        self.rejection = rejection


class TooLong(Exception):
    """A client sent more than a command may have."""


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


_DECODER = json.JSONDecoder(parse_constant=_no_constants, object_pairs_hook=_unique)


class JsonStream:
    """Cuts a byte stream into top-level JSON values; newlines between them are not needed.

    feed() yields a value or a QmpError for what is none; it raises TooLong. The scan keeps
    its state, so every byte is looked at once.
    """

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._skipping = False
        self._reset("")

    def _reset(self, rest: str) -> None:
        self._text, self._scanned, self._depth, self._in_string = rest, 0, 0, False

    def feed(self, data: bytes) -> Iterator[object]:
        """Add received bytes; yield what became complete."""
        self._text += self._decode(data)
        while (value := self._next()) is not None:
            yield value
        if len(self._text) > MESSAGE_CHARS_MAX:
            raise TooLong(f"more than {MESSAGE_CHARS_MAX} characters in one command")

    def _next(self) -> object | None:
        if self._skipping:
            _, newline, rest = self._text.partition("\n")
            if not newline:
                return None
            self._skipping = False
            self._reset(rest)
        if self._scanned == 0:
            self._text = self._text.lstrip()
            if not self._text:
                return None
            if self._text[0] not in "{[":
                return self._skip("not JSON: a command begins with {")
        end = self._find_end()
        if end == 0:
            return None
        if end < 0:
            return self._skip(f"JSON nested deeper than {NESTING_MAX}")
        whole, rest = self._text[:end], self._text[end:]
        self._reset(rest)
        try:
            value: object = _DECODER.decode(whole)
        except (ValueError, RecursionError) as error:
            return QmpError(f"invalid JSON: {error}", rejection=rejections.CONTROL_JSON)
        return value

    def _skip(self, why: str) -> QmpError:
        self._skipping = True
        return QmpError(why, rejection=rejections.CONTROL_JSON)

    def _find_end(self) -> int:
        """Length of the first whole value; 0: not there yet; -1: nested too deep."""
        position = self._scanned
        while match := _STRUCTURE.search(self._text, position):
            position, char = match.end(), match.group()
            if self._in_string:
                if char == "\\":
                    if position == len(self._text):  # what is escaped has not come yet
                        self._scanned = position - 1
                        return 0
                    position += 1
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
                if self._depth > NESTING_MAX:
                    return -1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return position
        self._scanned = len(self._text)
        return 0


Handler = Callable[[dict[str, Any]], Awaitable[object]]
Commands = Mapping[str, Handler]


def version() -> dict[str, object]:
    """QMP's version object. The key is QEMU's; the numbers are ours."""
    major, minor, micro = ([int(n) for n in re.findall(r"\d+", __version__)] + [0, 0, 0])[:3]
    return {
        "qemu": {"major": major, "minor": minor, "micro": micro},
        "package": f"epochd {__version__}",
    }


class Client(asyncio.Protocol):
    """One control connection, in asyncio's callbacks."""

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._stream = JsonStream()
        self._waiting: deque[object] = deque()
        self._more = asyncio.Event()
        self.runner: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._negotiated = False
        self._end = "hung up"
        self.peer = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        pid, uid, _ = _credentials(transport.get_extra_info("socket"))
        self.peer = f"process {pid} of user {uid}"
        if uid not in (0, os.geteuid()):
            rejections.note(log, rejections.CONTROL_PEERS,
                            "control: %s turned away: only root and user %d may come in",
                            self.peer, os.geteuid())
            transport.abort()
            return
        self._transport = transport
        self._server.clients.add(self)
        self.runner = asyncio.create_task(self._run())
        log.debug("control: %s connected", self.peer)
        self._send({"QMP": {"version": version(), "capabilities": []}})

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.clients.discard(self)
        if self.runner is not None:
            self.runner.cancel()
            log.debug("control: %s disconnected: %s", self.peer, self._end)
        self._transport = None

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        try:
            self._waiting.extend(self._stream.feed(data))
        except TooLong as error:
            self._drop(str(error))
            return
        self._more.set()
        if len(self._waiting) >= COMMANDS_MAX:
            self._transport.pause_reading()

    def _drop(self, why: str) -> None:
        if self._transport is not None:
            rejections.note(log, rejections.CONTROL_CLIENTS, "control: %s disconnected: %s",
                            self.peer, why)
            self._end = why
            self._transport.abort()
            self._transport = None

    def _send(self, message: object) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(json.dumps(message).encode() + b"\r\n")
        if self._transport.get_write_buffer_size() > OUTPUT_BYTES_MAX:
            self._drop(f"more than {OUTPUT_BYTES_MAX} bytes of output unread")

    def event(self, message: object) -> None:
        """Send an event, to a client that has negotiated."""
        if self._negotiated:
            self._send(message)

    def close(self) -> None:
        """Close once what was written is sent."""
        if self._transport is not None:
            self._transport.close()

    async def _run(self) -> None:
        while True:
            while self._waiting:
                message = self._waiting.popleft()
                self._send(await self._answer(message))
                await asyncio.sleep(0)  # a flood of commands must not starve the others
                if self._transport is not None and len(self._waiting) < COMMANDS_MAX:
                    self._transport.resume_reading()
            self._more.clear()
            await self._more.wait()

    async def _answer(self, message: object) -> dict[str, object]:
        reply: dict[str, object]
        try:
            reply = {"return": await self._execute(message)}
        except QmpError as error:
            rejections.note(log, error.rejection, "control: rejected a command of %s: %s",
                            self.peer, str(error).replace("\n", " ")[:LOGGED_CHARACTERS])
            reply = {"error": {"class": error.kind, "desc": str(error)}}
        except Exception as error:
            log.exception("control: bug in a command")
            reply = {"error": {"class": "GenericError", "desc": f"internal error: {error}"}}
        if isinstance(message, dict) and "id" in message:
            reply["id"] = message["id"]
        return reply

    async def _execute(self, message: object) -> object:
        if isinstance(message, QmpError):
            raise message
        if not isinstance(message, dict):
            raise QmpError("a command is a JSON object", rejection=rejections.CONTROL_JSON)
        if unknown := message.keys() - {"execute", "arguments", "id"}:
            raise QmpError(f"unknown member {min(unknown)!r}; a command has execute, arguments "
                           "and id")
        name, arguments = message.get("execute"), message.get("arguments", {})
        if not isinstance(name, str):
            raise QmpError("member 'execute' is missing or not a string")
        if not isinstance(arguments, dict):
            raise QmpError("member 'arguments' is not an object",
                           rejection=rejections.CONTROL_ARGUMENTS)
        if not self._negotiated:
            return self._negotiate(name, arguments)
        handler = self._server.commands.get(name)
        if handler is None:
            raise QmpError(f"there is no command {name!r}; query-commands lists them",
                           "CommandNotFound")
        return await handler(arguments)

    def _negotiate(self, name: str, arguments: dict[str, Any]) -> object:
        if name != "qmp_capabilities":
            raise QmpError("expecting capabilities negotiation with 'qmp_capabilities' first",
                           "CommandNotFound")
        if arguments.keys() - {"enable"} or arguments.get("enable", []) != []:
            raise QmpError("no capability can be enabled here: none was offered",
                           rejection=rejections.CONTROL_ARGUMENTS)
        self._negotiated = True
        return {}


def _credentials(sock: Any) -> tuple[int, int, int]:
    """(pid, uid, gid) of the peer at connect time."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("=iII"))
    pid, uid, gid = struct.unpack("=iII", data)
    return pid, uid, gid


class Server:
    """The control socket. `commands`: name -> handler of the arguments, an awaitable of the
    `return` value; a handler refuses with QmpError."""

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        self.clients: set[Client] = set()
        self._listener: Listener | None = None
        self._server: asyncio.Server | None = None

    async def listen(self, listener: Listener) -> None:
        """Accept clients on `listener` until close(), and on no earlier one any more."""
        if self._server is not None:
            self._server.close()
        self._listener = listener
        loop = asyncio.get_running_loop()
        # asyncio closes the socket it is given, so it gets its own.
        self._server = await loop.create_unix_server(
            lambda: Client(self), sock=listener.socket.dup()
        )

    def emit(self, name: str, data: Mapping[str, object]) -> None:
        """Send an event to all clients."""
        now = time.time_ns()
        message = {
            "event": name,
            "data": data,
            "timestamp": {"seconds": now // 10**9, "microseconds": now // 1000 % 10**6},
        }
        for client in list(self.clients):
            client.event(message)

    async def close(self) -> None:
        """Stop listening, let clients read what was sent, disconnect them."""
        if self._server is not None:
            self._server.close()
        if self._listener is not None:
            self._listener.close()
        for client in list(self.clients):
            client.close()
        runners = [client.runner for client in self.clients if client.runner is not None]
        if runners:  # they end with their connection
            await asyncio.wait(runners, timeout=CLOSE_SECONDS)
