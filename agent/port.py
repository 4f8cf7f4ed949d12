"""A disk's vhost-user socket: who may come in, one front end at a time.

Contract. Owner: the asyncio loop. It serves from listen() or connect() to stop(). A
second front
end is turned away at once, the first unharmed; but one that comes when the first has hung up
(a QEMU that was killed and started again) waits for the first one's teardown and is served.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

from . import core, rejections
from .listener import Listener
from .vhost import Disk, Session
from .vhost_channel import peer_name

log = logging.getLogger("epochd.vhost")

OnClient = Callable[[Disk, bool], None]


class Port:
    """The way in to one disk. `on_client(disk, connected)` is told of comings and goings."""

    def __init__(self, engine: core.Core, disk: Disk, on_client: OnClient) -> None:
        self._core = engine
        self.disk = disk
        self._on_client = on_client
        self._listener: Listener | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._serving: asyncio.Task[None] | None = None
        self.session: Session | None = None

    def listen(self, listener: Listener) -> None:
        """Accept front ends on `listener`, which stays the caller's, until stop()."""
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept())

    async def listen_anew(self, listener: Listener) -> None:
        """Go over to another listener; the present front end stays."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})
        self.listen(listener)

    def connect(self, sock: socket.socket) -> None:
        """Serve the one front end behind a connected socket."""
        self._serve(sock)

    def drop(self, why: str) -> None:
        """End the present session, if any."""
        if self.session is not None:
            self.session.drop(why)

    async def stop(self) -> None:
        """Turn nobody in any more, finish what was taken, let go of the front end."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})
        if self.session is not None:
            await self.session.drain()
            self.drop("the agent stops")
        if self._serving is not None:
            await asyncio.wait({self._serving})

    async def _accept(self) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener.socket)
            except OSError as error:  # out of descriptors, or the peer went away
                log.error("disk %s: no front end accepted: %s", self.disk.name, error)
                await asyncio.sleep(0.1)
                continue
            if self.session is not None and not self.session.has_hung_up():
                rejections.note(
                    log, rejections.SECOND_FRONT_ENDS,
                    "disk %s: a second front end was turned away, %s: %s has the disk",
                    self.disk.name, peer_name(sock), self.session.peer,
                )
                sock.close()
                continue
            if self._serving is not None:
                self.drop("hung up")
                await asyncio.wait({self._serving})
            self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        self.session = Session(self._core, self.disk, sock)
        self._serving = asyncio.create_task(self._session(self.session))

    async def _session(self, session: Session) -> None:
        rejections.say(log, logging.INFO, "connections", "disk %s: front end connected (%s)",
                       self.disk.name, session.peer)
        self._on_client(self.disk, True)
        try:
            why = await session.run()
            text = "disk %s: front end disconnected (%s): %s"
            if why in ("hung up", "the agent stops"):
                rejections.say(log, logging.INFO, "connections", text, self.disk.name,
                               session.peer, why)
            else:
                rejections.note(log, session.fault, text, self.disk.name, session.peer, why)
        finally:
            self.session = None
            self._on_client(self.disk, False)
