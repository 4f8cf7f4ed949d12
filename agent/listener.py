"""Unix listening sockets, for the disks and for control.

Contract: Listener.bind() leaves a listening socket at the path or raises a SocketError (or a
kin of it) that names the path. A socket file that nobody listens on is left over from a
crash and replaced; one that answers is refused; anything else at the path is refused. Mode
0600 whatever the umask. close() may be repeated; it removes the socket file only if that is
still our own.
"""

import contextlib
import os
import socket
import stat
from pathlib import Path

from .errors import SocketError, SocketInUse, SocketPathTaken, UsageError

PATH_BYTES_MAX = 107  # sockaddr_un.sun_path less the NUL
BACKLOG = 16


def _remove_stale(path: Path) -> None:
    """Make room at `path` when only a dead socket is there."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketPathTaken(path, stat.filemode(mode))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody listens
    raise SocketInUse(path)


class Listener:
    """A listening socket and, when it was bound here, its file."""

    def __init__(self, sock: socket.socket, path: Path | None) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.path = path
        self._file = self._identify()

    @classmethod
    def bind(cls, path: Path) -> "Listener":
        """Create the socket at `path`; SocketError and its kin."""
        if len(os.fsencode(path)) > PATH_BYTES_MAX:
            raise SocketError(path, f"the path is longer than {PATH_BYTES_MAX} bytes; "
                              "choose a shorter one")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_stale(path)
            os.fchmod(sock.fileno(), 0o600)  # bind(2) creates the file with this, less umask
            sock.bind(os.fspath(path))
            os.chmod(path, 0o600)
            sock.listen(BACKLOG)
        except FileNotFoundError:
            sock.close()
            raise SocketError(path, "its folder does not exist") from None
        except OSError as error:
            sock.close()
            raise SocketError(path, f"cannot be created: {error.strerror}") from None
        except BaseException:
            sock.close()
            raise
        return cls(sock, path)

    def _identify(self) -> tuple[int, int] | None:
        if self.path is None:
            return None
        try:
            status = self.path.lstat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def vanished(self) -> bool:
        """True when our socket's file is gone and nothing is in its place."""
        return self.path is not None and self._file is not None and self._identify() is None

    def close(self) -> None:
        """Stop listening; remove our socket file, not one that replaced it."""
        if self.path is not None and self._file is not None and self._identify() == self._file:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._file = None
        self.socket.close()


def adopt(fd: int) -> tuple[socket.socket, bool]:
    """Take over an inherited socket; return (socket, whether it listens). UsageError."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"--fd {fd}: not an open socket ({error.strerror})") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise UsageError(f"--fd {fd}: not a Unix stream socket")
    os.set_inheritable(fd, False)
    sock.setblocking(False)
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0
    return sock, listening
