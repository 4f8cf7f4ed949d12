"""What can go wrong in a measurement, and what follows from it."""

from __future__ import annotations


class MissingError(Exception):
    """Something is not there: a program, a socket, room. The text says what and what to do.
    Only the comparison that needs it is skipped."""


class FailedError(Exception):
    """What is measured misbehaved: it died, returned wrong data, refused. The run fails."""
