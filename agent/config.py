"""Command line and TOML file -> one frozen Config.

Contract: parse() opens nothing but the configuration file. What
is wrong is a ConfigError that names the place (file or command line) and the key. A flag on
the command line wins over the same key of the file. Relative paths in the file are relative
to the file's folder, on the command line to the current one.

Not done here: whether images, sockets and folders are usable (`images`, `listener`,
`storage` find out, and say so).
"""

import argparse
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, core
from .errors import ConfigError, ConfigFileError, UsageError

DEFAULT_ARENA_BYTES = 512 << 20
DEFAULT_SPILL_FACTOR = 2  # of the arena
ON_FULL = ("hold", "spill")
ARENA_AND_SPILL_BYTES_MAX = 128 << 30
DEFAULT_COMPRESS_LEVEL = 1
DEFAULT_SPIN_US = 100
DEFAULT_REACTORS = 1
COMPRESS_LEVEL_MAX = 19
SPIN_US_MAX = 1_000_000
LOG_LEVELS = ("debug", "info", "warning", "error")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
COMMAND_LINE = "command line"

_SIZE_PATTERN = re.compile(r"(\d+)\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)
_SIZE_SHIFT = {"K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True)
class DiskConfig:
    """One disk: exactly one of `socket` and `fd` is set."""

    name: str
    image: Path
    socket: Path | None
    fd: int | None
    read_only: bool
    serial: str


@dataclass(frozen=True)
class Config:
    """A consistency group. `journal_bytes` None: twice the arena, and the spill file;
    `spill_bytes` 0: a full arena holds the guest; `index_bytes` None: a quarter of the arena;
    `apply_rate` None: no limit, else bytes a second."""

    name: str
    disks: tuple[DiskConfig, ...]
    state_dir: Path
    control: Path
    arena_bytes: int
    spill_bytes: int
    index_bytes: int | None
    journal_bytes: int | None
    compress_level: int
    reactors: int
    spin_us: int
    apply_rate: int | None
    log_level: str

    @property
    def journal_path(self) -> Path:
        """The journal file: identity and committed epochs of the group."""
        return self.state_dir / f"{self.name}.epochd-journal"

    @property
    def spill_path(self) -> Path:
        """The spill file: where epochs go on when the arena is full."""
        return self.state_dir / f"{self.name}.epochd-spill"


def parse_size(value: object) -> int:
    """Bytes of an int or of "256M", "1G", "4096", "64KiB" (powers of 1024); ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE_PATTERN.fullmatch(value.strip())):
        size = int(match[1]) << (_SIZE_SHIFT[match[2].upper()] if match[2] else 0)
    else:
        raise ValueError(f"{value!r} is not a size; write bytes or a number with K, M, G or T")
    if not 0 < size < 1 << 62:
        raise ValueError(f"size {value!r} is out of range")
    return size


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    if not value or "\0" in value:
        raise ValueError("must not be empty or hold a NUL")
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def _between(low: int, high: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{value!r} is not an integer")
        if not low <= value <= high:
            raise ValueError(f"{value} is not in {low}..{high}")
        return value

    return check


def _name(value: object) -> str:
    name = _string(value)
    if len(name.encode()) > core.NAME_BYTES_MAX:
        raise ValueError(f"{name!r} is longer than {core.NAME_BYTES_MAX} bytes")
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"{name!r}: use letters, digits and . _ + - and begin with one of "
                         "the first two")
    return name


def _serial(value: object) -> str:
    serial = _string(value)
    if not serial.isascii() or not serial.isprintable():
        raise ValueError(f"{serial!r} is not printable ASCII")
    if len(serial) > core.SERIAL_BYTES_MAX:
        raise ValueError(f"{serial!r} is longer than {core.SERIAL_BYTES_MAX} bytes")
    return serial


def _arena_size(value: object) -> int:
    size = parse_size(value)
    if size < core.ARENA_BYTES_MIN:
        raise ValueError(f"{size} bytes are less than the smallest arena, {core.ARENA_BYTES_MIN}")
    return size


def _spill_size(value: object) -> int:
    size = parse_size(value)
    if size < core.ARENA_BYTES_MIN:
        raise ValueError(f"{size} bytes are less than the smallest spill file, "
                         f"{core.ARENA_BYTES_MIN}")
    return size


def _on_full(value: object) -> str:
    if value not in ON_FULL:
        raise ValueError(f"{value!r} is not one of " + ", ".join(ON_FULL))
    return str(value)


def _index_size(value: object) -> int:
    size = parse_size(value)
    if size < core.INDEX_BYTES_MIN:
        raise ValueError(f"{size} bytes are less than the smallest index, {core.INDEX_BYTES_MIN}")
    return size


GROUP_KEYS: dict[str, Callable[[object], Any]] = {
    "name": _name,
    "state-dir": _string,
    "control": _string,
    "arena-size": _arena_size,
    "on-full": _on_full,
    "spill-size": _spill_size,
    "index-size": _index_size,
    "journal-size": parse_size,
    "compress-level": _between(0, COMPRESS_LEVEL_MAX),
    "reactors": _between(1, core.REACTORS_MAX),
    "spin-us": _between(0, SPIN_US_MAX),
    "apply-rate": parse_size,
}
DISK_KEYS: dict[str, Callable[[object], Any]] = {
    "name": _name,
    "image": _string,
    "socket": _string,
    "read-only": _boolean,
    "serial": _serial,
}


def _check_table(
    where: str, prefix: str, table: dict[str, Any], keys: dict[str, Callable[[object], Any]]
) -> dict[str, Any]:
    """Convert every value of a TOML table; unknown keys and bad values are ConfigErrors."""
    values = {}
    for key, value in table.items():
        if key not in keys:
            raise ConfigError(where, prefix + key, "unknown key; known here: " + ", ".join(keys))
        try:
            values[key] = keys[key](value)
        except ValueError as error:
            raise ConfigError(where, prefix + key, error) from None
    return values


def _default_name(image: Path) -> str:
    """The image's own base name, cut to what a name may be."""
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", image.name)[: core.NAME_BYTES_MAX]
    return name if NAME_PATTERN.fullmatch(name) else f"disk{name}"[: core.NAME_BYTES_MAX]


def _disk(values: dict[str, Any], folder: Path, fd: int | None = None) -> DiskConfig:
    # Resolved: two links to one image must find the same name, hence the same journal.
    image = (folder / values["image"]).resolve()
    name = values.get("name") or _default_name(image)
    return DiskConfig(
        name=name,
        image=image,
        socket=(folder / values["socket"]).absolute() if "socket" in values else None,
        fd=fd,
        read_only=values.get("read-only", False),
        serial=values.get("serial") or name[: core.SERIAL_BYTES_MAX],
    )


def _read_file(path: Path) -> tuple[dict[str, Any], tuple[DiskConfig, ...]]:
    """Return (group keys, disks) of a TOML file; paths are made absolute."""
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise ConfigFileError(path, error.strerror) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigFileError(path, f"not TOML: {error}") from None
    where, folder = str(path), path.absolute().parent
    tables = document.pop("disk", [])
    group = _check_table(where, "", document, GROUP_KEYS)
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(where, "disk", "must be an array of tables: write [[disk]]")
    disks = []
    for index, table in enumerate(tables):
        values = _check_table(where, f"disk[{index}].", table, DISK_KEYS)
        for key in ("image", "socket"):
            if key not in values:
                raise ConfigError(where, f"disk[{index}].{key}", "is missing")
        disks.append(_disk(values, folder))
    for key in ("state-dir", "control"):
        if key in group:
            group[key] = (folder / group[key]).absolute()
    return group, tuple(disks)


def _reject_duplicates(where: str, disks: Sequence[DiskConfig], control: Path) -> None:
    seen: dict[tuple[str, object], str] = {("socket", control): "control"}
    for index, disk in enumerate(disks):
        for key, value in (("name", disk.name), ("image", disk.image), ("socket", disk.socket)):
            path = f"disk[{index}].{key}"
            if value is not None and seen.setdefault((key, value), path) != path:
                raise ConfigError(where, path, f"{value} is the same as {seen[key, value]}")


def _state_dir(where: str, disks: Sequence[DiskConfig]) -> Path:
    """The folder of the images when that is one ordinary folder."""
    folders = {disk.image.parent for disk in disks}
    if len(folders) > 1:
        raise ConfigError(where, "state-dir", "is needed when images lie in different folders")
    if any(disk.image.is_block_device() for disk in disks):
        raise ConfigError(where, "state-dir", "is needed when an image is a block device")
    return folders.pop()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _option_type(check: Callable[[object], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return check(int(text) if re.fullmatch(r"-?\d+", text) else text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


_EPILOG = """\
Sizes are bytes or a number with K, M, G or T (powers of 1024).

The configuration file is TOML: the keys state-dir, control, arena-size, index-size,
journal-size, on-full (hold or spill, default hold), spill-size, compress-level (0 to 19,
default 1; 0: off), reactors (default 1), spin-us (default 100), apply-rate (bytes a second into
the images, default: no limit) and name, and one [[disk]] table a disk with image, socket, name,
read-only and serial. Flags win over the file; paths in the file are relative to its folder.

Files: STATE-DIR/NAME.epochd-journal holds the group's identity and its committed epochs,
/dev/shm/epochd-ID its uncommitted ones, and with --on-full spill STATE-DIR/NAME.epochd-spill
what of them was too much for the arena; without the arena it means nothing.
STATE-DIR/NAME.epochd-dictionary-ID is what epochctl train-dictionary made. NAME is the
first image's base name unless the file says otherwise.

Exit status: 0 stopped cleanly, 1 failure while running, 2 usage or configuration,
3 image unusable or in use, 4 journal, arena or recovery refused, 5 socket unusable.

SIGTERM and SIGINT stop cleanly: committed epochs are brought into the images, open and
sealed ones stay in the arena for the next start. A second signal after a second or more
does not wait for the images; the journal brings them up to date at the next start.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line, a contract: scripts rely on it."""
    parser = _Parser(
        prog="epochd",
        description="Serve raw disk images to a VM over vhost-user-blk and hold back what it "
        "writes until its checkpoint is committed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE.toml", type=Path, help="configuration of one or more disks")
    add("--blk-file", metavar="IMAGE", help="raw image or block device of the only disk")
    add("--socket-path", metavar="SOCK", help="vhost-user socket to create for that disk")
    add("--fd", metavar="N", type=_option_type(_between(0, 1 << 30)),
        help="instead: an inherited socket, listening or connected")
    add("--read-only", action="store_true", help="serve that disk read-only")
    add("--control", metavar="SOCK",
        help="QMP control socket to create (default: STATE-DIR/NAME.control)")
    add("--state-dir", metavar="DIR",
        help="folder of journal and identity (default: the image's folder)")
    add("--arena-size", metavar="SIZE", type=_option_type(_arena_size),
        help="shared memory for epochs that are not applied yet (default: 512M)")
    add("--on-full", choices=ON_FULL,
        help="a full arena makes writes wait (hold, the default), or epochs go on in a file "
        "(spill)")
    add("--spill-size", metavar="SIZE", type=_option_type(_spill_size),
        help="size of that file, allocated at start (default: twice the arena)")
    add("--index-size", metavar="SIZE", type=_option_type(_index_size),
        help="limit of the private memory that tells where blocks are (default: a quarter of the "
        "arena)")
    add("--journal-size", metavar="SIZE", type=_option_type(parse_size),
        help="size of the journal file when it is created (default: twice the arena, "
        "and the spill file)")
    add("--compress-level", metavar="N",
        type=_option_type(_between(0, COMPRESS_LEVEL_MAX)),
        help="zstd level of the arena, 0 to 19; 0: none (default: 1)")
    add("--reactors", metavar="N", type=_option_type(_between(1, core.REACTORS_MAX)),
        help=f"threads that serve the disks, 1 to {core.REACTORS_MAX}: disk d has number d %% N "
        "(default: 1)")
    add("--log-level", choices=LOG_LEVELS, default="info", help="default: info")
    add("--print-capabilities", action="store_true",
        help="print what this vhost-user back end can do, as JSON, and exit")
    add("--version", action="version", version=f"epochd {__version__}")
    return parser


def _command_line_disk(options: argparse.Namespace) -> DiskConfig | None:
    given = [flag for flag in ("socket_path", "fd") if getattr(options, flag) is not None]
    if options.blk_file is None:
        extra = ["--" + flag.replace("_", "-") for flag in given]
        extra += ["--read-only"] * options.read_only
        if extra:
            raise UsageError(f"{extra[0]} needs --blk-file")
        return None
    if len(given) != 1:
        raise UsageError("--blk-file needs either --socket-path or --fd")
    values = {"image": options.blk_file, "read-only": options.read_only}
    if options.socket_path is not None:
        values["socket"] = options.socket_path
    for key in ("image", "socket"):
        try:
            _string(values.get(key, "-"))
        except ValueError as error:
            raise ConfigError(COMMAND_LINE, key, error) from None
    return _disk(values, Path.cwd(), options.fd)


def _spill_bytes(where: str, group: dict[str, Any], arena_bytes: int) -> int:
    """0 when a full arena is to hold the guest."""
    if group.get("on-full", "hold") == "hold":
        if "spill-size" in group:
            raise ConfigError(where, "spill-size", "means nothing without on-full = \"spill\"")
        return 0
    size: int = group.get("spill-size", DEFAULT_SPILL_FACTOR * arena_bytes)
    if arena_bytes + size > ARENA_AND_SPILL_BYTES_MAX:
        raise ConfigError(where, "spill-size", f"{size} bytes and an arena of {arena_bytes} are "
                          f"more than {ARENA_AND_SPILL_BYTES_MAX} together")
    return size


def _check_index_size(where: str, group: dict[str, Any], disks: int) -> None:
    """Each reactor has its share of the index memory."""
    least = core.INDEX_BYTES_MIN * min(disks, group.get("reactors", DEFAULT_REACTORS))
    if group.get("index-size", least) < least:
        raise ConfigError(where, "index-size", f"{group['index-size']} bytes are too few for "
                          f"{least // core.INDEX_BYTES_MIN} reactors: each needs "
                          f"{core.INDEX_BYTES_MIN}")


def _assemble(options: argparse.Namespace) -> Config:
    where = str(options.config) if options.config else COMMAND_LINE
    group, disks = _read_file(options.config) if options.config else ({}, ())
    if (disk := _command_line_disk(options)) is not None:
        if disks:
            raise UsageError(f"--blk-file given, but {where} describes disks already")
        disks = (disk,)
    if not disks:
        raise UsageError("no disk: give --blk-file and --socket-path, or --config with [[disk]]")
    if len(disks) > core.DISKS_MAX:
        raise ConfigError(where, "disk", f"{len(disks)} disks; at most {core.DISKS_MAX}")
    for key in ("arena-size", "index-size", "on-full", "spill-size", "journal-size",
                "compress-level", "reactors"):
        if (value := getattr(options, key.replace("-", "_"))) is not None:
            group[key] = value
    for key in ("state-dir", "control"):
        if (value := getattr(options, key.replace("-", "_"))) is not None:
            group[key] = Path(value).absolute()
    name = group.get("name") or _default_name(disks[0].image)
    state_dir = group.get("state-dir") or _state_dir(where, disks)
    arena_bytes = group.get("arena-size", DEFAULT_ARENA_BYTES)
    _check_index_size(where, group, len(disks))
    config = Config(
        name=name,
        disks=disks,
        state_dir=state_dir,
        control=group.get("control") or state_dir / f"{name}.control",
        arena_bytes=arena_bytes,
        spill_bytes=_spill_bytes(where, group, arena_bytes),
        index_bytes=group.get("index-size"),
        journal_bytes=group.get("journal-size"),
        compress_level=group.get("compress-level", DEFAULT_COMPRESS_LEVEL),
        reactors=group.get("reactors", DEFAULT_REACTORS),
        spin_us=group.get("spin-us", DEFAULT_SPIN_US),
        apply_rate=group.get("apply-rate"),
        log_level=options.log_level,
    )
    _reject_duplicates(where, disks, config.control)
    return config


def parse(arguments: Sequence[str]) -> Config | None:
    """Parse the command line (without the program's name).

    None: --print-capabilities was given, everything else is to be ignored. Raises UsageError,
    ConfigError, ConfigFileError; SystemExit(0) after --help and --version.
    """
    # The vhost-user conventions: other options and arguments are ignored then, even bad ones.
    if "--print-capabilities" in arguments:
        return None
    return _assemble(build_parser().parse_args(arguments))
