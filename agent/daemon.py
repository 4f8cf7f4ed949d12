"""Life cycle of the agent: start in order, serve, stop in the opposite order.

Contract. run() returns when the agent was asked to stop, or raises an EpochdError; either
way everything taken is given back. Start and restart are one path: nothing here depends on
how the last run ended.

Start: images and locks, journal, arena, recovery, reactor, control socket, disk sockets. The
sockets come last, so whoever can connect is served. Stop: disk sockets, front ends, reactor
(committed epochs go into the images), control socket. Uncommitted epochs stay in the arena.

While it serves, a socket file that somebody removed is made anew. A service manager
(Type=notify) hears when the agent serves, what it is at, and when it stops.
"""

import asyncio
import logging
import resource
import signal
import socket
import time
from contextlib import ExitStack

from . import __version__, control, core, notify, qmp, rejections, storage, vhost_messages
from .config import Config
from .errors import EpochdError
from .listener import Listener, adopt
from .port import Port
from .vhost import Disk

log = logging.getLogger("epochd")

Door = Listener | socket.socket


# timeout(1) and shells signal a process and then its group: that is one wish, not two.
HURRY_SECONDS = 1.0
LOOK_SECONDS = 1.0  # between two looks at the sockets' files


class RuntimeFailure(EpochdError):
    """{}: {}"""


def _raise_descriptor_limit() -> None:
    """Every ring has up to three descriptors: a full group needs more than the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Daemon:
    """One agent: a group, its control server and its ports."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._disk_names = [disk.name for disk in config.disks]
        self._ports: list[Port] = []
        self._server: qmp.Server | None = None
        self._stop_asked = asyncio.Event()
        self._hurry_asked = asyncio.Event()
        self._first_signal = 0.0
        self._reason = ""

    async def run(self) -> None:
        """Serve until a signal or `quit`; EpochdError when start or stop fails."""
        self._watch_signals()
        group = storage.open_group(self._config, self._core_event)
        close = group.abandon
        with ExitStack() as stack:
            stack.callback(lambda: close())
            self._start(group)
            doors = self._open_doors(stack)
            close = group.close  # from here on there may be something in the arena
            await self._serve(group, doors)

    # Start.

    def _open_doors(self, stack: ExitStack) -> list[Door]:
        """All sockets, control first, then a disk's each; the stack closes them."""
        doors: list[Door] = []
        stack.callback(lambda: [door.close() for door in doors])
        doors.append(Listener.bind(self._config.control))
        for disk in self._config.disks:
            if disk.socket is not None:
                doors.append(Listener.bind(disk.socket))
                continue
            assert disk.fd is not None
            sock, listening = adopt(disk.fd)
            doors.append(Listener(sock, None) if listening else sock)
        return doors

    def _start(self, group: storage.Group) -> None:
        try:
            group.core.start()
        except core.CoreError as error:
            raise RuntimeFailure("the core cannot start", error) from None
        for index, image in enumerate(group.images):
            disk = Disk(
                index=index,
                name=image.config.name,
                features=vhost_messages.device_features(image.config.read_only),
                config_space=vhost_messages.blk_config(
                    image.size_bytes, image.logical_block_bytes, image.config.read_only
                ),
            )
            self._ports.append(Port(group.core, disk, self._client_event))

    async def _serve(self, group: storage.Group, doors: list[Door]) -> None:
        verbs = control.Control(self._config, group, self._ports, self._quit).commands()
        self._server = qmp.Server(verbs)
        control_door, *disk_doors = doors
        try:
            assert isinstance(control_door, Listener)
            await self._server.listen(control_door)
            for port, door in zip(self._ports, disk_doors, strict=True):
                port.listen(door) if isinstance(door, Listener) else port.connect(door)
            log.info(
                "epochd %s serves group %s (%s): %d disk(s), control socket %s",
                __version__, self._config.name, group.id, len(self._ports), self._config.control,
            )
            notify.tell("READY=1", f"STATUS={self._state(group)}")
            while not await self._stop_is_asked():
                await self._look_after(doors)
                rejections.tell_silent()
                notify.tell(f"STATUS={self._state(group)}")
            notify.tell("STOPPING=1", f"STATUS=stopping ({self._reason})")
            await self._stop(group)
        finally:
            await self._server.close()

    async def _stop_is_asked(self) -> bool:
        """Wait for it, but not for longer than until the next look around."""
        try:
            await asyncio.wait_for(self._stop_asked.wait(), LOOK_SECONDS)
        except TimeoutError:
            return False
        return True

    async def _look_after(self, doors: list[Door]) -> None:
        """Make socket files anew that were removed; whoever is connected notices nothing."""
        for number, door in enumerate(doors):
            if not isinstance(door, Listener) or not door.vanished():
                continue
            assert door.path is not None
            assert self._server is not None
            try:
                fresh = Listener.bind(door.path)
            except EpochdError as error:
                log.debug("%s", error)  # its folder is gone too; perhaps it comes back
                continue
            log.warning("socket %s: its file was removed; it is there again", door.path)
            doors[number] = fresh
            if number == 0:
                await self._server.listen(fresh)
            else:
                await self._ports[number - 1].listen_anew(fresh)
            door.close()

    def _state(self, group: storage.Group) -> str:
        """One line for the service manager."""
        if not notify.wanted():
            return ""
        status = group.core.status()
        text = (f"{status.clients} of {len(self._ports)} disks attached, epoch {status.open} open, "
                f"{status.committed} committed, arena {status.pressure} % full")
        return f"{text}; {status.error}" if status.error else text

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: signal.Signals) -> None:
        if not self._stop_asked.is_set():
            self._first_signal = time.monotonic()
        elif time.monotonic() - self._first_signal >= HURRY_SECONDS:
            if not self._hurry_asked.is_set():
                log.warning("%s again: not waiting for the images", number.name)
            self._hurry_asked.set()
        self._ask_stop(number.name)

    def _quit(self) -> None:
        self._ask_stop("quit")

    def _ask_stop(self, reason: str) -> None:
        if not self._stop_asked.is_set():
            self._reason = reason
            self._stop_asked.set()

    # Stop.

    async def _stop(self, group: storage.Group) -> None:
        log.info("stopping (%s)", self._reason)
        self._emit("SHUTDOWN", {"reason": self._reason})
        work = asyncio.create_task(self._stop_cleanly(group))
        hurry = asyncio.create_task(self._hurry_asked.wait())
        await asyncio.wait({work, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
            log.warning("stopped without waiting; the journal and arena keep everything")
            return
        work.result()

    async def _stop_cleanly(self, group: storage.Group) -> None:
        await asyncio.gather(*(port.stop() for port in self._ports))
        begin = time.monotonic()
        try:
            await group.core.stop()
        except core.CoreError as error:
            raise RuntimeFailure("the stop was not clean", error) from None
        log.info("images are up to date (%.1f ms)", (time.monotonic() - begin) * 1e3)
        if not group.release_arena():
            log.info("uncommitted epochs stay in /dev/shm%s for the next start", group.arena.name)

    # Events.

    def _emit(self, name: str, data: dict[str, object]) -> None:
        if self._server is not None:
            self._server.emit(name, data)

    def _client_event(self, disk: Disk, connected: bool) -> None:
        self._emit("CLIENT_CONNECTED" if connected else "CLIENT_DISCONNECTED", {"disk": disk.name})

    def _peer(self, disk: int) -> str:
        """Who has the disk."""
        session = self._ports[disk].session
        return session.peer if session is not None else "a front end that is gone"

    def _core_event(self, event: core.Event) -> None:
        """Logs, sessions to end, and what controllers want to know."""
        kind = core.EventType
        if event.type == kind.LOG:
            rejections.say(log, event.value, "core", "%s", event.text)
        elif event.type == kind.RING_BROKEN:
            rejections.say(log, logging.ERROR, rejections.RINGS,
                           "disk %s: queue %d of %s is broken and stopped: %s",
                           self._disk_names[event.disk], event.value, self._peer(event.disk),
                           event.text)
        elif event.type == kind.REJECTED:
            rejections.say(log, logging.WARNING, rejections.REQUESTS,
                           "disk %s: queue %d of %s: rejected a %s",
                           self._disk_names[event.disk], event.value, self._peer(event.disk),
                           event.text, untold=event.first)
        elif event.type == kind.MEMORY_LOST:
            self._ports[event.disk].drop("its guest memory vanished (SIGBUS)")
        elif event.type == kind.IO_ERROR:
            log.error("%s", event.text)
        elif event.type == kind.SPILL and event.first:
            log.warning("the arena is nearly full: epochs go on in the spill file")
        elif event.type == kind.SPILL:
            log.info("the spill file is empty again")
        elif event.type == kind.PRESSURE and event.first:
            log.warning("arena or index is full (%d %%): writes wait for a commit or discard",
                        event.value)
        if (message := control.event_message(event, self._disk_names)) is not None:
            self._emit(*message)


async def run(config: Config) -> None:
    """Run the agent described by `config` until it is asked to stop; EpochdError."""
    _raise_descriptor_limit()
    await Daemon(config).run()
