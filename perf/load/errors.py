"""What can go wrong, by the exit status that it leads to."""


class LoadError(Exception):
    """The request, data or back end is at fault: exit status 1."""


class UsageError(LoadError):
    """What was asked for makes no sense: exit status 2."""


class MissingError(LoadError):
    """Something that is needed is not there, or cannot be reached: exit status 3."""
