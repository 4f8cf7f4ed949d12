"""What the service manager is told: sd_notify(3), its socket part, in a few lines.

Contract: `tell()` sends one datagram to the socket that NOTIFY_SOCKET names and never fails or
waits: without the variable it does nothing, and a manager that does not listen is its own
loss. The variable is read once, and children do not inherit it.
"""

import contextlib
import os
import socket

_address = os.environ.pop("NOTIFY_SOCKET", "")


def wanted() -> bool:
    """True when there is somebody to tell."""
    return _address[:1] in ("/", "@") and len(_address) > 1


def tell(*assignments: str) -> None:
    """Send assignments as READY=1, STOPPING=1 or STATUS=one line of text."""
    if not wanted():
        return
    address = "\0" + _address[1:] if _address[0] == "@" else _address
    text = "\n".join(line.replace("\n", " ") for line in assignments)
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
    ):
        sock.sendto(text.encode(), address)
