"""Saying no: a counter for each kind, and one line in the log, limited in rate.

Contract. To be called from the asyncio loop only. A hostile client can make rejections as fast
as it likes; the log gets BURST_LINES of a kind at once and LINES_PER_SECOND after that, and
tells how many more there were: with the next line that comes through, or by tell_silent().
The counters, in query-stats, miss nothing. There is one agent a process, so this is the
module's state.

RINGS and REQUESTS are counted by the core, a disk each, and only logged here.
"""

import logging
import time
from dataclasses import dataclass

SECOND_FRONT_ENDS = "second-front-ends"  # the disk had one already
FRONT_ENDS = "front-ends"  # cut off: broke the protocol, or their memory vanished
MEMORY = "memory"  # tables, regions, logs and in-flight regions that cannot be
MESSAGES = "messages"  # of vhost-user, other ones, that cannot be obeyed
RINGS = "rings"  # broken by what the driver put into them
REQUESTS = "requests"  # of the guest, answered with IOERR or UNSUPP for what they ask
CONTROL_PEERS = "control-peers"  # other users
CONTROL_CLIENTS = "control-clients"  # cut off: too long a command, or they do not read
CONTROL_JSON = "control-json"  # not JSON, or not a command's JSON
CONTROL_COMMANDS = "control-commands"  # unknown, or not in their turn
CONTROL_ARGUMENTS = "control-arguments"
CONTROL_REFUSALS = "control-refusals"  # well asked, but it cannot be done: the core says why

COUNTED = (SECOND_FRONT_ENDS, FRONT_ENDS, MEMORY, MESSAGES, CONTROL_PEERS, CONTROL_CLIENTS,
           CONTROL_JSON, CONTROL_COMMANDS, CONTROL_ARGUMENTS, CONTROL_REFUSALS)

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


_kinds: dict[str, _Kind] = {}
_log = logging.getLogger("epochd")


def note(log: logging.Logger, kind: str, text: str, *values: object) -> None:
    """Count a rejection and log it: who, what and why, in logging's format and its values."""
    _kinds.setdefault(kind, _Kind()).count += 1
    say(log, logging.WARNING, kind, text, *values)


def say(log: logging.Logger, level: int, kind: str, text: str, *values: object,
        untold: int = 0) -> None:
    """Log a line of what others can make happen as often as they like; nothing is counted.

    `kind`: lines of one kind share a limit. `untold`: so many more went before this one.
    """
    entry = _kinds.setdefault(kind, _Kind())
    entry.silent += untold
    if not entry.may_log(time.monotonic()):
        entry.silent += 1
        return
    log.log(level, text, *values)
    _tell(log, kind, entry)


def _tell(log: logging.Logger, kind: str, entry: _Kind) -> None:
    silent, entry.silent = entry.silent, 0
    if silent:
        log.warning("%d more lines (%s) before this one were not logged", silent, kind)


def tell_silent() -> None:
    """To be called now and then: a flood that has ended gets its closing line."""
    for kind, entry in _kinds.items():
        if entry.silent and entry.may_log(time.monotonic()):
            _tell(_log, kind, entry)


def counts() -> dict[str, int]:
    """Rejections of each kind since the start; without those that the core counts."""
    return {kind: _kinds[kind].count if kind in _kinds else 0 for kind in COUNTED}
