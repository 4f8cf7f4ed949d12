"""Every way in which epochd refuses or fails: one exception a failing step.

Contract: the docstring is the message, its fields are filled with the constructor's
arguments; `exit_code` is stable, scripts rely on it:

    0  stopped cleanly
    1  failure while running: the C core, the operating system, a bug
    2  command line or configuration file
    3  an image cannot be used: missing, unsuitable, no permission, in use
    4  journal, arena or recovery: refused or no room
    5  a socket cannot be had: in use, not a socket, no permission

epochctl has its own, smaller table (see `ctl`).
"""

from typing import ClassVar

EXIT_OK = 0
EXIT_RUNTIME = 1
EXIT_USAGE = 2
EXIT_IMAGE = 3
EXIT_STATE = 4
EXIT_SOCKET = 5


class EpochdError(Exception):
    """{}"""

    exit_code: ClassVar[int] = EXIT_RUNTIME

    def __init__(self, *details: object) -> None:
        super().__init__(*details)
        template = type(self).__doc__ or "{}"  # python -OO drops docstrings
        self.message = " ".join(template.split()).format(*details)

    def __str__(self) -> str:
        return self.message


# Command line and configuration file.


class UsageError(EpochdError):
    """{}; see epochd --help"""

    exit_code = EXIT_USAGE


class ConfigError(EpochdError):
    """{}: {}: {}"""  # where (file or "command line"), key path, what is wrong

    exit_code = EXIT_USAGE


class ConfigFileError(EpochdError):
    """configuration file {}: {}"""

    exit_code = EXIT_USAGE


# Images.


class ImageError(EpochdError):
    """image {}: {}"""

    exit_code = EXIT_IMAGE


class ImageMissing(EpochdError):
    """image {}: no such file; create it first (qemu-img create -f raw FILE SIZE)"""

    exit_code = EXIT_IMAGE


class ImageInUse(EpochdError):
    """image {}: already in use: {}; stop the other user (QEMU, qemu-img or another epochd)
    first"""

    exit_code = EXIT_IMAGE


class ImageSizeError(EpochdError):
    """image {}: its size, {} bytes, is not a multiple of {}; is it a raw image?"""

    exit_code = EXIT_IMAGE


class ImageTwice(EpochdError):
    """image {}: is the same file as {}; each disk of a group needs an image of its own"""

    exit_code = EXIT_USAGE


# Journal, arena, recovery.


class JournalError(EpochdError):
    """journal {}: {}"""

    exit_code = EXIT_STATE


class JournalInUse(EpochdError):
    """journal {}: another epochd holds it; one agent a consistency group"""

    exit_code = EXIT_STATE


class JournalSpaceError(EpochdError):
    """journal {}: no room for its {} bytes ({}); free some space or give a smaller
    --journal-size"""

    exit_code = EXIT_STATE


class ArenaError(EpochdError):
    """arena /dev/shm{}: {}"""

    exit_code = EXIT_STATE


class ArenaTooLarge(EpochdError):
    """arena size {} bytes: more than {} ({} bytes); give a smaller --arena-size"""

    exit_code = EXIT_STATE


class SpillError(EpochdError):
    """spill file {}: {}"""

    exit_code = EXIT_STATE


class SpillSpaceError(EpochdError):
    """spill file {}: no room for its {} bytes ({}); free some space or give a smaller
    --spill-size"""

    exit_code = EXIT_STATE


class DictionaryError(EpochdError):
    """dictionary {}: {}"""

    exit_code = EXIT_STATE


class DictionaryMissing(EpochdError):
    """group {}: {}; give its file back as {}, whole and unchanged: what was compressed with it
    cannot be read without it. To give up what is not committed remove /dev/shm{}; what is
    committed and not in the images yet is in the journal and needs the file, too"""

    exit_code = EXIT_STATE


class ArenaOrphaned(EpochdError):
    """arena /dev/shm{} goes with these images and with the journal {}, which is gone or is not
    the one that is used now; epochs in the arena may be missing in the images: give that
    journal back, or remove /dev/shm{} to give them up"""

    exit_code = EXIT_STATE


class RecoveryError(EpochdError):
    """group {}: {}"""

    exit_code = EXIT_STATE


# Sockets.


class SocketError(EpochdError):
    """socket {}: {}"""

    exit_code = EXIT_SOCKET


class SocketInUse(EpochdError):
    """socket {}: somebody is listening there already; stop that program or give another
    path"""

    exit_code = EXIT_SOCKET


class SocketPathTaken(EpochdError):
    """socket {}: there is something at this path that is not a socket ({}); remove it or
    give another path"""

    exit_code = EXIT_SOCKET
