"""`epochctl train-dictionary`: teach zstd what a running agent's images are made of.

Contract. The work is done here, in a nice process of its own, not by the agent: blocks spread
over all images are read (through the page cache, at most SAMPLES of them, for READ_SECONDS at
most), zstd makes a dictionary of most of them, and the rest tells what it gains. What gains
nothing is not kept. The file is durable before the agent is told of it; killed in between, the
agent finds it at its next start. Errors: DictionaryError, nothing has changed then.

An image that is being written to may be read in the middle of that: no harm, these are samples.
"""

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from qemu.qmp import QMPClient

from . import config, core, dictionary
from .errors import DictionaryError

Json = dict[str, Any]

BLOCK = 4096
SAMPLES = 8192
SAMPLES_MIN = 256
TRIES = 4  # to find a block that is not zero in one part of the images
RANGES_MAX = 1 << 16
READ_SECONDS = 60.0
TELL_SECONDS = 1.0
DEFAULT_BYTES = 112 << 10
BYTES_MIN = 4 << 10
HELD_OUT = 8  # one of so many samples is not trained with, but measured
LEVEL = 6  # the lowest at which the packer uses a dictionary
WORTH = 1.01


def _size(text: str) -> int:
    try:
        size = config.parse_size(int(text) if text.isdigit() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not BYTES_MIN <= size <= core.DICTIONARY_BYTES_MAX:
        raise argparse.ArgumentTypeError(
            f"{size} bytes; a dictionary has {BYTES_MIN} to {core.DICTIONARY_BYTES_MAX}")
    return size


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to epochctl's command line."""
    text = "train a compression dictionary on the images, and use it from now on"
    parser = verbs.add_parser("train-dictionary", help=text, description=text + ". It is kept "
                              "beside the journal.", parents=[common])
    parser.add_argument("--size", metavar="SIZE", type=_size, default=DEFAULT_BYTES,
                        help="of the dictionary, 4K to 1M (default: 112K; more gained little)")
    parser.add_argument("--force", action="store_true",
                        help="keep it even if blocks do not become smaller by it")


@dataclass(frozen=True)
class Part:
    """A range of an image that may hold data, in bytes."""

    fd: int
    start: int
    end: int


def data_parts(fd: int, room: int = RANGES_MAX) -> list[Part]:
    """Where the image has data; what lies behind the first `room` ranges counts as one."""
    size = os.lseek(fd, 0, os.SEEK_END) // BLOCK * BLOCK
    parts: list[Part] = []
    at = 0
    while at < size and len(parts) < room - 1:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA) // BLOCK * BLOCK
            at = -(-os.lseek(fd, start, os.SEEK_HOLE) // BLOCK) * BLOCK
        except OSError:  # no more data; or a device, which does not tell
            return parts if parts or _knows_holes(fd) else [Part(fd, 0, size)]
        parts.append(Part(fd, start, min(at, size)))
    if at < size:
        parts.append(Part(fd, at, size))
    return [part for part in parts if part.start < part.end]


def _knows_holes(fd: int) -> bool:
    """False for a device: it refuses the question, a sparse file has no answer (ENXIO)."""
    try:
        os.lseek(fd, 0, os.SEEK_HOLE)
    except OSError:
        return False
    return True


def sample(parts: Sequence[Part], wanted: int, dice: random.Random,
           tell: Callable[[int, int], None]) -> list[bytes]:
    """Up to `wanted` blocks that are not zero, one out of each of as many equal parts."""
    starts, total = [], 0
    for part in parts:
        starts.append(total)
        total += (part.end - part.start) // BLOCK
    wanted = min(wanted, total)
    found: list[bytes] = []
    deadline = time.monotonic() + READ_SECONDS
    number = 0
    for turn in range(wanted):
        low, high = turn * total // wanted, (turn + 1) * total // wanted
        for _ in range(min(TRIES, high - low)):
            block = dice.randrange(low, high)
            while number + 1 < len(starts) and starts[number + 1] <= low:
                number += 1
            here = number
            while here + 1 < len(starts) and starts[here + 1] <= block:
                here += 1
            part = parts[here]
            data = os.pread(part.fd, BLOCK, part.start + (block - starts[here]) * BLOCK)
            if len(data) == BLOCK and data.count(0) < BLOCK:
                found.append(data)
                break
        tell(turn, wanted)
        if time.monotonic() > deadline:
            break
    return found


def _stored(compressor: zstandard.ZstdCompressor, blocks: Sequence[bytes]) -> int:
    """Bytes that the blocks take one by one; as the packer, it leaves raw what hardly shrinks."""
    total = 0
    for block in blocks:
        size = len(compressor.compress(block))
        total += size if size <= BLOCK - BLOCK // 8 else BLOCK
    return total


def train(blocks: Sequence[bytes], size: int, identity: int) -> tuple[bytes, float, float]:
    """(dictionary, ratio without it, ratio with it); ValueError says why there is none."""
    if len(blocks) < SAMPLES_MIN:
        raise ValueError(f"{len(blocks)} blocks with data were found; training takes at least "
                         f"{SAMPLES_MIN}")
    measured = blocks[::HELD_OUT]
    taught: list[bytes | bytearray | memoryview] = [
        block for number, block in enumerate(blocks) if number % HELD_OUT
    ]
    size = min(size, max(BYTES_MIN, len(taught) * BLOCK // 10))  # more would only be copies
    try:
        made = zstandard.train_dictionary(size, taught, dict_id=identity, level=LEVEL)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd makes no dictionary of these blocks: {error}") from None
    plain = _stored(zstandard.ZstdCompressor(level=LEVEL), measured)
    helped = _stored(zstandard.ZstdCompressor(level=LEVEL, dict_data=made), measured)
    given = len(measured) * BLOCK
    return made.as_bytes(), given / plain, given / helped


class _Progress:
    """Lines on stderr, one a second at most."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            print(f"epochctl: {done} of {total} blocks are read", file=sys.stderr, flush=True)


def _make(images: Sequence[str], size: int, force: bool, place: Path, name: str,
          group: bytes) -> Json:
    """All of the work; DictionaryError."""
    os.nice(10)
    dice = random.Random()
    identity = dice.randrange(dictionary.ID_MIN, dictionary.ID_MAX)
    path = dictionary.path_of(place.parent, name, identity)
    descriptors: list[int] = []
    try:
        for image in images:
            descriptors.append(os.open(image, os.O_RDONLY | os.O_CLOEXEC))
        parts = [part for fd in descriptors for part in data_parts(fd)]
        blocks = sample(parts, SAMPLES, dice, _Progress())
        for fd in descriptors:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        data, without, with_it = train(blocks, size, identity)
    except ValueError as error:
        raise DictionaryError(path, f"not made: {error}") from None
    except OSError as error:
        raise DictionaryError(path, f"not made: {error.filename or 'an image'}: "
                              f"{error.strerror}") from None
    finally:
        for fd in descriptors:
            os.close(fd)
    if with_it < without * WORTH and not force:
        raise DictionaryError(path, f"not kept: it gains nothing, {with_it:.2f} : 1 with it and "
                              f"{without:.2f} : 1 without; --force keeps it all the same")
    dictionary.store(place.parent, name, group, identity, data, os.stat(place))
    return {"dictionary": f"{identity:08x}", "size": len(data), "path": str(path),
            "blocks": len(blocks), "ratio-without": round(without, 3),
            "ratio-with": round(with_it, 3)}


async def run(client: QMPClient, options: argparse.Namespace) -> Json:
    """Train on the images of the agent that answers, and let it load the dictionary."""
    status: Json = dict(await client.execute("query-status"))  # type: ignore[call-overload]
    disks: Any = await client.execute("query-disks")
    made = await asyncio.to_thread(
        _make, [disk["image"] for disk in disks], options.size, options.force,
        Path(status["journal"]["path"]), status["name"], _uuid_bytes(status["uuid"]))
    await client.execute("dictionary-load", {"id": made["dictionary"]})
    return made


def _uuid_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("-", ""))


def show(result: Json) -> str:
    """For a person."""
    return (f"dictionary {result['dictionary']}, {result['size'] / 1024:.0f} KiB from "
            f"{result['blocks']} blocks: single blocks shrink {result['ratio-with']:.2f} : 1 "
            f"instead of {result['ratio-without']:.2f} : 1; kept as {result['path']}")
