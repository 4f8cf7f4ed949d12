"""Saying no: a counter for each kind, and one line in the log, limited in rate.

Contract. note() may be called from the asyncio loop only. A hostile client can make
rejections as fast as it likes; the log gets BURST_LINES of a kind at once and LINES_PER_SECOND
after that, and the next line that comes through tells how many did not. The counters, in
query-stats, miss nothing. There is one agent a process, so this is the module's state.

Not here: requests of a guest that are malformed; the core counts them, a disk each.
"""

import logging
import time
from dataclasses import dataclass

FRONT_ENDS = "front-ends"  # a second one on a disk, or one that broke the protocol
MESSAGES = "messages"  # of vhost-user, refused with the connection left alone
CONTROL_PEERS = "control-peers"  # other users
CONTROL_CLIENTS = "control-clients"  # cut off: too long a command, or they do not read
CONTROL_COMMANDS = "control-commands"  # answered with an error

BURST_LINES = 100
LINES_PER_SECOND = 5.0


@dataclass
class _Kind:
    count: int = 0
    silent: int = 0  # since the last line
    lines_left: float = BURST_LINES
    filled_at: float = 0.0

    def may_log(self, now: float) -> bool:
        self.lines_left = min(
            BURST_LINES, self.lines_left + (now - self.filled_at) * LINES_PER_SECOND
        )
        self.filled_at = now
        if self.lines_left < 1:
            return False
        self.lines_left -= 1
        return True


_kinds = {kind: _Kind() for kind in
          (FRONT_ENDS, MESSAGES, CONTROL_PEERS, CONTROL_CLIENTS, CONTROL_COMMANDS)}


def note(log: logging.Logger, kind: str, text: str, *values: object) -> None:
    """Count a rejection and log it: who, what and why, in logging's format and its values."""
    entry = _kinds[kind]
    entry.count += 1
    if not entry.may_log(time.monotonic()):
        entry.silent += 1
        return
    silent, entry.silent = entry.silent, 0
    log.warning(text, *values)
    if silent:
        log.warning("%d more rejections (%s) before this one were not logged", silent, kind)


def counts() -> dict[str, int]:
    """Rejections of each kind since the start."""
    return {kind: entry.count for kind, entry in _kinds.items()}
